"""Whether the robot is back at an earlier body: a token that was in use before against the best one of all.

The best of a thousand tokens fits the transitions at hand partly by chance; one that the robot has worked with was
judged on others. So it goes first, as it is, unless the newcomer is surely better on newer transitions, by the guard's
margin.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from selfalign_core.alignment.budget import Budget, OutOfTimeError
from selfalign_core.alignment.config import Guard
from selfalign_core.alignment.overlap import estimate
from selfalign_core.alignment.scoring import Prepared, Scorer


def earlier_that_fits(
    scorer: Scorer,
    fit: Prepared,
    guard: Prepared,
    spans: np.ndarray,
    current: Tensor,
    newcomer: Tensor,
    earlier: Sequence[Tensor],
    config: Guard,
    *,
    draws: int,
    seed: int,
    budget: Budget,
) -> int | None:
    """Which of ``earlier``, tokens (T, W), goes before ``newcomer``; None if none does, or the budget ends before.

    It is the one with the lowest loss on ``fit`` (``draws`` noise draws), if that of ``current`` is higher there and
    that of ``newcomer`` is not surely lower on ``guard``, whose transitions lie at ``spans`` (B, 2) ns.
    """
    others = [index for index, token in enumerate(earlier) if not torch.equal(token, current)]
    if not others:
        return None

    def losses(data: Prepared, draws: int, tokens: Sequence[Tensor]) -> Tensor:
        """(tokens, transitions), the mean over the draws."""
        noise, rows = scorer.noise(data, draws, seed), torch.arange(draws * len(data), device=current.device)
        scores = scorer.score(data, noise, torch.stack(list(tokens)), rows, budget.check)
        return scores.unflatten(1, (draws, -1)).mean(1)

    try:
        best = int(losses(fit, draws, [current, *(earlier[index] for index in others)]).mean(1).argmin())
        if best == 0:
            return None
        index = others[best - 1]
        old, new = losses(guard, config.draws, [earlier[index], newcomer]).double().cpu().numpy()
    except OutOfTimeError:
        return None
    difference = estimate(2 * (new - old) / (new + old), spans)
    return None if difference.upper(config.sigmas) < -config.margin else index
