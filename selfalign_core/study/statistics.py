"""Confidence intervals of what is counted and measured over episodes; percentiles; JSON's numbers.

Both intervals take the observations as independent. Episodes on a few bodies say how a policy does on these bodies; for
other bodies the spread between bodies counts as well, and the interval is too narrow unless there are about as many
bodies as episodes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from selfalign_core.errors import InputError

_RESAMPLES, _SEED = 2_000, 0


def share_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson, 1927): sensible at 0 and at 1 too, where the normal one is a point.

    Raises:
        InputError: ``n`` below 1, or ``successes`` outside 0..n.
    """
    if not (n >= 1 and 0 <= successes <= n):
        raise InputError(f"share: found {successes} of {n}, expected 0..n of n >= 1")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # Exact at the ends, where rounding would leave 1e-17.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def mean_interval(values: Sequence[float] | np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of ``values`` (n,); always the same for the same values.

    Raises:
        InputError: no values, or one that is not finite.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise InputError(f"mean: found shape {values.shape}, expected (n,) finite numbers, n >= 1")
    rng = np.random.default_rng(_SEED)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(_RESAMPLES)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def statistics(values: Sequence[float]) -> dict[str, float | int | None]:
    """Count, mean, percentiles (linear between samples) and maximum; null where there are no values."""
    if not values:
        return {"count": 0, "mean": None, "p50": None, "p95": None, "p99": None, "max": None}
    array = np.asarray(values, np.float64)
    p50, p95, p99 = np.percentile(array, (50, 95, 99))
    numbers = {"mean": array.mean(), "p50": p50, "p95": p95, "p99": p99, "max": array.max()}
    return {"count": len(values)} | {name: float(value) for name, value in numbers.items()}


def finite(value: Any) -> Any:
    """``value`` with every number that is not finite replaced by None: JSON knows no NaN."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
