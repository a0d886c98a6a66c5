"""The SigLIP vision tower, under openpi's state-dict names, without pooling head. Knows nothing of what reads it.

Written out here rather than taken from transformers: importing that takes longer than loading the tiny policy. Numbers
equal its model's (golden vectors), and so does how a fresh tower starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from selfalign_core.model.config import VisionSize

LAYER_NORM_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head attention of all patches to all, with biases."""

    def __init__(self, size: VisionSize):
        super().__init__()
        self.head_dim = size.width // size.num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(size.width, size.width) for _ in range(4))
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, patches, width)."""
        queries, keys, values = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """``fc2(gelu_tanh(fc1(x)))``."""

    def __init__(self, size: VisionSize):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(size.width, size.mlp_dim), nn.Linear(size.mlp_dim, size.width)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class EncoderLayer(nn.Module):
    """Attention and MLP, each behind a layer norm and added to what comes in."""

    def __init__(self, size: VisionSize):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(size.width, eps=LAYER_NORM_EPS)
        self.self_attn = Attention(size)
        self.layer_norm2 = nn.LayerNorm(size.width, eps=LAYER_NORM_EPS)
        self.mlp = MLP(size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    """Patches as tokens, with learned positions."""

    def __init__(self, size: VisionSize):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, size.width, kernel_size=size.patch_size, stride=size.patch_size)
        self.position_embedding = nn.Embedding(size.num_patches, size.width)
        # Wider than 1 / sqrt(fan_in) by what a truncation at two standard deviations would take away (as transformers).
        nn.init.normal_(self.patch_embedding.weight, std=(3 * size.patch_size**2) ** -0.5 / 0.87962566)
        assert self.patch_embedding.bias is not None
        nn.init.zeros_(self.patch_embedding.bias)
        nn.init.normal_(self.position_embedding.weight, std=size.width**-0.5)

    def forward(self, images: Tensor) -> Tensor:
        """``images`` (B, 3, H, W) → (B, patches, width)."""
        patches = self.patch_embedding(images.to(self.patch_embedding.weight.dtype))
        return patches.flatten(2).transpose(1, 2) + self.position_embedding.weight


class Encoder(nn.Module):
    """The layers, one after the other."""

    def __init__(self, size: VisionSize):
        super().__init__()
        layers = nn.ModuleList(EncoderLayer(size) for _ in range(size.depth))
        self.layers = cast("Sequence[EncoderLayer]", layers)  # a ModuleList does not say what is in it

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class SiglipVision(nn.Module):
    """Images in, one token per patch out."""

    def __init__(self, size: VisionSize):
        super().__init__()
        self.embeddings = Embeddings(size)
        self.encoder = Encoder(size)
        self.post_layernorm = nn.LayerNorm(size.width, eps=LAYER_NORM_EPS)

    def forward(self, images: Tensor) -> Tensor:
        """``images`` (B, 3, H, W) in [-1, 1] → (B, patches, width)."""
        hidden = self.embeddings(images)
        hidden = hidden.to(self.encoder.layers[0].self_attn.q_proj.weight.dtype)
        return self.post_layernorm(self.encoder(hidden))
