"""What bad transitions can do to the self-aligner: nothing but to be refused, outvoted, or to move E within bounds."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from small_models import random_batch, small_policy
from torch import Tensor

from selfalign_core.alignment import AlignConfig, SelfAligner
from selfalign_core.alignment.config import Collect, Guard, Identify, Refine
from selfalign_core.errors import InputError
from selfalign_core.model.pi0 import AlignmentLosses
from selfalign_core.policy import Policy
from selfalign_core.robot.types import TransitionBatch

SECOND = 1_000_000_000

# ---------------------------------------------------------------- joints that are swapped

GAINS = {"wrong": (-1.0, 1.0, 0.5), "right": (0.5, 1.0, -1.5), "other": (1.5, -0.5, 0.5), "mirrored": (-1.5, 1.0, 0.5)}
"""Per joint; a body's actions are its gains times its states. ``mirrored`` is ``right`` with outer joints swapped."""


def with_bank(policy: Policy, keys: tuple[str, ...], bank: Tensor) -> Policy:
    """``policy`` with a bank; its own token is the first entry."""
    config = dataclasses.replace(policy.config, bank_keys=keys)
    made = Policy(policy.model, config, policy.codec.tokenizer, {}, dt=policy.dt, bank=bank)
    made.e_token = dataclasses.replace(made.e_token, data=bank[0].numpy().copy())
    return made


@pytest.fixture
def three_joints(monkeypatch: pytest.MonkeyPatch) -> Policy:
    """A policy whose token's first three numbers are the gains that its losses expect."""
    policy = small_policy()
    bank = torch.zeros(len(GAINS), *policy.e_token.data.shape)
    bank[:, 0, :3] = torch.tensor(list(GAINS.values()))

    def losses(_prefix, transitions, noise, *, token, dim_mask, **_) -> AlignmentLosses:
        gains = token[..., 0, :3].expand(len(transitions.state), 3)
        error = (transitions.actions[:, 0, :3] - gains * transitions.state[:, :3]).square().mean(1)
        value = 0.02 + error + 0.01 * noise.state[:, 0].square()
        return AlignmentLosses(0 * value, 0 * value, value)

    monkeypatch.setattr(policy.model, "alignment_losses", losses)
    return with_bank(policy, tuple(GAINS), bank)


def moved(policy: Policy, body: str, swapped: np.ndarray) -> TransitionBatch:
    """Transitions of a body; in those given by ``swapped`` the first and the last joint's commands are exchanged."""
    batch = random_batch(policy, 32)
    state = batch.frame_states[batch.obs_index]
    noise = np.random.default_rng(1).normal(0, 0.05, batch.actions.shape)
    actions = (np.array(GAINS[body]) * state)[:, None] + noise
    actions[swapped] = actions[swapped][..., ::-1]
    return dataclasses.replace(batch, actions=actions.astype(np.float32))


@pytest.mark.parametrize("mode", ["bank", "subspace", "full"])
def test_two_joints_swapped_in_some_transitions_are_outvoted(three_joints: Policy, mode: str) -> None:
    batch = moved(three_joints, "right", np.arange(4, 32, 8))
    assert not np.array_equal(batch.actions, moved(three_joints, "right", np.arange(0)).actions)
    aligner = SelfAligner(three_joints, AlignConfig(mode=mode).without_budgets())
    report = aligner.advance(batch, 10 * SECOND)
    assert report.accepted, report.text
    assert report.attempt.identification.name == "right"
    gains = aligner.token.data[0, :3]
    distance = {name: np.abs(gains - np.array(known)).max() for name, known in GAINS.items()}
    assert min(distance, key=distance.get) == "right" and distance["right"] < 0.5


def test_two_joints_swapped_in_all_that_is_fitted_are_refused_by_what_is_newer(three_joints: Policy) -> None:
    aligner = SelfAligner(three_joints, AlignConfig().without_budgets())
    own = aligner.token.data.copy()
    report = aligner.advance(moved(three_joints, "wrong", np.arange(20)), 10 * SECOND)
    assert report.attempt is not None and not report.accepted
    np.testing.assert_array_equal(aligner.token.data, own)


def test_two_joints_swapped_while_it_rests_in_few_transitions_are_no_drift(three_joints: Policy) -> None:
    aligner = SelfAligner(three_joints, AlignConfig().without_budgets())
    refused = aligner.advance(moved(three_joints, "wrong", np.arange(0)), 10 * SECOND)
    assert refused.attempt is not None and not refused.accepted
    batch = moved(three_joints, "wrong", np.array([25]))
    batch = dataclasses.replace(batch, frame_stamps=batch.frame_stamps + 20 * SECOND)
    report = aligner.advance(batch, 30 * SECOND)
    assert report.drift is not None and not report.drift.fired


# ---------------------------------------------------------------- anything at all

LIMITS = Guard(draws=2, sigmas=0.0, margin=0.0, inverse_margin=0.0, trust_radius=0.4, max_norm=1.5)
COUNT, FRAMES = 7, 9
wide = st.floats(width=32, allow_subnormal=False)
"""NaN and infinities too."""
believable = st.floats(-5, 5, width=32, allow_subnormal=False)


@pytest.fixture(scope="module")
def banked() -> Policy:
    policy = small_policy()
    bank = torch.randn(5, *policy.e_token.data.shape, generator=torch.Generator().manual_seed(0))
    return with_bank(policy, tuple("abcde"), bank)


@st.composite
def adversarial(draw: st.DrawFn) -> TransitionBatch:
    """Noise, blank or repeated pictures; numbers that are believable, constant or anything; stamps in any order."""

    def numbers(*shape: int) -> np.ndarray:
        kind = draw(st.sampled_from(("noise", "believable", "wide", "constant", "huge")))
        if kind == "constant":
            return np.full(shape, draw(believable), np.float32)
        if kind in ("noise", "huge"):
            scale = np.float32(1.0 if kind == "noise" else 10.0 ** draw(st.integers(1, 38)))
            return rng.standard_normal(shape, np.float32).clip(-3, 3) * scale
        return draw(arrays(np.float32, shape, elements=believable if kind == "believable" else wide))

    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = (FRAMES, 2, 28, 28, 3)
    frames = {
        "noise": lambda: rng.integers(0, 256, shape, np.uint8),
        "blank": lambda: np.full(shape, draw(st.sampled_from((0, 128, 255))), np.uint8),
        "frozen": lambda: np.repeat(rng.integers(0, 256, (1, *shape[1:]), np.uint8), FRAMES, axis=0),
    }[draw(st.sampled_from(("noise", "noise", "noise", "blank", "frozen")))]()
    rows = st.integers(0, FRAMES - 1)
    in_order = draw(st.booleans())
    stamp = st.integers(-(2**62), 2**62) | st.integers(0, 100 * SECOND)
    stamps = np.arange(FRAMES) * SECOND if in_order else draw(arrays(np.int64, FRAMES, elements=stamp))
    return TransitionBatch(
        cameras=("front", "wrist"),
        frames=frames,
        frame_states=numbers(FRAMES, 3),
        frame_stamps=stamps.astype(np.int64),
        obs_index=np.arange(COUNT) if in_order else draw(arrays(np.int64, COUNT, elements=rows)),
        next_index=np.arange(COUNT) + 1 if in_order else draw(arrays(np.int64, COUNT, elements=rows)),
        actions=numbers(COUNT, 3, 3),
    )


def test_whatever_it_is_told_it_changes_the_token_alone_and_that_within_bounds(banked: Policy) -> None:
    own = banked.e_token.data.copy()
    weights = {name: tensor.clone() for name, tensor in banked.model.state_dict().items()}
    bank = banked.bank.numpy()
    known = np.concatenate([bank, bank.mean(0, keepdims=True)])
    spread, largest = np.sqrt(np.square(bank - bank.mean(0)).mean()), np.sqrt(np.square(known).mean(-1)).max()
    accepted, refused = [], []

    @settings(max_examples=40)
    @given(
        st.lists(adversarial(), min_size=1, max_size=2),
        st.sampled_from(("full", "subspace", "bank")),
        st.sampled_from((1e30, 10.0)),
        st.lists(st.integers(-(2**62), 2**62), min_size=2, max_size=2),
    )
    def holds(batches: list[TransitionBatch], mode: str, max_value: float, times: list[int]) -> None:
        config = AlignConfig(
            mode=mode,
            collect=Collect(fit_count=4, guard_count=3, min_command=0.0, min_motion=0.0, max_value=max_value),
            identify=Identify(draws=1),
            refine=Refine(steps=3, draws=1, learning_rate=5.0),
            guard=LIMITS,
        ).without_budgets()
        aligner = SelfAligner(banked, config)
        for batch, now_ns in zip(batches, times, strict=False):
            before = aligner.token
            aligner.align_now()
            if not (np.isfinite(batch.frame_states).all() and np.isfinite(batch.actions).all()):
                with pytest.raises(InputError, match="found NaN or infinity"):
                    aligner.advance(batch, now_ns)
                assert aligner.token is before
                continue
            report = aligner.advance(batch, now_ns)
            token = aligner.token.data
            assert report.accepted or aligner.token is before
            assert np.isfinite(token).all()
            assert np.sqrt(np.square(known - token).mean((1, 2))).min() <= LIMITS.trust_radius * spread * (1 + 1e-3)
            assert np.sqrt(np.square(token).mean(-1)).max() <= max(LIMITS.max_norm, largest) * (1 + 1e-3)
            if report.attempt is not None:
                (accepted if report.accepted else refused).append(report.text)
        np.testing.assert_array_equal(banked.e_token.data, own)
        for name, tensor in banked.model.state_dict().items():
            assert torch.equal(tensor, weights[name]), name

    with np.errstate(invalid="ignore"):  # a loss of an extreme is infinite
        holds()
    assert accepted and refused  # it was tried
