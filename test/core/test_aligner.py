"""align(): nothing but the token moves, it moves within bounds, it helps, and noise does not get past the guard."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from small_models import random_batch, small_policy
from toy_bodies import BODIES, Trained, transitions_of

from selfalign_core import aligner as aligner_module
from selfalign_core.aligner import AlignConfig, Aligner, AlignResult, bounded
from selfalign_core.errors import ConfigError, InputError
from selfalign_core.model.pi0 import AlignmentLosses
from selfalign_core.policy import Policy

PARTS = ("perception", "dynamics", "inverse_dynamics")
UNSEEN = [(0.5, 0.0), (-0.6, 0.6)]
REFINE = AlignConfig(steps=60, learning_rate=0.05, trust_radius=4.0, max_norm=8.0)


def same_numbers(a: AlignResult, b: AlignResult) -> bool:
    """Equal but for the wall time."""
    first, second = ({k: v for k, v in vars(r).items() if k not in ("token", "duration_s")} for r in (a, b))
    return first == second and np.array_equal(a.token, b.token)


def rms(token: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(token, dtype=np.float64).mean(-1))


@pytest.fixture(params=[False, True], ids=["pi0", "pi05"])
def policy(request) -> Policy:
    return small_policy(request.param)


def align(policy: Policy, config: AlignConfig | None = None, *, seed: int = 0, **options) -> AlignResult:
    options = {"fit": random_batch(policy, 6), "holdout": random_batch(policy, 4, seed=1), **options}
    token = options.pop("token", policy.e_token.data)
    config = config or AlignConfig(steps=3)
    return Aligner(policy).align(token, options.pop("fit"), options.pop("holdout"), config, seed=seed, **options)


# ---------------------------------------------------------------- what may change


@pytest.mark.parametrize("options", [{}, {"peft_num_tokens": 3}, {"restrict_image_to_language": True}])
def test_nothing_but_the_token_changes_bit_for_bit(options: dict) -> None:
    policy = small_policy(**options)
    weights = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    token, before = policy.e_token.data, policy.e_token.data.copy()
    batches = {"fit": random_batch(policy, 6), "holdout": random_batch(policy, 4, seed=1)}
    copies = {k: {f: np.copy(getattr(b, f)) for f in ("frames", "actions")} for k, b in batches.items()}
    result = align(policy, AlignConfig(steps=4, guard_sigmas=0, lambda_inv=1.0), token=token, **batches)
    for name, tensor in policy.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert all(parameter.grad is None for parameter in policy.model.parameters())
    np.testing.assert_array_equal(token, before)
    np.testing.assert_array_equal(policy.e_token.data, before)
    for key, batch in batches.items():
        for field, value in copies[key].items():
            np.testing.assert_array_equal(getattr(batch, field), value)
    assert result.steps == 4
    assert result.gradient_norm > 0


def test_a_refused_token_is_the_current_one_bit_for_bit(policy: Policy) -> None:
    token = np.random.default_rng(0).normal(size=policy.e_token.data.shape).astype(np.float32)
    result = align(policy, AlignConfig(steps=3, guard_sigmas=1e6), token=token)
    assert not result.accepted
    assert result.reason.startswith("refused: hold-out difference")
    assert result.token.tobytes() == token.tobytes()
    assert result.token is not token
    assert result.e_token_norm == pytest.approx(float(np.linalg.norm(token)), rel=1e-6)


@pytest.mark.parametrize("part", ["lambda_perc", "lambda_dyn", "lambda_inv"])
def test_each_loss_alone_moves_the_token(policy: Policy, part: str) -> None:
    weights = dict.fromkeys(("lambda_perc", "lambda_dyn", "lambda_inv"), 0.0) | {part: 1.0}
    result = align(policy, AlignConfig(steps=1, **weights))
    assert result.gradient_norm > 1e-6
    parts = dict(zip(("lambda_perc", "lambda_dyn", "lambda_inv"), PARTS, strict=True))
    assert result.fit_before.total == pytest.approx(getattr(result.fit_before, parts[part]))
    assert getattr(result.fit_after, parts[part]) != getattr(result.fit_before, parts[part])


# ---------------------------------------------------------------- reproducible, and it ends


def test_the_seed_decides_everything(policy: Policy) -> None:
    first, second, other = (align(policy, seed=seed) for seed in (5, 5, 6))
    assert same_numbers(first, second)
    assert first.fit_before != other.fit_before
    torch.manual_seed(123)  # global state plays no part
    torch.randn(10)
    assert same_numbers(first, align(policy, seed=5))


def test_it_stops_when_asked_before_each_step(policy: Policy) -> None:
    asked = []

    def after_two() -> bool:
        asked.append(None)
        return len(asked) > 2

    result = align(policy, AlignConfig(steps=50), should_stop=after_two)
    assert result.steps == 2
    assert len(asked) == 3
    assert "stopped after 2 steps" in result.reason
    assert result.token.shape == policy.e_token.data.shape


def test_no_step_no_change(policy: Policy) -> None:
    result = align(policy, should_stop=lambda: True)
    assert (result.steps, result.accepted) == (0, False)
    assert "no optimiser step" in result.reason
    assert result.fit_after == result.fit_before
    assert result.holdout_after == result.holdout_before
    assert result.difference_mean == 0
    assert result.token.tobytes() == policy.e_token.data.tobytes()


def test_the_time_budget_ends_the_optimiser(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only moves when it is read: 30 ms a step."""
    now = iter(range(10**6))
    monkeypatch.setattr(aligner_module, "time", SimpleNamespace(monotonic=lambda: 0.03 * next(now)))
    result = align(policy, AlignConfig(steps=50, time_budget_s=0.1))
    assert result.steps == 3
    assert "time budget of 100 ms spent after 3 steps" in result.reason
    unlimited = align(policy, AlignConfig(steps=7))
    assert unlimited.steps == 7
    assert "budget" not in unlimited.reason


# ---------------------------------------------------------------- bounds

finite_tokens = arrays(
    np.float32, (2, 4), elements=st.floats(-1e4, 1e4, width=32, allow_nan=False, allow_infinity=False)
)


@given(finite_tokens, finite_tokens, st.floats(0.01, 100), st.floats(0.01, 100))
def test_bounds_hold_for_any_token(token: np.ndarray, current: np.ndarray, radius: float, limit: float) -> None:
    config = AlignConfig(trust_radius=radius, max_norm=limit)
    found = bounded(torch.from_numpy(token), torch.from_numpy(current), config).numpy()
    assert np.isfinite(found).all()
    assert (rms(found) <= limit * (1 + 1e-5)).all()
    within = rms(current) <= limit  # the norm limit counts more where the current token is already beyond it
    slack = 1e-5 * (radius + rms(current))
    assert (rms(found - current) <= radius + slack)[within].all()


@given(finite_tokens, st.floats(0.01, 100))
def test_a_token_within_bounds_is_left_alone(current: np.ndarray, radius: float) -> None:
    config = AlignConfig(trust_radius=radius, max_norm=1e5)
    step = np.float32(0.3 * radius) * np.ones_like(current)
    token = torch.from_numpy(current + step)
    torch.testing.assert_close(bounded(token, torch.from_numpy(current), config), token)


@pytest.mark.parametrize("scale", [0.0, 1e3, 1e15, 1e30])
@pytest.mark.parametrize("learning_rate", [1e-2, 1e3])
def test_adversarial_transitions_stay_within_bounds(scale: float, learning_rate: float) -> None:
    policy = small_policy()
    batches = {}
    for name, size in (("fit", 5), ("holdout", 4)):
        batch = random_batch(policy, size)
        batches[name] = dataclasses.replace(
            batch, frame_states=batch.frame_states * np.float32(scale), actions=batch.actions * np.float32(scale)
        )
    config = AlignConfig(steps=4, learning_rate=learning_rate, guard_sigmas=0, trust_radius=0.5, max_norm=2.0)
    token = policy.e_token.data
    result = align(policy, config, **batches)
    assert np.isfinite(result.token).all()
    assert (rms(result.token - token) <= 0.5 * (1 + 1e-4)).all()
    assert (rms(result.token) <= max(2.0, rms(token).max()) * (1 + 1e-4)).all()


def fake_losses(per_sample) -> object:
    """In place of ``Pi0.alignment_losses``: an inverse dynamics loss ``per_sample(state (B, D), token) -> (B,)``."""

    def losses(_prefix, transitions, _noise, *, token, dim_mask):
        value = per_sample(transitions.state, token)
        return AlignmentLosses(torch.zeros_like(value), torch.zeros_like(value), value)

    return losses


def test_a_strong_pull_stops_at_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small_policy(peft_num_tokens=2)
    monkeypatch.setattr(policy.model, "alignment_losses", fake_losses(lambda s, t: s.new_ones(len(s)) * -1e6 * t.sum()))
    start = np.zeros_like(policy.e_token.data)
    far = align(policy, AlignConfig(steps=30, learning_rate=10.0, trust_radius=0.7, max_norm=5.0), token=start)
    assert far.accepted
    np.testing.assert_allclose(rms(far.token - start), 0.7, rtol=1e-5)
    limited = align(policy, AlignConfig(steps=30, learning_rate=10.0, trust_radius=9.0, max_norm=5.0), token=start)
    assert limited.accepted
    np.testing.assert_allclose(rms(limited.token), 5.0, rtol=1e-5)


def test_a_gradient_that_breaks_down_leaves_the_last_good_token(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small_policy()
    calls = []

    def value(state, token):
        if token.requires_grad:
            calls.append(None)
        scale = math.nan if len(calls) == 3 and token.requires_grad else -1.0
        return state.new_ones(len(state)) * scale * token.sum()

    monkeypatch.setattr(policy.model, "alignment_losses", fake_losses(value))
    result = align(policy, AlignConfig(steps=9))
    assert result.steps == 2
    assert "gradient became nan after 2 steps" in result.reason
    assert np.isfinite(result.token).all()


# ---------------------------------------------------------------- the guard


def test_pure_noise_gets_past_the_guard_no_more_often_than_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss in which the token multiplies nothing but each transition's own noise: 2 standard errors of 16 let 3 % by.

    The fit finds a direction in its noise every time; on the hold-out that direction is worth nothing.
    """
    policy = small_policy()

    def noise_only(state: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        return 1.0 + state[:, :3] @ token[0, :3]

    monkeypatch.setattr(policy.model, "alignment_losses", fake_losses(noise_only))
    aligner, config = Aligner(policy), AlignConfig(steps=2, learning_rate=0.1, guard_draws=1)
    token, trials = policy.e_token.data, 250
    accepted = 0
    for seed in range(trials):
        fit, holdout = (random_batch(policy, 16, seed=10_000 * k + seed) for k in (1, 2))
        result = aligner.align(token, fit, holdout, config, seed=seed)
        accepted += result.accepted
        assert result.steps == 2
        assert result.accepted or result.token.tobytes() == token.tobytes()
    # Student's t with 15 degrees of freedom is below -2 in 3.2 % of cases, 8 of 250; 20 would be 1 chance in 10,000.
    assert 1 <= accepted <= 20


@pytest.mark.parametrize("shift", [1.0, -1.0])
def test_a_real_shift_gets_past_the_guard(monkeypatch: pytest.MonkeyPatch, shift: float) -> None:
    policy = small_policy()

    def noisy_bowl(state: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        return (token - shift).square().mean() + 0.02 * state[:, :3] @ token[0, :3]

    monkeypatch.setattr(policy.model, "alignment_losses", fake_losses(noisy_bowl))
    for seed in range(10):
        batches = {"fit": random_batch(policy, 16, seed=seed), "holdout": random_batch(policy, 16, seed=100 + seed)}
        result = align(policy, AlignConfig(steps=5, learning_rate=0.1), seed=seed, **batches)
        assert result.accepted, result.reason
        assert result.difference_mean + 2 * result.difference_stderr < 0
        assert result.holdout_after.total < result.holdout_before.total


def test_one_transition_cannot_convince(policy: Policy) -> None:
    result = align(policy, AlignConfig(steps=2, guard_sigmas=2.0), holdout=random_batch(policy, 1))
    assert not result.accepted


def test_what_is_reported_is_what_decides(policy: Policy) -> None:
    for guard_sigmas in (0.0, 2.0):
        result = align(policy, AlignConfig(steps=3, guard_sigmas=guard_sigmas))
        upper = result.difference_mean + guard_sigmas * result.difference_stderr
        assert result.accepted == (upper < 0)
        difference = result.holdout_after.total - result.holdout_before.total
        assert result.difference_mean == pytest.approx(difference, abs=1e-5)
        config = AlignConfig()
        for losses in (result.fit_before, result.holdout_after):
            total = (
                config.lambda_perc * losses.perception
                + config.lambda_dyn * losses.dynamics
                + config.lambda_inv * losses.inverse_dynamics
            )
            assert losses.total == pytest.approx(total, rel=1e-5)


# ---------------------------------------------------------------- it works


def test_training_lowers_the_total_and_every_part(toy: Trained) -> None:
    for name, values in toy.history.items():
        first, last = np.mean(values[:20]), np.mean(values[-20:])
        assert last < 0.6 * first, f"{name}: {first:.3f} → {last:.3f}"


def test_a_token_fits_its_own_body_in_every_loss(toy: Trained) -> None:
    """Without this gap alignment would have nothing to find."""
    own, other = toy.loss(BODIES[0], toy.bank[0]), toy.loss(BODIES[0], toy.bank[-1])
    for name in ("action", *PARTS):
        assert own[name] < 0.7 * other[name], name


@pytest.mark.parametrize("body", UNSEEN)
def test_align_lowers_all_three_losses_on_a_body_never_seen(toy: Trained, body: tuple[float, float]) -> None:
    start = toy.bank[-1 if body[0] > 0 else 0]  # a body that sags the other way
    result = Aligner(toy.policy).align(start, transitions_of(body, 32, 1), transitions_of(body, 16, 2), REFINE, seed=0)
    assert result.accepted, result.reason
    for before, after in ((result.fit_before, result.fit_after), (result.holdout_before, result.holdout_after)):
        for name in (*PARTS, "total"):
            assert getattr(after, name) < 0.9 * getattr(before, name), name
    before, after = toy.loss(body, start), toy.loss(body, result.token)
    for name in ("action", *PARTS, "total"):  # and the actions, which no loss of align() looks at
        assert after[name] < 0.9 * before[name], name


def test_more_steps_on_fixed_data_lower_the_loss_further(toy: Trained) -> None:
    data = (transitions_of(UNSEEN[0], 32, 1), transitions_of(UNSEEN[0], 16, 2))
    totals = [
        Aligner(toy.policy).align(toy.bank[-1], *data, dataclasses.replace(REFINE, steps=steps), seed=0).fit_after.total
        for steps in (3, 15, 60)
    ]
    assert totals[0] > totals[1] > totals[2]


def test_an_aligned_body_is_left_alone(toy: Trained) -> None:
    """Each body with its own token: there is nothing to gain, and the guard lets hardly anything by."""
    aligner, accepted, config = Aligner(toy.policy), 0, dataclasses.replace(REFINE, steps=10, learning_rate=0.02)
    harm = []
    for index, body in enumerate(BODIES):
        data = (transitions_of(body, 16, 10 + index), transitions_of(body, 16, 30 + index))
        result = aligner.align(toy.bank[index], *data, config, seed=index)
        accepted += result.accepted
        if result.accepted:
            before, after = (toy.loss(body, token)["total"] for token in (toy.bank[index], result.token))
            harm.append(after - before)
    assert accepted <= len(BODIES) // 2
    assert not harm or np.mean(harm) < 0.05


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "AlignConfig.steps: found 0"),
        ({"guard_draws": 0}, "guard_draws: found 0"),
        ({"learning_rate": 0.0}, "learning_rate: found 0.0"),
        ({"learning_rate": math.nan}, "learning_rate: found nan"),
        ({"trust_radius": -1.0}, "trust_radius: found -1.0"),
        ({"max_norm": math.inf}, "max_norm: found inf"),
        ({"lambda_dyn": -0.1}, "lambda_dyn: found -0.1"),
        ({"guard_sigmas": math.nan}, "guard_sigmas: found nan"),
        ({"time_budget_s": 0.0}, "time_budget_s: found 0.0"),
        ({"lambda_perc": 0.0, "lambda_dyn": 0.0, "lambda_inv": 0.0}, "found all 0"),
    ],
)
def test_a_bad_setting_is_named(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AlignConfig(**change)


@pytest.mark.parametrize("which", ["fit", "holdout"])
@pytest.mark.parametrize("field", ["frame_states", "actions"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_batch_with_nan_is_refused_by_name(policy: Policy, which: str, field: str, value: float) -> None:
    batch = random_batch(policy, 4)
    getattr(batch, field)[-1] = value
    with pytest.raises(InputError, match=rf"{which}\.{field}: found NaN or infinity"):
        align(policy, **{which: batch})


def test_a_batch_of_the_wrong_shape_is_refused_by_name(policy: Policy) -> None:
    good = random_batch(policy, 4)
    for change, message in (
        ({"frames": good.frames[:, :, :14]}, r"fit\.frames: found \(14, 28\) pixels, expected \(28, 28\)"),
        ({"frame_states": good.frame_states[:, :2]}, r"fit\.frame_states: found 2 values, expected 3"),
        ({"actions": good.actions[:, :, :2]}, r"fit\.actions: found 2 values, expected 3"),
        ({"cameras": ("front", "left")}, r"fit: found cameras \('front', 'left'\), expected \['wrist'\] too"),
    ):
        with pytest.raises(InputError, match=message):
            align(policy, fit=dataclasses.replace(good, **change))
    with pytest.raises(InputError, match="holdout: found no transitions"):
        align(policy, holdout=good.select(np.arange(0)))


def test_a_bad_token_is_refused(policy: Policy) -> None:
    with pytest.raises(InputError, match=r"token: found shape \(2, 16\), expected \(1, 16\)"):
        align(policy, token=np.zeros((2, 16), np.float32))
    with pytest.raises(InputError, match="token: found NaN"):
        align(policy, token=np.full((1, 16), np.nan, np.float32))


def test_a_model_without_its_parts_is_refused() -> None:
    with pytest.raises(ConfigError, match="use_peft_prefix_token=False"):
        Aligner(small_policy(use_peft_prefix_token=False))
    with pytest.raises(ConfigError, match="alignment_expert=None"):
        Aligner(small_policy(alignment_expert=None))
    with pytest.raises(ConfigError, match="found no prompt"):
        Aligner(small_policy(alignment_prefix="full"))


def test_a_full_prefix_reads_the_prompt_and_images_only_does_not() -> None:
    for way, reads in (("full", True), ("images_only", False)):
        policy = small_policy(alignment_prefix=way)
        data = (random_batch(policy, 4), random_batch(policy, 4, seed=1))
        results = [
            Aligner(policy, prompt=prompt).align(policy.e_token.data, *data, AlignConfig(steps=2), seed=0)
            for prompt in ("pick up", "red cube")
        ]
        assert (results[0].fit_before != results[1].fit_before) == reads
