"""When a robot is to be moved for the aligner's sake. Who moves it, and whether, is the caller's to decide."""

from __future__ import annotations

from selfalign_core.alignment.reports import StageReport, State

_HALVED = 2 * (1 / 2 - 1) / (1 / 2 + 1)
"""The relative difference of a loss that is half of what it was."""

_LOST = 4.0
"""Times the baseline's that the relative loss since a drift is when a policy has lost its way: with a servo that turns
the other way it was 5.7 to 15, with a bumped camera, or in new poses that were taken for a change, 1.8 to 3.2."""


class MotionWanted:
    """At once when the robot is not the token's, and whenever natural motion has not sufficed for too long.

    A drift to a multiple of the losses says so, or an attempt whose shadow surely halves them and lacks inverse
    dynamics alone. The policy then moves a robot that it does not know, or hardly moves it; a calibration motion is
    both safer and tells more. So until there is a new token, or none to be found, every attempt that it left undecided
    asks again, if its shadow promised to halve the losses. A robot that differs or drifts by less is one that the
    policy bears, and keeps working. So is one that in that motion is surely seen better by a shadow but surely does
    with its actions what was expected: the motion has served, and what is not decided yet asks for no other one.

    Attributes:
        served: the last report ends the need for motion, whoever began it: there is a new token, or none to be found.
        anew: the motion that was asked for last is to be fitted on alone (:meth:`SelfAligner.forget`): in what the lost
            policy did before, inverse dynamics could not tell. After a drift what has happened since is worth keeping.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget how long it has waited, and that the robot is not the token's."""
        self._waiting_since_ns: int | None = None
        self._is_other, self._in_vain, self.anew, self.served = False, False, False, False

    def after(self, report: StageReport, now_ns: int, patience_ns: int) -> bool:
        """Whether to ask for motion after ``report``; ``patience_ns``: how long natural motion may not suffice."""
        waits = report.excitation is not None and not report.excitation.enough
        drifted = report.drift is not None and report.drift.fired
        lost = drifted and report.drift.factor_since > _LOST
        verdict = None if report.attempt is None else report.attempt.verdict
        halves = verdict is not None and verdict.mean < _HALVED
        decided = report.accepted or (verdict is not None and report.state is State.WATCH)
        in_vain = self._is_other and verdict is not None and verdict.sees_better and verdict.same_actions
        served = decided or in_vain
        asks = lost or (not served and halves and (self._is_other or (verdict.sees_better and not self._in_vain)))
        if asks or served or drifted:
            self.anew = not drifted and not served and (self.anew or not self._is_other)
            self.served, self._waiting_since_ns = served, None
            self._is_other, self._in_vain = asks and not served, in_vain and not decided
            return asks
        self.served = False
        if not waits or self._waiting_since_ns is None or now_ns < self._waiting_since_ns:
            self._waiting_since_ns = now_ns if waits else None
        elif now_ns - self._waiting_since_ns > patience_ns:
            self._waiting_since_ns = now_ns
            return True
        return False
