"""The self-aligner as a whole, on a toy robot whose body changes while it moves."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
from toy_bodies import BODIES, Robot, Trained, recording_of

from selfalign_core.alignment import AlignConfig, SelfAligner, StageReport, State
from selfalign_core.alignment.config import Collect, Guard, Identify, Refine, Watch
from selfalign_core.errors import InputError
from selfalign_core.robot.types import EToken, TransitionBatch

CONFIG = AlignConfig(
    collect=Collect(fit_count=16, guard_count=10, attempts=3),
    identify=Identify(first_count=6, finalists=3, draws=2),
    refine=Refine(steps=20),
    guard=Guard(draws=8),
).without_budgets()


def aligner_of(toy: Trained, config: AlignConfig = CONFIG, *, deployed: int = 0, **options) -> SelfAligner:
    policy = toy.policy_with_bank(options.pop("rows", None), deployed=deployed)
    return SelfAligner(policy, config, joints=("slider",), **options)


def newest(aligner: SelfAligner, robot: Robot) -> TransitionBatch:
    """As many as are asked for, however near together."""
    return robot.newest(aligner.request(robot.now_ns).count, aligner.since_ns)


def advance(aligner: SelfAligner, robot: Robot) -> StageReport:
    return aligner.advance(newest(aligner, robot), robot.now_ns)


def live(aligner: SelfAligner, robot: Robot, rounds: int, *, scale: float = 1.0) -> list[StageReport]:
    """Move a little and advance, again and again."""
    reports = []
    for _ in range(rounds):
        robot.move(2, scale=scale)
        reports.append(advance(aligner, robot))
    return reports


def attempts(reports: list[StageReport]) -> list[StageReport]:
    return [r for r in reports if r.attempt is not None]


def action_loss(toy: Trained, aligner: SelfAligner, robot: Robot) -> float:
    return toy.loss(robot.body, aligner.token.data)["action"]


def snapshot(aligner: SelfAligner) -> tuple:
    return (
        aligner.state,
        aligner.since_ns,
        aligner.request(0).count,
        aligner.token.version,
        aligner.token.data.tobytes(),
    )


def test_a_wrong_token_is_replaced_and_a_right_one_kept(toy: Trained) -> None:
    aligner, robot = aligner_of(toy), Robot(BODIES[5])
    before = action_loss(toy, aligner, robot)
    first, *others = attempts(live(aligner, robot, 40))
    assert first.accepted
    assert first.attempt.identification.name == "body 5"
    assert first.attempt.guard_after.total < first.attempt.guard_before.total
    assert first.attempt.fit_after.total < first.attempt.fit_before.total
    assert aligner.token.version == 1 + sum(r.accepted for r in others)
    assert others and not others[-1].accepted
    assert aligner.state is State.WATCH
    assert action_loss(toy, aligner, robot) < 0.3 * before


def test_a_robot_that_is_right_already_stays_so(toy: Trained) -> None:
    for row in range(3):
        aligner, robot = aligner_of(toy, deployed=row), Robot(BODIES[row], seed=3 + row)
        tried = attempts(live(aligner, robot, 30))
        assert tried and not any(report.accepted for report in tried)
        # No other body fits better, so refinement alone would have to gain much.
        margin = aligner.config.guard.margin
        assert all("started from 'current'" in report.text for report in tried)
        assert all(f"expected < {-2 * margin:.0%};" in report.text for report in tried)
        assert aligner.state is State.WATCH
        assert aligner.token.data.tobytes() == toy.bank[row].tobytes()
        assert aligner.token.version == 0


def test_a_change_of_the_body_and_the_change_back_are_followed(toy: Trained) -> None:
    aligner, robot = aligner_of(toy), Robot(BODIES[0])
    live(aligner, robot, 30)
    assert aligner.state is State.WATCH
    own = action_loss(toy, aligner, robot)
    for row in (5, 0):
        robot.body = BODIES[row]
        shifted = action_loss(toy, aligner, robot)
        reports = live(aligner, robot, 30)
        fired = [r for r in reports if r.drift is not None and r.drift.fired]
        assert len(fired) == 1
        assert fired[0].text.startswith("drift")
        assert any(report.accepted for report in reports)
        assert aligner.state is State.WATCH
        assert action_loss(toy, aligner, robot) < own + 0.02 * shifted


def test_back_at_an_earlier_body_the_token_that_was_in_use_there_is_so_again_at_once(toy: Trained) -> None:
    aligner, robot = aligner_of(toy), Robot(BODIES[0])
    live(aligner, robot, 30)
    own = aligner.token.data.tobytes()
    robot.body = BODIES[5]
    live(aligner, robot, 30)
    aligned = aligner.token.data.tobytes()
    assert aligned != own
    for body, data in ((BODIES[0], own), (BODIES[5], aligned)):
        before, robot.body = aligner.token.version, body
        reports = live(aligner, robot, 30)
        (back,) = [report for report in reports if report.returned is not None]
        assert back.token.data.tobytes() == data, back.text
        assert back.accepted and back.token.version == before + 1  # versions only grow
        assert "back to an earlier token: accepted: loss -" in back.text and back.attempt is None
        # Long before there was enough to look for a new one, which then was not found.
        first = reports.index(attempts(reports)[0])
        assert reports.index(back) < first
        assert aligner.token.version == before + 1 and aligner.state is State.WATCH


def test_a_third_body_is_not_taken_for_an_earlier_one(toy: Trained) -> None:
    aligner, robot = aligner_of(toy), Robot(BODIES[0])
    for row in (0, 2, 5):
        robot.body = BODIES[row]
        reports = live(aligner, robot, 30)
        assert not any(report.returned for report in reports)
    found, *known = [toy.loss(robot.body, token)["total"] for token in (aligner.token.data, *toy.bank)]
    assert found < 1.1 * known[5] < min(known[:5] + known[6:])


def test_soon_after_a_change_it_makes_do_with_transitions_that_lie_nearer(toy: Trained) -> None:
    config = dataclasses.replace(CONFIG, collect=Collect(fit_count=16, guard_count=4, stride=8, min_stride=3))
    aligner, dt_ns = aligner_of(toy, config), round(1e9 * aligner_of(toy).policy.dt)
    assert aligner.request(0).stride == 8  # nobody says that anything has changed
    aligner.use(EToken(aligner.token.data, 7, "toy", aligner.token.model_digest), stamp_ns=10 * dt_ns)
    steps = range(0, 300, 10)
    asked = [aligner.request((10 + n) * dt_ns).stride for n in steps]
    assert asked[0] == 3 and asked[-1] == 8 and asked == sorted(asked)
    for n, stride in zip(steps, asked, strict=True):
        assert stride == 3 or 20 * stride <= n  # those that are asked for fit into the time there was


@pytest.mark.parametrize("before", [0, 100])
def test_soon_after_a_start_as_well_but_not_if_enough_was_recorded_before(toy: Trained, before: int) -> None:
    collect = Collect(fit_count=16, guard_count=4, stride=8, min_stride=3, memory=32)
    config = dataclasses.replace(CONFIG, collect=collect)
    aligner, robot, asked, seen = aligner_of(toy, config), Robot(BODIES[5]), [], 0
    robot.move(max(before, 1))
    while not seen and robot.now_ns < 10**12:
        wanted = aligner.request(robot.now_ns)
        asked.append(wanted.stride)
        batch = robot.newest(wanted.count, wanted.since_ns, wanted.stride)
        if len(batch) < wanted.least:
            aligner.short_of(len(batch), robot.now_ns)
        else:
            aligner.advance(batch, robot.now_ns)
            seen = len(batch)
        robot.move(1)
    assert asked[0] == 8  # how long it has moved shows in what there is
    assert set(asked[1:]) == (set() if before else {3})
    assert seen == (wanted.count if before else 16)


def test_another_way_of_moving_changes_nothing(toy: Trained) -> None:
    aligner, robot = aligner_of(toy, deployed=2), Robot(BODIES[2])
    live(aligner, robot, 30)
    assert aligner.state is State.WATCH
    for scale in (0.5, 0.1, 1.0):
        for report in live(aligner, robot, 8, scale=scale):
            assert not report.accepted
    assert aligner.token.version == 0


def test_undecided_it_tries_again_on_unseen_transitions_then_rests_until_told(toy: Trained) -> None:
    config = dataclasses.replace(CONFIG, guard=Guard(draws=2, sigmas=1e9))
    aligner, robot = aligner_of(toy, config), Robot(BODIES[5])
    reports = live(aligner, robot, 50)
    tried = attempts(reports)
    assert all(report.attempt.undecided for report in tried)
    assert len(tried) == CONFIG.collect.attempts  # the last refusal is the new baseline: no loop
    fitted, *between = reports[reports.index(tried[0]) + 1 : reports.index(tried[1])]
    assert fitted.text.startswith("fitted, to be judged by newer transitions: started from 'body 5'")
    assert between and all("new transitions to judge by" in report.text for report in between)
    assert reports[-1].text.startswith("watching: no drift")
    aligner.align_now()
    assert aligner.state is State.COLLECT
    assert attempts(live(aligner, robot, 1))


def test_without_motion_it_waits_and_says_which_joint(toy: Trained) -> None:
    config = dataclasses.replace(CONFIG, collect=dataclasses.replace(CONFIG.collect, min_command=5.0))
    aligner, robot = aligner_of(toy, config), Robot(BODIES[5])
    last = live(aligner, robot, 12)[-1]
    assert "waiting for motion: slider was commanded over" in last.text
    assert "expected at least 5.000" in last.text
    assert last.excitation.command[0] > 0
    assert aligner.state is State.COLLECT
    assert aligner.token.version == 0


@pytest.mark.parametrize(
    ("first", "then", "words"), [(0.0, 1.0, "no joint moved"), (1.0, 0.0, "of late no joint moved")]
)
def test_it_waits_for_motion_in_what_is_fitted_and_in_what_it_is_judged_by(
    toy: Trained, first: float, then: float, words: str
) -> None:
    aligner, robot = aligner_of(toy), Robot(BODIES[5])
    robot.move(9, scale=first)
    robot.move(5, scale=then)
    report = advance(aligner, robot)
    assert report.attempt is None and not report.excitation.enough
    assert report.text.startswith(f"waiting for motion: {words} by more than 0.000, expected 0.020")


def test_it_counts_what_it_has(toy: Trained) -> None:
    aligner, robot = aligner_of(toy), Robot(BODIES[5])
    assert advance(aligner, robot).text == "collecting: 0 of 16 transitions"
    texts = [report.text for report in live(aligner, robot, 6)]
    assert texts[1] == "collecting: 8 of 16 transitions"
    assert texts[3].startswith("fitted, to be judged by newer transitions: started from ")
    assert texts[4] == "collecting: 4 of 10 new transitions to judge by"


@pytest.mark.parametrize("mode", ["bank", "subspace", "full"])
def test_every_mode_aligns(toy: Trained, mode: str) -> None:
    aligner, robot = aligner_of(toy, dataclasses.replace(CONFIG, mode=mode)), Robot(BODIES[7])
    before = action_loss(toy, aligner, robot)
    (first, *_) = attempts(live(aligner, robot, 8))
    assert first.accepted
    assert first.attempt.refinement.steps == (0 if mode == "bank" else 20)
    assert (aligner.token.data.tobytes() == toy.bank[7].tobytes()) == (mode == "bank")
    assert action_loss(toy, aligner, robot) < 0.5 * before


def test_a_bank_of_one_still_aligns(toy: Trained) -> None:
    config = dataclasses.replace(CONFIG, refine=Refine(steps=60))
    aligner, robot = aligner_of(toy, config, rows=[0]), Robot((0.4, -0.7))
    before = toy.loss(robot.body, aligner.token.data)["total"]
    assert attempts(live(aligner, robot, 8))[0].accepted
    assert toy.loss(robot.body, aligner.token.data)["total"] < 0.9 * before


# ---------------------------------------------------------------- reproducible, and it ends


def test_the_seed_and_the_transitions_decide_everything(toy: Trained) -> None:
    def run(seed: int) -> tuple[EToken, list[str]]:
        aligner = aligner_of(toy, seed=seed)
        texts = [r.text for r in live(aligner, Robot((0.5, 0.0)), 16)]
        return aligner.token, texts

    (first, texts), (second, again), (other, _) = run(1), run(1), run(2)
    assert first.version >= 1
    assert first.data.tobytes() == second.data.tobytes()
    assert texts == again
    assert first.data.tobytes() != other.data.tobytes()


class Passes:
    """The toy's model, slowed down: every pass takes ``each_s`` on the clock that this is."""

    def __init__(self, toy: Trained, monkeypatch: pytest.MonkeyPatch, each_s: float):
        self.count, self._each_s = 0, each_s
        model = toy.policy.model
        for owner, name in ((model, "alignment_losses"), (model.paligemma_with_expert, "embed_image")):
            monkeypatch.setattr(owner, name, self._slowed(getattr(owner, name)))

    def __call__(self) -> float:
        return self.count * self._each_s

    def _slowed(self, work):
        def slow(*args, **kwargs):
            self.count += 1
            return work(*args, **kwargs)

        return slow


@pytest.mark.parametrize("each_s", [0.2, 1.0, 7.0])
def test_a_round_with_a_slow_model_keeps_to_its_budgets(
    toy: Trained, monkeypatch: pytest.MonkeyPatch, each_s: float
) -> None:
    """Whatever it does takes no longer than its stages may, and one pass of the model."""
    limits = {"prepare": 2 * 5.0, "identify": 5.0, "refine": 4.0, "report": 2 * 3.0, "guard": 3.0}
    config = dataclasses.replace(
        CONFIG,
        identify=dataclasses.replace(CONFIG.identify, budget_ms=5000.0),
        refine=Refine(steps=20, budget_ms=4000.0),
        guard=Guard(draws=8, budget_ms=3000.0),
        watch=Watch(budget_ms=2000.0),
    )
    clock = Passes(toy, monkeypatch, each_s)
    aligner, robot = aligner_of(toy, config, clock=clock), Robot(BODIES[5])
    robot.move(16)
    reports = []
    for _ in range(20):  # frames that a round came to need not be prepared again
        begin, version = clock(), aligner.token.version
        reports.append(advance(aligner, robot))
        allowed = 5.0 if "preparing 16" in reports[-1].text else sum(limits.values())
        assert clock() - begin <= allowed + 2.0 + each_s + 1e-6
        assert aligner.token.version == version + reports[-1].accepted
        if reports[-1].attempt:
            break
    else:
        pytest.fail(f"no attempt: {reports[-1].text}")
    for report in reports[:-1]:
        assert re.fullmatch(r"collecting: budget of 5000 ms spent while preparing (16|10) transitions", report.text)
        assert (report.state, report.token.version) == (State.COLLECT, 0)
    durations = reports[-1].attempt.durations_ms
    assert set(durations) == set(limits)
    assert len(reports) == 1 or each_s > 0.2
    assert durations["prepare"] > 0 or len(reports) > 1
    if each_s > 5:
        assert "budget of 3000 ms spent after 1 of 8 draws" in reports[-1].text
        assert np.isnan(reports[-1].attempt.guard_after.total)
    else:
        assert reports[-1].attempt.refinement.steps >= 1 and reports[-1].attempt.guard_before.total > 0


def test_a_cut_off_baseline_is_what_is_watched_first(toy: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Passes(toy, monkeypatch, 1.0)
    aligner, robot = aligner_of(toy, clock=clock), Robot(BODIES[0])
    live(aligner, robot, 6)
    aligner.configure(dataclasses.replace(CONFIG, watch=Watch(budget_ms=0.5)))
    while aligner.state is State.COLLECT:
        live(aligner, robot, 1)
    aligner.configure(CONFIG)
    texts = [report.text for report in live(aligner, robot, 2)]
    assert texts[0] == "watching: these 12 transitions are the baseline"
    assert texts[1].startswith("watching: no drift")


@pytest.mark.parametrize("passes", [0, 5, 20, 35, 42])
def test_asked_to_stop_it_makes_not_one_pass_more(toy: Trained, monkeypatch: pytest.MonkeyPatch, passes: int) -> None:
    clock = Passes(toy, monkeypatch, 1.0)
    aligner, robot = aligner_of(toy), Robot(BODIES[5])
    robot.move(16)
    batch, before = newest(aligner, robot), snapshot(aligner)
    report = aligner.advance(batch, robot.now_ns, should_stop=lambda: clock.count >= passes)
    assert clock.count == passes
    assert aligner.token.version == int(report.accepted)
    if report.attempt is None:
        assert re.fullmatch(r"collecting: asked to stop while preparing (16|10) transitions", report.text)
        assert snapshot(aligner) == before
    else:
        assert "asked to stop" in report.text or not np.isfinite(report.attempt.guard_after.total)


# ---------------------------------------------------------------- nothing but the token, and that within bounds


def test_the_policy_is_never_changed(toy: Trained) -> None:
    aligner, robot = aligner_of(toy), Robot(BODIES[5])
    policy = aligner.policy
    weights = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    assert any(r.accepted for r in live(aligner, robot, 8))
    for name, tensor in policy.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert policy.e_token.data.tobytes() == toy.bank[0].tobytes()
    policy.set_e_token(aligner.token)  # what a policy node does with it


@pytest.mark.parametrize(
    "spoil",
    [
        lambda b: dataclasses.replace(b, actions=np.where(np.arange(len(b))[:, None, None] == 3, np.nan, b.actions)),
        lambda b: dataclasses.replace(b, frame_states=b.frame_states * np.inf),
        lambda b: dataclasses.replace(b, frame_states=np.concatenate([b.frame_states] * 2, axis=1)),
        lambda b: dataclasses.replace(b, actions=b.actions[:, :1]),
        lambda b: dataclasses.replace(b, cameras=("wrist",)),
        lambda b: dataclasses.replace(b, frames=b.frames[:, :, :14]),
    ],
    ids=["NaN", "infinity", "state size", "horizon", "camera", "pixels"],
)
def test_bad_transitions_are_refused_and_nothing_is_changed(toy: Trained, spoil) -> None:
    aligner = aligner_of(toy)
    batch, before = recording_of(BODIES[5], 20, 1), snapshot(aligner)
    with np.errstate(invalid="ignore"), pytest.raises(InputError, match="transitions"):
        aligner.advance(spoil(batch), 10**12)
    assert snapshot(aligner) == before
    assert aligner.advance(batch, 10**12).accepted


def test_some_poisoned_transitions_do_not_stop_it(toy: Trained) -> None:
    aligner, batch = aligner_of(toy), recording_of(BODIES[5], 20, 1)
    states, frames, actions = batch.frame_states.copy(), batch.frames.copy(), batch.actions.copy()
    states[9] = 1e5  # an encoder that slipped
    frames[22] = frames[20]  # a camera that stood still
    actions[20] *= -1  # one swapped command
    report = aligner.advance(dataclasses.replace(batch, frame_states=states, frames=frames, actions=actions), 10**12)
    assert report.accepted
    assert report.attempt.identification.name == "body 5"
    assert any("stood still" in words for words in report.left_out)
    assert any("state of slider" in words for words in report.left_out)


@pytest.mark.parametrize("scale", [0.0, 5.0, 1e4, 1e20])
def test_wild_transitions_leave_the_token_finite_and_near_what_was_trained(toy: Trained, scale: float) -> None:
    config = dataclasses.replace(CONFIG, mode="full", guard=Guard(draws=2, sigmas=0.0, trust_radius=0.4),
                                 refine=Refine(steps=5, learning_rate=5.0))  # fmt: skip
    aligner = aligner_of(toy, config)
    for round_ in range(3):
        batch = recording_of(BODIES[5], 20, round_, start_ns=round_ * 10**12)
        batch = dataclasses.replace(batch, actions=batch.actions * np.float32(scale))
        aligner.align_now()
        aligner.advance(batch, (round_ + 1) * 10**12)
        token = aligner.token.data
        assert np.isfinite(token).all()
        spread = np.sqrt(np.square(toy.bank - toy.bank.mean(0)).mean())
        known = [*toy.bank, toy.bank.mean(0)]
        assert min(np.sqrt(np.square(token - t).mean()) for t in known) <= 0.4 * spread * (1 + 1e-3)


# ---------------------------------------------------------------- clocks and rests


@pytest.mark.parametrize("ahead_s", [2.0, 0.5, -2.0])
def test_a_robot_whose_clock_is_another_ones_is_aligned_all_the_same(toy: Trained, ahead_s: float) -> None:
    """Rounds come every 1.2 s."""
    aligner, robot, states = aligner_of(toy), Robot(BODIES[5]), []
    while State.WATCH not in states[:-5]:
        robot.move(2)
        batch = newest(aligner, robot)
        states.append(aligner.advance(batch, robot.now_ns - round(1e9 * ahead_s)).state)
        assert len(states) < 80
    assert aligner.token.version >= 1
    assert states[-6:] == [State.WATCH] * 6
    robot.body = BODIES[2]
    versions = []
    for _ in range(20):
        robot.move(2)
        batch = newest(aligner, robot)
        versions.append(aligner.advance(batch, robot.now_ns - round(1e9 * ahead_s)).token.version)
    assert versions[-1] > versions[0]


def test_time_that_jumps_back_starts_it_anew(toy: Trained) -> None:
    aligner, robot = aligner_of(toy), Robot(BODIES[0])
    live(aligner, robot, 9)
    assert aligner.state is State.WATCH
    again = Robot(BODIES[0], seed=1)
    report = live(aligner, again, 1)[0]
    assert report.text.startswith("collecting")
    assert aligner.since_ns <= again.now_ns
    assert attempts(live(aligner, again, 8))


def test_watching_wants_few_transitions_and_says_when_there_is_nothing_new(toy: Trained) -> None:
    config = dataclasses.replace(CONFIG, watch=Watch(count=8))
    aligner, robot = aligner_of(toy, config), Robot(BODIES[0])
    live(aligner, robot, 8)
    assert aligner.state is State.WATCH
    assert aligner.request(robot.now_ns).count == 10
    live(aligner, robot, 3)
    assert advance(aligner, robot).text == "watching: nothing new"


def test_a_body_that_only_looks_different_keeps_its_token(toy: Trained) -> None:
    """Bodies 0 and 6 differ in what is seen, which is worth much in perception and nothing to the actions."""
    other = {row: toy.loss(BODIES[6], toy.bank[row]) for row in (0, 6)}
    assert other[6]["perception"] < 0.1 * other[0]["perception"]
    assert other[6]["action"] == pytest.approx(other[0]["action"], abs=0.01)
    aligner, robot = aligner_of(toy), Robot(BODIES[6])
    tried = attempts(live(aligner, robot, 40))
    assert tried and not any(report.accepted for report in tried)
    assert all(report.attempt.verdict.mean < -0.2 for report in tried)
    assert aligner.state is State.WATCH
