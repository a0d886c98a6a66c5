"""The public sizes: openpi's exact parameter names, shapes and counts on the meta device; bfloat16 on a GPU, if any."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_models import random_inputs, small_config

from selfalign_core.model.config import ModelConfig
from selfalign_core.model.pi0 import Pi0

VOCABULARY, ACTIONS = 257152, 32
VISION, VISION_MLP, TEXT, EXPERT = 1152, 4304, 2048, 1024
PALI, GEMMA = "paligemma_with_expert.paligemma.", "paligemma_with_expert.gemma_expert."

# Published: PaliGemma 3B (224 px) as shipped by its authors, and openpi's JAX models, which have no expert lm_head.
PALIGEMMA_COUNT = 2_923_335_408
PUBLISHED_COUNT = {"pi0": 3_238_048_528, "pi05": 3_353_433_872}
EXPERT_LM_HEAD = VOCABULARY * EXPERT  # in every PyTorch checkpoint, never used

Shapes = dict[str, tuple[int, ...]]


def has_gpu() -> bool:
    """Room for the largest preset in float32 and a copy of its largest tensor."""
    return torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory > 23 * 2**30


def linear(name: str, out: int, into: int, *, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, into), **({f"{name}.bias": (out,)} if bias else {})}


def gemma(prefix: str, width: int, mlp: int, *, adaptive: bool) -> Shapes:
    def norm(name: str) -> Shapes:
        return linear(f"{name}.dense", 3 * width, width) if adaptive else {f"{name}.weight": (width,)}

    shapes = norm(f"{prefix}norm")
    for layer in (f"{prefix}layers.{i}." for i in range(18)):
        for name, out, into in (
            ("self_attn.q_proj", 8 * 256, width), ("self_attn.k_proj", 256, width), ("self_attn.v_proj", 256, width),
            ("self_attn.o_proj", width, 8 * 256), ("mlp.gate_proj", mlp, width), ("mlp.up_proj", mlp, width),
            ("mlp.down_proj", width, mlp),
        ):  # fmt: skip
            shapes |= linear(layer + name, out, into, bias=False)
        shapes |= norm(f"{layer}input_layernorm") | norm(f"{layer}post_attention_layernorm")
    return shapes


def siglip(prefix: str) -> Shapes:
    def norm(name: str) -> Shapes:
        return {f"{name}.weight": (VISION,), f"{name}.bias": (VISION,)}

    shapes = {
        f"{prefix}embeddings.patch_embedding.weight": (VISION, 3, 14, 14),
        f"{prefix}embeddings.patch_embedding.bias": (VISION,),
        f"{prefix}embeddings.position_embedding.weight": (16 * 16, VISION),
        **norm(f"{prefix}post_layernorm"),
    }
    for layer in (f"{prefix}encoder.layers.{i}." for i in range(27)):
        shapes |= norm(f"{layer}layer_norm1") | norm(f"{layer}layer_norm2")
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{layer}self_attn.{name}", VISION, VISION)
        shapes |= linear(f"{layer}mlp.fc1", VISION_MLP, VISION) | linear(f"{layer}mlp.fc2", VISION, VISION_MLP)
    return shapes


def openpi_shapes(pi05: bool) -> Shapes:
    shapes = {
        **siglip(f"{PALI}model.vision_tower.vision_model."),
        **linear(f"{PALI}model.multi_modal_projector.linear", TEXT, VISION),
        **gemma(f"{PALI}model.language_model.", TEXT, 16384, adaptive=False),
        f"{PALI}model.language_model.embed_tokens.weight": (VOCABULARY, TEXT),
        f"{PALI}lm_head.weight": (VOCABULARY, TEXT),
        **gemma(f"{GEMMA}model.", EXPERT, 4096, adaptive=pi05),
        f"{GEMMA}lm_head.weight": (VOCABULARY, EXPERT),
        **linear("action_in_proj", EXPERT, ACTIONS),
        **linear("action_out_proj", ACTIONS, EXPERT),
    }
    if pi05:
        return shapes | linear("time_mlp_in", EXPERT, EXPERT) | linear("time_mlp_out", EXPERT, EXPERT)
    return (
        shapes
        | linear("state_proj", EXPERT, ACTIONS)
        | linear("action_time_mlp_in", EXPERT, 2 * EXPERT)
        | linear("action_time_mlp_out", EXPERT, EXPERT)
    )


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def preset(request) -> str:
    return request.param


def on_meta(preset: str, **changes) -> Pi0:
    with torch.device("meta"):
        return Pi0(ModelConfig.preset(preset, **changes))


@pytest.fixture(scope="module")
def plain(preset) -> Pi0:
    return on_meta(preset, alignment_expert=None, use_peft_prefix_token=False)


def shapes_of(model: Pi0) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def count(tensors) -> int:
    return sum(tensor.numel() for tensor in tensors)


def test_names_and_shapes_are_openpis(preset: str, plain: Pi0) -> None:
    assert shapes_of(plain) == openpi_shapes(pi05=preset == "pi05")


def test_parameter_counts_are_the_published_ones(preset: str, plain: Pi0) -> None:
    assert count(plain.paligemma_with_expert.paligemma.parameters()) == PALIGEMMA_COUNT
    assert count(plain.parameters()) == PUBLISHED_COUNT[preset] + EXPERT_LM_HEAD
    assert count(p for p in plain.parameters() if p.requires_grad) == PUBLISHED_COUNT[preset]


def test_the_token_embedding_is_the_output_head(plain: Pi0) -> None:
    language = plain.paligemma_with_expert.paligemma
    assert language.lm_head.weight is language.model.language_model.embed_tokens.weight


def test_our_parts_only_add_tensors_of_their_own(preset: str, plain: Pi0) -> None:
    full, public = shapes_of(on_meta(preset)), shapes_of(plain)
    assert {name: full[name] for name in public} == public
    added = [name for name in full if name not in public]
    own = ("peft_", "alignment_", "next_obs_", "paligemma_with_expert.alignment_expert.")
    assert added and all(name.startswith(own) for name in added)
    assert full["peft_prefix_token"] == (1, EXPERT)


@pytest.mark.parametrize("depth", [1, 6])
def test_alignment_expert_may_be_shallower(preset: str, depth: int) -> None:
    config = ModelConfig.preset(preset)
    expert = type(config.text)(**{**vars(config.alignment_expert), "depth": depth})
    model = on_meta(preset, alignment_expert=expert)
    assert len(model.paligemma_with_expert.expert("alignment").layers) == depth


def test_prompt_length_and_horizon_are_openpis(preset: str, plain: Pi0) -> None:
    assert plain.config.max_token_len == (200 if preset == "pi05" else 48)
    assert (plain.config.action_horizon, plain.config.action_dim) == (50, 32)
    assert plain.config.image_size == (224, 224)


@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
@pytest.mark.parametrize(
    "size",
    [
        "small",
        pytest.param("full", marks=pytest.mark.skipif(not has_gpu(), reason="no GPU of 24 GiB at hand")),
    ],
)
def test_bfloat16_is_finite_and_near_float32(size: str, pi05: bool, record_property, capsys) -> None:
    """Random weights; the error is reported, relative to the root mean square of the float32 velocity."""
    device = "cuda" if size == "full" else "cpu"
    torch.manual_seed(0)
    config = ModelConfig.preset("pi05" if pi05 else "pi0") if size == "full" else small_config(pi05)
    with torch.device(device):
        model = Pi0(config).eval().requires_grad_(False)
    inputs = random_inputs(config)
    inputs = dataclasses.replace(
        inputs,
        images=[image.to(device) for image in inputs.images],
        image_masks=[mask.to(device) for mask in inputs.image_masks],
        **{name: getattr(inputs, name).to(device) for name in ("tokens", "token_masks", "state")},
    )
    noise = torch.randn(2, config.action_horizon, config.action_dim).to(device)
    time = torch.tensor([0.3, 0.9], device=device)
    velocities = []
    for precision in ("float32", "bfloat16"):
        model.to_precision(precision)
        velocities.append(model.predict_velocity(model.prefix(inputs), inputs.state, noise, time))
    exact, rough = velocities
    assert torch.isfinite(exact).all() and torch.isfinite(rough).all()
    error = float((rough - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    record_property("bfloat16_relative_error", error)
    with capsys.disabled():
        print(f"\n{size} {'pi05' if pi05 else 'pi0'}: bfloat16 against float32, relative error {error:.2e}")
    assert 0 < error < 0.1
