"""The stages of one round: what the model says of evidence, of the token in use and of others.

A shadow is fitted on older transitions and judged by newer ones. The two need not come in one round: while a shadow is
fitted, what it will be judged by may still be happening. Nothing here is changed, and nothing decided: what a verdict
leads to is for :mod:`phases` to say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from selfalign_core.alignment.budget import OutOfTimeError, Round
from selfalign_core.alignment.config import AlignConfig, Guard
from selfalign_core.alignment.evidence import Evidence
from selfalign_core.alignment.excitation import Excitation
from selfalign_core.alignment.guard import judge
from selfalign_core.alignment.identify import Identification, identify
from selfalign_core.alignment.refine import Refinement, refine
from selfalign_core.alignment.reports import Attempt, Found
from selfalign_core.alignment.scoring import AlignLosses, Prepared, Scorer
from selfalign_core.alignment.trusted import Trusted
from selfalign_core.alignment.watch import RunningLoss, drift, references, running_loss
from selfalign_core.robot.types import EToken

REPORT_DRAWS = 4
"""Noise draws behind each reported loss."""


@dataclass(frozen=True)
class Shadow:
    """A token in waiting, fitted on ``count`` transitions from ``begin_ns`` to ``end_ns`` in the round at ``made_ns``.

    ``before`` and ``after``: mean losses on them, of the token in use and of this one. ``durations_ms`` by stage.
    """

    identification: Identification
    refinement: Refinement
    excitation: Excitation
    count: int
    begin_ns: int
    end_ns: int
    made_ns: int
    before: AlignLosses
    after: AlignLosses
    durations_ms: dict[str, float]

    @property
    def token(self) -> Tensor:
        """(T, W)."""
        return self.refinement.token


class Stages:
    """Of ``round_``, in which ``token`` is in use and ``earlier`` ones were, by one policy's ``scorer``."""

    def __init__(
        self,
        scorer: Scorer,
        trusted: Trusted,
        config: AlignConfig,
        round_: Round,
        token: EToken,
        earlier: Sequence[EToken] = (),
    ):
        self._scorer, self._trusted, self._config, self.round = scorer, trusted, config, round_
        self.token, self._earlier, self._device = token, earlier, scorer.policy.dim_mask.device
        self._references = references(trusted, config.watch.references)
        self._prepared: tuple[Evidence, Prepared] | None = None  # of what was looked at last
        self.current = self._tensor(token)

    def prepare(self, evidence: Evidence) -> tuple[Prepared, float]:
        """What the frozen model makes of ``evidence``, and the time [ms] it took. The frame cache keeps what was made
        before it had to stop.

        Raises:
            OutOfTimeError: it had to stop.
        """
        if self._prepared is not None and self._prepared[0] is evidence:
            return self._prepared[1], 0.0
        budget = self.round.stage(self._config.identify.budget_ms)
        try:
            data = self._scorer.prepare(evidence.batch, budget.check)
        except OutOfTimeError as why:
            raise OutOfTimeError(f"{why} while preparing {len(evidence)} transitions") from None
        self._prepared = evidence, data
        return data, budget.elapsed_ms()

    def fit(self, evidence: Evidence, excitation: Excitation) -> Shadow:
        """Identify and refine on all of ``evidence``.

        Raises:
            OutOfTimeError: the time did not suffice to prepare it.
        """
        config, scorer, trusted, durations = self._config, self._scorer, self._trusted, dict[str, float]()
        data, durations["prepare"] = self.prepare(evidence)
        budget = self.round.stage(config.identify.budget_ms)
        found = identify(scorer, data, self.current, trusted, config.identify, seed=self.round.seed(0), budget=budget)
        durations["identify"] = budget.elapsed_ms()
        budget = self.round.stage(config.refine.budget_ms)
        refined = refine(scorer, data, found.token, trusted, config, seed=self.round.seed(1), budget=budget)
        durations["refine"] = budget.elapsed_ms()
        before, after, durations["report"] = self._mean_losses(data, refined.token)
        begin_ns, end_ns = int(evidence.spans[:, 0].min()), int(evidence.spans[:, 1].max())
        return Shadow(
            found, refined, excitation, len(evidence), begin_ns, end_ns, self.round.now_ns, before, after, durations
        )

    def judge(self, shadow: Shadow, evidence: Evidence, limits: Guard, *, inverse: bool) -> Attempt:
        """The whole attempt, with the verdict on ``shadow`` in place of the token in use.

        ``inverse``: see :func:`guard.judge`.

        Raises:
            OutOfTimeError: the time did not suffice to prepare ``evidence``.
        """
        data, prepared_ms = self.prepare(evidence)
        budget = self.round.stage(self._config.guard.budget_ms)
        verdict = judge(
            self._scorer, data, evidence.spans, self.current, shadow.token, self._trusted, limits,
            seed=self.round.seed(2), budget=budget, inverse=inverse,
        )  # fmt: skip
        durations = {**shadow.durations_ms, "guard": budget.elapsed_ms()}
        before, after, report_ms = self._mean_losses(data, shadow.token)
        durations["prepare"] += prepared_ms
        durations["report"] += report_ms
        return Attempt(
            shadow.identification, shadow.refinement, verdict, shadow.count, len(evidence), shadow.before,
            shadow.after, before, after, durations_ms=durations,
            earlier_ms=sum(shadow.durations_ms.values()) if shadow.made_ns != self.round.now_ns else 0.0,
        )  # fmt: skip

    def running_loss(self, evidence: Evidence) -> RunningLoss:
        """Of the token in use.

        Raises:
            OutOfTimeError: it had to stop before it had any.
        """
        (data, _), watch = self.prepare(evidence), self._config.watch
        return running_loss(
            self._scorer, data, evidence.spans, self.current, self._references, watch,
            seed=self.round.seed(4), budget=self.round.stage(watch.budget_ms),
        )  # fmt: skip

    def find_return(self, evidence: Evidence, lost: RunningLoss) -> Found | None:
        """One of the earlier tokens that explains ``evidence``, of after a change; None, too, if time does not suffice.

        It needs no search: few transitions tell it from the token in use, long before there are enough to find a new
        one, and it was judged on its own when it was accepted. So inverse dynamics, which guards against newcomers that
        only predict looks better, is not asked of it. It explains the evidence if its loss is no drift from ``lost``,
        that of the token in use before the change, and if it is surely better than that one, by the guard's margin.
        """
        used = self.token.data
        others = [self._tensor(token) for token in self._earlier if not np.array_equal(token.data, used)]
        if not others:
            return None
        scorer, watch, seed = self._scorer, self._config.watch, self.round.seed(5)
        try:
            data, _ = self.prepare(evidence)
            budget, noise = self.round.stage(self._config.guard.budget_ms), scorer.noise(data, watch.draws, seed)
            rows = torch.arange(len(noise.time), device=self.current.device)
            best = others[int(scorer.score(data, noise, torch.stack(others), rows, budget.check).mean(1).argmin())]
            running = running_loss(
                scorer, data, evidence.spans, best, self._references, watch, seed=seed, budget=budget
            )
            if drift(lost, running, watch).fired:
                return None
            verdict = judge(
                scorer, data, evidence.spans, self.current, best, self._trusted, self._config.guard,
                seed=seed, budget=budget, inverse=False,
            )  # fmt: skip
        except OutOfTimeError:
            return None
        return Found(best, verdict) if verdict.accepted else None

    def _mean_losses(self, data: Prepared, shadow: Tensor) -> tuple[AlignLosses, AlignLosses, float]:
        """Of the token in use and of ``shadow``, NaN where the time did not suffice, and the time [ms] they took."""
        budget = self.round.stage(self._config.guard.budget_ms)

        def mean(token: Tensor) -> AlignLosses:
            try:
                return self._scorer.summary(data, token, REPORT_DRAWS, self.round.seed(3), budget.check)
            except OutOfTimeError:
                return AlignLosses(math.nan, math.nan, math.nan, math.nan)

        return mean(self.current), mean(shadow), budget.elapsed_ms()

    def _tensor(self, token: EToken) -> Tensor:
        return torch.from_numpy(np.array(token.data, np.float32)).to(self._device)
