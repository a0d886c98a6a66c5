"""The reaching task on the simulated arm as a Gymnasium environment: one control step per ``step``.

Knows the task (targets, reward, success) and nothing of policies, training or ROS.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from ..errors import ConfigError
from .arm import ArmSim
from .body import CAMERAS, BodyConfig
from .model import TARGET_NAMES, prompt_for


class ReachEnv(gymnasium.Env[dict[str, Any], np.ndarray]):
    """Bring the gripper tip to the target that the prompt names.

    Action: (7,) float32 absolute motor-frame joint positions [rad], in force for one control step.

    Observation: ``{"images": {camera: (H, W, 3) uint8 RGB}, "state": (7,) float32 motor-frame joint positions [rad],
    "prompt": str}``.

    Reward: minus the distance [m] from the tip to the target. ``info`` holds ``distance_to_target`` [m], ``target``
    (its name), ``targets`` (name to (3,) reach point [m]), ``success`` and ``time`` [s]. An episode terminates on
    success (the tip within ``success_distance`` for ``success_steps`` control steps in a row) and is truncated after
    ``max_steps``.

    Args:
        body: the body; nominal by default.
        cameras: which cameras to draw, in order.
        image_size: (H, W) in pixels.
        control_hz: control steps per simulated second.
        seed: seed of the first ``reset`` that is given none.
        max_steps: control steps per episode.
        success_distance: m.
        success_steps: control steps in a row.
        render_mode: ``"rgb_array"`` for ``render()``: a (480, 640, 3) spectator's view.

    The same body, seed and actions give the same observations, bit for bit.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012 - Gymnasium reads it from the class

    def __init__(
        self,
        body: BodyConfig | None = None,
        *,
        cameras: Sequence[str] = CAMERAS,
        image_size: tuple[int, int] = (224, 224),
        control_hz: float = 20.0,
        seed: int | None = None,
        max_steps: int = 120,
        success_distance: float = 0.03,
        success_steps: int = 5,
        render_mode: str | None = None,
    ) -> None:
        for camera in cameras:
            if camera not in CAMERAS:
                raise ConfigError(f"cameras: found {camera!r}, expected some of {', '.join(CAMERAS)}")
        for name, value in (("control_hz", control_hz), ("max_steps", max_steps), ("success_steps", success_steps)):
            if not value > 0:
                raise ConfigError(f"{name}: found {value}, expected more than 0")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ConfigError(f"render_mode: found {render_mode!r}, expected None or 'rgb_array'")
        self.sim = ArmSim(body)
        self.cameras = tuple(cameras)
        self.image_size = image_size
        self.dt = 1.0 / control_hz
        self.max_steps = max_steps
        self.success_distance = success_distance
        self.success_steps = success_steps
        self.render_mode = render_mode
        self.metadata = {**self.metadata, "render_fps": round(control_hz)}
        self._first_seed = seed
        self._steps = self._steps_near = 0
        image = spaces.Box(0, 255, (*image_size, 3), np.uint8)
        prompts = [prompt_for(name) for name in TARGET_NAMES]
        self._fixed_spaces = {
            "images": spaces.Dict(dict.fromkeys(self.cameras, image)),
            "prompt": spaces.Text(max_length=max(map(len, prompts)), min_length=1, charset=string.ascii_letters + " "),
        }
        self._set_spaces()

    @property
    def body(self) -> BodyConfig:
        """The body in force."""
        return self.sim.body

    def apply_body(self, body: BodyConfig) -> None:
        """Change the body in mid-episode (see ``ArmSim.apply_body``); action and state bounds follow it."""
        self.sim.apply_body(body)
        self._set_spaces()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode: objects, target and start pose drawn from ``seed``.

        Args:
            seed: seed of this and, through it, of the following episodes.
            options: ``{"target": name}`` fixes the target; nothing else is drawn differently.

        Raises:
            ConfigError: unknown option. InputError: unknown target.
        """
        if seed is None:
            seed, self._first_seed = self._first_seed, None
        super().reset(seed=seed)
        options = options or {}
        for key in options:
            if key != "target":
                raise ConfigError(f"options: found {key!r}, expected only 'target'")
        self.sim.reset(self.np_random)
        if "target" in options:
            self.sim.set_target(options["target"])
        self._steps = self._steps_near = 0
        return self._observation(), self._info(success=False)

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Hold ``action`` for one control step. Raises ``InputError`` (nothing moves) when it is malformed."""
        self.sim.command(action)
        self.sim.step(self.dt)
        self._steps += 1
        distance = self.sim.distance()
        self._steps_near = self._steps_near + 1 if distance < self.success_distance else 0
        success = self._steps_near >= self.success_steps
        return self._observation(), -distance, success, self._steps >= self.max_steps, self._info(success)

    def render(self) -> np.ndarray | None:
        """(480, 640, 3) uint8 RGB spectator's view, or None without a render mode."""
        return None if self.render_mode is None else self.sim.render("scene", 480, 640)

    def close(self) -> None:
        """Free the drawing context."""
        self.sim.close()

    def _set_spaces(self) -> None:
        lower, upper = self.sim.lower.astype(np.float32), self.sim.upper.astype(np.float32)
        self.action_space = spaces.Box(lower, upper, dtype=np.float32)
        # Stops are springs: a reading may lie a little beyond them.
        state = spaces.Box(lower - 0.5, upper + 0.5, dtype=np.float32)
        self.observation_space = spaces.Dict({**self._fixed_spaces, "state": state})

    def _observation(self) -> dict[str, Any]:
        return {
            "images": {camera: self.sim.render(camera, *self.image_size) for camera in self.cameras},
            "state": self.sim.joint_state().position.astype(np.float32),
            "prompt": self.sim.prompt,
        }

    def _info(self, success: bool) -> dict[str, Any]:
        return {
            "distance_to_target": self.sim.distance(),
            "target": self.sim.target,
            "targets": {name: self.sim.reach_point(name) for name in TARGET_NAMES},
            "success": success,
            "time": self.sim.time,
        }
