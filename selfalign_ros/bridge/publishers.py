"""Who publishes on a topic that is meant for one publisher."""

from __future__ import annotations

import time

from rclpy.node import Node

LEASE_S = 40.0
"""Longer than DDS takes to notice that a node was killed (20 s, announced every 3)."""


class Publishers:
    """Of ``topic``, a full name, as ``node`` sees them."""

    def __init__(self, node: Node, topic: str) -> None:
        self._node, self.topic = node, topic
        self._first_seen: dict[tuple[int, ...], float] = {}  # by endpoint, steady seconds

    def names(self) -> list[str]:
        """Full names of their nodes, sorted; one that was killed counts for a while.

        A name stands there once, however often its node was started again, and twice when two publishers of that name
        have been there for longer than DDS remembers one that was killed.
        """
        found = [
            (tuple(publisher.endpoint_gid), f"{publisher.node_namespace.rstrip('/')}/{publisher.node_name}")
            for publisher in self._node.get_publishers_info_by_topic(self.topic)
        ]
        now_s = time.monotonic()
        self._first_seen = {endpoint: self._first_seen.get(endpoint, now_s) for endpoint, _ in found}
        settled: dict[str, int] = {}
        for endpoint, name in found:
            settled[name] = settled.get(name, 0) + (now_s - self._first_seen[endpoint] > LEASE_S)
        return sorted(name for name, count in settled.items() for _ in range(max(1, count)))
