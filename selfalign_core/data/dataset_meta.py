"""What ``meta.json`` of a dataset says: episodes, embodiments, prompts, and the shape of every array.

The directory itself is described in ``selfalign_core.data.dataset``. Must not know ROS, the model or torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np

from selfalign_core.errors import DatasetError
from selfalign_core.records import Count, Natural, Only, Range, Record, plain, read, shown

FORMAT = "selfalign-dataset-1"
TRACK_FORMAT = "selfalign-dataset-2"  # of a dataset with a track of executed actions
DEFAULT_STATISTICS_HORIZON = 16  # actions per chunk over which action statistics are taken unless said otherwise
PLAY = -1  # prompt of an episode that pursued no goal


@dataclass(frozen=True)
class Episode(Record):
    """Consecutive rows. ``prompt`` is an index into the prompts; ``PLAY`` (-1) is none.

    Their executed actions are ``track_length`` rows of the track from ``track_start`` on; 0 in a dataset without one,
    whose rows are one control step apart and have an action each.
    """

    error = DatasetError
    start: Natural
    length: Count
    embodiment: Natural
    prompt: Annotated[int, Range(PLAY)]
    track_start: Natural = 0
    track_length: Natural = 0

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class DatasetMeta(Record):
    """``meta.json``. Raises ``DatasetError`` when the fields contradict each other.

    ``delta_mask``: per action dimension, True if action statistics are of ``action - state`` of the chunk's first
    frame. ``statistics_horizon``: actions per chunk these statistics are over. ``counters``: frames left out and why.
    """

    error = DatasetError
    cameras: Annotated[tuple[str, ...], Only(len, "at least one camera")]
    image_size: tuple[Count, Count]
    state_dim: Count
    action_dim: Count
    dt_ns: Count
    prompts: Annotated[tuple[str, ...], Only(all, "text in each")]
    embodiments: tuple[str, ...]
    episodes: tuple[Episode, ...]
    delta_mask: tuple[bool, ...] = ()
    statistics_horizon: Count = DEFAULT_STATISTICS_HORIZON
    chunk_horizon: Count | None = None
    joint_names: tuple[str, ...] = ()
    counters: Mapping[str, int] = field(default_factory=dict)
    sources: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if not self.delta_mask:
            object.__setattr__(self, "delta_mask", (False,) * self.action_dim)
        super().__post_init__()
        for name in ("cameras", "prompts", "embodiments"):
            values = getattr(self, name)
            self.expect(len(set(values)) == len(values), name, "each once")
        values, dim = f"{len(self.delta_mask)} values", self.action_dim
        self.expect(len(self.delta_mask) == dim, "delta_mask", f"action_dim={dim}", values)
        self.expect(
            not any(self.delta_mask) or self.state_dim == dim,
            "delta_mask",
            "them equal",
            f"delta actions with state_dim={self.state_dim} and action_dim={dim}",
        )
        stop, actions, bodies, prompts = 0, 0, len(self.embodiments), len(self.prompts)
        for i, episode in enumerate(self.episodes):
            name = f"episodes[{i}]"
            self.expect(episode.start == stop, f"{name}.start", f"{stop} (no gaps)", shown(episode.start))
            body, prompt = episode.embodiment, episode.prompt
            self.expect(body < bodies, f"{name}.embodiment", f"0..{bodies - 1}", shown(body))
            self.expect(prompt < prompts, f"{name}.prompt", f"-1..{prompts - 1}", shown(prompt))
            self.expect(
                episode.track_start == actions and (episode.track_length >= 1) == self.has_track,
                name,
                f"{actions} and {'at least 1' if self.has_track else 0}",
                f"track_start {episode.track_start}, track_length {episode.track_length}",
            )
            stop, actions = episode.stop, actions + episode.track_length

    @property
    def has_track(self) -> bool:
        """Whether there is a track of executed actions: in all episodes or in none."""
        return bool(self.episodes) and self.episodes[0].track_length > 0

    @property
    def format(self) -> str:
        return TRACK_FORMAT if self.has_track else FORMAT

    @property
    def num_frames(self) -> int:
        return self.episodes[-1].stop if self.episodes else 0

    def shapes(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Array name -> (shape, dtype)."""
        n, f32 = self.num_frames, np.dtype(np.float32)
        shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {
            "images": ((n, len(self.cameras), *self.image_size, 3), np.dtype(np.uint8)),
            "states": ((n, self.state_dim), f32),
            "actions": ((n, self.action_dim), f32),
            "stamps": ((n,), np.dtype(np.int64)),
        }
        if self.has_track:
            count = sum(episode.track_length for episode in self.episodes)
            shapes["track"] = ((count, self.action_dim), f32)
            shapes["track_stamps"] = ((count,), np.dtype(np.int64))
        if self.chunk_horizon is not None:
            shapes["expert_chunks"] = ((n, len(self.prompts), self.chunk_horizon, self.action_dim), f32)
        return shapes

    def to_dict(self) -> dict[str, Any]:
        values = {"format": self.format, **plain(self)}
        if not self.has_track:
            for episode in values["episodes"]:
                del episode["track_start"], episode["track_length"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DatasetMeta:
        """Raises ``DatasetError`` naming the key."""
        meta = read(cls, values, formats=(FORMAT, TRACK_FORMAT))
        if meta.format != values["format"]:
            raise DatasetError(f"format: found {values['format']!r}, expected {meta.format!r} (by its episodes)")
        return meta
