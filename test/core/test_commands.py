"""What the robot may be told: the right action for the time, inside the limits, never a jump, never NaN."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfalign_core.robot.commands import CommandLimiter, CommandPath, plan_path, step_in_force

DT = 50_000_000
LIMITER = CommandLimiter(lower=np.array([-1.0, 0.0]), upper=np.array([1.0, 0.5]), speed=np.array([2.0, 1.0]))
finite = st.floats(-10, 10)
pairs = st.tuples(finite, finite).map(np.array)


def test_action_is_picked_by_its_time_stamp() -> None:
    chunk = {"stamp_ns": 1_000 * DT, "dt_ns": DT, "horizon": 4}
    times = [999 * DT, 1_000 * DT, 1_001 * DT - 1, 1_001 * DT, 1_003 * DT, 1_004 * DT]
    assert [step_in_force(**chunk, now_ns=now) for now in times] == [None, 0, 0, 1, 3, None]


@given(target=pairs, reference=pairs)
def test_limited_command_never_exceeds_speed_nor_leaves_the_limits_further(target, reference) -> None:
    command = LIMITER.limit(target, reference, 0.05)
    assert (np.abs(command - reference) <= LIMITER.speed * 0.05 + 1e-12).all()
    outside_before = np.maximum(0, np.maximum(LIMITER.lower - reference, reference - LIMITER.upper))
    outside_after = np.maximum(0, np.maximum(LIMITER.lower - command, command - LIMITER.upper))
    assert (outside_after <= outside_before + 1e-12).all()


def test_reachable_target_inside_the_limits_is_not_changed() -> None:
    target = np.array([0.05, 0.04])
    np.testing.assert_array_equal(LIMITER.limit(target, np.zeros(2), 0.05), target)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_command_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        LIMITER.limit(np.array([bad, 0.0]), np.zeros(2), 0.05)


def test_path_starts_from_the_reference_now_and_drops_past_actions() -> None:
    actions = np.linspace([0.0, 0.0], [0.3, 0.3], 7)
    reference = np.array([0.1, 0.1])
    now = 10 * DT + 2 * DT + DT // 2  # in the middle of action 2
    path = plan_path(actions, stamp_ns=10 * DT, dt_ns=DT, now_ns=now, reference=reference, limiter=LIMITER)
    assert path is not None
    assert path.stamps_ns.tolist() == [now, 13 * DT, 14 * DT, 15 * DT, 16 * DT]
    np.testing.assert_array_equal(path.positions[0], reference)
    durations = np.diff(path.stamps_ns)[:, None] / 1e9
    assert (np.abs(np.diff(path.positions, axis=0)) <= LIMITER.speed * durations + 1e-12).all()


def test_path_does_not_run_back_when_a_chunk_arrives_late() -> None:
    actions = np.zeros((4, 2))
    late = {"stamp_ns": 0, "dt_ns": DT, "reference": np.zeros(2), "limiter": LIMITER}
    assert plan_path(actions, now_ns=3 * DT, **late) is None
    assert plan_path(actions, now_ns=3 * DT - 1, **late) is not None


def test_path_interpolates_and_holds_its_ends() -> None:
    path = CommandPath(np.array([0, DT], np.int64), np.array([[0.0, 1.0], [1.0, 0.0]]))
    np.testing.assert_allclose(path.at(DT // 2), [0.5, 0.5])
    np.testing.assert_allclose(path.at(-DT), [0.0, 1.0])
    np.testing.assert_allclose(path.at(10**18), [1.0, 0.0])


@given(
    actions=st.lists(st.tuples(st.floats(-1e30, 1e30), st.floats(-1e30, 1e30)), min_size=1, max_size=8).map(np.array),
    reference=st.tuples(st.floats(-1.0, 1.0), st.floats(0.0, 0.5)).map(np.array),
    late_ns=st.integers(-2 * DT, 8 * DT),
    times=st.lists(st.integers(0, 12 * DT), min_size=2, max_size=8).map(sorted),
)
def test_no_chunk_whatever_it_holds_makes_a_path_leave_the_limits(actions, reference, late_ns, times) -> None:
    path = plan_path(actions, stamp_ns=0, dt_ns=DT, now_ns=late_ns, reference=reference, limiter=LIMITER)
    if path is None:
        return
    np.testing.assert_array_equal(path.positions[0], reference)
    positions = [*path.positions, *(path.at(late_ns + time) for time in times)]
    assert all(((LIMITER.lower <= position) & (position <= LIMITER.upper)).all() for position in positions)
    for earlier, later in itertools.pairwise(times):
        moved = np.abs(path.at(late_ns + later) - path.at(late_ns + earlier))
        assert (moved <= LIMITER.speed * (later - earlier) / 1e9 + 1e-9).all()
