"""The dataset on disk: frames at the control rate with the actions executed between them, memory-mapped.

A directory holds ``meta.json``, ``images.npy`` (N, cameras, H, W, 3) uint8 RGB, ``states.npy`` (N, S) float32,
``actions.npy`` (N, A) float32 (the action in force from frame i to i+1), ``stamps.npy`` (N,) int64 nanoseconds,
``norm_stats.json`` and, where an expert was asked at every frame, ``expert_chunks.npy`` (N, prompts, horizon, A)
float32, NaN where there is none. Rows of an episode are consecutive. A directory that exists is complete: the writer
works in a hidden directory beside it and renames that one when everything is on the disk.

Must not know ROS, the model or torch, nor where the frames come from.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.lib import format as npy

from selfalign_core.data.partial import DatasetError, PartialDirectory
from selfalign_core.errors import SelfAlignError
from selfalign_core.transforms import NormStats, load_norm_stats, save_norm_stats

FORMAT = "selfalign-dataset-1"
DEFAULT_STATISTICS_HORIZON = 16  # actions per chunk over which action statistics are taken unless said otherwise
PLAY = -1  # prompt of an episode that pursued no goal

_ROWS_PER_BLOCK = 2048
_QUANTILE_ROWS = 1_000_000  # above this many rows, quantiles are those of a random million


@dataclass(frozen=True)
class Episode:
    """Consecutive rows recorded without a gap. ``prompt`` is an index into the prompts; ``PLAY`` (-1) is none."""

    start: int
    length: int
    embodiment: int
    prompt: int

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
            _expect(getattr(self, name) >= 1, f"{name}: found {getattr(self, name)}, expected >= 1")
        _expect(len(self.cameras) >= 1, "cameras: found none, expected at least one")
        for name in ("cameras", "prompts", "embodiments"):
            values = getattr(self, name)
            _expect(len(set(values)) == len(values), f"{name}: found {list(values)}, expected each once")
        _expect(all(self.prompts), f"prompts: found an empty one in {list(self.prompts)}, expected text")
        _expect(len(self.image_size) == 2 and min(self.image_size) >= 1, f"image_size: found {self.image_size}")
        _expect(
            len(self.delta_mask) == self.action_dim,
            f"delta_mask: found {len(self.delta_mask)} values, expected action_dim={self.action_dim}",
        )
        _expect(
            not any(self.delta_mask) or self.state_dim == self.action_dim,
            f"delta_mask: found delta actions with state_dim={self.state_dim} and action_dim={self.action_dim}, "
            "expected them equal",
        )
        stop = 0
        for i, episode in enumerate(self.episodes):
            name = f"episodes[{i}]"
            _expect(episode.start == stop, f"{name}.start: found {episode.start}, expected {stop} (no gaps)")
            _expect(episode.length >= 1, f"{name}.length: found {episode.length}, expected >= 1")
            _expect(
                0 <= episode.embodiment < len(self.embodiments),
                f"{name}.embodiment: found {episode.embodiment}, expected 0..{len(self.embodiments) - 1}",
            )
            _expect(
                PLAY <= episode.prompt < len(self.prompts),
                f"{name}.prompt: found {episode.prompt}, expected -1..{len(self.prompts) - 1}",
            )
            stop = episode.stop

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
        if self.chunk_horizon is not None:
            shapes["expert_chunks"] = ((n, len(self.prompts), self.chunk_horizon, self.action_dim), f32)
        return shapes

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DatasetMeta:
        """Raises ``DatasetError`` naming the key."""
        if values.get("format") != FORMAT:
            raise DatasetError(f"format: found {values.get('format')!r}, expected {FORMAT!r}")
        required = ("cameras", "image_size", "state_dim", "action_dim", "dt_ns", "prompts", "embodiments", "episodes")
        if missing := [key for key in required if key not in values]:
            raise DatasetError(f"found no {', '.join(missing)}, expected all of {', '.join(required)}")
        try:
            return cls(
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


class TransitionDataset:
    """A dataset directory, opened for reading; nothing is loaded until it is indexed.

    ``images``, ``states``, ``actions``, ``stamps`` and ``expert_chunks`` (or None) are read-only memory maps with the
    shapes of the module docstring; ``episode_of`` (N,) int64 is the episode of every frame.

    Raises:
        DatasetError: not a dataset, another format, shapes that do not agree, or numbers that are not finite.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file = self.path / "meta.json"
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise DatasetError(f"{file}: found no such file, expected a dataset directory") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DatasetError(f"{file}: found invalid JSON ({error})") from None
        try:
            self.meta = DatasetMeta.from_dict(values)
        except DatasetError as error:
            raise DatasetError(f"{file}: {error}") from None
        arrays = {name: self._array(name, *expected) for name, expected in self.meta.shapes().items()}
        self.images: np.ndarray = arrays["images"]
        self.states: np.ndarray = arrays["states"]
        self.actions: np.ndarray = arrays["actions"]
        self.stamps: np.ndarray = arrays["stamps"]
        self.expert_chunks: np.ndarray | None = arrays.get("expert_chunks")
        lengths = [episode.length for episode in self.meta.episodes]
        self.episode_of = np.repeat(np.arange(len(lengths)), lengths)
        for name in ("states", "actions"):
            self._check_finite(name, arrays[name])
        self.norm_stats: dict[str, NormStats] = load_norm_stats(self.path / "norm_stats.json")

    def __len__(self) -> int:
        """Frames."""
        return self.meta.num_frames

    @property
    def embodiment_of(self) -> np.ndarray:
        """Index into the embodiments of every episode, (episodes,) int64."""
        return np.array([episode.embodiment for episode in self.meta.episodes], np.int64)

    @property
    def prompt_of(self) -> np.ndarray:
        """Index into the prompts of every episode, -1 where there is none, (episodes,) int64."""
        return np.array([episode.prompt for episode in self.meta.episodes], np.int64)

    def starts(
        self, horizon: int, *, episodes: Sequence[int] | np.ndarray | None = None, tails: bool = False
    ) -> np.ndarray:
        """Rows i from which a transition of ``horizon`` actions fits into the episode (i + horizon < its end).

        ``tails`` adds the rows after them. Returns rising int64 rows of ``episodes`` (all unless given).
        """
        cut = 0 if tails else horizon
        chosen = range(len(self.meta.episodes)) if episodes is None else sorted(set(map(int, episodes)))
        rows = [
            np.arange(self.meta.episodes[i].start, max(self.meta.episodes[i].stop - cut, self.meta.episodes[i].start))
            for i in chosen
        ]
        return np.concatenate([np.zeros(0, np.int64), *rows])

    def split(
        self, holdout: float, *, by: Literal["episode", "embodiment"], seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Episodes to train on and episodes held out, as sorted int64 arrays.

        ``holdout`` is the fraction of episodes, or of embodiments with all of their episodes, that is held out; at
        least one whenever it is above 0.
        """
        if not 0.0 <= holdout < 1.0:
            raise DatasetError(f"holdout: found {holdout}, expected a fraction in [0, 1)")
        group_of = self.embodiment_of if by == "embodiment" else np.arange(len(self.meta.episodes))
        groups = np.unique(group_of)
        count = max(1, round(holdout * len(groups))) if holdout > 0 else 0
        if count >= len(groups):
            raise DatasetError(f"{self.path}: found {len(groups)} {by}(s), expected more than the {count} held out")
        held = np.random.default_rng([seed, len(groups)]).permutation(groups)[:count]
        is_held = np.isin(group_of, held)
        return np.flatnonzero(~is_held), np.flatnonzero(is_held)

    def _array(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        file = self.path / f"{name}.npy"
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise DatasetError(f"{file}: found no such file, expected {shape} {dtype}") from None
        except (ValueError, OSError, EOFError) as error:
            raise DatasetError(f"{file}: found an unreadable array ({error}), expected {shape} {dtype}") from None
        if array.shape != shape or array.dtype != dtype:
            raise DatasetError(f"{file}: found {array.shape} {array.dtype}, expected {shape} {dtype} (meta.json)")
        return array

    def _check_finite(self, name: str, array: np.ndarray) -> None:
        for begin in range(0, len(array), _ROWS_PER_BLOCK):
            bad = ~np.isfinite(array[begin : begin + _ROWS_PER_BLOCK]).all(axis=1)
            if bad.any():
                row = begin + int(np.argmax(bad))
                episode = int(self.episode_of[row])
                frame = row - self.meta.episodes[episode].start
                raise DatasetError(
                    f"{self.path / name}.npy: episode {episode}, frame {frame}: found {array[row].tolist()}, "
                    "expected finite numbers"
                )


class DatasetWriter:
    """Writes a dataset directory; use as a context manager.

    Nothing appears at ``path`` until the ``with`` block ends without an exception; on an exception everything is
    removed. What a killed writer left behind (hidden, beside ``path``) is removed by the next one. Memory use does
    not grow with the number of frames beyond their state, action and stamp.

    Args:
        path: the directory to make; must not exist.
        cameras, image_size (H, W), state_dim, action_dim, dt_ns: as in :class:`DatasetMeta`.
        prompts: known prompts. More are added as episodes name them, unless ``chunk_horizon`` fixes their number.
        chunk_horizon: actions per expert chunk; None: no expert chunks.
        delta_mask: None: every dimension is relative to the state if there are as many states as actions.
        statistics_horizon: None: ``chunk_horizon``, or 16.

    Raises:
        DatasetError: on bad values, naming episode and frame. Nothing of that episode is written then.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        cameras: Sequence[str],
        image_size: tuple[int, int],
        state_dim: int,
        action_dim: int,
        dt_ns: int,
        prompts: Sequence[str] = (),
        chunk_horizon: int | None = None,
        delta_mask: Sequence[bool] | None = None,
        statistics_horizon: int | None = None,
        joint_names: Sequence[str] = (),
    ) -> None:
        self.path = Path(path)
        if delta_mask is None:
            delta_mask = (state_dim == action_dim,) * action_dim
        self._meta = DatasetMeta(
            cameras=tuple(cameras),
            image_size=tuple(image_size),
            state_dim=state_dim,
            action_dim=action_dim,
            dt_ns=dt_ns,
            prompts=tuple(prompts),
            embodiments=(),
            episodes=(),
            delta_mask=tuple(bool(v) for v in delta_mask),
            statistics_horizon=statistics_horizon or chunk_horizon or DEFAULT_STATISTICS_HORIZON,
            chunk_horizon=chunk_horizon,
            joint_names=tuple(joint_names),
        )
        if chunk_horizon is not None and not prompts:
            raise DatasetError("prompts: found none, expected those of the expert chunks (chunk_horizon is given)")
        self.counters: dict[str, int] = {}
        self.sources: list[dict[str, Any]] = []
        self._prompts, self._embodiments = list(prompts), []
        self._episodes: list[Episode] = []
        self._written = bytearray()  # one byte per image: 1 once it is on the disk
        self._arrays: dict[str, _GrowingArray] = {}
        self._partial = PartialDirectory(self.path)

    @property
    def num_frames(self) -> int:
        return self._episodes[-1].stop if self._episodes else 0

    def __enter__(self) -> DatasetWriter:
        self._partial.open()
        for name, (shape, dtype) in self._meta.shapes().items():
            self._arrays[name] = _GrowingArray(self._partial.path / f"{name}.npy", shape[1:], dtype)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for array in self._arrays.values():
                array.close()
            self._partial.remove()  # nothing left to remove once it has been renamed

    def add_episode(
        self,
        *,
        states: np.ndarray,
        actions: np.ndarray,
        stamps: np.ndarray,
        embodiment: str,
        prompt: str | None = None,
        images: np.ndarray | None = None,
        expert_chunks: np.ndarray | None = None,
    ) -> int:
        """Append an episode of n frames and return its first row.

        Args:
            states: (n, state_dim). actions: (n, action_dim). stamps: (n,) rising nanoseconds.
            embodiment: key of the body that moved. prompt: what it was told; None for play.
            images: (n, cameras, H, W, 3) uint8; None if they follow by :meth:`write_image`.
            expert_chunks: (n, prompts, chunk_horizon, action_dim), a NaN chunk where there is none; None: none at all.
        """
        where = f"episode {len(self._episodes)}"
        states = _checked(f"{where}: states", states, np.float32, (None, self._meta.state_dim))
        n = len(states)
        actions = _checked(f"{where}: actions", actions, np.float32, (n, self._meta.action_dim))
        stamps = _checked(f"{where}: stamps", stamps, np.int64, (n,))
        _expect(n >= 1, f"{where}: found no frames, expected at least one")
        for name, values in (("states", states), ("actions", actions)):
            bad = ~np.isfinite(values).all(axis=1)
            if bad.any():
                frame = int(np.argmax(bad))
                raise DatasetError(
                    f"{where}, frame {frame}: {name}: found {values[frame].tolist()}, expected finite numbers"
                )
        falling = np.flatnonzero(np.diff(stamps) <= 0)
        if len(falling):
            frame = int(falling[0]) + 1
            raise DatasetError(
                f"{where}, frame {frame}: stamps: found {stamps[frame]} after {stamps[frame - 1]}, expected later ones"
            )
        images_shape = (n, len(self._meta.cameras), *self._meta.image_size, 3)
        if images is not None:
            images = _checked_exactly(f"{where}: images", images, np.uint8, images_shape)
        if self._meta.chunk_horizon is None:
            _expect(expert_chunks is None, f"{where}: expert_chunks: found some, expected none (no chunk_horizon)")
        else:
            shape = (n, len(self._prompts), self._meta.chunk_horizon, self._meta.action_dim)
            if expert_chunks is None:
                expert_chunks = np.full(shape, np.nan, np.float32)
            expert_chunks = _checked(f"{where}: expert_chunks", expert_chunks, np.float32, shape)
            _check_chunks(where, expert_chunks)
        prompt_index = PLAY if prompt is None else self._index_of_prompt(where, prompt)
        if embodiment not in self._embodiments:
            self._embodiments.append(embodiment)

        start = self.num_frames
        self._arrays["states"].append(states)
        self._arrays["actions"].append(actions)
        self._arrays["stamps"].append(stamps)
        if expert_chunks is not None:
            self._arrays["expert_chunks"].append(expert_chunks)
        if images is None:
            self._arrays["images"].extend(n)
        else:
            self._arrays["images"].append(images)
        self._written += bytes([images is not None]) * (n * len(self._meta.cameras))
        self._episodes.append(Episode(start, n, self._embodiments.index(embodiment), prompt_index))
        return start

    def write_image(self, row: int, camera: int, image: np.ndarray) -> None:
        """Write one (H, W, 3) uint8 image of a frame added before; ``camera`` is an index into the cameras."""
        image = _checked_exactly(f"frame {row}: image", image, np.uint8, (*self._meta.image_size, 3))
        if not (0 <= row < self.num_frames and 0 <= camera < len(self._meta.cameras)):
            raise DatasetError(f"frame {row}, camera {camera}: expected one of {self.num_frames} frames added before")
        position = row * len(self._meta.cameras) + camera
        self._arrays["images"].write(position * image.nbytes, image)
        self._written[position] = 1

    def _index_of_prompt(self, where: str, prompt: str) -> int:
        _expect(bool(prompt), f"{where}: prompt: found an empty one, expected text, or None for play")
        if prompt not in self._prompts:
            if self._meta.chunk_horizon is not None:
                raise DatasetError(f"{where}: prompt: found {prompt!r}, expected one of {self._prompts}")
            self._prompts.append(prompt)
        return self._prompts.index(prompt)

    def _finish(self) -> None:
        if not self._episodes:
            raise DatasetError(f"{self.path}: found no frames, expected at least one episode")
        missing = self._written.find(0)
        if missing >= 0:
            row, camera = divmod(missing, len(self._meta.cameras))
            raise DatasetError(f"frame {row}, camera {self._meta.cameras[camera]!r}: found no image, expected one")
        for array in self._arrays.values():
            array.finish()
        values = self._meta.to_dict() | {
            "prompts": self._prompts,
            "embodiments": self._embodiments,
            "episodes": [asdict(episode) for episode in self._episodes],
            "counters": self.counters,
            "sources": self.sources,
        }
        meta = DatasetMeta.from_dict(values)
        arrays = {name: np.load(self._partial.path / f"{name}.npy", mmap_mode="r") for name in self._arrays}
        stats = norm_stats_of(
            arrays["states"],
            arrays["actions"],
            arrays.get("expert_chunks"),
            meta.episodes,
            horizon=meta.statistics_horizon,
            delta_mask=np.array(meta.delta_mask),
        )
        save_norm_stats(self._partial.path / "norm_stats.json", stats)
        (self._partial.path / "meta.json").write_text(json.dumps(meta.to_dict(), indent=1), encoding="utf-8")
        self._partial.publish()


def norm_stats_of(
    states: np.ndarray,
    actions: np.ndarray,
    expert_chunks: np.ndarray | None,
    episodes: Sequence[Episode],
    *,
    horizon: int,
    delta_mask: np.ndarray,
) -> dict[str, NormStats]:
    """Statistics of ``state`` and of ``actions`` over chunks of ``horizon``, delta dimensions relative to the state.

    Chunks are the recorded actions from every frame on, to the end of its episode, and the expert's. ``delta_mask``
    (A,) bool. Exact, but for the quantiles of more than a million rows, which are those of a random million of them.
    """

    def chunks() -> Iterator[np.ndarray]:
        offsets = np.arange(horizon)
        for episode in episodes:
            for begin in range(episode.start, episode.stop, _ROWS_PER_BLOCK):
                rows = np.arange(begin, min(begin + _ROWS_PER_BLOCK, episode.stop))
                steps = rows[:, None] + offsets
                inside = steps < episode.stop
                relative = actions[np.where(inside, steps, 0)] - np.where(delta_mask, _of(states, rows), 0)[:, None]
                yield relative[inside]
        if expert_chunks is not None:
            for begin in range(0, len(expert_chunks), _ROWS_PER_BLOCK):
                rows = np.arange(begin, min(begin + _ROWS_PER_BLOCK, len(expert_chunks)))
                block = expert_chunks[begin : begin + _ROWS_PER_BLOCK]
                block = block - np.where(delta_mask, _of(states, rows), 0)[:, None, None]
                yield block[np.isfinite(block[:, :, 0, 0])].reshape(-1, block.shape[-1])

    def blocks() -> Iterator[np.ndarray]:
        for begin in range(0, len(states), _ROWS_PER_BLOCK):
            yield states[begin : begin + _ROWS_PER_BLOCK]

    def _of(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
        # Without delta dimensions, states and actions may differ in length.
        return array[rows] if delta_mask.any() else np.zeros((len(rows), len(delta_mask)), np.float32)

    expected = len(actions) * horizon
    if expert_chunks is not None:
        expected += int(np.prod(expert_chunks.shape[:3]))
    return {"state": _stats_of(blocks(), len(states)), "actions": _stats_of(chunks(), expected)}


def merge(sources: Sequence[TransitionDataset], output: str | Path) -> None:
    """Copy several datasets into a new one. Cameras, sizes, rate and horizons have to agree; keys are united.

    Raises:
        DatasetError: naming the dataset and the field that differs.
    """
    first = sources[0].meta
    same = ("cameras", "image_size", "state_dim", "action_dim", "dt_ns", "delta_mask", "chunk_horizon", "joint_names")
    for source in sources[1:]:
        for name in same:
            found, expected = getattr(source.meta, name), getattr(first, name)
            if found != expected:
                raise DatasetError(
                    f"{source.path}: {name}: found {found}, expected {expected} ({sources[0].path}); "
                    "only datasets that agree can be merged"
                )
    prompts = list(dict.fromkeys(prompt for source in sources for prompt in source.meta.prompts))
    with DatasetWriter(
        output,
        cameras=first.cameras,
        image_size=first.image_size,
        state_dim=first.state_dim,
        action_dim=first.action_dim,
        dt_ns=first.dt_ns,
        prompts=prompts,
        chunk_horizon=first.chunk_horizon,
        delta_mask=first.delta_mask,
        statistics_horizon=first.statistics_horizon,
        joint_names=first.joint_names,
    ) as writer:
        for source in sources:
            for name, count in source.meta.counters.items():
                writer.counters[name] = writer.counters.get(name, 0) + count
            writer.sources += [dict(entry) for entry in source.meta.sources]
            column_of = [prompts.index(prompt) for prompt in source.meta.prompts]
            for episode in source.meta.episodes:
                rows = slice(episode.start, episode.stop)
                chunks = None
                if source.expert_chunks is not None:
                    shape = (episode.length, len(prompts), first.chunk_horizon, first.action_dim)
                    chunks = np.full(shape, np.nan, np.float32)
                    chunks[:, column_of] = source.expert_chunks[rows]
                writer.add_episode(
                    states=source.states[rows],
                    actions=source.actions[rows],
                    stamps=source.stamps[rows],
                    embodiment=source.meta.embodiments[episode.embodiment],
                    prompt=None if episode.prompt == PLAY else source.meta.prompts[episode.prompt],
                    images=source.images[rows],
                    expert_chunks=chunks,
                )


# --- writing ---


class _GrowingArray:
    """A .npy file whose first dimension is known only in the end."""

    def __init__(self, path: Path, row_shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._row_shape, self._dtype = row_shape, dtype
        self._row_bytes = int(np.prod(row_shape, dtype=np.int64)) * dtype.itemsize
        self._rows = 0
        self._file = path.open("w+b")
        self._write_header()
        self._data_start = self._file.tell()

    def append(self, values: np.ndarray) -> None:
        self.write(self._rows * self._row_bytes, np.ascontiguousarray(values, self._dtype))
        self._rows += len(values)

    def extend(self, rows: int) -> None:
        """Rows that are zero until they are written."""
        self._rows += rows
        self._file.truncate(self._data_start + self._rows * self._row_bytes)

    def write(self, offset: int, values: np.ndarray) -> None:
        self._file.seek(self._data_start + offset)
        self._file.write(np.ascontiguousarray(values).data)

    def finish(self) -> None:
        self._file.seek(0)
        self._write_header()
        if self._file.tell() != self._data_start:
            raise DatasetError(f"{self._file.name}: the header grew over the data, expected numpy to reserve room")
        self._file.flush()  # a full disk is reported here
        self.close()

    def close(self) -> None:
        # An error here would hide the one that made the writer give up; finish() reports its own.
        with contextlib.suppress(OSError):
            if not self._file.closed:
                self._file.close()

    def _write_header(self) -> None:
        # numpy pads the header so that the first dimension may grow to any number of digits.
        shape = (self._rows, *self._row_shape)
        header = {"descr": npy.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(self._file, header)


# --- checking and counting ---


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise DatasetError(message)


def _checked(name: str, values: np.ndarray, dtype: type, shape: tuple[int | None, ...]) -> np.ndarray:
    array = np.asarray(values)
    fits = array.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape, strict=True))
    if not fits or not np.can_cast(array.dtype, dtype, casting="same_kind"):
        wanted = tuple("n" if size is None else size for size in shape)
        raise DatasetError(f"{name}: found {array.shape} {array.dtype}, expected {wanted} {np.dtype(dtype)}")
    return array.astype(dtype, copy=False)


def _checked_exactly(name: str, values: np.ndarray, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(values)
    if array.shape != shape or array.dtype != dtype:
        raise DatasetError(f"{name}: found {array.shape} {array.dtype}, expected {shape} {np.dtype(dtype)}")
    return array


def _check_chunks(where: str, chunks: np.ndarray) -> None:
    finite = np.isfinite(chunks).all(axis=(2, 3))
    mixed = ~finite & ~np.isnan(chunks).all(axis=(2, 3))
    if mixed.any():
        frame, prompt = (int(v) for v in np.argwhere(mixed)[0])
        raise DatasetError(
            f"{where}, frame {frame}: expert_chunks: found a chunk for prompt {prompt} that is partly NaN or infinite, "
            "expected finite numbers, or NaN throughout for none"
        )


def _stats_of(blocks: Iterator[np.ndarray], expected_rows: int) -> NormStats:
    """Statistics of rows that come in blocks of (n, dim)."""
    share = min(1.0, _QUANTILE_ROWS / max(expected_rows, 1))
    rng = np.random.default_rng(0)
    count, kept = 0, []
    for block in blocks:
        if not len(block):
            continue
        block = np.asarray(block, np.float64)
        if count == 0:
            origin = block[0]  # keeps the sum of squares small, hence exact
            total, squares = np.zeros_like(origin), np.zeros_like(origin)
            low, high = origin, origin
        centred = block - origin
        total, squares = total + centred.sum(0), squares + np.square(centred).sum(0)
        low, high = np.minimum(low, block.min(0)), np.maximum(high, block.max(0))
        count += len(block)
        kept.append((block if share == 1.0 else block[rng.random(len(block)) < share]).astype(np.float32))
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - np.square(mean), 0.0))
    sample = np.concatenate(kept)
    if not len(sample):
        sample = np.stack([low, high])
    q01, q99 = np.quantile(sample, [0.01, 0.99], axis=0)
    return NormStats(origin + mean, std, q01, q99, low, high)


# --- command line ---


def image_size_argument(numbers: Sequence[int]) -> tuple[int, int]:
    """(height, width) of a command line that gives both, or one number for both."""
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise DatasetError(f"--image-size: found {list(numbers)}, expected one or two positive numbers")
    return numbers[0], numbers[-1]


def run_command(work: Callable[[], None]) -> int:
    """Run what a command does; its exit code. What a user can mend is printed without a traceback."""
    try:
        work()
    except (SelfAlignError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


def describe(dataset: TransitionDataset) -> str:
    """A few lines on what a dataset holds."""
    meta = dataset.meta
    seconds = len(dataset) * meta.dt_ns / 1e9
    play = sum(episode.length for episode in meta.episodes if episode.prompt == PLAY)
    lines = [
        f"{dataset.path}: {len(dataset)} frames ({seconds:.1f} s at {1e9 / meta.dt_ns:g} Hz) in "
        f"{len(meta.episodes)} episodes, {play} of them play",
        f"  cameras {', '.join(meta.cameras)} at {meta.image_size[0]}x{meta.image_size[1]}; "
        f"state {meta.state_dim}, action {meta.action_dim}",
        f"  {len(meta.embodiments)} embodiment(s), {len(meta.prompts)} prompt(s), expert chunks: "
        f"{meta.chunk_horizon or 'none'}",
    ]
    lines += [f"  {name}: {count}" for name, count in sorted(meta.counters.items())]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    program = "python -m selfalign_core.data.dataset"
    parser = argparse.ArgumentParser(prog=program, description="Look at datasets or join them.")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="what a dataset holds")
    info.add_argument("datasets", nargs="+", type=Path)
    join = commands.add_parser("merge", help="copy several datasets into a new one")
    join.add_argument("datasets", nargs="+", type=Path)
    join.add_argument("--output", required=True, type=Path)
    options = parser.parse_args(arguments)

    def work() -> None:
        datasets = [TransitionDataset(path) for path in options.datasets]
        if options.command == "merge":
            merge(datasets, options.output)
            datasets = [TransitionDataset(options.output)]
        for dataset in datasets:
            print(describe(dataset))

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
