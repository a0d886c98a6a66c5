"""What the commands of this folder share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from selfalign_core.command_line import More
from selfalign_core.errors import DatasetError

ImageSize = Annotated[
    tuple[int, ...],
    "height and width of the stored images, or one number for both; what the model reads",
    More(metavar="PIXELS"),
]


def both_sides(image_size: Sequence[int]) -> tuple[int, int]:
    """(height, width) of a command line that gives both, or one number for both."""
    if len(image_size) not in (1, 2) or min(image_size) < 1:
        raise DatasetError(f"--image-size: found {list(image_size)}, expected one or two positive numbers")
    return image_size[0], image_size[-1]
