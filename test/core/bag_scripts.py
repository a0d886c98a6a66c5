"""Bags written for tests: a contract of two joints, messages, and a script of what a bag shall hold."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from selfalign_core.contract import RobotContract

NS = 1_000_000_000
BEGIN = 1_700_000_000 * NS
JOINTS = ("pan", "lift")
STORE = get_typestore(Stores.ROS2_JAZZY)
T = STORE.types
CONTRACT = """
name: two_joints
control: {rate_hz: 20.0, replan_steps: 4, max_image_age: 0.1, max_joint_state_age: 0.1}
cameras:
  - {name: front, topic: camera/front/image_raw, encoding: %(encoding)s, height: 8, width: 8}
joint_state: {topic: joint_states}
joints:
  - {name: pan, unit: rad, lower: -2.0, upper: 2.0, max_velocity: 3.0, home: 0.0}
  - {name: lift, unit: rad, lower: -2.0, upper: 2.0, max_velocity: 3.0, home: 0.0}
action: {interface: %(interface)s, topic: commands}
"""


def make_contract(path: Path, interface: str = "forward_command", encoding: str = "raw") -> RobotContract:
    path.mkdir(parents=True, exist_ok=True)
    (path / "contract.yaml").write_text(CONTRACT % {"interface": interface, "encoding": encoding})
    return RobotContract.from_yaml(path / "contract.yaml")


def stamp(ns: int):
    return T["builtin_interfaces/msg/Time"](sec=ns // NS, nanosec=ns % NS)


def header(ns: int):
    return T["std_msgs/msg/Header"](stamp=stamp(ns), frame_id="")


def joint_state(ns: int, positions: dict[str, float]):
    values = np.array(list(positions.values()), np.float64)
    empty = np.zeros(0)
    return T["sensor_msgs/msg/JointState"](
        header=header(ns), name=list(positions), position=values, velocity=empty, effort=empty
    )


def image(ns: int, value: int, size: int = 8):
    data = np.full(size * size * 3, value, np.uint8)
    return T["sensor_msgs/msg/Image"](
        header=header(ns), height=size, width=size, encoding="rgb8", is_bigendian=0, step=3 * size, data=data
    )


def compressed(ns: int, value: int):
    _, data = cv2.imencode(".png", np.full((8, 8, 3), value, np.uint8))
    return T["sensor_msgs/msg/CompressedImage"](header=header(ns), format="png", data=data.ravel())


def forward_command(values: list[float]):
    layout = T["std_msgs/msg/MultiArrayLayout"](dim=[], data_offset=0)
    return T["std_msgs/msg/Float64MultiArray"](layout=layout, data=np.array(values, np.float64))


def trajectory(ns: int, points: list[tuple[float, dict[str, float]]]):
    empty = np.zeros(0)

    def point(after_s: float, positions: dict[str, float]):
        after = T["builtin_interfaces/msg/Duration"](sec=int(after_s), nanosec=round(after_s % 1 * NS))
        values = np.array(list(positions.values()))
        return T["trajectory_msgs/msg/JointTrajectoryPoint"](
            positions=values, velocities=empty, accelerations=empty, effort=empty, time_from_start=after
        )

    return T["trajectory_msgs/msg/JointTrajectory"](
        header=header(ns), joint_names=list(points[0][1]), points=[point(*item) for item in points]
    )


TYPES = {
    "/camera/front/image_raw": "sensor_msgs/msg/Image",
    "/joint_states": "sensor_msgs/msg/JointState",
    "/executed_action": "sensor_msgs/msg/JointState",
}


@dataclass
class Script:
    """What a bag shall hold: (seconds received, topic, message)."""

    messages: list[tuple[float, str, object]] = field(default_factory=list)

    def every(self, topic: str, rate_hz: float, make, *, start: float = 0.0, end: float = 3.0, delay: float = 0.0):
        """``make(ns, n)`` at ``rate_hz``, received ``delay`` seconds after it was stamped."""
        for n in range(round((end - start) * rate_hz)):
            at = start + n / rate_hz
            self.messages.append((at + delay, topic, make(BEGIN + round(at * NS), n)))
        return self

    def write(
        self, path: Path, *, types: dict[str, str] | None = None, plugin=StoragePlugin.MCAP, checksums: bool = False
    ) -> Path:
        types = TYPES | (types or {})
        sums: dict[str, int] = {}
        with Writer(path, version=9, storage_plugin=plugin) as writer:
            used = dict.fromkeys(topic for _, topic, _ in self.messages)
            connections = {topic: writer.add_connection(topic, types[topic], typestore=STORE) for topic in used}
            for seconds, topic, message in sorted(self.messages, key=lambda item: item[0]):
                raw = bytes(STORE.serialize_cdr(message, types[topic]))
                sums[topic] = zlib.crc32(raw, sums.get(topic, 0))
                writer.write(connections[topic], BEGIN + round(seconds * NS), raw)
            for topic, value in sums.items() if checksums else ():
                writer.set_custom_data(f"crc32 {topic}", f"{value:08x}")
        return path
