"""A LeRobotDataset v3 folder becomes a dataset. The folder is described in ``selfalign_core.data.lerobot_layout``.

Must not know ROS, the model or torch; the ``lerobot`` package is not needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from selfalign_core.data.dataset_writer import DatasetWriter
from selfalign_core.data.lerobot_layout import ACTION, EXTRA, IMAGES, OURS, STATE, VIDEO_PATH
from selfalign_core.errors import DatasetError, InputError, SelfAlignError
from selfalign_core.records import Count, Positive, Record, load
from selfalign_core.robot.images import decode_compressed, resize_with_pad

_FRAMES_PER_READ = 64
_FOLDER = "one of a LeRobotDataset v3"


class _Said(Record):
    """Of a file that others write too: keys that are not known are theirs."""

    error = DatasetError
    foreign = True


@dataclass(frozen=True)
class _Feature(_Said):
    dtype: str = ""
    shape: tuple[int, ...] | None = None
    names: Any = None
    info: dict[str, Any] | None = None
    video_info: dict[str, Any] | None = None

    @property
    def is_depth(self) -> bool:
        details = {**(self.video_info or {}), **(self.info or {})}
        return bool(details.get("is_depth_map") or details.get("video.is_depth_map"))


@dataclass(frozen=True)
class _Info(_Said):
    """``meta/info.json``."""

    codebase_version: Any
    fps: Positive
    features: dict[str, _Feature]
    robot_type: str | None = None
    total_frames: int | None = None
    video_path: str | None = None

    def __post_init__(self) -> None:
        version = str(self.codebase_version)
        converter = "v3.0 (LeRobot's convert_dataset_v21_to_v30 converts older datasets)"
        self.expect(version.startswith("v3."), "codebase_version", converter, version)
        super().__post_init__()
        for key in (STATE, ACTION):
            shape = self.features[key].shape if key in self.features else None
            self.expect(shape is not None and len(shape) == 1, f"features.{key}", "a vector", f"shape {shape}")


@dataclass(frozen=True)
class _Ours(_Said):
    """:data:`~selfalign_core.data.lerobot_layout.OURS`, where SelfAlign wrote the folder."""

    embodiments: tuple[str, ...] = ()
    dt_ns: Count | None = None
    delta_mask: tuple[bool, ...] | None = None
    statistics_horizon: Count | None = None


@dataclass(frozen=True)
class _Source:
    """The metadata of a LeRobot folder."""

    root: Path
    info: _Info
    ours: _Ours
    cameras: dict[str, str]  # our camera name -> feature key
    tasks: dict[int, str]
    episodes: dict[int, dict[str, Any]]  # rows of meta/episodes by episode_index

    @property
    def features(self) -> dict[str, _Feature]:
        return self.info.features

    @property
    def dt_ns(self) -> int:
        return self.ours.dt_ns or round(1e9 / self.info.fps)

    @property
    def data_files(self) -> list[Path]:
        return sorted((self.root / "data").glob("*/*.parquet"))

    def dim(self, key: str) -> int:
        shape = self.features[key].shape
        assert shape is not None
        return shape[0]

    @classmethod
    def open(cls, root: Path, cameras: Sequence[str] | None) -> _Source:
        file = root / "meta" / "info.json"
        info = load(_Info, file, _FOLDER, error=DatasetError)
        known = {
            _camera_name(key): key
            for key, feature in info.features.items()
            if feature.dtype in ("image", "video") and not feature.is_depth
        }
        chosen = list(known) if cameras is None else list(cameras)
        if missing := [name for name in chosen if name not in known]:
            raise DatasetError(f"{file}: cameras: found {sorted(known)}, expected also {missing}")
        if not chosen:
            raise DatasetError(f"{file}: found no colour image feature, expected at least one camera")
        ours = load(_Ours, root / OURS, _FOLDER, error=DatasetError) if (root / OURS).is_file() else _Ours()
        tasks, episodes = _read_tasks(root), _read_episodes(root)
        return cls(root, info, ours, {name: known[name] for name in chosen}, tasks, episodes)


def import_lerobot(
    root: str | Path,
    output: str | Path,
    *,
    image_size: tuple[int, int],
    cameras: Sequence[str] | None = None,
    embodiment: str | None = None,
    absolute_actions: bool = False,
    statistics_horizon: int | None = None,
    progress: bool = False,
) -> None:
    """Write the dataset ``output`` from the LeRobotDataset v3 folder ``root``.

    ``cameras``: names without ``observation.images.``; None: all but depth. ``embodiment``: None: what
    ``export_lerobot`` kept, or the robot_type. ``absolute_actions``: statistics of the actions as they are, for
    actions that are not positions of the state's joints. Tasks become prompts; where the task changes, an episode ends.

    Raises:
        DatasetError: naming file, episode and frame; nothing is left at ``output`` then.
    """
    source = _Source.open(Path(root), cameras)
    names = source.features[ACTION].names
    joint_names = names if isinstance(names, list) and len(names) == source.dim(ACTION) else ()
    joint_names = [str(name).removesuffix(".pos") for name in joint_names]  # LeRobot's robots say joint.quantity
    with DatasetWriter(
        output,
        cameras=tuple(source.cameras),
        image_size=image_size,
        state_dim=source.dim(STATE),
        action_dim=source.dim(ACTION),
        dt_ns=source.dt_ns,
        delta_mask=[False] * source.dim(ACTION) if absolute_actions else source.ours.delta_mask,
        statistics_horizon=statistics_horizon or source.ours.statistics_horizon,
        joint_names=tuple(map(str, joint_names)),
    ) as writer:
        _read_rows(source, writer, embodiment)
        promised = source.info.total_frames
        if promised is not None and writer.num_frames != promised:
            raise DatasetError(
                f"{source.root / 'data'}: found {writer.num_frames} frames, expected the "
                f"{promised} of meta/info.json; files are missing or cut short"
            )
        # disable=None: no bar where the output is not a terminal
        total = writer.num_frames * len(source.cameras)
        with tqdm(total=total, desc=source.root.name, unit="image", disable=None if progress else True) as bar:
            for index, key in enumerate(source.cameras.values()):
                is_video = source.features[key].dtype == "video"
                images = _video_images(source, key) if is_video else _row_images(source, key)
                for row, image in enumerate(images):
                    writer.write_image(row, index, resize_with_pad(image, *image_size))
                    bar.update()
        writer.sources = [{"lerobot": source.root.name, "frames": writer.num_frames}]


def _read_rows(source: _Source, writer: DatasetWriter, embodiment: str | None) -> None:
    """States, actions and episodes, in the order of the files."""
    columns = [STATE, ACTION, "frame_index", "episode_index", "task_index"]
    bodies = source.ours.embodiments if embodiment is None else ()
    if bodies:
        columns += list(EXTRA)
    fallback, dt_ns = embodiment or source.info.robot_type or source.root.name, source.dt_ns
    counted: dict[int, int] = {}
    for file in source.data_files:
        rows = _read_columns(file, columns)
        episode, task = rows["episode_index"], rows["task_index"]
        change = np.flatnonzero((np.diff(episode) != 0) | (np.diff(task) != 0)) + 1
        for begin, end in zip([0, *change], [*change, len(episode)], strict=True):
            number = int(episode[begin])
            if number < max(counted, default=0):
                raise DatasetError(f"{file}: found episode {number} after {max(counted)}, expected rising numbers")
            counted[number] = counted.get(number, 0) + end - begin
            if int(task[begin]) not in source.tasks:
                raise DatasetError(f"{file}: episode {number}: task_index {task[begin]}, expected one of tasks.parquet")
            part = slice(begin, end)
            try:
                writer.add_episode(
                    states=_vectors(rows[STATE][part]),
                    actions=_vectors(rows[ACTION][part]),
                    stamps=rows["stamp_ns"][part] if bodies else rows["frame_index"][part] * dt_ns,
                    embodiment=bodies[int(rows["embodiment_index"][begin])] if bodies else fallback,
                    prompt=source.tasks[int(task[begin])] or None,
                )
            except DatasetError as error:
                raise DatasetError(f"{file}: episode_index {number}: {error}") from None
    for number, row in source.episodes.items():
        if counted.get(number, 0) != row["length"]:
            raise DatasetError(
                f"{source.root / 'data'}: episode {number}: found {counted.get(number, 0)} frames, expected the "
                f"{row['length']} of meta/episodes"
            )


def _row_images(source: _Source, key: str) -> Iterator[np.ndarray]:
    """Images kept in the rows, as bytes or as the path of a file."""
    for file in source.data_files:
        with _named(file), pq.ParquetFile(file) as parquet:
            row = 0
            for batch in parquet.iter_batches(batch_size=_FRAMES_PER_READ, columns=[key]):
                for item in batch.column(0).to_pylist():
                    content = item and item.get("bytes")
                    if not content and item and item.get("path"):
                        content = (source.root / item["path"]).read_bytes()
                    try:
                        yield decode_compressed(content or b"")
                    except InputError as error:
                        raise DatasetError(f"{file}: {key}, row {row}: {error}") from None
                    row += 1


def _video_images(source: _Source, key: str) -> Iterator[np.ndarray]:
    """Images of every episode, in the order of the rows, out of the video files."""
    fps = source.info.fps
    template = source.info.video_path or VIDEO_PATH
    for number in sorted(source.episodes):
        episode = source.episodes[number]
        try:
            place = {name: episode[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index", "from_timestamp")}
        except KeyError as error:
            raise DatasetError(f"{source.root / 'meta/episodes'}: episode {number}: found no {error}") from None
        file = source.root / template.format(
            video_key=key, chunk_index=place["chunk_index"], file_index=place["file_index"]
        )
        times = place["from_timestamp"] + np.arange(episode["length"]) / fps
        yield from _video_frames(file, times, tolerance=0.49 / fps)


def _video_frames(file: Path, times: np.ndarray, *, tolerance: float) -> Iterator[np.ndarray]:
    """The frame shown at each of the rising ``times`` [s], (H, W, 3) uint8 RGB."""
    found = 0
    with _named(file), av.open(str(file)) as container:
        stream = container.streams.video[0]
        container.seek(max(0, int(times[0] / stream.time_base) - 1), stream=stream, backward=True)
        for frame in container.decode(stream):
            if frame.pts is None:
                continue
            at = float(frame.pts * stream.time_base)
            if abs(at - times[found]) <= tolerance:
                yield frame.to_ndarray(format="rgb24")
                found += 1
            if found == len(times):
                return
            if at > times[found] + tolerance:
                break
    raise DatasetError(f"{file}: found no frame at {times[found]:.3f} s, expected one within {tolerance:.3f} s")


def _read_tasks(root: Path) -> dict[int, str]:
    file = root / "meta" / "tasks.parquet"
    with _named(file):
        table = pq.read_table(file).to_pydict()
    # The task is pandas' index, stored under its name, or under a made-up one where it has none.
    texts = next((table[name] for name in ("task", "__index_level_0__") if name in table), None)
    if texts is None or "task_index" not in table:
        raise DatasetError(f"{file}: found columns {sorted(table)}, expected task_index and task")
    return dict(zip(table["task_index"], texts, strict=True))


def _read_episodes(root: Path) -> dict[int, dict[str, Any]]:
    files = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not files:
        raise DatasetError(f"{root / 'meta/episodes'}: found no parquet file, expected a row per episode")
    episodes: dict[int, dict[str, Any]] = {}
    for file in files:
        with _named(file), pq.ParquetFile(file) as parquet:
            columns = [name for name in parquet.schema_arrow.names if not name.startswith("stats/")]
            for row in parquet.read(columns=columns).to_pylist():
                episodes[int(row["episode_index"])] = row
    return episodes


def _read_columns(file: Path, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns as arrays: (n,) for numbers, (n, dim) for vectors."""
    with _named(file), pq.ParquetFile(file) as parquet:
        if missing := [name for name in columns if name not in parquet.schema_arrow.names]:
            raise DatasetError(f"{file}: found columns {parquet.schema_arrow.names}, expected also {missing}")
        table = parquet.read(columns=list(columns))
    arrays = {}
    for name in columns:
        values = table.column(name).combine_chunks()
        if pa.types.is_nested(values.type):
            flat = values.flatten().to_numpy(zero_copy_only=False)
            if len(values) == 0 or len(flat) % len(values):
                raise DatasetError(f"{file}: {name}: found vectors of different lengths, expected one length")
            arrays[name] = flat.reshape(len(values), -1)
        else:
            arrays[name] = values.to_numpy(zero_copy_only=False)
    return arrays


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Turns what parquet, JSON and video readers raise into a ``DatasetError`` that names the file."""
    try:
        yield
    except SelfAlignError:
        raise
    except FileNotFoundError:
        raise DatasetError(f"{file}: found no such file, expected {_FOLDER}") from None
    # FFmpegError comes as OSError or ValueError, pyarrow's errors as either or as ArrowException.
    except (OSError, ValueError, IndexError, pa.ArrowException) as error:
        raise DatasetError(f"{file}: found an unreadable file ({' '.join(str(error).split())})") from error


def _vectors(values: np.ndarray) -> np.ndarray:
    """A feature of one number is stored as a number."""
    return (values[:, None] if values.ndim == 1 else values).astype(np.float32)


def _camera_name(key: str) -> str:
    return key.removeprefix(IMAGES).removeprefix("observation.").replace(".", "_")
