"""Layers of the fast path on fused weights. Pure functions, and slots: the places of a run's tokens in the cache.

All tokens of a run are rows of one matrix (batch 1), all heads share one key per token (multi-query attention, as in
every π0), so attention is two matrix products over (tokens * heads) rows: no transposition, no copy of a head.

A slot writes keys and values in place. :class:`Slot` does it with complex products on views made beforehand, which
costs a CPU the least; :class:`PlainSlot` has real numbers, any dtype and no view made beforehand, which
``torch.compile`` wants. Knows nothing of images, prompts or time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from selfalign_core.model.fast.weights import GemmaWeights, SiglipWeights
from selfalign_core.model.gemma import ROPE_BASE

_LARGE = 2**20
"""Scores from which attention that never stores them is the better one."""


@dataclass(frozen=True)
class Modulation:
    """Scale (with the 1 and sqrt(width)), shift and gate of an adaptive norm, each (1 or rows, width)."""

    scale: Tensor
    shift: Tensor
    gate: Tensor


def normalised(x: Tensor, floor: Tensor, modulation: Modulation | None = None) -> Tensor:
    """(rows, width) divided by ``|x|``, in x's dtype; what is left of the norm is in the weights or ``modulation``."""
    normed = x / torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).hypot_(floor)
    if modulation is not None:
        normed = torch.addcmul(modulation.shift, normed, modulation.scale)
    return normed if normed.dtype == x.dtype else normed.to(x.dtype)


def plus(x: Tensor, branch: Tensor, weight: Tensor, modulation: Modulation | None) -> Tensor:
    """``x + gate * (branch @ weight)``."""
    if modulation is None:
        return torch.addmm(x, branch, weight)
    return torch.addcmul(x, torch.mm(branch, weight), modulation.gate)


def gemma_layer(
    x: Tensor,
    weights: GemmaWeights,
    slot: Slot | PlainSlot,
    floor: Tensor,
    first: Modulation | None = None,
    second: Modulation | None = None,
) -> Tensor:
    """One layer of a Gemma stack: ``x`` (rows, width) → (rows, width)."""
    x = plus(x, slot.attend(slot.project(normalised(x, floor, first), weights.qkv)), weights.out, first)
    return plus(x, slot.gated(normalised(x, floor, second), weights.gate_up), weights.down, second)


def siglip_layer(x: Tensor, weights: SiglipWeights, cameras: int, heads: int, eps: float) -> Tensor:
    """One layer of the vision tower: ``x`` (cameras * patches, width), cameras attend to themselves alone."""
    width = x.shape[1:]
    qkv = torch.addmm(weights.qkv_bias, F.layer_norm(x, width, eps=eps), weights.qkv)
    q, k, v = qkv.view(cameras, -1, 3, heads, width[0] // heads).permute(2, 0, 3, 1, 4).unbind()
    if q.shape[2] * q[..., 0].numel() > _LARGE:
        attended = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    else:
        scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
        attended = torch.bmm(torch.softmax(scores, dim=2), v.flatten(0, 1)).unflatten(0, (cameras, heads))
    x = torch.addmm(x + weights.out_bias, attended.transpose(1, 2).reshape(x.shape), weights.out)
    hidden = torch.addmm(weights.fc1_bias, F.layer_norm(x, width, eps=eps), weights.fc1)
    return torch.addmm(x + weights.fc2_bias, F.gelu(hidden, approximate="tanh"), weights.fc2)


# ------------------------------------------------------------------------------------------------ places in the cache


@dataclass(frozen=True)
class Keys:
    """Keys and values (N, head_dim) of which the first ``count`` are visible, all of them or as ``bias`` says.

    ``bias``: added to the scores, (count,) or (rows, count).
    """

    keys: Tensor
    values: Tensor
    count: int
    bias: Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """Rows ``begin`` to ``end`` of a run see these keys."""

    begin: int
    end: int
    sees: tuple[Keys, ...]


class Rotation:
    """Rotary angles of a run's tokens, base 10000, float32; :meth:`turn` sets their positions in place."""

    def __init__(self, rows: int, head_dim: int, device: torch.device):
        index = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
        self._frequency = 1.0 / (ROPE_BASE ** (index / head_dim))
        self.factors = torch.zeros(rows, 1, head_dim // 2, 2, device=device)

    def turn(self, positions: Tensor) -> None:
        """``positions`` (rows,)."""
        angle = (positions[:, None].float() * self._frequency)[:, None]
        torch.stack([angle.cos(), angle.sin()], dim=-1, out=self.factors)


class Scratch:
    """What one run's layers use one after the other: the fused projections of its rows, and their queries."""

    def __init__(self, rows: int, heads: int, mlp_dim: int, rotation: Rotation):
        head_dim = 2 * rotation.factors.shape[2]
        self.gate_up = rotation.factors.new_empty(rows, 2 * mlp_dim)
        self.gate, self.up = self.gate_up.chunk(2, dim=1)
        self.fused = rotation.factors.new_empty(rows, (heads + 2) * head_dim)
        self.queries = rotation.factors.new_empty(rows * heads, head_dim)
        queries, keys, self.values = self.fused.split([heads * head_dim, head_dim, head_dim], dim=1)
        self.fused_queries, self.fused_keys = _pairs(queries, head_dim), _pairs(keys, head_dim)
        self.turned_queries = _pairs(self.queries.view(rows, -1), head_dim)
        self.factors = torch.view_as_complex(rotation.factors)


class Slot:
    """A run's rows in one layer's ``keys`` and ``values`` (N, head_dim), from row ``begin`` on. float32."""

    def __init__(self, keys: Tensor, values: Tensor, begin: int, groups: Sequence[Rows], heads: int, scratch: Scratch):
        rows, head_dim = len(scratch.fused), keys.shape[1]
        self._scratch, self._heads = scratch, heads
        self._keys = _pairs(keys[begin : begin + rows], head_dim)
        self._values = values[begin : begin + rows]
        self._groups = [(g.begin * heads, g.end * heads, [_views(k, heads) for k in g.sees]) for g in groups]
        self._shape = (rows, heads * head_dim)
        keys, transposed, values, bias = self._groups[0][2][0]
        small = bias is None and len(keys) * rows * heads <= _LARGE
        one = len(self._groups) == 1 and len(self._groups[0][2]) == 1
        self._simple = (transposed, values) if one and small else None

    def project(self, x: Tensor, qkv: Tensor) -> Tensor:
        """Normalised ``x`` (rows, width): own keys and values go to their places; queries (rows * heads, head_dim)."""
        s = self._scratch
        torch.mm(x, qkv, out=s.fused)
        torch.mul(s.fused_queries, s.factors, out=s.turned_queries)
        torch.mul(s.fused_keys, s.factors, out=self._keys)
        self._values.copy_(s.values)
        return s.queries

    def store(self, x: Tensor, kv: Tensor) -> None:
        """Keys and values alone, of a layer whose output nobody reads; ``kv``: the last columns of ``qkv``."""
        keys, values = torch.mm(x, kv).chunk(2, dim=1)
        torch.mul(_pairs(keys, values.shape[1]), self._scratch.factors, out=self._keys)
        self._values.copy_(values)

    def attend(self, queries: Tensor) -> Tensor:
        """(rows * heads, head_dim) → (rows, heads * head_dim)."""
        if self._simple is not None:
            transposed, values = self._simple
            return torch.mm(torch.softmax(torch.mm(queries, transposed), 1), values).view(self._shape)
        return _attended(queries, self._groups, self._heads)

    def gated(self, x: Tensor, gate_up: Tensor) -> Tensor:
        """``gelu(gate) * up``, (rows, mlp_dim)."""
        torch.mm(x, gate_up, out=self._scratch.gate_up)
        return F.gelu(self._scratch.gate, approximate="tanh").mul_(self._scratch.up)


class PlainSlot:
    """The same as :class:`Slot` for any dtype and for ``torch.compile``."""

    def __init__(
        self, keys: Tensor, values: Tensor, begin: int, groups: Sequence[Rows], heads: int, rotation: Rotation
    ):
        self._keys, self._values, self._begin = keys, values, begin
        self._groups, self._heads = tuple(groups), heads
        self._factors = rotation.factors

    def project(self, x: Tensor, qkv: Tensor) -> Tensor:
        fused = torch.mm(x, qkv).unflatten(1, (self._heads + 2, -1))
        end = self._begin + len(x)
        turned = self._turned(fused[:, :-1])
        self._keys[self._begin : end].copy_(turned[:, -1])
        self._values[self._begin : end].copy_(fused[:, -1])
        return turned[:, :-1].reshape(-1, fused.shape[2])

    def store(self, x: Tensor, kv: Tensor) -> None:
        fused = torch.mm(x, kv).unflatten(1, (2, -1))
        end = self._begin + len(x)
        self._keys[self._begin : end].copy_(self._turned(fused[:, :1])[:, 0])
        self._values[self._begin : end].copy_(fused[:, 1])

    def attend(self, queries: Tensor) -> Tensor:
        heads = self._heads
        groups = [(g.begin * heads, g.end * heads, [_views(k, heads) for k in g.sees]) for g in self._groups]
        return _attended(queries, groups, heads)

    def gated(self, x: Tensor, gate_up: Tensor) -> Tensor:
        gate, up = torch.mm(x, gate_up).chunk(2, dim=1)
        return F.gelu(gate, approximate="tanh") * up

    def _turned(self, x: Tensor) -> Tensor:
        """(rows, heads, head_dim) of neighbours that form a pair, rotated."""
        first, second = x.float().unflatten(2, (-1, 2)).unbind(-1)
        cos, sin = self._factors.unbind(-1)
        return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(2).to(x.dtype)


def _pairs(x: Tensor, head_dim: int) -> Tensor:
    """(rows, heads * head_dim) float32 → (rows, heads, head_dim / 2) complex, a view."""
    return torch.view_as_complex(x.unflatten(1, (-1, head_dim // 2, 2)))


_KeyViews = tuple[Tensor, Tensor, Tensor, Tensor | None]


def _views(keys: Keys, heads: int) -> _KeyViews:
    seen = keys.keys[: keys.count]
    bias = keys.bias
    if bias is not None and bias.ndim == 2:  # per token, so the same for its heads
        bias = bias.repeat_interleave(heads, dim=0)
    return seen, seen.t(), keys.values[: keys.count], bias


def _attended(queries: Tensor, groups: Sequence[tuple[int, int, Sequence[_KeyViews]]], heads: int) -> Tensor:
    if len(groups) == 1:
        attended = _attention(queries, groups[0][2])
    else:
        attended = torch.cat([_attention(queries[begin:end], sees) for begin, end, sees in groups])
    return attended.view(len(queries) // heads, -1)


def _attention(queries: Tensor, sees: Sequence[_KeyViews]) -> Tensor:
    if len(sees) == 1:
        keys, transposed, values, bias = sees[0]
        if len(queries) * len(keys) > _LARGE:
            mask = None if bias is None else bias.expand(len(queries), -1)[None, None]
            return F.scaled_dot_product_attention(
                queries[None, None], keys[None, None], values[None, None], attn_mask=mask, scale=1.0
            )[0, 0]
        scores = torch.mm(queries, transposed) if bias is None else torch.addmm(bias, queries, transposed)
        return torch.mm(torch.softmax(scores, dim=1), values)
    each = [torch.mm(queries, t) if b is None else torch.addmm(b, queries, t) for _, t, _, b in sees]
    weights = torch.softmax(torch.cat(each, dim=1), dim=1).split([len(k) for k, *_ in sees], dim=1)
    attended = torch.mm(weights[0], sees[0][2])
    for weight, (_, _, values, _) in zip(weights[1:], sees[1:], strict=True):
        attended = torch.addmm(attended, weight, values)
    return attended
