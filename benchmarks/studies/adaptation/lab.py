"""One simulated body and what is recorded on it: the calibration motion, labelled frames, held-out transitions.

Observations are what the nodes would see: drawn at the camera's size, shrunk to the model's. Each recording is made
when it is first asked for, and follows from the body, the seed and the index alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from benchmarks.studies.adaptation.expert_fit import Labelled
from benchmarks.studies.adaptation.settings import Settings, contract_for
from selfalign_core.alignment import SelfAligner, StageReport
from selfalign_core.data.sim_demos import DemoConfig, record_episode
from selfalign_core.errors import ConfigError
from selfalign_core.policy import Policy
from selfalign_core.robot.buffer import TransitionBuffer
from selfalign_core.robot.calibration import CalibrationConfig, calibration_motion
from selfalign_core.robot.images import resize_with_pad
from selfalign_core.robot.types import TransitionBatch
from selfalign_core.sim import JOINTS, ArmSim, BodyConfig
from selfalign_core.study.rollout import CONTROL_HZ

CAMERA_SIZE = (224, 224)
DT_NS = round(1e9 / CONTROL_HZ)
ALIGN_PERIOD = round(CONTROL_HZ)
"""Control steps between two calls of the aligner."""

_FIT_EPISODES, _HELD_OUT_EPISODES = 6, 2  # half of them play; of the former the last two are for validation
_CALIBRATION, _FIT, _HELD_OUT = range(3)


class AlignerLoop:
    """Frames and actions into a buffer, and the aligner called once per second, as the nodes do it."""

    def __init__(self, policy: Policy, aligner: SelfAligner):
        self.aligner, self.buffer = aligner, buffer_for(policy)
        self._steps = 0

    def add(self, stamp_ns: int, images: np.ndarray, state: np.ndarray, action: np.ndarray) -> StageReport | None:
        """One control step: ``images`` (cameras, H, W, 3) and ``state`` at ``stamp_ns``, ``action`` from then on."""
        add(self.buffer, stamp_ns, images, state, action)
        self._steps += 1
        if self._steps % ALIGN_PERIOD:
            return None
        wanted = self.aligner.request(stamp_ns)
        batch = self.buffer.newest(wanted.count, since_ns=wanted.since_ns, stride=wanted.stride)
        return self.aligner.advance(batch, stamp_ns)


@dataclass(frozen=True)
class Recording:
    """What was seen and done, a row per control step, as in a dataset's episode.

    ``images``: (n, cameras, H, W, 3) uint8 RGB. ``states``, ``actions``: (n, joints) float32 motor frame [rad]; the
    action is the one in force from that row to the next.
    """

    images: np.ndarray
    states: np.ndarray
    actions: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Recording:
        """From image, state and action of each control step; at least one."""
        images, states, actions = (np.array(column) for column in zip(*rows, strict=True))
        return cls(images, states, actions)


class Lab:
    """``index``: what differs from body to body; labs of one index have the same objects and poses."""

    def __init__(self, policy: Policy, body: BodyConfig, index: int, settings: Settings):
        self.policy, self.body, self.index, self.settings = policy, body, index, settings
        self.joints = JOINTS[: policy.action_dim]

    @cached_property
    def calibration(self) -> Recording:
        """The calibration motion from a random pose near home."""
        contract, rng = contract_for(self.joints), self._rng(_CALIBRATION)
        columns = [JOINTS.index(joint) for joint in self.joints]
        sim = ArmSim(self.body)
        try:
            sim.reset(rng)
            action = sim.setpoint()
            config = CalibrationConfig(duration_s=self.settings.motion_s, amplitude=self.settings.motion_amplitude)
            motion = calibration_motion(contract, action[columns], config, seed=int(rng.integers(2**31)))
            rows = []
            for row in motion:
                action[columns] = row
                state = sim.joint_state().position[columns].astype(np.float32)
                rows.append((see(sim, self.policy), state, row.astype(np.float32)))
                sim.command(action)
                sim.step(1 / CONTROL_HZ)
            return Recording.of(rows)
        finally:
            sim.close()

    @cached_property
    def labelled(self) -> tuple[Labelled, Labelled]:
        """Frames to fit a token on, and others to validate it on."""
        *fit, chase, play = [_labelled(episode) for episode in self._episodes(_FIT, _FIT_EPISODES)]
        return _joined(fit), _joined([chase, play])

    @cached_property
    def held_out(self) -> Labelled:
        """``settings.frames`` of recordings that no arm has seen, evenly spaced."""
        frames = _joined([_labelled(episode) for episode in self._held_out_episodes])
        return frames.select(
            np.linspace(0, len(frames) - 1, min(self.settings.frames, len(frames))).round().astype(int)
        )

    @cached_property
    def held_out_transitions(self) -> TransitionBatch:
        """Of the same recordings, every half transition."""
        buffer, count = buffer_for(self.policy), 0
        for number, episode in enumerate(self._held_out_episodes):
            begin = number * 3600 * 10**9
            count += len(episode["states"])
            for stamp, *rows in zip(*(episode[k] for k in ("stamps", "images", "states", "actions")), strict=True):
                add(buffer, begin + int(stamp), *rows)
        return buffer.newest(count, since_ns=0, stride=self.policy.transition_horizon // 2 or 1)

    @cached_property
    def _held_out_episodes(self) -> list[dict[str, np.ndarray]]:
        return list(self._episodes(_HELD_OUT, _HELD_OUT_EPISODES))

    def _episodes(self, purpose: int, count: int) -> Iterator[dict[str, np.ndarray]]:
        config = DemoConfig(
            cameras=cameras_of(self.policy), image_size=self.policy.image_size, joints=self.joints,
            chunk=self.policy.horizon,
        )  # fmt: skip
        rng, sim = self._rng(purpose), ArmSim(self.body)
        try:
            for number in range(count):
                yield record_episode(sim, rng, config, play=bool(number % 2))
        finally:
            sim.close()

    def _rng(self, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.settings.seed, self.index, purpose])


def own_token(policy: Policy) -> np.ndarray:
    """(T, W) the one that the policy is deployed with."""
    if policy.e_token is None:
        raise ConfigError("found no E-Token, expected a policy with one")
    return policy.e_token.data


def cameras_of(policy: Policy) -> tuple[str, ...]:
    return tuple(camera for camera in policy.config.cameras if camera is not None)


def see(sim: ArmSim, policy: Policy) -> np.ndarray:
    """(cameras, H, W, 3) uint8 RGB at the model's size, as the buffer keeps it."""
    images = [resize_with_pad(sim.render(camera, *CAMERA_SIZE), *policy.image_size) for camera in cameras_of(policy)]
    return np.stack(images)


def buffer_for(policy: Policy) -> TransitionBuffer:
    return TransitionBuffer(
        cameras=cameras_of(policy), image_size=policy.image_size, state_dim=policy.state_dim,
        action_dim=policy.action_dim, horizon=policy.transition_horizon, dt_ns=DT_NS, capacity=600,
    )  # fmt: skip


def add(buffer: TransitionBuffer, stamp_ns: int, images: np.ndarray, state: np.ndarray, action: np.ndarray) -> None:
    """A frame and the action that follows it."""
    buffer.add_frame(stamp_ns, dict(zip(buffer.cameras, images, strict=True)), state)
    buffer.add_action(stamp_ns, action)


def transitions(policy: Policy, recording: Recording, count: int) -> TransitionBatch:
    """``count`` transitions spread evenly over the recording; fewer if it has fewer, control step by control step."""
    buffer, steps = buffer_for(policy), len(recording.states)
    for step, rows in enumerate(zip(recording.images, recording.states, recording.actions, strict=True)):
        add(buffer, step * DT_NS, *rows)
    stride = max(1, (steps - policy.transition_horizon - 1) // max(count - 1, 1))
    return buffer.newest(count, since_ns=0, stride=stride)


def _labelled(episode: dict[str, np.ndarray]) -> Labelled:
    return Labelled(episode["images"], episode["states"], episode["expert_chunks"])


def _joined(parts: list[Labelled]) -> Labelled:
    return Labelled(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("images", "states", "chunks")))
