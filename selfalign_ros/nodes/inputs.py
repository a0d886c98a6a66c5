"""What the robot reports: subscriptions to the cameras and joint states of a contract, and what is wrong with them.

Callbacks only store, in ``selfalign_core.robot.frames``, which has the rule by which messages become an observation.
``fault`` is cheap enough for every control step; decoding happens later, in the worker of the node that needs the
pixels. A node that gives limits for frozen cameras has each picture compared with the one before, as it arrives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
from rclpy.event_handler import (
    QoSMessageLostInfo,
    QoSRequestedIncompatibleQoSInfo,
    SubscriptionEventCallbacks,
    qos_policy_name_from_kind,
)
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, Image, JointState

from selfalign_core.errors import InputError
from selfalign_core.robot.contract import Camera, RobotContract
from selfalign_core.robot.frames import IMPLAUSIBLE, Fault, Selection, SensorFrames
from selfalign_core.robot.frozen import FreezeLimits
from selfalign_core.robot.images import SUPPORTED_ENCODINGS
from selfalign_core.robot.joint_states import read_joints
from selfalign_core.robot.measured import Pose
from selfalign_ros.bridge.conversions import NS_PER_S, decode, to_ns
from selfalign_ros.bridge.publishers import Publishers, SolePublishers
from selfalign_ros.bridge.qos import overridable
from selfalign_ros.life.diagnostics import ERROR, OK, Rate, Status


def decoded(selection: Selection, contract: RobotContract, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Camera name -> (H, W, 3) uint8 RGB at the model's ``size`` (H, W). Raises ``InputError`` naming the camera."""
    return {camera.name: decode(camera, selection.pictures[camera.name], size) for camera in contract.cameras}


def unknown_topics(text: str, contract: RobotContract) -> str | None:
    """What is wrong with the value ``text`` of the parameter ``allow_several_publishers``, or None."""
    known = [*(camera.topic for camera in contract.cameras), contract.action.topic, "executed_action", "/clock"]
    if unknown := [name for name in text.split() if name not in known]:
        return f"allow_several_publishers: found {', '.join(unknown)}; expected some of {' '.join(known)}"
    return None


class Stream:
    """One subscription with its rate and whatever keeps messages from arriving.

    ``on_message`` says of each message whether it counts.
    """

    def __init__(
        self, node: Node, message_type: type, topic: str, profile: QoSProfile, on_message: Callable[..., bool]
    ) -> None:
        self.topic = topic
        self.rate = Rate()
        self.lost = 0
        self._node, self.message_type = node, message_type
        self._incompatible = ""
        self._on_message = on_message
        events = SubscriptionEventCallbacks(
            incompatible_qos=self._on_incompatible, message_lost=self._on_lost, use_default_callbacks=False
        )
        self._subscription = node.create_subscription(
            message_type, topic, self._on_arrival, event_callbacks=events, **overridable(profile)
        )

    def absence(self) -> str:
        """Why nothing has arrived, as far as it can be known."""
        found = f"no message received on {self._subscription.topic_name}"
        publishers = self._node.get_publishers_info_by_topic(self._subscription.topic_name)
        expected = f"{self.message_type.__module__.split('.')[0]}/msg/{self.message_type.__name__}"
        if other := sorted({p.topic_type for p in publishers if p.topic_type != expected}):
            return f"{found}: found type {', '.join(other)}; expected {expected}"
        if self._incompatible:
            return f"{found}: found a publisher with incompatible {self._incompatible}; expected matching QoS"
        return f"{found} ({len(publishers)} publisher(s))"

    def _on_arrival(self, message: Image | CompressedImage | JointState) -> None:
        if self._on_message(message):
            self.rate.tick()

    def _on_incompatible(self, info: QoSRequestedIncompatibleQoSInfo) -> None:
        self._incompatible = qos_policy_name_from_kind(info.last_policy_kind)

    def _on_lost(self, info: QoSMessageLostInfo) -> None:
        self.lost = info.total_count


class SensorInputs:
    """The cameras and joint states of a contract.

    ``on_message`` is told the topic of every message. ``freeze_limits`` is asked whenever they count; by default nobody
    looks whether a camera is frozen. ``sole``: other topics that are meant for one publisher, as cameras are, and the
    type of their messages; None: nobody looks at publishers (in lock-step, where the player is the only one).
    ``allowed``: asked for the names of topics that may have several.
    """

    def __init__(
        self,
        node: Node,
        contract: RobotContract,
        qos: QoSProfile,
        on_message: Callable[[str], None],
        freeze_limits: Callable[[], FreezeLimits] = FreezeLimits,
        *,
        sole: Mapping[str, type] | None = None,
        allowed: Callable[[], str] = str,
    ) -> None:
        self._contract, self._on_message = contract, on_message
        self._frames = SensorFrames(contract, absence=self._absence, freeze_limits=freeze_limits)
        self.cameras = {
            camera.name: Stream(
                node,
                CompressedImage if camera.encoding == "compressed" else Image,
                camera.topic,
                qos,
                lambda message, camera=camera: self._on_picture(camera, message),
            )
            for camera in contract.cameras
        }
        self.joint_states = Stream(node, JointState, contract.joint_state_topic, qos, self._on_joint_state)
        self._senders = Publishers(node, node.resolve_topic_name(contract.joint_state_topic))
        self._sender_names: list[str] = []
        self._look_due_s = 0.0
        self._sole: SolePublishers | None = None
        if sole is not None:
            clock = {"/clock": Clock} if node.get_parameter("use_sim_time").value else {}
            cameras = {stream.topic: stream.message_type for stream in self.cameras.values()}
            topics = cameras | dict(sole) | clock
            self._sole = SolePublishers(
                node, topics, lambda: [node.resolve_topic_name(name) for name in allowed().split()]
            )

    def clear(self) -> None:
        """Forget everything received, for instance after time jumped back."""
        self._frames.clear()

    @property
    def streams(self) -> list[Stream]:
        return [*self.cameras.values(), self.joint_states]

    def fault(self, now_ns: int) -> str:
        """Why no observation can be made at ``now_ns``; "" if one can."""
        try:
            self.select(now_ns)
        except InputError as error:
            return str(error)
        return ""

    def select(self, now_ns: int) -> Selection:
        """The messages of an observation at ``now_ns``, as :meth:`SensorFrames.select` chooses them.

        Raises ``InputError`` naming the topic when anything is missing, too old, from the future, misnamed, NaN,
        implausible or frozen, or comes from several publishers.
        """
        if self.rivalry:
            raise InputError(self.rivalry)
        try:
            return self._frames.select(now_ns)
        except Fault as fault:
            if fault.cause != IMPLAUSIBLE or len(names := self._names_of_senders()) < 2:
                raise
            raise InputError(f"{fault}; found {len(names)} publishers, {', '.join(names)}") from None

    def poses(self) -> list[Pose]:
        """The newest measured poses, as :meth:`SensorFrames.poses` gives them. Raises ``InputError``."""
        return self._frames.poses()

    def status(self, now_ns: int) -> Status:
        """Rates and ages for diagnostics, and the fault if there is one."""
        values: dict[str, object] = {}
        newest = self._frames.newest_stamps()
        for stream in self.streams:
            values[f"{stream.topic} rate [Hz]"] = stream.rate.hz
            values[f"{stream.topic} received"] = stream.rate.count
            values[f"{stream.topic} lost"] = stream.lost
            if stream.topic in newest:
                values[f"{stream.topic} age [s]"] = (now_ns - newest[stream.topic]) / NS_PER_S
        values |= self._frames.counts
        fault = self.fault(now_ns)
        return Status("inputs", ERROR if fault else OK, fault or "all inputs fresh", values)

    @property
    def rivalry(self) -> str:
        """Which topic has several publishers although it may not; "" if none has."""
        return self._sole.fault if self._sole is not None else ""

    def _names_of_senders(self) -> list[str]:
        """Of joint states; looked up at most twice a second."""
        now_s = time.monotonic()
        if now_s >= self._look_due_s:
            self._sender_names, self._look_due_s = self._senders.names(), now_s + 0.5
        return self._sender_names

    def _absence(self, topic: str) -> str:
        return next(stream for stream in self.streams if stream.topic == topic).absence()

    def _on_picture(self, camera: Camera, message: Image | CompressedImage) -> bool:
        self._frames.add_picture(
            camera.name, to_ns(message.header.stamp), message, content=message.data, problem=_problem(camera, message)
        )
        self._on_message(camera.topic)
        return True

    def _on_joint_state(self, message: JointState) -> bool:
        reading = read_joints(message.name, message.position, self._contract.joint_names)
        is_state = self._frames.add_state(to_ns(message.header.stamp), reading) is not None
        self._on_message(self.joint_states.topic)
        return is_state


def _problem(camera: Camera, message: Image | CompressedImage) -> str:
    """What is wrong with a picture, as far as can be said without decoding it; "" if nothing is."""
    if not isinstance(message, Image):
        return ""
    if message.encoding not in SUPPORTED_ENCODINGS:
        return f"encoding: found {message.encoding!r}; expected one of {', '.join(SUPPORTED_ENCODINGS)}"
    if (message.width, message.height) != (camera.width, camera.height):
        return f"size: found {message.width}x{message.height}; expected {camera.width}x{camera.height}"
    return ""
