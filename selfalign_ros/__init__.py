"""The ROS 2 nodes and the graph they make. Holds no maths: that is in ``selfalign_core``."""

import os
import signal
import sys
from types import TracebackType


def _show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """An interrupt while a node still imports, before ``process.start_ros``, ends it like any other: no traceback.

    Nor is there one for what an importer makes of it; the process then ends as of the interrupt itself.
    """
    first = error
    while first.__cause__ is not None:
        first = first.__cause__
    if not isinstance(first, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
    elif first is not error:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


sys.excepthook = _show
