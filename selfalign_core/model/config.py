"""Model configuration: sizes, E-Token options and alignment options of a π0 / π0.5 model.

Knows nothing of weights, ROS or training loops. Every size of the model is stated here once; sequence lengths
are never stated at all, they follow from the inputs (see ``selfalign_core.model.layout``).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, cast

from selfalign_core.errors import ConfigError

PALIGEMMA_VOCAB_SIZE = 257152

_DERIVED = cast("int", None)
"""The default of a field that ``__post_init__`` derives from others."""


def _require_positive_ints(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{type(owner).__name__}.{name}: found {value!r}, expected an integer >= 1")


@dataclass(frozen=True)
class GemmaSize:
    """Size of one Gemma stack (the VLM's language model or an expert)."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        _require_positive_ints(self, *(field.name for field in dataclasses.fields(self)))
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"GemmaSize.num_heads: found {self.num_heads}, expected a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"GemmaSize.head_dim: found {self.head_dim}, expected an even number (rotary embedding)")


@dataclass(frozen=True)
class VisionSize:
    """Size of the SigLIP vision tower; ``image_size`` and ``patch_size`` in pixels."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    image_size: int
    patch_size: int

    def __post_init__(self) -> None:
        _require_positive_ints(self, *(field.name for field in dataclasses.fields(self)))
        if self.width % self.num_heads:
            raise ConfigError(
                f"VisionSize.width: found {self.width}, expected a multiple of num_heads={self.num_heads}"
            )
        if self.image_size < self.patch_size:
            raise ConfigError(
                f"VisionSize.image_size: found {self.image_size}, expected at least patch_size={self.patch_size}"
            )

    @property
    def num_patches(self) -> int:
        """Image tokens per camera."""
        return (self.image_size // self.patch_size) ** 2


GEMMA_2B = GemmaSize(width=2048, depth=18, mlp_dim=16384, num_heads=8, num_kv_heads=1, head_dim=256)
GEMMA_300M = GemmaSize(width=1024, depth=18, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=256)
SIGLIP_SO400M = VisionSize(width=1152, depth=27, mlp_dim=4304, num_heads=16, image_size=224, patch_size=14)


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the model's parameters and what its tokens may see.

    ``alignment_prefix`` says what the alignment path may read: ``images_only`` (design: no prompt, no clean state)
    or ``full`` (the whole prefix, for comparison). ``restrict_image_to_language`` keeps image tokens from attending
    to the prompt, so the image part of one prefix pass is already an images-only prefix and serves all experts;
    without it (public checkpoints) the alignment path runs a prefix pass of its own over the images.
    """

    pi05: bool
    vision: VisionSize
    text: GemmaSize
    action_expert: GemmaSize
    alignment_expert: GemmaSize | None = None
    vocab_size: int = PALIGEMMA_VOCAB_SIZE
    action_dim: int = 32
    action_horizon: int = 50
    max_token_len: int = _DERIVED
    expert_layer_offset: int = 0
    """Layer i of an expert reads the VLM's layer ``i + expert_layer_offset``; 0 in every public checkpoint."""

    use_peft_prefix_token: bool = True
    peft_num_tokens: int = 1
    peft_init: Literal["zeros", "normal"] = "zeros"
    peft_lr: float = 1e-3

    transition_horizon: int = _DERIVED
    """Executed actions per transition; the action horizon unless said otherwise."""
    feature_tokens_per_camera: int = 4
    alignment_prefix: Literal["images_only", "full"] = "images_only"
    restrict_image_to_language: bool = False
    lambda_perc: float = 0.3
    lambda_dyn: float = 1.0
    lambda_inv: float = 3.0

    def __post_init__(self) -> None:
        if self.max_token_len is None:
            # openpi: the state is written into π0.5's prompt, which therefore is longer.
            object.__setattr__(self, "max_token_len", 200 if self.pi05 else 48)
        if self.transition_horizon is None:
            object.__setattr__(self, "transition_horizon", self.action_horizon)
        _require_positive_ints(
            self, "vocab_size", "action_dim", "action_horizon", "max_token_len", "peft_num_tokens",
            "transition_horizon", "feature_tokens_per_camera",
        )  # fmt: skip
        for name in ("pi05", "use_peft_prefix_token", "restrict_image_to_language"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ConfigError(f"ModelConfig.{name}: found {value!r}, expected True or False")
        if self.peft_init not in ("zeros", "normal"):
            raise ConfigError(f"ModelConfig.peft_init: found {self.peft_init!r}, expected 'zeros' or 'normal'")
        if self.alignment_prefix not in ("images_only", "full"):
            raise ConfigError(
                f"ModelConfig.alignment_prefix: found {self.alignment_prefix!r}, expected 'images_only' or 'full'"
            )
        for name in ("lambda_perc", "lambda_dyn", "lambda_inv", "peft_lr"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ConfigError(f"ModelConfig.{name}: found {value!r}, expected a number >= 0")
        if not isinstance(self.expert_layer_offset, int) or self.expert_layer_offset < 0:
            raise ConfigError(
                f"ModelConfig.expert_layer_offset: found {self.expert_layer_offset!r}, expected an integer >= 0"
            )
        self._check_expert("action_expert", self.action_expert)
        if self.alignment_expert is not None:
            self._check_expert("alignment_expert", self.alignment_expert)

    def _check_expert(self, name: str, size: GemmaSize) -> None:
        for field in ("num_heads", "num_kv_heads", "head_dim"):
            found, expected = getattr(size, field), getattr(self.text, field)
            if found != expected:
                raise ConfigError(
                    f"ModelConfig.{name}.{field}: found {found}, expected the VLM's {expected} (joint attention)"
                )
        if self.expert_layer_offset + size.depth > self.text.depth:
            raise ConfigError(
                f"ModelConfig.{name}.depth: found {size.depth} from VLM layer {self.expert_layer_offset} on, "
                f"expected to end within the VLM's {self.text.depth} layers"
            )
        if size.width % 2:
            raise ConfigError(f"ModelConfig.{name}.width: found {size.width}, expected an even number")

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images the vision tower reads."""
        return (self.vision.image_size, self.vision.image_size)

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Inverse of :meth:`to_dict`; an unknown or missing key is an error that names it."""
        values = dict(values)
        for name, kind in (
            ("vision", VisionSize), ("text", GemmaSize), ("action_expert", GemmaSize), ("alignment_expert", GemmaSize)
        ):  # fmt: skip
            if isinstance(values.get(name), dict):
                values[name] = build_dataclass(kind, values[name], f"model.{name}")
        return build_dataclass(cls, values, "model")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ModelConfig:
        """``pi0``, ``pi05`` (the public sizes with a 300M alignment expert) or ``tiny`` (runs on a laptop's CPU)."""
        if name not in _PRESETS:
            raise ConfigError(f"model preset: found {name!r}, expected one of {sorted(_PRESETS)}")
        return build_dataclass(cls, {**_PRESETS[name], **changes}, f"model preset {name}")


def build_dataclass(kind: type, values: dict[str, Any], where: str) -> Any:
    """``kind(**values)``; an unknown or missing key is an error that names it and ``where``."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(f"{where}: found unknown key(s) {unknown}, expected a subset of {sorted(fields)}")
    missing = sorted(
        name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in values
    )
    if missing:
        raise ConfigError(f"{where}: missing key(s) {missing}")
    return kind(**values)


_TINY_EXPERT = GemmaSize(width=64, depth=3, mlp_dim=128, num_heads=4, num_kv_heads=1, head_dim=16)

_PRESETS: dict[str, dict[str, Any]] = {
    "pi0": {
        "pi05": False, "vision": SIGLIP_SO400M, "text": GEMMA_2B,
        "action_expert": GEMMA_300M, "alignment_expert": GEMMA_300M,
    },
    "pi05": {
        "pi05": True, "vision": SIGLIP_SO400M, "text": GEMMA_2B,
        "action_expert": GEMMA_300M, "alignment_expert": GEMMA_300M,
    },
    # The experts read the VLM's last three layers: earlier ones have not yet mixed the image with the prompt.
    "tiny": {
        "pi05": False,
        "vision": VisionSize(width=64, depth=3, mlp_dim=128, num_heads=4, image_size=64, patch_size=8),
        "text": GemmaSize(width=64, depth=6, mlp_dim=128, num_heads=4, num_kv_heads=1, head_dim=16),
        "action_expert": _TINY_EXPERT, "alignment_expert": _TINY_EXPERT,
        "expert_layer_offset": 3, "vocab_size": 64, "max_token_len": 8,
        "action_dim": 8, "action_horizon": 16, "transition_horizon": 8,
        "peft_init": "normal", "restrict_image_to_language": True,
    },
}  # fmt: skip
