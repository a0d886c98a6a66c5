"""Operations and bytes of sampling a chunk, and the least time they take on a known card. Knows no clock.

Counted on the meta device, which has shapes and no numbers, by running the plain model's stages there. Bytes are those
that have to cross the memory once: the weights that a stage reads, and the keys and values that it writes or reads;
activations can stay on the chip.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from selfalign_core.model.config import ModelConfig
from selfalign_core.model.pi0 import ModelInputs, Pi0

T = TypeVar("T")

STAGES = ("image", "prefix", "step")


@dataclass(frozen=True)
class Work:
    """``operations`` (a multiply-add is two) and ``bytes``."""

    operations: float
    bytes: float

    def floor_ms(self, card: Card) -> float:
        """The least time: the longer of computing and of reading."""
        return 1e3 * max(self.operations / card.operations_per_s, self.bytes / card.bytes_per_s)


@dataclass(frozen=True)
class Card:
    """What a device reaches in practice."""

    operations_per_s: float
    bytes_per_s: float


CARDS = {"H100": Card(790e12, 3.0e12), "H200": Card(790e12, 4.3e12)}
"""bfloat16, dense: what large matrix products and copies reach, not the data sheet's peaks."""


def random_inputs(config: ModelConfig, *, cameras: int, prompt: int, batch: int = 1) -> ModelInputs:
    """Observations with every camera present, on torch's device of the moment; ``prompt``: how many tokens."""
    return ModelInputs(
        images=[torch.rand(batch, 3, *config.image_size) * 2 - 1 for _ in range(cameras)],
        image_masks=[torch.ones(batch, dtype=torch.bool) for _ in range(cameras)],
        tokens=torch.randint(0, config.vocab_size, (batch, prompt)),
        token_masks=torch.ones(batch, prompt, dtype=torch.bool),
        state=torch.randn(batch, config.action_dim),
    )


def count(config: ModelConfig, *, cameras: int, prompt: int, precision: str) -> dict[str, Work]:
    """Work of the stages of one chunk (:data:`STAGES`; ``step``: one denoising step), batch 1."""
    with torch.device("meta"):
        model = Pi0(config)
        if precision == "bfloat16":
            model.to_precision("bfloat16")
        inputs = random_inputs(config, cameras=cameras, prompt=prompt)
        actions = torch.empty(1, config.action_horizon, config.action_dim)
        with torch.no_grad():
            image, features = _operations(lambda: model.embed_images(inputs.images))
            prefix, cache = _operations(lambda: model.prefix(inputs, image_features=features))
            step, _ = _operations(lambda: model.predict_velocity(cache, inputs.state, actions, torch.empty(1)))
    experts = model.paligemma_with_expert
    paligemma, expert = experts.paligemma.model, experts.gemma_expert.model
    read = cache.layers[config.expert_layer_offset :][: config.action_expert.depth]
    last = paligemma.language_model.layers[-1]
    return {
        "image": Work(image, _bytes(paligemma.vision_tower, paligemma.multi_modal_projector)),
        "prefix": Work(
            prefix,
            _bytes(*paligemma.language_model.layers) - _bytes(last.mlp, last.self_attn.o_proj, last.self_attn.q_proj)
            + sum(kv.keys.nbytes + kv.values.nbytes for kv in cache.layers),
        ),
        # Adaptive norms' layers read nothing but the times: once per model.
        "step": Work(
            step,
            sum(_bytes(layer.self_attn, layer.mlp) for layer in expert.layers)
            + sum(kv.keys.nbytes + kv.values.nbytes for kv in read),
        ),
    }  # fmt: skip


def whole(stages: dict[str, Work], steps: int) -> Work:
    """A chunk of ``steps`` denoising steps."""
    times = {"image": 1, "prefix": 1, "step": steps}
    return Work(*(
        math.fsum(times[name] * getattr(stages[name], field.name) for name in STAGES)
        for field in dataclasses.fields(Work)
    ))  # fmt: skip


def floor_ms(stages: dict[str, Work], steps: int, card: Card) -> float:
    """The least time of a chunk: its stages follow one another."""
    return stages["image"].floor_ms(card) + stages["prefix"].floor_ms(card) + steps * stages["step"].floor_ms(card)


def _operations(run: Callable[[], T]) -> tuple[float, T]:
    with FlopCounterMode(display=False) as counter:
        found = run()
    return float(counter.get_total_flops()), found


def _bytes(*modules: nn.Module) -> int:
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())
