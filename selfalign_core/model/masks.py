"""Attention masks and token positions. Pure functions on boolean tensors; they know nothing of the model.

``True`` always means "may attend" or "is a real token".
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK_FILL = -2.3819763e38
"""Added to masked attention scores. Finite, so a fully masked (padding) row is uniform and never NaN (as openpi)."""


def make_att_2d_masks(pad_masks: Tensor, att_masks: Tensor) -> Tensor:
    """Block mask from per-token flags, the rule of big_vision that openpi uses.

    A query sees a key if the key's block number (running sum of the flags) is not larger than its own and both
    tokens are real. Patterns of ``att_masks``::

        [1 1 1 1 1 1]          causal
        [0 0 0 1 1 1]          prefix-lm: three tokens see each other, then causal
        [1 0 1 0 1 0 0 1 0 0]  causal between four blocks, full attention inside each

    Args:
        pad_masks: (B, N) bool, True for a real token.
        att_masks: (B, N) bool or number, 1 where a new block starts.

    Returns:
        (B, N, N) bool, [batch, query, key].
    """
    for name, mask in (("pad_masks", pad_masks), ("att_masks", att_masks)):
        if mask.ndim != 2:
            raise ValueError(f"{name}: found {mask.ndim} dimensions, expected 2 (batch, tokens)")
    if pad_masks.shape != att_masks.shape:
        raise ValueError(
            f"att_masks: found shape {tuple(att_masks.shape)}, expected pad_masks' {tuple(pad_masks.shape)}"
        )
    block = torch.cumsum(att_masks.to(torch.int64), dim=1)
    visible = block[:, None, :] <= block[:, :, None]
    return visible & pad_masks[:, None, :] & pad_masks[:, :, None]


def make_position_ids(pad_masks: Tensor) -> Tensor:
    """(B, N) positions for the rotary embedding: the running count of real tokens minus one.

    Padding repeats the previous position; leading padding gets -1.
    """
    return torch.cumsum(pad_masks.to(torch.int64), dim=1) - 1


def block_starts(*lengths: int, device: torch.device | str | None = None) -> Tensor:
    """(sum(lengths),) bool: True at the first token of each block; a block of length 0 adds nothing."""
    return torch.tensor([i == 0 for n in lengths for i in range(n)], dtype=torch.bool, device=device)


def prefix_att_2d_mask(pad_masks: Tensor, image_length: int, *, restrict_image_to_language: bool) -> Tensor:
    """(B, P, P) mask of the prefix: every real token sees every real token.

    With ``restrict_image_to_language`` the first ``image_length`` tokens do not see the prompt, so their keys and
    values are those of an images-only prefix.
    """
    mask = make_att_2d_masks(pad_masks, torch.zeros_like(pad_masks))
    if restrict_image_to_language:
        mask = mask.clone()
        mask[:, :image_length, image_length:] = False
    return mask


def suffix_over_prefix_mask(prefix_pad_masks: Tensor, suffix_pad_masks: Tensor, suffix_mask: Tensor) -> Tensor:
    """(B, S, P + S) mask of a suffix: each row sees the real prefix tokens, then ``suffix_mask`` (B, S, S)."""
    to_prefix = prefix_pad_masks[:, None, :].expand(-1, suffix_pad_masks.shape[1], -1)
    return torch.cat([to_prefix, suffix_mask], dim=2)


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, Q, K) float mask for attention: 0 where ``mask`` (B, Q, K) is True, ``MASK_FILL`` elsewhere."""
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask[:, None], zero, torch.full_like(zero, MASK_FILL))
