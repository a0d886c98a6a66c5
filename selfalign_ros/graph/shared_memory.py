"""Removes the shared memory that killed nodes leave behind; Fast DDS itself never does.

Each DDS participant keeps its messages in a segment of /dev/shm and holds a lock on a file beside it for as long as it
lives, which the kernel takes back however its process ends. A segment whose lock is free belongs to nobody any more.
Knows neither ROS nor the graph.
"""

from __future__ import annotations

import fcntl
import re
import time
from pathlib import Path

_LOCK_FILE = re.compile(r"fastrtps_[0-9a-f]{16}_el")
_NEWBORN_S = 1.0  # between making the file and locking it


def remove_orphaned_segments(folder: Path = Path("/dev/shm"), *, wait: bool = False) -> list[str]:
    """Remove every Fast DDS segment whose owner is gone; returns their names. What may not be removed stays.

    So does one younger than a second, whose owner may be about to lock it. ``wait`` for those to come of age, if there
    are any: for the last call of whoever started their owners.
    """
    removed, young = _sweep(folder)
    if young and wait:
        time.sleep(_NEWBORN_S)
        removed += _sweep(folder)[0]
    return removed


def _sweep(folder: Path) -> tuple[list[str], bool]:
    """The names of those removed, and whether any was too young to tell."""
    removed, young = [], False
    for lock in folder.glob("fastrtps_*_el") if folder.is_dir() else ():
        if not _LOCK_FILE.fullmatch(lock.name):
            continue  # a port: Fast DDS looks after those, several processes share them
        try:
            if time.time() - lock.stat().st_mtime < _NEWBORN_S:
                young = True
                continue
            with lock.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                segment = lock.with_name(lock.name.removesuffix("_el"))
                segment.unlink(missing_ok=True)
                lock.unlink(missing_ok=True)
                removed.append(segment.name)
        except OSError:  # held by its owner, gone meanwhile, or another user's
            continue
    return removed, young
