"""When a robot is to be moved for the aligner's sake. Who moves it, and whether, is the caller's to decide."""

from __future__ import annotations

from selfalign_core.alignment.reports import StageReport, State

_HALVED = 2 * (1 / 2 - 1) / (1 / 2 + 1)
"""The relative difference of a loss that is half of what it was."""


class MotionWanted:
    """At once when the robot is not the token's, and whenever natural motion has not sufficed for too long.

    A drift says so, or an attempt whose shadow surely halves the losses and lacks inverse dynamics alone. The policy
    then moves a robot that it does not know, or hardly moves it; a calibration motion is both safer and tells more. So
    until there is a new token, or none to be found, every attempt that it left undecided asks again, if its shadow
    promised to halve the losses: a robot that differs by less is one that the policy bears, and keeps working.

    Attributes:
        anew: the motion that was asked for last is to be fitted on alone (:meth:`SelfAligner.forget`): in what the lost
            policy did before, inverse dynamics could not tell. After a drift what has happened since is worth keeping.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget how long it has waited, and that the robot is not the token's."""
        self._waiting_since_ns: int | None = None
        self._is_other, self.anew = False, False

    def after(self, report: StageReport, now_ns: int, patience_ns: int) -> bool:
        """Whether to ask for motion after ``report``; ``patience_ns``: how long natural motion may not suffice."""
        waits = report.excitation is not None and not report.excitation.enough
        drifted = report.drift is not None and report.drift.fired
        verdict = None if report.attempt is None else report.attempt.verdict
        halves = verdict is not None and verdict.mean < _HALVED
        served = has_served(report)
        if drifted or served or (halves and (self._is_other or verdict.sees_better)):
            anew = not drifted and (self.anew or not self._is_other)
            self.reset()
            self._is_other, self.anew = not served, anew and not served
            return drifted or not served
        if not waits or self._waiting_since_ns is None or now_ns < self._waiting_since_ns:
            self._waiting_since_ns = now_ns if waits else None
        elif now_ns - self._waiting_since_ns > patience_ns:
            self._waiting_since_ns = now_ns
            return True
        return False


def has_served(report: StageReport) -> bool:
    """Whether ``report`` ends the need for motion: the aligner has a new token, or rests."""
    return report.accepted or (report.attempt is not None and report.state is State.WATCH)
