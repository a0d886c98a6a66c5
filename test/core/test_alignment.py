"""The alignment path: who may know what. Leaks are tested exactly, by whole Jacobians and bit for bit.

A perturbation is added to what one segment's input projection returns, so that it enters there and nowhere else, even
where two segments are made from the same numbers (actions are clean in dynamics and noisy in inverse dynamics).
"""

from __future__ import annotations

import ast
import dataclasses
import re
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from small_models import (
    added_to,
    jacobian,
    jacobians,
    random_actions,
    random_inputs,
    random_transitions,
    small_config,
    small_model,
    small_policy,
)
from torch import Tensor

import selfalign_core
from selfalign_core.errors import ConfigError, InputError
from selfalign_core.model.config import ModelConfig
from selfalign_core.model.gemma import PrefixCache
from selfalign_core.model.pi0 import AlignmentNoise, ModelInputs, Pi0, Transitions

OUTPUTS = ("perception", "dynamics", "inverse")
SEGMENTS = ("perception", "dynamics_actions", "dynamics_next_obs", "inverse_next_obs", "inverse_actions")
READS = {
    "perception": {"perception"},
    "dynamics": {"perception", "dynamics_actions", "dynamics_next_obs"},
    "inverse": {"perception", "inverse_next_obs", "inverse_actions"},
}
PREFIX_WAYS = [
    {"alignment_prefix": "images_only", "restrict_image_to_language": False},
    {"alignment_prefix": "images_only", "restrict_image_to_language": True},
    {"alignment_prefix": "full", "restrict_image_to_language": False},
]
PREFIX_IDS = ["separate pass", "joint pass", "full"]


@pytest.fixture(params=[False, True], ids=["pi0", "pi05"])
def pi05(request) -> bool:
    return request.param


def alignment_prefix(model: Pi0, inputs: ModelInputs) -> PrefixCache:
    """As :meth:`Pi0.forward` makes it."""
    features = model.embed_images(inputs.images)
    return model.alignment_prefix(model.prefix(inputs, image_features=features), features, inputs.image_masks)


def predict(model: Pi0, inputs: ModelInputs, transitions: Transitions, noise: AlignmentNoise) -> dict[str, Tensor]:
    prefix = alignment_prefix(model, inputs)
    return dict(zip(OUTPUTS, model.predict_alignment(prefix, transitions, noise), strict=True))


def segment_inputs(model: Pi0, batch: int = 2) -> dict[str, Tensor]:
    """A zero to add to every segment's embedding, with gradient."""
    layout = model.alignment_layout(random_transitions(model.config)[0])
    places = {name: getattr(layout, name) for name in SEGMENTS}
    width = model.config.alignment_expert.width
    return {
        name: torch.zeros(batch, place.stop - place.start, width, requires_grad=True) for name, place in places.items()
    }


# ---------------------------------------------------------------- between the tasks


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("way", PREFIX_WAYS, ids=PREFIX_IDS)
def test_jacobian_between_tasks_is_exactly_what_the_table_says(pi05: bool, way: dict, depth: int) -> None:
    model = small_model(pi05, expert_depth=depth, feature_tokens_per_camera=1, **way)
    deltas = segment_inputs(model)
    with ExitStack() as hooks:
        for name, delta in deltas.items():
            hooks.enter_context(added_to(model.alignment_in_proj[name], delta))
        outputs = predict(model, random_inputs(model.config), *random_transitions(model.config))
    for output, values in outputs.items():
        for name, derivatives in jacobians(values, deltas).items():
            if name in READS[output]:
                assert derivatives.any(), f"{output} does not read {name}"
            else:
                assert not derivatives.any(), f"{name} leaks into {output}"


@pytest.mark.parametrize("e_tokens", [0, 1, 3])
@pytest.mark.parametrize("depth", [1, 3])
def test_other_tasks_inputs_change_no_bit(pi05: bool, depth: int, e_tokens: int) -> None:
    options = {"use_peft_prefix_token": e_tokens > 0, "peft_num_tokens": max(e_tokens, 1)}
    model = small_model(pi05, expert_depth=depth, **options)
    args = (random_inputs(model.config), *random_transitions(model.config))
    with torch.no_grad():
        before = predict(model, *args)
        for name, delta in segment_inputs(model).items():
            with added_to(model.alignment_in_proj[name], torch.randn_like(delta) * 1e3):
                after = predict(model, *args)
            for output in OUTPUTS:
                same = torch.equal(before[output], after[output])
                assert same == (name not in READS[output]), f"{name} → {output}"


def test_samples_do_not_see_each_other(pi05: bool) -> None:
    model = small_model(pi05)
    inputs, (transitions, noise) = random_inputs(model.config), random_transitions(model.config)
    both = predict(model, inputs, transitions, noise)
    row = torch.tensor([1])
    alone = predict(
        model,
        ModelInputs([i[row] for i in inputs.images], [m[row] for m in inputs.image_masks], inputs.tokens[row],
                    inputs.token_masks[row], inputs.state[row]),
        transitions.select(row),
        AlignmentNoise(*(value[row] for value in vars(noise).values())),
    )  # fmt: skip
    for output in OUTPUTS:
        torch.testing.assert_close(both[output][row], alone[output])


# ---------------------------------------------------------------- what the prefix may tell


def prompt_and_state(model: Pi0, stack: ExitStack) -> dict[str, Tensor]:
    """Zeros added to the prompt's embeddings and, in π0, to the state token, as long as ``stack`` is open."""
    config = model.config
    places = {"prompt": (model.paligemma_with_expert.language_model.embed_tokens, config.max_token_len)}
    if not config.pi05:
        places["state"] = (model.state_proj, None)
    deltas = {}
    for name, (module, length) in places.items():
        width = config.text.width if name == "prompt" else config.action_expert.width
        shape = (2, width) if length is None else (2, length, width)
        deltas[name] = torch.zeros(shape, requires_grad=True)
        stack.enter_context(added_to(module, deltas[name]))
    return deltas


@pytest.mark.parametrize("way", PREFIX_WAYS, ids=PREFIX_IDS)
def test_prompt_and_clean_state_reach_alignment_only_through_a_full_prefix(pi05: bool, way: dict) -> None:
    model = small_model(pi05, expert_depth=3, feature_tokens_per_camera=1, **way)
    inputs = random_inputs(model.config)
    with ExitStack() as stack:
        deltas = prompt_and_state(model, stack)
        outputs = predict(model, inputs, *random_transitions(model.config))
        prefix = model.prefix(inputs)
        _, noise, time = random_actions(model.config)
        velocity = model.predict_velocity(prefix, inputs.state, noise, time)
    for output, values in outputs.items():
        for name, derivatives in jacobians(values, deltas).items():
            if name == "prompt" and way["alignment_prefix"] == "full":
                assert derivatives.any(), f"{output} does not read the full prefix"
            else:
                assert not derivatives.any(), f"the {name} leaks into {output}"
    for name, delta in deltas.items():
        assert jacobian(velocity[0, :1], delta).any(), f"the actions do not read the {name}"


@pytest.mark.parametrize("way", PREFIX_WAYS[:2], ids=PREFIX_IDS[:2])
def test_joint_training_pass_keeps_the_prompt_out_of_the_alignment_losses(pi05: bool, way: dict) -> None:
    model = small_model(pi05, **way)
    config = model.config
    actions, noise, time = random_actions(config)
    transitions, alignment_noise = random_transitions(config)
    with ExitStack() as stack:
        deltas = prompt_and_state(model, stack)
        losses = model(
            random_inputs(config), actions, noise=noise, time=time, executed=transitions.actions,
            next_images=random_inputs(config, seed=8).images, alignment_noise=alignment_noise,
        )  # fmt: skip
    for name, delta in deltas.items():
        for part in ("perception", "dynamics", "inverse_dynamics"):
            assert not jacobian(getattr(losses, part), delta).any(), f"{name} → {part}"
        assert jacobian(losses.action, delta).any(), f"{name} → action"


@pytest.mark.parametrize("way", PREFIX_WAYS, ids=PREFIX_IDS)
def test_another_prompt_changes_no_bit_of_alignment_but_through_a_full_prefix(pi05: bool, way: dict) -> None:
    model = small_model(pi05, expert_depth=3, **way)
    inputs, args = random_inputs(model.config), random_transitions(model.config)
    other = dataclasses.replace(inputs, tokens=(inputs.tokens + 1) % model.config.vocab_size, state=inputs.state + 1)
    with torch.no_grad():
        first, second = predict(model, inputs, *args), predict(model, other, *args)
    for output in OUTPUTS:
        assert torch.equal(first[output], second[output]) == (way["alignment_prefix"] == "images_only")


def test_joint_pass_equals_separate_pass(pi05: bool) -> None:
    """With restricted image tokens the image part of the one prefix pass is the images-only prefix."""
    model = small_model(pi05, expert_depth=3, restrict_image_to_language=True)
    inputs, args = random_inputs(model.config), random_transitions(model.config)
    with torch.no_grad():
        features = model.embed_images(inputs.images)
        joint = model.prefix(inputs, image_features=features).images_only()
        separate = model.images_only_prefix(features, inputs.image_masks)
        assert torch.equal(joint.pad_masks, separate.pad_masks)
        valid = joint.pad_masks
        for ours, theirs in zip(joint.layers, separate.layers, strict=True):
            for name in ("keys", "values"):
                a, b = (getattr(kv, name).transpose(1, 2)[valid] for kv in (ours, theirs))
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(
            model.predict_alignment(joint, *args), model.predict_alignment(separate, *args), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_tokens_that_nobody_reads_are_left_out_of_the_last_layer_and_change_nothing(pi05: bool) -> None:
    model = small_model(pi05, expert_depth=3)
    inputs, (transitions, noise) = random_inputs(model.config), random_transitions(model.config)
    prefix = alignment_prefix(model, inputs)
    embs, _, block_mask, cond = model.embed_alignment_suffix(transitions, noise)
    mask = torch.cat([prefix.pad_masks[:, None].expand(-1, len(block_mask), -1), block_mask.expand(2, -1, -1)], dim=2)
    read = torch.tensor([1, 4, 7])

    def gradient(read: Tensor | None, wanted: Tensor | slice) -> list[Tensor]:
        x = embs.detach().requires_grad_()
        places = torch.arange(embs.shape[1]).expand(2, -1)
        hidden = model.paligemma_with_expert.run_expert("alignment", x, places, mask, prefix, cond, read)[:, wanted]
        return [hidden, *torch.autograd.grad(hidden.square().sum(), x)]

    for found, expected in zip(gradient(read, slice(None)), gradient(None, read), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("e_tokens", [0, 3])
def test_a_suffix_without_dynamics_predicts_the_other_two_as_before(pi05: bool, e_tokens: int) -> None:
    model = small_model(
        pi05, expert_depth=3, use_peft_prefix_token=e_tokens > 0, peft_num_tokens=max(e_tokens, 1)
    )  # fmt: skip
    inputs, (transitions, noise) = random_inputs(model.config), random_transitions(model.config)
    prefix = alignment_prefix(model, inputs)
    padded = torch.ones(transitions.actions.shape[:2], dtype=torch.bool)
    padded[0, -1] = False
    for given in (transitions, dataclasses.replace(transitions, action_masks=padded)):
        state, next_obs, actions = model.predict_alignment(prefix, given, noise)
        alone = model.predict_alignment(prefix, given, noise, dynamics=False)
        torch.testing.assert_close((alone[0], alone[2]), (state, actions))
        assert next_obs is not None and alone[1] is None
        losses, fewer = (model.alignment_losses(prefix, given, noise, dynamics=wanted) for wanted in (True, False))
        torch.testing.assert_close(fewer.perception, losses.perception)
        torch.testing.assert_close(fewer.inverse_dynamics, losses.inverse_dynamics)
        assert losses.dynamics.all() and not fewer.dynamics.any()


def test_without_the_restriction_images_know_the_prompt(pi05: bool) -> None:
    """Why masking the prompt for alignment queries is not enough: its image tokens already hold it."""
    model = small_model(pi05, expert_depth=3)
    inputs = random_inputs(model.config)
    with torch.no_grad():
        features = model.embed_images(inputs.images)
        cut = model.prefix(inputs, image_features=features).images_only()
        clean = model.images_only_prefix(features, inputs.image_masks)
    torch.testing.assert_close(cut.layers[0].keys, clean.layers[0].keys)
    assert not torch.allclose(cut.layers[1].keys, clean.layers[1].keys, atol=1e-3)


def test_the_restriction_does_not_blind_the_actions(pi05: bool) -> None:
    model = small_model(pi05, restrict_image_to_language=True)
    inputs, (_, noise, _) = random_inputs(model.config), random_actions(model.config)
    for change in ({"tokens": inputs.tokens.flip(0)}, {"images": [i.flip(0) for i in inputs.images]}):
        other = dataclasses.replace(inputs, **change)
        assert not torch.allclose(model.sample_actions(inputs, noise), model.sample_actions(other, noise))


# ---------------------------------------------------------------- the state and perception


def test_state_reaches_perception_through_its_noisy_token_alone(pi05: bool) -> None:
    model = small_model(pi05)
    inputs, (transitions, noise) = random_inputs(model.config), random_transitions(model.config)
    state = transitions.state.clone().requires_grad_(True)
    transitions = dataclasses.replace(transitions, state=state)
    assert jacobian(predict(model, inputs, transitions, noise)["perception"], state).any()
    place = model.alignment_in_proj["perception"].register_forward_pre_hook(lambda _module, args: (args[0].detach(),))
    outputs = predict(model, inputs, transitions, noise)
    place.remove()
    for output in OUTPUTS:
        assert not jacobian(outputs[output], state).any(), f"the clean state leaks into {output}"


@pytest.mark.parametrize("way", PREFIX_WAYS, ids=PREFIX_IDS)
def test_state_written_into_the_prompt_stays_out_of_alignment(way: dict) -> None:
    """π0.5 writes the state into the prompt. At time 1 the noisy token holds no state, so no other path may show it."""
    policy = small_policy(True, restrict_image_to_language=way["restrict_image_to_language"],
                          alignment_prefix=way["alignment_prefix"])  # fmt: skip
    model, config = policy.model, policy.config.model
    transitions, noise = random_transitions(config, batch=1)
    pure_noise = dataclasses.replace(noise, time=torch.ones(1))
    outputs = []
    for value in (-0.9, 0.9):
        state = torch.full((3,), value)
        tokens, token_masks = policy.codec.prompts_to_model(["pick up"], state.numpy()[None])
        padded = policy.codec.state_to_model(state.numpy()[None])
        inputs = dataclasses.replace(
            random_inputs(config, batch=1), tokens=tokens, token_masks=token_masks, state=padded
        )
        with torch.no_grad():
            outputs.append(predict(model, inputs, dataclasses.replace(transitions, state=padded), pure_noise))
    for output in OUTPUTS:
        same = torch.equal(outputs[0][output], outputs[1][output])
        assert same == (way["alignment_prefix"] == "images_only"), output


# ---------------------------------------------------------------- losses


def losses_of(model: Pi0, *, seed: int = 0, **options):
    config = model.config
    actions, noise, time = random_actions(config)
    transitions, alignment_noise = random_transitions(config)
    options = {
        "executed": transitions.actions,
        "next_images": random_inputs(config, seed=8).images,
        "alignment_noise": alignment_noise,
        **options,
    }
    return model(random_inputs(config), options.pop("actions", actions), noise=noise, time=time, **options)


def test_total_is_the_weighted_sum_and_each_part_is_returned(pi05: bool) -> None:
    model = small_model(pi05, lambda_perc=0.7, lambda_dyn=0.0, lambda_inv=5.0)
    losses = losses_of(model)
    expected = losses.action + 0.7 * losses.perception + 5.0 * losses.inverse_dynamics
    torch.testing.assert_close(losses.total, expected)
    assert all(value > 0 for value in vars(losses).values())
    with pytest.raises(ConfigError, match="lambda_dyn: found -1"):
        small_config(lambda_dyn=-1)


def test_each_loss_is_the_mean_squared_velocity_error_of_its_task(pi05: bool) -> None:
    model = small_model(pi05)
    inputs, (transitions, noise) = random_inputs(model.config), random_transitions(model.config)
    with torch.no_grad():
        prefix = alignment_prefix(model, inputs)
        state, features, actions = model.predict_alignment(prefix, transitions, noise)
        losses = model.alignment_losses(prefix, transitions, noise)
    for found, velocity, noise_, clean in (
        (losses.perception, state, noise.state[:, None], transitions.state[:, None]),
        (losses.dynamics, features, noise.next_obs, transitions.next_obs),
        (losses.inverse_dynamics, actions, noise.actions, transitions.actions),
    ):
        assert found.shape == (2,)
        torch.testing.assert_close(found, (velocity - (noise_ - clean)).square().mean((1, 2)))


def test_next_observation_targets_take_no_gradient(pi05: bool) -> None:
    model = small_model(pi05)
    images = [image.requires_grad_(True) for image in random_inputs(model.config, seed=8).images]
    losses = losses_of(model, next_images=images)
    losses.total.backward()
    assert all(image.grad is None for image in images)
    features = model.next_observation_features(model.embed_images(images))
    assert not features.requires_grad


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_feature_tokens_are_means_of_patches(tokens: int) -> None:
    model = small_model(feature_tokens_per_camera=tokens)
    features = model.embed_images(random_inputs(model.config).images)
    pooled = model.pool_features(features)
    assert pooled.shape == (2, 2 * tokens, model.config.text.width)
    grid = features[1][0].unflatten(0, (2, 2))  # second camera, first sample: rows, columns, width
    expected = {1: grid.mean((0, 1))[None], 2: grid.mean(0), 4: grid.flatten(0, 1)}[tokens]
    torch.testing.assert_close(pooled[0, tokens:], expected)


def test_standardised_targets_use_the_stored_scale() -> None:
    model = small_model()
    features = model.embed_images(random_inputs(model.config).images)
    expected = (model.pool_features(features) - model.next_obs_mean) / model.next_obs_std
    torch.testing.assert_close(model.next_observation_features(features), expected)


@pytest.mark.parametrize("padded", ["steps", "dimensions"])
def test_losses_read_no_prediction_at_padded_places(pi05: bool, padded: str) -> None:
    """An error of any size at a padded step or dimension changes no bit of any loss; at a real one it does."""
    model = small_model(pi05)
    config = model.config
    steps = torch.tensor([[True, True, True, False], [True, False, False, False]])
    executed = torch.tensor([[True, True, False], [True, True, True]])
    dims = torch.arange(config.action_dim) < 3
    if padded == "steps":
        masks = {"action_masks": steps, "executed_masks": executed}
        real = {"action": steps[..., None], "inverse": executed[..., None]}
    else:
        masks = {"dim_mask": dims}
        real = dict.fromkeys(("action", "inverse", "perception"), dims)
    expected = losses_of(model, **masks)
    names = {"action": "action", "inverse": "inverse_dynamics", "perception": "perception"}
    for task, mask in real.items():
        layer = model.action_out_proj if task == "action" else model.alignment_out_proj[task]
        length = {"action": 4, "inverse": 3, "perception": 1}[task]
        error = torch.full((2, length, config.action_dim), 1e3)
        with added_to(layer, error * ~mask):
            assert vars(losses_of(model, **masks)) == vars(expected), f"{task}: padded {padded} are read"
        with added_to(layer, error * mask):
            assert getattr(losses_of(model, **masks), names[task]) > getattr(expected, names[task])


def test_padded_executed_actions_and_absent_cameras_tell_nothing(pi05: bool) -> None:
    model = small_model(pi05)
    inputs, (transitions, noise) = random_inputs(model.config), random_transitions(model.config)
    action_masks = torch.tensor([[True, True, False], [True, False, False]])
    obs_masks = torch.tensor([[True, True, True, True], [True, True, False, False]])
    transitions = dataclasses.replace(transitions, action_masks=action_masks, next_obs_masks=obs_masks)
    other = dataclasses.replace(
        transitions,
        actions=torch.where(action_masks[..., None], transitions.actions, 50.0),
        next_obs=torch.where(obs_masks[..., None], transitions.next_obs, -50.0),
    )
    with torch.no_grad():
        prefix = alignment_prefix(model, inputs)
        first, second = model.alignment_losses(prefix, transitions, noise), model.alignment_losses(prefix, other, noise)
    for name, value in vars(first).items():
        assert torch.equal(value, getattr(second, name)), name
        assert torch.isfinite(value).all()


def test_an_absent_camera_tells_nothing(pi05: bool) -> None:
    model = small_model(pi05)
    inputs, (_, noise, _) = random_inputs(model.config), random_actions(model.config)
    assert inputs.image_masks[1].tolist() == [True, False]
    images = [image.clone() for image in inputs.images]
    images[1][1] = 0.9
    other = dataclasses.replace(inputs, images=images)
    assert torch.equal(model.sample_actions(inputs, noise), model.sample_actions(other, noise))
    first, second = (
        losses_of(model, next_images=i, next_image_masks=inputs.image_masks) for i in (inputs.images, images)
    )
    assert vars(first) == vars(second)


def test_action_and_alignment_suffix_do_not_attend_to_each_other(pi05: bool) -> None:
    model = small_model(pi05, restrict_image_to_language=True)
    losses = losses_of(model)
    experts = {
        name: [p for p in model.paligemma_with_expert.expert(name).parameters() if p.requires_grad]
        for name in ("action", "alignment")
    }
    for loss, own, other in (
        (losses.action, "action", "alignment"),
        (losses.perception + losses.dynamics + losses.inverse_dynamics, "alignment", "action"),
    ):
        reached = torch.autograd.grad(loss, experts[own], retain_graph=True, allow_unused=True)
        assert all(gradient is not None for gradient in reached)
        leaked = torch.autograd.grad(loss, experts[other], retain_graph=True, allow_unused=True)
        assert all(gradient is None for gradient in leaked)


def test_fully_padded_samples_give_zero_not_nan(pi05: bool) -> None:
    """A play frame has no expert chunk: its action loss is zero and its other losses are there."""
    model = small_model(pi05)
    losses = losses_of(model, action_masks=torch.zeros(2, 4, dtype=torch.bool))
    assert losses.action == 0
    losses.total.backward()
    assert torch.isfinite(model.peft_prefix_token.grad).all()
    assert losses.inverse_dynamics > 0


def test_one_time_per_sample_serves_all_tasks_and_noise_is_independent() -> None:
    model = small_model()
    transitions, _ = random_transitions(model.config, batch=400)
    noise = model.draw_alignment_noise(transitions, torch.Generator().manual_seed(0))
    assert noise.time.shape == (400,)
    assert noise.time.min() >= 0.001 and noise.time.max() <= 1.0
    assert float(noise.time.mean()) == pytest.approx(0.6, abs=0.05)  # Beta(1.5, 1)
    assert abs(float((noise.state[:, 0] * noise.actions[:, 0, 0]).mean())) < 0.2
    again = model.draw_alignment_noise(transitions, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(vars(noise).values(), vars(again).values(), strict=True))


@pytest.mark.parametrize("pi05_", [False, True], ids=["pi0", "pi05"])
def test_one_time_for_all_actions_is_the_same_as_one_each(pi05_: bool) -> None:
    model = small_model(pi05_)
    inputs, (_, noise, time) = random_inputs(model.config), random_actions(model.config)
    prefix = model.prefix(inputs)
    each = time[:, None].expand(-1, noise.shape[1])
    torch.testing.assert_close(
        model.predict_velocity(prefix, inputs.state, noise, time),
        model.predict_velocity(prefix, inputs.state, noise, each),
    )


# ---------------------------------------------------------------- nothing of the abandoned way


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: {"actions": b["actions"][..., :2]}, r"actions: found shape \(2, 4, 2\), expected \(2, 4, 5\)"),
        (lambda b: {"noise": b["noise"][:1]}, r"noise: found shape \(1, 4, 5\), expected \(2, 4, 5\)"),
        (lambda b: {"action_masks": torch.ones(2, 3, dtype=torch.bool)}, "action_masks: found shape"),
        (lambda b: {"dim_mask": torch.ones(3, dtype=torch.bool)}, "dim_mask: found shape"),
        (lambda b: {"executed": b["executed"][..., :2]}, r"transitions\.actions: found shape"),
        (lambda b: {"executed": b["executed"][:1]}, r"transitions\.actions: found shape"),
        (lambda b: {"executed_masks": torch.ones(2, 9, dtype=torch.bool)}, r"transitions\.action_masks: found shape"),
        (lambda b: {"executed_masks": torch.ones(2, 3)}, r"transitions\.action_masks: found dtype"),
        (lambda b: {"next_images": [i[:1] for i in b["next_images"]]}, r"next_images\[0\] as tokens: found shape"),
        (lambda b: {"next_image_masks": [torch.ones(2) > 0]}, r"transitions\.next_obs_masks: found shape"),
        (lambda b: {"alignment_noise": dataclasses.replace(b["alignment_noise"], time=torch.ones(1))},
         "noise's time: found shape"),
    ],
)  # fmt: skip
def test_bad_training_inputs_are_refused_by_name(change, message: str) -> None:
    model = small_model()
    actions, noise, time = random_actions(model.config)
    transitions, alignment_noise = random_transitions(model.config)
    batch = {
        "actions": actions, "noise": noise, "time": time, "executed": transitions.actions,
        "next_images": random_inputs(model.config, seed=9).images, "alignment_noise": alignment_noise,
    }  # fmt: skip
    model(random_inputs(model.config), **batch)
    with pytest.raises(InputError, match=message):
        model(random_inputs(model.config), **{**batch, **change(batch)})


def test_no_test_time_training_anywhere() -> None:
    """Neither a layer nor a loss nor an option: the names that the plan removes appear nowhere in code or settings."""
    root = Path(selfalign_core.__file__).parent
    pattern = re.compile(r"ttt|test_time_train|meta_learning|reconstruction_loss", re.IGNORECASE)
    for file in root.rglob("*.py"):
        tree = ast.parse(file.read_text())
        names = {
            value
            for node in ast.walk(tree)
            for value in (getattr(node, key, None) for key in ("id", "name", "attr", "arg", "module"))
            if isinstance(value, str)
        }
        found = sorted(name for name in names if pattern.search(name))
        assert not found, f"{file.name}: {found}"
    for file in (root.parent / "config").rglob("*.yaml"):
        assert not pattern.search(file.read_text()), file.name
    assert not [field.name for field in dataclasses.fields(ModelConfig) if pattern.search(field.name)]
    assert not [name for name, _ in small_model().named_modules() if pattern.search(name)]
