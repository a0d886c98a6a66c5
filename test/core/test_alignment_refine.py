"""Refinement helps, and never takes a token out of its bounds, whatever the transitions."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from alignment_stages import CONFIG, UNSEEN, fake_losses, find, improve, ticking, token_of, verdict_of
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from small_models import random_batch, small_policy
from torch import Tensor
from toy_bodies import BODIES, Trained, transitions_of

from selfalign_core.alignment.config import Guard, Refine
from selfalign_core.alignment.refine import Adam
from selfalign_core.alignment.trusted import Trusted


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
