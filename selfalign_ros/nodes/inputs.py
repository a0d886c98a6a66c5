"""What the robot reports: the newest image of every camera and the recent joint states, and what is wrong
with them.

Callbacks only store. ``fault`` is cheap enough for every control step; ``select`` picks the messages of one
observation by their header stamps; decoding happens later, in the worker of the node that needs the pixels. A node that
gives limits for frozen cameras has each picture compared with the one before, as it arrives.
"""

from __future__ import annotations

import contextlib
import itertools
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

from selfalign_core.errors import InputError
from selfalign_core.robot.contract import Camera, RobotContract
from selfalign_core.robot.frozen import FreezeLimits, PictureRun
from selfalign_core.robot.images import SUPPORTED_ENCODINGS
from selfalign_core.robot.measured import Pose
from selfalign_ros.bridge.conversions import NS_PER_S, decode, positions_in_order, to_ns
from selfalign_ros.bridge.qos import overridable
from selfalign_ros.life.diagnostics import ERROR, OK, Rate, Status

# Enough joint states to reach back past the oldest image allowed and the limit for frozen cameras, at a thousand per
# second.
_JOINT_STATES_KEPT = 1024
_POSES = 5  # that have to agree before motion starts: foreign ones come in between, or a few in a row


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
    """The cameras and joint states of a contract.

    ``freeze_limits`` is asked whenever they count; by default nobody looks whether a camera is frozen.
    """

    def __init__(
        self,
        node: Node,
        contract: RobotContract,
        qos: QoSProfile,
        on_message: Callable[[str], None],
        freeze_limits: Callable[[], FreezeLimits] = FreezeLimits,
    ) -> None:
        self._contract = contract
        self._on_message, self._freeze_limits = on_message, freeze_limits
        self._runs = {camera.name: PictureRun() for camera in contract.cameras}
        self.cameras = {
            camera.name: Stream(
                node,
                CompressedImage if camera.encoding == "compressed" else Image,
                camera.topic,
                qos,
                lambda topic, name=camera.name: self._on_picture(name, topic),
            )
            for camera in contract.cameras
        }
        self.joint_states = Stream(
            node, JointState, contract.joint_state_topic, qos, self._on_joint_state, _JOINT_STATES_KEPT
        )

    def clear(self) -> None:
        """Forget everything received, for instance after time jumped back."""
        for stream in self.streams:
            stream.messages.clear()
        self._runs = {name: PictureRun() for name in self._runs}

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
        Raises ``InputError`` naming the topic when anything is missing, too old, from the future, misnamed,
        NaN or frozen.
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
        self._check_age("joint states", topic, to_ns(newest.header.stamp), now_ns, contract.max_joint_state_age_s)
        # The newest one is checked even if an older one is used: a robot that reports NaN now must not move
        # now.
        state = positions_in_order(newest, contract.joint_names, topic)
        message = self._joint_state_at(stamp_ns)
        if message is None:
            ahead_s = (to_ns(self.joint_states.messages[0].header.stamp) - stamp_ns) / NS_PER_S
            raise InputError(
                f"joint states at the oldest image ({topic}): found the first {ahead_s:.3f} s after it; "
                "expected one not newer"
            )
        # After a gap the one before the images can be far older than they are: where the robot was, not is.
        limit_s = contract.max_joint_state_age_s
        self._check_age("joint states at the oldest image", topic, to_ns(message.header.stamp), stamp_ns, limit_s)
        if message is not newest:
            state = positions_in_order(message, contract.joint_names, topic)
        self._check_pictures()
        return Selection(images, state, stamp_ns)

    def poses(self) -> list[Pose]:
        """The newest measured poses, oldest first, back to one that cannot be read. Raises ``InputError``."""
        poses: list[Pose] = []
        for message in itertools.islice(reversed(self.joint_states.messages), _POSES):
            try:
                position = positions_in_order(message, self._contract.joint_names, self.joint_states.topic)
            except InputError:
                if not poses:
                    raise
                break
            poses.insert(0, Pose(to_ns(message.header.stamp), position))
        return poses

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

    def _on_picture(self, camera: str, topic: str) -> None:
        if self._freeze_limits().after_s:
            message = self.cameras[camera].newest
            self._runs[camera].add(message.data, to_ns(message.header.stamp))
            self._note_poses()
        self._on_message(topic)

    def _on_joint_state(self, topic: str) -> None:
        self._note_poses()
        self._on_message(topic)

    def _note_poses(self) -> None:
        """Where the joints were when a camera's picture was first seen, once joint states have passed that stamp.

        So it does not matter which of the two arrived first.
        """
        newest = self.joint_states.newest
        for run in self._runs.values():
            if run.waits_for_pose and newest is not None and to_ns(newest.header.stamp) > run.since_ns:
                with contextlib.suppress(InputError):  # a state that says nothing; ``select`` names it
                    run.pose = self._positions_at(run.since_ns)

    def _check_pictures(self) -> None:
        limits = self._freeze_limits()
        for name, run in self._runs.items():
            if fault := run.fault(limits, self._contract.joints, self._positions_at):
                raise InputError(f"camera {name} ({self.cameras[name].topic}): {fault}")

    def _joint_state_at(self, stamp_ns: int) -> JointState | None:
        """The newest joint state that is not newer than ``stamp_ns``."""
        for message in reversed(self.joint_states.messages):
            if to_ns(message.header.stamp) <= stamp_ns:
                return message
        return None

    def _positions_at(self, stamp_ns: int) -> np.ndarray:
        """Where the joints were, or where they are first known to have been, (joints,). Raises ``InputError``."""
        message = self._joint_state_at(stamp_ns) or self.joint_states.messages[0]
        return positions_in_order(message, self._contract.joint_names, self.joint_states.topic)

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
        self._check_age(source, camera.topic, to_ns(message.header.stamp), now_ns, self._contract.max_image_age_s)
        return message

    def _check_age(self, source: str, topic: str, stamp_ns: int, now_ns: int, limit_s: float) -> None:
        age_s = (now_ns - stamp_ns) / NS_PER_S
        if age_s > limit_s:
            raise InputError(f"{source} ({topic}): found age {age_s:.3f} s; expected at most {limit_s} s")
        if -age_s > (ahead_s := min(limit_s, self._contract.dt)):
            raise InputError(
                f"{source} ({topic}): found a stamp {-age_s:.3f} s in the future; expected synchronised clocks, "
                f"at most {ahead_s} s apart"
            )
