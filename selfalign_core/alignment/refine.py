"""A shadow of the token, improved by gradient: along the bank's principal directions, or in every element.

Fresh noise in every step. After every step the shadow is pulled back within the guard's bounds, and along each
direction within the bank's cloud: too large a step leaves what was trained, and there the self-supervised losses look
fine while the actions get worse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from selfalign_core.alignment.budget import Budget
from selfalign_core.alignment.config import AlignConfig
from selfalign_core.alignment.scoring import Prepared, Scorer
from selfalign_core.alignment.trusted import Trusted

_BISECTIONS = 12


@dataclass(frozen=True)
class Refinement:
    """``token`` (T, W) after ``steps`` steps (the start after 0), the last gradient's norm, and why it ended early."""

    token: Tensor
    steps: int
    gradient_norm: float
    note: str


class Subspace:
    """Tokens ``start + (z * scales) @ directions``; z is in standard deviations of the bank."""

    def __init__(self, start: Tensor, trusted: Trusted, config: AlignConfig):
        self._start, self._trusted, self._limits = start, trusted, config.guard
        self._directions, self._scales = trusted.directions(config.refine.directions)
        self._centre = self._coordinates(start - trusted.bank.mean(0))
        # A start beyond the cloud may stay where it is but not go farther.
        self._limit = self._centre.abs().clamp(min=config.refine.max_deviation)
        self.start = torch.zeros_like(self._scales)

    def token(self, z: Tensor) -> Tensor:
        """(k,) → (T, W)."""
        return self._start + ((z * self._scales) @ self._directions).reshape(self._start.shape)

    def bounded(self, z: Tensor) -> Tensor:
        """``z`` within the cloud, and shortened until its token is within the guard's bounds."""
        z = (self._centre + z).clamp(-self._limit, self._limit) - self._centre
        if not self._trusted.complaint(self.token(z), self._limits):
            return z
        inside, outside = 0.0, 1.0
        for _ in range(_BISECTIONS):
            middle = (inside + outside) / 2
            if self._trusted.complaint(self.token(middle * z), self._limits):
                outside = middle
            else:
                inside = middle
        return inside * z

    def _coordinates(self, difference: Tensor) -> Tensor:
        return self._directions @ difference.flatten() / self._scales


class Whole:
    """Every element of the token is free."""

    def __init__(self, start: Tensor, trusted: Trusted, config: AlignConfig):
        self._trusted, self._limits = trusted, config.guard
        self.start = start

    def token(self, z: Tensor) -> Tensor:
        return z

    def bounded(self, z: Tensor) -> Tensor:
        return self._trusted.bounded(z, self._limits)


class Adam:
    """Adam of one tensor (arXiv 1412.6980), bit for bit that of ``torch.optim``, which would load torch's compiler in a
    node that compiles nothing.
    """

    BETAS = (0.9, 0.999)
    EPS = 1e-8

    def __init__(self, start: Tensor):
        self.value = start.clone()
        self._mean, self._square, self._steps = torch.zeros_like(start), torch.zeros_like(start), 0

    def step(self, gradient: Tensor, learning_rate: float) -> None:
        """One step of :attr:`value`, in place."""
        (beta_1, beta_2), self._steps = self.BETAS, self._steps + 1
        self._mean.lerp_(gradient, 1 - beta_1)
        self._square.mul_(beta_2).addcmul_(gradient, gradient, value=1 - beta_2)
        scale = (self._square.sqrt() / math.sqrt(1 - beta_2**self._steps)).add_(self.EPS)
        self.value.addcdiv_(self._mean, scale, value=-learning_rate / (1 - beta_1**self._steps))


def refine(
    scorer: Scorer, data: Prepared, start: Tensor, trusted: Trusted, config: AlignConfig, *, seed: int, budget: Budget
) -> Refinement:
    """Adam from ``start`` (T, W) on ``data``, as ``config.mode`` says; what it has when the budget ends it."""
    if config.mode == "bank":
        return Refinement(start, 0, 0.0, "")
    settings = config.refine
    free = Whole if config.mode == "full" or len(trusted.bank) < 2 else Subspace
    space = free(start, trusted, config)
    if not space.start.numel():
        return Refinement(start, 0, 0.0, "the bank's entries are all equal: no direction to go")
    adam = Adam(space.start)
    good, steps, gradient_norm, note = space.start, 0, 0.0, ""
    while steps < settings.steps and not (note := budget.spent()):
        z = adam.value.clone().requires_grad_(True)
        loss = scorer.weighted(
            scorer.losses(data, scorer.noise(data, settings.draws, seed + steps), space.token(z))
        ).mean()
        (gradient,) = torch.autograd.grad(loss, [z])
        gradient_norm = float(gradient.norm())
        if not math.isfinite(gradient_norm):
            note = f"gradient became {gradient_norm}"
            break
        adam.step(gradient, settings.learning_rate * (1 - steps / settings.steps))
        adam.value = space.bounded(adam.value)
        good, steps = adam.value.clone(), steps + 1
    return Refinement(space.token(good) if steps else start, steps, gradient_norm, note)
