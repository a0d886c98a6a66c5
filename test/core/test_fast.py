"""The fast way to sample gives the plain model's actions, whatever is absent, decided, padded or changed meanwhile."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from small_models import random_actions, random_inputs, random_observation, small_model, small_policy
from test_golden import CASES, FILES, golden, inputs_of, loaded
from torch import Tensor

from selfalign_core.errors import InputError
from selfalign_core.model.fast import FastSampler
from selfalign_core.model.fast.sampler import compiled
from selfalign_core.model.pi0 import ModelInputs, Pi0

FLOAT32 = 1e-5
"""Largest difference from the plain path, relative to the largest action."""
BFLOAT16 = 3e-2
"""The same in bfloat16; the plain path itself is about as far from float32."""


@pytest.fixture(params=[False, True], ids=["pi0", "pi05"])
def pi05(request) -> bool:
    return request.param


def observed(model: Pi0, *, cameras: tuple[bool, ...] = (True, True)) -> tuple[ModelInputs, Tensor, Tensor]:
    """One observation, noise and a clean chunk."""
    inputs = random_inputs(model.config, batch=1)
    masks = [torch.tensor([present]) for present in cameras]
    actions, noise, _ = random_actions(model.config, batch=1)
    return dataclasses.replace(inputs, image_masks=masks), noise, actions


def difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("keep_padding", [False, True], ids=["dropped", "masked"])
@pytest.mark.parametrize("case", CASES)
def test_the_actions_are_openpis(case: str, keep_padding: bool) -> None:
    """Golden vectors: two samples, absent cameras and padded prompts among them."""
    model, inputs, g = loaded(case, FILES[0]), inputs_of(case), golden(case)
    sampler = FastSampler(model, keep_padding=keep_padding)
    for row in range(len(inputs.state)):
        one = ModelInputs(
            [image[row : row + 1] for image in inputs.images],
            [mask[row : row + 1] for mask in inputs.image_masks],
            inputs.tokens[row : row + 1],
            inputs.token_masks[row : row + 1],
            inputs.state[row : row + 1],
        )
        found = sampler.sample_actions(one, torch.from_numpy(g["in_noise"][row : row + 1]), num_steps=10)
        assert difference(found, torch.from_numpy(g["out_sample_actions_10"][row : row + 1])) < FLOAT32


@pytest.mark.parametrize(
    "changes",
    [{}, {"restrict_image_to_language": True, "peft_num_tokens": 2}, {"use_peft_prefix_token": False}],
    ids=["e_token", "restricted, two tokens", "without e_token"],
)
def test_the_actions_are_the_plain_models(pi05: bool, changes: dict) -> None:
    model = small_model(pi05, expert_depth=3, **changes)
    samplers = [FastSampler(model), FastSampler(model, keep_padding=True)]
    for cameras in ((True, True), (False, True), (False, False)):
        inputs, noise, actions = observed(model, cameras=cameras)
        for options in (
            {},
            {"num_steps": 3, "dim_mask": torch.arange(model.config.action_dim) < 3},
            {"num_steps": 4, "committed": actions[:, :2]},
        ):
            expected = model.sample_actions(inputs, noise, **options)
            for sampler in samplers:
                assert difference(sampler.sample_actions(inputs, noise, **options), expected) < FLOAT32, options


def test_holes_in_the_prompt_are_not_seen(pi05: bool) -> None:
    model = small_model(pi05)
    inputs, noise, _ = observed(model)
    inputs.token_masks[0] = torch.tensor([False, True, False, True, True, False])
    expected = model.sample_actions(inputs, noise)
    for keep_padding in (False, True):
        found = FastSampler(model, keep_padding=keep_padding).sample_actions(inputs, noise)
        assert difference(found, expected) < FLOAT32


def test_bfloat16_is_as_near_as_the_plain_path(pi05: bool) -> None:
    model = small_model(pi05, expert_depth=3)
    inputs, noise, _ = observed(model, cameras=(True, False))
    exact = model.sample_actions(inputs, noise)
    model.to_precision("bfloat16")
    plain = model.sample_actions(inputs, noise)
    for keep_padding in (False, True):
        found = FastSampler(model, keep_padding=keep_padding).sample_actions(inputs, noise)
        assert difference(found, plain) < BFLOAT16
        assert difference(found, exact) < BFLOAT16


def test_the_layers_compile_into_one_graph_each(pi05: bool) -> None:
    """What a GPU runs, compiled without Python in between: any size of it, on any backend."""
    model = small_model(pi05, restrict_image_to_language=True)
    inputs, noise, _ = observed(model)
    sampler = FastSampler(model, keep_padding=True, compiler=partial(compiled, backend="aot_eager"))
    expected = model.sample_actions(inputs, noise, num_steps=2)
    assert difference(sampler.sample_actions(inputs, noise, num_steps=2), expected) < FLOAT32


def test_changed_weights_and_tokens_are_noticed(pi05: bool) -> None:
    model = small_model(pi05)
    inputs, noise, _ = observed(model)
    sampler = FastSampler(model)
    seen = [sampler.sample_actions(inputs, noise)]

    def check() -> None:
        found = sampler.sample_actions(inputs, noise)
        assert difference(found, model.sample_actions(inputs, noise)) < FLOAT32
        assert all(difference(found, other) > 100 * FLOAT32 for other in seen)
        seen.append(found)

    with torch.no_grad():
        model.peft_prefix_token.add_(1.0)
    check()
    model.load_state_dict(small_model(pi05, seed=1).state_dict())
    check()
    model.load_state_dict(small_model(pi05, seed=2).state_dict(), assign=True)
    check()
    with torch.no_grad():
        model.paligemma_with_expert.paligemma.model.vision_tower.vision_model.embeddings.patch_embedding.weight.neg_()
    check()
    model.reset_e_token()
    check()
    model.to_precision("bfloat16")
    assert difference(sampler.sample_actions(inputs, noise), model.sample_actions(inputs, noise)) < BFLOAT16


def test_equal_calls_give_equal_bits_whatever_came_between(pi05: bool) -> None:
    model = small_model(pi05)
    inputs, noise, actions = observed(model)
    sampler = FastSampler(model)
    first = sampler.sample_actions(inputs, noise)
    sampler.sample_actions(observed(model, cameras=(True, False))[0], noise)
    for steps in range(1, 35):  # more shapes than are kept
        sampler.sample_actions(inputs, noise, num_steps=steps, committed=actions[:, :1])
    assert torch.equal(sampler.sample_actions(inputs, noise), first)
    assert torch.equal(FastSampler(model).sample_actions(inputs, noise), first)


def test_what_it_does_not_do_the_model_does() -> None:
    model = small_model()
    sampler = FastSampler(model)
    inputs, (actions, noise, _) = random_inputs(model.config), random_actions(model.config)
    assert torch.equal(sampler.sample_actions(inputs, noise), model.sample_actions(inputs, noise))
    inputs, noise, actions = observed(model)
    assert torch.equal(sampler.sample_actions(inputs, noise, committed=actions), actions)
    for wrong in ({"num_steps": 0}, {"committed": actions[..., :2]}):
        with pytest.raises(InputError):
            sampler.sample_actions(inputs, noise, **wrong)
    with pytest.raises(InputError, match="state"):
        sampler.sample_actions(dataclasses.replace(inputs, state=inputs.state[:, :2]), noise)


def test_a_policy_infers_the_same_either_way(pi05: bool) -> None:
    policy = small_policy(pi05)
    observation = random_observation(policy)
    fast = policy.infer(observation).actions
    policy.fast = False
    plain = policy.infer(observation).actions
    np.testing.assert_allclose(fast, plain, atol=FLOAT32 * np.abs(plain).max())
