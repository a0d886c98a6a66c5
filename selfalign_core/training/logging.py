"""What a run says while it runs: JSON lines, TensorBoard and a progress bar, the same numbers in all of them.

Only the first rank makes one. Knows nothing of what the numbers mean.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from selfalign_core.errors import ConfigError, SelfAlignError
from selfalign_core.files import write_text

LOG_NAME = "log.jsonl"


class LogError(SelfAlignError):
    """The log cannot be written, so the run ends; its checkpoints are as they were."""


class RunLog:
    """One object per line in ``log.jsonl``, each with ``step`` and ``kind`` (``train``, ``eval``, ``gap``, ``note``).

    Args:
        directory: run directory. steps: of the whole run. start: step resumed from; what an interrupted run logged
            after it is removed, so that the log reads as if nothing had happened.

    Raises:
        LogError: here and in :meth:`write`, when the disk is full for example.
    """

    def __init__(self, directory: Path, *, steps: int, start: int, tensorboard: bool, progress: bool):
        self._path = directory / LOG_NAME
        with _writing(self._path):
            directory.mkdir(parents=True, exist_ok=True)
            drop_after(self._path, start)
            self._file = self._path.open("a", encoding="utf-8")
        self._board = _summary_writer(directory / "tensorboard", start) if tensorboard else None
        self._bar = tqdm(
            total=steps,
            initial=start,
            disable=not progress,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
        )

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Log ``values`` (numbers or text) after ``step`` steps."""
        with _writing(self._path):
            self._file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def note(self, step: int, text: str) -> None:
        """Something a person should read."""
        self.write("note", step, {"text": text})
        self._bar.write(f"step {step}: {text}", file=sys.stderr)

    def advance(self, shown: dict[str, str] | None = None) -> None:
        """One step done; ``shown`` goes to the end of the progress bar."""
        if shown:
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def close(self) -> None:
        self._bar.close()
        with suppress(OSError):  # every line has been flushed, and what could not be written has been told
            self._file.close()
        if self._board is not None:
            self._board.close()


def read_log(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of a log, of one ``kind`` if given; an incomplete last line (a killed run) is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if kind is None or line["kind"] == kind:
            lines.append(line)
    return lines


def drop_after(path: Path, step: int) -> None:
    """Remove the lines later than ``step``, all at once."""
    if not path.is_file():
        return
    kept = "".join(json.dumps(line) + "\n" for line in read_log(path) if line["step"] <= step)
    write_text(path, kept)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LogError(
            f"{path}: could not write the log ({error}); --resume goes on from the newest checkpoint"
        ) from error


def _summary_writer(directory: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            f"log.tensorboard: found no package tensorboard ({error}), expected it installed, or log.tensorboard: false"
        ) from error
    return SummaryWriter(str(directory), purge_step=start + 1 if start else None)
