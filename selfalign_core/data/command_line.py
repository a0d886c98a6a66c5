"""What the commands of this folder share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from selfalign_core.errors import DatasetError, SelfAlignError


def image_size_argument(numbers: Sequence[int]) -> tuple[int, int]:
    """(height, width) of a command line that gives both, or one number for both."""
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise DatasetError(f"--image-size: found {list(numbers)}, expected one or two positive numbers")
    return numbers[0], numbers[-1]


def run_command(work: Callable[[], None]) -> int:
    """Run what a command does; its exit code. What a user can mend is printed without a traceback."""
    try:
        work()
    except (SelfAlignError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0
