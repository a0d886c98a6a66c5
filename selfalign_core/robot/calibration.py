"""A short motion of every joint around a pose, so that a robot's transitions can tell which body it is.

Minimum-jerk segments (Flash and Hogan, 1985) between random way points, in the robot's own frame and within the robot
contract's limits; :class:`Calibration` hands it out in pieces that look like action chunks. Must not know kinematics,
bodies or ROS: what is in the way is the operator's to judge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from selfalign_core.errors import ConfigError, InputError
from selfalign_core.robot.contract import RobotContract
from selfalign_core.robot.types import ActionChunk

_CANDIDATES = 32
"""Random tours of which the one is taken whose joints move most independently."""

_PEAK = 1.875
"""Largest speed of a minimum-jerk segment over its mean speed."""


@dataclass(frozen=True)
class CalibrationConfig:
    """How long and how far to move around the pose; the way there takes as long as it takes.

    ``amplitude``: farthest from the pose, rad or m. ``velocity_fraction`` of each joint's speed limit is not
    exceeded; a joint too slow for the amplitude moves less. ``segment_s``: seconds from one way point to the next.
    """

    duration_s: float = 20.0
    amplitude: float = 0.35
    velocity_fraction: float = 0.75
    segment_s: float = 1.25

    def __post_init__(self) -> None:
        for name in ("duration_s", "amplitude", "velocity_fraction", "segment_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"CalibrationConfig.{name}: found {value}, expected a number > 0")
        if self.velocity_fraction > 1:
            raise ConfigError(
                f"CalibrationConfig.velocity_fraction: found {self.velocity_fraction}, expected at most 1"
            )
        if self.segments < 4:
            raise ConfigError(
                f"CalibrationConfig.duration_s: found {self.duration_s}, expected at least 4 segments of "
                f"{self.segment_s} s"
            )

    @property
    def segments(self) -> int:
        return int(self.duration_s / self.segment_s + 1e-9)

    def steps(self, rate_hz: float) -> int:
        """Control steps of the motion around the pose: the last of :func:`calibration_motion`; before them, the way."""
        return round(self.duration_s * rate_hz)


def calibration_motion(
    contract: RobotContract,
    start: np.ndarray,
    config: CalibrationConfig | None = None,
    *,
    around: np.ndarray | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Set-points from ``start`` straight to ``around``, around it and back to it; the same arguments give the same.

    Every joint takes all levels from one end of its box to the other once, each joint in another order, so that each
    is excited by itself.

    Args:
        start: (joints,) where the robot is commanded to be now, contract order and units.
        around: (joints,) the pose in the middle, by default ``start``.

    Returns:
        (steps, joints) float64; row i is in force from ``i * contract.dt`` to ``(i + 1) * contract.dt`` seconds, the
        last row is ``around``. No joint leaves its limits or moves faster than the contract allows.

    Raises:
        InputError: a wrong shape, a number that is not finite, or a joint outside its limits.
    """
    config = config or CalibrationConfig()
    start = _pose(contract, start, "start")
    around = start if around is None else _pose(contract, around, "around")
    steps = config.steps(contract.rate_hz)
    lower, upper = _box(contract, around, config, steps * contract.dt / config.segments)
    tour = _tour(around, lower, upper, config.segments - 1, np.random.default_rng(seed))
    place = np.arange(1, steps + 1) / steps * config.segments
    segment = np.minimum(place.astype(int), config.segments - 1)
    path = _minimum_jerk(tour[segment], tour[segment + 1], place - segment)
    path[-1] = around
    return np.concatenate([_approach(contract, start, around, config), np.clip(path, lower, upper)])


@dataclass(frozen=True)
class Calibration:
    """The motion on its way to the robot. ``positions`` (steps, joints): row i is in force from ``stamp_ns + i * dt``
    on; the first ``approach_steps`` of them lead to where the motion is to take place.

    In pieces, so that a robot whose policy node dies stops within two of them instead of finishing the motion alone.
    """

    contract: RobotContract
    positions: np.ndarray
    approach_steps: int
    stamp_ns: int

    @classmethod
    def plan(
        cls,
        contract: RobotContract,
        start: np.ndarray,
        now_ns: int,
        *,
        around: Literal["here", "home"],
        duration_s: float,
        amplitude: float,
        seed: int,
    ) -> Calibration:
        """The motion from ``start`` (joints,), beginning now, around it or the robot's home.

        Raises:
            InputError: one of the two is outside the limits.
        """
        config = CalibrationConfig(duration_s=duration_s, amplitude=amplitude)
        middle = contract.home if around == "home" else start
        positions = calibration_motion(contract, start, config, around=middle, seed=seed)
        return cls(contract, positions, len(positions) - config.steps(contract.rate_hz), now_ns)

    def shortened(self, now_ns: int) -> Calibration | None:
        """What is left of it to be gone through if it is to end now: the way to where it is to take place."""
        left = self.stamp_ns + self.approach_steps * self.contract.dt_ns > now_ns
        return replace(self, positions=self.positions[: self.approach_steps]) if left else None

    @property
    def duration_s(self) -> float:
        return len(self.positions) * self.contract.dt_ns / 1e9

    @property
    def end_ns(self) -> int:
        return self.stamp_ns + len(self.positions) * self.contract.dt_ns

    def piece(self, now_ns: int) -> ActionChunk | None:
        """What comes next, two inferences' worth of it, after the end at rest; None when the motion is over."""
        if now_ns >= self.end_ns:
            return None
        first = (now_ns - self.stamp_ns) // self.contract.dt_ns
        rows = np.arange(first, first + 2 * self.contract.replan_steps)
        return ActionChunk(
            actions=self.positions[np.minimum(rows, len(self.positions) - 1)],
            dt=self.contract.dt_ns / 1e9,
            stamp_ns=self.stamp_ns + first * self.contract.dt_ns,
            e_token_version=0,
            inference_s=0.0,
        )


def _pose(contract: RobotContract, pose: np.ndarray, name: str) -> np.ndarray:
    """``pose`` as float64. Raises :class:`InputError` if it is not one of the robot within its limits."""
    pose, names = np.asarray(pose, np.float64), contract.joint_names
    if pose.shape != (len(names),):
        raise InputError(f"{name}: found shape {pose.shape}, expected ({len(names)},): {', '.join(names)}")
    for joint, value in zip(contract.joints, pose, strict=True):
        if not joint.lower <= value <= joint.upper:
            raise InputError(
                f"{name}: found {value:.4g} {joint.unit} for joint {joint.name}, expected {joint.lower:g} to "
                f"{joint.upper:g}"
            )
    return pose


def _minimum_jerk(begin: np.ndarray, end: np.ndarray, share: np.ndarray) -> np.ndarray:
    """(n, joints) between ``begin`` and ``end``, at ``share`` (n,) of the time from 0 to 1."""
    s = share[:, None]
    return begin + (end - begin) * (s**3 * (10.0 - 15.0 * s + 6.0 * s * s))


def _approach(contract: RobotContract, start: np.ndarray, around: np.ndarray, config: CalibrationConfig) -> np.ndarray:
    """(steps, joints) from ``start`` to ``around`` as fast as the slowest joint may; no step if it is there."""
    slowest_s = (np.abs(around - start) / (config.velocity_fraction * contract.speed_limit)).max()
    steps = math.ceil(_PEAK * slowest_s * contract.rate_hz)
    path = _minimum_jerk(start, around, np.arange(1, steps + 1) / max(steps, 1))
    path[-1:] = around
    return path


def _box(
    contract: RobotContract, around: np.ndarray, config: CalibrationConfig, segment_s: float
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper ends (joints,) of where each joint may go."""
    reach = config.velocity_fraction * contract.speed_limit * segment_s / _PEAK
    amplitude = np.minimum(config.amplitude, reach / 2)
    return np.maximum(around - amplitude, contract.lower), np.minimum(around + amplitude, contract.upper)


def _tour(around: np.ndarray, lower: np.ndarray, upper: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count + 2, joints) ``around``, ``count`` way points, ``around``."""
    levels = np.broadcast_to(np.linspace(-1.0, 1.0, count)[:, None], (_CANDIDATES, count, len(around)))
    tours = np.pad(rng.permuted(levels, axis=1), ((0, 0), (1, 1), (0, 0)))
    independence = np.linalg.svd(np.diff(tours, axis=1), compute_uv=False)[:, -1]
    points = (lower + upper) / 2 + tours[independence.argmax()] * (upper - lower) / 2
    points[[0, -1]] = around
    return points
