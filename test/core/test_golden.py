"""Every array recorded from openpi's PyTorch model, and openpi's rules written out slowly for other sizes.

See test/data/golden/README.md for where the vectors come from and how closely they must be met.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from selfalign_core.model import flow_matching as flow
from selfalign_core.model.config import GemmaSize, ModelConfig, VisionSize
from selfalign_core.model.masks import (
    make_att_2d_masks,
    make_position_ids,
    prefix_att_2d_mask,
    suffix_over_prefix_mask,
)
from selfalign_core.model.pi0 import ModelInputs, Pi0
from selfalign_core.policy.checkpoint import load_model
from selfalign_core.policy.tensors import infer_model_config, open_tensors

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CASES = ("pi0_seed0", "pi05_seed0")
FILES = ("model.safetensors", "model_lerobot.safetensors")
FORWARD_TOLERANCE = 5e-5
GRADIENT_TOLERANCE = 1e-3
VALID_TOKENS_ONLY = ("out_prefix_hidden", "out_prefix_keys", "out_prefix_values")


@functools.cache
def golden(case: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / case / "golden.npz"))


@functools.cache
def sizes(case: str) -> dict:
    return json.loads((GOLDEN / case / "config.json").read_text())


def vision_size(c: dict) -> VisionSize:
    return VisionSize(
        c["vision_width"], c["vision_depth"], c["vision_mlp_dim"], c["vision_num_heads"], c["image_size"],
        c["patch_size"],
    )  # fmt: skip


def config_of(case: str) -> ModelConfig:
    """The configuration that config.json states."""
    c = sizes(case)
    attention = {name: c[name] for name in ("depth", "num_heads", "num_kv_heads", "head_dim")}
    return ModelConfig(
        pi05=c["pi05"],
        vision=vision_size(c),
        text=GemmaSize(width=c["text_width"], mlp_dim=c["text_mlp_dim"], **attention),
        action_expert=GemmaSize(width=c["expert_width"], mlp_dim=c["expert_mlp_dim"], **attention),
        vocab_size=c["vocab_size"],
        action_dim=c["action_dim"],
        action_horizon=c["action_horizon"],
        max_token_len=c["max_token_len"],
        use_peft_prefix_token=False,
    )


@functools.cache
def loaded(case: str, file: str) -> Pi0:
    return load_model(GOLDEN / case / file, config_of(case))


@functools.cache
def inputs_of(case: str) -> ModelInputs:
    g = {name: torch.from_numpy(value) for name, value in golden(case).items() if name.startswith("in_")}
    return ModelInputs(
        images=list(g["in_images"]),
        image_masks=list(g["in_image_masks"].unbind(1)),
        tokens=g["in_tokenized_prompt"],
        token_masks=g["in_tokenized_prompt_mask"],
        state=g["in_state"],
    )


@functools.cache
def computed(case: str, file: str) -> dict[str, Tensor]:
    """All recorded arrays, by the model's public methods; hooks catch what the expert's stack really receives."""
    model, inputs = loaded(case, file), inputs_of(case)
    actions, noise, time = (torch.from_numpy(golden(case)["in_" + n]) for n in ("actions", "noise", "time"))
    out: dict[str, Tensor] = {}
    with torch.no_grad():
        features = model.embed_images(inputs.images)
        out["image_features"] = torch.stack(features)
        embs, pads, att = model.embed_prefix(inputs)
        out["prefix_embs"], out["prefix_pad_masks"], out["prefix_att_masks"] = embs, pads, att
        x_t = flow.add_noise(actions, noise, time)
        out["x_t"], out["u_t"] = x_t, flow.target_velocity(actions, noise)
        out["time_emb"] = flow.time_embedding(time, model.config.action_expert.width)
        suffix, suffix_pads, suffix_att, cond = model.embed_suffix(inputs.state, x_t, time)
        out["suffix_embs"], out["suffix_pad_masks"], out["suffix_att_masks"] = suffix, suffix_pads, suffix_att.float()
        if cond is not None:
            out["adarms_cond"] = cond

        joint_pads, joint_att = torch.cat([pads, suffix_pads], 1), torch.cat([att, suffix_att], 1)
        out["joint_att_masks"] = joint_att.float()
        out["joint_att_2d_masks"] = make_att_2d_masks(joint_pads, joint_att)
        out["joint_position_ids"] = make_position_ids(joint_pads)
        out["prefix_att_2d_masks"] = make_att_2d_masks(pads, att)
        out["prefix_position_ids"] = make_position_ids(pads)

        prefix, hidden = model.paligemma_with_expert.run_prefix(embs, pads, prefix_length(features), output_hidden=True)
        out["prefix_hidden"] = hidden
        out["prefix_keys"] = torch.stack([kv.keys for kv in prefix.layers])
        out["prefix_values"] = torch.stack([kv.values for kv in prefix.layers])

        seen = {}
        hook = model.paligemma_with_expert.gemma_expert.model.register_forward_pre_hook(
            lambda _, args, kwargs: seen.update(position_ids=args[1], mask=args[2]), with_kwargs=True
        )
        out["denoise_v_t"] = model.predict_velocity(model.prefix(inputs), inputs.state, x_t, time)
        hook.remove()
        out["denoise_position_ids"], out["suffix_rows"] = seen["position_ids"], seen["mask"]

    model.zero_grad()
    prefix = model.prefix(inputs)  # with gradient: the joint training pass
    loss = model.action_loss(prefix, inputs.state, actions, noise, time)
    loss.mean().backward()
    out["train_loss"] = loss.detach()
    with torch.no_grad():
        out["train_v_t"] = model.predict_velocity(prefix, inputs.state, x_t, time)
        out["train_suffix_out"] = model.run_suffix(prefix, inputs.state, x_t, time)
    out["grad_action_in_proj_weight"] = model.action_in_proj.weight.grad
    out["grad_text_layer0_k_proj_weight"] = model.paligemma_with_expert.language_model.layers[
        0
    ].self_attn.k_proj.weight.grad

    for steps in (4, 10):
        xs, vs, times = [], [], []

        def recording(prefix, state, x, t, xs=xs, vs=vs, times=times, **options):
            v = Pi0.predict_velocity(model, prefix, state, x, t, **options)
            xs.append(x), vs.append(v), times.append(t[0])
            return v

        model.predict_velocity = recording
        try:
            out[f"sample_actions_{steps}"] = model.sample_actions(inputs, noise, num_steps=steps)
        finally:
            del model.predict_velocity
        out[f"sample_x_{steps}"], out[f"sample_v_{steps}"] = torch.stack(xs), torch.stack(vs)
        out[f"sample_times_{steps}"] = torch.stack(times)
    return out


def prefix_length(features: list[Tensor]) -> int:
    return sum(f.shape[1] for f in features)


def assert_close(found: np.ndarray, expected: np.ndarray, what: str, tolerance: float = FORWARD_TOLERANCE) -> None:
    assert found.shape == expected.shape, f"{what}: shape {found.shape}, expected {expected.shape}"
    excess = np.abs(found - expected) - tolerance * np.abs(expected)
    assert excess.max() <= tolerance, f"{what}: off by {np.abs(found - expected).max():.3g}"


ARRAYS = [(case, name) for case in CASES for name in golden(case) if name.startswith("out_")]


@pytest.mark.parametrize("file", FILES, ids=("openpi", "lerobot"))
@pytest.mark.parametrize(("case", "name"), ARRAYS, ids=[f"{c}-{n.removeprefix('out_')}" for c, n in ARRAYS])
def test_array_equals_openpi(case: str, name: str, file: str) -> None:
    expected = golden(case)[name]
    found = computed(case, file)[name.removeprefix("out_")].numpy()
    if expected.dtype.kind in "biu":
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == expected.dtype
        return
    if name in VALID_TOKENS_ONLY:
        valid = golden(case)["out_prefix_pad_masks"]
        if name == "out_prefix_hidden":
            found, expected = found[valid], expected[valid]
        else:  # (layer, batch, kv_head, token, head_dim); the first layer at padded tokens too
            assert_close(found[0], expected[0], f"{name} of layer 0")
            found, expected = (a.transpose(1, 3, 0, 2, 4)[valid] for a in (found, expected))
    if name.startswith("out_grad_"):
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= GRADIENT_TOLERANCE * np.abs(expected).max()
        return
    if name.startswith("out_sample_times"):
        np.testing.assert_array_equal(found, expected)  # the clock's drift is part of the result
        return
    assert_close(found, expected, name)


@pytest.mark.parametrize("file", FILES, ids=("openpi", "lerobot"))
@pytest.mark.parametrize("case", CASES)
def test_gradient_norms_equal_openpi(case: str, file: str) -> None:
    computed(case, file)
    parameters = dict(loaded(case, file).named_parameters())
    expected = sizes(case)["grad_norms"]
    assert set(parameters) == set(expected)
    for name, norm in expected.items():
        if "vision_tower" in name and name.endswith("k_proj.bias"):
            continue
        gradient = parameters[name].grad
        found = 0.0 if gradient is None else float(gradient.double().norm())
        assert found == pytest.approx(norm or 0.0, rel=1e-3, abs=1e-9), name


@pytest.mark.parametrize("case", CASES)
def test_masks_that_the_model_uses_are_openpis_joint_mask(case: str) -> None:
    """The cached path never builds the joint mask; its two parts must still be that mask."""
    out = computed(case, FILES[0])
    expected, pads = golden(case)["out_joint_att_2d_masks"], out["prefix_pad_masks"]
    length = pads.shape[1]
    suffix_mask = make_att_2d_masks(out["suffix_pad_masks"], out["suffix_att_masks"])
    rows = suffix_over_prefix_mask(pads, out["suffix_pad_masks"], suffix_mask)
    np.testing.assert_array_equal(rows, expected[:, length:])
    np.testing.assert_array_equal(out["suffix_rows"], expected[:, length:])
    prefix = prefix_att_2d_mask(pads, 8, restrict_image_to_language=False)
    np.testing.assert_array_equal(prefix, expected[:, :length, :length])
    assert not expected[:, :length, length:].any()


@pytest.mark.parametrize("case", CASES)
def test_forward_returns_the_mean_of_openpis_loss(case: str) -> None:
    g = {name: torch.from_numpy(value) for name, value in golden(case).items()}
    with torch.no_grad():
        losses = loaded(case, FILES[0])(inputs_of(case), g["in_actions"], noise=g["in_noise"], time=g["in_time"])
    assert float(losses.action) == pytest.approx(float(g["out_train_loss"].mean()), rel=1e-5)
    assert float(losses.total) == float(losses.action)


@pytest.mark.parametrize("file", FILES, ids=("openpi", "lerobot"))
@pytest.mark.parametrize("case", CASES)
def test_sizes_follow_from_the_tensors(case: str, file: str, tmp_path: Path) -> None:
    """What no tensor's shape tells (vision heads, horizon, prompt length) is given; all else is inferred."""
    stated = config_of(case)
    anywhere = tmp_path / "some_policy.safetensors"  # the name says nothing
    anywhere.write_bytes((GOLDEN / case / file).read_bytes())
    given = {"vision": stated.vision, "action_horizon": stated.action_horizon, "max_token_len": stated.max_token_len}
    with open_tensors(anywhere) as tensors:
        assert infer_model_config(tensors, **given) == stated
    model = load_model(anywhere, **given)
    g = golden(case)
    with torch.no_grad():
        found = model.sample_actions(inputs_of(case), torch.from_numpy(g["in_noise"]), num_steps=10)
    assert_close(found.numpy(), g["out_sample_actions_10"], "actions")


@pytest.mark.parametrize("case", CASES)
def test_fresh_alignment_parts_change_no_action_but_through_the_e_token(case: str) -> None:
    """With an alignment expert started fresh and no E-Token the public checkpoint acts as before, bit for bit."""
    config = config_of(case).replace(alignment_expert=config_of(case).action_expert)
    model = load_model(GOLDEN / case / FILES[0], config, initialise=("alignment",))
    noise = torch.from_numpy(golden(case)["in_noise"])
    found = model.sample_actions(inputs_of(case), noise)
    assert torch.equal(found, loaded(case, FILES[0]).sample_actions(inputs_of(case), noise))
