"""When the frames and actions of a dataset were, and which of them belong together.

Frames of a recorded robot are where its camera took them, seldom one control step apart, and its actions came when
they came: the *track*. They are paired by stamps, by the rule of the nodes (``selfalign_core.robot.frames``). Without
a track the rows of an episode are one control step apart by definition, whatever their stamps say, and each has its
action.

Must not know files, ROS, the model or torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from selfalign_core.data.dataset_meta import Episode
from selfalign_core.robot.frames import Pairing, Pairs

_ROWS_PER_BLOCK = 16_384  # paired at once


@dataclass(frozen=True)
class Track:
    """Executed actions, each in force from its stamp on.

    ``stamps`` (m,) int64 ns, rising. ``actions`` (m, A) float32.
    """

    stamps: np.ndarray
    actions: np.ndarray

    def __len__(self) -> int:
        return len(self.stamps)


class Timeline:
    """The frames of ``episodes`` with ``stamps`` (N,) and ``actions`` (N, A), and their ``track`` if there is one.

    ``times`` (N,) int64 ns is when each frame was, as far as pairing goes. An episode lasts to its last frame: no
    action is taken from after it.
    """

    def __init__(
        self, episodes: Sequence[Episode], dt_ns: int, *, stamps: np.ndarray, actions: np.ndarray, track: Track | None
    ) -> None:
        self._pairing = Pairing(dt_ns)
        self.episode_of = np.repeat(np.arange(len(episodes)), [episode.length for episode in episodes])
        self._frames = _parts([(episode.start, episode.length) for episode in episodes])
        if track is None:
            steps = [np.arange(episode.length, dtype=np.int64) for episode in episodes]
            self.times = np.concatenate([np.zeros(0, np.int64), *steps]) * dt_ns
            self._track, self._actions = Track(self.times, actions), self._frames
        else:
            self.times = np.asarray(stamps)
            self._track = Track(np.asarray(track.stamps), track.actions)
            self._actions = _parts([(episode.track_start, episode.track_length) for episode in episodes])

    def pair(self, rows: np.ndarray, horizon: int) -> Pairs:
        """The transitions of ``horizon`` actions from each of ``rows`` (n,) on; places of frames are rows."""
        episode = self.episode_of[rows]
        return self._pairing.pair(
            self.times,
            self._track.stamps,
            rows,
            horizon,
            frames_within=_of(self._frames, episode),
            actions_within=_of(self._actions, episode),
        )

    def complete(self, rows: np.ndarray, horizon: int) -> np.ndarray:
        """Those of ``rows`` (n,) from which a whole transition of ``horizon`` actions goes."""
        blocks = [rows[begin : begin + _ROWS_PER_BLOCK] for begin in range(0, len(rows), _ROWS_PER_BLOCK)]
        return np.concatenate([rows[:0], *(block[self.pair(block, horizon).complete] for block in blocks)])

    def executed(self, places: np.ndarray) -> np.ndarray:
        """The actions at ``places`` of any shape, (..., A) float32."""
        return np.asarray(self._track.actions[places])

    def actions_from(self, rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The actions in force from each of ``rows`` (n,) on, (n, count, A), and where there is one, (n, count) bool.

        Where there is none, past the end of the episode or in a hole, stands the last one before, or the first of the
        episode.
        """
        episode = self.episode_of[rows]
        begin, end = _of(self._actions, episode)
        due = self._pairing.due(self.times[rows], count)
        last = self.times[self._frames[1][episode] - 1][:, None]
        places, known = self._pairing.in_force(self._track.stamps, np.minimum(due, last), (begin, end))
        return self.executed(np.maximum(places, begin[:, None])), known & (due <= last)

    def nearest(self, rows: np.ndarray, steps: int) -> np.ndarray:
        """The rows of the same episodes nearest to ``steps`` control steps after ``rows`` (n,)."""
        due = self.times[rows] + steps * self._pairing.dt_ns
        return self._pairing.nearest(self.times, due, _of(self._frames, self.episode_of[rows]))

    def track_of(self, episode: int) -> Track:
        """The actions of one episode, by :attr:`times`."""
        part = slice(*(int(edge[episode]) for edge in self._actions))
        return Track(self._track.stamps[part], np.asarray(self._track.actions[part]))


def _parts(slices: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """(begins, ends) of (begin, length), int64."""
    begins, lengths = np.array(slices, np.int64).reshape(-1, 2).T
    return begins, begins + lengths


def _of(parts: tuple[np.ndarray, np.ndarray], chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return parts[0][chosen], parts[1][chosen]
