"""A model's weights as the fast path multiplies by them: fused, transposed, norm scales folded in.

Exact algebra, so only rounding differs from the plain model:

* plain norms: ``norm(x) * (1 + w) @ W = (x / |x|) @ (sqrt(width) * (1 + w) * W)``, with
  ``|x| = sqrt(sum(x²) + width * eps)``; layer norms the same way, their shift goes into the bias;
* queries carry the attention's ``1 / sqrt(head_dim)``; a query and a key may be permuted alike, so the two halves that
  rotary embedding pairs lie side by side, and a rotation is one complex product;
* a bias of SigLIP's keys adds the same to every score of a row: gone in the softmax; its values' bias passes through
  attention, whose weights sum to 1, into the bias of the output projection.

Knows nothing of how the layers are run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from selfalign_core.model.config import GemmaSize
from selfalign_core.model.gemma import RMS_NORM_EPS, AdaRMSNorm, GemmaLayer, GemmaStack, RMSNorm
from selfalign_core.model.paligemma import PaliGemmaModel
from selfalign_core.model.siglip import EncoderLayer


@dataclass(frozen=True)
class GemmaWeights:
    """One layer: ``qkv`` (width, (heads + 2) * head_dim), ``out``, ``gate_up`` (width, 2 * mlp_dim), ``down``."""

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class SiglipWeights:
    """One layer of the vision tower; ``qkv`` (width, 3 * width)."""

    qkv: Tensor
    qkv_bias: Tensor
    out: Tensor
    out_bias: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor


@dataclass(frozen=True)
class VisionWeights:
    """``patch`` (3 * patch², width), ``positions`` (patches, width) with the patches' bias, and the projector."""

    patch: Tensor
    positions: Tensor
    layers: tuple[SiglipWeights, ...]
    projector: Tensor
    projector_bias: Tensor


def folded(norm: RMSNorm | AdaRMSNorm, linear: Tensor) -> Tensor:
    """(out, in) weight behind ``norm`` → float32, the norm's scale in it; adaptive norms have theirs elsewhere."""
    linear = linear.float()
    if isinstance(norm, AdaRMSNorm):
        return linear
    return linear * (1.0 + norm.weight.float()) * math.sqrt(linear.shape[1])


def rms_floor(width: int, device: torch.device) -> Tensor:
    """What ``hypot`` needs beside ``|x|`` for the norm's epsilon, 0-dim float32."""
    return torch.tensor(math.sqrt(width * RMS_NORM_EPS), device=device)


def gemma_weights(layer: GemmaLayer, size: GemmaSize) -> GemmaWeights:
    attention, mlp = layer.self_attn, layer.mlp
    dtype = attention.q_proj.weight.dtype
    norm, after = layer.input_layernorm, layer.post_attention_layernorm
    queries = _paired(folded(norm, attention.q_proj.weight) / math.sqrt(size.head_dim), size.head_dim)
    keys = _paired(folded(norm, attention.k_proj.weight), size.head_dim)
    values = folded(norm, attention.v_proj.weight)
    return GemmaWeights(
        qkv=_transposed(torch.cat([queries, keys, values]), dtype),
        out=_transposed(attention.o_proj.weight, dtype),
        gate_up=_transposed(torch.cat([folded(after, mlp.gate_proj.weight), folded(after, mlp.up_proj.weight)]), dtype),
        down=_transposed(mlp.down_proj.weight, dtype),
    )


def stack_weights(stack: GemmaStack, size: GemmaSize) -> tuple[GemmaWeights, ...]:
    return tuple(gemma_weights(layer, size) for layer in stack.layers)


def vision_weights(model: PaliGemmaModel) -> VisionWeights:
    tower = model.vision_tower.vision_model
    patch, positions = tower.embeddings.patch_embedding, tower.embeddings.position_embedding
    projector = model.multi_modal_projector.linear
    assert patch.bias is not None
    weight, bias = _behind(tower.post_layernorm, projector.weight, projector.bias)
    dtype = projector.weight.dtype
    return VisionWeights(
        patch=_transposed(patch.weight.flatten(1), torch.float32),
        positions=positions.weight.float() + patch.bias.float(),
        layers=tuple(_siglip_weights(layer) for layer in tower.encoder.layers),
        projector=_transposed(weight, dtype),
        projector_bias=bias.to(dtype),
    )


def _siglip_weights(layer: EncoderLayer) -> SiglipWeights:
    attention = layer.self_attn
    dtype = attention.q_proj.weight.dtype
    parts = {
        name: _behind(layer.layer_norm1, projection.weight, projection.bias)
        for name, projection in (("q", attention.q_proj), ("k", attention.k_proj), ("v", attention.v_proj))
    }
    scale = attention.head_dim**-0.5
    values_bias = parts["v"][1]
    bias = torch.cat([parts["q"][1] * scale, torch.zeros_like(values_bias), torch.zeros_like(values_bias)])
    fc1, fc1_bias = _behind(layer.layer_norm2, layer.mlp.fc1.weight, layer.mlp.fc1.bias)
    return SiglipWeights(
        qkv=_transposed(torch.cat([parts["q"][0] * scale, parts["k"][0], parts["v"][0]]), dtype),
        qkv_bias=bias.to(dtype),
        out=_transposed(attention.out_proj.weight, dtype),
        out_bias=(attention.out_proj.bias.float() + attention.out_proj.weight.float() @ values_bias).to(dtype),
        fc1=_transposed(fc1, dtype),
        fc1_bias=fc1_bias.to(dtype),
        fc2=_transposed(layer.mlp.fc2.weight, dtype),
        fc2_bias=layer.mlp.fc2.bias.to(dtype),
    )


def _behind(norm: nn.LayerNorm, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A linear layer behind a layer norm, in float32: it takes over the norm's scale and shift."""
    weight = weight.float()
    return weight * norm.weight.float(), bias.float() + weight @ norm.bias.float()


def _paired(weight: Tensor, head_dim: int) -> Tensor:
    """(heads * head_dim, in): within each head, row i and row i + head_dim / 2 become neighbours."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _transposed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.t().to(dtype).contiguous()
