"""The stages of an attempt in their order: a shadow is fitted on older transitions and judged by newer ones.

The two need not come in one round: while a shadow is fitted, what it will be judged by may still be happening. Nothing
here is changed, and nothing decided: what a verdict leads to is the machine's to say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from selfalign_core.alignment.budget import Budget, OutOfTimeError, RoundClock
from selfalign_core.alignment.config import AlignConfig, Guard
from selfalign_core.alignment.evidence import Evidence
from selfalign_core.alignment.excitation import Excitation
from selfalign_core.alignment.guard import judge
from selfalign_core.alignment.identify import Identification, identify
from selfalign_core.alignment.refine import Refinement, refine
from selfalign_core.alignment.reports import Attempt
from selfalign_core.alignment.scoring import AlignLosses, Prepared, Scorer
from selfalign_core.alignment.trusted import Trusted

REPORT_DRAWS = 4
"""Noise draws behind each reported loss."""


@dataclass(frozen=True)
class Round:
    """One round of the machine: the robot's time, the budgets of the stages and, from ``entropy``, their noise."""

    now_ns: int
    clock: RoundClock
    entropy: int

    def seed(self, stage: int) -> int:
        """Of noise that no other stage and no other round has."""
        entropy = [self.entropy, self.now_ns & (2**64 - 1), stage]
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 2)


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
    """Those of one round, of one policy's ``scorer``."""

    def __init__(self, scorer: Scorer, trusted: Trusted, config: AlignConfig, round_: Round):
        self._scorer, self._trusted, self._config, self._round = scorer, trusted, config, round_

    def prepare(self, evidence: Evidence) -> tuple[Prepared, float]:
        """What the frozen model makes of ``evidence``, and the time [ms] it took. The frame cache keeps what was made
        before it had to stop.

        Raises:
            OutOfTimeError: it had to stop.
        """
        budget = self._round.clock.stage(self._config.identify.budget_ms)
        try:
            return self._scorer.prepare(evidence.batch, budget.check), budget.elapsed_ms()
        except OutOfTimeError as why:
            raise OutOfTimeError(f"{why} while preparing {len(evidence.batch)} transitions") from None

    def fit(self, evidence: Evidence, excitation: Excitation, current: Tensor) -> Shadow:
        """Identify and refine on all of ``evidence``; ``current`` (T, W) is in use.

        Raises:
            OutOfTimeError: the time did not suffice to prepare it.
        """
        config, scorer, trusted, durations = self._config, self._scorer, self._trusted, {}
        data, durations["prepare"] = self.prepare(evidence)
        budget = self._round.clock.stage(config.identify.budget_ms)
        found = identify(scorer, data, current, trusted, config.identify, seed=self._round.seed(0), budget=budget)
        durations["identify"] = budget.elapsed_ms()
        budget = self._round.clock.stage(config.refine.budget_ms)
        refined = refine(scorer, data, found.token, trusted, config, seed=self._round.seed(1), budget=budget)
        durations["refine"] = budget.elapsed_ms()
        budget = self._round.clock.stage(config.guard.budget_ms)
        before, after = (self._mean_losses(data, token, budget) for token in (current, refined.token))
        durations["report"] = budget.elapsed_ms()
        begin_ns, end_ns = int(evidence.spans[:, 0].min()), int(evidence.spans[:, 1].max())
        return Shadow(
            found, refined, excitation, len(evidence.batch), begin_ns, end_ns, self._round.now_ns, before, after,
            durations,
        )  # fmt: skip

    def judge(
        self, shadow: Shadow, evidence: Evidence, current: Tensor, limits: Guard, *, inverse: bool
    ) -> tuple[Attempt, Prepared]:
        """The whole attempt, with the verdict on ``shadow`` in place of ``current`` (T, W); and ``evidence`` prepared.

        ``inverse``: see :func:`guard.judge`.

        Raises:
            OutOfTimeError: the time did not suffice to prepare it.
        """
        config, earlier = self._config, dict(shadow.durations_ms)
        data, prepared_ms = self.prepare(evidence)
        budget = self._round.clock.stage(config.guard.budget_ms)
        verdict = judge(
            self._scorer, data, evidence.spans, current, shadow.token, self._trusted, limits,
            seed=self._round.seed(2), budget=budget, inverse=inverse,
        )  # fmt: skip
        guard_ms = budget.elapsed_ms()
        budget = self._round.clock.stage(config.guard.budget_ms)
        before, after = (self._mean_losses(data, token, budget) for token in (current, shadow.token))
        report_ms = earlier.pop("report") + budget.elapsed_ms()
        durations = {**earlier, "prepare": earlier["prepare"] + prepared_ms, "guard": guard_ms, "report": report_ms}
        attempt = Attempt(
            shadow.identification, shadow.refinement, verdict, shadow.count, len(evidence.batch), shadow.before,
            shadow.after, before, after, durations_ms=durations,
            earlier_ms=sum(shadow.durations_ms.values()) if shadow.made_ns != self._round.now_ns else 0.0,
        )  # fmt: skip
        return attempt, data

    def _mean_losses(self, data: Prepared, token: Tensor, budget: Budget) -> AlignLosses:
        try:
            return self._scorer.summary(data, token, REPORT_DRAWS, self._round.seed(3), budget.check)
        except OutOfTimeError:
            return AlignLosses(math.nan, math.nan, math.nan, math.nan)
