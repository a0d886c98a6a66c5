"""What outlives the processes: files with the accepted E-Tokens, and a stop that nobody has cleared.

What is in a token file, and whether it fits, is for ``load`` and ``save`` to say. Knows neither ROS nor models.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from selfalign_core.errors import SelfAlignError

Content = TypeVar("Content")


class KeptFile:
    """One file. ``problem`` says what keeps it from being read or written; "" if nothing does.

    A file that is refused when it is read stays where it is; before another is written in its place it is renamed to
    end in ``.refused``. Without a path nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self.problem = path, ""
        self._refused = False

    def read(self, load: Callable[[Path], Content]) -> Content | None:
        """What ``load`` makes of the file. None if there is none, or ``load`` refuses it with a ``SelfAlignError``."""
        if self.path is None or not self.path.exists():
            return None
        try:
            return load(self.path)
        except (SelfAlignError, OSError) as error:
            self.problem, self._refused = f"saved E-Token {self.path} not used: {error}", True
            return None

    def write(self, save: Callable[[Path], None]) -> None:
        """Have ``save`` write the file. A disk that is full is a ``problem``, no exception: the robot works on."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._refused:
                self.path.replace(self.path.with_name(f"{self.path.name}.refused"))
                self._refused = False
            save(self.path)
            self.problem = ""
        except OSError as error:
            self.problem = f"E-Token not saved, it will not survive a restart: {error}"


class StopLatch:
    """A stop that stays until it is cleared, over a restart too where there is a ``path`` to keep it.

    There is none in lock-step only, where nothing can be stopped.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.reason = ""
        if path is not None and path.exists():
            self.reason = f"stopped by ~/stop before this process began, see {path}; expected a call of ~/clear_stop"

    def set(self) -> None:
        """Stop. Raises ``OSError`` if that cannot be kept over a restart; it holds in this process all the same."""
        self.reason = "stopped by ~/stop; expected a call of ~/clear_stop"
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch()

    def clear(self) -> None:
        """End the stop. Raises ``OSError`` if its file cannot be removed; then it is not ended."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        self.reason = ""
