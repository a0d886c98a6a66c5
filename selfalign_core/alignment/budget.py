"""One round and how long its stages may take. The only place of the self-aligner that reads a clock."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

Clock = Callable[[], float]
"""Seconds that only grow, as :func:`time.monotonic`."""


class OutOfTimeError(Exception):
    """A stage has to end; in words why."""


class Budget:
    """Starts now. ``limit_ms`` None is no limit; ``should_stop`` ends the stage for any other reason.

    ``owed_ms``: taken off the limit, but not part of the time that is reported.
    """

    def __init__(
        self,
        limit_ms: float | None,
        clock: Clock,
        should_stop: Callable[[], bool] | None = None,
        *,
        owed_ms: float = 0.0,
    ):
        self._limit_ms, self._clock, self._should_stop, self._owed_ms = limit_ms, clock, should_stop, owed_ms
        self._begin = clock()

    @classmethod
    def unlimited(cls) -> Budget:
        """For stages that run by themselves, beside no robot."""
        return cls(None, time.monotonic)

    def elapsed_ms(self) -> float:
        return 1e3 * (self._clock() - self._begin)

    def overrun_ms(self) -> float:
        """By how much the limit is exceeded, 0 while it is not."""
        return 0.0 if self._limit_ms is None else max(self.elapsed_ms() + self._owed_ms - self._limit_ms, 0.0)

    def spent(self) -> str:
        """Why the stage has to stop, "" if it may go on."""
        if self.overrun_ms() > 0:
            return f"budget of {self._limit_ms:.0f} ms spent"
        if self._should_stop is not None and self._should_stop():
            return "asked to stop"
        return ""

    def check(self) -> None:
        """Raise :class:`OutOfTimeError` if the stage has to stop."""
        if why := self.spent():
            raise OutOfTimeError(why)


class Round:
    """One round of the self-aligner: the robot's time, the budgets of its stages and, from ``entropy``, their noise.

    What one stage overran by, the next one has less: together they exceed the sum of their limits by no more than what
    goes on between two looks at the clock.
    """

    def __init__(
        self, now_ns: int, entropy: int, clock: Clock = time.monotonic, should_stop: Callable[[], bool] | None = None
    ):
        self.now_ns, self._entropy, self._clock, self._should_stop = now_ns, entropy, clock, should_stop
        self._last: Budget | None = None

    def stage(self, limit_ms: float | None) -> Budget:
        """The next stage begins."""
        owed_ms = 0.0 if self._last is None else self._last.overrun_ms()
        self._last = Budget(limit_ms, self._clock, self._should_stop, owed_ms=owed_ms)
        return self._last

    def seed(self, stage: int) -> int:
        """Of noise that no other stage and no other round has."""
        entropy = [self._entropy, self.now_ns & (2**64 - 1), stage]
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 2)
