"""Checkpoint and E-Token files: every layout loads, what does not fit is listed at once, no write leaves a wreck."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_models import random_actions, random_inputs, small_config, small_model
from torch import Tensor

from selfalign_core.errors import CheckpointError
from selfalign_core.model.config import GemmaSize, ModelConfig, VisionSize
from selfalign_core.model.pi0 import Pi0
from selfalign_core.policy import token_files
from selfalign_core.policy.checkpoint import (
    load_model,
    model_digest,
    model_state,
    read_bank,
    save_model,
)
from selfalign_core.policy.tensors import infer_model_config, open_tensors
from selfalign_core.policy.token_files import load_e_token, save_e_token
from selfalign_core.robot.types import EToken

PALI = "paligemma_with_expert.paligemma."
EMBED, HEAD = PALI + "model.language_model.embed_tokens.weight", PALI + "lm_head.weight"


@pytest.fixture(params=[False, True], ids=["pi0", "pi05"])
def pi05(request) -> bool:
    return request.param


def public_model(pi05: bool) -> Pi0:
    """As published: no E-Token, no alignment expert."""
    return small_model(pi05, use_peft_prefix_token=False, alignment_expert=None)


def actions_of(model: Pi0) -> Tensor:
    return model.sample_actions(random_inputs(model.config), random_actions(model.config)[1])


def clones(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("changes", [{}, {"peft_num_tokens": 3}, {"use_peft_prefix_token": False}])
def test_save_and_load_give_the_same_model(tmp_path: Path, pi05: bool, changes: dict) -> None:
    model = small_model(pi05, **changes)
    save_model(model, tmp_path / "model.safetensors")
    again = load_model(tmp_path / "model.safetensors", model.config)
    assert model_digest(again) == model_digest(model)
    assert torch.equal(actions_of(again), actions_of(model))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]


def test_the_file_has_openpis_names_and_the_embedding_once(tmp_path: Path, pi05: bool) -> None:
    model = public_model(pi05)
    save_model(model, tmp_path / "model.safetensors")
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert EMBED not in names
    assert HEAD in names
    assert names == set(model.state_dict()) - {EMBED}


def test_the_embedding_may_come_under_either_name_or_both(tmp_path: Path, pi05: bool) -> None:
    model = public_model(pi05)
    state, expected = model_state(model), actions_of(model)
    wrong = torch.zeros_like(state[HEAD])
    for number, extra in enumerate(({HEAD: state[HEAD]}, {EMBED: state[HEAD]}, {HEAD: state[HEAD], EMBED: wrong})):
        file = tmp_path / f"{number}.safetensors"
        save_file({**{n: t for n, t in state.items() if n != HEAD}, **clones(extra)}, file)
        loaded = load_model(file, model.config)
        assert torch.equal(actions_of(loaded), expected)
        language = loaded.paligemma_with_expert.paligemma
        assert language.lm_head.weight is language.model.language_model.embed_tokens.weight


def test_lerobots_prefix_and_the_other_familys_time_names(tmp_path: Path, pi05: bool) -> None:
    model = public_model(pi05)
    right, wrong = ("time_mlp_", "action_time_mlp_") if pi05 else ("action_time_mlp_", "time_mlp_")
    state = {
        "model." + (wrong + name.removeprefix(right) if name.startswith(right) else name): tensor
        for name, tensor in model_state(model).items()
    }
    if pi05:  # some files carry π0's state projection along
        state["model.state_proj.weight"], state["model.state_proj.bias"] = torch.zeros(16, 5), torch.zeros(16)
    save_file(state, tmp_path / "model.safetensors")
    assert torch.equal(actions_of(load_model(tmp_path, model.config)), actions_of(model))


@pytest.mark.parametrize("name", ["pi0_base", "pi05_base", "something"])
def test_the_family_is_read_from_the_tensors_not_the_name(tmp_path: Path, pi05: bool, name: str) -> None:
    model = small_model(pi05, vision=VisionSize(72, 1, 24, 1, 28, 14))
    folder = tmp_path / name
    save_model(model, folder / "model.safetensors")
    with open_tensors(folder) as tensors:
        found = infer_model_config(tensors)
    assert found.pi05 is pi05
    stated = model.config
    for field in ("vision", "text", "action_expert", "alignment_expert", "vocab_size", "action_dim",
                  "use_peft_prefix_token", "peft_num_tokens"):  # fmt: skip
        assert getattr(found, field) == getattr(stated, field), field
    loaded = load_model(folder, action_horizon=4, max_token_len=6)
    assert torch.equal(actions_of(loaded), actions_of(model))


def test_shards_are_read_as_one(tmp_path: Path, pi05: bool) -> None:
    model = small_model(pi05)
    state = model_state(model)
    names = sorted(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(actions_of(load_model(tmp_path, model.config)), actions_of(model))
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors: found"):
        load_model(tmp_path, model.config)
    for text in ("not JSON", "[]", '{"weights": 1}'):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=r"index\.json: (weight_map: )?found"):
            load_model(tmp_path, model.config)


def test_a_file_all_in_bfloat16_runs_with_openpis_float32_parts(tmp_path: Path, pi05: bool) -> None:
    """openpi's converter writes every tensor in bfloat16; norms and projections run in float32 all the same."""
    model = small_model(pi05)
    save_file({name: tensor.bfloat16() for name, tensor in model_state(model).items()}, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path, model.config)
    found, expected = actions_of(loaded), actions_of(model)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.2 * expected.abs().max()
    kept = ("input_layernorm", "post_attention_layernorm", "model.norm", "patch_embedding", "position_embedding",
            "action_", "peft_", "alignment_in_proj")  # fmt: skip
    for name, tensor in loaded.state_dict().items():
        if any(part in name for part in kept):
            assert tensor.dtype == torch.float32, name
    layer = loaded.paligemma_with_expert.language_model.layers[0]
    assert layer.mlp.up_proj.weight.dtype == torch.bfloat16
    for precision in ("bfloat16", "float32"):
        assert torch.isfinite(actions_of(loaded.to_precision(precision))).all()


@pytest.mark.parametrize("length", range(0, 64, 12))
def test_where_the_header_leaves_the_numbers_does_not_matter(tmp_path: Path, pi05: bool, length: int) -> None:
    """Arithmetic rounds differently on differently aligned memory; the actions must not depend on it."""
    model = small_model(pi05)
    save_file(model_state(model), tmp_path / "model.safetensors", {"note": "x" * length})
    loaded = load_model(tmp_path, model.config)
    assert all(parameter.data_ptr() % 64 == 0 for parameter in loaded.parameters() if parameter.numel() > 1)
    assert torch.equal(actions_of(loaded), actions_of(model))


def test_a_loaded_model_does_not_need_its_file_any_more(tmp_path: Path) -> None:
    model, file = small_model(), tmp_path / "model.safetensors"
    save_model(model, file)
    loaded = load_model(file, model.config)
    with open(file, "rb+") as stream:  # written over in place, and cut off
        stream.write(b"\xff" * 50_000)
        stream.truncate(60_000)
    assert torch.equal(actions_of(loaded), actions_of(model))


# ---------------------------------------------------------------- what does not fit


def test_everything_that_does_not_fit_is_listed_at_once(tmp_path: Path, pi05: bool) -> None:
    model = small_model(pi05)
    state = model_state(model)
    state["action_in_proj.weight"] = torch.zeros(16, 9)
    state["alignment_out_proj.inverse.bias"] = torch.zeros(2)
    del state["action_out_proj.bias"], state["peft_prefix_token"]
    state["memory.weight"] = torch.zeros(3, 4)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path, model.config)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: 5 tensor(s) do not fit the model")
    for line in (
        "misshapen action_in_proj.weight: found (16, 9), expected (16, 5)",
        "misshapen alignment_out_proj.inverse.bias: found (2,), expected (5,)",
        "missing action_out_proj.bias (5,)",
        "missing peft_prefix_token (1, 16)",
        "surplus memory.weight (3, 4)",
    ):
        assert line in message


@pytest.mark.parametrize(
    "gone",
    [
        "action_in_proj.weight", HEAD, PALI + "model.language_model.layers.0.mlp.up_proj.weight",
        "paligemma_with_expert.gemma_expert.model.layers.0.self_attn.k_proj.weight",
    ],
)  # fmt: skip
def test_tensors_that_give_the_sizes_are_listed_with_the_rest(tmp_path: Path, pi05: bool, gone: str) -> None:
    state = model_state(public_model(pi05))
    del state[gone], state["action_out_proj.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path, action_horizon=4)
    message = str(caught.value)
    assert f"missing {gone}" in message
    assert "missing action_out_proj.weight" in message


def test_a_shape_that_no_stack_can_have_names_the_file(tmp_path: Path, pi05: bool) -> None:
    state = model_state(public_model(pi05))
    for name in [n for n in state if n.endswith("self_attn.k_proj.weight") and "language_model" in n]:
        state[name] = torch.zeros(7, 24)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"language_model\.layers imply GemmaSize\.head_dim: found 7"):
        load_model(tmp_path, action_horizon=4)


def test_the_wrong_family_does_not_load(tmp_path: Path, pi05: bool) -> None:
    save_model(public_model(pi05), tmp_path / "model.safetensors")
    config = public_model(not pi05).config
    with pytest.raises(CheckpointError, match=r"dense\.weight"):
        load_model(tmp_path, config)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", (1 << 40).to_bytes(8, "little") + b"{}"])
def test_what_is_no_safetensors_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: found .*expected a safetensors file"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="found neither"):
        load_model(tmp_path / "nothing")


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    model = small_model()
    save_model(model, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: found"):
        load_model(file, model.config)


def test_integer_weights_are_refused_by_name(tmp_path: Path) -> None:
    model = small_model()
    state = model_state(model)
    state["action_in_proj.bias"] = state["action_in_proj.bias"].to(torch.int32)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"action_in_proj\.bias torch\.int32"):
        load_model(tmp_path, model.config)


# ---------------------------------------------------------------- parts that start fresh


def test_fresh_parts_start_only_when_asked(tmp_path: Path, pi05: bool) -> None:
    public = public_model(pi05)
    save_model(public, tmp_path / "model.safetensors")
    wanted = small_config(pi05, peft_init="zeros")
    for initialise in ((), ("e_token",), ("alignment",)):
        with pytest.raises(CheckpointError, match="missing"):
            load_model(tmp_path, wanted, initialise=initialise)
    with pytest.raises(CheckpointError, match=r"initialise: found \['token'\], expected some of"):
        load_model(tmp_path, wanted, initialise=("token",))
    model = load_model(tmp_path, wanted, initialise=("e_token", "alignment"), seed=3)
    assert not model.peft_prefix_token.any()  # as configured
    for name, tensor in public.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())
    first = dict(model.named_parameters())
    assert first["alignment_in_proj.perception.weight"].std() > 0
    again = load_model(tmp_path, wanted, initialise=("e_token", "alignment"), seed=3)
    other = load_model(tmp_path, wanted, initialise=("e_token", "alignment"), seed=4)
    assert model_digest(again) == model_digest(model) != model_digest(other)
    # Trainable at once.
    inputs, (actions, noise, time) = random_inputs(wanted), random_actions(wanted)
    model.action_loss(model.prefix(inputs), inputs.state, actions, noise, time).mean().backward()
    assert model.peft_prefix_token.grad.abs().sum() > 0


def test_parts_that_the_model_has_not_are_left_out_only_when_asked(tmp_path: Path, pi05: bool) -> None:
    whole = small_model(pi05)
    save_model(whole, tmp_path / "model.safetensors", bank=whole.peft_prefix_token.detach()[None].clone())
    wanted = small_config(pi05, alignment_expert=None, use_peft_prefix_token=False)
    for leave_out in ((), ("e_token",), ("alignment",)):
        with pytest.raises(CheckpointError, match="surplus"):
            load_model(tmp_path, wanted, leave_out=leave_out)
    model = load_model(tmp_path, wanted, leave_out=("e_token", "alignment"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name
    same = load_model(tmp_path, whole.config, leave_out=("e_token", "alignment"))  # nothing that the model has
    assert model_digest(same) == model_digest(whole)


def test_fresh_parts_are_those_the_file_lacks(tmp_path: Path, pi05: bool) -> None:
    with_token = small_model(pi05, alignment_expert=None)
    save_model(with_token, tmp_path / "model.safetensors")
    model = load_model(tmp_path, small_config(pi05), initialise=("e_token", "alignment"))
    assert torch.equal(model.peft_prefix_token, with_token.peft_prefix_token)
    assert torch.equal(model.peft_type_action, with_token.peft_type_action)
    assert torch.isfinite(model.peft_type_alignment).all()


def test_loading_draws_no_random_number_from_the_caller(tmp_path: Path) -> None:
    save_model(public_model(False), tmp_path / "model.safetensors")
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_model(tmp_path, small_config(), initialise=("e_token", "alignment"))
    assert torch.equal(torch.rand(3), expected)


# ---------------------------------------------------------------- identity


def test_the_digest_knows_every_weight_but_the_token() -> None:
    model = small_model()
    digest = model_digest(model)
    with torch.no_grad():
        model.peft_prefix_token += 1
    assert model_digest(model) == digest
    for name, tensor in model.state_dict().items():
        if name == "peft_prefix_token" or not tensor.is_floating_point():
            continue
        with torch.no_grad():
            old = tensor.flatten()[0].clone()
            tensor.flatten()[0] += 1e-3
            assert model_digest(model) != digest, name
            tensor.flatten()[0] = old
    assert model_digest(model) == digest


def test_the_bank_travels_beside_the_weights(tmp_path: Path) -> None:
    model, bank = small_model(), torch.randn(5, 1, 16)
    save_model(model, tmp_path / "model.safetensors", bank=bank)
    assert torch.equal(read_bank(tmp_path), bank)
    assert model_digest(load_model(tmp_path, model.config)) == model_digest(model)
    save_model(model, tmp_path / "plain.safetensors")
    assert read_bank(tmp_path / "plain.safetensors") is None


# ---------------------------------------------------------------- E-Token files

DIGEST = "ab" * 32
TOKEN = EToken(np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32), 7, "left arm", DIGEST)


def test_a_token_file_gives_the_token_back(tmp_path: Path) -> None:
    file = tmp_path / "token.safetensors"
    save_e_token(file, TOKEN, losses={"total": 0.5})
    with safe_open(file, framework="pt") as opened:
        assert json.loads(opened.metadata()["losses"]) == {"total": 0.5}
    again = load_e_token(file, model_digest=DIGEST, shape=(2, 16))
    assert again.data.tobytes() == TOKEN.data.tobytes()
    assert again.data.dtype == np.float32
    assert (again.version, again.embodiment, again.model_digest) == (7, "left arm", DIGEST)


def rewritten(file: Path, *, data: Tensor | None = None, names: str = "peft_prefix_token", **metadata: str) -> None:
    original = {"format": "selfalign-e-token-1", "model_digest": DIGEST, "embodiment": "", "version": "1"}
    merged = {key: value for key, value in {**original, **metadata}.items() if value != "<absent>"}
    save_file({names: torch.from_numpy(TOKEN.data) if data is None else data}, file, merged)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_digest": "cd" * 32}, "found a token of model 'cdcdcdcdcdcd', expected model 'abababababab'"),
        ({"model_digest": "<absent>"}, "found a token of model ''"),
        ({"format": "<absent>"}, "expected an E-Token file"),
        ({"format": "selfalign-policy-1"}, "expected an E-Token file"),
        ({"version": "seven"}, "found version 'seven', expected an integer >= 0"),
        ({"version": "-1"}, "found version '-1', expected an integer >= 0"),
        ({"version": "<absent>"}, "found version ''"),
        ({"names": "weights"}, r"found tensors \['weights'\], expected an E-Token file"),
        ({"data": torch.zeros(1, 16)}, r"found a token of shape \(1, 16\), expected \(2, 16\)"),
        ({"data": torch.full((2, 16), float("nan"))}, "found NaN or infinity"),
    ],
)
def test_a_token_file_with_wrong_content_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    file = tmp_path / "token.safetensors"
    rewritten(file, **changes)
    with pytest.raises(CheckpointError, match=rf"token\.safetensors: {message}|token\.safetensors: .*{message}"):
        load_e_token(file, model_digest=DIGEST, shape=(2, 16))


def test_a_damaged_or_absent_token_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "token.safetensors"
    save_e_token(file, TOKEN)
    whole = file.read_bytes()
    for length in (0, 4, 20, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"token\.safetensors: found"):
            load_e_token(file, model_digest=DIGEST, shape=(2, 16))
    file.write_bytes(b"\x80\x04\x95" + whole)  # the beginning of a pickle
    with pytest.raises(CheckpointError, match="expected an E-Token file"):
        load_e_token(file, model_digest=DIGEST, shape=(2, 16))
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors: found"):
        load_e_token(tmp_path / "nothing.safetensors", model_digest=DIGEST, shape=(2, 16))
    save_model(small_model(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="expected an E-Token file"):
        load_e_token(tmp_path / "model.safetensors", model_digest=DIGEST, shape=(2, 16))


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("failure", ["while writing", "while syncing", "while renaming"])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    file = tmp_path / "token.safetensors"
    save_e_token(file, TOKEN)
    before = file.read_bytes()

    def full_disk(*_args, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def half_then_full(_tensors, path, *_args):
        Path(path).write_bytes(b"half")
        full_disk()

    if failure == "while writing":
        monkeypatch.setattr(token_files, "save_file", half_then_full)
    else:
        monkeypatch.setattr(os, {"while syncing": "fsync", "while renaming": "replace"}[failure], full_disk)
    newer = dataclasses.replace(TOKEN, version=8)
    with pytest.raises(OSError, match="No space left"):
        save_e_token(file, newer)
    monkeypatch.undo()
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["token.safetensors"]
    save_e_token(file, newer)
    assert load_e_token(file, model_digest=DIGEST, shape=(2, 16)).version == 8


# ---------------------------------------------------------------- memory

MEASURE = """
import torch
from selfalign_core.policy.checkpoint import load_model
from selfalign_core.model.config import ModelConfig

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

def load(name):
    config = ModelConfig.from_dict(json.loads((folder / f"{name}.json").read_text()))
    model = load_model(folder / f"{name}.safetensors", config, initialise=("e_token", "alignment"))
    sum(float(p.detach().sum()) for p in model.parameters())  # touches every page

import json, sys
from pathlib import Path
torch.set_num_threads(1)
folder = Path(sys.argv[1])
load("small")
before = peak()
load("big")
print(peak() - before)
"""


def write_zeros(file: Path, config: ModelConfig) -> None:
    """A valid checkpoint of ``config`` without our parts, all zero: a header and a hole, so it costs no time."""
    public = config.replace(use_peft_prefix_token=False, alignment_expert=None)
    with torch.device("meta"):
        shapes = {name: list(t.shape) for name, t in Pi0(public).state_dict().items() if name != EMBED}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + end)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_loading_peaks_at_little_more_than_the_file(tmp_path: Path) -> None:
    """400 MB, loaded in a process of its own, with E-Token and alignment expert started fresh."""
    small = small_config()
    text = GemmaSize(width=1024, depth=4, mlp_dim=6144, num_heads=2, num_kv_heads=1, head_dim=8)
    for name, config in (("small", small), ("big", small.replace(text=text, vocab_size=23000))):
        write_zeros(tmp_path / f"{name}.safetensors", config)
        (tmp_path / f"{name}.json").write_text(json.dumps(config.to_dict()))
    size = (tmp_path / "big.safetensors").stat().st_size
    assert size > 390e6
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        capture_output=True, text=True, check=False, cwd=Path(token_files.__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) <= 1.3 * size
