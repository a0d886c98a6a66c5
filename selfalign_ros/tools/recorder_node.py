"""The recorder node: writes everything said in the graph to an MCAP bag, byte for byte as it was sent.

It only listens. Exit code: 0 when the robot's inputs were recorded, 1 when one of them stayed silent.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from rclpy.qos import DurabilityPolicy, HistoryPolicy, LivelinessPolicy, QoSProfile, ReliabilityPolicy
from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime

from selfalign_core.data.rosbag_file import ABOUT_CONTRACT, ABOUT_NAMESPACE
from selfalign_core.errors import ConfigError
from selfalign_ros.bridge.topics import Topic, graph_topics
from selfalign_ros.life.tool_node import ToolNode, run_tool
from selfalign_ros.tools.bag import BagWriter


class Recorder(ToolNode):
    """See the module."""

    def __init__(self) -> None:
        super().__init__("recorder")
        if not self.parameters["output"]:
            raise ConfigError("parameter output: found nothing; expected the folder of the bag to write")
        about = {ABOUT_CONTRACT: self.contract.name, ABOUT_NAMESPACE: self.get_namespace()}
        self._path = Path(self.parameters["output"])
        self._writer = BagWriter(self._path, about)
        self._writer.__enter__()
        self._counts: dict[str, int] = {}
        self._waiting_for_clock: list[tuple[Topic, bytes]] = []
        self._topics = graph_topics(self.contract)
        for topic in self._topics:
            self._counts[topic.name] = 0
            self.create_subscription(topic.type, topic.name, partial(self._on_message, topic), topic.qos, raw=True)
        self.get_logger().info(f"recording {len(self._topics)} topics to {self._path}")

    def finish(self) -> int:
        for topic in self._topics:
            self._declare(topic)
        self._writer.close()
        total = sum(self._counts.values())
        silent = [topic.name for topic in self._topics if not self._counts[topic.name]]
        self.get_logger().info(f"{total} messages written to {self._path}")
        if silent:
            self.get_logger().warning(f"nothing was received on {', '.join(silent)}")
        needed = [camera.topic for camera in self.contract.cameras] + [self.contract.joint_state_topic]
        return 1 if any(topic in silent for topic in needed) else 0

    def abort(self) -> None:
        self._writer.abort()

    def _on_message(self, topic: Topic, data: bytes) -> None:
        now_ns = self.get_clock().now().nanoseconds
        if now_ns == 0:
            # Simulated time that has not begun: what is latched is said now, and is part of the run.
            self._waiting_for_clock.append((topic, data))
            return
        for earlier_topic, earlier in self._waiting_for_clock:
            self._write(earlier_topic, now_ns, earlier)
        self._waiting_for_clock.clear()
        self._write(topic, now_ns, data)

    def _write(self, topic: Topic, now_ns: int, data: bytes) -> None:
        self._declare(topic)
        self._writer.write(self.resolve_topic_name(topic.name), now_ns, data)
        self._counts[topic.name] += 1

    def _declare(self, topic: Topic) -> None:
        """Declared with the first message, because the offered QoS is known only once there is a publisher."""
        name = self.resolve_topic_name(topic.name)
        if name not in self._writer:
            publishers = self.get_publishers_info_by_topic(name)
            profiles = [offered_qos(publisher.qos_profile, topic.qos.depth) for publisher in publishers]
            self._writer.add_topic(name, topic.type_name, profiles or [offered_qos(topic.qos, topic.qos.depth)])


def offered_qos(profile: QoSProfile, depth: int) -> Qos:
    """A publisher's QoS as a bag keeps it. History does not travel with discovery; ``depth`` stands in for it."""
    history = QosHistory.KEEP_ALL if profile.history == HistoryPolicy.KEEP_ALL else QosHistory.KEEP_LAST
    reliable = profile.reliability == ReliabilityPolicy.RELIABLE
    latched = profile.durability == DurabilityPolicy.TRANSIENT_LOCAL
    manual = profile.liveliness == LivelinessPolicy.MANUAL_BY_TOPIC
    return Qos(
        history=history,
        depth=profile.depth or depth,
        reliability=QosReliability.RELIABLE if reliable else QosReliability.BEST_EFFORT,
        durability=QosDurability.TRANSIENT_LOCAL if latched else QosDurability.VOLATILE,
        deadline=_time(profile.deadline.nanoseconds),
        lifespan=_time(profile.lifespan.nanoseconds),
        liveliness=QosLiveliness.MANUAL_BY_TOPIC if manual else QosLiveliness.AUTOMATIC,
        liveliness_lease_duration=_time(profile.liveliness_lease_duration.nanoseconds),
        avoid_ros_namespace_conventions=profile.avoid_ros_namespace_conventions,
    )


def _time(nanoseconds: int) -> QosTime:
    return QosTime(*divmod(nanoseconds, 1_000_000_000))


def main(args: list[str] | None = None) -> int:
    return run_tool(Recorder, args)


if __name__ == "__main__":
    sys.exit(main())
