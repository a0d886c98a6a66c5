"""Demonstrations and play on simulated bodies, as a dataset.

    python -m selfalign_core.data.sim_demos --output DIR --bodies 256 --jobs 2

One embodiment per body. Half of the episodes (``--play``) are play: smooth off-expert motion that shows what the body
does. In the others the scripted expert, disturbed, chases one target after another. Every frame of both is labelled
with the expert's chunk for every prompt. Images are drawn at the size that the robot's cameras publish and shrunk as
the policy shrinks them. Deterministic: the same arguments give the same bytes, whatever the number of processes. Each
body is kept in the dataset's ``meta.json`` under ``sources``. Must not know ROS, the model or torch.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from tqdm import tqdm

from selfalign_core.command_line import More, command
from selfalign_core.data.command_line import ImageSize, both_sides
from selfalign_core.data.dataset_writer import DatasetWriter
from selfalign_core.errors import ConfigError
from selfalign_core.robot.images import resize_with_pad
from selfalign_core.sim import FAMILIES, JOINTS, TARGET_NAMES, ArmSim, BodyConfig, PlayPolicy, ReachExpert, prompt_for

REACH_JOINTS = JOINTS[:3]
"""Enough to bring the tip to any target: pan, lift and elbow."""

_SETTLE_S = 1.2
_CHASE_STEPS = (15, 45)  # control steps on one target
_DISTURBANCE = 0.05  # rad, drawn anew for each target; a slow random walk of a fifth of it on top


@dataclass(frozen=True)
class DemoConfig:
    """What to record: ``frames`` control steps of ``dt_s`` seconds per episode, ``play`` the share of play episodes.

    ``episodes``: per body; ``nominal_episodes``: of the nominal body, if it is to be seen more than the others.
    ``camera_size`` and ``image_size``: (H, W) in pixels as drawn and as kept.
    """

    cameras: tuple[str, ...] = ("overhead",)
    camera_size: tuple[int, int] = (224, 224)
    image_size: tuple[int, int] = (64, 64)
    joints: tuple[str, ...] = REACH_JOINTS
    families: tuple[str, ...] = FAMILIES
    episodes: int = 4
    nominal_episodes: int | None = None
    frames: int = 60
    play: float = 0.5
    chunk: int = 16
    dt_s: float = 0.05

    def __post_init__(self) -> None:
        for name in ("episodes", "nominal_episodes", "frames", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"DemoConfig.{name}: found {value}, expected >= 1")
        if not 0 <= self.play <= 1:
            raise ConfigError(f"DemoConfig.play: found {self.play}, expected a share from 0 to 1")
        for joint in self.joints:
            if joint not in JOINTS:
                raise ConfigError(f"DemoConfig.joints: found {joint!r}, expected some of {', '.join(JOINTS)}")


def sample_bodies(count: int, seed: int, config: DemoConfig) -> dict[str, BodyConfig]:
    """``count`` bodies by name; the first is the nominal one, the others are drawn from ``seed``."""
    rng = np.random.default_rng(seed)
    bodies = {"nominal": BodyConfig()}
    for index in range(1, count):
        name = f"body_{seed}_{index:04d}"
        bodies[name] = BodyConfig.sample(rng, families=config.families, active_joints=config.joints, name=name)
    return bodies


def record_episode(sim: ArmSim, rng: np.random.Generator, config: DemoConfig, *, play: bool) -> dict[str, np.ndarray]:
    """One episode from a random pose.

    Returns:
        ``images`` (n, cameras, H, W, 3) uint8, ``states`` and ``actions`` (n, joints) float32 motor frame [rad],
        ``stamps`` (n,) int64 ns, ``expert_chunks`` (n, prompts, chunk, joints) float32.
    """
    columns = [JOINTS.index(joint) for joint in config.joints]
    sim.reset(rng)
    _go_to_random_pose(sim, rng, columns)
    expert = ReachExpert(sim, active_joints=config.joints)
    player = PlayPolicy(sim, rng, active_joints=config.joints, amplitude=0.7, max_velocity=1.5)
    shape = (config.frames, len(config.cameras), *config.image_size, 3)
    episode: dict[str, np.ndarray] = {
        "images": np.empty(shape, np.uint8),
        "states": np.empty((config.frames, len(columns)), np.float32),
        "actions": np.empty((config.frames, len(columns)), np.float32),
        "stamps": (np.arange(config.frames) * round(config.dt_s * 1e9)).astype(np.int64),
        "expert_chunks": np.empty((config.frames, len(TARGET_NAMES), config.chunk, len(columns)), np.float32),
    }
    target, left = 0, 0
    constant = drift = np.zeros(len(columns))
    for row in range(config.frames):
        for camera, image in zip(config.cameras, episode["images"][row], strict=True):
            image[:] = resize_with_pad(sim.render(camera, *config.camera_size), *config.image_size)
        episode["states"][row] = sim.joint_state().position[columns]
        chunks = [expert.chunk(config.chunk, target=name, dt=config.dt_s) for name in TARGET_NAMES]
        episode["expert_chunks"][row] = np.stack(chunks)[:, :, columns]
        if play:
            action = player.chunk(1, dt=config.dt_s)[0]
        else:
            if left == 0:
                target, left = int(rng.integers(len(TARGET_NAMES))), int(rng.integers(*_CHASE_STEPS))
                constant = rng.normal(0.0, _DISTURBANCE, len(columns))
            left -= 1
            drift = 0.9 * drift + rng.normal(0.0, 0.2 * _DISTURBANCE, len(columns))
            action = chunks[target][0].copy()
            action[columns] += constant + drift
        episode["actions"][row] = action[columns]
        sim.command(action)
        sim.step(config.dt_s)
    return episode


def record(
    output: str,
    bodies: dict[str, BodyConfig],
    seed: int,
    config: DemoConfig,
    *,
    jobs: int = 1,
    progress: bool = False,
) -> None:
    """Record the episodes of each body, drawn from ``seed``, into the dataset directory ``output``."""
    with DatasetWriter(
        output,
        cameras=config.cameras,
        image_size=config.image_size,
        state_dim=len(config.joints),
        action_dim=len(config.joints),
        dt_ns=round(config.dt_s * 1e9),
        prompts=[prompt_for(name) for name in TARGET_NAMES],
        chunk_horizon=config.chunk,
        joint_names=config.joints,
    ) as writer:
        recorded = _recorded(list(bodies.values()), seed, config, jobs)
        bar = tqdm(zip(bodies.items(), recorded, strict=True), total=len(bodies), unit="body", disable=not progress)
        for (name, body), episodes in bar:
            writer.sources.append({"embodiment": name, "body": body.to_dict()})
            for arrays in episodes:
                writer.add_episode(embodiment=name, prompt=None, **arrays)


def _recorded(
    bodies: Sequence[BodyConfig], seed: int, config: DemoConfig, jobs: int
) -> Iterator[list[dict[str, np.ndarray]]]:
    """The episodes of each body, in order; several bodies at a time if ``jobs`` is more than 1."""
    count = len(bodies)
    arguments = (bodies, [[seed, index] for index in range(count)], [config] * count)
    if jobs == 1:
        yield from map(_record_body, *arguments)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_record_body, *arguments)


def _record_body(body: BodyConfig, seed: Sequence[int], config: DemoConfig) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    sim = ArmSim(body)
    try:
        episodes = config.nominal_episodes if body == BodyConfig() and config.nominal_episodes else config.episodes
        return [record_episode(sim, rng, config, play=_is_play(e, config)) for e in range(episodes)]
    finally:
        sim.close()


def _is_play(episode: int, config: DemoConfig) -> bool:
    """Play episodes spread evenly over a body's episodes."""
    return int((episode + 1) * config.play) > int(episode * config.play)


def _go_to_random_pose(sim: ArmSim, rng: np.random.Generator, columns: Sequence[int]) -> None:
    """Move to a pose above the table, so that episodes do not all begin alike."""
    low = np.array([-1.0, -0.5, -0.6, -0.3, -0.3, -0.3, 0.0])
    high = np.array([1.0, 0.9, 0.9, 0.3, 0.3, 0.3, 0.0])
    pose = sim.to_kinematic(sim.setpoint())
    pose[list(columns)] = rng.uniform(low, high)[list(columns)]
    sim.command(sim.to_motor(pose))
    sim.step(_SETTLE_S)


def run(
    *,
    output: Annotated[str, "dataset directory to make"],
    bodies: Annotated[int, "number of bodies; the first is the nominal one"] = 64,
    seed: Annotated[int, "of the bodies, and of their episodes"] = 1,
    episodes_seed: Annotated[int | None, "of the episodes: other recordings of the same bodies"] = None,
    episodes: Annotated[int, "per body"] = DemoConfig.episodes,
    nominal_episodes: Annotated[int | None, "of the nominal body, if not as many as of the others"] = None,
    frames: Annotated[int, "control steps per episode"] = DemoConfig.frames,
    jobs: Annotated[int, "processes"] = 1,
    play: Annotated[float, "share of play episodes"] = DemoConfig.play,
    image_size: ImageSize = DemoConfig.image_size,
    families: Annotated[tuple[str, ...], "what differs between bodies", More(choices=FAMILIES)] = DemoConfig.families,
) -> None:
    """Record demonstrations and play on simulated bodies."""
    config = DemoConfig(
        image_size=both_sides(image_size), families=families, episodes=episodes,
        nominal_episodes=nominal_episodes, frames=frames, play=play,
    )  # fmt: skip
    drawn = sample_bodies(bodies, seed, config)
    record(output, drawn, seed if episodes_seed is None else episodes_seed, config, jobs=jobs, progress=True)


main = command("selfalign_core.data.sim_demos", run)

if __name__ == "__main__":
    sys.exit(main())
