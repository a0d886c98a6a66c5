"""When the aligner asks for the calibration motion."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np

from selfalign_core.alignment import StageReport, State
from selfalign_core.alignment.excitation import Excitation
from selfalign_core.alignment.guard import Verdict
from selfalign_core.alignment.motion_wanted import MotionWanted
from selfalign_core.alignment.watch import Drift
from selfalign_core.robot.types import EToken

SECOND = 10**9
PATIENCE = 5 * SECOND
TOKEN = EToken(np.zeros((1, 4), np.float32), 0, "arm", "digest")
HALF = -0.67
"""The relative difference of a loss that falls by half."""


class Wanted:
    """The wish after one report and another."""

    def __init__(self) -> None:
        self.now = MotionWanted()

    def after(self, one: StageReport, now_ns: int, patience_ns: int) -> bool:
        self.now = self.now.after(one, now_ns, patience_ns)
        return self.now.asks

    @property
    def served(self) -> bool:
        return self.now.served

    @property
    def anew(self) -> bool:
        return self.now.anew


def report(missing: str | None = None, *, drift: bool | None = None, since: float = 5.0) -> StageReport:
    """Of a round that looked at motion unless ``missing`` is None, and for drift unless that is None."""
    excitation = None if missing is None else Excitation(("elbow",), (0.1,), (0.1,), (missing,) if missing else ())
    found = None if drift is None else Drift(4.0 if drift else 0.0, 2.0, drift, 0, since)
    return StageReport(State.COLLECT, "", TOKEN, excitation=excitation, drift=found)


def test_motion_is_asked_for_when_it_has_not_sufficed_for_long_and_again_later() -> None:
    wanted = Wanted()
    asked = [second for second in range(14) if wanted.after(report("elbow"), second * SECOND, PATIENCE)]
    assert asked == [6, 12]


def test_motion_that_suffices_in_between_or_a_clock_set_back_starts_the_wait_anew() -> None:
    for between in (report(""), report()):
        wanted = Wanted()
        assert not any(wanted.after(report("elbow"), second * SECOND, PATIENCE) for second in range(5))
        assert not wanted.after(between, 5 * SECOND, PATIENCE)
        assert not any(wanted.after(report("elbow"), second * SECOND, PATIENCE) for second in range(6, 12))
        assert wanted.after(report("elbow"), 12 * SECOND, PATIENCE)
    wanted = Wanted()
    assert not wanted.after(report("elbow"), 100 * SECOND, PATIENCE)
    assert not any(wanted.after(report("elbow"), second * SECOND, PATIENCE) for second in range(6))
    assert wanted.after(report("elbow"), 6 * SECOND, PATIENCE)


def test_after_a_drift_motion_is_asked_for_at_once() -> None:
    wanted = Wanted()
    assert not wanted.after(report(drift=False), 0, PATIENCE)
    assert wanted.after(report(drift=True), SECOND, PATIENCE)
    assert not wanted.after(report("elbow"), 2 * SECOND, PATIENCE)  # it is under way


def attempt(accepted: bool, *, mean: float, sees_better: bool = False, same_actions: bool = False) -> StageReport:
    verdict = Verdict(accepted, "", mean=mean, sees_better=sees_better, same_actions=same_actions)
    return dataclasses.replace(report(""), attempt=SimpleNamespace(verdict=verdict))


def test_a_drift_that_the_policy_may_bear_does_not_interrupt_its_work() -> None:
    """Of a bumped camera the relative loss doubles, as it does in new poses; then it is for an attempt to say."""
    surely, wanted = attempt(False, mean=HALF, sees_better=True), Wanted()
    assert not wanted.after(report(drift=True, since=2.6), 0, PATIENCE)
    assert not wanted.after(attempt(False, mean=HALF), SECOND, PATIENCE)
    assert wanted.after(surely, 2 * SECOND, PATIENCE)


def test_an_attempt_after_a_drift_asks_again_until_one_is_decided() -> None:
    undecided, decided, wanted = attempt(False, mean=HALF), attempt(True, mean=-0.1), Wanted()
    rests = dataclasses.replace(undecided, state=State.WATCH)
    assert not wanted.after(undecided, 0, PATIENCE)  # nothing says that the robot has changed
    for end in (decided, rests):
        rounds = [report(drift=True), report(""), undecided, undecided, end, undecided]
        asked = [(wanted.after(one, s * SECOND, PATIENCE), wanted.anew) for s, one in enumerate(rounds)]
        assert [once for once, _ in asked] == [True, False, True, True, False, False]
        assert not any(anew for _, anew in asked)  # what has happened since the drift is kept


def test_a_robot_that_differs_a_little_is_not_moved_again() -> None:
    wanted = Wanted()
    assert wanted.after(report(drift=True), 0, PATIENCE)
    assert not wanted.after(attempt(False, mean=-0.6, sees_better=True), SECOND, PATIENCE)
    assert not Wanted().after(attempt(False, mean=-0.6, sees_better=True), SECOND, PATIENCE)


def test_what_halves_the_losses_and_lacks_inverse_dynamics_alone_asks_at_once_and_until_it_is_decided() -> None:
    sure, unsure = (attempt(False, mean=HALF, sees_better=sees_better) for sees_better in (True, False))
    wanted = Wanted()
    rounds = [unsure, sure, report(""), unsure, attempt(True, mean=HALF, sees_better=True), unsure]
    asked = [(wanted.after(one, second * SECOND, PATIENCE), wanted.anew) for second, one in enumerate(rounds)]
    no, anew = (False, False), (True, True)
    assert asked == [no, anew, (False, True), anew, no, no]
    assert not wanted.after(dataclasses.replace(sure, state=State.WATCH), 9 * SECOND, PATIENCE)  # it gives up


def test_motion_in_which_the_actions_do_what_was_expected_is_ended_and_not_asked_for_again() -> None:
    same, unsure = (attempt(False, mean=HALF, sees_better=True, same_actions=value) for value in (True, False))
    for begin in (report(drift=True), same):  # a policy that has lost its way makes no motion that could tell
        wanted = Wanted()
        assert wanted.after(begin, 0, PATIENCE) and not wanted.served
        assert wanted.after(unsure, SECOND, PATIENCE) and not wanted.served
        assert wanted.after(attempt(False, mean=HALF, same_actions=True), SECOND, PATIENCE) and not wanted.served
        assert not wanted.after(same, 2 * SECOND, PATIENCE) and wanted.served
        for later in (report(""), unsure, same):
            assert not wanted.after(later, 3 * SECOND, PATIENCE) and not wanted.served
        assert not wanted.after(attempt(True, mean=HALF), 4 * SECOND, PATIENCE) and wanted.served
        assert wanted.after(unsure, 5 * SECOND, PATIENCE)  # of another token
    wanted = Wanted()
    wanted.after(attempt(False, mean=-0.1, sees_better=True, same_actions=True), 0, PATIENCE)
    assert not wanted.served  # a motion that somebody else has ordered goes on


def test_a_drift_that_an_earlier_token_explains_asks_for_motion_that_has_served_already() -> None:
    back, wanted = dataclasses.replace(report(drift=True), returned=Verdict(True, "accepted")), Wanted()
    assert wanted.after(back, SECOND, PATIENCE)  # it takes the robot home, if that is asked for
    assert wanted.served


def test_motion_has_served_when_there_is_a_new_token_or_none_to_be_found() -> None:
    refused, accepted = (SimpleNamespace(verdict=Verdict(accepted, "")) for accepted in (False, True))
    collecting, resting = report(""), dataclasses.replace(report(""), state=State.WATCH)

    def served(one: StageReport) -> bool:
        wanted = Wanted()
        wanted.after(one, SECOND, PATIENCE)
        return wanted.served

    assert not served(collecting)
    assert not served(dataclasses.replace(collecting, attempt=refused))  # it tries again
    assert served(dataclasses.replace(collecting, attempt=accepted))
    assert served(dataclasses.replace(resting, attempt=refused))
    assert not served(resting)  # it has rested before
