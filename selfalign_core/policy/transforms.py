"""From robot numbers to model numbers and back: normalisation, delta actions, padding. Imports neither torch nor ROS.

Order as in openpi: raw → delta → normalise → pad → model → cut → un-normalise → absolute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from selfalign_core.errors import CheckpointError, InputError
from selfalign_core.records import shown

NormMode = Literal["identity", "z_score", "quantile"]
EPSILON = 1e-6
"""openpi's, added to every standard deviation and quantile range, there and back."""
STATISTICS = ("mean", "std", "q01", "q99", "min", "max")


@dataclass(frozen=True)
class NormStats:
    """Statistics of one vector, each (dim,) float32; ``q01`` and ``q99`` are the 1 % and 99 % quantiles."""

    mean: np.ndarray
    std: np.ndarray
    q01: np.ndarray | None = None
    q99: np.ndarray | None = None
    min: np.ndarray | None = None
    max: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in STATISTICS:
            value = getattr(self, name)
            if value is None:
                continue
            try:
                array = np.asarray(value, np.float32)
            except (TypeError, ValueError):
                array = np.array(np.nan)
            if array.ndim != 1 or not np.isfinite(array).all():
                raise InputError(f"NormStats.{name}: found {shown(value)}, expected a vector of finite numbers")
            if array.shape != np.shape(self.mean):
                raise InputError(f"NormStats.{name}: found {array.shape}, expected mean's {np.shape(self.mean)}")
            object.__setattr__(self, name, array)

    @classmethod
    def of(cls, values: np.ndarray) -> NormStats:
        """Statistics of ``values`` (N, dim)."""
        values = np.asarray(values, np.float64)
        q01, q99 = np.quantile(values, [0.01, 0.99], axis=0)
        return cls(values.mean(0), values.std(0), q01, q99, values.min(0), values.max(0))

    def over_range(self, source: object) -> NormStats:
        """The same with minimum and maximum in place of the quantiles (LeRobot's MIN_MAX)."""
        if self.min is None or self.max is None:
            raise CheckpointError(f"{source}: found MIN_MAX normalisation without min and max, expected both")
        return NormStats(self.mean, self.std, self.min, self.max)

    def to_dict(self) -> dict[str, list[float]]:
        return {k: v.tolist() for k, v in vars(self).items() if v is not None}


@dataclass(frozen=True)
class Normalizer:
    """``z_score``: (x - mean) / std; ``quantile``: q01..q99 → -1..1; ``identity``. Works on the last axis.

    ``lerobot_epsilon``: what keeps divisors from being zero by LeRobot's rule: added to a standard deviation when
    normalising only, and in place of a quantile range that is empty. None: openpi's rule (:data:`EPSILON`).
    """

    stats: NormStats | None
    mode: NormMode
    lerobot_epsilon: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("identity", "z_score", "quantile"):
            raise InputError(f"normalisation mode: found {self.mode!r}, expected identity, z_score or quantile")
        if self.mode != "identity" and self.stats is None:
            raise InputError(f"normalisation {self.mode}: found no statistics, expected mean and std (and q01, q99)")
        if self.mode == "quantile" and self.stats is not None and (self.stats.q01 is None or self.stats.q99 is None):
            raise InputError("normalisation quantile: found statistics without q01 and q99, expected both")

    def _parts(self, dim: int, *, back: bool) -> tuple[np.ndarray | float, np.ndarray | float, float]:
        """Origin, scale and shift, float64: normalised = (x - origin) / scale - shift; ``back``: for undoing it."""
        stats = self.stats
        if self.mode == "identity" or stats is None:
            return 0.0, 1.0, 0.0
        if dim != len(stats.mean):
            raise InputError(f"normalisation: found a vector of {dim}, expected {len(stats.mean)} (statistics)")
        if self.mode == "z_score":
            epsilon = EPSILON if self.lerobot_epsilon is None else 0.0 if back else self.lerobot_epsilon
            return stats.mean.astype(np.float64), stats.std.astype(np.float64) + epsilon, 0.0
        assert stats.q01 is not None and stats.q99 is not None
        # The shift stays apart: added to the origin, half of a range near EPSILON would be lost in rounding.
        q01 = stats.q01.astype(np.float64)
        width = stats.q99 - q01
        if self.lerobot_epsilon is None:
            return q01, (width + EPSILON) / 2, 1.0
        return q01, np.where(width == 0, self.lerobot_epsilon, width) / 2, 1.0

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """Robot units → model units, float32."""
        origin, scale, shift = self._parts(x.shape[-1], back=False)
        return ((x - origin) / scale - shift).astype(np.float32)

    def unnormalize(self, x: np.ndarray) -> np.ndarray:
        """Model units → robot units, float32."""
        origin, scale, shift = self._parts(x.shape[-1], back=True)
        return ((x + shift) * scale + origin).astype(np.float32)


def pad_to_dim(x: np.ndarray, dim: int) -> np.ndarray:
    """Zero-pad the last axis to ``dim``; a longer vector is an error."""
    if x.shape[-1] > dim:
        raise InputError(f"padding: found a vector of {x.shape[-1]}, expected at most the model's {dim}")
    return np.concatenate([x, np.zeros((*x.shape[:-1], dim - x.shape[-1]), x.dtype)], axis=-1)


def to_delta(actions: np.ndarray, state: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Absolute (..., K, A) → relative to ``state`` (..., S) in the dimensions where ``mask`` (A,) is True.

    S may differ from A: a dimension where ``mask`` is True is one that both have, at the same place.
    """
    return actions - _reference(state, mask)[..., None, :].astype(actions.dtype)


def to_absolute(actions: np.ndarray, state: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Inverse of :func:`to_delta`."""
    return actions + _reference(state, mask)[..., None, :].astype(actions.dtype)


def _reference(state: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(..., A): ``state`` (..., S) where ``mask`` (A,) is True, 0 elsewhere."""
    state = state[..., : len(mask)]
    return np.where(mask, pad_to_dim(state, len(mask)), 0)
