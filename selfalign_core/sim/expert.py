"""Two scripted policies that know the body: one reaches the named target, one plays. Both make action chunks.

They read the simulator's kinematics, which no learned policy may. Chunks are (horizon, 7) float32 absolute
motor-frame positions [rad]; action i is in force from ``i * dt`` to ``(i + 1) * dt``. Joints outside
``active_joints`` are held where they are commanded now.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from ..errors import ConfigError, InputError
from .arm import ArmSim, mujoco
from .body import JOINTS
from .model import JOINT_SPECS, nominal_limits

_LIMIT_MARGIN = 0.03  # rad kept from the mechanical stops
_IK_STEPS, _IK_TOLERANCE, _IK_MAX_STEP = 60, 1e-3, 0.25  # iterations, m, rad per iteration
_DAMPING = 0.02  # of the least-squares solution; m per rad at which a direction counts as singular
_POSTURE = {"shoulder_pan": 0.0, "forearm_roll": 1.0, "wrist_roll": 0.5, "wrist_flex": 0.3}  # pull towards zero


def _active_mask(active_joints: Collection[str]) -> np.ndarray:
    for name in active_joints:
        if name not in JOINTS:
            raise ConfigError(f"active_joints: found {name!r}, expected some of {', '.join(JOINTS)}")
    if not active_joints:
        raise ConfigError("active_joints: found none, expected at least one")
    return np.array([name in active_joints for name in JOINTS])


class _Kinematics:
    """Positions, Jacobian and gravity of the arm at poses it is not in, for the body in force."""

    def __init__(self, sim: ArmSim) -> None:
        self._sim = sim
        self._model, self._data = sim.model, mujoco.MjData(sim.model)
        self._jacobian = np.zeros((3, len(JOINTS)))
        self._stiffness = np.array([JOINT_SPECS[n].kp for n in JOINTS]) * [j.strength for j in sim.body.joints]
        self._gripper = sim.model.body("gripper_body").id

    def is_current(self) -> bool:
        """False once ``ArmSim.apply_body`` has changed the body."""
        return self._model is self._sim.model

    def tip(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tip position (3,) [m] and its Jacobian (3, 7) at kinematic pose ``q``."""
        self._data.qpos[:] = q
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_comPos(self._model, self._data)
        mujoco.mj_jacSite(self._model, self._data, self._jacobian, None, 0)
        return self._data.site_xpos[0].copy(), self._jacobian.copy()

    def clearance(self, q: np.ndarray) -> float:
        """Height [m] of the lower of tip and wrist above the table at kinematic pose ``q``."""
        self._data.qpos[:] = q
        mujoco.mj_kinematics(self._model, self._data)
        return float(min(self._data.site_xpos[0, 2], self._data.xpos[self._gripper, 2]))

    def holding_error(self, q: np.ndarray) -> np.ndarray:
        """(7,) rad by which a servo must be commanded beyond ``q`` to carry the arm's weight there."""
        self._data.qpos[:] = q
        self._data.qvel[:] = 0.0
        mujoco.mj_fwdPosition(self._model, self._data)
        mujoco.mj_fwdVelocity(self._model, self._data)
        return self._data.qfrc_bias / self._stiffness

    def servo_lag(self) -> np.ndarray:
        """(7,) seconds by which each joint trails a set-point that moves at constant speed."""
        joints = zip(JOINTS, self._sim.body.joints, strict=True)
        drag = np.array([JOINT_SPECS[n].kv + JOINT_SPECS[n].damping * joint.damping for n, joint in joints])
        return drag / self._stiffness


class ReachExpert:
    """Moves the tip to a target by inverse kinematics on the true body.

    The chunk depends on the arm's measured pose, the body and the target only, so any recorded state can be labelled
    with it for any prompt.

    Args:
        sim: the arm; its body may change at any time.
        active_joints: joints the expert may use; ``gripper`` is never needed.
        max_velocity: fastest joint motion [rad/s, kinematic], below the servos' own limit.

    Raises:
        ConfigError: unknown joint, or a velocity that is not positive.
    """

    def __init__(self, sim: ArmSim, *, active_joints: Collection[str] = JOINTS[:6], max_velocity: float = 0.8) -> None:
        if not max_velocity > 0.0:
            raise ConfigError(f"max_velocity: found {max_velocity}, expected more than 0 rad/s")
        self._sim = sim
        self._active = _active_mask(active_joints)
        self._max_velocity = max_velocity
        self._kinematics = _Kinematics(sim)

    def solve(self, point: np.ndarray, start: np.ndarray) -> np.ndarray:
        """Kinematic pose (7,) [rad] near ``start`` (7,) whose tip is at, or as near as can be to, ``point`` (3,) [m].

        Damped least squares with the rest of the motion used to keep rolls small (Buss and Kim, 2005).
        """
        kinematics = self._current_kinematics()
        lower, upper = (limit + sign * _LIMIT_MARGIN for limit, sign in zip(nominal_limits(), (1, -1), strict=True))
        posture = np.array([_POSTURE.get(name, 0.0) for name in JOINTS])
        q = np.where(self._active, np.clip(start, lower, upper), start)
        for _ in range(_IK_STEPS):
            tip, jacobian = kinematics.tip(q)
            error = point - tip
            if np.linalg.norm(error) < _IK_TOLERANCE:
                break
            jacobian = jacobian * self._active
            # A joint at its stop that would be pushed further takes no part.
            wanted = jacobian.T @ error
            stuck = ((q <= lower) & (wanted < 0)) | ((q >= upper) & (wanted > 0))
            jacobian = jacobian * ~stuck
            inverse = jacobian.T @ np.linalg.inv(jacobian @ jacobian.T + _DAMPING**2 * np.eye(3))
            rest = -0.1 * posture * q * self._active
            change = inverse @ error + rest - inverse @ (jacobian @ rest)
            change *= min(1.0, _IK_MAX_STEP / max(np.abs(change).max(), 1e-9))
            q = np.where(self._active, np.clip(q + change, lower, upper), q)
        return q

    def chunk(self, horizon: int, *, target: str | None = None, dt: float = 0.05) -> np.ndarray:
        """The next actions towards a target.

        Args:
            horizon: number of actions.
            target: name of the object; by default the simulator's present target.
            dt: seconds per action.

        Returns:
            (horizon, 7) float32 motor-frame positions [rad].

        Raises:
            InputError: unknown target, or a horizon below 1.
        """
        _check_horizon(horizon)
        sim, kinematics = self._sim, self._current_kinematics()
        q = sim.data.qpos.copy()
        goal = self.solve(sim.reach_point(target), q)
        # All joints arrive together; a servo trails its set-point, so each action leads by that lag.
        time = dt * np.arange(1, horizon + 1)[:, None] + kinematics.servo_lag()
        duration = max(np.abs(goal - q).max() / self._max_velocity, 1e-9)
        fraction = np.minimum(time / duration, 1.0)
        now, then = kinematics.holding_error(q), kinematics.holding_error(goal)
        path = q + fraction * (goal - q) + now + fraction * (then - now)
        path = np.where(self._active, path, sim.data.ctrl)
        return _to_actions(sim, path)

    def _current_kinematics(self) -> _Kinematics:
        if not self._kinematics.is_current():
            self._kinematics = _Kinematics(self._sim)
        return self._kinematics


class PlayPolicy:
    """Smooth motion of every active joint that shows what the body does, without leaving a box around a pose.

    Minimum-jerk segments (Flash and Hogan, 1985) between random poses within ``amplitude`` of the pose the arm had
    when play began, inside the joint limits and clear of the table. The motion continues from chunk to chunk.

    Args:
        sim: the arm, already reset.
        seed: seed or generator of the way points.
        active_joints: joints that move.
        amplitude: half width of the box [rad, kinematic].
        max_velocity: fastest joint motion [rad/s, kinematic].

    Raises:
        ConfigError: unknown joint; amplitude or velocity not positive.
    """

    def __init__(
        self,
        sim: ArmSim,
        seed: int | np.random.Generator,
        *,
        active_joints: Collection[str] = JOINTS,
        amplitude: float = 0.5,
        max_velocity: float = 1.2,
    ) -> None:
        for name, value in (("amplitude", amplitude), ("max_velocity", max_velocity)):
            if not value > 0.0:
                raise ConfigError(f"{name}: found {value}, expected more than 0")
        self._sim, self._rng = sim, np.random.default_rng(seed)
        self._active = _active_mask(active_joints)
        self._amplitude, self._max_velocity = amplitude, max_velocity
        self._centre = sim.data.ctrl.copy()
        self._start = self._end = self._centre
        self._elapsed = self._duration = 0.0
        self._kinematics = _Kinematics(sim)

    def chunk(self, horizon: int, *, dt: float = 0.05) -> np.ndarray:
        """The next (horizon, 7) float32 motor-frame positions [rad]; advances the motion by ``horizon * dt`` seconds.

        Raises:
            InputError: a horizon below 1.
        """
        _check_horizon(horizon)
        path = np.empty((horizon, len(JOINTS)))
        for i in range(horizon):
            self._elapsed += dt
            while self._elapsed >= self._duration:
                self._elapsed -= self._duration
                self._next_segment()
            s = self._elapsed / self._duration
            path[i] = self._start + (self._end - self._start) * (s**3 * (10.0 - 15.0 * s + 6.0 * s * s))
        return _to_actions(self._sim, path)

    def _next_segment(self) -> None:
        if not self._kinematics.is_current():
            self._kinematics = _Kinematics(self._sim)
        lower, upper = nominal_limits()
        low = np.maximum(self._centre - self._amplitude, lower + _LIMIT_MARGIN)
        high = np.minimum(self._centre + self._amplitude, upper - _LIMIT_MARGIN)
        self._start = self._end
        for _ in range(50):
            pose = np.where(self._active, self._rng.uniform(low, np.maximum(high, low)), self._centre)
            way = (0.25, 0.5, 0.75, 1.0)
            if min(self._kinematics.clearance(self._start + w * (pose - self._start)) for w in way) > 0.04:
                break
        else:
            pose = self._centre
        self._end = pose
        # A minimum-jerk segment peaks at 15/8 of its mean speed.
        self._duration = max(0.3, 1.875 * np.abs(self._end - self._start).max() / self._max_velocity)


def _check_horizon(horizon: int) -> None:
    if horizon < 1:
        raise InputError(f"horizon: found {horizon}, expected at least 1")


def _to_actions(sim: ArmSim, path: np.ndarray) -> np.ndarray:
    return np.clip(sim.to_motor(path), sim.lower, sim.upper).astype(np.float32)
