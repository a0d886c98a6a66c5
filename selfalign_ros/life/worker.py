"""One thread that owns what callbacks must not touch: the model, or the buffer.

Jobs run one after the other in the order they were submitted, so whatever they share needs no lock. The
outcome of a job goes through ``deliver``, which the node points at its executor: nothing but jobs ever runs
in this thread, and no callback ever waits for it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar, cast

Result = TypeVar("Result")


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """What a job returned, or the exception it raised (with its traceback)."""

    value: Result | None = None
    error: BaseException | None = None

    def result(self) -> Result:
        """The returned value; raises what the job raised."""
        if self.error is not None:
            raise self.error
        return cast("Result", self.value)


class Worker:
    """Runs jobs in a thread of its own until closed."""

    def __init__(self, name: str, deliver: Callable[[Callable[[], None]], None]) -> None:
        self._deliver = deliver
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Callable[[Outcome[Any]], None]] | None]
        self._jobs = queue.SimpleQueue()
        self._stopping = threading.Event()
        # A daemon, so that a job that cannot be interrupted does not keep the process alive.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], Result], done: Callable[[Outcome[Result]], None]) -> None:
        """Run ``job()`` in the worker, then ``done(outcome)`` wherever ``deliver`` takes it."""
        self._jobs.put((job, done))

    def should_stop(self) -> bool:
        """True once the worker is being closed; long jobs ask this between two steps."""
        return self._stopping.is_set()

    def close(self, timeout_s: float) -> bool:
        """Let the running job end, drop the waiting ones. False if it did not end within ``timeout_s``
        seconds.
        """
        self._stopping.set()
        self._jobs.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None and not self._stopping.is_set():
            job, done = item
            try:
                outcome = Outcome(value=job())
            except Exception as error:
                outcome = Outcome(error=error)
            self._deliver(partial(done, outcome))
