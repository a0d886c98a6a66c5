"""What crosses the border between the core and whoever uses it: plain numpy records. Imports neither torch nor ROS."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from selfalign_core.errors import InputError


@dataclass(frozen=True)
class Observation:
    """What the robot sees and feels at one time.

    ``images``: camera name → (H, W, 3) uint8 RGB. ``state``: (state_dim,) float32 in the contract's order and units.
    ``stamp_ns``: stamp of the oldest image, nanoseconds.
    """

    images: dict[str, np.ndarray]
    state: np.ndarray
    prompt: str
    stamp_ns: int = 0


@dataclass(frozen=True)
class ActionChunk:
    """Actions to execute from ``stamp_ns`` on: action i is in force from ``stamp_ns + i*dt`` to ``(i+1)*dt``.

    ``actions``: (horizon, action_dim) float32 in the contract's order and units. ``dt``: seconds.
    """

    actions: np.ndarray
    dt: float
    stamp_ns: int
    e_token_version: int
    inference_s: float


@dataclass(frozen=True)
class EToken:
    """A value of the E-Token: ``data`` (peft_num_tokens, width) float32, for the model with ``model_digest``.

    ``version`` rises by one with every accepted update; 0 is the checkpoint's own token.
    """

    data: np.ndarray
    version: int
    embodiment: str
    model_digest: str


def token_norm(data: np.ndarray) -> float:
    """The size of an E-Token (T, W): root mean square over the width of its largest vector.

    What ``guard_max_norm`` bounds and every report gives; 1 is the size of a normally initialised one.
    """
    return float(np.sqrt(np.square(data, dtype=np.float64).mean(-1)).max(initial=0.0))


@dataclass(frozen=True)
class TransitionBatch:
    """B transitions over N frames, each frame stored once.

    ``frames``: (N, cameras, H, W, 3) uint8 RGB. ``frame_states``: (N, S) float32. ``frame_stamps``: (N,) int64 ns.
    ``obs_index``, ``next_index``: (B,) int64, rows of ``frames`` at t and at t+k.
    ``actions``: (B, K, A) float32, executed from t to t+k.
    """

    cameras: tuple[str, ...]
    frames: np.ndarray
    frame_states: np.ndarray
    frame_stamps: np.ndarray
    obs_index: np.ndarray
    next_index: np.ndarray
    actions: np.ndarray

    def __post_init__(self) -> None:
        count, batch = len(self.frames), len(self.obs_index)
        if self.frames.ndim != 5 or self.frames.shape[1] != len(self.cameras) or self.frames.shape[4] != 3:
            raise InputError(
                f"TransitionBatch.frames: found shape {self.frames.shape}, expected (N, {len(self.cameras)}, H, W, 3)"
            )
        if self.frames.dtype != np.uint8:
            raise InputError(f"TransitionBatch.frames: found dtype {self.frames.dtype}, expected uint8")
        for name, array, ndim, length in (
            ("frame_states", self.frame_states, 2, count),
            ("frame_stamps", self.frame_stamps, 1, count),
            ("next_index", self.next_index, 1, batch),
            ("actions", self.actions, 3, batch),
        ):
            if array.ndim != ndim or len(array) != length:
                raise InputError(
                    f"TransitionBatch.{name}: found shape {array.shape}, expected {ndim} dimension(s), {length} rows"
                )
        for name, index in (("obs_index", self.obs_index), ("next_index", self.next_index)):
            if batch and not (index.min() >= 0 and index.max() < count):
                raise InputError(
                    f"TransitionBatch.{name}: found rows {index.min()}..{index.max()}, expected 0..{count - 1}"
                )

    def __len__(self) -> int:
        return len(self.obs_index)

    def select(self, rows: np.ndarray | slice) -> TransitionBatch:
        """Some of the transitions, over only the frames they use."""
        obs, nxt = self.obs_index[rows], self.next_index[rows]
        used, inverse = np.unique(np.concatenate([obs, nxt]), return_inverse=True)
        return TransitionBatch(
            self.cameras,
            self.frames[used],
            self.frame_states[used],
            self.frame_stamps[used],
            inverse[: len(obs)].astype(np.int64),
            inverse[len(obs) :].astype(np.int64),
            self.actions[rows],
        )
