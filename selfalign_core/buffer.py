"""A bounded ring of frames and executed actions, read out as transitions ``(obs_t, actions t..t+k, obs_{t+k})``.

Each frame is stored once; a transition is a pair of frame indices. Which frames and actions belong together is decided
in ``selfalign_core.robot.frames``. It knows stamps, not clocks, and imports neither torch nor ROS.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from selfalign_core.errors import InputError
from selfalign_core.robot.frames import Pairing
from selfalign_core.types import TransitionBatch


@dataclass(frozen=True)
class _Transitions:
    """Complete ones in order of time: places of obs_t and obs_{t+k} (n,) and of the actions (n, horizon)."""

    obs: np.ndarray
    next: np.ndarray
    actions: np.ndarray

    def __len__(self) -> int:
        return len(self.obs)

    def __getitem__(self, rows: np.ndarray | slice) -> _Transitions:
        return _Transitions(self.obs[rows], self.next[rows], self.actions[rows])


class TransitionBuffer:
    """Frames and actions may arrive late, twice or not at all; what cannot be paired yields no transition.

    Invariants: frames and actions are held in the order of their stamps, each stamp once; at most ``capacity``
    frames and ``capacity * horizon`` actions, the oldest leave first; with all frames in use, actions older than
    every frame leave too.

    Args:
        cameras: camera names, the order of the images in a frame.
        image_size: (H, W) in pixels of the stored images.
        horizon: executed actions per transition (k).
        dt_ns: nanoseconds between two actions; a transition spans ``horizon * dt_ns``.
        capacity: most frames kept.
        tolerance_ns: how far a frame or an action may lie from its due time; half of ``dt_ns`` unless given.
    """

    def __init__(
        self,
        *,
        cameras: Sequence[str],
        image_size: tuple[int, int],
        state_dim: int,
        action_dim: int,
        horizon: int,
        dt_ns: int,
        capacity: int,
        tolerance_ns: int | None = None,
    ):
        for name, value in (
            ("state_dim", state_dim), ("action_dim", action_dim), ("horizon", horizon), ("dt_ns", dt_ns)
        ):  # fmt: skip
            if value < 1:
                raise InputError(f"TransitionBuffer.{name}: found {value}, expected >= 1")
        if capacity < 2:
            raise InputError(f"TransitionBuffer.capacity: found {capacity}, expected >= 2 frames")
        self.cameras = tuple(cameras)
        self.image_size = tuple(image_size)
        self.state_dim, self.action_dim = state_dim, action_dim
        self.horizon, self.capacity = horizon, capacity
        self._pairing = Pairing(dt_ns, tolerance_ns)
        self._images = np.zeros((capacity, len(self.cameras), *self.image_size, 3), np.uint8)
        self._states = np.zeros((capacity, state_dim), np.float32)
        self.clear()

    def clear(self) -> None:
        """Forget everything, for instance after time jumped back."""
        self._stamps: list[int] = []  # sorted
        self._slots: list[int] = []  # storage row of each stamp
        self._free = list(range(self.capacity - 1, -1, -1))
        self._action_stamps: list[int] = []  # sorted
        self._actions: list[np.ndarray] = []
        self._valid: _Transitions | None = None
        self.counters = {"frames": 0, "actions": 0, "out_of_order": 0, "duplicate": 0, "too_old": 0}

    @property
    def num_frames(self) -> int:
        return len(self._stamps)

    @property
    def num_transitions(self) -> int:
        return len(self._transitions())

    @property
    def nbytes(self) -> int:
        """Bytes held for frames, states and actions."""
        return self._images.nbytes + self._states.nbytes + sum(a.nbytes for a in self._actions)

    def add_frame(self, stamp_ns: int, images: Mapping[str, np.ndarray], state: np.ndarray) -> None:
        """Store one synchronised frame; a stamp already held is ignored and counted.

        Raises:
            InputError: a camera is missing, an image is not (H, W, 3) uint8, or the state has a wrong shape or NaN.
        """
        state = self._checked("state", state, self.state_dim)
        for camera in self.cameras:
            if camera not in images:
                raise InputError(f"frame at {stamp_ns} ns: found cameras {sorted(images)}, expected {camera!r} too")
            image = images[camera]
            if image.shape != (*self.image_size, 3) or image.dtype != np.uint8:
                raise InputError(
                    f"frame at {stamp_ns} ns, camera {camera!r}: found {image.shape} {image.dtype}, "
                    f"expected {(*self.image_size, 3)} uint8"
                )
        place = bisect.bisect_left(self._stamps, stamp_ns)
        if place < len(self._stamps) and self._stamps[place] == stamp_ns:
            self.counters["duplicate"] += 1
            return
        if not self._free:
            if place == 0:
                self.counters["too_old"] += 1
                return
            self._free.append(self._slots.pop(0))
            self._stamps.pop(0)
            place -= 1
        if place < len(self._stamps):
            self.counters["out_of_order"] += 1
        slot = self._free.pop()
        for index, camera in enumerate(self.cameras):
            self._images[slot, index] = images[camera]
        self._states[slot] = state
        self._stamps.insert(place, stamp_ns)
        self._slots.insert(place, slot)
        self.counters["frames"] += 1
        self._drop_old_actions()
        self._valid = None

    def add_action(self, stamp_ns: int, action: np.ndarray) -> None:
        """Store one executed action, in force from ``stamp_ns`` until the next one; the last of equal stamps counts."""
        action = self._checked("action", action, self.action_dim)
        place = bisect.bisect_left(self._action_stamps, stamp_ns)
        if place < len(self._action_stamps) and self._action_stamps[place] == stamp_ns:
            self._actions[place] = action
            self.counters["duplicate"] += 1
        else:
            if place < len(self._action_stamps):
                self.counters["out_of_order"] += 1
            self._action_stamps.insert(place, stamp_ns)
            self._actions.insert(place, action)
            self.counters["actions"] += 1
        self._drop_old_actions()
        self._valid = None

    def sample(self, fit_size: int, holdout_size: int, *, seed: int) -> tuple[TransitionBatch, TransitionBatch]:
        """Older transitions to fit on and newer ones to judge by.

        The hold-out is the ``holdout_size`` newest transitions. The fit batch is drawn without replacement, by
        ``seed``, from those that end before the hold-out begins; it holds fewer than ``fit_size`` if there are
        fewer. The same content and seed give the same batches.

        Raises:
            InputError: not enough transitions, with how many there are.
        """
        transitions = self._transitions()
        holdout = transitions[max(len(transitions) - holdout_size, 0) :]
        older = transitions
        if len(holdout):
            stamps = np.array(self._stamps, np.int64)
            older = transitions[stamps[transitions.next] <= stamps[holdout.obs[0]]]
        if len(holdout) < holdout_size or (fit_size and not len(older)):
            raise InputError(
                f"buffer: found {len(transitions)} transitions over {self.num_frames} frames "
                f"({len(older)} end before the newest {holdout_size}), expected at least 1 older and "
                f"{holdout_size} newer"
            )
        rng = np.random.default_rng(seed)
        chosen = np.sort(rng.permutation(len(older))[:fit_size])
        return self._batch(older[chosen]), self._batch(holdout)

    def newest(self, count: int, *, since_ns: int, stride: int = 1) -> TransitionBatch:
        """At most ``count`` of the newest transitions that begin at ``since_ns`` or later, oldest first.

        From the newest back, each begins ``stride`` control steps or more (less the tolerance) before the one after it.
        May be empty.
        """
        transitions = self._transitions()
        chosen: list[int] = []
        due = None  # the latest begin of the next one
        for row in reversed(range(len(transitions))):
            begin = self._stamps[transitions.obs[row]]
            if len(chosen) == count or begin < since_ns:
                break
            if due is None or begin <= due + self._pairing.tolerance_ns:
                chosen.append(row)
                due = begin - stride * self._pairing.dt_ns
        return self._batch(transitions[np.array(chosen[::-1], np.int64)])

    def _checked(self, name: str, value: np.ndarray, size: int) -> np.ndarray:
        value = np.asarray(value, np.float32)
        if value.shape != (size,):
            raise InputError(f"{name}: found shape {value.shape}, expected ({size},)")
        if not np.isfinite(value).all():
            raise InputError(f"{name}: found {value.tolist()}, expected finite numbers")
        return value.copy()

    def _drop_old_actions(self) -> None:
        # No more than all frames could use: with a dead camera they would grow for ever.
        drop = max(len(self._actions) - self.capacity * self.horizon, 0)
        if not self._free:  # frames older than the oldest come no more
            # The action in force at the oldest frame may have been stamped before it.
            drop = max(drop, bisect.bisect_right(self._action_stamps, self._stamps[0]) - 1)
        del self._action_stamps[:drop], self._actions[:drop]

    def _transitions(self) -> _Transitions:
        if self._valid is None:
            frames, actions = np.array(self._stamps, np.int64), np.array(self._action_stamps, np.int64)
            rows = np.arange(len(frames))
            pairs = self._pairing.pair(
                frames, actions, rows, self.horizon, frames_within=(0, len(frames)), actions_within=(0, len(actions))
            )
            self._valid = _Transitions(rows, pairs.next, pairs.actions)[pairs.complete]
        return self._valid

    def _batch(self, chosen: _Transitions) -> TransitionBatch:
        used, inverse = np.unique(np.concatenate([chosen.obs, chosen.next]), return_inverse=True)
        slots = [self._slots[place] for place in used]
        actions = [self._actions[place] for place in chosen.actions.flat]
        return TransitionBatch(
            cameras=self.cameras,
            frames=self._images[slots],
            frame_states=self._states[slots],
            frame_stamps=np.array([self._stamps[place] for place in used], np.int64),
            obs_index=inverse[: len(chosen)].astype(np.int64),
            next_index=inverse[len(chosen) :].astype(np.int64),
            actions=np.array(actions, np.float32).reshape(len(chosen), self.horizon, self.action_dim),
        )
