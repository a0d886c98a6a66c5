"""What the robot reports: the newest image of every camera and the recent joint states, and what is wrong
with them.

Callbacks only store. ``fault`` is cheap enough for every control step; ``select`` picks the messages of one
observation by their header stamps; decoding happens later, in the worker of the node that needs the pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from rclpy.event_handler import (
    QoSRequestedIncompatibleQoSInfo,
    SubscriptionEventCallbacks,
    qos_policy_name_from_kind,
)
from rclpy.node import Node
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CompressedImage, Image, JointState

from selfalign_core.contract import Camera, RobotContract
from selfalign_core.errors import InputError
from selfalign_core.images import SUPPORTED_ENCODINGS
from selfalign_ros.conversions import NS_PER_S, decode, positions_in_order, to_ns
from selfalign_ros.diagnostics import ERROR, OK, Rate, Status
from selfalign_ros.qos import overridable

# Enough joint states to reach back past the oldest image allowed, at several hundred per second.
_JOINT_STATES_KEPT = 256


@dataclass(frozen=True)
class Selection:
    """The messages of one observation. ``stamp_ns`` is the stamp of its oldest image."""

    images: dict[str, Image | CompressedImage]
    state: np.ndarray  # (joints,) float64, contract order and units
    stamp_ns: int

    def decode(self, contract: RobotContract, size: tuple[int, int]) -> dict[str, np.ndarray]:
        """Camera name -> (H, W, 3) uint8 RGB at the model's ``size`` (H, W). Raises ``InputError`` naming the
        camera.
        """
        return {camera.name: decode(camera, self.images[camera.name], size) for camera in contract.cameras}


class Stream:
    """One subscription with its newest message, its rate and whatever keeps messages from arriving."""

    def __init__(
        self,
        node: Node,
        message_type: type,
        topic: str,
        profile: QoSProfile,
        on_message: Callable[[str], None],
        keep: int = 1,
    ) -> None:
        self.topic = topic
        self.messages: deque = deque(maxlen=keep)
        self.rate = Rate()
        self.lost = 0
        self._node, self._type = node, message_type
        self._incompatible = ""
        self._on_message = on_message
        events = SubscriptionEventCallbacks(
            incompatible_qos=self._on_incompatible, message_lost=self._on_lost, use_default_callbacks=False
        )
        self._subscription = node.create_subscription(
            message_type, topic, self._on_arrival, event_callbacks=events, **overridable(profile)
        )

    @property
    def newest(self) -> Image | CompressedImage | JointState | None:
        return self.messages[-1] if self.messages else None

    def absence(self) -> str:
        """Why nothing has arrived, as far as it can be known."""
        found = f"no message received on {self._subscription.topic_name}"
        publishers = self._node.get_publishers_info_by_topic(self._subscription.topic_name)
        expected = f"{self._type.__module__.split('.')[0]}/msg/{self._type.__name__}"
        if other := sorted({p.topic_type for p in publishers if p.topic_type != expected}):
            return f"{found}: found type {', '.join(other)}; expected {expected}"
        if self._incompatible:
            return f"{found}: found a publisher with incompatible {self._incompatible}; expected matching QoS"
        return f"{found} ({len(publishers)} publisher(s))"

    def _on_arrival(self, message: Image | CompressedImage | JointState) -> None:
        self.messages.append(message)
        self.rate.tick()
        self._on_message(self.topic)

    def _on_incompatible(self, info: QoSRequestedIncompatibleQoSInfo) -> None:
        self._incompatible = qos_policy_name_from_kind(info.last_policy_kind)

    def _on_lost(self, info: object) -> None:
        self.lost = info.total_count  # type: ignore[attr-defined]


class SensorInputs:
    """The cameras and joint states of a contract."""

    def __init__(self, node: Node, contract: RobotContract, qos: QoSProfile, on_message: Callable[[str], None]) -> None:
        self._contract = contract
        self.cameras = {
            camera.name: Stream(
                node, CompressedImage if camera.encoding == "compressed" else Image, camera.topic, qos, on_message
            )
            for camera in contract.cameras
        }
        self.joint_states = Stream(node, JointState, contract.joint_state_topic, qos, on_message, _JOINT_STATES_KEPT)

    def clear(self) -> None:
        """Forget everything received, for instance after time jumped back."""
        for stream in self.streams:
            stream.messages.clear()

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
        """The messages of an observation at ``now_ns``.

        The newest image of each camera, and the newest joint state that is not newer than the oldest of them.
        Raises ``InputError`` naming the topic when anything is missing, too old, from the future, misnamed
        or NaN.
        """
        contract = self._contract
        images = {camera.name: self._image(camera, now_ns) for camera in contract.cameras}
        stamps = {name: to_ns(image.header.stamp) for name, image in images.items()}
        stamp_ns = min(stamps.values())
        skew_s = (max(stamps.values()) - stamp_ns) / NS_PER_S
        if skew_s > contract.max_camera_skew_s:
            oldest, newest_camera = min(stamps, key=stamps.__getitem__), max(stamps, key=stamps.__getitem__)
            raise InputError(
                f"cameras {oldest} and {newest_camera}: found images {skew_s:.3f} s apart; expected at most "
                f"{contract.max_camera_skew_s} s"
            )
        newest = self.joint_states.newest
        if newest is None:
            raise InputError(f"joint states: {self.joint_states.absence()}")
        topic = self.joint_states.topic
        _check_age("joint states", topic, to_ns(newest.header.stamp), now_ns, contract.max_joint_state_age_s)
        # The newest one is checked even if an older one is used: a robot that reports NaN now must not move
        # now.
        state = positions_in_order(newest, contract.joint_names, topic)
        for message in reversed(self.joint_states.messages):
            message_ns = to_ns(message.header.stamp)
            if message_ns <= stamp_ns:
                # After a gap the one before the images can be far older than they are: where the robot was, not is.
                limit_s = contract.max_joint_state_age_s
                _check_age("joint states at the oldest image", topic, message_ns, stamp_ns, limit_s)
                if message is not newest:
                    state = positions_in_order(message, contract.joint_names, topic)
                break
        return Selection(images, state, stamp_ns)

    def newest_positions(self) -> np.ndarray:
        """The measured position, (joints,) float64. Raises ``InputError``."""
        newest = self.joint_states.newest
        if newest is None:
            raise InputError(f"joint states: {self.joint_states.absence()}")
        return positions_in_order(newest, self._contract.joint_names, self.joint_states.topic)

    def status(self, now_ns: int) -> Status:
        """Rates and ages for diagnostics, and the fault if there is one."""
        values: dict[str, object] = {}
        for stream in self.streams:
            values[f"{stream.topic} rate [Hz]"] = stream.rate.hz
            values[f"{stream.topic} received"] = stream.rate.count
            values[f"{stream.topic} lost"] = stream.lost
            if stream.newest is not None:
                values[f"{stream.topic} age [s]"] = (now_ns - to_ns(stream.newest.header.stamp)) / NS_PER_S
        fault = self.fault(now_ns)
        return Status("inputs", ERROR if fault else OK, fault or "all inputs fresh", values)

    def _image(self, camera: Camera, now_ns: int) -> Image | CompressedImage:
        stream = self.cameras[camera.name]
        message = stream.newest
        if message is None:
            raise InputError(f"camera {camera.name}: {stream.absence()}")
        source = f"camera {camera.name}"
        if isinstance(message, Image):
            if message.encoding not in SUPPORTED_ENCODINGS:
                raise InputError(
                    f"{source} ({camera.topic}): encoding: found {message.encoding!r}; "
                    f"expected one of {', '.join(SUPPORTED_ENCODINGS)}"
                )
            if (message.width, message.height) != (camera.width, camera.height):
                raise InputError(
                    f"{source} ({camera.topic}): size: found {message.width}x{message.height}; "
                    f"expected {camera.width}x{camera.height}"
                )
        _check_age(source, camera.topic, to_ns(message.header.stamp), now_ns, self._contract.max_image_age_s)
        return message


def _check_age(source: str, topic: str, stamp_ns: int, now_ns: int, limit_s: float) -> None:
    age_s = (now_ns - stamp_ns) / NS_PER_S
    if age_s > limit_s:
        raise InputError(f"{source} ({topic}): found age {age_s:.3f} s; expected at most {limit_s} s")
    if age_s < -limit_s:
        raise InputError(
            f"{source} ({topic}): found a stamp {-age_s:.3f} s in the future; expected synchronised clocks"
        )
