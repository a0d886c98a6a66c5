"""The tokens that training vouches for, and how far from them a token may go.

Trusted are the bank's entries, their mean and the token the policy was shipped with. Tokens that alignment accepted
are not: however often it commits, it stays within reach of what was trained. Knows neither losses nor transitions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from selfalign_core.alignment.config import Guard
from selfalign_core.policy import Policy
from selfalign_core.policy.bank import bank_mean, bank_spread, principal_directions

DEPLOYED, MEAN = "deployed", "mean of the bank"


@dataclass(frozen=True)
class Trusted:
    """``tokens`` (C, T, W) with ``names``; ``bank`` (E, T, W), possibly of no entry, is the rows among them.

    ``spread``: root mean square distance of the bank's entries from their mean, 1 without at least two of them.
    """

    tokens: Tensor
    names: tuple[str, ...]
    bank: Tensor
    spread: float

    @classmethod
    def of(cls, policy: Policy) -> Trusted:
        """Those of ``policy``; equal tokens once, under the bank's key if it has one.

        A checkpoint has the bank's rows; mean, spread and :meth:`directions` are computed from them.
        """
        assert policy.e_token is not None  # Scorer refuses a policy without one
        deployed = torch.from_numpy(policy.e_token.data).to(policy.dim_mask.device)
        keys = policy.config.bank_keys
        bank = deployed[None][:0] if policy.bank is None else policy.bank[: len(keys)].detach().to(deployed).float()
        named = dict(zip(keys, bank, strict=True)) | {DEPLOYED: deployed}
        if len(bank) > 1:
            named[MEAN] = bank_mean(bank)
        once: dict[bytes, tuple[str, Tensor]] = {}
        for name, token in named.items():
            once.setdefault(token.cpu().numpy().tobytes(), (name, token))
        names, tokens = zip(*once.values(), strict=True)
        spread = bank_spread(bank) if len(bank) > 1 else 0.0
        return cls(torch.stack(tokens), names, bank, spread or 1.0)

    def directions(self, count: int) -> tuple[Tensor, Tensor]:
        """Up to ``count`` principal directions (k, T * W) of the bank and its standard deviations (k,) along them."""
        if len(self.bank) < 2:
            return self.bank.new_zeros(0, self.tokens[0].numel()), self.bank.new_zeros(0)
        directions, scales = principal_directions(self.bank.cpu(), count)
        real = scales > 1e-6 * self.spread
        return directions[real].to(self.bank), scales[real].to(self.bank)

    def nearest(self, token: Tensor) -> tuple[int, float]:
        """Row of the trusted token nearest to ``token`` (T, W), and the distance (root mean square, in spreads)."""
        distances = (self.tokens - token).square().mean((1, 2)).sqrt() / self.spread
        row = int(distances.argmin())
        return row, float(distances[row])

    def bounded(self, token: Tensor, limits: Guard) -> Tensor:
        """``token`` (T, W) pulled back to within ``limits`` of the nearest trusted token and of the norm."""
        row, distance = self.nearest(token)
        if distance > limits.trust_radius:
            token = self.tokens[row] + (token - self.tokens[row]) * (limits.trust_radius / distance)
        size = rms(token)
        return token * (self.norm_limit(limits) / size.clamp(min=self.norm_limit(limits)))

    def norm_limit(self, limits: Guard) -> float:
        """Largest root mean square of a token vector: ``limits.max_norm``, or that of the largest trusted one."""
        return max(limits.max_norm, float(rms(self.tokens).max()))

    def complaint(self, token: Tensor, limits: Guard) -> str:
        """What is wrong with ``token`` (T, W), "" if it lies within ``limits``."""
        if not bool(torch.isfinite(token).all()):
            return "token: found NaN or infinity, expected finite numbers"
        size, largest = float(rms(token).max()), self.norm_limit(limits)
        if size > largest * (1 + 1e-4):
            return f"token's norm: found {size:.3g} (root mean square), expected at most {largest:.3g}"
        row, distance = self.nearest(token)
        if distance > limits.trust_radius * (1 + 1e-4):
            return (
                f"token's distance from {self.names[row]!r}, the nearest trusted token: found {distance:.3g} spreads, "
                f"expected at most {limits.trust_radius:.3g}"
            )
        return ""


def rms(token: Tensor) -> Tensor:
    """(..., T, W) → (..., T, 1) root mean square of each token vector."""
    return token.square().mean(-1, keepdim=True).sqrt()
