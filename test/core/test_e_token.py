"""The E-Token: in front of both suffixes, one shared parameter, seen by everyone after it and by no prefix token."""

from __future__ import annotations

import pytest
import torch
from small_models import (
    jacobian,
    random_actions,
    random_inputs,
    random_transitions,
    randomise,
    small_config,
    small_model,
)

from selfalign_core.errors import ConfigError, InputError
from selfalign_core.model.config import GemmaSize, ModelConfig
from selfalign_core.model.pi0 import Losses, Pi0

ALIGNMENT_LOSSES = ("perception", "dynamics", "inverse_dynamics")
WIDER = GemmaSize(width=20, depth=2, mlp_dim=24, num_heads=2, num_kv_heads=1, head_dim=8)


@pytest.fixture(params=[False, True], ids=["pi0", "pi05"])
def pi05(request) -> bool:
    return request.param


@pytest.fixture(params=[1, 3, 8], ids=["1 token", "3 tokens", "8 tokens"])
def num_tokens(request) -> int:
    return request.param


def without_e_token(model: Pi0) -> Pi0:
    """The same weights in a model that has no E-Token."""
    plain = Pi0(model.config.replace(use_peft_prefix_token=False))
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("peft_")}
    plain.load_state_dict(state)
    return plain.eval()


def all_losses(model: Pi0, **options) -> Losses:
    config = model.config
    actions, noise, time = random_actions(config)
    transitions, alignment_noise = random_transitions(config)
    return model(
        random_inputs(config), actions, noise=noise, time=time, executed=transitions.actions,
        next_images=random_inputs(config, seed=9).images, alignment_noise=alignment_noise, **options,
    )  # fmt: skip


# ---------------------------------------------------------------- where it is


def test_both_suffixes_grow_by_the_number_of_tokens(pi05: bool, num_tokens: int) -> None:
    model = small_model(pi05, peft_num_tokens=num_tokens)
    plain = without_e_token(model)
    config, state = model.config, random_inputs(model.config).state
    _, noise, time = random_actions(config)
    transitions, alignment_noise = random_transitions(config)
    for ours, bare, expert in (
        (model.embed_suffix(state, noise, time), plain.embed_suffix(state, noise, time), "action"),
        (
            model.embed_alignment_suffix(transitions, alignment_noise),
            plain.embed_alignment_suffix(transitions, alignment_noise),
            "alignment",
        ),
    ):
        assert ours[0].shape[1] == bare[0].shape[1] + num_tokens
        assert torch.equal(ours[0][:, :num_tokens], model.make_peft_token(len(state), expert=expert))
        assert torch.equal(ours[0][:, num_tokens:], bare[0])
        assert ours[1].shape == ours[0].shape[:2]
        assert ours[1].all()
        assert ours[2].shape[1] == ours[0].shape[1]
        if pi05:
            assert torch.equal(ours[3], bare[3])


def test_lengths_follow_the_inputs_not_the_configuration() -> None:
    model = small_model(feature_tokens_per_camera=1)
    for cameras, actions in ((1, 1), (2, 5), (3, 2)):
        transitions, noise = random_transitions(model.config, cameras=cameras, actions=actions)
        layout = model.alignment_layout(transitions)
        assert (layout.actions, layout.next_obs) == (actions, cameras)
        embs, pads, mask, _ = model.embed_alignment_suffix(transitions, noise)
        assert embs.shape[1] == pads.shape[1] == len(mask) == layout.length == 1 + 1 + 2 * (actions + cameras)


def test_make_peft_token_has_one_row_per_sample(pi05: bool, num_tokens: int) -> None:
    model = small_model(pi05, peft_num_tokens=num_tokens, alignment_expert=WIDER)
    assert model.make_peft_token(4).shape == (4, num_tokens, 16)
    assert model.make_peft_token(4, expert="alignment").shape == (4, num_tokens, WIDER.width)
    assert model.peft_prefix_token.shape == (num_tokens, 16)


def test_a_token_per_sample_is_that_sample_alone(pi05: bool) -> None:
    model = small_model(pi05)
    config = model.config
    inputs, (actions, noise, time) = random_inputs(config), random_actions(config)
    tokens = torch.randn(2, *model.peft_prefix_token.shape)
    both = model.action_loss(model.prefix(inputs), inputs.state, actions, noise, time, token=tokens)
    for row in range(2):
        one = model.action_loss(model.prefix(inputs), inputs.state, actions, noise, time, token=tokens[row])
        torch.testing.assert_close(both[row], one[row])
    with pytest.raises(InputError, match=r"E-Token: found shape \(3, 1, 16\), expected \(1, 16\) or \(2, 1, 16\)"):
        model.make_peft_token(2, token=torch.zeros(3, 1, 16))


# ---------------------------------------------------------------- what it starts as


def test_initialisation_is_as_configured() -> None:
    assert not Pi0(small_config(peft_init="zeros")).peft_prefix_token.any()
    assert Pi0(small_config(peft_init="normal", peft_num_tokens=64)).peft_prefix_token.std().item() == pytest.approx(
        1.0, abs=0.15
    )
    with pytest.raises(ConfigError, match="peft_init: found 'ones'"):
        small_config(peft_init="ones")
    for wrong in (0, -1, 1.5):
        with pytest.raises(ConfigError, match="peft_num_tokens"):
            small_config(peft_num_tokens=wrong)


def test_defaults_are_the_plans() -> None:
    config = ModelConfig.preset("pi0")
    assert (config.use_peft_prefix_token, config.peft_num_tokens) == (True, 1)
    assert (config.peft_init, config.peft_lr) == ("zeros", 1e-3)


def test_zero_initialisation_has_a_gradient_of_the_usual_size(pi05: bool) -> None:
    """RMSNorm of an all-zero token would make it hundreds of times larger."""
    norms = {}
    for init in ("zeros", "normal"):
        torch.manual_seed(0)
        model = Pi0(small_config(pi05, peft_init=init))
        all_losses(model).total.backward()
        norms[init] = float(model.peft_prefix_token.grad.norm())
    assert 0.05 < norms["zeros"] / norms["normal"] < 20


# ---------------------------------------------------------------- one parameter


@pytest.mark.parametrize("alignment_width", ["equal", "wider"])
def test_both_experts_read_the_same_parameter_instance(pi05: bool, alignment_width: str) -> None:
    changes = {"alignment_expert": WIDER} if alignment_width == "wider" else {}
    model = small_model(pi05, **changes)
    named = [name for name, _ in model.named_parameters() if name.startswith("peft_prefix")]
    assert named == ["peft_prefix_token"]
    assert hasattr(model, "peft_alignment_proj") == (alignment_width == "wider")
    before = {expert: model.make_peft_token(1, expert=expert) for expert in ("action", "alignment")}
    with torch.no_grad():
        model.peft_prefix_token += 0.5
    after = {expert: model.make_peft_token(1, expert=expert) for expert in before}
    assert all((after[expert] != before[expert]).all() for expert in before)
    if alignment_width == "equal":
        torch.testing.assert_close(after["alignment"] - before["alignment"], torch.full((1, 1, 16), 0.5))
    for expert, token in after.items():
        (gradient,) = torch.autograd.grad(token.square().sum(), [model.peft_prefix_token], retain_graph=True)
        assert gradient.abs().min() > 0, expert


@pytest.mark.parametrize("init", ["zeros", "normal"])
def test_every_loss_alone_reaches_the_token(pi05: bool, num_tokens: int, init: str) -> None:
    torch.manual_seed(3)
    model = Pi0(small_config(pi05, peft_num_tokens=num_tokens, peft_init=init))
    losses = all_losses(model)
    for name in ("action", *ALIGNMENT_LOSSES, "total"):
        (gradient,) = torch.autograd.grad(getattr(losses, name), [model.peft_prefix_token], retain_graph=True)
        assert (gradient.flatten(1).abs().amax(1) > 1e-7).all(), f"{name}: some token has no gradient"


def test_total_gradient_is_the_weighted_sum_of_the_parts(pi05: bool) -> None:
    model = small_model(pi05, lambda_perc=0.5, lambda_dyn=2.0, lambda_inv=0.25)
    losses = all_losses(model)
    weights = {"action": 1.0, "perception": 0.5, "dynamics": 2.0, "inverse_dynamics": 0.25}
    total = sum(weight * getattr(losses, name) for name, weight in weights.items())
    torch.testing.assert_close(losses.total, total)
    gradients = {
        name: torch.autograd.grad(getattr(losses, name), [model.peft_prefix_token], retain_graph=True)[0]
        for name in ("total", *weights)
    }
    expected = sum(weight * gradients[name] for name, weight in weights.items())
    torch.testing.assert_close(gradients["total"], expected, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- who sees it


def test_every_suffix_token_sees_it_in_one_layer(pi05: bool, num_tokens: int) -> None:
    """One layer, so nobody can pass it on: what depends on E attends to E."""
    model = small_model(pi05, expert_depth=1, peft_num_tokens=num_tokens)
    inputs = random_inputs(model.config)
    _, noise, time = random_actions(model.config)
    prefix = model.prefix(inputs)
    token = model.peft_prefix_token
    hidden = {}
    for expert in ("action", "alignment"):
        hook = model.paligemma_with_expert.expert(expert).register_forward_hook(
            lambda _module, _args, output, expert=expert: hidden.update({expert: output[0]})
        )
        if expert == "action":
            model.predict_velocity(prefix, inputs.state, noise, time)
        else:
            model.predict_alignment(prefix, *random_transitions(model.config))
        hook.remove()
    for expert, states in hidden.items():
        for position in range(states.shape[1]):
            (gradient,) = torch.autograd.grad(states[:, position].sum(), [token], retain_graph=True)
            assert (gradient.abs().amax(1) > 0).all(), f"{expert} suffix, token {position}"


def test_the_prefix_never_sees_it(pi05: bool) -> None:
    model = small_model(pi05)
    inputs = random_inputs(model.config)

    def prefix_numbers() -> list[torch.Tensor]:
        embedded = model.paligemma_with_expert.embed_prefix(
            model.embed_images(inputs.images), inputs.image_masks, inputs.tokens, inputs.token_masks
        )
        cache, hidden = model.paligemma_with_expert.run_prefix(*embedded, output_hidden=True)
        return [hidden, *(x for kv in cache.layers for x in (kv.keys, kv.values))]

    before = prefix_numbers()
    assert not jacobian(before[0][0, :2], model.peft_prefix_token).any()
    with torch.no_grad():
        model.peft_prefix_token.normal_().mul_(100)
    assert all(torch.equal(a, b) for a, b in zip(before, prefix_numbers(), strict=True))


def test_tokens_after_it_do_not_change_it(pi05: bool) -> None:
    """E is its own block: what others read of it depends on prefix and E alone, not on noisy actions or transitions."""
    model = small_model(pi05, expert_depth=3)
    inputs, prefix = random_inputs(model.config), model.prefix(random_inputs(model.config))
    _, noise, time = random_actions(model.config)
    seen: dict[str, list[torch.Tensor]] = {"action": [], "alignment": []}
    for expert, found in seen.items():
        hook = model.paligemma_with_expert.expert(expert).register_forward_hook(
            lambda _module, _args, output, found=found: found.append(
                torch.cat([torch.cat([kv.keys, kv.values], dim=3)[:, :, 0] for kv in output[1]])
            )
        )
        for seed in (1, 2):
            scale = 10.0**seed
            if expert == "action":
                model.predict_velocity(prefix, scale * inputs.state, scale * noise, time)
            else:
                transitions, alignment_noise = random_transitions(model.config, seed=seed)
                alignment_noise = type(alignment_noise)(**{**vars(alignment_noise), "time": time})
                model.predict_alignment(prefix, transitions, alignment_noise)
        hook.remove()
        assert torch.equal(*found), expert


# ---------------------------------------------------------------- turned off


def test_without_it_the_model_is_the_plain_one_bit_for_bit(pi05: bool) -> None:
    """Neither the E-Token option nor the alignment expert leaves a trace in the actions or the action loss."""
    full = randomise(Pi0(small_config(pi05, use_peft_prefix_token=False)), 4)
    plain = Pi0(full.config.replace(alignment_expert=None))
    plain.load_state_dict({name: full.state_dict()[name] for name in plain.state_dict()})
    plain.eval()
    assert not [name for name in full.state_dict() if "peft" in name]
    inputs, (actions, noise, time) = random_inputs(full.config), random_actions(full.config)
    assert torch.equal(full.sample_actions(inputs, noise), plain.sample_actions(inputs, noise))
    losses = [m.action_loss(m.prefix(inputs), inputs.state, actions, noise, time) for m in (full, plain)]
    assert torch.equal(*losses)
    alone = plain(inputs, actions, noise=noise, time=time)
    joint = all_losses(full)
    assert torch.equal(alone.action, joint.action)
    for model in (full, plain):
        with pytest.raises(InputError, match="use_peft_prefix_token is False"):
            model.make_peft_token(1)


def test_it_is_not_ignored(pi05: bool) -> None:
    model = small_model(pi05)
    inputs, (_, noise, _) = random_inputs(model.config), random_actions(model.config)
    first = model.sample_actions(inputs, noise)
    assert not torch.allclose(first, model.sample_actions(inputs, noise, token=-model.peft_prefix_token))
    assert not torch.allclose(first, without_e_token(model).sample_actions(inputs, noise))


@pytest.mark.parametrize("learning_rate", [0.0, 1e-2])
def test_losses_stay_where_they_were_if_its_optimisation_is_off(pi05: bool, learning_rate: float) -> None:
    model = small_model(pi05).requires_grad_(False)
    model.peft_prefix_token.requires_grad_(True)
    optimiser = torch.optim.Adam([model.peft_prefix_token], lr=learning_rate)
    before, weights = all_losses(model), {k: v.clone() for k, v in model.state_dict().items()}
    for _ in range(3):
        optimiser.zero_grad()
        all_losses(model).total.backward()
        optimiser.step()
    after = all_losses(model)
    for name in ("action", *ALIGNMENT_LOSSES):
        same = torch.equal(getattr(before, name), getattr(after, name))
        assert same == (learning_rate == 0.0), name
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])]
    assert changed == ([] if learning_rate == 0.0 else ["peft_prefix_token"])
