"""Is a robot that changed back at an earlier body? Then a token that was in use before explains what is seen since.

Such a token needs no search: few transitions tell it from the one in use, long before there are enough to find a new
one, and it was judged on its own when it was accepted. So inverse dynamics, which guards against newcomers that only
predict looks better, is not asked of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from selfalign_core.alignment.budget import Budget
from selfalign_core.alignment.config import AlignConfig
from selfalign_core.alignment.guard import Verdict, judge
from selfalign_core.alignment.scoring import Prepared, Scorer
from selfalign_core.alignment.trusted import Trusted
from selfalign_core.alignment.watch import RunningLoss, drift, running_loss


@dataclass(frozen=True)
class Return:
    """``token`` (T, W), in use before, and why it is to be in use again."""

    token: Tensor
    verdict: Verdict


def find_return(
    scorer: Scorer,
    data: Prepared,
    spans: np.ndarray,
    current: Tensor,
    earlier: Sequence[Tensor],
    baseline: RunningLoss,
    trusted: Trusted,
    references: Tensor,
    config: AlignConfig,
    *,
    seed: int,
    budget: Budget,
) -> Return | None:
    """The one of ``earlier``, tokens (T, W), with the lowest loss on ``data``, if it explains it; else None.

    It explains it if its loss is no drift from ``baseline``, that of ``current`` before the change, and if it is surely
    better than ``current``, by the guard's margin. ``spans`` (B, 2) ns: when each transition, of after the change,
    begins and ends.

    Raises:
        OutOfTimeError: the budget ended before it was known.
    """
    noise = scorer.noise(data, config.watch.draws, seed)
    rows = torch.arange(len(noise.time), device=current.device)
    best = earlier[int(scorer.score(data, noise, torch.stack(list(earlier)), rows, budget.check).mean(1).argmin())]
    running = running_loss(scorer, data, spans, best, references, config.watch, seed=seed, budget=budget)
    if drift(baseline, running, config.watch).fired:
        return None
    guard = config.guard
    verdict = judge(scorer, data, spans, current, best, trusted, guard, seed=seed, budget=budget, inverse=False)
    return Return(best, verdict) if verdict.accepted else None
