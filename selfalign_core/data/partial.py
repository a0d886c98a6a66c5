"""A directory that is either complete or not there: written under a hidden name, synced, then renamed.

Knows nothing of what is in it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from selfalign_core.errors import SelfAlignError


class DatasetError(SelfAlignError):
    """A dataset that cannot be read or written: the message names the file or the episode and frame."""


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
        """Everything to the disk, then to its name, in this order."""
        (self.path / "lock").unlink()
        for path in self.path.rglob("*"):
            sync(path)
        sync(self.path)
        if self.target.exists():
            raise DatasetError(f"{self.target}: found a path made meanwhile, expected none")
        self.path.rename(self.target)
        sync(self.target.parent)
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


def sync(path: Path) -> None:
    """Have the file or directory on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
