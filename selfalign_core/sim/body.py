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
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from selfalign_core.errors import ConfigError
from selfalign_core.records import Only, Range, Record, load, plain, read

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "forearm_roll", "wrist_flex", "wrist_roll", "gripper")
CAMERAS = ("overhead", "wrist")
FAMILIES = ("sign", "gain", "offset", "link", "strength", "damping", "payload", "camera", "mirror", "colour", "light")
"""What ``BodyConfig.sample`` can randomise, each family by itself."""

Angle = Annotated[float, Range(-math.pi, math.pi)]
Light = Annotated[float, Range(0, 2)]
Length = Annotated[float, Range(0.5, 1.5)]
Metres = Annotated[float, Range(-0.5, 0.5)]


@dataclass(frozen=True)
class LinkBody(Record):
    """Length of each link as a multiple of the nominal one."""

    base: Length = 1.0  # table to shoulder_lift axis
    upper_arm: Length = 1.0
    forearm: Length = 1.0
    hand: Length = 1.0  # wrist_flex axis to gripper tip


@dataclass(frozen=True)
class JointBody(Record):
    """One joint: its transmission ``q = sign * gain * m + offset`` and its servo."""

    sign: Annotated[int, Only((1, -1).__contains__, "1 or -1")] = 1
    gain: Annotated[float, Range(0.25, 4)] = 1.0  # kinematic rad per motor rad
    offset: Annotated[float, Range(-1, 1)] = 0.0  # kinematic rad
    strength: Annotated[float, Range(0.05, 5)] = 1.0  # multiple of the nominal position gain and torque limit
    damping: Annotated[float, Range(0, 20)] = 1.0  # multiple of the nominal passive damping


@dataclass(frozen=True)
class CameraBody(Record):
    """Where a camera really is, relative to its nominal mount, and what it does to colours."""

    position: tuple[Metres, Metres, Metres] = (0.0, 0.0, 0.0)  # m, along its right, up, back axes
    rotation: tuple[Angle, Angle, Angle] = (0.0, 0.0, 0.0)  # rad, about its right, then up, then back axis
    mirror: bool = False  # image flipped left to right
    hue: Angle = 0.0  # rad, rotation of every colour about the grey axis
    brightness: Annotated[float, Range(0.2, 2)] = 1.0  # factor on every pixel


@dataclass(frozen=True)
class LightBody(Record):
    """The lamp above the table and the room's ambient light."""

    intensity: Light = 1.0  # multiple of the nominal lamp
    ambient: Light = 1.0  # multiple of the nominal ambient light
    colour: tuple[Light, Light, Light] = (1.0, 1.0, 1.0)  # RGB factors on the lamp
    direction: Annotated[
        tuple[Annotated[float, Range(-10, 10)], Annotated[float, Range(-10, 10)], Annotated[float, Range(-10, 10)]],
        Only(any, "a vector that is not zero"),
    ] = (-0.35, 0.3, -1.0)  # the way the light travels, table frame


@dataclass(frozen=True)
class BodyRanges(Record):
    """How far ``BodyConfig.sample`` strays from nominal. Half widths; factors are drawn as ``exp(uniform(-w, w))``."""

    sign_probability: Annotated[float, Range(0, 1)] = 0.5  # per joint
    gain: Annotated[float, Range(0, 1.3)] = 0.25  # log factor
    offset: Annotated[float, Range(0, 1)] = 0.2  # rad
    link: Annotated[float, Range(0, 0.4)] = 0.12  # log factor
    strength: Annotated[float, Range(0, 1.6)] = 0.5  # log factor
    damping: Annotated[float, Range(0, 2.9)] = 1.0  # log factor
    payload: Annotated[float, Range(0, 2)] = 0.25  # kg, from 0
    camera_position: Annotated[float, Range(0, 0.5)] = 0.04  # m per axis
    camera_rotation: Annotated[float, Range(0, math.pi)] = 0.12  # rad per axis
    mirror_probability: Annotated[float, Range(0, 1)] = 0.5  # per camera
    hue: Annotated[float, Range(0, math.pi)] = 0.35  # rad
    brightness: Annotated[float, Range(0, 0.69)] = 0.2  # log factor
    light: Annotated[float, Range(0, 0.69)] = 0.3  # log factor on lamp, ambient and each colour

    def scaled(self, factor: float) -> BodyRanges:
        """The same ranges, wider or narrower; probabilities stay. Raises ``ConfigError`` beyond what a body allows."""
        wider = {name: factor * value for name, value in vars(self).items() if not name.endswith("probability")}
        return dataclasses.replace(self, **wider)


@dataclass(frozen=True)
class BodyConfig(Record):
    """One simulated body. ``BodyConfig()`` is the nominal one.

    Raises ``ConfigError`` (a ``ValueError``) naming the field, what was found and what was expected.
    """

    name: Annotated[str, Only(len, "a non-empty string")] = "nominal"
    links: LinkBody = field(default_factory=LinkBody)
    joints: tuple[JointBody, ...] = (JointBody(),) * len(JOINTS)  # in the order of JOINTS
    payload: Annotated[float, Range(0, 2)] = 0.0  # kg, rigidly held by the gripper
    overhead: CameraBody = field(default_factory=CameraBody)
    wrist: CameraBody = field(default_factory=CameraBody)
    light: LightBody = field(default_factory=LightBody)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect(len(self.joints) == len(JOINTS), "joints", f"{len(JOINTS)} of them")

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

        Raises ``ConfigError`` naming the file, the key, what was found and what was expected.
        """
        return load(_File, path, "a body of the simulated arm").body()

    @classmethod
    def from_dict(cls, tree: Any) -> BodyConfig:
        """Build a body from plain data (the layout of the YAML file). Raises ``ConfigError`` as ``from_yaml`` does."""
        return read(_File, tree).body()

    def to_dict(self) -> dict[str, Any]:
        """Plain data that ``from_dict`` turns back into an equal body, fit for YAML and JSON."""
        joints, cameras = dict(zip(JOINTS, self.joints, strict=True)), {name: self.camera(name) for name in CAMERAS}
        return plain(_File(self.name, self.links, joints, self.payload, cameras, self.light))

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


@dataclass(frozen=True)
class _File(Record):
    """The layout of a body file."""

    name: Annotated[str, Only(len, "a non-empty string, the name of the body")]
    links: LinkBody = field(default_factory=LinkBody)
    joints: dict[Literal[JOINTS], JointBody] = field(default_factory=dict)  # type: ignore[valid-type]  # read from a tuple
    payload: Annotated[float, Range(0, 2)] = 0.0
    cameras: dict[Literal[CAMERAS], CameraBody] = field(default_factory=dict)  # type: ignore[valid-type]  # read from a tuple
    light: LightBody = field(default_factory=LightBody)

    def body(self) -> BodyConfig:
        joints = tuple(self.joints.get(name, JointBody()) for name in JOINTS)
        return BodyConfig(self.name, self.links, joints, self.payload, light=self.light, **self.cameras)


def _joint_index(name: str) -> int:
    if name not in JOINTS:
        raise ConfigError(f"joint: found {name!r}, expected one of {', '.join(JOINTS)}")
    return JOINTS.index(name)
