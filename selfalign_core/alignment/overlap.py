"""Means over transitions that overlap in time, and how far to trust them. Numbers only."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from selfalign_core.robot.types import TransitionBatch


@dataclass(frozen=True)
class Estimate:
    """A mean over transitions, its standard error, and how many independent ones would say as much."""

    mean: float
    stderr: float
    effective_count: float

    def upper(self, sigmas: float) -> float:
        """Upper bound of the mean, as sure as ``sigmas`` standard errors are with many independent values.

        Of few it takes more: Student's t by its expansion about the normal (Abramowitz and Stegun, 26.7.5).
        """
        freedom, s = max(self.effective_count - 1, 1.0), sigmas
        wider = s + (s**3 + s) / (4 * freedom) + (5 * s**5 + 16 * s**3 + 3 * s) / (96 * freedom**2)
        return self.mean + wider * self.stderr

    def lower(self, sigmas: float) -> float:
        """Lower bound, as far below the mean as :meth:`upper` is above it."""
        return 2 * self.mean - self.upper(sigmas)


def spans(batch: TransitionBatch) -> np.ndarray:
    """(B, 2) int64 ns: when each transition begins and ends."""
    return np.stack([batch.frame_stamps[batch.obs_index], batch.frame_stamps[batch.next_index]], axis=1)


def shared_time(spans: np.ndarray) -> np.ndarray:
    """(B, B) share of time that two transitions have in common: 1 for the same time, 0 for one after the other."""
    begin, end = spans[:, 0], spans[:, 1]
    common = np.minimum(end[:, None], end[None]) - np.maximum(begin[:, None], begin[None])
    length = np.maximum(np.maximum((end - begin)[:, None], (end - begin)[None]), 1)
    share = np.clip(common / length, 0.0, 1.0)
    np.fill_diagonal(share, 1.0)
    return share


def estimate(values: np.ndarray, spans: np.ndarray, weights: np.ndarray | None = None) -> Estimate:
    """Mean of ``values`` (B,) over transitions at ``spans`` (B, 2), with an honest standard error.

    Two transitions that share a part of their time are taken to be correlated by that part. Then the variance of the
    mean is ``s² Σρ / B²``, so ``B² / Σρ`` independent transitions would say as much, and the sum of squares about the
    mean has ``B - Σρ/B`` degrees of freedom. Without overlap this is the usual standard error. One effective
    transition says nothing: its standard error is infinite. With ``weights`` (B,) w, of mean 1, the mean, the sum of
    squares and ``Σ wᵢ wⱼ ρᵢⱼ`` are weighted: the more uneven, the fewer transitions they are worth.
    """
    values, count = np.asarray(values, np.float64), len(values)
    weights = np.ones(count) if weights is None else weights / weights.mean()
    correlation, mean = float(weights @ shared_time(spans) @ weights), float(weights @ values) / count
    freedom = count - correlation / count
    if freedom < 1e-9:
        return Estimate(mean, math.inf, 1.0)
    variance = float(weights @ np.square(values - mean)) / freedom
    effective = count**2 / correlation
    return Estimate(mean, math.sqrt(variance / effective), effective)
