"""Files and directories that are either complete or not there: written under a hidden name, synced, then renamed.

Knows nothing of what is in them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from selfalign_core.errors import DatasetError


def write_atomically(path: Path, write: Callable[[str], object]) -> None:
    """Write to a temporary file beside ``path``, sync it, rename it: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        write(str(temporary))
        temporary.chmod(0o644)
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """A text file by :func:`write_atomically`."""
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def publish(hidden: Path, target: Path, *, instead: bool = False) -> None:
    """All of ``hidden``, a file or a directory, to the disk, then to its name beside it, in this order.

    ``instead``: of the directory that has the name, which is removed.
    """
    for path in [*hidden.rglob("*"), hidden]:
        sync(path)
    if instead:
        shutil.rmtree(target, ignore_errors=True)
    os.replace(hidden, target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Have the file or directory on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class PartialDirectory:
    """``path`` is the hidden directory to write in until :meth:`publish`; ``target`` is what it becomes.

    A lock tells a directory in use from one whose writer was killed; the latter is emptied by the next writer.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.parent / f".{target.name}.partial"
        self._lock: int | None = None

    def open(self) -> None:
        """Raises ``DatasetError`` if the target exists or another process writes it."""
        if self.target.exists():
            raise DatasetError(f"{self.target}: found an existing path, expected one that does not exist yet")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._release()
            raise DatasetError(f"{self.target}: found another process writing it, expected only this one") from None
        for leftover in self.path.iterdir():
            if leftover.is_dir():
                shutil.rmtree(leftover)
            elif leftover.name != "lock":
                leftover.unlink()

    def publish(self) -> None:
        """Everything to the disk, then to its name."""
        (self.path / "lock").unlink()
        if self.target.exists():
            raise DatasetError(f"{self.target}: found a path made meanwhile, expected none")
        publish(self.path, self.target)
        self._release()

    def remove(self) -> None:
        """Give up; without effect once published."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
