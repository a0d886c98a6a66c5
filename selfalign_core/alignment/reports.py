"""What one round of the self-aligner did, in words and numbers."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from torch import Tensor

from selfalign_core.alignment.excitation import Excitation
from selfalign_core.alignment.guard import Verdict
from selfalign_core.alignment.identify import Identification
from selfalign_core.alignment.refine import Refinement
from selfalign_core.alignment.scoring import AlignLosses
from selfalign_core.alignment.watch import Drift
from selfalign_core.robot.types import EToken


class State(enum.Enum):
    """The phases that users are told apart, see :mod:`selfalign_core.alignment.phases`."""

    COLLECT = "collect"
    WATCH = "watch"


@dataclass(frozen=True)
class Attempt:
    """One pass of identify → refine → guard, with mean losses of the current token and of the shadow on both sets.

    ``durations_ms``: wall time per stage: ``prepare`` (what does not depend on the token), ``identify``, ``refine``,
    ``guard`` and ``report`` (the losses; one for which the time did not suffice is NaN). ``earlier_ms``: of them in the
    earlier round that fitted the shadow.
    """

    identification: Identification
    refinement: Refinement
    verdict: Verdict
    fit_count: int
    guard_count: int
    fit_before: AlignLosses
    fit_after: AlignLosses
    guard_before: AlignLosses
    guard_after: AlignLosses
    durations_ms: dict[str, float]
    earlier_ms: float = 0.0

    @property
    def undecided(self) -> bool:
        """Refused although the shadow promises enough, or where another token fits the older transitions better."""
        return not self.verdict.accepted and (self.verdict.promising or self.identification.margin > 0)

    @property
    def text(self) -> str:
        return f"{self.verdict.reason}; {fit_words(self.identification, self.refinement)}"


def fit_words(found: Identification, refined: Refinement) -> str:
    """Where a shadow comes from."""
    notes = "".join(f", {note}" for note in (found.note, refined.note) if note)
    return f"started from {found.name!r}, {refined.steps} steps{notes}"


@dataclass(frozen=True)
class Found:
    """``token`` (T, W), not the one in use, and why it is to be."""

    token: Tensor
    verdict: Verdict


@dataclass(frozen=True)
class StageReport:
    """What one ``SelfAligner.advance`` did: ``text`` in words, the rest in numbers where there are any.

    ``state``: after it. ``transitions``: usable ones at hand. ``left_out``: why others were not. ``token``: in use.
    ``returned``: to an earlier one, after a change.
    """

    state: State
    text: str
    token: EToken
    transitions: int = 0
    left_out: tuple[str, ...] = ()
    excitation: Excitation | None = None
    attempt: Attempt | None = None
    drift: Drift | None = None
    returned: Found | None = None

    @property
    def found(self) -> Found | None:
        """The new token, if there is one."""
        if self.attempt is not None and self.attempt.verdict.accepted:
            return Found(self.attempt.refinement.token, self.attempt.verdict)
        return self.returned

    @property
    def accepted(self) -> bool:
        """Whether ``token`` is new."""
        return self.returned is not None or (self.attempt is not None and self.attempt.verdict.accepted)

    @property
    def refused(self) -> bool:
        return self.attempt is not None and not self.accepted

    @property
    def drifted(self) -> bool:
        return self.drift is not None and self.drift.fired

    @property
    def eventful(self) -> bool:
        """Whether a token was found, put to the test or refuted."""
        return self.accepted or self.refused or self.drifted
