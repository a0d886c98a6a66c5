"""The tensors of a checkpoint into a model and out of one; the model's identity.

A file that does not fit the model is an error that lists every tensor; nothing is loaded then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from selfalign_core.errors import CheckpointError
from selfalign_core.files import write_atomically
from selfalign_core.model.config import ModelConfig
from selfalign_core.model.pi0 import Pi0
from selfalign_core.model.torch_state import seeded
from selfalign_core.policy.tensors import (
    E_TOKEN_BANK,
    EMBEDDING,
    LM_HEAD,
    StoredTensor,
    Tensors,
    infer_model_config,
    open_tensors,
)
from selfalign_core.policy.token_files import E_TOKEN_PARAMETER

OWN_E_TOKEN = ("peft_",)
OWN_ALIGNMENT = ("alignment_", "next_obs_", "paligemma_with_expert.alignment_expert.")
_PARTS = {"e_token": OWN_E_TOKEN, "alignment": (*OWN_ALIGNMENT, "peft_type_alignment", "peft_alignment_proj")}
"""Parts that public checkpoints lack, as beginnings of tensor names."""

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_tensor(stored: StoredTensor, device: str = "cpu") -> Tensor:
    """A tensor of an open file.

    Read into memory of its own, not mapped: a mapped tensor lies where the file's header leaves it, and arithmetic on
    another alignment rounds differently, so a saved model would not act bit for bit as it did; and a file
    overwritten under a running robot would change or crash it.
    """
    file = stored.file
    if stored.dtype not in _DTYPES:
        raise CheckpointError(f"{file.name}: found {stored.name} of type {stored.dtype}, expected {list(_DTYPES)}")
    tensor = torch.empty(stored.shape, dtype=_DTYPES[stored.dtype])
    if tensor.numel():
        file.seek(stored.begin)
        content = tensor.flatten().view(torch.uint8).numpy().data
        if file.readinto(content) != len(content):
            raise CheckpointError(f"{file.name}: found its end inside {stored.name}")
    return tensor.to(device)


def load_model(
    path: str | Path,
    config: ModelConfig | None = None,
    *,
    device: str = "cpu",
    initialise: tuple[str, ...] = (),
    leave_out: tuple[str, ...] = (),
    seed: int = 0,
    **overrides: Any,
) -> Pi0:
    """Load weights into a new model; tensors go straight from the file to ``device``, one copy in all.

    Args:
        config: sizes; inferred from the tensors if None (with ``overrides``).
        initialise: parts that the file may lack and that start fresh, of ``"e_token"`` and ``"alignment"``.
        leave_out: such parts that the file may have and the model has not.
        seed: for the parts that start fresh.

    Raises:
        CheckpointError: lists every missing, surplus and misshapen tensor.
    """
    with open_tensors(path) as tensors:
        if config is None:
            config = infer_model_config(tensors, **overrides)
        with torch.device("meta"), _Uninitialised():
            model = Pi0(config)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        fresh = {name for name in _names_of("initialise", initialise, expected) if name not in tensors.stored}
        left = {name for name in _names_of("leave_out", leave_out, tensors.stored) if name not in expected}
        _check_names(tensors, expected, fresh, left)
        wanted = [name for name in expected if name not in fresh and name != LM_HEAD]
        state = {name: read_tensor(tensors.stored[name], device) for name in wanted}
        wrong = [f"{name} {tensor.dtype}" for name, tensor in state.items() if not tensor.is_floating_point()]
        if wrong:
            raise CheckpointError(f"{tensors.path}: found {wrong}, expected floating-point tensors")
        model.load_state_dict(state, strict=False, assign=True)
    language = model.paligemma_with_expert.paligemma
    language.lm_head.weight = language.model.language_model.embed_tokens.weight
    _materialise(model, fresh, device, seed)
    return model.keep_float32_parts().eval()


class _Uninitialised(TorchFunctionMode):
    """While open, random numbers are not drawn for tensors without storage, which would import torch's compiler."""

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (nn.init.normal_, nn.init.trunc_normal_, Tensor.normal_):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return torch.empty(*args, **kwargs) if func is torch.randn else func(*args, **kwargs)


def _names_of(option: str, parts: Collection[str], names: Collection[str]) -> set[str]:
    """Those of ``names`` that belong to the ``parts``."""
    unknown = set(parts) - set(_PARTS)
    if unknown:
        raise CheckpointError(f"{option}: found {sorted(unknown)}, expected some of {sorted(_PARTS)}")
    prefixes = tuple(prefix for part in parts for prefix in _PARTS[part])
    return {name for name in names if prefixes and name.startswith(prefixes)}


def _check_names(tensors: Tensors, expected: dict[str, tuple[int, ...]], fresh: set[str], left: set[str]) -> None:
    found = tensors.shapes
    problems = [f"missing {name} {expected[name]}" for name in expected if name not in found and name not in fresh]
    known = {*expected, *left, E_TOKEN_BANK}
    problems += [f"surplus {name} {found[name]}" for name in found if name not in known]
    problems += [
        f"misshapen {name}: found {found[name]}, expected {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    if problems:
        raise CheckpointError(
            f"{tensors.path}: {len(problems)} tensor(s) do not fit the model:\n  " + "\n  ".join(sorted(problems))
        )


def _materialise(model: Pi0, fresh: set[str], device: str, seed: int) -> None:
    """Give storage to what was built on the meta device and is not in the file: fresh parts."""
    with seeded(seed):
        for prefix, module in model.named_modules():
            own = [f"{prefix}.{n}" if prefix else n for n, _ in module.named_parameters(recurse=False)]
            if not prefix or not any(name in fresh for name in own):
                continue
            module.to_empty(device=device, recurse=False)
            module.reset_parameters()
        if any(name.startswith(OWN_E_TOKEN) for name in fresh):
            model.reset_e_token(device=device, only=fresh)
    if "next_obs_mean" in fresh:
        model.next_obs_mean = torch.zeros(model.next_obs_mean.shape, device=device)
        model.next_obs_std = torch.ones(model.next_obs_std.shape, device=device)
    left = [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if left:
        raise CheckpointError(f"checkpoint: {len(left)} tensor(s) were left without a value: {left[:5]}")


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors as they are saved: the token embedding once, under openpi's name for it."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    state.pop(EMBEDDING, None)
    return state


def save_model(model: Pi0, path: str | Path, *, bank: Tensor | None = None) -> None:
    """Write ``model.safetensors`` under openpi's names (plus ours), atomically, with the ``bank`` of E-Tokens."""
    state = model_state(model)
    if bank is not None:
        state[E_TOKEN_BANK] = bank.detach().cpu().contiguous()
    write_atomically(Path(path), lambda temporary: save_file(state, temporary))


def read_bank(path: str | Path) -> Tensor | None:
    """The bank of E-Tokens (capacity, peft_num_tokens, width) in a checkpoint, None if it has none."""
    with open_tensors(path) as tensors:
        return read_tensor(tensors.stored[E_TOKEN_BANK]) if E_TOKEN_BANK in tensors.stored else None


def model_digest(model: Pi0) -> str:
    """Hex SHA-256 over every weight but the E-Token itself: the identity of the model that a token belongs to."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name in (E_TOKEN_PARAMETER, LM_HEAD):
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()
