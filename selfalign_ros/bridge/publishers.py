"""Who publishes on a topic that is meant for one publisher."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping

from rclpy.clock import Clock, ClockType
from rclpy.node import Node

LEASE_S = 40.0
"""Longer than DDS takes to notice that a node was killed (20 s, announced every 3)."""


_LOOK_S = 0.5


class Publishers:
    """Of ``topic``, a full name, as ``node`` sees them; of the type ``type_name`` alone, if one is given."""

    def __init__(self, node: Node, topic: str, type_name: str = "") -> None:
        self._node, self.topic, self._type_name = node, topic, type_name
        self._first_seen: dict[tuple[int, ...], float] = {}  # by endpoint, steady seconds

    def names(self) -> list[str]:
        """Full names of their nodes, sorted; one that was killed counts for a while.

        A name stands there once, however often its node was started again, and twice when two publishers of that name
        have been there for longer than DDS remembers one that was killed.
        """
        found = [
            (tuple(publisher.endpoint_gid), f"{publisher.node_namespace.rstrip('/')}/{publisher.node_name}")
            for publisher in self._node.get_publishers_info_by_topic(self.topic)
            if self._type_name in ("", publisher.topic_type)
        ]
        now_s = time.monotonic()
        self._first_seen = {endpoint: self._first_seen.get(endpoint, now_s) for endpoint, _ in found}
        settled: dict[str, int] = {}
        for endpoint, name in found:
            settled[name] = settled.get(name, 0) + (now_s - self._first_seen[endpoint] > LEASE_S)
        return sorted(name for name, count in settled.items() for _ in range(max(1, count)))


class SolePublishers:
    """Topics that are meant for one publisher each, looked at twice a second.

    ``topics``: name -> type of the messages. ``allowed``: asked for the full names of those that may have several.
    ``fault``: which has several although it may not, and who they are; "" if none has.
    """

    def __init__(self, node: Node, topics: Mapping[str, type], allowed: Callable[[], Collection[str]]) -> None:
        self._node, self._allowed = node, allowed
        self._publishers = [
            Publishers(node, node.resolve_topic_name(topic), f"{kind.__module__.split('.')[0]}/msg/{kind.__name__}")
            for topic, kind in topics.items()
        ]
        self.fault = ""
        self._look()
        node.create_timer(_LOOK_S, self._look, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def _look(self) -> None:
        self.fault = "; ".join(filter(None, map(self._fault_of, self._publishers)))

    def _fault_of(self, publishers: Publishers) -> str:
        topic = publishers.topic
        if topic in self._allowed() or self._node.count_publishers(topic) < 2 or len(names := publishers.names()) < 2:
            return ""
        found = f"{topic}: found {len(names)} publishers, {', '.join(names)}"
        return f"{found}; expected one (allow_several_publishers names topics that may have several)"
