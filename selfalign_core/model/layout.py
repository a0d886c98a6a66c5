"""Layout of the alignment suffix: the one place that knows where each segment lies.

Masks, embeddings and read-outs all take their slices from :class:`AlignmentLayout`; no length is written twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AlignmentLayout:
    """Segments of ``[E] [perception] [dynamics: actions, next obs] [inverse dynamics: next obs, actions]``.

    Args:
        e_tokens: number of E-Token vectors, 0 without E-Token.
        actions: executed actions per transition.
        next_obs: next-observation feature tokens, all cameras together.
    """

    e_tokens: int
    actions: int
    next_obs: int
    perception_tokens: int = 1

    def __post_init__(self) -> None:
        for name, least in (("e_tokens", 0), ("actions", 1), ("next_obs", 1), ("perception_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"AlignmentLayout.{name}: found {getattr(self, name)}, expected >= {least}")

    @property
    def e(self) -> slice:
        return slice(0, self.e_tokens)

    @property
    def perception(self) -> slice:
        return slice(self.e.stop, self.e.stop + self.perception_tokens)

    @property
    def dynamics_actions(self) -> slice:
        """Clean executed actions."""
        return slice(self.perception.stop, self.perception.stop + self.actions)

    @property
    def dynamics_next_obs(self) -> slice:
        """Noisy next-observation features; their velocity is read out here."""
        return slice(self.dynamics_actions.stop, self.dynamics_actions.stop + self.next_obs)

    @property
    def dynamics(self) -> slice:
        return slice(self.dynamics_actions.start, self.dynamics_next_obs.stop)

    @property
    def inverse_next_obs(self) -> slice:
        """Clean next-observation features."""
        return slice(self.dynamics.stop, self.dynamics.stop + self.next_obs)

    @property
    def inverse_actions(self) -> slice:
        """Noisy executed actions; their velocity is read out here."""
        return slice(self.inverse_next_obs.stop, self.inverse_next_obs.stop + self.actions)

    @property
    def inverse(self) -> slice:
        return slice(self.inverse_next_obs.start, self.inverse_actions.stop)

    @property
    def length(self) -> int:
        return self.inverse.stop

    def slots(self, *, dynamics: bool = True, device: torch.device | str | None = None) -> Tensor:
        """(S,) int64: the slots in ascending order, those of dynamics only if wanted."""
        slots = torch.arange(self.length, device=device)
        return slots if dynamics else torch.cat([slots[: self.dynamics.start], slots[self.dynamics.stop :]])

    def read_out(self, *, dynamics: bool = True) -> tuple[slice, ...]:
        """Where velocities are read: perception, next-observation features of dynamics if wanted, actions of inverse
        dynamics.
        """
        return self.perception, *([self.dynamics_next_obs] if dynamics else []), self.inverse_actions

    def assemble(
        self,
        *,
        e: Tensor | None,
        perception: Tensor,
        dynamics_actions: Tensor,
        dynamics_next_obs: Tensor,
        inverse_next_obs: Tensor,
        inverse_actions: Tensor,
    ) -> Tensor:
        """(B, length, width) suffix from its segments, each (B, tokens, width); ``e`` is None without E-Token."""
        parts = [
            *([] if e is None else [("e", e)]),
            ("perception", perception),
            ("dynamics_actions", dynamics_actions),
            ("dynamics_next_obs", dynamics_next_obs),
            ("inverse_next_obs", inverse_next_obs),
            ("inverse_actions", inverse_actions),
        ]
        begin = 0
        for name, tokens in parts:
            place = getattr(self, name)
            if (begin, begin + tokens.shape[1]) != (place.start, place.stop):
                raise ValueError(f"{name}: found {tokens.shape[1]} tokens at {begin}, expected {place}")
            begin = place.stop
        return torch.cat([tokens for _, tokens in parts], dim=1)

    def attention_mask(self, device: torch.device | str | None = None) -> Tensor:
        """(length, length) bool, [query, key], of the suffix alone.

        Everyone sees E; perception is seen by both task blocks and sees neither; the two task blocks are
        invisible to each other, so no clean label of one can travel to the other through any number of layers.
        """
        mask = torch.zeros(self.length, self.length, dtype=torch.bool, device=device)
        mask[:, self.e] = True
        mask[self.perception.start :, self.perception] = True
        mask[self.dynamics, self.dynamics] = True
        mask[self.inverse, self.inverse] = True
        return mask
