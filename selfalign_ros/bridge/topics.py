"""The topics of the graph, for whoever listens to all of them: name, type, quality of service.

The nodes themselves create the topics they need; what is here must agree with them, and the tests of recorder and
report fail if it does not. No state.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Bool, Float64, Float64MultiArray, String
from trajectory_msgs.msg import JointTrajectory

from selfalign.msg import ActionChunk, AlignReport, EToken
from selfalign_core.robot.contract import RobotContract
from selfalign_ros.bridge import qos

# Listeners keep more than the nodes do: they want every message, not the newest.
_SENSOR_STREAM = QoSProfile(depth=100, history=HistoryPolicy.KEEP_LAST, reliability=ReliabilityPolicy.BEST_EFFORT)
_DIAGNOSTICS = QoSProfile(depth=100)


@dataclass(frozen=True)
class Topic:
    """One topic. ``name`` is relative to the robot's namespace unless it starts with a slash."""

    name: str
    type: type
    qos: QoSProfile  # for a subscription
    is_input: bool = False  # read by the nodes: a replay has to publish it

    @property
    def type_name(self) -> str:
        """Such as ``sensor_msgs/msg/Image``."""
        return f"{self.type.__module__.split('.')[0]}/msg/{self.type.__name__}"


def camera_topics(contract: RobotContract) -> list[Topic]:
    """One per camera of the contract, in its order."""
    types = {"raw": Image, "compressed": CompressedImage}
    return [Topic(camera.topic, types[camera.encoding], _SENSOR_STREAM, True) for camera in contract.cameras]


def graph_topics(contract: RobotContract) -> list[Topic]:
    """Everything that is said in a graph with this contract."""
    command = JointTrajectory if contract.action.interface == "joint_trajectory" else Float64MultiArray
    return [
        *camera_topics(contract),
        Topic(contract.joint_state_topic, JointState, _SENSOR_STREAM, True),
        Topic("executed_action", JointState, qos.EVENTS, True),
        Topic("prompt", String, qos.LATCHED, True),
        Topic(contract.action.topic, command, QoSProfile(depth=100)),
        Topic("followed_command", JointTrajectory, qos.RECENT_EVENTS),
        Topic("action_chunk", ActionChunk, qos.EVENTS),
        Topic("e_token", EToken, qos.LATCHED),
        Topic("align_report", AlignReport, qos.EVENTS),
        Topic("distance_to_target", Float64, qos.EVENTS),
        Topic("target_reached", Bool, qos.EVENTS),
        Topic("body", String, qos.LATCHED),
        Topic("/diagnostics", DiagnosticArray, _DIAGNOSTICS),
    ]


def header_stamp_ns(data: bytes) -> int:
    """The header stamp [ns] of a serialized (CDR) message that begins with a header, without reading the rest.

    Raises ``ValueError`` when there are too few bytes or another encapsulation than plain CDR.
    """
    if len(data) < 12 or data[0] != 0 or data[1] not in (0, 1):
        raise ValueError(f"found {bytes(data[:12])!r}; expected plain CDR of a message with a header")
    sec, nanosec = struct.unpack_from("<iI" if data[1] else ">iI", data, 4)
    return sec * 1_000_000_000 + nanosec
