"""How long a stage may take. The only place of the self-aligner that reads a clock."""

from __future__ import annotations

from collections.abc import Callable

Clock = Callable[[], float]
"""Seconds that only grow, as :func:`time.monotonic`."""


class Budget:
    """Starts now. ``limit_ms`` None is no limit; ``should_stop`` ends the stage for any other reason."""

    def __init__(self, limit_ms: float | None, clock: Clock, should_stop: Callable[[], bool] | None = None):
        self._limit_ms, self._clock, self._should_stop = limit_ms, clock, should_stop
        self._begin = clock()

    def elapsed_ms(self) -> float:
        return 1e3 * (self._clock() - self._begin)

    def spent(self) -> str:
        """Why the stage has to stop, "" if it may go on."""
        if self._limit_ms is not None and self.elapsed_ms() > self._limit_ms:
            return f"budget of {self._limit_ms:.0f} ms spent"
        if self._should_stop is not None and self._should_stop():
            return "asked to stop"
        return ""
