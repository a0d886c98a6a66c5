"""A camera that repeats one picture although the robot moves is told from one that sees a robot at rest."""

from __future__ import annotations

import array
from collections.abc import Callable

import numpy as np
import pytest

from selfalign_core.robot.contract import Joint
from selfalign_core.robot.frozen import FreezeLimits, PictureRun

MS = 1_000_000
JOINTS = (Joint("pan", "rad", -2, 2, 3, 0, 0.1), Joint("slide", "m", 0, 1, 3, 0, 0.1))
LIMITS = FreezeLimits(after_s=0.5, motion=0.05)


def faults(
    picture: Callable[[int], bytes],
    pan: Callable[[int], float],
    *,
    end_ms: int = 3000,
    late_ms: int = 0,
    limits: FreezeLimits = LIMITS,
) -> dict[int, str]:
    """Of a camera at 25 Hz, time [ms] -> fault, of those pictures that have one.

    What ``picture`` and ``pan`` say of a time [ms] is seen ``late_ms`` before the stamp, and measured at it.
    """
    run, found = PictureRun(), {}

    def pose_at(stamp_ns: int) -> np.ndarray:
        return np.array([pan(stamp_ns // MS), 0.0])

    for now in range(0, end_ms, 40):
        run.add(picture(now - late_ms), now * MS)
        if run.waits_for_pose:
            run.pose = pose_at(run.since_ns)
        if fault := run.fault(limits, JOINTS, pose_at):
            found[now] = fault
    return found


def scene(pan: float) -> bytes:
    """A picture of a robot, without noise."""
    return np.float64(pan).tobytes() * 1000


def test_the_same_picture_of_a_moving_robot_is_named_with_the_joint_that_moved() -> None:
    found = faults(lambda ms: scene(0.0), lambda ms: 0.0001 * ms)
    assert min(found) == 1000  # 0.05 rad after 0.5 s, and half a second
    assert found[2000] == (
        "found the same picture, bit for bit, for 2.0 s, in which pan has moved by 0.20 rad; expected another one"
    )


def test_a_robot_at_rest_may_look_the_same_for_ever_and_start_to_move_any_time() -> None:
    def pan(ms: int) -> float:
        return max(0.0, 0.003 * (ms - 60_000))

    assert not faults(lambda ms: scene(pan(ms)), pan, end_ms=62_000)
    # With stamps that are a tenth of a second late it is far from where the picture was taken before that changes.
    assert not faults(lambda ms: scene(pan(ms)), pan, end_ms=62_000, late_ms=100)


def test_it_is_over_with_the_first_picture_that_differs_while_the_robot_holds() -> None:
    """The robot stays at 0.3 rad from then on, so that only the camera can end it; its pictures have no noise."""

    def pan(ms: int) -> float:
        return min(0.3, 0.0002 * ms)

    found = faults(lambda ms: scene(pan(ms) if ms >= 2000 else 0.0), pan, end_ms=6000)
    assert list(found) == list(range(760, 2000, 40))


def test_it_is_over_where_the_picture_was_taken_too() -> None:
    """There a working camera without noise would show that picture, and nobody could tell."""
    found = faults(lambda ms: scene(0.0), lambda ms: 0.3 if 0 < ms < 2000 else 0.02)
    assert list(found) == list(range(520, 2000, 40))


def test_slow_cameras_and_a_limit_of_zero_are_no_fault() -> None:
    def pan(ms: int) -> float:
        return 0.001 * ms

    assert not faults(lambda ms: scene(pan(ms // 400)), pan)  # a driver that sends each picture ten times
    assert not faults(lambda ms: scene(0.0), pan, limits=FreezeLimits())


@pytest.mark.parametrize("place", [0, 640 * 240 * 3, 640 * 480 * 3 - 1])
def test_every_byte_is_compared(place: int) -> None:
    run, pixels = PictureRun(), array.array("B", bytes(640 * 480 * 3))
    run.add(pixels, 1)
    run.add(array.array("B", pixels), 2)
    assert (run.since_ns, run.newest_ns) == (1, 2)
    other = array.array("B", pixels)
    other[place] = 1
    run.add(other, 3)
    assert (run.since_ns, run.newest_ns) == (3, 3)
