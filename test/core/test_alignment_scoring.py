"""Losses of tokens: many at once as each alone, common noise, and frames that are encoded once."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from alignment_stages import WEIGHTS
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import random_batch, small_policy

from selfalign_core.alignment.frame_cache import FrameCache
from selfalign_core.alignment.scoring import Scorer
from selfalign_core.errors import ConfigError


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


@pytest.mark.parametrize(("weights", "left_out"), [((2.0, 0.3, 3.0), True), ((0.0, 0.3, 0.0), False)])
def test_ranking_leaves_dynamics_out_unless_it_is_all_there_is(weights: tuple, left_out: bool) -> None:
    policy = small_policy()
    scorer = Scorer(policy, weights)
    data = scorer.prepare(random_batch(policy, 5))
    noise, rows, tokens = scorer.noise(data, 2, seed=7), torch.arange(10), torch.randn(4, *policy.e_token.data.shape)
    found, losses = scorer.rank(data, noise, tokens, rows), scorer.each(data, noise, tokens, rows)
    expected = weights[0] * losses.perception + weights[2] * losses.inverse_dynamics
    torch.testing.assert_close(found, expected if left_out else weights[1] * losses.dynamics)


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
def test_frames_seen_before_are_not_encoded_again(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept gives the same losses within rounding; the memory is bounded, and pixels decide, not stamps."""
    policy = small_policy(alignment_prefix=prefix)
    frames = FrameCache(policy, 2**20)
    encoded: list[int] = []
    plainly = FrameCache._encode

    def counted(cache: FrameCache, new: np.ndarray, *rest: Any) -> Any:
        encoded.extend([len(new)] * (cache is frames))
        return plainly(cache, new, *rest)

    monkeypatch.setattr(FrameCache, "_encode", counted)
    kept = Scorer(policy, WEIGHTS, prompt="pick up", frames=frames)
    plain = Scorer(policy, WEIGHTS, prompt="pick up")
    first = random_batch(policy, 6)
    token = policy.model.peft_prefix_token.detach()
    for batch in (first, first.select(slice(2, 6)), dataclasses.replace(first, frames=first.frames[::-1].copy())):
        found = kept.summary(kept.prepare(batch), token, 2, seed=1)
        expected = plain.summary(plain.prepare(batch), token, 2, seed=1)
        np.testing.assert_allclose(dataclasses.astuple(found), dataclasses.astuple(expected), rtol=1e-5)
    assert sum(encoded) == 7
    other = dataclasses.replace(first, frames=255 - first.frames)
    kept.prepare(other)
    assert sum(encoded) == 14
    frames.limit_frames = 5
    kept.prepare(other)
    assert frames.nbytes == 5 * frames.encode(other.frames[:1], other.cameras).nbytes
    frames.limit_bytes = frames.nbytes // 2
    kept.prepare(other)
    assert 0 < frames.nbytes <= frames.limit_bytes
    frames.limit_bytes = 0
    kept.prepare(other)
    assert frames.nbytes == 0
