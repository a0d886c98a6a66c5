"""The robot contract: what topics, joints, units, rates and limits connect one robot to the model.

A contract is one YAML file that every node reads, so they cannot disagree on joint order, units or rates.
Reading is strict: a file that loads is complete and consistent, and a file that does not names the file,
the key path (``cameras[0].topic``), what was found there and what was expected. This module must not know
ROS (topics are strings, message stamps are nanoseconds) nor the model.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from selfalign_core.errors import ConfigError
from selfalign_core.records import Count, Only, Positive, Range, Record, load_document, named, read

# Two turns either way is more than any revolute joint with limits has; degrees written as radians exceed it.
_MAX_RADIANS = 4.0 * math.pi

Name = Annotated[str, Only(re.compile(r"[A-Za-z][A-Za-z0-9_]*").fullmatch, "a name of letters, digits and underscores")]
Topic = Annotated[
    str,
    Only(
        re.compile(r"/?[A-Za-z_][A-Za-z0-9_]*(/[A-Za-z_][A-Za-z0-9_]*)*").fullmatch,
        "a topic name such as camera/front/image_raw",
    ),
]
Seconds = Annotated[float, Range(above=0, unit="s")]
Position = Annotated[float, Range(unit="{unit}")]


class ContractError(ConfigError):
    """A contract that cannot be used: the message names file, key path, what was found and what was
    expected.
    """


class _Part(Record):
    error = ContractError


@dataclass(frozen=True)
class Camera(_Part):
    """One camera: its name in the model's observation, its topic and the exact image size it publishes."""

    name: Name
    topic: Topic
    encoding: Literal["raw", "compressed"]  # sensor_msgs/Image or sensor_msgs/CompressedImage
    height: Count  # pixels
    width: Count  # pixels


@dataclass(frozen=True)
class Joint(_Part):
    """One joint of the action and state vectors. Positions in ``unit``, velocities in ``unit`` per second.

    ``max_step``: per control step; None: the whole velocity limit may be used in each.
    """

    name: Name
    unit: Literal["rad", "m"]
    lower: Position
    upper: Position
    max_velocity: Annotated[float, Range(above=0, unit="{unit}/s")]
    home: Position
    max_step: Annotated[float, Range(above=0, unit="{unit} per step")] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("lower", "upper") if self.unit == "rad" else ():
            degrees = f"radians between -4 pi and 4 pi (joint {self.name}; are these degrees?)"
            self.expect(abs(getattr(self, key)) <= _MAX_RADIANS, key, degrees)
        self.expect(self.lower < self.upper, "lower", f"less than upper ({self.upper}) of joint {self.name}")
        within = f"a position between lower ({self.lower}) and upper ({self.upper}) of joint {self.name}"
        self.expect(self.lower <= self.home <= self.upper, "home", within)


@dataclass(frozen=True)
class ActionInterface(_Part):
    """Where and how commands leave: a joint trajectory controller or a forward (position) command
    controller.
    """

    interface: Literal["joint_trajectory", "forward_command"]
    topic: Topic


@dataclass(frozen=True)
class RobotContract(_Part):
    """Everything the nodes need to know of one robot. Joint order here is the order of states and actions.

    Raises ``ContractError`` (a ``ValueError``) when the fields contradict each other.
    """

    name: str
    cameras: tuple[Camera, ...]
    joint_state_topic: str
    joints: tuple[Joint, ...]
    action: ActionInterface
    rate_hz: Positive  # control rate: action steps per second
    replan_steps: Count  # control steps between the starts of two inferences
    max_image_age_s: Positive
    max_joint_state_age_s: Positive
    max_camera_skew_s: Positive  # between the images of one observation

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_duplicates("cameras", [camera.name for camera in self.cameras])
        _refuse_duplicates("joints", [joint.name for joint in self.joints])
        topics: dict[str, str] = {}
        for key, topic in self._topics():
            if topic in topics:
                raise ContractError(
                    f"{key}: found {topic!r}, already used by {topics[topic]}, expected distinct topics"
                )
            topics[topic] = key

    def _topics(self) -> list[tuple[str, str]]:
        cameras = [(f"cameras[{i}].topic", camera.topic) for i, camera in enumerate(self.cameras)]
        return [*cameras, ("joint_state.topic", self.joint_state_topic), ("action.topic", self.action.topic)]

    @classmethod
    def from_yaml(cls, path: str | Path) -> RobotContract:
        """Read a contract file.

        Raises ``ContractError`` naming the file, the key path, what was found and what was expected.
        """
        document = load_document(path, "a robot contract", error=ContractError)
        with named(f"robot contract {path}", ContractError):
            return read(_File, document).contract()

    @property
    def embodiment(self) -> str:
        """The name under which E-Tokens of this robot are kept."""
        return self.name

    @property
    def dt(self) -> float:
        """Length of one control step [s]."""
        return 1.0 / self.rate_hz

    @property
    def dt_ns(self) -> int:
        """Length of one control step [ns]."""
        return round(1e9 / self.rate_hz)

    @property
    def camera_names(self) -> tuple[str, ...]:
        return tuple(camera.name for camera in self.cameras)

    @property
    def joint_names(self) -> tuple[str, ...]:
        return tuple(joint.name for joint in self.joints)

    @property
    def lower(self) -> np.ndarray:
        """Lower position limits, (joints,) float64, contract units."""
        return np.array([joint.lower for joint in self.joints])

    @property
    def upper(self) -> np.ndarray:
        """Upper position limits, (joints,) float64, contract units."""
        return np.array([joint.upper for joint in self.joints])

    @property
    def speed_limit(self) -> np.ndarray:
        """The stricter of ``max_velocity`` and ``max_step`` per control step, (joints,) float64, unit/s."""
        limits = []
        for joint in self.joints:
            step = joint.max_velocity / self.rate_hz if joint.max_step is None else joint.max_step
            limits.append(min(joint.max_velocity, step * self.rate_hz))
        return np.array(limits)

    @property
    def home(self) -> np.ndarray:
        """Resting position inside the limits, (joints,) float64, contract units."""
        return np.array([joint.home for joint in self.joints])


# --- the file ---


@dataclass(frozen=True)
class _Control(_Part):
    rate_hz: Annotated[float, Range(above=0, unit="Hz")]
    replan_steps: Count
    max_image_age: Seconds
    max_joint_state_age: Seconds
    max_camera_skew: Seconds | None = None


@dataclass(frozen=True)
class _JointState(_Part):
    topic: Topic


@dataclass(frozen=True)
class _File(_Part):
    """The sections of a contract file."""

    name: Name
    control: _Control
    cameras: Annotated[tuple[Camera, ...], Only(len, "a non-empty list")]
    joint_state: _JointState
    joints: Annotated[tuple[Joint, ...], Only(len, "a non-empty list")]
    action: ActionInterface

    def contract(self) -> RobotContract:
        control = self.control
        # Images that may not be older than that are never further apart.
        skew = control.max_image_age if control.max_camera_skew is None else control.max_camera_skew
        return RobotContract(
            name=self.name,
            cameras=self.cameras,
            joint_state_topic=self.joint_state.topic,
            joints=self.joints,
            action=self.action,
            rate_hz=control.rate_hz,
            replan_steps=control.replan_steps,
            max_image_age_s=control.max_image_age,
            max_joint_state_age_s=control.max_joint_state_age,
            max_camera_skew_s=skew,
        )


def _refuse_duplicates(key: str, names: list[str]) -> None:
    for i, name in enumerate(names):
        first = names.index(name)
        if first != i:
            raise ContractError(
                f"{key}[{i}].name: found {name!r}, already used by {key}[{first}], expected unique names"
            )
