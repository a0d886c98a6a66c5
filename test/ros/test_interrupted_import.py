"""An interrupt that comes while a node still imports, whatever an importer makes of it."""

from __future__ import annotations

import signal
import subprocess
import sys

INTERRUPTED = """
import selfalign_ros
try:
    raise KeyboardInterrupt
except KeyboardInterrupt as error:
    raise ImportError("the C extension failed to be imported") from error
"""


def test_an_interrupt_that_an_importer_wraps_is_no_traceback() -> None:
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")


def test_other_errors_keep_theirs() -> None:
    code = "import selfalign_ros\nraise ImportError('no such thing')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and "ImportError: no such thing" in ended.stderr
