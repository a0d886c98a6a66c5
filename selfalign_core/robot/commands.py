"""From an action chunk to commands a robot may be given: actions picked by time stamp, positions limited.

Pure numpy, so what the robot may be told is tested without a robot. Knows nothing of ROS or the model.
Positions are in contract units (rad or m), stamps in integer nanoseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from selfalign_core.errors import InputError
from selfalign_core.robot.contract import RobotContract


def step_in_force(*, stamp_ns: int, dt_ns: int, horizon: int, now_ns: int) -> int | None:
    """Index of the action in force at ``now_ns``: action i rules from ``stamp + i*dt`` up to ``stamp +
    (i+1)*dt``.

    None before the chunk starts and past its horizon.
    """
    step = (now_ns - stamp_ns) // dt_ns
    return step if 0 <= step < horizon else None


def first_to_come(*, stamp_ns: int, dt_ns: int, now_ns: int) -> int:
    """Index of the first action that is due after ``now_ns``; it may be past the horizon."""
    return max(0, (now_ns - stamp_ns) // dt_ns + 1)


@dataclass(frozen=True)
class CommandLimiter:
    """Keeps commands inside the position limits and below the speed limit.

    ``lower``, ``upper``: (joints,) in contract units; ``speed``: (joints,) in units per second.
    """

    lower: np.ndarray
    upper: np.ndarray
    speed: np.ndarray

    @classmethod
    def from_contract(cls, contract: RobotContract) -> CommandLimiter:
        return cls(contract.lower, contract.upper, contract.speed_limit)

    def slowed(self, factor: float) -> CommandLimiter:
        """One that allows the ``factor``-th part of the speed."""
        return self if factor == 1 else replace(self, speed=self.speed / factor)

    def limit(self, target: np.ndarray, reference: np.ndarray, duration_s: float) -> np.ndarray:
        """The position nearest to ``target`` that may be commanded ``duration_s`` after ``reference`` was.

        Both (joints,); returns (joints,) float64. Raises ``InputError`` on NaN. See :meth:`limit_all`.
        """
        return self.limit_all(np.asarray(target)[None], reference, np.array([duration_s]))[0]

    def limit_all(
        self, targets: np.ndarray, reference: np.ndarray, durations_s: np.ndarray, elsewhere: np.ndarray | None = None
    ) -> np.ndarray:
        """(n, joints) float64 positions to command one after another in place of ``targets`` (n, joints).

        The first ``durations_s[0]`` after ``reference`` (joints,) was, each other one so long after the one before. The
        position limit is applied first, the speed limit last: a joint found outside its limits comes back at limited
        speed instead of jumping. ``elsewhere`` (joints,), no further from ``reference`` than the first duration allows:
        another place that the first position has to be in reach of. Raises ``InputError`` on NaN.
        """
        if not (np.isfinite(targets).all() and np.isfinite(reference).all()):
            raise InputError(f"command: found {targets} from {reference}; expected finite positions")
        positions = np.clip(np.asarray(targets, np.float64), self.lower, self.upper)
        low = high = np.asarray(reference, np.float64)
        if elsewhere is not None:
            low, high = np.maximum(low, elsewhere), np.minimum(low, elsewhere)
        for position, reach in zip(positions, self.speed * durations_s[:, None], strict=True):
            np.maximum(position, low - reach, out=position)
            np.minimum(position, high + reach, out=position)
            low = high = position
        return positions


@dataclass(frozen=True)
class CommandPath:
    """A piecewise linear path of commanded positions: what a joint trajectory controller follows."""

    stamps_ns: np.ndarray  # (points,) int64, rising; the first is where the path starts
    positions: np.ndarray  # (points, joints) float64

    def at(self, now_ns: int) -> np.ndarray:
        """Commanded position at ``now_ns``, (joints,) float64; held before and after the path."""
        offsets = (self.stamps_ns - self.stamps_ns[0]).astype(np.float64)
        offset = float(now_ns - int(self.stamps_ns[0]))
        return np.array([np.interp(offset, offsets, column) for column in self.positions.T])

    def starting_at(self, position: np.ndarray) -> CommandPath:
        """The path of a robot that starts at ``position`` (joints,) instead."""
        return replace(self, positions=np.concatenate([position[None], self.positions[1:]]))


def plan_path(
    actions: np.ndarray,
    *,
    stamp_ns: int,
    dt_ns: int,
    now_ns: int,
    reference: np.ndarray,
    limiter: CommandLimiter,
    elsewhere: np.ndarray | None = None,
) -> CommandPath | None:
    """The path through the actions of a chunk that are still to come, starting from ``reference`` at
    ``now_ns``.

    ``actions`` (horizon, joints), action i due at ``stamp + i*dt``. Actions already past are dropped by
    their time stamps, so a controller never jumps back; every segment keeps the limits, also for a controller that is
    ``elsewhere`` (joints,) now, for which the first action may be a later one. None when nothing is left to do.
    """
    apart_ns = 0 if elsewhere is None else int((np.abs(elsewhere - reference) / limiter.speed).max() * 1e9)
    first = first_to_come(stamp_ns=stamp_ns, dt_ns=dt_ns, now_ns=now_ns + apart_ns)
    if first >= len(actions):
        return None
    stamps_ns = np.array([now_ns, *(stamp_ns + step * dt_ns for step in range(first, len(actions)))], np.int64)
    positions = limiter.limit_all(actions[first:], reference, np.diff(stamps_ns) / 1e9, elsewhere)
    return CommandPath(stamps_ns, np.concatenate([np.asarray(reference, np.float64)[None], positions]))
