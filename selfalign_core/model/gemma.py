"""Gemma stacks that attend jointly: the VLM's language model and the experts are the same kind of stack.

The prefix never attends to a suffix, so joint attention is: run the prefix once, keep each layer's keys and values
(with their gradient while training), and let every expert attend to them and to itself. One code path serves the
joint training pass, the cached sampling pass and alignment. This module knows nothing of images, actions or time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfalign_core.model.config import GemmaSize
from selfalign_core.model.masks import additive_mask

ROPE_BASE = 10000.0
RMS_NORM_EPS = 1e-6


class RMSNorm(nn.Module):
    """Root-mean-square norm, scale ``1 + weight``, computed in float32 and returned in the input's dtype."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """``x`` (B, S, width) → normalised x and no gate; ``cond`` is not used."""
        return (_normalise(x) * (1.0 + self.weight.float())).to(x.dtype), None


class ModulationLinear(nn.Linear):
    """Conditioning (width) → scale, shift, gate (3 * width); starts as scale 0, shift 0, gate 1, a plain layer."""

    def __init__(self, width: int):
        super().__init__(width, 3 * width)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        with torch.no_grad():
            self.bias.zero_()
            self.bias[2 * self.in_features :] = 1.0


class AdaRMSNorm(nn.Module):
    """Adaptive norm of π0.5: scale, shift and gate come from one linear layer of the conditioning vector."""

    def __init__(self, width: int):
        super().__init__()
        self.dense = ModulationLinear(width)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """``x`` (B, S, width), ``cond`` (B, width) or per token (B, S, width) → modulated x and the gate."""
        if cond is None:
            raise ValueError("AdaRMSNorm: found no conditioning vector, expected (batch, width)")
        modulation = self.dense(cond.to(self.dense.weight.dtype))
        if modulation.ndim == 2:
            modulation = modulation[:, None, :]
        scale, shift, gate = modulation.float().chunk(3, dim=-1)
        return (_normalise(x) * (1.0 + scale) + shift).to(x.dtype), gate.to(x.dtype)


def _make_norm(width: int, *, adaptive: bool) -> RMSNorm | AdaRMSNorm:
    return AdaRMSNorm(width) if adaptive else RMSNorm(width)


def _normalise(x: Tensor) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + RMS_NORM_EPS)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    """``x + branch``, the branch multiplied by the gate of an adaptive norm where there is one."""
    return x + branch if gate is None else x + branch * gate


class Attention(nn.Module):
    """Projections of grouped-query attention, no biases; :meth:`GemmaLayer.forward` puts them together."""

    def __init__(self, size: GemmaSize):
        super().__init__()
        self.head_dim = size.head_dim
        self.q_proj = nn.Linear(size.width, size.num_heads * size.head_dim, bias=False)
        self.k_proj = nn.Linear(size.width, size.num_kv_heads * size.head_dim, bias=False)
        self.v_proj = nn.Linear(size.width, size.num_kv_heads * size.head_dim, bias=False)
        self.o_proj = nn.Linear(size.num_heads * size.head_dim, size.width, bias=False)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, S, heads * head_dim) → (B, heads, S, head_dim)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class GatedMLP(nn.Module):
    """``down(gelu_tanh(gate(x)) * up(x))``, no biases."""

    def __init__(self, size: GemmaSize):
        super().__init__()
        self.gate_proj = nn.Linear(size.width, size.mlp_dim, bias=False)
        self.up_proj = nn.Linear(size.width, size.mlp_dim, bias=False)
        self.down_proj = nn.Linear(size.mlp_dim, size.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


@dataclass(frozen=True)
class KeyValues:
    """Keys (after rotary embedding) and values of one layer, each (B, kv_heads, S, head_dim)."""

    keys: Tensor
    values: Tensor

    def first(self, length: int) -> KeyValues:
        """The first ``length`` tokens."""
        return KeyValues(self.keys[:, :, :length], self.values[:, :, :length])

    def then(self, other: KeyValues) -> KeyValues:
        """These tokens followed by ``other``'s."""
        return KeyValues(torch.cat([self.keys, other.keys], dim=2), torch.cat([self.values, other.values], dim=2))


@dataclass(frozen=True)
class PrefixCache:
    """What the experts read of a prefix: keys and values of every VLM layer, and which tokens are real.

    ``layers`` has one entry per VLM layer, ``pad_masks`` is (B, P) bool, and the first ``image_length`` tokens are
    image tokens.
    """

    layers: tuple[KeyValues, ...]
    pad_masks: Tensor
    image_length: int

    def images_only(self) -> PrefixCache:
        """The image tokens alone; equal to an images-only pass if image tokens did not attend to the prompt."""
        return PrefixCache(
            tuple(kv.first(self.image_length) for kv in self.layers),
            self.pad_masks[:, : self.image_length],
            self.image_length,
        )

    def select(self, rows: Tensor | slice) -> PrefixCache:
        """The given batch rows (int64, or a slice), for instance one prefix repeated for several noise draws."""
        return PrefixCache(
            tuple(KeyValues(kv.keys[rows], kv.values[rows]) for kv in self.layers),
            self.pad_masks[rows],
            self.image_length,
        )

    @classmethod
    def joined(cls, parts: Sequence[PrefixCache]) -> PrefixCache:
        """The batch rows of all ``parts``, one after the other."""
        layers = zip(*(part.layers for part in parts), strict=True)
        return cls(
            tuple(
                KeyValues(torch.cat([kv.keys for kv in layer]), torch.cat([kv.values for kv in layer]))
                for layer in layers
            ),
            torch.cat([part.pad_masks for part in parts]),
            parts[0].image_length,
        )

    def detach(self) -> PrefixCache:
        """The same numbers without gradient."""
        return PrefixCache(
            tuple(KeyValues(kv.keys.detach(), kv.values.detach()) for kv in self.layers),
            self.pad_masks,
            self.image_length,
        )


class RotaryEmbedding(nn.Module):
    """Rotary angles in float32, split-half pairing (not interleaved), base 10000."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.head_dim = head_dim

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``positions`` (B, S) → cos and sin, each (B, 1, S, head_dim)."""
        index = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=positions.device)
        inverse_frequency = 1.0 / (ROPE_BASE ** (index / self.head_dim))
        angle = positions[:, None, :, None].float() * inverse_frequency
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` (B, heads, S, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class GemmaLayer(nn.Module):
    """One transformer layer; attends to an optional prefix's keys and values and to its own tokens."""

    def __init__(self, size: GemmaSize, *, adaptive: bool):
        super().__init__()
        self.self_attn = Attention(size)
        self.mlp = GatedMLP(size)
        self.input_layernorm = _make_norm(size.width, adaptive=adaptive)
        self.post_attention_layernorm = _make_norm(size.width, adaptive=adaptive)

    def project(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], cond: Tensor | None, read: Tensor | None = None
    ) -> tuple[Tensor, KeyValues, Tensor | None]:
        """Queries (of the tokens ``read``), keys and values of ``x`` (B, S, width), and the gate of the first norm."""
        attention = self.self_attn
        normed, gate = self.input_layernorm(x, cond)
        normed = normed.to(attention.q_proj.weight.dtype)
        keys = apply_rotary(attention.split_heads(attention.k_proj(normed)), *rotary)
        asking, turn = (normed, rotary) if read is None else (normed[:, read], [r[:, :, read] for r in rotary])
        queries = apply_rotary(attention.split_heads(attention.q_proj(asking)), *turn)
        return queries, KeyValues(keys, attention.split_heads(attention.v_proj(normed))), gate

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor,
        cond: Tensor | None = None,
        prefix: KeyValues | None = None,
        read: Tensor | None = None,
    ) -> tuple[Tensor, KeyValues]:
        """``x`` (B, S, width), additive ``mask`` (B, 1, S, P + S) → output (B, S, width) and own keys and values.

        ``read`` (R,) int64: output (B, R, width) of these tokens alone, for a ``cond`` that is the same for all tokens.
        """
        queries, own, gate = self.project(x, rotary, cond, read)
        if read is not None:
            x, mask = x[:, read], mask[:, :, read]
        visible = own if prefix is None else prefix.then(own)
        attended = F.scaled_dot_product_attention(
            queries, visible.keys, visible.values, attn_mask=mask, enable_gqa=True
        )
        attended = self.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
        x = gated_residual(x, attended, gate)
        normed, gate = self.post_attention_layernorm(x, cond)
        branch = self.mlp(normed.to(self.mlp.up_proj.weight.dtype))
        return gated_residual(x, branch, gate), own


class GemmaStack(nn.Module):
    """``layers`` and final ``norm`` of a Gemma model, with a token embedding if ``vocab_size`` is given.

    ``adaptive`` selects the adaptive norms of π0.5's experts. ``checkpoint_layers`` trades compute for memory in
    training: each layer is recomputed in the backward pass.
    """

    def __init__(self, size: GemmaSize, *, adaptive: bool = False, vocab_size: int | None = None):
        super().__init__()
        if vocab_size:
            self.embed_tokens = nn.Embedding(vocab_size, size.width)
            # Multiplied by sqrt(width) when read: tokens then start at unit scale, so that what they gather from the
            # image is not lost beside what they are.
            nn.init.normal_(self.embed_tokens.weight, std=size.width**-0.5)
        layers = nn.ModuleList(GemmaLayer(size, adaptive=adaptive) for _ in range(size.depth))
        self.layers = cast("Sequence[GemmaLayer]", layers)  # a ModuleList does not say what is in it
        self.norm = _make_norm(size.width, adaptive=adaptive)
        self.rotary_emb = RotaryEmbedding(size.head_dim)
        self.checkpoint_layers = False

    @property
    def dtype(self) -> torch.dtype:
        """Of the layers' weights; norms may have another."""
        return self.layers[0].self_attn.q_proj.weight.dtype

    def forward(
        self,
        embs: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        *,
        cond: Tensor | None = None,
        prefix: Sequence[KeyValues] | None = None,
        output_hidden: bool = True,
        read: Tensor | None = None,
    ) -> tuple[Tensor | None, tuple[KeyValues, ...]]:
        """Run the stack.

        Args:
            embs: (B, S, width) token embeddings.
            position_ids: (B, S) int64 positions.
            mask: (B, S, P + S) bool, prefix tokens first.
            cond: (B, width) or (B, S, width) conditioning of adaptive norms.
            prefix: keys and values of the prefix for each of this stack's layers.
            output_hidden: False skips what only the hidden output needs: a prefix is read through its keys and
                values alone, so its last layer's attention and MLP are never used.
            read: (R,) int64 places of the tokens whose hidden states are wanted; None: all. The last layer computes no
                others; ``cond`` is (B, width) then.

        Returns:
            The final-normed hidden states (B, R, width), or None, and this stack's own keys and values per layer.
        """
        dtype = self.dtype
        x = embs.to(dtype)
        rotary = self.rotary_emb(position_ids, dtype)
        mask = additive_mask(mask, dtype)
        own: list[KeyValues] = []
        for index, layer in enumerate(self.layers):
            last = index == len(self.layers) - 1
            if not output_hidden and last:
                own.append(layer.project(x, rotary, cond)[1])
                return None, tuple(own)
            args = (x, rotary, mask, cond, None if prefix is None else prefix[index], read if last else None)
            if self.checkpoint_layers and torch.is_grad_enabled():
                x, kv = torch.utils.checkpoint.checkpoint(layer, *args, use_reentrant=False)
            else:
                x, kv = layer(*args)
            own.append(kv)
        return self.norm(x, cond)[0], tuple(own)
