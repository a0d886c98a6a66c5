"""The transitions at hand, and which of them are fitted on and which judged by. Knows neither losses nor tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from selfalign_core.alignment.config import Collect
from selfalign_core.robot.types import TransitionBatch


@dataclass(frozen=True)
class Evidence:
    """Usable transitions, oldest first, when they begin and end, and in words which were left out."""

    batch: TransitionBatch
    spans: np.ndarray
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.batch)

    def select(self, rows: np.ndarray) -> Evidence:
        return Evidence(self.batch.select(rows), self.spans[rows], self.left_out)

    def newest(self, count: int) -> Evidence:
        """At most ``count``."""
        found = len(self)
        return self if found <= count else self.select(np.arange(found - count, found))


def split(spans: np.ndarray, config: Collect, unseen_ns: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit on, spread over all there are; and newer ones to judge by if enough begin at ``unseen_ns`` or later.

    One that reaches into the judge's time is in neither. While there is nothing to judge by, all are to fit on.
    """
    rows = np.arange(len(spans))
    if len(rows) >= config.count and spans[-config.guard_count, 0] >= unseen_ns:
        older, guard = rows[: -config.guard_count], rows[-config.guard_count :]
        older = older[spans[older, 1] <= spans[guard[0], 0]]
        if len(older):
            return _spread(older, config.fit_count), guard
    return _spread(rows, config.fit_count), rows[:0]


def to_judge_by(spans: np.ndarray, config: Collect, unseen_ns: int) -> np.ndarray:
    """The newest rows that begin at ``unseen_ns`` or later, no more than have to be."""
    return np.flatnonzero(spans[:, 0] >= unseen_ns)[-config.guard_count :]


def _spread(rows: np.ndarray, count: int) -> np.ndarray:
    """At most ``count`` of ``rows``."""
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)]
