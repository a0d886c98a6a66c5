"""A bounded ring of frames and executed actions, read out as transitions ``(obs_t, actions t..t+k, obs_{t+k})``.

Each frame is stored once; a transition is a pair of frame indices. It knows stamps, not clocks, and imports neither
torch nor ROS.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence

import numpy as np

from selfalign_core.errors import InputError
from selfalign_core.robot.types import TransitionBatch


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
        self.horizon, self.dt_ns, self.capacity = horizon, dt_ns, capacity
        self.tolerance_ns = dt_ns // 2 if tolerance_ns is None else tolerance_ns
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
        self._valid: list[tuple[int, int]] | None = None
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
        holdout = transitions[len(transitions) - holdout_size :] if holdout_size else []
        begin = self._stamps[holdout[0][0]] if holdout else None
        older = [t for t in transitions if begin is None or self._stamps[t[1]] <= begin]
        if len(holdout) < holdout_size or (fit_size and not older):
            raise InputError(
                f"buffer: found {len(transitions)} transitions over {self.num_frames} frames "
                f"({len(older)} end before the newest {holdout_size}), expected at least 1 older and "
                f"{holdout_size} newer"
            )
        rng = np.random.default_rng(seed)
        chosen = np.sort(rng.permutation(len(older))[:fit_size])
        return self._batch([older[i] for i in chosen]), self._batch(holdout)

    def newest(self, count: int, *, since_ns: int, stride: int = 1) -> TransitionBatch:
        """At most ``count`` of the newest transitions that begin at ``since_ns`` or later, oldest first.

        From the newest back, each begins ``stride`` control steps or more (less the tolerance) before the one after it.
        May be empty.
        """
        chosen: list[tuple[int, int]] = []
        due = None  # the latest begin of the next one
        for pair in reversed(self._transitions()):
            begin = self._stamps[pair[0]]
            if len(chosen) == count or begin < since_ns:
                break
            if due is None or begin <= due + self.tolerance_ns:
                chosen.append(pair)
                due = begin - stride * self.dt_ns
        return self._batch(chosen[::-1])

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

    def _transitions(self) -> list[tuple[int, int]]:
        """(place of obs_t, place of obs_{t+k}) of every complete transition, in order of time."""
        if self._valid is None:
            pairs = ((i, self._frame_near(stamp + self.horizon * self.dt_ns)) for i, stamp in enumerate(self._stamps))
            self._valid = [
                (i, j) for i, j in pairs if j is not None and self._action_places(self._stamps[i]) is not None
            ]
        return self._valid

    def _frame_near(self, stamp_ns: int) -> int | None:
        place = bisect.bisect_left(self._stamps, stamp_ns)
        near = [p for p in (place - 1, place) if 0 <= p < len(self._stamps)]
        best = min(near, key=lambda p: abs(self._stamps[p] - stamp_ns), default=None)
        return best if best is not None and abs(self._stamps[best] - stamp_ns) <= self.tolerance_ns else None

    def _action_places(self, stamp_ns: int) -> list[int] | None:
        """Places of the actions in force at each of the k due times from ``stamp_ns`` on; None if one is missing."""
        places = []
        for step in range(self.horizon):
            due = stamp_ns + step * self.dt_ns
            place = bisect.bisect_right(self._action_stamps, due + self.tolerance_ns) - 1
            if place < 0 or due - self._action_stamps[place] > self.dt_ns + self.tolerance_ns:
                return None
            places.append(place)
        return places

    def _batch(self, pairs: list[tuple[int, int]]) -> TransitionBatch:
        obs = np.array([i for i, _ in pairs], np.int64)
        nxt = np.array([j for _, j in pairs], np.int64)
        used, inverse = np.unique(np.concatenate([obs, nxt]), return_inverse=True)
        slots = [self._slots[place] for place in used]
        actions = [[self._actions[p] for p in self._action_places(self._stamps[i])] for i in obs]
        return TransitionBatch(
            cameras=self.cameras,
            frames=self._images[slots],
            frame_states=self._states[slots],
            frame_stamps=np.array([self._stamps[place] for place in used], np.int64),
            obs_index=inverse[: len(obs)].astype(np.int64),
            next_index=inverse[len(obs) :].astype(np.int64),
            actions=np.array(actions, np.float32).reshape(len(obs), self.horizon, self.action_dim),
        )
