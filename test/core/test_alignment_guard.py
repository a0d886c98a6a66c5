"""The guard lets in what is surely better and refuses noise, at the stated rates."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from alignment_stages import CONFIG, WEIGHTS, fake_losses, find, improve, no_limit, ticking, token_of, verdict_of
from small_models import random_batch, small_policy
from toy_bodies import BODIES, Trained, recording_of, transitions_of

from selfalign_core.alignment.config import Guard, Identify, Refine
from selfalign_core.alignment.guard import Verdict, judge
from selfalign_core.alignment.overlap import estimate, shared_time
from selfalign_core.alignment.scoring import Scorer
from selfalign_core.alignment.trusted import Trusted
from selfalign_core.model.pi0 import AlignmentLosses


def test_the_guard_lets_the_right_token_in_and_the_wrong_one_not(toy: Trained) -> None:
    policy = toy.policy_with_bank()
    for row, body in enumerate(BODIES):
        other = token_of(toy, (row + 1) % 8)
        for batch in (transitions_of(body, 12, 50 + row), recording_of(body, 6, 50 + row)):
            right, wrong = (
                verdict_of(policy, batch, other, token_of(toy, row)),
                verdict_of(policy, batch, token_of(toy, row), other),
            )
            assert right.accepted, right.reason
            assert right.mean + 2 * right.stderr < 0
            assert right.after < right.before
            assert not wrong.accepted


def test_an_aligned_body_is_left_alone(toy: Trained) -> None:
    """Identify, refine and judge with nothing to gain: hardly anything passes, and what passes does no harm."""
    policy, harm, trials = toy.policy_with_bank(), [], 24
    config = dataclasses.replace(CONFIG, refine=Refine(steps=15))
    for seed in range(trials):
        row = seed % len(BODIES)
        whole, own = recording_of(BODIES[row], 16, 1000 + seed), token_of(toy, row)
        fit, newer = whole.select(slice(0, 20)), whole.select(slice(20, 32))
        start = find(policy, fit, own, seed=seed, config=Identify(draws=1)).token
        shadow = improve(policy, fit, start, config, seed=seed).token
        if verdict_of(policy, newer, own, shadow, seed=seed).accepted:
            before, after = (toy.loss(BODIES[row], t.numpy()) for t in (own, shadow))
            harm.append(after["action"] - before["action"])
    assert len(harm) <= 4
    assert not harm or np.mean(harm) < 0.02


@pytest.mark.parametrize("uneven", [0.0, 1.0])
@pytest.mark.parametrize("overlap", [1, 2, 4])
def test_pure_noise_passes_no_more_often_than_stated(
    monkeypatch: pytest.MonkeyPatch, overlap: int, uneven: float
) -> None:
    """A loss in which the token multiplies nothing but each transition's own noise, shared by those that overlap.

    ``uneven``: standard deviation of the logarithm of what a transition loses with any token.

    Two standard errors, widened for few transitions, are passed by chance in 2.3 % of cases; taking 16 transitions that
    overlap by three quarters for independent ones would let 16 % pass.
    """
    policy = small_policy()
    base = float(policy.e_token.data[0, 0])
    losses = fake_losses(lambda s, t: (s[:, 0] * (t[:, 0, 0] - base) + s[:, 1]).exp())
    monkeypatch.setattr(policy.model, "alignment_losses", losses)
    policy.codec.state_to_model = lambda state: torch.from_numpy(np.pad(state, ((0, 0), (0, 2))))
    scorer, trusted = Scorer(policy, WEIGHTS), Trusted.of(policy)
    current = torch.from_numpy(policy.e_token.data)
    shadow = current.clone()
    shadow[0, 0] += 0.1
    batch = random_batch(policy, 16)
    data, begin = scorer.prepare(batch), np.arange(16) * 8 // overlap
    times, rng, trials = np.stack([begin, begin + 8], axis=1), np.random.default_rng(0), 400
    accepted = 0
    for seed in range(trials):
        steps = rng.normal(size=160)
        states = data.transitions.state.clone()
        states[:, 0] = torch.tensor([steps[b : b + 8].mean() for b in begin])
        states[:, 1] = torch.tensor(uneven * rng.normal(size=16))
        noisy = dataclasses.replace(data, transitions=dataclasses.replace(data.transitions, state=states))
        config = Guard(draws=1, margin=0.0, inverse_margin=0.0)
        accepted += judge(
            scorer, noisy, times, current, shadow, trusted, config, seed=seed, budget=no_limit()
        ).accepted  # fmt: skip
    assert accepted <= 0.04 * trials
    assert accepted >= 1


def test_a_gain_within_the_margin_is_not_worth_a_new_token(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small_policy()
    current = torch.from_numpy(policy.e_token.data)
    base = float(current[0, 0])
    monkeypatch.setattr(policy.model, "alignment_losses", fake_losses(lambda s, t: 1 - 0.6 * (t[:, 0, 0] - base)))
    scorer, trusted, batch = Scorer(policy, WEIGHTS), Trusted.of(policy), random_batch(policy, 16)
    shadow = current.clone()
    shadow[0, 0] += 0.1
    times = np.arange(16)[:, None] * 10 + np.array([[0, 10]])
    for margin, accepted in ((0.0, True), (0.05, True), (0.07, False)):  # the loss falls by 6 %, for certain
        verdict = judge(
            scorer, scorer.prepare(batch), times, current, shadow, trusted,
            Guard(draws=1, margin=margin, inverse_margin=0.0), seed=0, budget=no_limit(),
        )  # fmt: skip
        assert verdict.accepted is verdict.sees_better is accepted, verdict.reason
        assert "loss -6.2% ± 0.0% (standard error), upper bound -6.2%" in verdict.reason
        assert f"expected < {0 - margin:.0%}" in verdict.reason


@pytest.mark.parametrize(("gain", "accepted"), [(-0.4, False), (0.0, False), (0.1, False), (0.25, True)])
def test_what_sees_better_must_explain_the_actions_much_better_too(
    monkeypatch: pytest.MonkeyPatch, gain: float, accepted: bool
) -> None:
    """Perception halves; inverse dynamics, the action expert's question, falls by ``gain``: by 10 % is too little."""
    policy = small_policy()
    current = torch.from_numpy(policy.e_token.data)
    base = float(current[0, 0])

    def losses(_prefix, transitions, _noise, *, token, dim_mask, dynamics):
        moved = (token[:, 0, 0] - base) / 0.1  # 0 for the current token, 1 for the shadow
        own = 0.02 * transitions.state[:, 0].tanh() * moved  # every transition has its own luck
        return AlignmentLosses(10 - 5 * moved, torch.ones_like(moved), 1 - gain * moved + own)

    monkeypatch.setattr(policy.model, "alignment_losses", losses)
    shadow, batch = current.clone(), random_batch(policy, 16)
    shadow[0, 0] += 0.1
    times = np.arange(16)[:, None] * 10 + np.array([[0, 10]])

    def verdict(weights: tuple[float, float, float], **options) -> Verdict:
        scorer, trusted = Scorer(policy, weights), Trusted.of(policy)
        data, config = scorer.prepare(batch), Guard(draws=1, **options)
        return judge(scorer, data, times, current, shadow, trusted, config, seed=0, budget=no_limit())

    found = verdict((2.0, 0.3, 3.0))
    assert found.accepted is accepted, found.reason
    assert found.mean < -0.3 and found.sees_better
    assert found.same_actions is not accepted  # as surely as that: the same luck has little to say
    assert found.promising is accepted  # a gain that is too small does not get larger by looking again
    if not accepted:
        assert found.reason.startswith("refused: inverse dynamics")
        assert "expected < -25%, upper bound < 0%" in found.reason
    assert verdict((2.0, 0.3, 3.0), inverse_margin=0.05).accepted is (gain > 0)
    assert verdict((2.0, 0.3, 0.0)).accepted  # whoever gives it no weight does not ask for it


def test_transitions_count_by_how_much_there_is_to_explain_but_none_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gain of half where the loss is 1, none where it is 0.1; and one transition that loses a hundred times as much,
    in which nothing is gained.
    """
    policy = small_policy()
    current = torch.from_numpy(policy.e_token.data)
    base = float(current[0, 0])
    levels = torch.tensor([1.0] * 8 + [0.1] * 8)

    def judged(levels: torch.Tensor) -> Verdict:
        def losses(_prefix, transitions, _noise, *, token, dim_mask, dynamics):
            moved, level = (token[:, 0, 0] - base) / 0.1, levels[(transitions.state[:, 0]).long()]
            value = level * (1 - 0.5 * moved * (level == 1.0))
            return AlignmentLosses(value, torch.ones_like(value), torch.zeros_like(value))

        monkeypatch.setattr(policy.model, "alignment_losses", losses)
        scorer, batch = Scorer(policy, (1.0, 0.0, 0.0)), random_batch(policy, 16)
        data = scorer.prepare(batch)
        states = data.transitions.state.clone()
        states[:, 0] = torch.arange(16)
        data = dataclasses.replace(data, transitions=dataclasses.replace(data.transitions, state=states))
        shadow = current.clone()
        shadow[0, 0] += 0.1
        times = np.arange(16)[:, None] * 10 + np.array([[0, 10]])
        return judge(
            scorer, data, times, current, shadow, Trusted.of(policy), Guard(draws=1), seed=0, budget=no_limit()
        )

    found = judged(levels)
    assert found.accepted and found.mean < -0.55  # half of them do not hide the others' 67 %
    outlier = levels.clone()
    outlier[15] = 100.0
    found = judged(outlier)
    assert found.accepted and found.mean < -0.4  # it is one of nine, not all


def test_one_transition_cannot_convince_nor_many_at_one_time(toy: Trained) -> None:
    policy, batch = toy.policy_with_bank(), transitions_of(BODIES[0], 12, 1)
    wrong, right = token_of(toy, 5), token_of(toy, 0)
    assert verdict_of(policy, batch, wrong, right).accepted
    assert not verdict_of(policy, batch.select([3]), wrong, right).accepted
    assert not verdict_of(policy, batch.select([3] * 12), wrong, right).accepted


def test_the_same_token_is_no_improvement(toy: Trained) -> None:
    verdict = verdict_of(toy.policy_with_bank(), transitions_of(BODIES[0], 12, 1), token_of(toy, 0), token_of(toy, 0))
    assert not verdict.accepted
    assert "nothing found" in verdict.reason


def test_a_guard_short_of_time_judges_with_fewer_draws(toy: Trained) -> None:
    policy, batch = toy.policy_with_bank(), transitions_of(BODIES[0], 12, 1)
    verdict = verdict_of(policy, batch, token_of(toy, 5), token_of(toy, 0), budget=ticking(100))
    assert "budget of 100 ms spent after 3 of 16 draws" in verdict.reason
    assert verdict.accepted
    verdict = verdict_of(policy, batch, token_of(toy, 5), token_of(toy, 0), budget=ticking(10))
    assert not verdict.accepted
    assert verdict.reason == "refused: not judged, budget of 10 ms spent before one of 16 draws"


# ---------------------------------------------------------------- overlap


def test_without_overlap_the_standard_error_is_the_usual_one() -> None:
    values = np.random.default_rng(0).normal(size=9)
    apart = np.stack([np.arange(9) * 10, np.arange(9) * 10 + 10], axis=1)
    found = estimate(values, apart)
    assert found.mean == pytest.approx(values.mean())
    assert found.stderr == pytest.approx(values.std(ddof=1) / 3)
    assert found.effective_count == 9


def test_a_weighted_mean_is_worth_as_many_transitions_as_its_weights_are_even() -> None:
    rng, apart = np.random.default_rng(0), np.stack([np.arange(8) * 10, np.arange(8) * 10 + 10], axis=1)
    values = rng.normal(size=(4000, 8))
    weights = np.array([3.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    found = [estimate(v, apart, weights) for v in values]
    assert found[0].mean == pytest.approx(np.average(values[0], weights=weights))
    assert found[0].effective_count == pytest.approx(12**2 / 24)
    assert np.std([f.mean for f in found]) == pytest.approx(np.sqrt(np.mean([f.stderr**2 for f in found])), rel=0.05)
    even, plain = estimate(values[0], apart, np.full(8, 7.0)), estimate(values[0], apart)
    assert (even.mean, even.stderr) == pytest.approx((plain.mean, plain.stderr))


def test_the_standard_error_of_overlapping_transitions_is_honest() -> None:
    """Means of four out of eight consecutive independent numbers: compared with the real spread of their mean."""
    rng, begin = np.random.default_rng(0), np.arange(20) * 4
    times = np.stack([begin, begin + 8], axis=1)
    steps = rng.normal(size=(4000, 100))
    values = np.stack([steps[:, b : b + 8].mean(1) for b in begin], axis=1)
    stderrs = [estimate(v, times).stderr for v in values[:500]]
    assert np.sqrt(np.mean(np.square(stderrs))) == pytest.approx(values.mean(1).std(), rel=0.05)
    assert shared_time(times)[0].tolist()[:3] == [1.0, 0.5, 0.0]
