"""Whether a camera is frozen: it repeats one picture bit for bit, under fresh stamps, although the robot has moved.

A camera that works shows another picture once the joints stand elsewhere, be it of a robot that holds still there. One
that repeats its picture while they stand where they stood says nothing: a simulated camera has no noise. So it is over
with the first picture that differs, or when the joints are back where the picture was taken, and a robot that holds
because of a frozen camera goes on by itself. Must not know ROS: a picture is the bytes of a message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from selfalign_core.robot.contract import Joint
from selfalign_core.robot.images import BytesLike

_NS_PER_S = 1_000_000_000
_FIRST_BYTES = 4096


@dataclass(frozen=True)
class FreezeLimits:
    """``after_s``: how long a picture may stay while the joints are elsewhere [s]; 0: for ever. ``motion``: how far at
    least one joint has to be from where it was when the picture was first seen to be elsewhere [rad or m].
    """

    after_s: float = 0.0
    motion: float = 0.0


class PictureRun:
    """The picture that one camera shows: since which stamp, and where the joints were then.

    ``pose``, (joints,) in contract units, is set by the caller once it is known; a new picture forgets it.
    """

    def __init__(self) -> None:
        self._picture: np.ndarray | None = None
        self.since_ns = self.newest_ns = 0
        self.pose: np.ndarray | None = None

    @property
    def waits_for_pose(self) -> bool:
        return self._picture is not None and self.pose is None

    def add(self, picture: BytesLike, stamp_ns: int) -> None:
        """What the camera shows at ``stamp_ns``, whose bytes must not change later. Every byte is compared, unless the
        first ones differ, as those of a real camera do.
        """
        pixels = picture if isinstance(picture, np.ndarray) else np.asarray(memoryview(picture))
        if self._picture is None or not _equal(pixels, self._picture):
            self.since_ns, self.pose = stamp_ns, None
        self._picture, self.newest_ns = pixels, stamp_ns

    def fault(self, limits: FreezeLimits, joints: Sequence[Joint], pose_at: Callable[[int], np.ndarray]) -> str:
        """What is wrong if the camera is frozen, else "".

        ``pose_at``: stamp [ns] -> where the joints were, (joints,). They have to have been elsewhere ``after_s`` ago
        already: a driver may stamp a picture later than it was taken, and a robot that starts after a rest outruns it.
        """
        shown_ns, after_ns = self.newest_ns - self.since_ns, round(limits.after_s * _NS_PER_S)
        if not after_ns or self.pose is None or shown_ns < after_ns:
            return ""
        before, now = (np.abs(pose_at(stamp) - self.pose) for stamp in (self.newest_ns - after_ns, self.newest_ns))
        if min(before.max(), now.max()) < limits.motion:
            return ""
        joint, shown_s = joints[int(now.argmax())], shown_ns / _NS_PER_S
        return (
            f"found the same picture, bit for bit, for {shown_s:.1f} s, in which {joint.name} has moved by "
            f"{now.max():.2f} {joint.unit}; expected another one"
        )


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    return np.array_equal(one[:_FIRST_BYTES], other[:_FIRST_BYTES]) and np.array_equal(one, other)
