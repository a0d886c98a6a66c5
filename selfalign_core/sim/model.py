"""The arm, the table and the cameras as MJCF, generated from a body. Primitives only: no meshes, no
texture but the sky.

All link frames are parallel to the table frame when every kinematic joint is at zero: x away from the base, y to the
arm's left, z up; the upper arm stands upright, the forearm points forward, the hand points down. Lengths in metres,
masses in kilograms. This module writes text; it must not know MuJoCo's Python API, time or pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .body import JOINTS, BodyConfig, CameraBody

TIMESTEP = 0.0025  # s
MOTOR_MAX_VELOCITY = 3.0  # rad/s, motor frame; the servos' own speed limit


@dataclass(frozen=True)
class JointSpec:
    """Nominal joint and servo: kinematic limits [rad], position gain [N m/rad], velocity gain [N m s/rad],
    torque limit [N m], passive damping [N m s/rad], rotor inertia [kg m²]."""

    lower: float
    upper: float
    kp: float
    kv: float
    torque: float
    damping: float
    armature: float


JOINT_SPECS: dict[str, JointSpec] = {
    "shoulder_pan": JointSpec(-1.92, 1.92, 40.0, 1.6, 3.5, 0.4, 0.02),
    "shoulder_lift": JointSpec(-1.75, 1.75, 40.0, 1.6, 3.5, 0.4, 0.02),
    "elbow_flex": JointSpec(-1.75, 1.75, 40.0, 1.6, 3.5, 0.4, 0.02),
    "forearm_roll": JointSpec(-1.92, 1.92, 20.0, 0.8, 2.5, 0.2, 0.01),
    "wrist_flex": JointSpec(-1.66, 1.66, 20.0, 0.8, 2.5, 0.2, 0.01),
    "wrist_roll": JointSpec(-2.79, 2.79, 20.0, 0.8, 2.5, 0.2, 0.01),
    "gripper": JointSpec(-0.17, 1.75, 8.0, 0.3, 1.5, 0.1, 0.005),
}


@dataclass(frozen=True)
class SceneObject:
    """Something on the table. ``size`` is its half height and half width [m]."""

    name: str
    shape: str  # MJCF geom type
    size: float
    colour: tuple[float, float, float]


TARGETS = (
    SceneObject("red cube", "box", 0.020, (0.88, 0.10, 0.10)),
    SceneObject("green cube", "box", 0.020, (0.12, 0.68, 0.20)),
    SceneObject("blue cube", "box", 0.020, (0.10, 0.30, 0.95)),
)
DISTRACTORS = (
    SceneObject("purple ball", "sphere", 0.017, (0.60, 0.22, 0.75)),
    SceneObject("black cylinder", "cylinder", 0.016, (0.07, 0.07, 0.08)),
)
OBJECTS = TARGETS + DISTRACTORS
TARGET_NAMES = tuple(o.name for o in TARGETS)

# Nominal camera mounts: eye and look-at point in the parent body's frame [m], image "up" hint, vertical field of
# view [deg]
_CAMERA_MOUNTS = {
    "scene": ((0.72, 0.38, 0.36), (0.12, 0.0, 0.10), (0.0, 0.0, 1.0), 38.0),
    "overhead": ((0.56, 0.0, 0.60), (0.14, 0.0, 0.05), (0.0, 0.0, 1.0), 45.0),
    "wrist": ((0.085, 0.0, 0.02), (0.018, 0.0, -0.10), (1.0, 0.0, 0.0), 72.0),
}

_WHITE, _GRAPHITE, _GOLD, _STEEL = "0.93 0.92 0.88 1", "0.16 0.17 0.19 1", "0.98 0.70 0.12 1", "0.55 0.57 0.60 1"


def prompt_for(target: str) -> str:
    """The instruction that names a target, for example ``reach the red cube``."""
    return f"reach the {target}"


def build_mjcf(body: BodyConfig) -> str:
    """MJCF text of the arm with this body on its table, objects included (as mocap bodies, placed at run time)."""
    links = body.links
    shoulder, upper, forearm, hand = 0.075 * links.base, 0.16 * links.upper_arm, 0.16 * links.forearm, links.hand
    roll_at, wrist_down, tip_down = 0.055 * links.forearm, 0.045 * hand, 0.095 * hand
    light, lamp = body.light, np.array(body.light.colour) * body.light.intensity
    ambient = 0.36 * light.ambient
    payload = ""
    if body.payload > 0.0:
        radius = 0.023 + 0.012 * body.payload ** (1 / 3)
        payload = (
            f'<geom name="payload" type="cylinder" size="{radius:.6g} 0.012" pos="0 0 {-0.35 * tip_down:.6g}" '
            f'mass="{body.payload:.9g}" rgba="{_STEEL}"/>'
        )
    objects = "\n".join(
        f'<body name="{o.name}" mocap="true"><geom type="{o.shape}" size="{_size(o)}" contype="0" conaffinity="0" '
        f'rgba="{_vector(o.colour)} 1"/></body>'
        for o in OBJECTS
    )
    return f"""
<mujoco model="selfalign_arm">
  <compiler angle="radian" autolimits="true"/>
  <option timestep="{TIMESTEP}" integrator="implicitfast"><flag autoreset="disable"/></option>
  <visual>
    <quality offsamples="0" shadowsize="0" numslices="20" numstacks="8" numquads="1"/>
    <map znear="0.02" zfar="20"/>
    <headlight ambient="{ambient:.6g} {ambient:.6g} {ambient:.6g}" diffuse="0.22 0.22 0.22" specular="0 0 0"/>
  </visual>
  <statistic center="0.15 0 0.1" extent="0.6"/>
  <asset>
    <texture type="skybox" builtin="gradient" rgb1="0.86 0.88 0.90" rgb2="0.62 0.66 0.70" width="32" height="192"/>
  </asset>
  <default>
    <geom contype="0" conaffinity="1" friction="0.6 0.005 0.0001" solref="0.01 1"/>
    <default class="servo"><geom type="box" rgba="{_GRAPHITE}" mass="0.03"/></default>
  </default>
  <worldbody>
    <light type="directional" pos="0 0 1.5" dir="{_vector(light.direction)}" castshadow="false"
           diffuse="{_vector(0.62 * lamp)}" ambient="0 0 0" specular="{_vector(0.2 * lamp)}"/>
    <geom name="floor" type="plane" size="3 3 0.1" pos="0 0 -0.012" contype="0" conaffinity="0"
          rgba="0.80 0.76 0.70 1"/>
    <geom name="table" type="box" size="0.37 0.46 0.006" pos="0.20 0 -0.006" contype="1" conaffinity="0"
          rgba="0.42 0.47 0.50 1"/>
    <geom type="cylinder" size="0.062 0.008" pos="0 0 0.008" rgba="{_GRAPHITE}" mass="0" contype="0" conaffinity="0"/>
    {_camera("overhead", body.overhead)}
    {_camera("scene", CameraBody())}
    {objects}
    <body name="shoulder_body" pos="0 0 0.03">
      {_joint(body, "shoulder_pan", "0 0 1")}
      <geom type="cylinder" size="0.042 0.016" rgba="{_WHITE}" mass="0.06"/>
      <geom class="servo" size="0.026 0.022 {shoulder / 2:.6g}" pos="0 0 {shoulder / 2:.6g}"/>
      <body name="upper_arm_body" pos="0 0 {shoulder:.6g}">
        {_joint(body, "shoulder_lift", "0 1 0")}
        <geom type="cylinder" size="0.027 0.030" euler="1.5708 0 0" rgba="{_WHITE}" mass="0.05"/>
        <geom type="capsule" size="0.019" fromto="0 0 0.01 0 0 {upper:.6g}" rgba="{_WHITE}" mass="0.08"/>
        <geom class="servo" size="0.022 0.021 0.028" pos="0 0 {0.5 * upper:.6g}"/>
        <body name="elbow_body" pos="0 0 {upper:.6g}">
          {_joint(body, "elbow_flex", "0 1 0")}
          <geom type="cylinder" size="0.025 0.028" euler="1.5708 0 0" rgba="{_GRAPHITE}" mass="0.05"/>
          <geom type="capsule" size="0.018" fromto="0.01 0 0 {roll_at:.6g} 0 0" rgba="{_WHITE}" mass="0.03"/>
          <body name="forearm_body" pos="{roll_at:.6g} 0 0">
            {_joint(body, "forearm_roll", "1 0 0")}
            <geom type="cylinder" size="0.023 0.012" euler="0 1.5708 0" rgba="{_GRAPHITE}" mass="0.03"/>
            <geom type="capsule" size="0.017" fromto="0.01 0 0 {forearm - roll_at:.6g} 0 0" rgba="{_WHITE}"
                  mass="0.04"/>
            <body name="wrist_body" pos="{forearm - roll_at:.6g} 0 0">
              {_joint(body, "wrist_flex", "0 1 0")}
              <geom type="cylinder" size="0.021 0.025" euler="1.5708 0 0" rgba="{_GRAPHITE}" mass="0.03"/>
              <geom type="capsule" size="0.016" fromto="0 0 0 0 0 {-wrist_down:.6g}" rgba="{_WHITE}" mass="0.01"/>
              <body name="gripper_body" pos="0 0 {-wrist_down:.6g}">
                {_joint(body, "wrist_roll", "0 0 1")}
                <geom type="cylinder" size="0.022 0.008" rgba="{_GRAPHITE}" mass="0.02"/>
                <geom type="box" size="0.014 0.024 0.012" pos="0 0 {-0.22 * tip_down:.6g}" rgba="{_WHITE}" mass="0.02"/>
                <geom type="box" size="0.010 0.005 {0.36 * tip_down:.6g}" pos="0 -0.012 {-0.60 * tip_down:.6g}"
                      rgba="{_GOLD}" mass="0.01"/>
                <geom type="box" size="0.011 0.006 {0.07 * tip_down:.6g}" pos="0 -0.006 {-0.93 * tip_down:.6g}"
                      rgba="{_GRAPHITE}" mass="0.002"/>
                {payload}
                <site name="tip" pos="0 0 {-tip_down:.6g}" size="0.002" rgba="0 0 0 0"/>
                {_camera("wrist", body.wrist)}
                <body name="jaw_body" pos="0 0.012 {-0.28 * tip_down:.6g}">
                  {_joint(body, "gripper", "1 0 0")}
                  <geom type="box" size="0.010 0.005 {0.34 * tip_down:.6g}" pos="0 0 {-0.34 * tip_down:.6g}"
                        rgba="{_GOLD}" mass="0.01"/>
                  <geom type="box" size="0.011 0.006 {0.07 * tip_down:.6g}" pos="0 -0.006 {-0.65 * tip_down:.6g}"
                        rgba="{_GRAPHITE}" mass="0.002"/>
                </body>
              </body>
            </body>
          </body>
        </body>
      </body>
    </body>
  </worldbody>
  <actuator>
    {"".join(_servo(body, name) for name in JOINTS)}
  </actuator>
</mujoco>"""


def nominal_limits() -> tuple[np.ndarray, np.ndarray]:
    """Kinematic joint limits ``(lower, upper)``, each (7,) float64 in rad; the stops do not depend on the body."""
    specs = [JOINT_SPECS[name] for name in JOINTS]
    return np.array([s.lower for s in specs]), np.array([s.upper for s in specs])


def _vector(values: Iterable[float]) -> str:
    return " ".join(f"{v:.9g}" for v in values)


def _size(item: SceneObject) -> str:
    return {"sphere": f"{item.size}", "cylinder": f"{item.size} {item.size}"}.get(
        item.shape, f"{item.size} {item.size} {item.size}"
    )


def _joint(body: BodyConfig, name: str, axis: str) -> str:
    spec = JOINT_SPECS[name]
    return (
        f'<joint name="{name}" axis="{axis}" range="{spec.lower} {spec.upper}" armature="{spec.armature}" '
        f'damping="{spec.damping * body.joint(name).damping:.9g}"/>'
    )


def _servo(body: BodyConfig, name: str) -> str:
    spec, strength = JOINT_SPECS[name], body.joint(name).strength
    torque = spec.torque * strength
    return (
        f'<position name="{name}" joint="{name}" kp="{spec.kp * strength:.9g}" kv="{spec.kv}" '
        f'forcerange="{-torque:.9g} {torque:.9g}"/>'
    )


def _camera(name: str, camera: CameraBody) -> str:
    eye, look_at, up_hint, fovy = _CAMERA_MOUNTS[name]
    back = np.subtract(eye, look_at)
    back /= np.linalg.norm(back)
    right = np.cross(up_hint, back)
    right /= np.linalg.norm(right)
    axes = np.stack([right, np.cross(back, right), back], axis=1)  # columns: right, up, back
    position = np.array(eye) + axes @ np.array(camera.position)
    axes = axes @ _rotation(camera.rotation)
    return (
        f'<camera name="{name}" pos="{_vector(position)}" xyaxes="{_vector(axes[:, 0])} {_vector(axes[:, 1])}" '
        f'fovy="{fovy}"/>'
    )


def _rotation(angles: tuple[float, float, float]) -> np.ndarray:
    """Rotation about x, then the new y, then the new z. (3, 3) float64."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    rx = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    ry = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    rz = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return rx @ ry @ rz
