"""The body of one simulated arm: everything a policy cannot know before it moves.

A body is a small YAML file or a random draw; the nominal body is the arm the robot contract describes. Reading is
strict: a file that loads is complete and in range, and a file that does not names the file, the key, what was found
and what was expected. This module knows names, numbers and ranges only, neither MuJoCo nor pixels nor ROS.

Frames. Encoders report and commands are given in the *motor frame* ``m``. The transmission of a joint maps it to the
kinematic joint angle ``q = sign * gain * m + offset``, for measurement and command alike, as in a reversed or
mis-calibrated servo.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..errors import ConfigError

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "forearm_roll", "wrist_flex", "wrist_roll", "gripper")
CAMERAS = ("overhead", "wrist")
FAMILIES = ("sign", "gain", "offset", "link", "strength", "damping", "payload", "camera", "mirror", "colour", "light")
"""What ``BodyConfig.sample`` can randomise, each family by itself."""


def _check_number(key: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise ConfigError(f"{key}: found {value!r} ({type(value).__name__}), expected a number in [{low:g}, {high:g}]")
    if not (math.isfinite(value) and low <= value <= high):
        raise ConfigError(f"{key}: found {value!r}, expected a number in [{low:g}, {high:g}]")


def _check_vector(key: str, value: Any, low: float, high: float) -> None:
    if not isinstance(value, tuple) or len(value) != 3:
        raise ConfigError(f"{key}: found {value!r}, expected 3 numbers in [{low:g}, {high:g}]")
    for i, item in enumerate(value):
        _check_number(f"{key}[{i}]", item, low, high)


def _check_section(key: str, value: Any, cls: type) -> None:
    if not isinstance(value, cls):
        raise ConfigError(f"{key}: found {value!r} ({type(value).__name__}), expected {cls.__name__}")


@dataclass(frozen=True)
class LinkBody:
    """Length of each link as a multiple of the nominal one, in [0.5, 1.5]."""

    base: float = 1.0  # table to shoulder_lift axis
    upper_arm: float = 1.0
    forearm: float = 1.0
    hand: float = 1.0  # wrist_flex axis to gripper tip

    def __post_init__(self) -> None:
        for name in _names(LinkBody):
            _check_number(name, getattr(self, name), 0.5, 1.5)


@dataclass(frozen=True)
class JointBody:
    """One joint: its transmission ``q = sign * gain * m + offset`` and its servo."""

    sign: int = 1  # 1 or -1
    gain: float = 1.0  # kinematic rad per motor rad, in [0.25, 4]
    offset: float = 0.0  # kinematic rad, in [-1, 1]
    strength: float = 1.0  # multiple of the nominal position gain and torque limit, in [0.05, 5]
    damping: float = 1.0  # multiple of the nominal passive damping, in [0, 20]

    def __post_init__(self) -> None:
        if isinstance(self.sign, bool) or self.sign not in (1, -1):
            raise ConfigError(f"sign: found {self.sign!r}, expected 1 or -1")
        _check_number("gain", self.gain, 0.25, 4.0)
        _check_number("offset", self.offset, -1.0, 1.0)
        _check_number("strength", self.strength, 0.05, 5.0)
        _check_number("damping", self.damping, 0.0, 20.0)


@dataclass(frozen=True)
class CameraBody:
    """Where a camera really is, relative to its nominal mount, and what it does to colours."""

    position: tuple[float, float, float] = (0.0, 0.0, 0.0)  # m, along its right, up, back axes
    rotation: tuple[float, float, float] = (0.0, 0.0, 0.0)  # rad, about its right, then up, then back axis
    mirror: bool = False  # image flipped left to right
    hue: float = 0.0  # rad, rotation of every colour about the grey axis
    brightness: float = 1.0  # factor on every pixel, in [0.2, 2]

    def __post_init__(self) -> None:
        _check_vector("position", self.position, -0.5, 0.5)
        _check_vector("rotation", self.rotation, -math.pi, math.pi)
        if not isinstance(self.mirror, bool):
            raise ConfigError(f"mirror: found {self.mirror!r}, expected true or false")
        _check_number("hue", self.hue, -math.pi, math.pi)
        _check_number("brightness", self.brightness, 0.2, 2.0)


@dataclass(frozen=True)
class LightBody:
    """The lamp above the table and the room's ambient light."""

    intensity: float = 1.0  # multiple of the nominal lamp, in [0, 2]
    ambient: float = 1.0  # multiple of the nominal ambient light, in [0, 2]
    colour: tuple[float, float, float] = (1.0, 1.0, 1.0)  # RGB factors on the lamp, each in [0, 2]
    direction: tuple[float, float, float] = (-0.35, 0.3, -1.0)  # the way the light travels, table frame, not zero

    def __post_init__(self) -> None:
        _check_number("intensity", self.intensity, 0.0, 2.0)
        _check_number("ambient", self.ambient, 0.0, 2.0)
        _check_vector("colour", self.colour, 0.0, 2.0)
        _check_vector("direction", self.direction, -10.0, 10.0)
        if not any(self.direction):
            raise ConfigError(f"direction: found {self.direction!r}, expected a vector that is not zero")


@dataclass(frozen=True)
class BodyRanges:
    """How far ``BodyConfig.sample`` strays from nominal. Half widths; factors are drawn as ``exp(uniform(-w, w))``."""

    sign_probability: float = 0.5  # per joint
    gain: float = 0.25  # log factor
    offset: float = 0.2  # rad
    link: float = 0.12  # log factor
    strength: float = 0.5  # log factor
    damping: float = 1.0  # log factor
    payload: float = 0.25  # kg, from 0
    camera_position: float = 0.04  # m per axis
    camera_rotation: float = 0.12  # rad per axis
    mirror_probability: float = 0.5  # per camera
    hue: float = 0.35  # rad
    brightness: float = 0.2  # log factor
    light: float = 0.3  # log factor on lamp, ambient and each colour

    def __post_init__(self) -> None:
        for name, high in _RANGE_LIMITS.items():
            _check_number(name, getattr(self, name), 0.0, high)

    def scaled(self, factor: float) -> BodyRanges:
        """The same ranges, wider or narrower; probabilities stay. Raises ``ConfigError`` beyond what a body allows."""
        return dataclasses.replace(
            self, **{n: factor * getattr(self, n) for n in _RANGE_LIMITS if not n.endswith("probability")}
        )


_RANGE_LIMITS = {
    "sign_probability": 1.0, "gain": 1.3, "offset": 1.0, "link": 0.4, "strength": 1.6, "damping": 2.9,
    "payload": 2.0, "camera_position": 0.5, "camera_rotation": math.pi, "mirror_probability": 1.0, "hue": math.pi,
    "brightness": 0.69, "light": 0.69,
}  # fmt: skip


@dataclass(frozen=True)
class BodyConfig:
    """One simulated body. ``BodyConfig()`` is the nominal one.

    Raises ``ConfigError`` (a ``ValueError``) naming the field, what was found and what was expected.
    """

    name: str = "nominal"
    links: LinkBody = field(default_factory=LinkBody)
    joints: tuple[JointBody, ...] = (JointBody(),) * len(JOINTS)  # in the order of JOINTS
    payload: float = 0.0  # kg, rigidly held by the gripper, in [0, 2]
    overhead: CameraBody = field(default_factory=CameraBody)
    wrist: CameraBody = field(default_factory=CameraBody)
    light: LightBody = field(default_factory=LightBody)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"name: found {self.name!r}, expected a non-empty string")
        _check_section("links", self.links, LinkBody)
        if not isinstance(self.joints, tuple) or len(self.joints) != len(JOINTS):
            raise ConfigError(f"joints: found {self.joints!r}, expected a tuple of {len(JOINTS)} JointBody")
        for name, joint in zip(JOINTS, self.joints, strict=True):
            _check_section(f"joints.{name}", joint, JointBody)
        _check_number("payload", self.payload, 0.0, 2.0)
        for name in CAMERAS:
            _check_section(f"cameras.{name}", self.camera(name), CameraBody)
        _check_section("light", self.light, LightBody)

    def camera(self, name: str) -> CameraBody:
        """The camera called ``name``; ``ConfigError`` for a name outside ``CAMERAS``."""
        if name not in CAMERAS:
            raise ConfigError(f"camera: found {name!r}, expected one of {', '.join(CAMERAS)}")
        return getattr(self, name)

    def joint(self, name: str) -> JointBody:
        """The joint called ``name``; ``ConfigError`` for a name outside ``JOINTS``."""
        return self.joints[_joint_index(name)]

    def replace_joint(self, name: str, **changes: Any) -> BodyConfig:
        """This body with some fields of one joint changed."""
        i = _joint_index(name)
        joints = list(self.joints)
        joints[i] = dataclasses.replace(joints[i], **changes)
        return dataclasses.replace(self, joints=tuple(joints))

    @property
    def transmission(self) -> tuple[np.ndarray, np.ndarray]:
        """``(scale, offset)``, each (7,) float64, such that ``q = scale * m + offset``."""
        scale = np.array([j.sign * j.gain for j in self.joints], np.float64)
        return scale, np.array([j.offset for j in self.joints], np.float64)

    # ---- YAML -------------------------------------------------------------------------------------------------

    @classmethod
    def from_yaml(cls, path: str | Path) -> BodyConfig:
        """Read a body file. Keys that are left out are nominal, keys that are unknown are an error.

        Raises ``ConfigError`` naming the file, the key, what was found and what was expected; ``FileNotFoundError``
        when there is no such file.
        """
        path = Path(path)
        try:
            tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not readable as YAML: {error}") from error
        try:
            return cls.from_dict(tree)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, tree: Any) -> BodyConfig:
        """Build a body from plain data (the layout of the YAML file). Raises ``ConfigError`` as ``from_yaml`` does."""
        tree = _mapping("body", tree, ("name", "links", "joints", "payload", "cameras", "light"))
        if "name" not in tree:
            raise ConfigError("name: found nothing, expected the name of the body")
        values: dict[str, Any] = {key: tree[key] for key in ("name", "payload") if key in tree}
        if "links" in tree:
            values["links"] = _section("links", tree["links"], LinkBody)
        if "joints" in tree:
            joints = _mapping("joints", tree["joints"], JOINTS)
            values["joints"] = tuple(_section(f"joints.{n}", joints.get(n, {}), JointBody) for n in JOINTS)
        for name, camera in _mapping("cameras", tree.get("cameras", {}), CAMERAS).items():
            values[name] = _section(f"cameras.{name}", camera, CameraBody)
        if "light" in tree:
            values["light"] = _section("light", tree["light"], LightBody)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that ``from_dict`` turns back into an equal body, fit for YAML and JSON."""

        def plain(section: Any) -> dict[str, Any]:
            values = {name: getattr(section, name) for name in _names(type(section))}
            return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

        return {
            "name": self.name,
            "links": plain(self.links),
            "joints": {name: plain(joint) for name, joint in zip(JOINTS, self.joints, strict=True)},
            "payload": self.payload,
            "cameras": {name: plain(self.camera(name)) for name in CAMERAS},
            "light": plain(self.light),
        }

    # ---- random bodies ----------------------------------------------------------------------------------------

    @classmethod
    def sample(
        cls,
        rng: np.random.Generator,
        *,
        families: Collection[str] = FAMILIES,
        ranges: BodyRanges | None = None,
        active_joints: Collection[str] = JOINTS,
        name: str = "sampled",
    ) -> BodyConfig:
        """Draw a body.

        Args:
            rng: source of all randomness. The same number of draws is made whatever the families, so bodies of
                different families from equal generators share what they have in common.
            families: which of ``FAMILIES`` stray from nominal.
            ranges: how far.
            active_joints: joints whose transmission and servo may stray; the others stay nominal.
            name: name of the body.

        Raises:
            ConfigError: unknown family or joint.
        """
        ranges = ranges or BodyRanges()
        for family in families:
            if family not in FAMILIES:
                raise ConfigError(f"families: found {family!r}, expected some of {', '.join(FAMILIES)}")
        active = {_joint_index(joint) for joint in active_joints}
        n = len(JOINTS)

        def factor(width: float, size: int) -> list[float]:
            return np.exp(rng.uniform(-width, width, size)).tolist()

        def on(family: str, drawn: Any, nominal: Any) -> Any:
            return drawn if family in families else nominal

        sign = [-1 if flip else 1 for flip in rng.random(n) < ranges.sign_probability]
        gain, offset = factor(ranges.gain, n), rng.uniform(-ranges.offset, ranges.offset, n).tolist()
        strength, damping = factor(ranges.strength, n), factor(ranges.damping, n)
        joints = tuple(
            JointBody(
                sign=on("sign", sign[i], 1),
                gain=on("gain", gain[i], 1.0),
                offset=on("offset", offset[i], 0.0),
                strength=on("strength", strength[i], 1.0),
                damping=on("damping", damping[i], 1.0),
            )
            if i in active
            else JointBody()
            for i in range(n)
        )
        links = LinkBody(*factor(ranges.link, 4))
        payload = float(rng.uniform(0.0, ranges.payload))
        cameras = {}
        for camera in CAMERAS:
            position = tuple(rng.uniform(-ranges.camera_position, ranges.camera_position, 3).tolist())
            rotation = tuple(rng.uniform(-ranges.camera_rotation, ranges.camera_rotation, 3).tolist())
            mirror = bool(rng.random() < ranges.mirror_probability)
            hue, brightness = float(rng.uniform(-ranges.hue, ranges.hue)), factor(ranges.brightness, 1)[0]
            cameras[camera] = CameraBody(
                position=on("camera", position, (0.0, 0.0, 0.0)),
                rotation=on("camera", rotation, (0.0, 0.0, 0.0)),
                mirror=on("mirror", mirror, False),
                hue=on("colour", hue, 0.0),
                brightness=on("colour", brightness, 1.0),
            )
        intensity, ambient, red, green, blue = factor(ranges.light, 5)
        light = LightBody(intensity=min(intensity, 2.0), ambient=min(ambient, 2.0), colour=(red, green, blue))
        return cls(
            name=name,
            joints=joints,
            links=on("link", links, LinkBody()),
            payload=on("payload", payload, 0.0),
            light=on("light", light, LightBody()),
            **cameras,
        )


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML would silently let the second of two equal keys win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise ConfigError(f"{key.value}: found twice, expected once (line {key.start_mark.line + 1})")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _names(cls: type) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(cls))


def _joint_index(name: str) -> int:
    if name not in JOINTS:
        raise ConfigError(f"joint: found {name!r}, expected one of {', '.join(JOINTS)}")
    return JOINTS.index(name)


def _mapping(key: str, value: Any, allowed: Collection[str]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}: found {value!r} ({type(value).__name__}), expected keys {', '.join(allowed)}")
    for name in value:
        if name not in allowed:
            where = name if key == "body" else f"{key}.{name}"
            raise ConfigError(f"{where}: unknown key, expected one of {', '.join(allowed)}")
    return value


def _section(key: str, value: Any, cls: type) -> Any:
    value = _mapping(key, value, _names(cls))
    try:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})
    except ConfigError as error:
        raise ConfigError(f"{key}.{error}") from error
