"""``python -m selfalign_ros.tools.record --output DIR --duration N``: bring the graph up, record a bag of it, stop.

Only the command line is handled here; the recording is done by ``selfalign_ros.tools.recorder_node``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from selfalign_ros.graph.declaration import RECORD
from selfalign_ros.tools.bringup import run


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the graph."""
    return run(RECORD, "selfalign_ros.tools.record", argv)


if __name__ == "__main__":
    sys.exit(main())
