"""Which tensors a checkpoint's safetensors files hold, under openpi's names, and what sizes of a model they imply.

Names are openpi's plus ours. Reads headers alone; imports no torch, so a node that only needs image size and horizon
starts at once. Nothing here unpickles a file.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from selfalign_core.errors import CheckpointError, ConfigError
from selfalign_core.model.config import GemmaSize, ModelConfig, VisionSize
from selfalign_core.policy.token_files import E_TOKEN_PARAMETER
from selfalign_core.records import Record, load, named, read

E_TOKEN_BANK = "peft_bank"
"""(capacity, peft_num_tokens, width): tokens of the bodies trained on, beside the model's own tensors.

Rows without a key (``PolicyConfig.bank_keys``) are free. Mean, spread and principal directions of the others are not
stored: they follow from the rows alone (``policy.bank``) and are computed from them where they are read
(``alignment.trusted``). The mean is also the ``peft_prefix_token`` of a policy written for no body in particular.
"""
_PALI = "paligemma_with_expert.paligemma."
EMBEDDING = _PALI + "model.language_model.embed_tokens.weight"
LM_HEAD = _PALI + "lm_head.weight"
_EXPERT_LM_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"
_EXPERT = "paligemma_with_expert.gemma_expert.model."
_ALIGNMENT_EXPERT = "paligemma_with_expert.alignment_expert.model."
_VISION = _PALI + "model.vision_tower.vision_model."


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of an open file: where it begins, its type by safetensors' name, its shape."""

    name: str
    file: BufferedReader
    begin: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Tensors:
    """Those of a checkpoint by openpi's names, as long as :func:`open_tensors` is open."""

    path: Path
    stored: dict[str, StoredTensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.stored.items()}


@contextmanager
def open_tensors(path: str | Path) -> Iterator[Tensors]:
    """Open a ``.safetensors`` file, or a directory with one (or a sharded index), under openpi's names.

    Accepts LeRobot's ``model.`` prefix, a token embedding stored once or twice, and the time MLP under the name of
    the other model family.
    """
    path = Path(path)
    with ExitStack() as stack:
        stored: dict[str, StoredTensor] = {}
        for file in _files_of(path):
            _check_header(file)
            stored.update(_stored_tensors(stack.enter_context(open(file, "rb"))))
        yield Tensors(path, _openpi_names(stored))


def _check_header(file: Path) -> None:
    """Raise unless ``file`` is a safetensors file as long as its header says."""
    try:
        with safe_open(file, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: found {error}, expected a safetensors file") from error


def _stored_tensors(stream: BufferedReader) -> dict[str, StoredTensor]:
    length = int.from_bytes(stream.read(8), "little")
    header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(name, stream, 8 + length + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
        for name, entry in header.items()
    }


@dataclass(frozen=True)
class _Index(Record):
    """``weight_map``: file of each tensor of a sharded checkpoint."""

    foreign = True
    weight_map: dict[str, str]


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        found = load(_Index, index, "a JSON object with weight_map", error=CheckpointError)
        return [path / name for name in sorted(set(found.weight_map.values()))]
    file = path / "model.safetensors"
    if not file.is_file():
        raise CheckpointError(f"{path}: found neither model.safetensors nor its index, expected a checkpoint directory")
    return [file]


def _openpi_names(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    if stored and all(name.startswith("model.") for name in stored):
        stored = {name.removeprefix("model."): value for name, value in stored.items()}
    if LM_HEAD in stored:  # the head is the embedding; where a file has both, the head counts (LeRobot's rule)
        stored[EMBEDDING] = stored[LM_HEAD]
    elif EMBEDDING in stored:
        stored[LM_HEAD] = stored[EMBEDDING]
    pi05 = _is_pi05(stored)
    wrong, right = ("action_time_mlp_", "time_mlp_") if pi05 else ("time_mlp_", "action_time_mlp_")
    stored = {
        right + name.removeprefix(wrong) if name.startswith(wrong) else name: value for name, value in stored.items()
    }
    if pi05:  # π0.5 has no state token; LeRobot's loader drops the projection too
        stored = {name: value for name, value in stored.items() if not name.startswith("state_proj.")}
    return stored


def _is_pi05(names: Iterable[str]) -> bool:
    """π0.5 is known by the adaptive norms of its action expert."""
    return any(name.startswith(_EXPERT) and name.endswith("norm.dense.weight") for name in names)


# ------------------------------------------------------------------------------------------------ sizes from tensors


def infer_model_config(tensors: Tensors, **overrides: Any) -> ModelConfig:
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
    for name, read_size in (
        ("vision", vision),
        ("text", lambda: stack(_PALI + "model.language_model.")),
        ("action_expert", lambda: stack(_EXPERT)),
        ("vocab_size", lambda: shape(LM_HEAD, _EXPERT_LM_HEAD)[0]),
        ("action_dim", action_dim),
    ):
        if name not in values:
            values[name] = read_size()
    if "alignment_expert" not in values and depth(_ALIGNMENT_EXPERT):
        values["alignment_expert"] = stack(_ALIGNMENT_EXPERT)
    values.setdefault("use_peft_prefix_token", E_TOKEN_PARAMETER in shapes)
    if E_TOKEN_PARAMETER in shapes:
        values.setdefault("peft_num_tokens", shapes[E_TOKEN_PARAMETER][0])
    with named("model options"):
        return read(ModelConfig, values)
