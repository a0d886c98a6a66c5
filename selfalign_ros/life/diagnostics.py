"""/diagnostics: what a node is doing and why it is not doing more, once per second.

Plain counting; what the numbers mean is decided by the nodes.
"""

from __future__ import annotations

import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.clock import Clock, ClockType
from rclpy.impl.rcutils_logger import RcutilsLogger
from rclpy.node import Node
from rclpy.qos import QoSCompatibility, QoSProfile, qos_check_compatible
from rclpy.topic_endpoint_info import TopicEndpointInfo

_PERCENTILES = (50, 95, 99)

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


class Latency:
    """The last durations of something, as percentiles for diagnostics."""

    def __init__(self, name: str, size: int = 200) -> None:
        self._name, self._durations = name, deque[float](maxlen=size)

    def add(self, duration_s: float) -> None:
        self._durations.append(duration_s)

    def values(self) -> dict[str, float]:
        """Named values such as ``inference p95 [s]``; empty before the first duration."""
        if not self._durations:
            return {}
        found = np.percentile(self._durations, _PERCENTILES)
        return {f"{self._name} p{p} [s]": float(value) for p, value in zip(_PERCENTILES, found, strict=True)}


def torch_with_gpu() -> Any:
    """torch if this process has used a graphics card with it, else None. Imports nothing."""
    torch = sys.modules.get("torch")
    # Another thread may be just importing it: then there is no torch.cuda yet, or not all of it.
    return torch if getattr(getattr(torch, "cuda", None), "is_initialized", bool)() else None


def gpu_memory() -> dict[str, float]:
    """What this process holds on the graphics card, named values; empty if it uses none."""
    torch = torch_with_gpu()
    if torch is None:
        return {}
    held = {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}
    return {f"GPU memory {name} [MB]": size / 1e6 for name, size in held.items()}


def incompatible_peers(node: Node) -> list[str]:
    """Who is on a topic of ``node`` but cannot talk with it: another type, or settings (QoS) that do not match."""
    found = []
    for publisher in node.publishers:
        for peer in node.get_subscriptions_info_by_topic(publisher.topic_name):
            found.append(_mismatch(publisher, peer, "subscriber", publisher.qos_profile, peer.qos_profile))
    for subscription in node.subscriptions:
        for peer in node.get_publishers_info_by_topic(subscription.topic_name):
            found.append(_mismatch(subscription, peer, "publisher", peer.qos_profile, subscription.qos_profile))
    return sorted({mismatch for mismatch in found if mismatch})


def _mismatch(ours: Any, peer: TopicEndpointInfo, role: str, offered: QoSProfile, requested: QoSProfile) -> str:
    who = f"{ours.topic_name}: {role} {peer.node_namespace.rstrip('/')}/{peer.node_name}"
    message_type = ours.msg_type if hasattr(ours, "msg_type") else None
    if message_type is not None:
        expected = f"{message_type.__module__.split('.')[0]}/msg/{message_type.__name__}"
        if peer.topic_type != expected:
            return f"{who} has type {peer.topic_type}; expected {expected}"
    compatibility, reason = qos_check_compatible(_comparable(offered), _comparable(requested))
    if compatibility == QoSCompatibility.ERROR:
        return f"{who} has incompatible QoS: {reason.strip().rstrip(';')}"
    return ""


def _comparable(profile: QoSProfile) -> QoSProfile:
    # Deadlines and leases are left out: one that was not asked for reads as 0 here and as infinite at a peer's.
    return QoSProfile(depth=1, reliability=profile.reliability, durability=profile.durability)


class Complaint:
    """Logs a reason once it has stood for a moment, and again every few seconds, so that a log stays readable.

    Reasons that differ only in their numbers (ages, counts) are the same complaint.
    """

    def __init__(
        self, logger: RcutilsLogger, *, is_error: bool = False, grace_s: float = 0.5, repeat_s: float = 5.0
    ) -> None:
        self._logger, self._is_error, self._grace_s, self._repeat_s = logger, is_error, grace_s, repeat_s
        self._kind, self._due = "", 0.0

    def say(self, reason: str) -> None:
        """``reason`` stands; "" means there is nothing to complain about any more."""
        kind, now = without_numbers(reason), time.monotonic()
        if kind != self._kind:
            self._kind, self._due = kind, now + self._grace_s
        if reason and now >= self._due:
            # Each in a line of its own: rclpy refuses two severities from one place in the source.
            if self._is_error:
                self._logger.error(reason)
            else:
                self._logger.warning(reason)
            self._due = now + self._repeat_s


def without_numbers(text: str) -> str:
    """The same for two sentences that differ only in their numbers."""
    return re.sub(r"[\d.]+", "#", text)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
