"""The self-aligner on every kind of policy, on bodies never seen, and what it can be told from outside."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import random_batch, small_policy
from test_alignment_machine import CONFIG, advance, aligner_of, attempts, live
from toy_bodies import BODIES, Robot, Trained

from selfalign_core.alignment import AlignConfig, SelfAligner, State
from selfalign_core.errors import InputError

PARTS = ("perception", "dynamics", "inverse_dynamics")
UNSEEN = [(0.5, 0.0), (-0.6, 0.6)]
SECOND = 1_000_000_000
ANY = dataclasses.replace(
    CONFIG,
    collect=dataclasses.replace(CONFIG.collect, fit_count=5, guard_count=4, min_command=0.0, min_motion=0.0),
    refine=dataclasses.replace(CONFIG.refine, steps=3),
    guard=dataclasses.replace(CONFIG.guard, sigmas=0.0),
)


# ---------------------------------------------------------------- any policy


@pytest.mark.parametrize(
    "options", [{}, {"pi05": True}, {"peft_num_tokens": 3}, {"restrict_image_to_language": True}], ids=str
)
def test_nothing_but_the_token_changes_bit_for_bit(options: dict) -> None:
    policy = small_policy(**options)
    weights = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    batch = random_batch(policy, 9)
    before = {name: np.copy(getattr(batch, name)) for name in ("frames", "frame_states", "actions")}
    aligner, own = SelfAligner(policy, ANY), policy.e_token.data.copy()
    report = aligner.advance(batch, 10 * SECOND)
    assert report.attempt is not None and report.attempt.refinement.steps == 3
    assert aligner.token.data.shape == own.shape and np.isfinite(aligner.token.data).all()
    assert report.accepted or np.array_equal(aligner.token.data, own)
    np.testing.assert_array_equal(policy.e_token.data, own)
    for name, tensor in policy.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert all(parameter.grad is None for parameter in policy.model.parameters())
    for name, value in before.items():
        np.testing.assert_array_equal(getattr(batch, name), value)


@pytest.mark.parametrize("part", ["lambda_perc", "lambda_dyn", "lambda_inv"])
def test_each_loss_alone_moves_the_shadow(part: str) -> None:
    policy = small_policy()
    weights = dict.fromkeys(("lambda_perc", "lambda_dyn", "lambda_inv"), 0.0) | {part: 1.0}
    aligner = SelfAligner(policy, dataclasses.replace(ANY, **weights))
    attempt = aligner.advance(random_batch(policy, 9), 10 * SECOND).attempt
    name = dict(zip(("lambda_perc", "lambda_dyn", "lambda_inv"), PARTS, strict=True))[part]
    assert attempt.refinement.gradient_norm > 1e-6
    assert attempt.fit_before.total == pytest.approx(getattr(attempt.fit_before, name))
    assert getattr(attempt.fit_after, name) != getattr(attempt.fit_before, name)


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


@pytest.mark.parametrize("body", UNSEEN, ids=str)
def test_all_three_losses_and_the_actions_improve_on_a_body_never_seen(toy: Trained, body: tuple[float, float]) -> None:
    wrong = len(BODIES) - 1 if body[0] > 0 else 0  # a body that sags the other way
    aligner, robot = aligner_of(toy, deployed=wrong), Robot(body)
    first = attempts(live(aligner, robot, 20))[0]
    assert first.accepted, first.text
    before, after = (toy.loss(body, token) for token in (toy.bank[wrong], aligner.token.data))
    for name in ("action", *PARTS, "total"):  # the actions, too, which no loss of alignment looks at
        assert after[name] < 0.9 * before[name], name


# ---------------------------------------------------------------- warming up


@pytest.mark.parametrize("options", [{}, {"peft_num_tokens": 3}], ids=str)
def test_having_warmed_up_changes_no_attempt(options: dict) -> None:
    policy = small_policy(**options)
    batch = random_batch(policy, 9)
    cold, warm = SelfAligner(policy, ANY), SelfAligner(policy, ANY)
    warm.warm_up(np.zeros(policy.state_dim))
    assert (warm.state, warm.since_ns, warm.token) == (cold.state, cold.since_ns, cold.token)
    reports = [aligner.advance(batch, 10 * SECOND) for aligner in (cold, warm)]
    assert reports[0].attempt is not None and reports[0].text == reports[1].text
    np.testing.assert_array_equal(cold.token.data, warm.token.data)


def test_a_warm_up_goes_through_a_pass_with_gradient_and_one_without_or_ends_with_its_budget() -> None:
    policy, passes = small_policy(), []
    losses = policy.model.alignment_losses
    policy.model.alignment_losses = lambda *given, **named: (
        passes.append(torch.is_grad_enabled()),
        losses(*given, **named),
    )[1]
    SelfAligner(policy, ANY).warm_up(np.zeros(policy.state_dim))
    assert set(passes) == {True, False}
    passes.clear()
    spent = dataclasses.replace(ANY, identify=dataclasses.replace(ANY.identify, budget_ms=1e-6))
    SelfAligner(policy, spent).warm_up(np.zeros(policy.state_dim))
    assert not passes


def test_alignment_loads_no_compiler() -> None:
    """The optimisers of torch do, at their first use."""
    code = """
import sys, numpy as np
from small_models import small_policy
from selfalign_core.alignment import AlignConfig, SelfAligner
policy = small_policy()
SelfAligner(policy, AlignConfig()).warm_up(np.zeros(policy.state_dim))
print(*{"torch.optim", "torch._dynamo", "sympy"} & set(sys.modules))
"""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["torch.optim"]), done.stderr


# ---------------------------------------------------------------- orders


def test_a_reset_brings_the_own_token_back_and_can_be_rolled_back(toy: Trained) -> None:
    aligner, robot = aligner_of(toy), Robot(BODIES[5])
    with pytest.raises(InputError, match="own token in use"):
        aligner.reset(0)
    assert any(report.accepted for report in live(aligner, robot, 8))
    accepted = aligner.token
    token = aligner.reset(robot.now_ns)
    assert token.data.tobytes() == toy.bank[0].tobytes()
    assert aligner.token is token and token.version == accepted.version + 1
    assert (aligner.state, aligner.since_ns) == (State.WATCH, robot.now_ns)
    again = aligner.rollback(robot.now_ns)
    assert again.data.tobytes() == accepted.data.tobytes() and again.version == token.version + 1


def test_settings_change_while_it_works(toy: Trained) -> None:
    aligner, robot = aligner_of(toy), Robot(BODIES[0])
    live(aligner, robot, 9)
    assert aligner.state is State.WATCH
    stricter = dataclasses.replace(CONFIG, guard=dataclasses.replace(CONFIG.guard, sigmas=9.0))
    aligner.configure(stricter)
    assert (aligner.state, aligner.config) == (State.WATCH, stricter)
    # Losses under other weights say nothing about the baseline's.
    aligner.configure(dataclasses.replace(stricter, lambda_inv=1.0))
    assert aligner.state is State.COLLECT
    (attempt,) = attempts(live(aligner, robot, 9))
    losses = attempt.attempt.fit_before
    weights = aligner.config
    expected = weights.lambda_perc * losses.perception + weights.lambda_dyn * losses.dynamics + losses.inverse_dynamics
    assert losses.total == pytest.approx(expected, rel=1e-5)


def test_too_few_transitions_are_counted_without_being_looked_at(toy: Trained) -> None:
    aligner, robot = aligner_of(toy, AlignConfig().without_budgets()), Robot(BODIES[0])
    wanted = aligner.request(robot.now_ns)
    assert (wanted.least, wanted.count) == (20, 64)
    report = aligner.short_of(5, robot.now_ns)
    assert report.text == "collecting: 5 of 20 transitions" and report.transitions == 5 and not report.accepted
    robot.move(5)
    assert advance(aligner, robot).text.startswith("collecting: ")
    aligner.use(dataclasses.replace(aligner.token, version=3), 10 * SECOND)
    aligner.short_of(0, SECOND)  # time jumped back
    assert aligner.since_ns == SECOND
