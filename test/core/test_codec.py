"""The one way from robot numbers to model numbers: a batch is its items, and what comes back is what went in."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import WORDS, random_observation, small_policy

from selfalign_core.errors import InputError
from selfalign_core.policy.codec import Codec, pixels_to_model
from selfalign_core.policy.config import PolicyConfig
from selfalign_core.policy.tokenizer import word_tokenizer
from selfalign_core.policy.transforms import NormStats

POLICIES = Path(__file__).parents[2] / "policies"


def codec_of(pi05: bool, mode: str = "quantile", mask: tuple[bool, ...] = (True, True, False)) -> Codec:
    """Of a model that is not there."""
    config = dataclasses.replace(
        small_policy(pi05).config, state_norm=mode, action_norm=mode, delta_mask=mask, cameras=("front", None, "wrist")
    )
    rng = np.random.default_rng(0)
    low = rng.uniform(-3, 0, 3)
    stats = {
        name: NormStats(low + shift, np.array([0.5, 2.0, 1e-9]), low, low + np.array([1.0, 0.1, 3.0]))
        for name, shift in (("state", 0.3), ("actions", 0.1))
    }
    bins = (
        *map(str, range(-1, 256)),
        *(f"{i};\naction:" for i in range(-1, 256)),
        *(f"{word}," for word in WORDS),
        "task:",
        "state:",
    )
    return Codec(config, stats, word_tokenizer((*WORDS, *bins)) if pi05 else word_tokenizer(WORDS))


@pytest.mark.parametrize("pi05", [False, True])
def test_a_batch_is_its_observations_one_by_one(pi05: bool) -> None:
    policy = small_policy(pi05)
    rng = np.random.default_rng(1)
    first = random_observation(policy)
    observations = [
        dataclasses.replace(
            first,
            images={name: rng.integers(0, 256, image.shape, dtype=np.uint8) for name, image in first.images.items()},
            state=rng.normal(size=first.state.shape).astype(np.float32),
            prompt=prompt,
        )
        for prompt in ("pick up", "red cube", "pick up the cube")
    ]
    batch = policy.codec.observations_to_model(observations)
    for i, observation in enumerate(observations):
        one = policy.codec.observations_to_model([observation])
        for name in ("tokens", "token_masks", "state"):
            assert torch.equal(getattr(batch, name)[i], getattr(one, name)[0]), name
        for many, single in zip([*batch.images, *batch.image_masks], [*one.images, *one.image_masks], strict=True):
            assert torch.equal(many[i], single[0])


@pytest.mark.parametrize("mode", ["identity", "z_score", "quantile"])
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 5), mask=st.tuples(*[st.booleans()] * 3))
def test_actions_come_back_and_padding_stays_zero(mode: str, seed: int, rows: int, mask: tuple[bool, ...]) -> None:
    codec, rng = codec_of(False, mode, mask), np.random.default_rng(seed)
    states = rng.normal(size=(rows, 3)).astype(np.float32)
    actions = rng.normal(size=(rows, 4, 3)).astype(np.float32)
    there = codec.actions_to_model(actions, states)
    assert there.shape == (rows, 4, codec.config.model.action_dim) and not there[..., 3:].any()
    np.testing.assert_allclose(codec.actions_from_model(there, states), actions, atol=2e-5)
    each = [codec.actions_to_model(a, s) for a, s in zip(actions, states, strict=True)]
    assert torch.equal(there, torch.stack(each))


@given(st.lists(st.sampled_from([0, 1, 127, 128, 254, 255]), min_size=12, max_size=12))
def test_pixels_are_scaled_alike_wherever_they_are_in_a_batch(values: list[int]) -> None:
    images = np.array(values, np.uint8).reshape(1, 2, 2, 3)
    found = pixels_to_model(torch.from_numpy(images))
    assert torch.equal(found, torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255.0 * 2.0 - 1.0)
    assert torch.equal(pixels_to_model(torch.from_numpy(images[0])), found[0])


def test_a_slot_without_a_camera_is_black_and_masked() -> None:
    codec = codec_of(False)
    image = np.full((2, *codec.config.model.image_size, 3), 255, np.uint8)
    images, masks = codec.cameras_to_model({"front": image, "wrist": image}, 2)
    assert [bool(mask.all()) for mask in masks] == [True, False, True] and not masks[1].any()
    assert [float(image.mean()) for image in images] == [1.0, -1.0, 1.0]


def test_only_the_prompt_of_pi05_holds_the_state() -> None:
    states = np.array([[0, -2.9, 0.1], [1, -2.8, 2]], np.float32)
    for pi05 in (False, True):
        codec = codec_of(pi05)
        ids, masks = codec.prompts_to_model(["red cube"] * 2, states)
        assert torch.equal(ids[0], ids[1]) is not pi05 and masks.any(1).all()
        assert np.array_equal(ids[1], codec.prompt_to_model("red cube", states[1])[0])


def test_a_vector_of_another_length_is_refused() -> None:
    with pytest.raises(InputError, match="found a vector of 2, expected 3"):
        codec_of(False).state_to_model(np.zeros((1, 2), np.float32))


def test_a_codec_needs_no_weights() -> None:
    config = PolicyConfig.load(POLICIES / "tiny_reach")
    code = f"""
import sys
from selfalign_core.policy.source import Source, image_size_of, transition_horizon_of
path = {str(POLICIES / "tiny_reach")!r}
source = Source.read(path)
print(source.config.state_dim, len(source.stats["state"].mean), *image_size_of(path), transition_horizon_of(path))
assert not {{"torch", "tokenizers"}} & set(sys.modules), "torch is imported"
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [str(v) for v in (3, 3, *config.model.image_size, config.model.transition_horizon)]
