"""Checkpoints and E-Token files, all safetensors: openpi's layout, LeRobot's layout, and SelfAlign's own.

Names are openpi's plus ours. A file that does not fit the model is an error that lists every tensor; nothing is
loaded then. Nothing here unpickles a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from selfalign_core.errors import CheckpointError, ConfigError
from selfalign_core.model.config import GemmaSize, ModelConfig, VisionSize, build_dataclass
from selfalign_core.model.pi0 import Pi0
from selfalign_core.model.torch_state import seeded
from selfalign_core.robot.types import EToken

E_TOKEN_PARAMETER = "peft_prefix_token"
E_TOKEN_BANK = "peft_bank"
"""(capacity, peft_num_tokens, width): tokens of the bodies trained on, beside the model's own tensors.

Rows without a key (``PolicyConfig.bank_keys``) are free. Mean, spread and principal directions of the others are not
stored: they follow from the rows alone (``training.bank``) and are computed from them where they are read
(``alignment.trusted``). The mean is also the ``peft_prefix_token`` of a policy written for no body in particular.
"""
OWN_E_TOKEN = ("peft_",)
OWN_ALIGNMENT = ("alignment_", "next_obs_", "paligemma_with_expert.alignment_expert.")
_PARTS = {"e_token": OWN_E_TOKEN, "alignment": (*OWN_ALIGNMENT, "peft_type_alignment", "peft_alignment_proj")}
"""Parts that public checkpoints lack, as beginnings of tensor names."""
_PALI = "paligemma_with_expert.paligemma."
_EMBED = _PALI + "model.language_model.embed_tokens.weight"
_LM_HEAD = _PALI + "lm_head.weight"
_EXPERT_LM_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"
_EXPERT = "paligemma_with_expert.gemma_expert.model."
_VISION = _PALI + "model.vision_tower.vision_model."


# ------------------------------------------------------------------------------------------------ tensors of a file


@dataclass(frozen=True)
class TensorFile:
    """Tensors by openpi's names, read on demand."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


@contextmanager
def open_tensors(path: str | Path, *, device: str = "cpu") -> Iterator[TensorFile]:
    """Open a ``.safetensors`` file, or a directory with one (or a sharded index), under openpi's names.

    Accepts LeRobot's ``model.`` prefix, a token embedding stored once or twice, and the time MLP under the name of
    the other model family.
    """
    path = Path(path)
    with ExitStack() as stack:
        where: dict[str, _StoredTensor] = {}
        for file in _files_of(path):
            _check_header(file)
            where.update(_stored_tensors(stack.enter_context(open(file, "rb"))))
        where = _openpi_names(where)
        yield TensorFile(
            path,
            {name: stored.shape for name, stored in where.items()},
            lambda name: where[name].read().to(device),
        )


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class _StoredTensor:
    """One tensor of an open file.

    Read into memory of its own, not mapped: a mapped tensor lies where the file's header leaves it, and arithmetic on
    another alignment rounds differently, so a saved model would not act bit for bit as it did; and a file
    overwritten under a running robot would change or crash it.
    """

    name: str
    file: BinaryIO
    begin: int
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        if self.dtype not in _DTYPES:
            raise CheckpointError(f"{self.file.name}: found {self.name} of type {self.dtype}, expected {list(_DTYPES)}")
        tensor = torch.empty(self.shape, dtype=_DTYPES[self.dtype])
        if tensor.numel():
            self.file.seek(self.begin)
            bytes_ = memoryview(tensor.flatten().view(torch.uint8).numpy())
            if self.file.readinto(bytes_) != len(bytes_):
                raise CheckpointError(f"{self.file.name}: found its end inside {self.name}")
        return tensor


def _check_header(file: Path) -> None:
    """Raise unless ``file`` is a safetensors file as long as its header says."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: found {error}, expected a safetensors file") from error


def _stored_tensors(stream: BinaryIO) -> dict[str, _StoredTensor]:
    length = int.from_bytes(stream.read(8), "little")
    header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return {
        name: _StoredTensor(name, stream, 8 + length + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
        for name, entry in header.items()
    }


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            return [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: found {error!r}, expected a JSON object with weight_map") from error
    file = path / "model.safetensors"
    if not file.is_file():
        raise CheckpointError(f"{path}: found neither model.safetensors nor its index, expected a checkpoint directory")
    return [file]


def _openpi_names(where: dict[str, Any]) -> dict[str, Any]:
    if where and all(name.startswith("model.") for name in where):
        where = {name.removeprefix("model."): value for name, value in where.items()}
    if _LM_HEAD in where:  # the head is the embedding; where a file has both, the head counts (LeRobot's rule)
        where[_EMBED] = where[_LM_HEAD]
    elif _EMBED in where:
        where[_LM_HEAD] = where[_EMBED]
    pi05 = _is_pi05(where)
    wrong, right = ("action_time_mlp_", "time_mlp_") if pi05 else ("time_mlp_", "action_time_mlp_")
    where = {
        right + name.removeprefix(wrong) if name.startswith(wrong) else name: value for name, value in where.items()
    }
    if pi05:  # π0.5 has no state token; LeRobot's loader drops the projection too
        where = {name: value for name, value in where.items() if not name.startswith("state_proj.")}
    return where


def _is_pi05(names: Any) -> bool:
    """π0.5 is known by the adaptive norms of its action expert."""
    return any(name.startswith(_EXPERT) and name.endswith("norm.dense.weight") for name in names)


# ------------------------------------------------------------------------------------------------ sizes from tensors


def infer_model_config(tensors: TensorFile, **overrides: Any) -> ModelConfig:
    """The configuration that the tensors' shapes imply.

    Head sizes are not in the shapes: one key/value head is assumed for Gemma (true of every public π0 and π0.5) and
    72 channels per vision head (So400m); ``overrides`` replaces whole fields of :class:`ModelConfig`.
    """
    shapes = tensors.shapes

    def shape(*names: str) -> tuple[int, ...]:
        """Of the first name that the file has; of most layers for a name with ``*`` in place of the layer."""
        for name in names:
            pattern = re.compile(re.escape(name).replace(r"\*", r"\d+"))
            found = Counter(size for other, size in shapes.items() if pattern.fullmatch(other))
            if found:
                return found.most_common(1)[0][0]
        raise CheckpointError(f"{tensors.path}: missing tensor {names[0].replace('*', '0')}")

    def depth(prefix: str) -> int:
        found = {int(m.group(1)) for name in shapes if (m := re.match(re.escape(prefix) + r"layers\.(\d+)\.", name))}
        return max(found, default=-1) + 1

    def stack(prefix: str) -> GemmaSize:
        mlp, width = shape(prefix + "layers.*.mlp.up_proj.weight")
        head_dim = shape(prefix + "layers.*.self_attn.k_proj.weight")[0]
        heads = shape(prefix + "layers.*.self_attn.q_proj.weight")[0] // head_dim
        try:
            return GemmaSize(width, depth(prefix), mlp, heads, 1, head_dim)
        except ConfigError as error:
            raise CheckpointError(f"{tensors.path}: the shapes of {prefix}layers imply {error}") from error

    def action_dim() -> int:
        into = shapes.get("action_in_proj.weight")
        return into[1] if into else shape("action_out_proj.weight", "action_out_proj.bias")[0]

    def vision() -> VisionSize:
        width, _, patch, _ = shape(_VISION + "embeddings.patch_embedding.weight")
        positions = shape(_VISION + "embeddings.position_embedding.weight")[0]
        return VisionSize(
            width,
            depth(_VISION + "encoder."),
            shape(_VISION + "encoder.layers.*.mlp.fc1.weight")[0],
            max(width // 72, 1),
            round(positions**0.5) * patch,
            patch,
        )

    values: dict[str, Any] = dict(overrides)
    values.setdefault("pi05", _is_pi05(shapes))
    for name, read in (
        ("vision", vision),
        ("text", lambda: stack(_PALI + "model.language_model.")),
        ("action_expert", lambda: stack(_EXPERT)),
        ("vocab_size", lambda: shape(_LM_HEAD, _EXPERT_LM_HEAD)[0]),
        ("action_dim", action_dim),
    ):
        if name not in values:
            values[name] = read()
    alignment = "paligemma_with_expert.alignment_expert.model."
    if "alignment_expert" not in values and depth(alignment):
        values["alignment_expert"] = stack(alignment)
    values.setdefault("use_peft_prefix_token", E_TOKEN_PARAMETER in shapes)
    if E_TOKEN_PARAMETER in shapes:
        values.setdefault("peft_num_tokens", shapes[E_TOKEN_PARAMETER][0])
    return build_dataclass(ModelConfig, values, "model options")


# ------------------------------------------------------------------------------------------------ loading and saving


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
    with open_tensors(path, device=device) as tensors:
        if config is None:
            config = infer_model_config(tensors, **overrides)
        with torch.device("meta"), _Uninitialised():
            model = Pi0(config)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        fresh = {name for name in _names_of("initialise", initialise, expected) if name not in tensors.shapes}
        left = {name for name in _names_of("leave_out", leave_out, tensors.shapes) if name not in expected}
        _check_names(tensors, expected, fresh, left)
        state = {name: tensors.read(name) for name in expected if name not in fresh and name != _LM_HEAD}
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


def _check_names(tensors: TensorFile, expected: dict[str, tuple[int, ...]], fresh: set[str], left: set[str]) -> None:
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
    state.pop(_EMBED, None)
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
        return tensors.read(E_TOKEN_BANK) if E_TOKEN_BANK in tensors.shapes else None


def write_atomically(path: Path, write: Callable[[str], object]) -> None:
    """Write to a temporary file beside ``path``, sync it, rename it: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def model_digest(model: Pi0) -> str:
    """Hex SHA-256 over every weight but the E-Token itself: the identity of the model that a token belongs to."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name in (E_TOKEN_PARAMETER, _LM_HEAD):
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ E-Token files


def save_e_token(
    path: str | Path, token: EToken, *, losses: dict[str, float] | None = None, extra: dict[str, str] | None = None
) -> None:
    """Write a token as safetensors with its metadata, atomically; ``extra`` metadata is the caller's own.

    Raises:
        OSError: it cannot be written (a full disk, no permission); what was there before is left.
    """
    metadata = {
        "format": "selfalign-e-token-1",
        "model_digest": token.model_digest,
        "embodiment": token.embodiment,
        "version": str(token.version),
        "losses": json.dumps(losses or {}),
        **(extra or {}),
    }
    data = torch.from_numpy(np.array(token.data, np.float32))

    def write(temporary: str) -> None:
        try:
            save_file({E_TOKEN_PARAMETER: data}, temporary, metadata)
        except SafetensorError as error:  # how safetensors reports whatever the system does
            raise OSError(f"{path}: {error}") from error

    write_atomically(Path(path), write)


def load_e_token(path: str | Path, *, model_digest: str, shape: tuple[int, int]) -> EToken:
    """Read a token and check that it belongs to this model.

    Raises:
        CheckpointError: the file is not a token, is damaged, or is of another model, shape or holds NaN.
    """
    data, metadata = _read_e_token(Path(path))
    owner = metadata.get("model_digest", "")
    if owner != model_digest:
        raise CheckpointError(f"{path}: found a token of model {owner[:12]!r}, expected model {model_digest[:12]!r}")
    if data.shape != tuple(shape):
        raise CheckpointError(f"{path}: found a token of shape {data.shape}, expected {tuple(shape)}")
    if not np.isfinite(data).all():
        raise CheckpointError(f"{path}: found NaN or infinity in the token")
    version = metadata.get("version", "")
    if not (version.isascii() and version.isdigit()):
        raise CheckpointError(f"{path}: found version {version!r}, expected an integer >= 0")
    return EToken(data, int(version), metadata.get("embodiment", ""), model_digest)


def _read_e_token(path: Path) -> tuple[np.ndarray, dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            if metadata.get("format") != "selfalign-e-token-1" or names != [E_TOKEN_PARAMETER]:
                raise CheckpointError(f"{path}: found tensors {names}, expected an E-Token file ({E_TOKEN_PARAMETER})")
            return file.get_tensor(E_TOKEN_PARAMETER).float().numpy(), metadata
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: found {error}, expected an E-Token file") from error
