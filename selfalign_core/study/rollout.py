"""Episodes in closed loop: several simulated arms in lock-step, one batched inference per replanning instant.

A *planner* answers with a chunk for every running episode; ``PolicyPlanner`` is that of a policy. What an episode
does depends on the episode alone, but for rounding: the sums of a batched inference depend on the size of the batch.
Must not know tables, processes or ROS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from selfalign_core.data.sim_demos import REACH_JOINTS
from selfalign_core.errors import ConfigError, InputError
from selfalign_core.policy import Policy
from selfalign_core.robot.chunking import Handover
from selfalign_core.robot.types import Observation
from selfalign_core.sim import CAMERAS, JOINTS, TARGET_NAMES, BodyConfig, ReachEnv, ReachExpert, prompt_for

CONTROL_HZ = 20.0


@dataclass(frozen=True)
class EpisodeSpec:
    """One episode: ``seed`` places the objects and the arm and draws the policy's noise.

    ``target`` is what success is about; ``prompt`` is the name that the policy is told, ``target`` if None. ``token``:
    (peft_num_tokens, width) float32, None for the policy's own.
    """

    body: BodyConfig
    seed: int
    target: str
    prompt: str | None = None
    token: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("target", "prompt"):
            value = getattr(self, name)
            if value not in TARGET_NAMES and not (name == "prompt" and value is None):
                raise ConfigError(f"EpisodeSpec.{name}: found {value!r}, expected one of {', '.join(TARGET_NAMES)}")

    @property
    def told(self) -> str:
        """Name of the target in the prompt."""
        return self.prompt or self.target


@dataclass(frozen=True)
class RolloutConfig:
    """How episodes are run.

    ``joints``: those commanded and observed, in the policy's order; the others hold the set-point they start with.
    ``camera_size``: (H, W) in pixels as the robot's cameras publish.
    """

    joints: tuple[str, ...] = REACH_JOINTS
    camera_size: tuple[int, int] = (224, 224)
    replan_steps: int = 8
    max_steps: int = 120

    def __post_init__(self) -> None:
        if not self.joints or len(set(self.joints)) != len(self.joints) or not set(self.joints) <= set(JOINTS):
            raise ConfigError(f"joints: found {list(self.joints)}, expected some of {', '.join(JOINTS)}, each once")
        for name, low in (("replan_steps", 1), ("max_steps", 1)):
            if getattr(self, name) < low:
                raise ConfigError(f"RolloutConfig.{name}: found {getattr(self, name)}, expected >= {low}")


@dataclass(frozen=True)
class EpisodeResult:
    """How an episode ended. Distances in metres from the gripper's tip, to the target unless named otherwise.

    ``success``: the target was reached, which ends the episode. ``reached``: per target, whether it was reached at any
    time by the same criterion, the prompted one or not. ``action_error``: mean of ``|chunk - expert's chunk|`` [rad] at
    the replanning instants, the expert going to the prompted target.
    """

    success: bool
    steps: int
    final_distance: float
    min_distance: float
    final_distances: dict[str, float]
    reached: dict[str, bool]
    action_error: float


class RunningEpisode:
    """An episode under way."""

    def __init__(self, episode: EpisodeSpec, env: ReachEnv, config: RolloutConfig) -> None:
        self.episode, self.env, self.config = episode, env, config
        self.step = 0
        self.done = self.success = False
        self.columns = [JOINTS.index(joint) for joint in config.joints]
        if env.body != episode.body:
            env.apply_body(episode.body)
        env.max_steps = config.max_steps
        env.reset(seed=episode.seed, options={"target": episode.target})
        self.expert = ReachExpert(env.sim, active_joints=config.joints)
        self._hold = env.sim.setpoint()
        self._chunk = (0, np.empty(0))  # since which step, and its actions
        self._images: dict[str, np.ndarray] = {}
        self._near = dict.fromkeys(TARGET_NAMES, 0)
        self._reached = dict.fromkeys(TARGET_NAMES, False)
        self._min_distance = env.sim.distance()
        self._errors: list[float] = []

    def image(self, camera: str) -> np.ndarray:
        """(H, W, 3) uint8 RGB as the robot's camera publishes it now."""
        if camera not in self._images:
            self._images[camera] = self.env.sim.render(camera, *self.config.camera_size)
        return self._images[camera]

    def state(self) -> np.ndarray:
        """(joints,) float32 motor frame [rad]."""
        return self.env.sim.joint_state().position[self.columns].astype(np.float32)

    def observation(self, cameras: Sequence[str]) -> Observation:
        """What a policy sees and is told now."""
        images = {camera: self.image(camera) for camera in cameras}
        stamp = round(self.step * self.env.dt * 1e9)
        return Observation(images, self.state(), prompt_for(self.episode.told), stamp)

    def add_chunk(self, chunk: np.ndarray) -> None:
        """Take (horizon, joints) actions [rad] for the steps from now on."""
        wanted = self.expert.chunk(len(chunk), target=self.episode.told, dt=self.env.dt)[:, self.columns]
        self._errors.append(float(np.abs(chunk - wanted).mean()))
        self._chunk = self.step, chunk

    def advance(self) -> None:
        """One control step with the action that is due."""
        env, (begin, chunk) = self.env, self._chunk
        action = self._hold.copy()
        action[self.columns] = chunk[self.step - begin]
        _, _, self.success, truncated, _ = env.step(action)
        self.step += 1
        self._images.clear()
        self._min_distance = min(self._min_distance, env.sim.distance())
        for name in TARGET_NAMES:
            self._near[name] = self._near[name] + 1 if env.sim.distance(name) < env.success_distance else 0
            self._reached[name] |= self._near[name] >= env.success_steps
        self.done = self.success or truncated

    def result(self) -> EpisodeResult:
        sim = self.env.sim
        return EpisodeResult(
            success=self.success,
            steps=self.step,
            final_distance=sim.distance(),
            min_distance=self._min_distance,
            final_distances={name: sim.distance(name) for name in TARGET_NAMES},
            reached=dict(self._reached),
            action_error=float(np.mean(self._errors)),
        )


Planner = Callable[[Sequence[RunningEpisode]], np.ndarray]
"""Chunks (episodes, horizon, joints) float32, motor frame [rad], for the episodes that run."""


class PolicyPlanner:
    """Chunks of a policy for several episodes at once, each with its own token; noise from an episode's seed and step.

    Raises:
        ConfigError: the policy reads a camera that the simulated arm has not.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.cameras = tuple(camera for camera in policy.config.cameras if camera is not None)
        for camera in self.cameras:
            if camera not in CAMERAS:
                raise ConfigError(f"checkpoint: found camera {camera!r}, expected only {', '.join(CAMERAS)}")

    @torch.no_grad()
    def __call__(self, running: Sequence[RunningEpisode], handover: Handover | None = None) -> np.ndarray:
        """``handover``: of the running episodes as a batch, in their order."""
        policy = self.policy
        observations = [one.observation(self.cameras) for one in running]
        states = np.stack([observation.state for observation in observations])
        actions = policy.model.sample_actions(
            policy.codec.observations_to_model(observations),
            torch.stack([self._noise(one) for one in running]).to(policy.dim_mask.device),
            token=self._tokens(running),
            **policy.sampling_options(handover, states),
        )
        chunks = policy.codec.actions_from_model(actions, states)
        if handover is not None:
            chunks = handover.join(chunks)
        if not np.isfinite(chunks).all():
            raise InputError("sample_actions: found NaN or infinity in the actions, expected finite numbers")
        return chunks

    def _noise(self, one: RunningEpisode) -> torch.Tensor:
        seed = np.random.SeedSequence([one.episode.seed, one.step]).generate_state(1, np.uint64)[0] >> np.uint64(1)
        shape = (self.policy.horizon, self.policy.config.model.action_dim)
        return torch.randn(shape, generator=torch.Generator().manual_seed(int(seed)))

    def _tokens(self, running: Sequence[RunningEpisode]) -> torch.Tensor | None:
        own = self.policy.e_token
        if own is None:
            if any(one.episode.token is not None for one in running):
                raise InputError(
                    "EpisodeSpec.token: found one, expected None (the model has use_peft_prefix_token=False)"
                )
            return None
        given = (one.episode.token for one in running)
        tokens = [own.data if token is None else np.asarray(token, np.float32) for token in given]
        for token in tokens:
            if token.shape != own.data.shape:
                raise InputError(f"EpisodeSpec.token: found shape {token.shape}, expected {own.data.shape}")
        return torch.from_numpy(np.stack(tokens)).to(self.policy.dim_mask.device)


def rollout(
    planner: Planner,
    episodes: Sequence[EpisodeSpec],
    config: RolloutConfig | None = None,
    *,
    environments: list[ReachEnv] | None = None,
    before_step: Callable[[RunningEpisode], None] | None = None,
) -> list[EpisodeResult]:
    """Run all ``episodes`` side by side.

    Args:
        planner: see ``Planner``; ``PolicyPlanner(policy)`` for a policy.
        episodes: one arm is simulated for each, and all that still run are one batch for the planner.
        config: the defaults are those of the shipped policy.
        environments: arms of earlier calls to use again, which saves opening a drawing context for each; grows as
            needed, and the caller closes them. Changes no result.
        before_step: called with each running episode before each control step.

    Raises:
        ConfigError: the chunks are too short for ``replan_steps``.
        InputError: chunks of a wrong shape.
    """
    config = config or RolloutConfig()
    pool = [] if environments is None else environments
    while len(pool) < len(episodes):
        pool.append(ReachEnv(cameras=(), control_hz=CONTROL_HZ))
    try:
        everyone = [RunningEpisode(episode, env, config) for episode, env in zip(episodes, pool, strict=False)]
        running = everyone
        while running := [one for one in running if not one.done]:
            if running[0].step % config.replan_steps == 0:
                _plan(planner, running, config)
            for one in running:
                if before_step is not None:
                    before_step(one)
                one.advance()
        return [one.result() for one in everyone]
    finally:
        if environments is None:
            for env in pool:
                env.close()


def _plan(planner: Planner, running: Sequence[RunningEpisode], config: RolloutConfig) -> None:
    chunks = planner(running)
    if chunks.ndim != 3 or chunks.shape[::2] != (len(running), len(config.joints)):
        expected = f"({len(running)}, horizon, {len(config.joints)}): joints {', '.join(config.joints)}"
        raise InputError(f"chunks: found shape {chunks.shape}, expected {expected}")
    if chunks.shape[1] < config.replan_steps:
        raise ConfigError(f"chunks: found {chunks.shape[1]} actions, expected replan_steps = {config.replan_steps}")
    for one, chunk in zip(running, chunks, strict=True):
        one.add_chunk(chunk)
