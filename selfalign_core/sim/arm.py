"""The simulated arm: physics, encoders, servos, cameras and the objects on the table. Time moves only in ``step``.

Everything a caller sees or sends is in the motor frame of the body (see ``body.py``); kinematic angles ``q`` stay in
here and in the expert. This module must not know policies, rewards, wall time or ROS.

Not thread safe: OpenGL ties drawing to one thread, so one thread owns an ``ArmSim``.
"""

from __future__ import annotations

import atexit
import math
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError
from .body import CAMERAS, JOINTS, BodyConfig, CameraBody
from .gl import choose_backend
from .model import (
    MOTOR_MAX_VELOCITY,
    OBJECTS,
    TARGET_NAMES,
    TIMESTEP,
    build_mjcf,
    nominal_limits,
    prompt_for,
)

choose_backend()
import cv2  # noqa: E402
import mujoco  # noqa: E402

VIEWS = (*CAMERAS, "scene")
"""Names ``ArmSim.render`` takes: the robot's cameras, and a spectator's view that the body does not change."""

_REACH_HEIGHT = 0.01  # m above an object's top
_RADIUS, _ANGLE, _SEPARATION = (0.19, 0.31), 0.95, 0.07  # m, rad, m: where objects stand around the base
_HOME_NOISE = 0.15  # rad
_FATAL_WARNINGS = {
    mujoco.mjtWarning.mjWARN_INERTIA: "singular inertia matrix",
    mujoco.mjtWarning.mjWARN_BADQPOS: "joint position not finite or too large",
    mujoco.mjtWarning.mjWARN_BADQVEL: "joint velocity not finite or too large",
    mujoco.mjtWarning.mjWARN_BADQACC: "joint acceleration not finite or too large",
    mujoco.mjtWarning.mjWARN_BADCTRL: "servo set-point not finite",
}


@dataclass(frozen=True)
class JointState:
    """Encoder readings in the motor frame, each (7,) float64, in the order of ``JOINTS``."""

    position: np.ndarray  # rad
    velocity: np.ndarray  # rad/s
    effort: np.ndarray  # N m


class ArmSim:
    """A position-controlled arm with 6 joints and a gripper, two cameras and a table of coloured objects.

    Servos run towards the last command at no more than ``max_velocity`` and stop at the joint limits. The same body,
    seed and calls give the same trajectory and the same pixels, bit for bit; how a span of time is cut into ``step``
    calls makes no difference as long as each commands nothing new.

    Attributes:
        body: the body in force.
        model, data: MuJoCo's, replaced by ``apply_body``; for reading.
    """

    joint_names = JOINTS

    def __init__(self, body: BodyConfig | None = None, *, seed: int = 0) -> None:
        self.body = body or BodyConfig()
        self._renderer: _Renderer | None = None
        self._load(self.body)
        self.reset(seed)

    # ---- time and motion --------------------------------------------------------------------------------------

    def reset(self, seed: int | np.random.Generator, *, home_noise: float = _HOME_NOISE) -> None:
        """Time to zero, objects and target drawn anew, arm at rest near its kinematic zero pose.

        Args:
            seed: seed or generator of everything random.
            home_noise: half width [rad] of the uniform noise on the first six joints' start pose.
        """
        rng = np.random.default_rng(seed)
        mujoco.mj_resetData(self.model, self.data)
        self._elapsed, self._steps = 0.0, 0
        noise = rng.uniform(-home_noise, home_noise, len(JOINTS))
        noise[-1] = 0.0
        self.data.qpos[:] = noise
        self.data.ctrl[:] = noise
        self._goal = noise.copy()
        self.reset_targets(rng)
        mujoco.mj_forward(self.model, self.data)

    def command(self, targets: Any) -> None:
        """Set where the servos run to from now on.

        Args:
            targets: (7,) motor-frame positions [rad]; beyond the joint limits means the limit.

        Raises:
            InputError: wrong shape, or a value that is not finite; the previous command stays in force.
        """
        targets = np.asarray(targets, np.float64)
        if targets.shape != (len(JOINTS),):
            raise InputError(f"command: found shape {targets.shape}, expected ({len(JOINTS)},): {', '.join(JOINTS)}")
        for name, value in zip(JOINTS, targets, strict=True):
            if not math.isfinite(value):
                raise InputError(f"command: found {value} for joint {name}, expected a finite position in rad")
        self._goal = np.clip(self.to_kinematic(targets), *nominal_limits())

    def step(self, duration: float) -> None:
        """Advance simulated time by ``duration`` seconds (kept exactly over many calls, in steps of ``TIMESTEP``).

        Raises:
            InputError: a duration that is negative or not finite.
            RuntimeError: the physics became unstable; the message names MuJoCo's warning. ``reset`` recovers.
        """
        if not (math.isfinite(duration) and duration >= 0.0):
            raise InputError(f"step: found duration {duration}, expected a number of seconds >= 0")
        self._elapsed += duration
        todo = round(self._elapsed / TIMESTEP) - self._steps
        self._steps += todo
        ctrl = self.data.ctrl
        while todo > 0:
            gap = self._goal - ctrl
            if gap.any():
                ctrl += np.clip(gap, -self._slew, self._slew)
                mujoco.mj_step(self.model, self.data)
                todo -= 1
            else:
                mujoco.mj_step(self.model, self.data, nstep=todo)
                todo = 0
        self._check_stable()
        # Positions of bodies and cameras for the state just reached; leaves the state itself untouched.
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)

    @property
    def time(self) -> float:
        """Simulated seconds since the last reset."""
        return self._steps * TIMESTEP

    def joint_state(self) -> JointState:
        """What the encoders report now."""
        scale, _ = self._transmission
        return JointState(self.to_motor(self.data.qpos), self.data.qvel / scale, self.data.actuator_force * scale)

    def setpoint(self) -> np.ndarray:
        """(7,) float64 motor-frame positions the servos hold at this instant, on their way to the command."""
        return self.to_motor(self.data.ctrl)

    @property
    def lower(self) -> np.ndarray:
        """(7,) float64 lower joint limits, motor frame, rad."""
        return self._limits[0].copy()

    @property
    def upper(self) -> np.ndarray:
        """(7,) float64 upper joint limits, motor frame, rad."""
        return self._limits[1].copy()

    @property
    def max_velocity(self) -> np.ndarray:
        """(7,) float64 fastest set-point motion of the servos, motor frame, rad/s."""
        return np.full(len(JOINTS), MOTOR_MAX_VELOCITY)

    def to_kinematic(self, motor: np.ndarray) -> np.ndarray:
        """Motor-frame positions (..., 7) to kinematic angles of the body in force."""
        scale, offset = self._transmission
        return scale * motor + offset

    def to_motor(self, kinematic: np.ndarray) -> np.ndarray:
        """Kinematic angles (..., 7) to motor-frame positions of the body in force."""
        scale, offset = self._transmission
        return (kinematic - offset) / scale

    # ---- the body ---------------------------------------------------------------------------------------------

    def apply_body(self, body: BodyConfig) -> None:
        """Change the body while the arm moves. Pose, velocity, time, objects and the servos' physical set-points stay.

        A new transmission therefore changes what the encoders say, not where the arm is; it rules the next command.
        """
        old, ctrl = self.data, self.data.ctrl.copy()
        self.body = body
        self._load(body)
        self.data.time = old.time
        self.data.qpos[:], self.data.qvel[:] = old.qpos, old.qvel
        self.data.qacc_warmstart[:] = old.qacc_warmstart
        self.data.mocap_pos[:], self.data.mocap_quat[:] = old.mocap_pos, old.mocap_quat
        self.data.ctrl[:] = ctrl
        mujoco.mj_forward(self.model, self.data)

    # ---- the table --------------------------------------------------------------------------------------------

    @property
    def target(self) -> str:
        """Name of the object to reach."""
        return self._target

    @property
    def prompt(self) -> str:
        """The instruction for the present target."""
        return prompt_for(self._target)

    def set_target(self, name: str) -> None:
        """Choose which object is to be reached; ``InputError`` for a name outside ``TARGET_NAMES``."""
        if name not in TARGET_NAMES:
            raise InputError(f"target: found {name!r}, expected one of {', '.join(TARGET_NAMES)}")
        self._target = name

    def reset_targets(self, seed: int | np.random.Generator) -> None:
        """Place all objects anew and draw the target; the arm stays as it is."""
        rng = np.random.default_rng(seed)
        places = _place_objects(rng)
        for item, (x, y) in zip(OBJECTS, places, strict=True):
            self.data.mocap_pos[self.model.body(item.name).mocapid[0]] = x, y, item.size
        turn = rng.uniform(-math.pi / 4, math.pi / 4, len(OBJECTS))
        self.data.mocap_quat[:] = np.stack([np.cos(turn / 2), 0 * turn, 0 * turn, np.sin(turn / 2)], axis=1)
        self._target = str(rng.choice(TARGET_NAMES))
        mujoco.mj_kinematics(self.model, self.data)

    def place(self, pose: np.ndarray) -> None:
        """Put the arm at rest in the kinematic pose (7,) [rad], out of nowhere: for pictures, not for episodes."""
        self.data.qpos[:] = self.data.ctrl[:] = self._goal[:] = np.clip(pose, *nominal_limits())
        self.data.qvel[:] = 0.0
        mujoco.mj_forward(self.model, self.data)

    def reach_point(self, name: str | None = None) -> np.ndarray:
        """(3,) float64 table-frame point [m] just above the named target (default: the present one)."""
        index = TARGET_NAMES.index(name or self._target)
        return self.data.mocap_pos[index] + (0.0, 0.0, OBJECTS[index].size + _REACH_HEIGHT)

    def tip(self) -> np.ndarray:
        """(3,) float64 table-frame position [m] of the point between the gripper's fingertips."""
        return self.data.site_xpos[0].copy()

    def distance(self, name: str | None = None) -> float:
        """Metres from the gripper tip to the named target's reach point (default: the present target)."""
        return float(np.linalg.norm(self.tip() - self.reach_point(name)))

    # ---- cameras ----------------------------------------------------------------------------------------------

    def render(self, camera: str, height: int, width: int, out: np.ndarray | None = None) -> np.ndarray:
        """Draw what a camera sees now.

        Args:
            camera: one of ``VIEWS``.
            height, width: image size in pixels.
            out: (height, width, 3) uint8 array to draw into; a new one by default.

        Returns:
            (height, width, 3) uint8 RGB, C-contiguous, top row first.

        Raises:
            InputError: unknown camera, a size outside 8..2048, or ``out`` of another shape or dtype.
        """
        if camera not in VIEWS:
            raise InputError(f"camera: found {camera!r}, expected one of {', '.join(VIEWS)}")
        if not (8 <= height <= 2048 and 8 <= width <= 2048):
            raise InputError(f"image size: found {height}x{width}, expected 8..2048 pixels each way")
        if out is None:
            out = np.empty((height, width, 3), np.uint8)
        elif out.shape != (height, width, 3) or out.dtype != np.uint8:
            raise InputError(f"out: found {out.dtype} {out.shape}, expected uint8 ({height}, {width}, 3)")
        if self._renderer is None:
            self._renderer = _Renderer(self.model)
        optics = self.body.camera(camera) if camera in CAMERAS else CameraBody()
        self._renderer.draw(self.model, self.data, camera, optics, out)
        return out

    def project(self, camera: str, points: np.ndarray, *, aspect: float = 1.0) -> np.ndarray:
        """Where a camera sees table-frame points, occluded or not.

        Args:
            camera: one of ``CAMERAS``.
            points: (n, 3) positions [m].
            aspect: width of the picture over its height.

        Returns:
            (n, 2) float64 (x, y) as fractions of the picture from its top left corner; outside 0..1 out of view, NaN
            behind the camera.
        """
        index = self.model.camera(camera).id
        axes = self.data.cam_xmat[index].reshape(3, 3)
        right, up, back = ((points - self.data.cam_xpos[index]) @ axes).T
        depth = np.where(back < 0.0, -back, np.nan)
        focal = 0.5 / math.tan(math.radians(self.model.cam_fovy[index]) / 2)
        x, y = 0.5 + focal / aspect * right / depth, 0.5 - focal * up / depth
        return np.stack([1.0 - x if self.body.camera(camera).mirror else x, y], axis=1)

    def close(self) -> None:
        """Free the drawing context. Further ``render`` calls open a new one."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    # ---- inside -----------------------------------------------------------------------------------------------

    def _load(self, body: BodyConfig) -> None:
        self.model = mujoco.MjModel.from_xml_string(build_mjcf(body))
        self.data = mujoco.MjData(self.model)
        self._transmission = body.transmission
        ends = np.stack([self.to_motor(limit) for limit in nominal_limits()])
        self._limits = ends.min(axis=0), ends.max(axis=0)
        self._slew = MOTOR_MAX_VELOCITY * TIMESTEP * np.abs(self._transmission[0])  # kinematic rad per step

    def _check_stable(self) -> None:
        for warning, meaning in _FATAL_WARNINGS.items():
            if self.data.warning[warning].number:
                raise RuntimeError(f"simulation unstable at t = {self.time:.3f} s: {warning.name} ({meaning})")
        if not np.isfinite(self.data.qpos).all():
            raise RuntimeError(f"simulation unstable at t = {self.time:.3f} s: joint positions {self.data.qpos}")


def _place_objects(rng: np.random.Generator) -> np.ndarray:
    """(len(OBJECTS), 2) positions [m] around the base, no two closer than ``_SEPARATION``."""
    while True:
        places: list[np.ndarray] = []
        for _ in range(200):
            radius, angle = rng.uniform(*_RADIUS), rng.uniform(-_ANGLE, _ANGLE)
            place = radius * np.array([math.cos(angle), math.sin(angle)])
            if all(np.linalg.norm(place - other) >= _SEPARATION for other in places):
                places.append(place)
                if len(places) == len(OBJECTS):
                    return np.array(places)


class _Renderer:
    """One off-screen OpenGL context. Every body's scene has the same textures, so it outlives ``apply_body``."""

    def __init__(self, model: mujoco.MjModel) -> None:
        self._gl = mujoco.GLContext(64, 64)  # drawing goes to MuJoCo's own frame buffer, not to this one
        self._gl.make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=200)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        self._scene.flags[mujoco.mjtRndFlag.mjRND_HAZE] = False
        self._option = mujoco.MjvOption()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._raw = np.empty((0, 0, 3), np.uint8)
        # At exit it has to run before MuJoCo closes the display, and so be registered after that.
        self._finalizer = weakref.finalize(self, _free, self._gl, self._context)
        self._finalizer.atexit = False
        atexit.register(self._finalizer)

    def draw(
        self, model: mujoco.MjModel, data: mujoco.MjData, camera: str, optics: CameraBody, out: np.ndarray
    ) -> None:
        height, width, _ = out.shape
        self._gl.make_current()
        if height > self._context.offHeight or width > self._context.offWidth:
            size = max(width, self._context.offWidth), max(height, self._context.offHeight)
            mujoco.mjr_resizeOffscreen(*size, self._context)
        if self._raw.shape != out.shape:
            self._raw = np.empty(out.shape, np.uint8)
        self._camera.fixedcamid = model.camera(camera).id
        mujoco.mjv_updateScene(
            model, data, self._option, None, self._camera, mujoco.mjtCatBit.mjCAT_ALL.value, self._scene
        )
        rect = mujoco.MjrRect(0, 0, width, height)
        mujoco.mjr_render(rect, self._scene, self._context)
        mujoco.mjr_readPixels(self._raw, None, rect, self._context)
        # OpenGL's first row is the bottom one: turning it over is the one copy, and mirrors the image on the way.
        upright = self._raw[::-1, ::-1] if optics.mirror else self._raw[::-1]
        if optics.hue == 0.0 and optics.brightness == 1.0:
            np.copyto(out, upright)
        else:
            cv2.transform(np.ascontiguousarray(upright), optics.brightness * _hue_rotation(optics.hue), dst=out)

    def close(self) -> None:
        atexit.unregister(self._finalizer)
        self._finalizer()


def _free(gl: Any, context: mujoco.MjrContext) -> None:
    gl.make_current()
    context.free()
    gl.free()


def _hue_rotation(angle: float) -> np.ndarray:
    """(3, 3) rotation of RGB space by ``angle`` about the grey axis (Rodrigues' formula)."""
    c, s, k = math.cos(angle), math.sin(angle), 1.0 / 3.0
    cross = math.sqrt(k) * np.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
    return c * np.eye(3) + s * cross + (1.0 - c) * np.full((3, 3), k)
