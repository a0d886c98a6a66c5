"""What ``meta.json`` of a dataset says: episodes, embodiments, prompts, and the shape of every array.

The directory itself is described in ``selfalign_core.data.dataset``. Must not know ROS, the model or torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from selfalign_core.data.partial import DatasetError

FORMAT = "selfalign-dataset-1"
TRACK_FORMAT = "selfalign-dataset-2"  # of a dataset with a track of executed actions
DEFAULT_STATISTICS_HORIZON = 16  # actions per chunk over which action statistics are taken unless said otherwise
PLAY = -1  # prompt of an episode that pursued no goal


@dataclass(frozen=True)
class Episode:
    """Consecutive rows. ``prompt`` is an index into the prompts; ``PLAY`` (-1) is none.

    Their executed actions are ``track_length`` rows of the track from ``track_start`` on; 0 in a dataset without one,
    whose rows are one control step apart and have an action each.
    """

    start: int
    length: int
    embodiment: int
    prompt: int
    track_start: int = 0
    track_length: int = 0

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class DatasetMeta:
    """``meta.json``. Raises ``DatasetError`` when the fields contradict each other.

    ``delta_mask``: per action dimension, True if action statistics are of ``action - state`` of the chunk's first
    frame. ``statistics_horizon``: actions per chunk these statistics are over. ``counters``: frames left out and why.
    """

    cameras: tuple[str, ...]
    image_size: tuple[int, int]
    state_dim: int
    action_dim: int
    dt_ns: int
    prompts: tuple[str, ...]
    embodiments: tuple[str, ...]
    episodes: tuple[Episode, ...]
    delta_mask: tuple[bool, ...]
    statistics_horizon: int
    chunk_horizon: int | None = None
    joint_names: tuple[str, ...] = ()
    counters: Mapping[str, int] = field(default_factory=dict)
    sources: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for name in ("state_dim", "action_dim", "dt_ns", "statistics_horizon"):
            expect(getattr(self, name) >= 1, f"{name}: found {getattr(self, name)}, expected >= 1")
        expect(len(self.cameras) >= 1, "cameras: found none, expected at least one")
        for name in ("cameras", "prompts", "embodiments"):
            values = getattr(self, name)
            expect(len(set(values)) == len(values), f"{name}: found {list(values)}, expected each once")
        expect(all(self.prompts), f"prompts: found an empty one in {list(self.prompts)}, expected text")
        expect(len(self.image_size) == 2 and min(self.image_size) >= 1, f"image_size: found {self.image_size}")
        expect(
            len(self.delta_mask) == self.action_dim,
            f"delta_mask: found {len(self.delta_mask)} values, expected action_dim={self.action_dim}",
        )
        expect(
            not any(self.delta_mask) or self.state_dim == self.action_dim,
            f"delta_mask: found delta actions with state_dim={self.state_dim} and action_dim={self.action_dim}, "
            "expected them equal",
        )
        stop = actions = 0
        for i, episode in enumerate(self.episodes):
            name = f"episodes[{i}]"
            expect(episode.start == stop, f"{name}.start: found {episode.start}, expected {stop} (no gaps)")
            expect(episode.length >= 1, f"{name}.length: found {episode.length}, expected >= 1")
            expect(
                0 <= episode.embodiment < len(self.embodiments),
                f"{name}.embodiment: found {episode.embodiment}, expected 0..{len(self.embodiments) - 1}",
            )
            expect(
                PLAY <= episode.prompt < len(self.prompts),
                f"{name}.prompt: found {episode.prompt}, expected -1..{len(self.prompts) - 1}",
            )
            expect(
                episode.track_start == actions and (episode.track_length >= 1) == self.has_track,
                f"{name}: found track_start {episode.track_start}, track_length {episode.track_length}, expected "
                f"{actions} and {'at least 1' if self.has_track else 0}",
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
        shapes = {
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
        values = {"format": self.format, **asdict(self)}
        if not self.has_track:
            for episode in values["episodes"]:
                del episode["track_start"], episode["track_length"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DatasetMeta:
        """Raises ``DatasetError`` naming the key."""
        if values.get("format") not in (FORMAT, TRACK_FORMAT):
            raise DatasetError(f"format: found {values.get('format')!r}, expected {FORMAT!r} or {TRACK_FORMAT!r}")
        required = ("cameras", "image_size", "state_dim", "action_dim", "dt_ns", "prompts", "embodiments", "episodes")
        if missing := [key for key in required if key not in values]:
            raise DatasetError(f"found no {', '.join(missing)}, expected all of {', '.join(required)}")
        try:
            meta = cls(
                cameras=tuple(values["cameras"]),
                image_size=tuple(values["image_size"]),
                state_dim=values["state_dim"],
                action_dim=values["action_dim"],
                dt_ns=values["dt_ns"],
                prompts=tuple(values["prompts"]),
                embodiments=tuple(values["embodiments"]),
                episodes=tuple(Episode(**episode) for episode in values["episodes"]),
                delta_mask=tuple(values.get("delta_mask") or (False,) * values["action_dim"]),
                statistics_horizon=values.get("statistics_horizon", DEFAULT_STATISTICS_HORIZON),
                chunk_horizon=values.get("chunk_horizon"),
                joint_names=tuple(values.get("joint_names", ())),
                counters=dict(values.get("counters", {})),
                sources=tuple(values.get("sources", ())),
            )
        except TypeError as error:
            raise DatasetError(f"found values of the wrong type ({error})") from error
        if meta.has_track != (values["format"] == TRACK_FORMAT):
            raise DatasetError(f"format: found {values['format']!r}, expected {meta.format!r} (by its episodes)")
        return meta


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise DatasetError(message)
