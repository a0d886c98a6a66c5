"""The bank: one E-Token per embodiment, so that the experts have to learn what the token says.

With one constant token there is nothing to read in it and alignment does nothing. A robot still has exactly one
``peft_prefix_token``; a policy starts with the bank's mean and carries the bank along. Knows nothing of losses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfalign_core.errors import InputError

SHARED_KEY = "shared"
"""Key of the only row of a bank that all embodiments share."""

MEAN_ROW = -1
"""In place of a row: the mean of the used rows, for a body that has no token."""


class TokenBank(nn.Module):
    """``weight`` (capacity, tokens, width), rows named by ``keys``; rows beyond the keys are free.

    Rows start normal with standard deviation ``init_std``, each from ``seed`` and its number alone, so a larger
    capacity changes no other row.
    """

    def __init__(
        self,
        keys: Sequence[str],
        *,
        tokens: int,
        width: int,
        capacity: int | None = None,
        init_std: float = 1.0,
        seed: int = 0,
    ):
        super().__init__()
        capacity = len(keys) if capacity is None else capacity
        if not keys or len(set(keys)) != len(keys):
            raise InputError(f"bank: found keys {list(keys)}, expected at least one, and each once")
        if len(keys) > capacity:
            raise InputError(f"bank: found {len(keys)} keys, expected at most its capacity of {capacity}")
        self._keys = list(keys)
        rows = [
            torch.randn(tokens, width, generator=torch.Generator().manual_seed((seed << 20) + row))
            for row in range(capacity)
        ]
        self.weight = nn.Parameter(torch.stack(rows) * init_std)

    @property
    def keys(self) -> tuple[str, ...]:
        """Embodiment of each used row."""
        return tuple(self._keys)

    @property
    def capacity(self) -> int:
        return self.weight.shape[0]

    def row(self, key: str) -> int:
        """Row of ``key``; :class:`InputError` if the bank has none."""
        if key not in self._keys:
            raise InputError(f"bank: found no token of {key!r}, expected one of {self._keys}")
        return self._keys.index(key)

    def forward(self, rows: Tensor) -> Tensor:
        """Tokens (B, tokens, width) of ``rows`` (B,) int64; the mean, without gradient, for ``MEAN_ROW``."""
        # An embedding's backward is deterministic on the CPU, that of indexing is not.
        tokens = F.embedding(rows.clamp(min=0), self.weight.flatten(1)).unflatten(1, self.weight.shape[1:])
        return torch.where((rows == MEAN_ROW)[:, None, None], self.mean(), tokens)

    def used(self) -> Tensor:
        """The rows that have a key, (keys, tokens, width), without gradient."""
        return self.weight.detach()[: len(self._keys)]

    def mean(self) -> Tensor:
        return bank_mean(self.used())

    def spread(self) -> float:
        return bank_spread(self.used())


def bank_mean(bank: Tensor) -> Tensor:
    """(tokens, width) mean of the used rows ``bank`` (keys, tokens, width): the token a new robot starts with."""
    return bank.mean(0)


def bank_spread(bank: Tensor) -> float:
    """Root mean square distance per element of the used rows from their mean; 0 if all bodies have one token."""
    return float((bank - bank.mean(0)).square().mean().sqrt())


def principal_directions(bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` directions in which the used rows ``bank`` (keys, tokens, width) differ most.

    Returns:
        directions (k, tokens * width), orthonormal, largest first, and scales (k,), the standard deviation of the rows
        along each: ``mean + coefficients * scales @ directions`` with coefficients of unit variance looks like a row.
        There are at most ``keys - 1`` directions; fewer than ``k`` are returned then.
    """
    flat = bank.detach().double().flatten(1)
    k = min(k, len(flat) - 1, flat.shape[1])
    if k <= 0:
        return flat.new_zeros(0, flat.shape[1]).float(), flat.new_zeros(0).float()
    _, singular, directions = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    directions = directions[:k]
    # A direction's sign is arbitrary; its largest element is made positive.
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return (directions * largest.sign()).float(), (singular[:k] / (len(flat) - 1) ** 0.5).float()
