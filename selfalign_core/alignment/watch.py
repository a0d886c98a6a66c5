"""Has the robot changed? Newer losses of the committed token against those it had when it was judged."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from selfalign_core.alignment.budget import Budget, OutOfTimeError
from selfalign_core.alignment.config import Watch
from selfalign_core.alignment.overlap import Estimate, estimate
from selfalign_core.alignment.scoring import Prepared, Scorer
from selfalign_core.alignment.trusted import Trusted


@dataclass(frozen=True)
class RunningLoss:
    """Means over transitions of a token's log loss: ``plain``, and ``relative`` to the references' (the same without).

    How hard a transition is for any token cancels in ``relative``. ``series``: (B,) the values behind it.
    """

    plain: Estimate
    relative: Estimate
    series: np.ndarray


@dataclass(frozen=True)
class Drift:
    """``z``: how many standard errors the newer losses lie above the baseline; ``fired`` if that is too many.

    ``factor``: newer loss over the baseline's, relative to the references'. If there was a change, ``begin`` is the row
    of the changed robot's first transition, and ``factor_since`` that of those from there on.
    """

    z: float
    factor: float
    fired: bool
    begin: int
    factor_since: float

    @property
    def words(self) -> str:
        since = f", {self.factor_since:.2f} times since it changed" if self.fired else ""
        return f"relative loss {self.factor:.2f} times the baseline's{since}, {self.z:+.1f} standard errors"


def references(trusted: Trusted, count: int) -> Tensor:
    """(R, T, W) up to ``count`` bank entries, evenly spaced over its rows; none from a bank of fewer than two."""
    if len(trusted.bank) < 2 or not count:
        return trusted.bank[:0]
    return trusted.bank[torch.linspace(0, len(trusted.bank) - 1, min(count, len(trusted.bank))).round().long()]


def running_loss(
    scorer: Scorer,
    data: Prepared,
    spans: np.ndarray,
    token: Tensor,
    others: Tensor,
    config: Watch,
    *,
    seed: int,
    budget: Budget,
) -> RunningLoss:
    """The running loss of ``token`` (T, W) on ``data``, against the mean loss of ``others`` (R, T, W) if there are any.

    ``spans`` (B, 2) ns: when each transition begins and ends. A spent budget means fewer draws.

    Raises:
        OutOfTimeError: not one.
    """
    noise = scorer.noise(data, config.draws, seed)
    tokens = torch.cat([token[None], others])
    totals = torch.zeros(len(tokens), len(data), dtype=torch.float64, device=token.device)
    for draw in range(config.draws):
        rows = torch.arange(draw * len(data), (draw + 1) * len(data), device=token.device)
        try:
            totals = totals + scorer.score(data, noise, tokens, rows, budget.check).double()
        except OutOfTimeError:
            if not draw:
                raise
            break
    plain = totals[0].log().cpu().numpy()
    typical = totals[1:].mean(0).log().cpu().numpy() if len(others) else 0.0
    return RunningLoss(estimate(plain, spans), estimate(plain - typical, spans), plain - typical)


def drift(baseline: RunningLoss, newest: RunningLoss, config: Watch) -> Drift:
    """One-sided test of ``newest`` above ``baseline``.

    The relative loss has to rise, and the plain one with it: when the robot merely stands still all tokens become
    alike, so the relative loss rises but the plain one falls; when it moves more, the plain one alone rises.
    """
    rises = [_z(baseline.plain, newest.plain), _z(baseline.relative, newest.relative)]
    rise = newest.series - baseline.relative.mean
    begin = _change(rise)
    factor, since = (math.exp(min(float(part.mean()), 50.0)) for part in (rise, rise[begin:]))
    return Drift(min(rises), factor, min(rises) > config.sigmas, begin, since)


def _change(rise: np.ndarray) -> int:
    """Index in a series (B,) of the first value that has risen above 0.

    The generalised likelihood ratio for one rise of the mean: of all ends of the series the one whose rise, squared,
    times its length is largest (Basseville and Nikiforov 1993, section 2.4).
    """
    lengths = np.arange(len(rise), 0, -1)
    ends = np.cumsum(rise[::-1])[::-1] / lengths
    return int(np.argmax(lengths * ends.clip(min=0.0) ** 2))


def _z(old: Estimate, new: Estimate) -> float:
    rise, stderr = new.mean - old.mean, math.hypot(old.stderr, new.stderr)
    if stderr == 0:
        return math.copysign(math.inf, rise) if rise else 0.0
    return rise / stderr
