"""The transitions at hand, and which of them are fitted on and which judged by. Knows neither losses nor tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from selfalign_core.alignment.config import Collect
from selfalign_core.types import TransitionBatch


@dataclass(frozen=True)
class Evidence:
    """Usable transitions, oldest first, when they begin and end, and in words which were left out."""

    batch: TransitionBatch
    spans: np.ndarray
    left_out: tuple[str, ...] = ()

    def select(self, rows: np.ndarray) -> Evidence:
        return Evidence(self.batch.select(rows), self.spans[rows], self.left_out)

    def newest(self, count: int) -> Evidence:
        """At most ``count``."""
        found = len(self.batch)
        return self if found <= count else self.select(np.arange(found - count, found))


def split(spans: np.ndarray, config: Collect) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit on, spread over all there are, and newer rows to judge by.

    One that reaches into the judge's time is in neither.
    """
    rows = np.arange(len(spans))
    older, guard = rows[: -config.guard_count], rows[-config.guard_count :]
    older = older[spans[older, 1] <= spans[guard[0], 0]]
    chosen = np.linspace(0, len(older) - 1, min(config.fit_count, len(older))).round().astype(int)
    return older[chosen], guard
