"""What a training step calls: the joint pass of model and bank on a sample. Knows nothing of data or optimisers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from selfalign_core.model.config import ModelConfig
from selfalign_core.model.pi0 import AlignmentNoise, Losses, ModelInputs, Pi0
from selfalign_core.policy.bank import TokenBank
from selfalign_core.policy.codec import pixels_to_model


@dataclass(frozen=True)
class Sample:
    """B samples for :class:`JointModel`; ``rows`` (B,) int64 are rows of the bank. See ``Pi0.forward``.

    Images are still (B, H, W, 3) uint8: they travel to the device as such. ``token_noise`` (B, tokens, width) is added
    to the bodies' tokens.
    """

    inputs: ModelInputs
    actions: Tensor
    action_masks: Tensor
    noise: Tensor
    time: Tensor
    rows: Tensor
    executed: Tensor | None = None
    executed_masks: Tensor | None = None
    next_images: list[Tensor] | None = None
    alignment_noise: AlignmentNoise | None = None
    image_features: list[Tensor] | None = None
    next_image_features: list[Tensor] | None = None
    token_noise: Tensor | None = None

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def labelled(self) -> Tensor:
        """(B,) bool: samples with actions to imitate; play has none."""
        return self.action_masks.any(1)

    def to(self, device: torch.device) -> Sample:
        return _map(self, lambda tensor: tensor.to(device, non_blocking=True))

    def split(self, parts: int) -> list[Sample]:
        """``parts`` samples of equal size in the same order."""
        size = len(self) // parts
        slices = [slice(i * size, (i + 1) * size) for i in range(parts)]
        return [_map(self, itemgetter(rows)) for rows in slices]


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list):
        return [_map(v, change) for v in value]
    if isinstance(value, Sample | ModelInputs | AlignmentNoise):
        return type(value)(**{f.name: _map(getattr(value, f.name), change) for f in fields(value)})
    return value


class JointModel(nn.Module):
    """Model and bank as one module: what parallel wrappers wrap, and what a training step calls."""

    def __init__(self, model: Pi0, bank: TokenBank | None, dim_mask: Tensor):
        super().__init__()
        self.model = model
        self.bank = bank
        self.register_buffer("dim_mask", dim_mask, persistent=False)

    def forward(self, sample: Sample, *, reduction: str = "mean") -> Losses:
        """One joint pass of the three experts, each sample with its body's token."""
        inputs = replace(sample.inputs, images=_pixels(sample.inputs.images))
        token = None if self.bank is None else self.bank(sample.rows)
        if token is not None and sample.token_noise is not None:
            token = token + sample.token_noise
        return self.model(
            inputs,
            sample.actions,
            noise=sample.noise,
            time=sample.time,
            action_masks=sample.action_masks,
            dim_mask=self.dim_mask,
            executed=sample.executed,
            executed_masks=sample.executed_masks,
            next_images=None if sample.next_images is None else _pixels(sample.next_images),
            alignment_noise=sample.alignment_noise,
            image_features=sample.image_features,
            next_image_features=sample.next_image_features,
            token=token,
            reduction=reduction,
        )


def _pixels(images: Sequence[Tensor]) -> list[Tensor]:
    return [pixels_to_model(image) for image in images]


def unreached_parameters(config: ModelConfig, *, alignment: bool, cached: bool, cameras: int) -> set[str]:
    """Names of the model's parameters that no loss depends on, found by a pass without numbers (meta device).

    Among them: what only the hidden output of the VLM's last layer would need, and ``peft_prefix_token``, whose place
    the bank takes.
    """
    with torch.device("meta"):
        model = Pi0(config)
        image = [torch.zeros(1, 3, *config.image_size) for _ in range(cameras)]
        feature = [torch.zeros(1, config.vision.num_patches, config.text.width) for _ in range(cameras)]
        present = [torch.ones(1, dtype=torch.bool) for _ in range(cameras)]
        prompt = torch.zeros(1, config.max_token_len, dtype=torch.int64)
        state, time = torch.zeros(1, config.action_dim), torch.zeros(1)
        actions = torch.zeros(1, config.action_horizon, config.action_dim)
        executed = torch.zeros(1, config.transition_horizon, config.action_dim)
        targets = torch.zeros(1, cameras * config.feature_tokens_per_camera, config.text.width)
        token = torch.zeros(1, config.peft_num_tokens, config.action_expert.width)
        losses = model(
            ModelInputs(image, present, prompt, prompt.bool(), state),
            actions,
            noise=actions,
            time=time,
            token=token if config.use_peft_prefix_token else None,
            image_features=feature if cached else None,
            **(
                {
                    "executed": executed,
                    "next_images": image,
                    "next_image_features": feature if cached else None,
                    "alignment_noise": AlignmentNoise(state, targets, executed, time),
                }
                if alignment
                else {}
            ),
        )
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(losses.total, list(named.values()), allow_unused=True)
    fixed = {name for name, p in model.named_parameters() if not p.requires_grad}
    return fixed | {name for name, gradient in zip(named, gradients, strict=True) if gradient is None}
