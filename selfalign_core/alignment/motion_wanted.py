"""When a robot is to be moved for the aligner's sake. Who moves it, and whether, is the caller's to decide."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from selfalign_core.alignment.reports import StageReport, State

_HALVED = 2 * (1 / 2 - 1) / (1 / 2 + 1)
"""The relative difference of a loss that is half of what it was."""

_LOST = 4.0
"""Times the baseline's that the relative loss since a drift is when a policy has lost its way: with a servo that turns
the other way it was 5.7 to 15, with a bumped camera, or in new poses that were taken for a change, 1.8 to 3.2."""


class Belief(enum.Enum):
    """What the robot is to the token in use, as far as is known."""

    ITS_OWN = "its own"
    """Or one that differs or drifts by so little that the policy bears it, and keeps working."""

    OTHER = "other"
    """By a drift to a multiple of the losses. The policy moves a robot that it does not know, or hardly moves it; a
    calibration motion is both safer and tells more. So until there is a new token, or none to be found, every attempt
    that it left undecided asks again, if its shadow promised to halve the losses."""

    NEVER_ITS_OWN = "never its own"
    """By an attempt whose shadow surely halves the losses and lacks inverse dynamics alone; else as OTHER. But in what
    the lost policy did before, inverse dynamics could not tell. After a drift what has happened since is worth keeping.
    """

    UNDECIDED = "undecided"
    """After a motion in which a shadow surely saw it better, but surely it did with its actions what was expected. The
    motion has served, and what is not decided yet asks for no other one."""


@dataclass(frozen=True)
class MotionWanted:
    """At once when the robot is not the token's, and whenever natural motion has not sufficed for too long.

    ``waiting_since_ns``: since when it has not sufficed, None while it does. ``asks``: for motion, by the last report.
    ``served``: the last report ends the need for motion, whoever began it: there is a new token, or none to be found.
    """

    belief: Belief = Belief.ITS_OWN
    waiting_since_ns: int | None = None
    asks: bool = False
    served: bool = False

    @property
    def anew(self) -> bool:
        """The motion that was asked for last is to be fitted on alone (:meth:`SelfAligner.forget`)."""
        return self.belief is Belief.NEVER_ITS_OWN

    def after(self, report: StageReport, now_ns: int, patience_ns: int) -> MotionWanted:
        """After ``report``; ``patience_ns``: how long natural motion may not suffice."""
        other = self.belief in (Belief.OTHER, Belief.NEVER_ITS_OWN)
        verdict = None if report.attempt is None else report.attempt.verdict
        lost = report.drift is not None and report.drifted and report.drift.factor_since > _LOST
        decided = report.accepted or (verdict is not None and report.state is State.WATCH)
        in_vain = other and verdict is not None and verdict.sees_better and verdict.same_actions
        halves = verdict is not None and verdict.mean < _HALVED
        lacks_actions = verdict is not None and verdict.sees_better and self.belief is not Belief.UNDECIDED
        if decided or in_vain:
            return MotionWanted(Belief.ITS_OWN if decided else Belief.UNDECIDED, asks=lost, served=True)
        if lost or (halves and (other or lacks_actions)):
            known = self.belief if other else Belief.NEVER_ITS_OWN
            return MotionWanted(Belief.OTHER if report.drifted else known, asks=True)
        if report.drifted:
            return MotionWanted()
        if report.excitation is None or report.excitation.enough:
            return MotionWanted(self.belief)
        since_ns = self.waiting_since_ns
        if since_ns is None or now_ns < since_ns:
            return MotionWanted(self.belief, now_ns)
        waited = now_ns - since_ns > patience_ns
        return MotionWanted(self.belief, now_ns if waited else since_ns, asks=waited)
