"""The robot contract: what topics, joints, units, rates and limits connect one robot to the model.

A contract is one YAML file that every node reads, so they cannot disagree on joint order, units or rates.
Reading is strict: a file that loads is complete and consistent, and a file that does not names the file,
the key path (``cameras[0].topic``), what was found there and what was expected. This module must not know
ROS (topics are strings, message stamps are nanoseconds) nor the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from selfalign_core.errors import ConfigError

CAMERA_ENCODINGS = ("raw", "compressed")
JOINT_UNITS = ("rad", "m")
ACTION_INTERFACES = ("joint_trajectory", "forward_command")

# Two turns either way is more than any revolute joint with limits has; degrees written as radians exceed it.
_MAX_RADIANS = 4.0 * math.pi
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_TOPIC = re.compile(r"/?[A-Za-z_][A-Za-z0-9_]*(/[A-Za-z_][A-Za-z0-9_]*)*")


class ContractError(ConfigError):
    """A contract that cannot be used: the message names file, key path, what was found and what was
    expected.
    """


@dataclass(frozen=True)
class Camera:
    """One camera: its name in the model's observation, its topic and the exact image size it publishes."""

    name: str
    topic: str
    encoding: str  # "raw" (sensor_msgs/Image) or "compressed" (sensor_msgs/CompressedImage)
    height: int  # pixels
    width: int  # pixels


@dataclass(frozen=True)
class Joint:
    """One joint of the action and state vectors. Positions in ``unit``, velocities in ``unit`` per second."""

    name: str
    unit: str  # "rad" or "m"
    lower: float  # unit
    upper: float  # unit
    max_velocity: float  # unit/s
    max_step: float  # unit per control step
    home: float  # unit


@dataclass(frozen=True)
class ActionInterface:
    """Where and how commands leave: a joint trajectory controller or a forward (position) command
    controller.
    """

    interface: str  # "joint_trajectory" or "forward_command"
    topic: str


@dataclass(frozen=True)
class RobotContract:
    """Everything the nodes need to know of one robot. Joint order here is the order of states and actions.

    Raises ``ContractError`` (a ``ValueError``) when the fields contradict each other.
    """

    name: str
    cameras: tuple[Camera, ...]
    joint_state_topic: str
    joints: tuple[Joint, ...]
    action: ActionInterface
    rate_hz: float  # control rate: action steps per second
    replan_steps: int  # control steps between the starts of two inferences
    max_image_age_s: float
    max_joint_state_age_s: float
    max_camera_skew_s: float  # between the images of one observation

    def __post_init__(self) -> None:
        _refuse_duplicates("cameras", "name", [camera.name for camera in self.cameras])
        _refuse_duplicates("joints", "name", [joint.name for joint in self.joints])
        topics: dict[str, str] = {}
        for key, topic in self._topics():
            if topic in topics:
                raise ContractError(
                    f"{key}: found {topic!r}, already used by {topics[topic]}; expected distinct topics"
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
        try:
            document = _load_yaml(Path(path))
            return _parse_contract(_Section(document, ""))
        except ContractError as error:
            raise ContractError(f"robot contract {path}: {error}") from None

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
        return np.array([min(joint.max_velocity, joint.max_step * self.rate_hz) for joint in self.joints])

    @property
    def home(self) -> np.ndarray:
        """Resting position inside the limits, (joints,) float64, contract units."""
        return np.array([joint.home for joint in self.joints])


# --- reading ---


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys without a word; a contract must not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if isinstance(key, Hashable) and key in seen:
                line = key_node.start_mark.line + 1
                raise ContractError(f"{key}: found twice (line {line}); expected each key once")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _load_yaml(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ContractError("found no such file; expected a YAML contract") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ContractError(f"found an unreadable file ({error}); expected a YAML contract") from None
    try:
        return yaml.load(text, _UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ContractError(f"found invalid YAML ({' '.join(str(error).split())}); expected a mapping") from None


class _Section:
    """One mapping of the file together with its key path; hands out checked values and refuses unknown
    keys.
    """

    def __init__(self, value: Any, path: str) -> None:
        self.path = path
        if not isinstance(value, dict):
            raise ContractError(f"{path or 'top level'}: found {_shown(value)}; expected a mapping")
        self._values = value

    def only(self, *allowed: str) -> _Section:
        for key in self._values:
            if key not in allowed:
                raise ContractError(f"{self._at(key)}: found an unknown key; expected one of {', '.join(allowed)}")
        return self

    def has(self, key: str) -> bool:
        return key in self._values

    def section(self, key: str) -> _Section:
        return _Section(self._get(key, "a mapping"), self._at(key))

    def sections(self, key: str) -> list[_Section]:
        values = self._get(key, "a non-empty list")
        if not isinstance(values, list) or not values:
            raise ContractError(f"{self._at(key)}: found {_shown(values)}; expected a non-empty list")
        return [_Section(value, f"{self._at(key)}[{i}]") for i, value in enumerate(values)]

    def one_of(self, key: str, allowed: tuple[str, ...]) -> str:
        expected = f"one of {', '.join(allowed)}"
        return self._checked(key, expected, lambda value: isinstance(value, str) and value in allowed)

    def name(self, key: str) -> str:
        expected = "a name of letters, digits and underscores"
        return self._checked(key, expected, lambda value: isinstance(value, str) and bool(_NAME.fullmatch(value)))

    def topic(self, key: str) -> str:
        expected = "a topic name such as camera/front/image_raw"
        return self._checked(key, expected, lambda value: isinstance(value, str) and bool(_TOPIC.fullmatch(value)))

    def integer(self, key: str, *, minimum: int) -> int:
        def valid(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and value >= minimum

        return self._checked(key, f"an integer of at least {minimum}", valid)

    def number(self, key: str, unit: str) -> float:
        return float(self._checked(key, f"a finite number in {unit}", _is_finite))

    def positive(self, key: str, unit: str) -> float:
        expected = f"a finite number above 0 in {unit}"
        return float(self._checked(key, expected, lambda value: _is_finite(value) and value > 0))

    def refuse(self, key: str, expected: str) -> None:
        raise ContractError(f"{self._at(key)}: found {_shown(self._values[key])}; expected {expected}")

    def _get(self, key: str, expected: str) -> Any:
        if key not in self._values:
            raise ContractError(f"{self._at(key)}: found nothing; expected {expected}")
        return self._values[key]

    def _checked(self, key: str, expected: str, valid: Callable[[Any], bool]) -> Any:
        value = self._get(key, expected)
        if not valid(value):
            raise ContractError(f"{self._at(key)}: found {_shown(value)}; expected {expected}")
        return value

    def _at(self, key: Any) -> str:
        return f"{self.path}.{key}" if self.path else str(key)


def _parse_contract(root: _Section) -> RobotContract:
    root.only("name", "control", "cameras", "joint_state", "joints", "action")
    control = root.section("control").only(
        "rate_hz", "replan_steps", "max_image_age", "max_joint_state_age", "max_camera_skew"
    )
    rate_hz = control.positive("rate_hz", "Hz")
    max_image_age_s = control.positive("max_image_age", "s")
    # Images that may not be older than that are never further apart.
    skewed = control.has("max_camera_skew")
    joint_state = root.section("joint_state").only("topic")
    action = root.section("action").only("interface", "topic")
    return RobotContract(
        name=root.name("name"),
        cameras=tuple(_parse_camera(section) for section in root.sections("cameras")),
        joint_state_topic=joint_state.topic("topic"),
        joints=tuple(_parse_joint(section, rate_hz) for section in root.sections("joints")),
        action=ActionInterface(action.one_of("interface", ACTION_INTERFACES), action.topic("topic")),
        rate_hz=rate_hz,
        replan_steps=control.integer("replan_steps", minimum=1),
        max_image_age_s=max_image_age_s,
        max_joint_state_age_s=control.positive("max_joint_state_age", "s"),
        max_camera_skew_s=control.positive("max_camera_skew", "s") if skewed else max_image_age_s,
    )


def _parse_camera(section: _Section) -> Camera:
    section.only("name", "topic", "encoding", "height", "width")
    return Camera(
        name=section.name("name"),
        topic=section.topic("topic"),
        encoding=section.one_of("encoding", CAMERA_ENCODINGS),
        height=section.integer("height", minimum=1),
        width=section.integer("width", minimum=1),
    )


def _parse_joint(section: _Section, rate_hz: float) -> Joint:
    section.only("name", "unit", "lower", "upper", "max_velocity", "max_step", "home")
    name = section.name("name")
    unit = section.one_of("unit", JOINT_UNITS)
    lower = section.number("lower", unit)
    upper = section.number("upper", unit)
    if unit == "rad":
        for key, value in (("lower", lower), ("upper", upper)):
            if abs(value) > _MAX_RADIANS:
                section.refuse(key, f"radians between -4 pi and 4 pi (joint {name}; are these degrees?)")
    if lower >= upper:
        section.refuse("lower", f"less than upper ({upper}) of joint {name}")
    max_velocity = section.positive("max_velocity", f"{unit}/s")
    # Without a step limit of its own, a joint may use its whole velocity limit in each control step.
    max_step = section.positive("max_step", f"{unit} per step") if section.has("max_step") else max_velocity / rate_hz
    home = section.number("home", unit)
    if not lower <= home <= upper:
        section.refuse("home", f"a position between lower ({lower}) and upper ({upper}) of joint {name}")
    return Joint(name, unit, lower, upper, max_velocity, max_step, home)


def _refuse_duplicates(key: str, field: str, names: list[str]) -> None:
    for i, name in enumerate(names):
        first = names.index(name)
        if first != i:
            raise ContractError(
                f"{key}[{i}].{field}: found {name!r}, already used by {key}[{first}]; expected unique names"
            )


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
