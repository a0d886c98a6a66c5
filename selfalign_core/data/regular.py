"""The episodes of a dataset on a regular grid, for formats that know frames by their number alone.

Must not know ROS, the model or torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from selfalign_core.data.dataset import TransitionDataset
from selfalign_core.robot.frames import Pairing


@dataclass(frozen=True)
class Part:
    """A stretch of an episode without a hole, a control step from one entry to the next.

    ``rows`` (n,) int64 are those of the dataset, a row twice where there was no other; ``stamps`` (n,) int64 ns;
    ``actions`` (n, A) float32. ``episode``: which of the dataset it is of.
    """

    episode: int
    rows: np.ndarray
    stamps: np.ndarray
    actions: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


def regular_parts(dataset: TransitionDataset) -> Iterator[Part]:
    """Every episode in order; as it is where there is no track, else parted at its holes."""
    for index, episode in enumerate(dataset.meta.episodes):
        rows = np.arange(episode.start, episode.stop)
        if dataset.track is None:
            yield Part(index, rows, dataset.stamps[rows], dataset.actions[rows])
        else:
            yield from _resampled(dataset, index, rows)


def _resampled(dataset: TransitionDataset, index: int, rows: np.ndarray) -> Iterator[Part]:
    """At each tick the action in force and the nearest frame, of those up to half a step newer and a step and a half
    older.
    """
    dt_ns, pairing = dataset.meta.dt_ns, Pairing(dataset.meta.dt_ns)
    stamps, track = np.asarray(dataset.stamps[rows]), dataset.timeline.track_of(index)
    ticks = np.arange(stamps[0], stamps[-1] + dt_ns // 2 + 1, dt_ns)
    known_by = pairing.newest(stamps, ticks, (0, len(stamps))) + 1
    frames = pairing.nearest(stamps, ticks, (np.zeros_like(known_by), known_by))
    actions, is_in_force = pairing.in_force(track.stamps, ticks, (0, len(track)))
    usable = is_in_force & (ticks - stamps[frames] <= dt_ns + pairing.tolerance_ns)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], usable, [False]])))
    for begin, end in edges.reshape(-1, 2):
        part = slice(begin, end)
        yield Part(index, rows[frames[part]], ticks[part], track.actions[actions[part]])
