"""May a shadow replace the current token? Bounds first, then a paired test on transitions newer than the fit's.

Both tokens meet the same transitions with the same noise, so only what the token changes is left in the difference.
The difference counts relative to the two losses' mean: one transition on which everything is large decides nothing, and
a shift that is worth much in a few and something in all of them is not lost in their unequal sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from selfalign_core.alignment.budget import Budget, OutOfTimeError
from selfalign_core.alignment.config import Guard
from selfalign_core.alignment.overlap import estimate
from selfalign_core.alignment.scoring import Prepared, Scorer
from selfalign_core.alignment.trusted import Trusted


@dataclass(frozen=True)
class Verdict:
    """``reason`` in words; ``mean`` and ``stderr`` of the relative difference of the weighted losses, -2 to 2.

    Per transition ``2 (after - before) / (after + before)``, ``before`` of the current token and ``after`` of the
    shadow, whose means over transitions are given too. ``effective_count``: of independent transitions, see
    :mod:`selfalign_core.alignment.overlap`.
    """

    accepted: bool
    reason: str
    mean: float = math.nan
    stderr: float = math.inf
    before: float = math.nan
    after: float = math.nan
    effective_count: float = 0.0


def judge(
    scorer: Scorer,
    data: Prepared,
    spans: np.ndarray,
    current: Tensor,
    shadow: Tensor,
    trusted: Trusted,
    config: Guard,
    *,
    seed: int,
    budget: Budget,
) -> Verdict:
    """Accept ``shadow`` (T, W) in place of ``current`` only if it is within bounds and surely better on ``data``.

    ``spans`` (B, 2) ns: when each transition begins and ends. A spent budget means fewer noise draws; before the
    first is done it is a refusal.
    """
    if torch.equal(shadow, current):
        return Verdict(False, "refused: nothing found that differs from the current token")
    if complaint := trusted.complaint(shadow, config):
        return Verdict(False, f"refused: {complaint}")
    noise = scorer.noise(data, config.draws, seed)
    both, losses, note = torch.stack([current, shadow]), [], ""
    try:
        for draw in torch.randperm(config.draws, generator=torch.Generator().manual_seed(seed)).tolist():
            rows = torch.arange(draw * len(data), (draw + 1) * len(data), device=current.device)
            losses.append(scorer.score(data, noise, both, rows, budget.check))
    except OutOfTimeError as why:
        note = str(why)
    if not losses:
        return Verdict(False, f"refused: not judged, {note} before one of {config.draws} draws")
    before, after = torch.stack(losses).mean(0).double().cpu().numpy()
    difference = estimate(2 * (after - before) / (after + before), spans)
    upper = difference.upper(config.sigmas)
    accepted = math.isfinite(upper) and upper < -config.margin
    words = f"loss {difference.mean:+.1%} ± {difference.stderr:.1%} (standard error), upper bound {upper:+.1%}"
    limit = f"< {-config.margin:.0%}"
    reason = f"accepted: {words} {limit}" if accepted else f"refused: {words}, expected {limit}"
    if note:
        reason += f" ({note} after {len(losses)} of {config.draws} draws)"
    return Verdict(
        accepted=accepted,
        reason=reason,
        mean=difference.mean,
        stderr=difference.stderr,
        before=float(before.mean()),
        after=float(after.mean()),
        effective_count=difference.effective_count,
    )
