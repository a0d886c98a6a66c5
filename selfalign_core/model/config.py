"""Model configuration: sizes, E-Token options and alignment options of a π0 / π0.5 model.

Knows nothing of weights, ROS or training loops. Every size of the model is stated here once; sequence lengths
are never stated at all, they follow from the inputs (see ``selfalign_core.model.layout``).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, cast

from selfalign_core.errors import ConfigError
from selfalign_core.records import Count, Natural, NotNegative, Record, named, plain, read

PALIGEMMA_VOCAB_SIZE = 257152

_DERIVED = cast("int", None)
"""The default of a field that ``__post_init__`` derives from others."""


@dataclass(frozen=True)
class GemmaSize(Record):
    """Size of one Gemma stack (the VLM's language model or an expert)."""

    width: Count
    depth: Count
    mlp_dim: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect(
            self.num_heads % self.num_kv_heads == 0, "num_heads", f"a multiple of num_kv_heads={self.num_kv_heads}"
        )
        self.expect(self.head_dim % 2 == 0, "head_dim", "an even number (rotary embedding)")


@dataclass(frozen=True)
class VisionSize(Record):
    """Size of the SigLIP vision tower; ``image_size`` and ``patch_size`` in pixels."""

    width: Count
    depth: Count
    mlp_dim: Count
    num_heads: Count
    image_size: Count
    patch_size: Count

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect(self.width % self.num_heads == 0, "width", f"a multiple of num_heads={self.num_heads}")
        self.expect(self.image_size >= self.patch_size, "image_size", f"at least patch_size={self.patch_size}")

    @property
    def num_patches(self) -> int:
        """Image tokens per camera."""
        return (self.image_size // self.patch_size) ** 2


GEMMA_2B = GemmaSize(width=2048, depth=18, mlp_dim=16384, num_heads=8, num_kv_heads=1, head_dim=256)
GEMMA_300M = GemmaSize(width=1024, depth=18, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=256)
SIGLIP_SO400M = VisionSize(width=1152, depth=27, mlp_dim=4304, num_heads=16, image_size=224, patch_size=14)


@dataclass(frozen=True)
class ModelConfig(Record):
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
    vocab_size: Count = PALIGEMMA_VOCAB_SIZE
    action_dim: Count = 32
    action_horizon: Count = 50
    max_token_len: Count = _DERIVED
    """π0.5 writes the state into the prompt: 200 unless said otherwise; 48 for π0 (openpi)."""
    expert_layer_offset: Natural = 0
    """Layer i of an expert reads the VLM's layer ``i + expert_layer_offset``; 0 in every public checkpoint."""

    use_peft_prefix_token: bool = True
    peft_num_tokens: Count = 1
    peft_init: Literal["zeros", "normal"] = "zeros"
    peft_lr: NotNegative = 1e-3

    transition_horizon: Count = _DERIVED
    """Executed actions per transition; the action horizon unless said otherwise."""
    feature_tokens_per_camera: Count = 4
    alignment_prefix: Literal["images_only", "full"] = "images_only"
    restrict_image_to_language: bool = False

    lambda_perc: NotNegative = 0.3
    lambda_dyn: NotNegative = 1.0
    lambda_inv: NotNegative = 3.0
    """Weights of the three tasks beside the actions' loss when the model is trained: how much of it they may claim.

    A token is aligned with weights of its own (``alignment.config.AlignConfig``): there E alone learns, from these
    losses alone, and what tells bodies apart counts most.
    """

    def __post_init__(self) -> None:
        if self.max_token_len is None:
            object.__setattr__(self, "max_token_len", 200 if self.pi05 else 48)
        if self.transition_horizon is None:
            object.__setattr__(self, "transition_horizon", self.action_horizon)
        super().__post_init__()
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
        return plain(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Inverse of :meth:`to_dict`; an unknown or missing key is an error that names it."""
        implied = ("max_token_len", "transition_horizon")
        return read(cls, {k: v for k, v in values.items() if v is not None or k not in implied}, "model")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ModelConfig:
        """``pi0``, ``pi05`` (the public sizes with a 300M alignment expert) or ``tiny`` (runs on a laptop's CPU)."""
        if name not in _PRESETS:
            raise ConfigError(f"model preset: found {name!r}, expected one of {sorted(_PRESETS)}")
        with named(f"model preset {name}"):
            return read(cls, {**_PRESETS[name], **changes})


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
