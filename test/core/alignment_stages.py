"""The stages of the self-aligner as functions of a policy and a batch, without budgets: what their tests begin with."""

from __future__ import annotations

import torch
from torch import Tensor
from toy_bodies import Trained

from selfalign_core.alignment.budget import Budget
from selfalign_core.alignment.config import AlignConfig
from selfalign_core.alignment.guard import Verdict, judge
from selfalign_core.alignment.identify import identify
from selfalign_core.alignment.overlap import spans
from selfalign_core.alignment.refine import refine
from selfalign_core.alignment.scoring import Scorer
from selfalign_core.alignment.trusted import Trusted
from selfalign_core.model.pi0 import AlignmentLosses
from selfalign_core.policy import Policy
from selfalign_core.robot.types import TransitionBatch

WEIGHTS = (0.3, 1.0, 3.0)
CONFIG = AlignConfig().without_budgets()
UNSEEN = [(0.5, 0.0), (-0.4, -0.6)]


def no_limit() -> Budget:
    return Budget(None, lambda: 0.0)


def ticking(limit_ms: float) -> Budget:
    """On a clock that moves only when it is read, 30 ms each time."""
    ticks = iter(range(10**6))
    return Budget(limit_ms, lambda: 0.03 * next(ticks))


def token_of(toy: Trained, row: int) -> Tensor:
    return torch.from_numpy(toy.bank[row].copy())


def find(policy: Policy, batch: TransitionBatch, current: Tensor, *, budget: Budget | None = None, **options):
    scorer = Scorer(policy, WEIGHTS)
    options = {"seed": 0, "config": CONFIG.identify, **options}
    return identify(scorer, scorer.prepare(batch), current, Trusted.of(policy), budget=budget or no_limit(), **options)


def improve(policy: Policy, batch: TransitionBatch, start: Tensor, config: AlignConfig = CONFIG, **options):
    scorer = Scorer(policy, WEIGHTS)
    options = {"seed": 0, "budget": no_limit(), **options}
    return refine(scorer, scorer.prepare(batch), start, Trusted.of(policy), config, **options)


def verdict_of(policy: Policy, batch: TransitionBatch, current: Tensor, shadow: Tensor, **options) -> Verdict:
    scorer = Scorer(policy, WEIGHTS)
    options = {"seed": 0, "budget": no_limit(), "config": CONFIG.guard, **options}
    return judge(
        scorer,
        scorer.prepare(batch),
        spans(batch),
        current,
        shadow,
        Trusted.of(policy),
        options.pop("config"),
        **options,
    )


def fake_losses(per_sample) -> object:
    """In place of ``Pi0.alignment_losses``: an inverse dynamics loss ``per_sample(state (B, D), token) -> (B,)``."""

    def losses(_prefix, transitions, _noise, *, token, dim_mask, **_):
        value = per_sample(
            transitions.state, token if token.ndim == 3 else token.expand(len(transitions.state), -1, -1)
        )
        return AlignmentLosses(torch.zeros_like(value), torch.zeros_like(value), value)

    return losses
