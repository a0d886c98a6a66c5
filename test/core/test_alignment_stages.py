"""The stages of the self-aligner one by one: what each finds on a trained toy, refuses, and never does."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from small_models import random_batch, small_policy
from torch import Tensor
from toy_bodies import BODIES, Trained, recording_of, transitions_of

from selfalign_core.alignment.budget import Budget
from selfalign_core.alignment.config import AlignConfig, Collect, Guard, Identify, Refine, Watch
from selfalign_core.alignment.excitation import measure_excitation
from selfalign_core.alignment.frames import FrameCache
from selfalign_core.alignment.guard import Verdict, judge
from selfalign_core.alignment.identify import identify
from selfalign_core.alignment.overlap import Estimate, estimate, shared_time, spans
from selfalign_core.alignment.refine import Adam, refine
from selfalign_core.alignment.scoring import Scorer
from selfalign_core.alignment.screen import screen
from selfalign_core.alignment.trusted import Trusted
from selfalign_core.alignment.watch import RunningLoss, changed_at, drift, references, running_loss
from selfalign_core.errors import ConfigError, InputError
from selfalign_core.model.pi0 import AlignmentLosses
from selfalign_core.policy import Policy
from selfalign_core.types import TransitionBatch

WEIGHTS = (0.3, 1.0, 3.0)
CONFIG = AlignConfig().without_budgets()
UNSEEN = [(0.5, 0.0), (-0.4, -0.6)]


def no_limit() -> Budget:
    return Budget(None, lambda: 0.0)


def ticking(limit_ms: float) -> Budget:
    """On a clock that moves only when it is read, 30 ms each time."""
    ticks = iter(range(10**6))
    return Budget(limit_ms, lambda: 0.03 * next(ticks))


def token_of(toy: Trained, row: int) -> Tensor:
    return torch.from_numpy(toy.bank[row].copy())


def find(policy: Policy, batch: TransitionBatch, current: Tensor, *, budget: Budget | None = None, **options):
    scorer = Scorer(policy, WEIGHTS)
    options = {"seed": 0, "config": CONFIG.identify, **options}
    return identify(scorer, scorer.prepare(batch), current, Trusted.of(policy), budget=budget or no_limit(), **options)


def improve(policy: Policy, batch: TransitionBatch, start: Tensor, config: AlignConfig = CONFIG, **options):
    scorer = Scorer(policy, WEIGHTS)
    options = {"seed": 0, "budget": no_limit(), **options}
    return refine(scorer, scorer.prepare(batch), start, Trusted.of(policy), config, **options)


def verdict_of(policy: Policy, batch: TransitionBatch, current: Tensor, shadow: Tensor, **options) -> Verdict:
    scorer = Scorer(policy, WEIGHTS)
    options = {"seed": 0, "budget": no_limit(), "config": CONFIG.guard, **options}
    return judge(
        scorer,
        scorer.prepare(batch),
        spans(batch),
        current,
        shadow,
        Trusted.of(policy),
        options.pop("config"),
        **options,
    )


# ---------------------------------------------------------------- scoring


@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
def test_many_tokens_at_once_score_as_each_alone(pi05: bool) -> None:
    policy = small_policy(pi05)
    scorer, data = Scorer(policy, WEIGHTS), None
    data = scorer.prepare(random_batch(policy, 5))
    noise, rows = scorer.noise(data, 3, seed=7), torch.tensor([0, 4, 5, 14])
    tokens = torch.randn(30, *policy.e_token.data.shape, generator=torch.Generator().manual_seed(0))
    found = scorer.score(data, noise, tokens, rows)
    assert found.shape == (30, 4)
    for index in (0, 7, 29):
        alone = scorer.weighted(scorer.losses(data, noise, tokens[index], rows))
        torch.testing.assert_close(found[index], alone)


def test_noise_is_a_function_of_the_seed_and_its_times_cover_their_distribution() -> None:
    policy = small_policy()
    scorer = Scorer(policy, WEIGHTS)
    data = scorer.prepare(random_batch(policy, 4))
    noise, again, other = (scorer.noise(data, 8, seed=s) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(vars(noise).values(), vars(again).values(), strict=True))
    assert not torch.equal(noise.actions, other.actions)
    uniform = ((noise.time - 0.001) / 0.999) ** 1.5  # Beta(1.5, 1) made uniform
    for transition in uniform.reshape(8, 4).T:
        assert sorted((transition * 8).floor().tolist()) == list(range(8))


def test_a_model_without_its_parts_is_refused() -> None:
    for changes, message in (
        ({"use_peft_prefix_token": False}, "use_peft_prefix_token=False"),
        ({"alignment_expert": None}, "alignment_expert=None"),
        ({"alignment_prefix": "full"}, "found no prompt"),
    ):
        with pytest.raises(ConfigError, match=message):
            Scorer(small_policy(**changes), WEIGHTS)


def test_a_full_prefix_reads_the_prompt_and_images_only_does_not() -> None:
    for way, reads in (("full", True), ("images_only", False)):
        policy = small_policy(alignment_prefix=way)
        token = torch.from_numpy(policy.e_token.data)
        scorers = [Scorer(policy, WEIGHTS, prompt=prompt) for prompt in ("pick up", "red cube")]
        losses = [s.summary(s.prepare(random_batch(policy, 4)), token, 2, seed=0) for s in scorers]
        assert (losses[0] != losses[1]) == reads


# ---------------------------------------------------------------- identify


def test_every_body_is_identified_among_all(toy: Trained) -> None:
    policy = toy.policy_with_bank()
    for row, body in enumerate(BODIES):
        found = find(policy, transitions_of(body, 20, 100 + row), token_of(toy, (row + 3) % 8))
        assert found.name == f"body {row}"
        assert torch.equal(found.token, token_of(toy, row))
        assert found.margin > 0
        assert list(found.scores.values()) == sorted(found.scores.values())


def test_the_right_token_in_use_is_found_to_be_the_best(toy: Trained) -> None:
    found = find(toy.policy_with_bank(), transitions_of(BODIES[2], 20, 5), token_of(toy, 2))
    assert (found.name, found.margin) == ("current", 0.0)


def test_a_swapped_sign_in_some_transitions_is_outvoted(toy: Trained) -> None:
    batch = transitions_of(BODIES[3], 20, 5)
    actions = batch.actions.copy()
    actions[::5] *= -1
    batch = dataclasses.replace(batch, actions=actions)
    assert find(toy.policy_with_bank(), batch, token_of(toy, 0)).name == "body 3"


def test_a_spent_budget_ends_identification_with_the_best_so_far(toy: Trained) -> None:
    policy, batch = toy.policy_with_bank(), transitions_of(BODIES[3], 20, 5)
    config = dataclasses.replace(CONFIG.identify, first_count=8)
    whole = find(policy, batch, token_of(toy, 0), config=config)
    early = find(policy, batch, token_of(toy, 0), config=config, budget=ticking(70))  # two passes, which are one part
    assert 0 < early.evaluations < whole.evaluations
    assert "budget of 70 ms spent" in early.note
    assert early.name == "body 3"
    nothing = find(policy, batch, token_of(toy, 0), budget=ticking(1))
    assert (nothing.name, nothing.margin, nothing.evaluations) == ("current", 0.0, 0)


def test_a_policy_without_a_bank_still_has_its_deployed_token(toy: Trained) -> None:
    policy = toy.policy_with_bank([4], deployed=4)
    assert Trusted.of(policy).names == ("body 4",)
    assert find(policy, transitions_of(BODIES[4], 20, 5), token_of(toy, 1)).name == "body 4"
    assert Trusted.of(small_policy()).names == ("deployed",)


# ---------------------------------------------------------------- refine


@pytest.mark.parametrize("mode", ["subspace", "full"])
@pytest.mark.parametrize("body", UNSEEN)
def test_refinement_helps_a_body_never_seen(toy: Trained, mode: str, body: tuple[float, float]) -> None:
    policy, batch = toy.policy_with_bank(), transitions_of(body, 20, 5)
    start = find(policy, batch, token_of(toy, 0)).token
    refined = improve(policy, batch, start, dataclasses.replace(CONFIG, mode=mode))
    before, after = (toy.loss(body, token.numpy()) for token in (start, refined.token))
    for name in ("action", "dynamics", "inverse_dynamics", "total"):  # no loss of alignment looks at the actions
        assert after[name] < 0.9 * before[name], name
    assert refined.steps == CONFIG.refine.steps


def test_subspace_refinement_stays_in_the_banks_directions_and_cloud(toy: Trained) -> None:
    policy = toy.policy_with_bank()
    config = dataclasses.replace(CONFIG, refine=Refine(directions=2, learning_rate=3.0, max_deviation=1.5))
    start, trusted = token_of(toy, 0), Trusted.of(policy)
    moved = improve(policy, transitions_of(UNSEEN[0], 20, 5), start, config).token
    directions, scales = trusted.directions(2)
    inside = (moved - start).flatten() @ directions.T @ directions
    torch.testing.assert_close(inside, (moved - start).flatten(), atol=1e-4, rtol=1e-4)
    far = (moved - trusted.bank.mean(0)).flatten() @ directions.T / scales
    limit = ((start - trusted.bank.mean(0)).flatten() @ directions.T / scales).abs().clamp(min=1.5)
    assert (far.abs() <= limit * (1 + 1e-4)).all()


def test_bank_mode_does_not_refine_and_a_bank_of_one_refines_every_element(toy: Trained) -> None:
    batch, start = transitions_of(UNSEEN[0], 20, 5), token_of(toy, 0)
    same = improve(toy.policy_with_bank(), batch, start, dataclasses.replace(CONFIG, mode="bank"))
    assert same.steps == 0
    assert torch.equal(same.token, start)
    alone = toy.policy_with_bank([0])
    one, full = (improve(alone, batch, start, dataclasses.replace(CONFIG, mode=m)) for m in ("subspace", "full"))
    assert torch.equal(one.token, full.token)
    assert toy.loss(UNSEEN[0], one.token.numpy())["total"] < 0.8 * toy.loss(UNSEEN[0], start.numpy())["total"]


def test_refinement_is_decided_by_the_seed_and_changes_nothing_else(toy: Trained) -> None:
    policy, batch = toy.policy_with_bank(), transitions_of(UNSEEN[0], 20, 5)
    weights = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    start = token_of(toy, 0)
    torch.manual_seed(1)
    first, second, other = (improve(policy, batch, start, seed=s).token for s in (5, 5, 6))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(start, token_of(toy, 0))
    for name, tensor in policy.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert all(parameter.grad is None for parameter in policy.model.parameters())


def test_adam_is_that_of_torch_bit_for_bit() -> None:
    draw = torch.Generator().manual_seed(0)
    start, scales = torch.randn(7, generator=draw), 10.0 ** torch.arange(-9, 5, 2)
    theirs = start.clone().requires_grad_(True)
    adam, torchs = Adam(start), torch.optim.Adam([theirs])
    for step in range(40):
        theirs.grad = torch.randn(7, generator=draw) * scales
        torchs.param_groups[0]["lr"] = 0.07 * (1 - step / 40)
        torchs.step()
        adam.step(theirs.grad, 0.07 * (1 - step / 40))
        assert torch.equal(adam.value, theirs.detach()), step


def test_a_spent_budget_ends_refinement_after_some_steps(toy: Trained) -> None:
    refined = improve(toy.policy_with_bank(), transitions_of(BODIES[0], 20, 5), token_of(toy, 1), budget=ticking(100))
    assert refined.steps == 3
    assert "budget of 100 ms" in refined.note


def fake_losses(per_sample) -> object:
    """In place of ``Pi0.alignment_losses``: an inverse dynamics loss ``per_sample(state (B, D), token) -> (B,)``."""

    def losses(_prefix, transitions, _noise, *, token, dim_mask):
        value = per_sample(
            transitions.state, token if token.ndim == 3 else token.expand(len(transitions.state), -1, -1)
        )
        return AlignmentLosses(torch.zeros_like(value), torch.zeros_like(value), value)

    return losses


def test_a_gradient_that_breaks_down_leaves_the_last_good_token(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, calls = small_policy(), []

    def value(state: Tensor, token: Tensor) -> Tensor:
        calls.append(None)
        return token.sum((1, 2)) * (math.nan if len(calls) == 3 else -1.0)

    monkeypatch.setattr(policy.model, "alignment_losses", fake_losses(value))
    refined = improve(policy, random_batch(policy, 4), torch.from_numpy(policy.e_token.data))
    assert (refined.steps, refined.note) == (2, "gradient became nan")
    assert torch.isfinite(refined.token).all()


@pytest.mark.parametrize("mode", ["subspace", "full"])
@pytest.mark.parametrize("scale", [0.0, 1e3, 1e15, 1e30])
def test_adversarial_transitions_never_take_a_token_out_of_bounds(toy: Trained, mode: str, scale: float) -> None:
    policy = toy.policy_with_bank()
    batch = transitions_of(BODIES[0], 6, 1)
    batch = dataclasses.replace(batch, actions=batch.actions * np.float32(scale))
    limits = Guard(trust_radius=0.3, max_norm=1.0)
    config = dataclasses.replace(CONFIG, mode=mode, guard=limits, refine=Refine(steps=5, learning_rate=30.0))
    trusted, token = Trusted.of(policy), token_of(toy, 1)
    for seed in range(3):  # commit after commit
        token = improve(policy, batch, token, config, seed=seed).token
        assert trusted.complaint(token, limits) == ""


# ---------------------------------------------------------------- bounds

finite_tokens = arrays(np.float32, (2, 4), elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False))


@given(arrays(np.float32, (3, 2, 4), elements=st.floats(-50, 50, width=32, allow_subnormal=False)), finite_tokens,
       st.floats(0.1, 100), st.floats(0.1, 100))  # fmt: skip
def test_bounds_hold_for_any_token(bank: np.ndarray, token: np.ndarray, radius: float, limit: float) -> None:
    tokens, limits = torch.from_numpy(bank), Guard(trust_radius=radius, max_norm=limit)
    trusted = Trusted(tokens, ("a", "b", "c"), tokens, 1.0)
    assert trusted.complaint(trusted.bounded(torch.from_numpy(token), limits), limits) == ""
    for known in tokens:  # what training vouches for is never moved
        torch.testing.assert_close(trusted.bounded(known, limits), known)


def test_what_is_out_of_bounds_is_refused_by_name(toy: Trained) -> None:
    policy, batch = toy.policy_with_bank(), transitions_of(BODIES[0], 12, 1)
    current = token_of(toy, 0)
    far = verdict_of(policy, batch, current, current + 1.5)
    assert not far.accepted
    assert "token's distance from 'body" in far.reason
    assert "NaN" in verdict_of(policy, batch, current, current * math.nan).reason
    small = Guard(max_norm=0.1, trust_radius=9.0)
    assert "token's norm: found" in verdict_of(policy, batch, current, current * 3, config=small).reason
    assert verdict_of(policy, batch, token_of(toy, 5), current, config=small).accepted  # but a trusted token is trusted


# ---------------------------------------------------------------- the guard


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


@pytest.mark.parametrize("overlap", [1, 2, 4])
def test_pure_noise_passes_no_more_often_than_stated(monkeypatch: pytest.MonkeyPatch, overlap: int) -> None:
    """A loss in which the token multiplies nothing but each transition's own noise, shared by those that overlap.

    Two standard errors, widened for few transitions, are passed by chance in 2.3 % of cases; taking 16 transitions that
    overlap by three quarters for independent ones would let 16 % pass.
    """
    policy = small_policy()
    monkeypatch.setattr(policy.model, "alignment_losses", fake_losses(lambda s, t: (s[:, 0] * t[:, 0, 0]).exp()))
    policy.state_to_model = lambda state: torch.from_numpy(np.pad(state, ((0, 0), (0, 2))))
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
        assert verdict.accepted is accepted, verdict.reason
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

    def losses(_prefix, transitions, _noise, *, token, dim_mask):
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
    assert found.mean < -0.3
    if gain:
        assert found.looks_better is (gain > 0)
    if not accepted:
        assert found.reason.startswith("refused: inverse dynamics")
        assert "expected < -20%, upper bound < 0%" in found.reason
    assert verdict((2.0, 0.3, 3.0), inverse_margin=0.05).accepted is (gain > 0)
    assert verdict((2.0, 0.3, 0.0)).accepted  # whoever gives it no weight does not ask for it


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


# ---------------------------------------------------------------- overlap


def test_without_overlap_the_standard_error_is_the_usual_one() -> None:
    values = np.random.default_rng(0).normal(size=9)
    apart = np.stack([np.arange(9) * 10, np.arange(9) * 10 + 10], axis=1)
    found = estimate(values, apart)
    assert found.mean == pytest.approx(values.mean())
    assert found.stderr == pytest.approx(values.std(ddof=1) / 3)
    assert found.effective_count == 9


def test_the_standard_error_of_overlapping_transitions_is_honest() -> None:
    """Means of four out of eight consecutive independent numbers: compared with the real spread of their mean."""
    rng, begin = np.random.default_rng(0), np.arange(20) * 4
    times = np.stack([begin, begin + 8], axis=1)
    steps = rng.normal(size=(4000, 100))
    values = np.stack([steps[:, b : b + 8].mean(1) for b in begin], axis=1)
    stderrs = [estimate(v, times).stderr for v in values[:500]]
    assert np.sqrt(np.mean(np.square(stderrs))) == pytest.approx(values.mean(1).std(), rel=0.05)
    assert shared_time(times)[0].tolist()[:3] == [1.0, 0.5, 0.0]


# ---------------------------------------------------------------- excitation and screening


@pytest.mark.parametrize(("count", "expected"), [(6, 2.649), (11, 2.284), (21, 2.133), (10**6, 2.0)])
def test_few_values_take_more_standard_errors(count: int, expected: float) -> None:
    # Student's t with count - 1 degrees of freedom at the probability of two standard deviations, 0.97725.
    assert Estimate(1.0, 0.5, count).upper(2.0) == pytest.approx(1.0 + 0.5 * expected, rel=0.01)


def test_a_joint_that_was_not_moved_is_named() -> None:
    policy = small_policy()
    batch, names = random_batch(policy, 8), ("pan", "lift", "elbow")
    enough = measure_excitation(batch, names, Collect())
    assert enough.enough
    assert len(enough.command) == len(enough.motion) == 3
    actions = batch.actions.copy()
    actions[:, -1, 2] = batch.frame_states[batch.obs_index, 2] + 0.3  # a constant command moves nothing
    still = measure_excitation(dataclasses.replace(batch, actions=actions), names, Collect(min_command=0.05))
    assert not still.enough
    assert still.missing == ("elbow was commanded over 0.000, expected at least 0.050",)
    states = np.broadcast_to(batch.frame_states[:1], batch.frame_states.shape)
    frozen = measure_excitation(dataclasses.replace(batch, frame_states=states), names, Collect())
    assert any("no joint moved" in words for words in frozen.missing)


def test_poisoned_transitions_are_left_out_by_name() -> None:
    policy = small_policy()
    batch, names = random_batch(policy, 8), ("pan", "lift", "elbow")
    same, words = screen(policy, batch, names, Collect())
    assert (len(same), words) == (8, ())
    frames, states, actions = batch.frames.copy(), batch.frame_states.copy(), batch.actions.copy()
    frames[2, 1] = frames[1, 1]
    states[5, 2] = 1e6
    actions[7, 1, 0] = -80.0
    poisoned = dataclasses.replace(batch, frames=frames, frame_states=states, actions=actions)
    usable, words = screen(policy, poisoned, names, Collect())
    kept = [0, 2, 3, 6]  # 1 → 2 stands still; frame 5 ends transition 4 and begins 5; action of 7
    np.testing.assert_array_equal(usable.actions, actions[kept])
    assert len(words) == 3
    for part in ("camera 'wrist' stood still in 1 transitions", "state of elbow up to 1e+06", "action of pan up to 80"):
        assert any(part in w for w in words), (part, words)


@pytest.mark.parametrize("field", ["frame_states", "actions"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_batch_with_nan_is_refused_by_name(field: str, value: float) -> None:
    policy = small_policy()
    batch = random_batch(policy, 4)
    getattr(batch, field)[-1] = value
    with pytest.raises(InputError, match=rf"transitions\.{field}: found NaN or infinity"):
        Scorer(policy, WEIGHTS).check(batch)


def test_a_batch_of_the_wrong_shape_is_refused_by_name() -> None:
    policy = small_policy()
    good = random_batch(policy, 4)
    for change, message in (
        ({"frames": good.frames[:, :, :14]}, r"transitions\.frames: pixels: found \(14, 28\), expected \(28, 28\)"),
        ({"frame_states": good.frame_states[:, :2]}, r"frame_states: values: found \(2,\), expected \(3,\)"),
        ({"actions": good.actions[:, :, :2]}, r"actions: values: found \(3, 2\), expected \(3, 3\)"),
        ({"actions": good.actions[:, :2]}, r"actions: values: found \(2, 3\), expected \(3, 3\)"),
        ({"cameras": ("front", "left")}, r"found cameras \('front', 'left'\), expected \['wrist'\] too"),
    ):
        with pytest.raises(InputError, match=message):
            Scorer(policy, WEIGHTS).check(dataclasses.replace(good, **change))


# ---------------------------------------------------------------- drift


def running(policy: Policy, body: tuple[float, float], token: Tensor, seed: int, scale: float = 1.0):
    scorer, batch = Scorer(policy, WEIGHTS), recording_of(body, 6, seed, scale=scale)
    others = references(Trusted.of(policy), CONFIG.watch.references)
    data = scorer.prepare(batch)
    return running_loss(scorer, data, spans(batch), token, others, CONFIG.watch, seed=seed, budget=no_limit())


@pytest.mark.parametrize("rows", [list(range(8)), [0]], ids=["bank", "bank of one"])
def test_another_body_is_noticed(toy: Trained, rows: list[int]) -> None:
    policy, token = toy.policy_with_bank(rows), token_of(toy, 0)
    baseline = running(policy, BODIES[0], token, 1)
    for row in (1, 5, 6):
        assert drift(baseline, running(policy, BODIES[row], token, row), CONFIG.watch).fired, row


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.1])
def test_other_motion_of_the_same_body_is_no_drift(toy: Trained, scale: float) -> None:
    policy, fired = toy.policy_with_bank(), 0
    for row, body in enumerate(BODIES):
        baseline = running(policy, body, token_of(toy, row), 1)
        fired += drift(baseline, running(policy, body, token_of(toy, row), 20 + row, scale), CONFIG.watch).fired
        lively = running(policy, body, token_of(toy, row), 40 + row)
        fired += drift(running(policy, body, token_of(toy, row), 60 + row, scale), lively, CONFIG.watch).fired
    assert fired <= 1


@pytest.mark.parametrize("left", [2, 5])
def test_the_begin_of_a_change_is_found(toy: Trained, left: int) -> None:
    policy, token = toy.policy_with_bank(), token_of(toy, 0)
    baseline = running(policy, BODIES[0], token, 1)
    for row in (1, 5, 6):
        before, after = (running(policy, body, token, 7 + row).series for body in (BODIES[0], BODIES[row]))
        newest = RunningLoss(baseline.plain, baseline.relative, np.concatenate([before[:left], after[left:]]))
        times = np.arange(len(before))[:, None] * np.array([[10, 10]]) + np.array([[0, 20]])
        assert abs(changed_at(baseline, newest, times) - 10 * left) <= 30, row


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AlignConfig(mode="clever"), "AlignConfig.mode: found 'clever'"),
        (lambda: AlignConfig(lambda_dyn=-0.1), "AlignConfig.lambda_dyn: found -0.1"),
        (lambda: AlignConfig(lambda_perc=0, lambda_dyn=0, lambda_inv=0), "found all 0"),
        (lambda: AlignConfig(keep=0), "AlignConfig.keep: found 0"),
        (lambda: Collect(fit_count=1), "Collect.fit_count: found 1"),
        (lambda: Collect(stride=0), "Collect.stride: found 0"),
        (lambda: Collect(min_command=math.nan), "Collect.min_command: found nan"),
        (lambda: Identify(draws=0), "Identify.draws: found 0"),
        (lambda: Identify(budget_ms=0.0), "Identify.budget_ms: found 0.0"),
        (lambda: Refine(steps=True), "Refine.steps: found True"),
        (lambda: Refine(learning_rate=math.inf), "Refine.learning_rate: found inf"),
        (lambda: Guard(sigmas=math.nan), "Guard.sigmas: found nan"),
        (lambda: Guard(trust_radius=-1.0), "Guard.trust_radius: found -1.0"),
        (lambda: Watch(count=1), "Watch.count: found 1"),
    ],
)
def test_a_bad_setting_is_named(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@settings(max_examples=20)
@given(st.integers(0, 2**62), st.integers(1, 4))
def test_common_noise_makes_equal_tokens_differ_by_nothing(seed: int, draws: int) -> None:
    policy = small_policy()
    scorer = Scorer(policy, WEIGHTS)
    data, token = scorer.prepare(random_batch(policy, 3)), torch.from_numpy(policy.e_token.data)
    rows = torch.arange(3 * draws)
    both = scorer.score(data, scorer.noise(data, draws, seed), torch.stack([token, token]), rows)
    torch.testing.assert_close(both[0], both[1])


@pytest.mark.parametrize("prefix", ["images_only", "full"])
def test_frames_seen_before_are_not_encoded_again(prefix: str) -> None:
    """What is kept gives the same losses within rounding; the memory is bounded, and pixels decide, not stamps."""
    policy = small_policy(alignment_prefix=prefix)
    frames = FrameCache(policy, 2**20)
    kept = Scorer(policy, WEIGHTS, prompt="pick up", frames=frames)
    plain = Scorer(policy, WEIGHTS, prompt="pick up")
    first = random_batch(policy, 6)
    token = policy.model.peft_prefix_token.detach()
    for batch in (first, first.select(slice(2, 6)), dataclasses.replace(first, frames=first.frames[::-1].copy())):
        found = kept.summary(kept.prepare(batch), token, 2, seed=1)
        expected = plain.summary(plain.prepare(batch), token, 2, seed=1)
        np.testing.assert_allclose(dataclasses.astuple(found), dataclasses.astuple(expected), rtol=1e-5)
    assert (frames.misses, frames.hits) == (7, 5 + 7)
    other = dataclasses.replace(first, frames=255 - first.frames)
    kept.prepare(other)
    assert frames.misses == 14
    frames.limit_frames = 5
    kept.prepare(other)
    assert frames.nbytes == 5 * frames.encode(other.frames[:1], other.cameras).nbytes
    frames.limit_bytes = frames.nbytes // 2
    kept.prepare(other)
    assert 0 < frames.nbytes <= frames.limit_bytes
    frames.limit_bytes = 0
    kept.prepare(other)
    assert frames.nbytes == 0
