"""A shadow is fitted while what it will be judged by still happens: what may judge it, and when it is of no use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_alignment_machine import CONFIG, advance, aligner_of, attempts, live
from toy_bodies import BODIES, Robot, Trained

from selfalign_core.alignment import SelfAligner, State
from selfalign_core.alignment.config import Collect, Guard
from selfalign_core.alignment.evidence import Evidence, split, to_judge_by
from selfalign_core.alignment.stages import Stages


@st.composite
def recordings(draw: st.DrawFn) -> np.ndarray:
    """(B, 2) begins and ends of transitions of one length, by their begin; they may overlap."""
    gaps = draw(st.lists(st.integers(0, 30), min_size=1, max_size=60))
    begin = np.cumsum(gaps)
    return np.stack([begin, begin + draw(st.integers(1, 40))], axis=1)


@given(recordings(), st.integers(2, 20), st.integers(2, 12), st.integers(-5, 900))
def test_nothing_that_was_fitted_on_judges_nor_anything_before_it(
    spans: np.ndarray, fit_count: int, guard_count: int, unseen_ns: int
) -> None:
    config = Collect(fit_count=fit_count, guard_count=guard_count)
    fit, guard = split(spans, config, unseen_ns)
    assert 1 <= len(fit) <= fit_count and len(guard) in (0, guard_count)
    assert len(set(fit) | set(guard)) == len(fit) + len(guard)
    if len(guard):
        assert spans[fit, 1].max() <= spans[guard, 0].min()
        assert spans[guard, 0].min() >= unseen_ns
    newer = to_judge_by(spans, config, unseen_ns)
    assert newer.tolist() == np.flatnonzero(spans[:, 0] >= unseen_ns)[-guard_count:].tolist()


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Evidence]]:
    """Every pass through a stage from now on, with its evidence."""
    seen: list[tuple[str, Evidence]] = []
    fit, judge = Stages.fit, Stages.judge
    monkeypatch.setattr(Stages, "fit", lambda self, e, *rest: (seen.append(("fit", e)), fit(self, e, *rest))[1])
    monkeypatch.setattr(
        Stages, "judge", lambda self, s, e, *rest, **o: (seen.append(("judge", e)), judge(self, s, e, *rest, **o))[1]
    )
    return seen


def test_attempts_are_judged_by_what_came_after_their_fit_and_judged_none_before(
    toy: Trained, stages: list[tuple[str, Evidence]]
) -> None:
    config = dataclasses.replace(CONFIG, guard=Guard(draws=2, sigmas=1e9))  # undecided, again and again
    aligner, robot = aligner_of(toy, config), Robot(BODIES[5])
    tried = attempts(live(aligner, robot, 50))
    assert len(tried) == CONFIG.collect.attempts
    assert [name for name, _ in stages] == ["fit", "judge"] * len(tried)
    judged_ns = 0
    for (_, fitted), (_, judges) in zip(stages[::2], stages[1::2], strict=True):
        assert fitted.spans[:, 1].max() <= judges.spans[:, 0].min()
        assert fitted.spans[:, 1].max() >= judged_ns  # with what the one before was judged by
        assert judges.spans[:, 0].min() >= judged_ns
        judged_ns = judges.spans[:, 1].max()
    for report in tried:
        assert 0 < report.attempt.earlier_ms <= sum(report.attempt.durations_ms.values())


def test_with_enough_of_both_one_round_does(toy: Trained) -> None:
    aligner, robot = aligner_of(toy), Robot(BODIES[5])
    robot.move(16)
    (report,) = attempts([advance(aligner, robot)])
    assert report.accepted and report.attempt.earlier_ms == 0


def waiting(toy: Trained) -> tuple[SelfAligner, Robot]:
    """An aligner with a shadow that waits to be judged."""
    aligner, robot = aligner_of(toy), Robot(BODIES[5])
    while not live(aligner, robot, 1)[-1].text.startswith("fitted, to be judged"):
        pass
    return aligner, robot


@pytest.mark.parametrize(
    "order",
    [
        lambda aligner, now_ns: aligner.use(dataclasses.replace(aligner.token, version=3), now_ns),
        lambda aligner, now_ns: aligner.configure(dataclasses.replace(aligner.config, lambda_inv=1.0)),
        lambda aligner, now_ns: aligner.short_of(0, now_ns - 10**12),
    ],
    ids=["another token in use", "other weights", "time jumped back"],
)
def test_a_shadow_that_does_not_compare_any_more_is_dropped(
    toy: Trained, stages: list[tuple[str, Evidence]], order: Callable[[SelfAligner, int], object]
) -> None:
    aligner, robot = waiting(toy)
    stages.clear()
    order(aligner, robot.now_ns)
    assert attempts(live(aligner, robot, 12))
    assert stages[0][0] == "fit"


def test_a_change_while_a_shadow_waits_drops_it(toy: Trained, stages: list[tuple[str, Evidence]]) -> None:
    config = dataclasses.replace(CONFIG, guard=Guard(draws=2, sigmas=1e9))
    aligner, robot = aligner_of(toy, config), Robot(BODIES[1])
    while not attempts(live(aligner, robot, 1)):  # undecided
        pass
    assert "fitted" in live(aligner, robot, 1)[0].text
    robot.body, changed_ns = BODIES[6], robot.now_ns
    stages.clear()
    reports = live(aligner, robot, 12)
    drifts = [report for report in reports if report.drift is not None and report.drift.fired]
    assert drifts and abs(aligner.since_ns - changed_ns) <= 600_000_000
    after = reports[reports.index(drifts[0]) + 1 :]
    assert attempts(after)
    judged_at = next(i for i, (name, _) in enumerate(stages) if name == "judge")
    assert stages[judged_at - 1][0] == "fit" and stages[judged_at - 1][1].spans[:, 0].min() >= aligner.since_ns


def test_after_a_drift_worse_losses_of_the_refuted_token_drop_no_evidence(toy: Trained) -> None:
    """What was seen first of the changed robot may have been what it still does well."""
    aligner, robot = aligner_of(toy), Robot(BODIES[0])
    live(aligner, robot, 30)
    aligner.configure(dataclasses.replace(CONFIG, guard=Guard(draws=2, sigmas=1e9)))  # undecided, again and again
    robot.body = BODIES[2]
    while aligner.state is not State.COLLECT:
        live(aligner, robot, 1)
    since_ns = aligner.since_ns
    while not attempts(live(aligner, robot, 1)):
        pass
    robot.body = BODIES[4]  # to which the token in use is farther still
    reports = live(aligner, robot, 8)
    assert attempts(reports) and aligner.since_ns == since_ns
    assert not any(report.drift is not None for report in reports)


def test_a_token_that_was_just_jumped_to_is_held_to_less_than_a_proven_one(
    toy: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Guard, bool]] = []
    judge = Stages.judge

    def spy(self, shadow, evidence, limits, *, inverse):
        asked.append((limits, inverse))
        return judge(self, shadow, evidence, limits, inverse=inverse)

    monkeypatch.setattr(Stages, "judge", spy)
    aligner, robot = aligner_of(toy), Robot(BODIES[5])
    tried = attempts(live(aligner, robot, 60))
    assert tried[0].accepted and len(tried) > 2
    guard = CONFIG.guard
    assert asked[0] == (guard, True)  # the deployed token may be right
    assert asked[1] == (dataclasses.replace(guard, sigmas=guard.sigmas / 2, margin=0.0, inverse_margin=0.0), False)
