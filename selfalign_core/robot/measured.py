"""What measured poses say of a robot: whether it can have come to where it says it is, and whether it follows."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from selfalign_core.errors import InputError
from selfalign_core.robot.clocks import NS_PER_S
from selfalign_core.robot.contract import Joint

_BELIEVED_SPEED = 2.0  # of the contract's: a robot that is pushed, or overshoots, is faster than it is told to be
_BELIEVED_NOISE = 0.02  # between two measured poses whatever the time between them [rad or m]
_FOLLOWED_WITHIN_NS = NS_PER_S // 2  # what a robot was told that long ago it may still be on its way to
_LOST_AFTER_NS = NS_PER_S
_LOST = 0.1  # farthest from what it was told that a robot that follows is [rad or m], at most a quarter of its range


@dataclass(frozen=True)
class Pose:
    """Where the robot was measured to be: ``position`` (joints,) float64, contract order and units.

    ``stamp_ns``: one for all joints, or (joints,) int64, of each the one at which it was measured.
    """

    stamp_ns: int | np.ndarray
    position: np.ndarray


class Reach:
    """How far joints can have moved between two measurements."""

    def __init__(self, joints: Sequence[Joint]) -> None:
        self._joints = joints
        self._speed = np.array([joint.max_velocity for joint in joints])

    def beyond(self, before: Pose, after: Pose) -> str:
        """Which joint is further from where it was than it can have moved; "" if none is. NaN is not known."""
        moved = np.abs(after.position - before.position)
        span_s = np.abs(np.subtract(after.stamp_ns, before.stamp_ns)) / NS_PER_S
        allowed = _BELIEVED_SPEED * self._speed * span_s + _BELIEVED_NOISE
        if not (moved > allowed).any():
            return ""
        worst = int(np.nan_to_num(moved - allowed, nan=-np.inf).argmax())
        found = f"{self._joints[worst].name} {moved[worst]:.3f} {self._joints[worst].unit}"
        after_s = np.broadcast_to(span_s, moved.shape)[worst]
        where = f"further after {after_s:.3f} s" if after_s else "apart in two messages of one stamp"
        return f"found {found} {where}; expected at most {allowed[worst]:.3f}"


def believed_pose(poses: Sequence[Pose], joints: Sequence[Joint]) -> np.ndarray:
    """The newest of ``poses`` (oldest first, at least one), (joints,): one that motion may start from.

    Raises:
        InputError: it is not finite, or one of them is further from the one before than the robot can have moved.
    """
    reach = Reach(joints)
    for before, after in itertools.pairwise(poses):
        if beyond := reach.beyond(before, after):
            raise InputError(f"joint states: {beyond}, this is no pose to start from")
    pose = poses[-1].position
    if not np.isfinite(pose).all():
        raise InputError(f"joint states: found {pose}; expected finite positions")
    return pose


class Tracking:
    """Whether the robot follows: it does not when it has been elsewhere for a while than it was told to be lately.

    ``fault``: which joint does not, and where it is; "" if all do.
    """

    def __init__(self, joints: Sequence[Joint]) -> None:
        self.fault = ""
        self._joints = joints
        self._margin = np.array([min(_LOST, (joint.upper - joint.lower) / 4) for joint in joints])
        self._told: deque[tuple[int, np.ndarray]] = deque()
        self._near_ns: int | None = None

    def add(self, now_ns: int, told: np.ndarray, measured: np.ndarray) -> None:
        """Both (joints,); ``measured`` may be a little older. ``now_ns``: ROS time, in which robots are simulated."""
        self._told.append((now_ns, told))
        while self._told[0][0] < now_ns - _FOLLOWED_WITHIN_NS:
            self._told.popleft()
        lately = np.array([position for _, position in self._told])
        away = np.maximum(lately.min(0) - measured, measured - lately.max(0)) - self._margin
        worst = int(away.argmax())
        if self._near_ns is None or away[worst] <= 0:
            self._near_ns, self.fault = now_ns, ""
        elif now_ns - self._near_ns > _LOST_AFTER_NS:
            joint = self._joints[worst]
            self.fault = (
                f"{joint.name} does not follow: found it at {measured[worst]:.3f} {joint.unit}, told to be at "
                f"{told[worst]:.3f}; expected it within {self._margin[worst]:.3f}"
            )
