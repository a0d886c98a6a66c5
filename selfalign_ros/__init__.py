"""The ROS 2 nodes and the graph they make. Holds no maths: that is in ``selfalign_core``."""

import sys
from typing import Any


def _show(kind: type[BaseException], *rest: Any) -> None:
    """An interrupt while a node still imports, before ``process.start_ros``, ends it like any other: no traceback."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, *rest)


sys.excepthook = _show
