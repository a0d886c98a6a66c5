"""Writes the dataset directory that ``selfalign_core.data.dataset`` describes and reads.

It works in a hidden directory beside the target and renames that one when everything is on the disk, so a directory
that exists is complete. Must not know ROS, the model or torch, nor where the frames come from.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from selfalign_core.data.dataset_meta import DEFAULT_STATISTICS_HORIZON, PLAY, DatasetMeta, Episode
from selfalign_core.data.statistics import norm_stats_of
from selfalign_core.data.timeline import Timeline, Track
from selfalign_core.errors import DatasetError
from selfalign_core.files import PartialDirectory
from selfalign_core.policy.statistics_files import save_norm_stats
from selfalign_core.robot.frames import Pairing


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
        DatasetError: on bad values, naming episode and frame (nothing of that episode is written then), or on a full
            disk, naming the file.
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
            image_size=image_size,
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
        self._prompts = list(prompts)
        self._embodiments: list[str] = []
        self._episodes: list[Episode] = []
        self._written = bytearray()  # one byte per image: 1 once it is on the disk
        self._arrays: dict[str, _GrowingArray] = {}
        self._partial = PartialDirectory(self.path)

    @classmethod
    def like(cls, path: str | Path, meta: DatasetMeta, prompts: Sequence[str] | None = None) -> DatasetWriter:
        """For what was recorded as ``meta`` says, with its prompts or others."""
        names = ("cameras", "image_size", "state_dim", "action_dim", "dt_ns", "chunk_horizon", "delta_mask")
        more = ("statistics_horizon", "joint_names")
        same = {name: getattr(meta, name) for name in (*names, *more)}
        return cls(path, prompts=meta.prompts if prompts is None else prompts, **same)

    @property
    def num_frames(self) -> int:
        return self._episodes[-1].stop if self._episodes else 0

    def __enter__(self) -> DatasetWriter:
        self._partial.open()
        for name, (shape, dtype) in self._meta.shapes().items():
            self._open(name, shape[1:], dtype)
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
        stamps: np.ndarray,
        embodiment: str,
        actions: np.ndarray | None = None,
        track: Track | None = None,
        prompt: str | None = None,
        images: np.ndarray | None = None,
        expert_chunks: np.ndarray | None = None,
    ) -> int:
        """Append an episode of n frames and return its first row.

        Args:
            states: (n, state_dim). stamps: (n,) rising nanoseconds.
            actions: (n, action_dim), of frames that are one control step apart.
            track: what was executed, in place of ``actions``, of frames that need not be; in all episodes or in none.
            embodiment: key of the body that moved. prompt: what it was told; None for play.
            images: (n, cameras, H, W, 3) uint8; None if they follow by :meth:`write_image`.
            expert_chunks: (n, prompts, chunk_horizon, action_dim), a NaN chunk where there is none; None: none at all.
        """
        where = f"episode {len(self._episodes)}"
        states = _checked(f"{where}: states", states, np.float32, (None, self._meta.state_dim))
        n = len(states)
        stamps = _checked(f"{where}: stamps", stamps, np.int64, (n,))
        expect(n >= 1, f"{where}: found no frames, expected at least one")
        _check_finite(f"{where}, frame", "states", states)
        _check_rising(f"{where}, frame", "stamps", stamps)
        if track is not None:
            expect(actions is None, f"{where}: actions: found some beside a track, expected one of the two")
            track = self._checked_track(where, track)
            actions = _actions_at(stamps, track, self._meta.dt_ns)
            expect(np.isfinite(actions).any(), f"{where}: track: found no action in force at any frame, expected some")
        else:
            self._expect_track(where, False)
            if actions is None:
                raise DatasetError(f"{where}: found neither actions nor a track, expected one of the two")
            actions = _checked(f"{where}: actions", actions, np.float32, (n, self._meta.action_dim))
            _check_finite(f"{where}, frame", "actions", actions)
        images_shape = (n, len(self._meta.cameras), *self._meta.image_size, 3)
        if images is not None:
            images = _checked_exactly(f"{where}: images", images, np.uint8, images_shape)
        if self._meta.chunk_horizon is None:
            expect(expert_chunks is None, f"{where}: expert_chunks: found some, expected none (no chunk_horizon)")
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
        part = (0, 0) if track is None else self._append_track(track)
        if expert_chunks is not None:
            self._arrays["expert_chunks"].append(expert_chunks)
        if images is None:
            self._arrays["images"].extend(n)
        else:
            self._arrays["images"].append(images)
        self._written += bytes([images is not None]) * (n * len(self._meta.cameras))
        self._episodes.append(Episode(start, n, self._embodiments.index(embodiment), prompt_index, *part))
        return start

    def write_image(self, row: int, camera: int, image: np.ndarray) -> None:
        """Write one (H, W, 3) uint8 image of a frame added before; ``camera`` is an index into the cameras."""
        image = _checked_exactly(f"frame {row}: image", image, np.uint8, (*self._meta.image_size, 3))
        if not (0 <= row < self.num_frames and 0 <= camera < len(self._meta.cameras)):
            raise DatasetError(f"frame {row}, camera {camera}: expected one of {self.num_frames} frames added before")
        position = row * len(self._meta.cameras) + camera
        self._arrays["images"].write(position * image.nbytes, image)
        self._written[position] = 1

    def _open(self, name: str, row_shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._arrays[name] = _GrowingArray(self._partial.path / f"{name}.npy", row_shape, dtype)

    def _checked_track(self, where: str, track: Track) -> Track:
        actions = _checked(f"{where}: track", track.actions, np.float32, (None, self._meta.action_dim))
        stamps = _checked(f"{where}: track stamps", track.stamps, np.int64, (len(actions),))
        expect(len(actions) >= 1, f"{where}: track: found no action, expected at least one")
        _check_finite(f"{where}, action", "track", actions)
        _check_rising(f"{where}, action", "track stamps", stamps)
        self._expect_track(where, True)
        return Track(stamps, actions)

    def _expect_track(self, where: str, wanted: bool) -> None:
        """The first episode decides."""
        if self._episodes and ("track" in self._arrays) != wanted:
            found, expected = ("a track", "none") if wanted else ("no track", "one")
            raise DatasetError(f"{where}: found {found}, expected {expected} as in the episodes before")

    def _append_track(self, track: Track) -> tuple[int, int]:
        """(first row in the track, rows)."""
        if "track" not in self._arrays:
            self._open("track", track.actions.shape[1:], track.actions.dtype)
            self._open("track_stamps", (), track.stamps.dtype)
        start = self._arrays["track"].rows
        self._arrays["track"].append(track.actions)
        self._arrays["track_stamps"].append(track.stamps)
        return start, len(track)

    def _index_of_prompt(self, where: str, prompt: str) -> int:
        expect(bool(prompt), f"{where}: prompt: found an empty one, expected text, or None for play")
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
        meta = replace(
            self._meta,
            prompts=tuple(self._prompts),
            embodiments=tuple(self._embodiments),
            episodes=tuple(self._episodes),
            counters=self.counters,
            sources=tuple(self.sources),
        )
        arrays = {name: np.load(self._partial.path / f"{name}.npy", mmap_mode="r") for name in self._arrays}
        track = Track(arrays["track_stamps"], arrays["track"]) if meta.has_track else None
        stats = norm_stats_of(
            arrays["states"],
            Timeline(meta.episodes, meta.dt_ns, stamps=arrays["stamps"], actions=arrays["actions"], track=track),
            arrays.get("expert_chunks"),
            meta.episodes,
            horizon=meta.statistics_horizon,
            delta_mask=np.array(meta.delta_mask),
        )
        save_norm_stats(self._partial.path / "norm_stats.json", stats)
        (self._partial.path / "meta.json").write_text(json.dumps(meta.to_dict(), indent=1), encoding="utf-8")
        self._partial.publish()


class _GrowingArray:
    """A .npy file whose first dimension is known only in the end."""

    def __init__(self, path: Path, row_shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._row_shape, self._dtype = row_shape, dtype
        self._row_bytes = int(np.prod(row_shape, dtype=np.int64)) * dtype.itemsize
        self.rows = 0
        self._file = path.open("w+b")
        self._write_header()
        self._data_start = self._file.tell()

    def append(self, values: np.ndarray) -> None:
        self.write(self.rows * self._row_bytes, np.ascontiguousarray(values, self._dtype))
        self.rows += len(values)

    def extend(self, rows: int) -> None:
        """Rows that are zero until they are written."""
        self.rows += rows
        with self._writing():
            self._file.truncate(self._data_start + self.rows * self._row_bytes)

    def write(self, offset: int, values: np.ndarray) -> None:
        with self._writing():
            self._file.seek(self._data_start + offset)
            self._file.write(np.ascontiguousarray(values).data)

    def finish(self) -> None:
        with self._writing():
            self._file.seek(0)
            self._write_header()
            if self._file.tell() != self._data_start:
                raise DatasetError(f"{self._file.name}: the header grew over the data, expected numpy to reserve room")
            self._file.flush()  # a full disk is reported here at the latest
        self.close()

    def close(self) -> None:
        # An error here would hide the one that made the writer give up; finish() reports its own.
        with contextlib.suppress(OSError):
            if not self._file.closed:
                self._file.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # names no file
            raise DatasetError(f"{self._file.name}: could not write the dataset ({error}); nothing is left") from error

    def _write_header(self) -> None:
        # numpy pads the header so that the first dimension may grow to any number of digits.
        shape = (self.rows, *self._row_shape)
        header = {"descr": npy.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(self._file, header)


def expect(condition: bool, message: str) -> None:
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


def _check_finite(where: str, name: str, values: np.ndarray) -> None:
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        row = int(np.argmax(bad))
        raise DatasetError(f"{where} {row}: {name}: found {values[row].tolist()}, expected finite numbers")


def _check_rising(where: str, name: str, stamps: np.ndarray) -> None:
    falling = np.flatnonzero(np.diff(stamps) <= 0)
    if len(falling):
        row = int(falling[0]) + 1
        raise DatasetError(f"{where} {row}: {name}: found {stamps[row]} after {stamps[row - 1]}, expected later ones")


def _actions_at(stamps: np.ndarray, track: Track, dt_ns: int) -> np.ndarray:
    """The action in force at each frame, (n, A) float32; NaN where there is none."""
    places, known = Pairing(dt_ns).in_force(track.stamps, stamps, (0, len(track)))
    return np.where(known[:, None], track.actions[np.maximum(places, 0)], np.float32(np.nan))


def _check_chunks(where: str, chunks: np.ndarray) -> None:
    finite = np.isfinite(chunks).all(axis=(2, 3))
    mixed = ~finite & ~np.isnan(chunks).all(axis=(2, 3))
    if mixed.any():
        frame, prompt = (int(v) for v in np.argwhere(mixed)[0])
        raise DatasetError(
            f"{where}, frame {frame}: expert_chunks: found a chunk for prompt {prompt} that is partly NaN or infinite, "
            "expected finite numbers, or NaN throughout for none"
        )
