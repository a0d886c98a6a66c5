"""Handing over between chunks: what will have passed is kept, no jump, inside the limits, the same every time."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from small_models import random_actions, random_inputs, random_observation, small_model, small_policy

from selfalign_core.errors import ConfigError, InputError
from selfalign_core.model.pi0 import Guidance
from selfalign_core.policy import Policy
from selfalign_core.policy.transforms import NormStats
from selfalign_core.robot.chunking import METHODS, DelayEstimate, Handover, actions_at, choose_method
from selfalign_core.robot.commands import CommandLimiter, plan_path
from selfalign_core.robot.types import ActionChunk

DT = 50_000_000
HORIZON = 16
LIMITER = CommandLimiter(lower=np.array([-1.0, -0.5]), upper=np.array([1.0, 0.5]), speed=np.array([2.0, 1.0]))
chunks = hnp.arrays(np.float32, (HORIZON, 2), elements=st.floats(-3, 3, width=32))


@pytest.fixture(params=[False, True], ids=["pi0", "pi05"])
def pi05(request) -> bool:
    return request.param


def chunk(actions: np.ndarray, stamp_ns: int = 0) -> ActionChunk:
    return ActionChunk(np.asarray(actions, np.float32), DT / 1e9, stamp_ns, 0, 0.0)


def handover(method: str, previous: np.ndarray, delay: int, fade: int = 3) -> Handover:
    return Handover(method, np.asarray(previous, np.float32), delay, fade)


# ---------------------------------------------------------------- which method


def test_auto_is_the_smoothest_that_the_checkpoint_allows_at_no_cost() -> None:
    assert [choose_method("auto", delay) for delay in (0, 3)] == ["blend", "prefix"]
    assert [choose_method(method, 3) for method in METHODS] == list(METHODS)


def test_prefix_is_refused_by_name_where_it_was_not_trained() -> None:
    with pytest.raises(ConfigError, match=r"chunk_handover: found prefix, .* not trained .*rtc_max_delay is 0"):
        choose_method("prefix", 0)
    with pytest.raises(ConfigError, match="chunk_handover: found 'smooth', expected one of auto, prefix"):
        choose_method("smooth", 3)
    policy = small_policy()
    with pytest.raises(ConfigError, match=r"found prefix with 2 actions given, .*rtc_max_delay=0"):
        policy.infer(random_observation(policy), handover=handover("prefix", np.zeros((4, 3)), 2))


def test_a_delay_beyond_what_was_trained_is_blended() -> None:
    plan = {"current": chunk(np.zeros((HORIZON, 2))), "stamp_ns": 8 * DT, "dt_ns": DT, "rtc_max_delay": 3}
    assert [Handover.plan("prefix", delay=d, **plan).method for d in (1, 3, 4)] == ["prefix", "prefix", "blend"]


def test_there_is_nothing_to_take_over_from_without_a_chunk_or_after_its_end() -> None:
    running = chunk(np.zeros((HORIZON, 2)), stamp_ns=100 * DT)
    for current, stamp_ns in ((None, 0), (running, 116 * DT), (running, 99 * DT)):
        assert Handover.plan("blend", current, stamp_ns=stamp_ns, dt_ns=DT, delay=1) is None
    assert Handover.plan("none", running, stamp_ns=104 * DT, dt_ns=DT, delay=1) is None
    assert Handover.plan("blend", running, stamp_ns=114 * DT, dt_ns=DT, delay=9).delay == 2  # all that is left


# ---------------------------------------------------------------- time


def test_the_running_chunk_is_read_at_the_new_ones_times() -> None:
    running = chunk(np.arange(4)[:, None] * [1.0, 10.0], stamp_ns=7 * DT)
    np.testing.assert_array_equal(actions_at(running, 9 * DT, DT), [[2, 20], [3, 30]])
    np.testing.assert_allclose(actions_at(running, 7 * DT + DT // 4, DT)[:, 0], [0.25, 1.25, 2.25])
    assert actions_at(running, 10 * DT + 1, DT) is None


def test_the_delay_is_the_longest_of_late_and_counts_the_actions_that_come_due() -> None:
    delay = DelayEstimate(count=3)
    assert delay.steps(DT) == 1  # the first action is due at the observation itself
    for late_ns, expected in ((DT // 2, 1), (2 * DT, 3), (DT - 1, 3), (0, 3), (-5, 1)):
        delay.add(late_ns)
        assert delay.steps(DT) == expected


@given(old=chunks, late_ns=st.integers(0, 7 * DT))
def test_the_actions_counted_as_due_are_those_that_a_path_leaves_out(old, late_ns) -> None:
    delay = DelayEstimate()
    delay.add(late_ns)
    path = plan_path(old, stamp_ns=0, dt_ns=DT, now_ns=late_ns, reference=np.zeros(2), limiter=LIMITER)
    assert int(path.stamps_ns[1]) == delay.steps(DT) * DT


# ---------------------------------------------------------------- joining


@given(
    old=chunks, new=chunks, delay=st.integers(0, 6), overlap=st.integers(1, HORIZON), method=st.sampled_from(METHODS)
)
def test_what_will_have_passed_is_the_old_chunks_and_what_comes_later_the_new_ones(
    old, new, delay, overlap, method
) -> None:
    delay = min(delay, overlap)
    joined = handover(method, old[:overlap], delay, fade=5).join(new)
    if method == "none":
        np.testing.assert_array_equal(joined, new)
        return
    np.testing.assert_array_equal(joined[:delay], old[:delay])
    np.testing.assert_array_equal(joined[delay + 5 :], new[delay + 5 :])
    if method == "prefix":
        np.testing.assert_array_equal(joined[delay:], new[delay:])


@given(old=chunks, new=chunks, delay=st.integers(1, 6), overlap=st.integers(1, HORIZON))
def test_a_difference_fades_monotonously_and_without_a_jump(old, new, delay, overlap) -> None:
    delay = min(delay, overlap)
    fade = 5
    end = np.minimum(np.arange(HORIZON), overlap - 1)
    difference = old[end] - new[end]
    joined = handover("blend", old[:overlap], delay, fade).join(new) - new
    part = slice(delay, delay + fade)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(np.abs(difference) > 1e-3, joined / difference, np.nan)[part]
    known = share[:, ~np.isnan(share).any(0)]
    steps = np.diff(np.concatenate([np.ones((1, known.shape[1])), known, np.zeros((1, known.shape[1]))]), axis=0)
    assert ((steps < 0.01) & (steps > -0.3)).all()  # of six steps none is much more than a sixth


@given(old=chunks, new=chunks, delay=st.integers(1, 6), method=st.sampled_from(METHODS), late_ns=st.integers(0, 5 * DT))
def test_no_hand_over_leaves_the_limits(old, new, delay, method, late_ns) -> None:
    joined = handover(method, old[4:], delay).join(new)
    path = plan_path(joined, stamp_ns=0, dt_ns=DT, now_ns=late_ns, reference=np.array([0.9, -0.5]), limiter=LIMITER)
    assert ((path.positions >= LIMITER.lower) & (path.positions <= LIMITER.upper)).all()
    reach = LIMITER.speed * np.diff(path.stamps_ns)[:, None] / 1e9
    assert (np.abs(np.diff(path.positions, axis=0)) <= reach + 1e-9).all()


def test_guidance_holds_on_to_what_passes_and_lets_go_to_the_end_of_the_old_chunk() -> None:
    weights = handover("guidance", np.zeros((10, 2)), 3).weights(HORIZON)
    assert weights.shape == (HORIZON,) and (weights[:3] == 1).all() and (weights[10:] == 0).all()
    assert (np.diff(weights[2:11]) < 0).all()
    assert weights[3] == pytest.approx(7 / 8 * np.expm1(7 / 8) / np.expm1(1))


@pytest.mark.parametrize(("delay", "previous"), [(3, np.zeros((2, 2))), (-1, np.zeros((2, 2))), (0, np.zeros((0, 2)))])
def test_a_hand_over_that_cannot_be_is_refused(delay: int, previous: np.ndarray) -> None:
    with pytest.raises(InputError, match="Handover: found previous actions"):
        handover("blend", previous, delay)


# ---------------------------------------------------------------- sampling


def test_guidance_without_weight_is_plain_sampling(pi05: bool) -> None:
    model = small_model(pi05)
    inputs, (actions, noise, _) = random_inputs(model.config), random_actions(model.config)
    plain = model.sample_actions(inputs, noise, num_steps=4)
    free = model.sample_actions(inputs, noise, num_steps=4, guidance=Guidance(actions, torch.zeros(4, 1)))
    torch.testing.assert_close(free, plain, rtol=0, atol=1e-6)
    with pytest.raises(InputError, match=r"guidance.target: found shape \(2, 3, 5\), expected \(2, 4, 5\)"):
        model.sample_actions(inputs, noise, guidance=Guidance(actions[:, 1:], torch.ones(1)))


def test_guidance_draws_the_actions_it_weighs_to_the_guide(pi05: bool) -> None:
    model = small_model(pi05)
    inputs, (actions, noise, _) = random_inputs(model.config), random_actions(model.config)
    plain = model.sample_actions(inputs, noise, num_steps=10)
    target = plain + 0.3 * actions
    weights = torch.tensor([1.0, 1.0, 0.0, 0.0])[:, None]
    guided = model.sample_actions(inputs, noise, num_steps=10, guidance=Guidance(target, weights))
    before, after = ((x - target).abs().mean((0, 2)) for x in (plain, guided))
    assert (after[:2] < 0.5 * before[:2]).all()
    assert not guided.requires_grad and not any(p.grad is not None for p in model.parameters())


def test_the_correction_is_the_jacobian_of_the_whole_denoised_chunk() -> None:
    """Of a model whose velocity is known: v = x·A, so the actions at time t are x·(I - tA)."""
    model = small_model()
    dim = model.config.action_dim
    matrix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0)) / 4
    model.predict_velocity = lambda prefix, state, x_t, times, token=None: x_t @ matrix
    inputs, (target, noise, _) = random_inputs(model.config), random_actions(model.config)
    guided = model.sample_actions(inputs, noise, num_steps=1, guidance=Guidance(target, torch.ones(1)))
    jacobian = torch.eye(dim) - matrix
    denoised = noise @ jacobian
    torch.testing.assert_close(guided, denoised + (target - denoised) @ jacobian.T)  # the limit's weight is 1 here


# ---------------------------------------------------------------- a policy


def relative_policy(pi05: bool = False) -> Policy:
    """Trained for a delay of 2, in robot units far from the model's, two of three actions relative to the state."""
    policy = small_policy(pi05)
    bounds = np.full(3, -9.0), np.full(3, 9.0)
    stats = {
        "state": NormStats(np.array([5.0, -3.0, 0.1]), np.array([2.0, 0.5, 0.1]), *bounds),
        "actions": NormStats(np.array([0.1, 0.0, 0.5]), np.array([0.3, 0.2, 0.1]), *bounds),
    }
    config = dataclasses.replace(
        policy.config,
        state_norm="z_score",
        action_norm="z_score",
        delta_mask=(True, True, False),
        rtc_max_delay=2,
        num_steps=10,
    )
    return Policy(policy.model, config, policy.codec.tokenizer, stats, dt=0.05)


def taken_over(policy: Policy, method: str, *, seed: int = 0) -> tuple[ActionChunk, Handover, ActionChunk]:
    """A chunk, the hand-over from it a step later with another state, and the next chunk."""
    first = policy.infer(random_observation(policy, stamp_ns=DT), seed=seed)
    observation = random_observation(policy, seed=1, stamp_ns=2 * DT)
    plan = Handover.plan(method, first, stamp_ns=2 * DT, dt_ns=DT, delay=2, rtc_max_delay=2)
    return first, plan, policy.infer(observation, seed=seed, handover=plan)


@pytest.mark.parametrize("method", ["prefix", "guidance", "blend"])
def test_a_chunk_continues_the_one_before_in_robot_units_and_is_the_same_every_time(pi05: bool, method: str) -> None:
    policy = relative_policy(pi05)
    first, plan, second = taken_over(policy, method)
    np.testing.assert_array_equal(second.actions[:2], first.actions[1:3])
    torch.manual_seed(7)
    np.testing.assert_array_equal(second.actions, taken_over(policy, method)[2].actions)
    alone = policy.infer(random_observation(policy, seed=1, stamp_ns=2 * DT))
    assert not np.array_equal(second.actions, alone.actions)
    assert second.e_token_version == alone.e_token_version
    # What it continues matters beyond what is kept, and each of a chunk's states is its own.
    other = dataclasses.replace(plan, previous=plan.previous + np.float32(0.1))
    moved = policy.infer(random_observation(policy, seed=1, stamp_ns=2 * DT), handover=other)
    assert not np.allclose(moved.actions[2], second.actions[2], atol=1e-4)


def test_given_actions_reach_the_model_as_they_would_in_training(pi05: bool) -> None:
    """Normalised and relative to the new state, as a chunk's own first actions are."""
    policy = relative_policy(pi05)
    policy.fast = False
    observation = random_observation(policy)
    previous = policy.infer(observation).actions
    options = policy.sampling_options(handover("prefix", previous[None], 2), observation.state[None])
    expected = policy.codec.actions_to_model(previous, observation.state)[:2]
    torch.testing.assert_close(options["committed"][0], expected)
    assert "committed" not in policy.sampling_options(handover("blend", previous[None], 2), observation.state[None])


def test_guided_chunks_agree_better_before_anything_is_faded() -> None:
    policy = relative_policy()
    _, plan, guided = taken_over(policy, "guidance")
    free = policy.infer(random_observation(policy, seed=1, stamp_ns=2 * DT))
    at = plan.overlap - 1  # kept neither by guidance nor by chance
    distance = [np.abs(c.actions[at] - plan.previous[at]).mean() for c in (guided, free)]
    assert distance[0] < distance[1]


@pytest.mark.parametrize("method", ["prefix", "guidance", "blend", "none"])
def test_a_rehearsal_meets_every_kind_of_hand_over(method: str) -> None:
    policy = relative_policy()
    rehearsed = Handover.rehearsal(method, np.zeros(3, np.float32), policy.horizon, 2)
    assert [one.delay for one in rehearsed] == ([1, 2] if method == "prefix" else [1])
    for one in rehearsed:
        assert np.isfinite(policy.infer(random_observation(policy), handover=one).actions).all()
