"""/diagnostics: what a node is doing and why it is not doing more, once per second.

Plain counting; what the numbers mean is decided by the nodes.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.clock import Clock, ClockType
from rclpy.node import Node

OK, WARN, ERROR = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR


@dataclass
class Status:
    """One line of diagnostics: a name within the node, a level, a sentence, and named values."""

    name: str
    level: bytes
    message: str
    values: dict[str, Any] = field(default_factory=dict)


class Diagnostics:
    """Publishes what ``collect`` returns every second, on a steady clock so that it works while time stands
    still.
    """

    def __init__(self, node: Node, hardware_id: str, collect: Callable[[], Iterable[Status]]) -> None:
        self._node, self._hardware_id, self._collect = node, hardware_id, collect
        self._state, self._published_at = "", 0.0
        self._publisher = node.create_publisher(DiagnosticArray, "/diagnostics", 10)
        node.create_timer(1.0, self.publish, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def state(self, description: str) -> None:
        """The node's state in words: a new one is published at once instead of within the second.

        At most ten times per second, however it flickers. Numbers in the description do not count as news.
        """
        state = without_numbers(description)
        if state != self._state and time.monotonic() - self._published_at > 0.1:
            self._state = state
            self.publish()

    def publish(self) -> None:
        """Publish now."""
        self._published_at = time.monotonic()
        prefix = self._node.get_fully_qualified_name().lstrip("/")
        message = DiagnosticArray()
        message.header.stamp = self._node.get_clock().now().to_msg()
        for status in self._collect():
            message.status.append(
                DiagnosticStatus(
                    level=status.level,
                    name=f"{prefix}: {status.name}",
                    message=status.message,
                    hardware_id=self._hardware_id,
                    values=[KeyValue(key=key, value=_shown(value)) for key, value in status.values.items()],
                )
            )
        self._publisher.publish(message)


class Rate:
    """Events per second over the last few seconds."""

    def __init__(self, window_s: float = 3.0) -> None:
        self._window_s = window_s
        self._times: deque[float] = deque()
        self.count = 0

    def tick(self) -> None:
        now = time.monotonic()
        self.count += 1
        self._times.append(now)
        self._forget(now)

    @property
    def hz(self) -> float:
        now = time.monotonic()
        self._forget(now)
        # Measured from the oldest event, so that the first seconds do not read as a slow stream.
        if len(self._times) < 2:
            return 0.0
        return len(self._times) / max(now - self._times[0], 1e-9)

    def _forget(self, now: float) -> None:
        while self._times and self._times[0] < now - self._window_s:
            self._times.popleft()


class Complaint:
    """Logs a reason once it has stood for a moment, and again every few seconds, so that a log stays readable.

    Reasons that differ only in their numbers (ages, counts) are the same complaint.
    """

    def __init__(self, log: Callable[[str], Any], *, grace_s: float = 0.5, repeat_s: float = 5.0) -> None:
        self._log, self._grace_s, self._repeat_s = log, grace_s, repeat_s
        self._kind, self._due = "", 0.0

    def say(self, reason: str) -> None:
        """``reason`` stands; "" means there is nothing to complain about any more."""
        kind, now = without_numbers(reason), time.monotonic()
        if kind != self._kind:
            self._kind, self._due = kind, now + self._grace_s
        if reason and now >= self._due:
            self._log(reason)
            self._due = now + self._repeat_s


def without_numbers(text: str) -> str:
    """The same for two sentences that differ only in their numbers."""
    return re.sub(r"[\d.]+", "#", text)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
