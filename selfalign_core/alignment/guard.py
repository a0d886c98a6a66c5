"""May a shadow replace the current token? Bounds first, then a paired test on transitions newer than the fit's.

Both tokens meet the same transitions with the same noise, so only what the token changes is left in the difference.
The difference counts relative to the two losses' mean, and each transition by that mean: where there is little to
explain, a large relative difference is chance. But by no more than a few times what is usual: one transition on which
everything is large decides nothing.

Of the three losses, inverse dynamics asks what the action expert asks: which actions lead from here to there. It must
gain much by itself. A token that only predicts better what will be seen is worth nothing to the robot, and most that
were let in for that made its actions worse. Where the actions depend on it, the gain is large in a few transitions and
none in the others, so that it is never as sure as that of all losses together: its size is the better sign.
It is asked where the current token may be right. Of two that both are new, the one that sees better is the better one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from selfalign_core.alignment.budget import Budget, OutOfTimeError
from selfalign_core.alignment.config import Guard
from selfalign_core.alignment.overlap import Estimate, estimate
from selfalign_core.alignment.scoring import Prepared, Scorer
from selfalign_core.alignment.trusted import Trusted

_MOST_WEIGHT = 3.0
"""Of one transition, times the median's."""


@dataclass(frozen=True)
class Verdict:
    """``reason`` in words; ``mean`` and ``stderr`` of the relative difference of the weighted losses, -2 to 2.

    Per transition ``2 (after - before) / (after + before)``, ``before`` of the current token and ``after`` of the
    shadow, whose means over transitions are given too. ``promising``: every loss that was tested gains as much as it
    has to in the mean, surely or not. ``sees_better``: all losses together pass their test; if it is a refusal, inverse
    dynamics alone was missing. ``same_actions``: inverse dynamics surely gains less than it has to, so the robot does
    with its actions what the current token expects. ``effective_count``: of independent transitions, see
    :mod:`selfalign_core.alignment.overlap`.
    """

    accepted: bool
    reason: str
    mean: float = math.nan
    stderr: float = math.inf
    before: float = math.nan
    after: float = math.nan
    promising: bool = False
    sees_better: bool = False
    same_actions: bool = False
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
    inverse: bool = True,
) -> Verdict:
    """Accept ``shadow`` (T, W) in place of ``current`` only if it is within bounds and surely better on ``data``.

    ``spans`` (B, 2) ns: when each transition begins and ends. ``inverse``: whether inverse dynamics has to gain by
    itself, if it has any weight. A spent budget means fewer noise draws; before the first is done it is a refusal.
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
            losses.append(scorer.each(data, noise, both, rows, budget.check))
    except OutOfTimeError as why:
        note = str(why)
    if not losses:
        return Verdict(False, f"refused: not judged, {note} before one of {config.draws} draws")
    before, after = _means([scorer.weighted(loss) for loss in losses])
    difference = _relative(before, after, spans)
    tests, same_actions = [_Test("loss", difference, 0.0, config.sigmas, config.margin)], False
    if inverse and scorer.weights[2] > 0:
        of_actions = _relative(*_means([loss.inverse_dynamics for loss in losses]), spans)
        tests.append(_Test("inverse dynamics", of_actions, config.inverse_margin, config.sigmas / 2, 0.0))
        same_actions = of_actions.lower(config.sigmas) > -config.inverse_margin
    failed = [test for test in tests if not test.passed]
    reason = "; ".join(test.words for test in failed or tests)
    if note:
        reason += f" ({note} after {len(losses)} of {config.draws} draws)"
    return Verdict(
        accepted=not failed,
        reason=f"{'refused' if failed else 'accepted'}: {reason}",
        mean=difference.mean,
        stderr=difference.stderr,
        before=float(before.mean()),
        after=float(after.mean()),
        promising=all(test.promising for test in tests),
        sees_better=tests[0].passed,
        same_actions=same_actions,
        effective_count=difference.effective_count,
    )


@dataclass(frozen=True)
class _Test:
    """Of a relative difference: its mean is to be below ``-least``, its upper bound at ``sigmas`` below ``-margin``."""

    name: str
    difference: Estimate
    least: float
    sigmas: float
    margin: float

    @property
    def _upper(self) -> float:
        return self.difference.upper(self.sigmas)

    @property
    def promising(self) -> bool:
        return self.difference.mean < -max(self.least, self.margin)

    @property
    def passed(self) -> bool:
        return self.promising and math.isfinite(self._upper) and self._upper < -self.margin

    @property
    def words(self) -> str:
        found, least = self.difference, f"< {-self.least:.0%}, upper bound " if self.least else ""
        return (
            f"{self.name} {found.mean:+.1%} ± {found.stderr:.1%} (standard error), upper bound {self._upper:+.1%}, "
            f"expected {least}< {0 - self.margin:.0%}"
        )


def _means(draws: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """(B,) of the current token and (B,) of the shadow, from (2, B) per draw."""
    before, after = torch.stack(draws).mean(0).double().cpu().numpy()
    return before, after


def _relative(before: np.ndarray, after: np.ndarray, spans: np.ndarray) -> Estimate:
    mean = (before + after) / 2
    return estimate((after - before) / mean, spans, np.minimum(mean, _MOST_WEIGHT * np.median(mean)))
