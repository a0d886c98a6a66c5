"""The VLM and its experts, under openpi's state-dict names: SigLIP tower, projector, language model, two experts.

Knows images, prompts and stacks; knows nothing of actions, flow matching or losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from selfalign_core.errors import InputError
from selfalign_core.model.config import ModelConfig, VisionSize
from selfalign_core.model.gemma import GemmaStack, PrefixCache
from selfalign_core.model.masks import make_position_ids, prefix_att_2d_mask
from selfalign_core.model.siglip import SiglipVision

ExpertName = Literal["action", "alignment"]

# openpi keeps these in float32 when the model runs in bfloat16.
_FLOAT32_IN_BFLOAT16 = (
    "embeddings.patch_embedding.",
    "embeddings.position_embedding.",
    "input_layernorm",
    "post_attention_layernorm",
    "model.norm",
)


class VisionTower(nn.Module):
    """SigLIP, one level deeper than it need be: as in the state-dict names."""

    def __init__(self, size: VisionSize):
        super().__init__()
        self.vision_model = SiglipVision(size)

    def forward(self, images: Tensor) -> Tensor:
        """``images`` (B, 3, H, W) in [-1, 1] → (B, patches, vision width)."""
        return self.vision_model(images)


class Projector(nn.Module):
    """Linear map from the vision tower's width to the language model's."""

    def __init__(self, vision_width: int, text_width: int):
        super().__init__()
        self.linear = nn.Linear(vision_width, text_width)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features)


class PaliGemmaModel(nn.Module):
    """Vision tower, projector and language model."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.vision_tower = VisionTower(config.vision)
        self.multi_modal_projector = Projector(config.vision.width, config.text.width)
        self.language_model = GemmaStack(config.text, vocab_size=config.vocab_size)


class PaliGemma(nn.Module):
    """The VLM with its output head, whose weight is the token embedding; the policy never uses the head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.model = PaliGemmaModel(config)
        self.lm_head = nn.Linear(config.text.width, config.vocab_size, bias=False)
        self.lm_head.weight = self.model.language_model.embed_tokens.weight


class Expert(nn.Module):
    """An expert stack. ``lm_head`` is in every public checkpoint and never used; it takes no gradient."""

    def __init__(self, stack: GemmaStack, lm_head: nn.Linear | None):
        super().__init__()
        self.model = stack
        if lm_head is not None:
            self.lm_head = lm_head.requires_grad_(False)


class PaliGemmaWithExperts(nn.Module):
    """The VLM, the action expert (``gemma_expert``) and, if configured, the ``alignment_expert``."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.paligemma = PaliGemma(config)
        self.gemma_expert = Expert(
            GemmaStack(config.action_expert, adaptive=config.pi05),
            nn.Linear(config.action_expert.width, config.vocab_size, bias=False),
        )
        self.alignment_expert = (
            None
            if config.alignment_expert is None
            else Expert(GemmaStack(config.alignment_expert, adaptive=config.pi05), None)
        )

    @property
    def language_model(self) -> GemmaStack:
        return self.paligemma.model.language_model

    def expert(self, name: ExpertName) -> GemmaStack:
        """The stack of the action or the alignment expert."""
        if name == "action":
            return self.gemma_expert.model
        if self.alignment_expert is None:
            raise InputError("alignment_expert: this model has none (ModelConfig.alignment_expert is None)")
        return self.alignment_expert.model

    def to_precision(self, precision: Literal["float32", "bfloat16"]) -> None:
        """Cast the parameters; in bfloat16 patch embedding, positions and norms stay float32 (as openpi)."""
        if precision not in ("float32", "bfloat16"):
            raise InputError(f"precision: found {precision!r}, expected 'float32' or 'bfloat16'")
        self.to(torch.float32 if precision == "float32" else torch.bfloat16)
        self.keep_float32_parts()

    def keep_float32_parts(self) -> None:
        """Cast patch embedding, positions and norms to float32, whatever the rest is (as openpi)."""
        for name, parameter in self.named_parameters():
            if any(part in name for part in _FLOAT32_IN_BFLOAT16):
                parameter.data = parameter.data.float()

    def embed_image(self, images: Tensor) -> Tensor:
        """``images`` (B, 3, H, W) in [-1, 1] → projected tokens (B, patches, text width), not scaled."""
        height, width = self.config.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, height, width):
            raise InputError(
                f"image: found shape {tuple(images.shape)}, expected (batch, 3, {height}, {width}) in [-1, 1]"
            )
        projector = self.paligemma.model.multi_modal_projector
        features = self.paligemma.model.vision_tower(images)
        return projector(features.to(projector.linear.weight.dtype))

    def embed_language(self, tokens: Tensor) -> Tensor:
        """``tokens`` (B, L) int → (B, L, text width), scaled by the square root of the width."""
        return self.language_model.embed_tokens(tokens) * math.sqrt(self.config.text.width)

    def embed_prefix(
        self,
        image_features: Sequence[Tensor],
        image_masks: Sequence[Tensor],
        tokens: Tensor | None,
        token_masks: Tensor | None,
    ) -> tuple[Tensor, Tensor, int]:
        """Concatenate the cameras' tokens, then the prompt's.

        Args:
            image_features: per camera (B, patches, text width), from :meth:`embed_image`.
            image_masks: per camera (B,) bool, False where the camera is absent for the sample.
            tokens, token_masks: (B, L) prompt ids and their mask; None for an images-only prefix.

        Returns:
            embeddings (B, P, width), pad masks (B, P) and the number of image tokens.
        """
        embs = list(image_features)
        pads = [mask[:, None].expand(-1, f.shape[1]) for mask, f in zip(image_masks, image_features, strict=True)]
        image_length = sum(f.shape[1] for f in image_features)
        if tokens is not None:
            assert token_masks is not None
            embs.append(self.embed_language(tokens).to(embs[0].dtype))
            pads.append(token_masks)
        return torch.cat(embs, dim=1), torch.cat(pads, dim=1), image_length

    def run_prefix(
        self, embs: Tensor, pad_masks: Tensor, image_length: int, *, output_hidden: bool = False
    ) -> tuple[PrefixCache, Tensor | None]:
        """One pass of the language model: its keys and values, and its final hidden states if asked for."""
        mask = prefix_att_2d_mask(
            pad_masks, image_length, restrict_image_to_language=self.config.restrict_image_to_language
        )
        hidden, layers = self.language_model(embs, make_position_ids(pad_masks), mask, output_hidden=output_hidden)
        return PrefixCache(layers, pad_masks, image_length), hidden

    def run_expert(
        self,
        name: ExpertName,
        embs: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        prefix: PrefixCache,
        cond: Tensor | None,
        read: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states (B, S, width) of an expert over a prefix; ``mask`` is (B, S, P + S).

        ``read`` (R,) int64: (B, R, width) of these tokens alone.
        """
        stack = self.expert(name)
        first = self.config.expert_layer_offset
        layers = prefix.layers[first : first + len(stack.layers)]
        return stack(embs, position_ids, mask, cond=cond, prefix=layers, read=read)[0]
