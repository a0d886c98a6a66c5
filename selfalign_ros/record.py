"""``python -m selfalign_ros.record --output DIR --duration N``: bring the graph up, record an MCAP bag of it, stop.

Only the command line is handled here; the recording is done by ``selfalign_ros.recorder_node``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from selfalign_ros.bringup import run
from selfalign_ros.graph import RECORD


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the graph."""
    return run(RECORD, "selfalign_ros.record", argv)


if __name__ == "__main__":
    sys.exit(main())
