"""LeRobotDataset v3 folders to our dataset, and back.

The layout, as LeRobot's documentation and code define it: ``meta/info.json`` with the features, ``meta/tasks.parquet``,
one row per episode in ``meta/episodes/``, one row per frame in ``data/``, and the images either inside those rows (PNG
or JPEG) or in ``videos/<camera>/``, many episodes per MP4 file. ``observation.state`` and ``action`` are the vectors.

What LeRobot has no place for travels in ``meta/selfalign.json`` and in the extra columns ``embodiment_index`` and
``stamp_ns``; LeRobot reads such a folder as any other. Play has the empty task. Expert chunks are not exported.

Must not know ROS, the model or torch; the ``lerobot`` package is not needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from selfalign_core.data.dataset import (
    PLAY,
    DatasetError,
    DatasetWriter,
    Episode,
    TransitionDataset,
    describe,
    image_size_argument,
    run_command,
)
from selfalign_core.data.partial import PartialDirectory
from selfalign_core.errors import InputError, SelfAlignError
from selfalign_core.images import decode_compressed, resize_with_pad

CODEBASE_VERSION = "v3.0"
STATE, ACTION, IMAGES = "observation.state", "action", "observation.images."
_DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_OURS = "meta/selfalign.json"
_CHUNK_SIZE = 1000  # files per chunk directory
_DATA_MB, _VIDEO_MB = 100, 200  # file sizes after which another one is begun
_FRAMES_PER_READ = 64
_SCALARS = {
    "timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64", "task_index": "int64"
}  # fmt: skip
_EXTRA = {"embodiment_index": "int64", "stamp_ns": "int64"}


# --- reading ---


@dataclass(frozen=True)
class _Source:
    """The metadata of a LeRobot folder."""

    root: Path
    info: dict[str, Any]
    ours: dict[str, Any]
    cameras: dict[str, str]  # our camera name -> feature key
    tasks: dict[int, str]
    episodes: dict[int, dict[str, Any]]  # rows of meta/episodes by episode_index

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        return self.info["features"]

    @property
    def data_files(self) -> list[Path]:
        return sorted((self.root / "data").glob("*/*.parquet"))

    def dim(self, key: str) -> int:
        return int(self.features[key]["shape"][0])

    @classmethod
    def open(cls, root: Path, cameras: Sequence[str] | None) -> _Source:
        file = root / "meta" / "info.json"
        info = _read_json(file)
        version = str(info.get("codebase_version"))
        if not version.startswith("v3."):
            raise DatasetError(
                f"{file}: found codebase_version {version}, expected v3.0 "
                "(LeRobot's convert_dataset_v21_to_v30 converts older datasets)"
            )
        features = info.get("features", {})
        for key in (STATE, ACTION):
            shape = features.get(key, {}).get("shape")
            if not shape or len(shape) != 1:
                raise DatasetError(f"{file}: feature {key}: found shape {shape}, expected a vector")
        if not info.get("fps", 0) > 0:
            raise DatasetError(f"{file}: fps: found {info.get('fps')}, expected a number above 0")
        known = {
            _camera_name(key): key
            for key, feature in features.items()
            if feature.get("dtype") in ("image", "video") and not _is_depth(feature)
        }
        chosen = list(known) if cameras is None else list(cameras)
        if missing := [name for name in chosen if name not in known]:
            raise DatasetError(f"{file}: cameras: found {sorted(known)}, expected also {missing}")
        if not chosen:
            raise DatasetError(f"{file}: found no colour image feature, expected at least one camera")
        ours = _read_json(root / _OURS) if (root / _OURS).is_file() else {}
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
    :func:`export_lerobot` kept, or the robot_type. ``absolute_actions``: statistics of the actions as they are, for
    actions that are not positions of the state's joints. Tasks become prompts; where the task changes, an episode ends.

    Raises:
        DatasetError: naming file, episode and frame; nothing is left at ``output`` then.
    """
    source = _Source.open(Path(root), cameras)
    names = source.features[ACTION].get("names")
    joint_names = names if isinstance(names, list) and len(names) == source.dim(ACTION) else ()
    with DatasetWriter(
        output,
        cameras=tuple(source.cameras),
        image_size=image_size,
        state_dim=source.dim(STATE),
        action_dim=source.dim(ACTION),
        dt_ns=source.ours.get("dt_ns") or round(1e9 / source.info["fps"]),
        delta_mask=[False] * source.dim(ACTION) if absolute_actions else source.ours.get("delta_mask"),
        statistics_horizon=statistics_horizon or source.ours.get("statistics_horizon"),
        joint_names=tuple(map(str, joint_names)),
    ) as writer:
        _read_rows(source, writer, embodiment)
        if writer.num_frames != source.info.get("total_frames", writer.num_frames):
            raise DatasetError(
                f"{source.root / 'data'}: found {writer.num_frames} frames, expected the "
                f"{source.info['total_frames']} of meta/info.json; files are missing or cut short"
            )
        # disable=None: no bar where the output is not a terminal
        total = writer.num_frames * len(source.cameras)
        with tqdm(total=total, desc=source.root.name, unit="image", disable=None if progress else True) as bar:
            for index, key in enumerate(source.cameras.values()):
                is_video = source.features[key]["dtype"] == "video"
                images = _video_images(source, key) if is_video else _row_images(source, key)
                for row, image in enumerate(images):
                    writer.write_image(row, index, resize_with_pad(image, *image_size))
                    bar.update()
        writer.sources = [{"lerobot": source.root.name, "frames": writer.num_frames}]


def _read_rows(source: _Source, writer: DatasetWriter, embodiment: str | None) -> None:
    """States, actions and episodes, in the order of the files."""
    columns = [STATE, ACTION, "frame_index", "episode_index", "task_index"]
    bodies = source.ours.get("embodiments") if embodiment is None else None
    if bodies:
        columns += list(_EXTRA)
    fallback = embodiment or source.info.get("robot_type") or source.root.name
    dt_ns = source.ours.get("dt_ns") or round(1e9 / source.info["fps"])
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
    fps = float(source.info["fps"])
    template = source.info.get("video_path") or _VIDEO_PATH
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
        raise DatasetError(f"{file}: found no such file, expected one of a LeRobotDataset v3") from None
    # FFmpegError comes as OSError or ValueError, pyarrow's errors as either or as ArrowException.
    except (OSError, ValueError, IndexError, pa.ArrowException) as error:
        raise DatasetError(f"{file}: found an unreadable file ({' '.join(str(error).split())})") from error


def _read_json(file: Path) -> dict[str, Any]:
    with _named(file):
        return json.loads(file.read_text(encoding="utf-8"))


def _vectors(values: np.ndarray) -> np.ndarray:
    """A feature of one number is stored as a number."""
    return (values[:, None] if values.ndim == 1 else values).astype(np.float32)


def _camera_name(key: str) -> str:
    return key.removeprefix(IMAGES).removeprefix("observation.").replace(".", "_")


def _is_depth(feature: dict[str, Any]) -> bool:
    details = {**(feature.get("video_info") or {}), **(feature.get("info") or {})}
    return bool(details.get("is_depth_map") or details.get("video.is_depth_map"))


# --- writing ---


def export_lerobot(
    dataset: TransitionDataset, root: str | Path, *, videos: bool = False, progress: bool = False
) -> None:
    """Write ``dataset`` as the LeRobotDataset v3 folder ``root``, which must not exist.

    Images are kept exactly, as PNG in the rows; with ``videos`` as H.264, which is smaller and not exact.

    Raises:
        DatasetError: ``root`` exists, or the image size is odd and cannot be a video.
    """
    meta = dataset.meta
    if videos and (meta.image_size[0] % 2 or meta.image_size[1] % 2):
        raise DatasetError(f"{dataset.path}: image size: found {meta.image_size}, expected even numbers for videos")
    partial = PartialDirectory(Path(root))
    partial.open()
    try:
        tasks = list(meta.prompts) + ([""] if any(episode.prompt == PLAY for episode in meta.episodes) else [])
        with tqdm(total=len(dataset), desc=Path(root).name, unit="frame", disable=None if progress else True) as bar:
            rows = _write_data(dataset, partial.path, tasks, videos=videos, bar=bar)
            if videos:
                for camera in range(len(meta.cameras)):
                    for row, place in zip(rows, _write_videos(dataset, partial.path, camera), strict=True):
                        row.update(place)
        _write_parquet(partial.path / _EPISODES_PATH.format(chunk_index=0, file_index=0), pa.Table.from_pylist(rows))
        _write_parquet(partial.path / "meta" / "tasks.parquet", _task_table(tasks))
        info = {
            "codebase_version": CODEBASE_VERSION,
            "robot_type": meta.embodiments[0] if len(meta.embodiments) == 1 else None,
            "total_episodes": len(meta.episodes),
            "total_frames": len(dataset),
            "total_tasks": len(tasks),
            "chunks_size": _CHUNK_SIZE,
            "data_files_size_in_mb": _DATA_MB,
            "video_files_size_in_mb": _VIDEO_MB,
            "fps": _fps(dataset),
            "splits": {"train": f"0:{len(meta.episodes)}"},
            "data_path": _DATA_PATH,
            "video_path": _VIDEO_PATH if videos else None,
            "features": _features(dataset, videos=videos),
        }
        ours = {
            "embodiments": list(meta.embodiments),
            "dt_ns": meta.dt_ns,
            "delta_mask": list(meta.delta_mask),
            "statistics_horizon": meta.statistics_horizon,
        }
        for name, values in (("meta/info.json", info), ("meta/stats.json", _statistics(dataset)), (_OURS, ours)):
            (partial.path / name).write_text(json.dumps(values, indent=4), encoding="utf-8")
        partial.publish()
    finally:
        partial.remove()


def _write_data(
    dataset: TransitionDataset, root: Path, tasks: list[str], *, videos: bool, bar: tqdm
) -> list[dict[str, Any]]:
    """The rows of every frame; returns the rows of meta/episodes."""
    rows: list[dict[str, Any]] = []
    writer: pq.ParquetWriter | None = None
    number, path = -1, root
    try:
        for index, episode in enumerate(dataset.meta.episodes):
            table = _frame_table(dataset, index, episode, tasks, videos=videos)
            # One row group per episode, so that an episode can be read by itself.
            if writer is None or path.stat().st_size > _DATA_MB * 2**20:
                if writer is not None:
                    writer.close()
                number += 1
                path = root / _DATA_PATH.format(chunk_index=number // _CHUNK_SIZE, file_index=number % _CHUNK_SIZE)
                path.parent.mkdir(parents=True, exist_ok=True)
                writer = pq.ParquetWriter(path, table.schema, compression="snappy")
            writer.write_table(table, row_group_size=episode.length)
            bar.update(episode.length)
            rows.append(
                {
                    "episode_index": index,
                    "tasks": [_task(dataset, episode)],
                    "length": episode.length,
                    "data/chunk_index": number // _CHUNK_SIZE,
                    "data/file_index": number % _CHUNK_SIZE,
                    "dataset_from_index": episode.start,
                    "dataset_to_index": episode.stop,
                    "meta/episodes/chunk_index": 0,
                    "meta/episodes/file_index": 0,
                }
            )
    finally:
        if writer is not None:
            writer.close()
    return rows


def _frame_table(
    dataset: TransitionDataset, index: int, episode: Episode, tasks: list[str], *, videos: bool
) -> pa.Table:
    n, rows = episode.length, slice(episode.start, episode.stop)
    scalars = {
        "timestamp": np.arange(n) / _fps(dataset),
        "frame_index": np.arange(n),
        "episode_index": np.full(n, index),
        "index": np.arange(episode.start, episode.stop),
        "task_index": np.full(n, tasks.index(_task(dataset, episode))),
        "embodiment_index": np.full(n, episode.embodiment),
        "stamp_ns": dataset.stamps[rows],
    }
    columns: dict[str, pa.Array] = {}
    for key, values in ((STATE, dataset.states[rows]), (ACTION, dataset.actions[rows])):
        flat, dim = pa.array(np.ravel(values), pa.float32()), values.shape[1]
        columns[key] = flat if dim == 1 else pa.FixedSizeListArray.from_arrays(flat, dim)
    if not videos:
        image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        for camera, name in enumerate(dataset.meta.cameras):
            images = [
                {"bytes": _png(image), "path": f"frame-{frame:06d}.png"}
                for frame, image in enumerate(dataset.images[rows, camera])
            ]
            columns[IMAGES + name] = pa.array(images, image_type)
    for name, dtype in (_SCALARS | _EXTRA).items():
        columns[name] = pa.array(scalars[name].astype(dtype))
    return pa.table(columns)


def _write_videos(dataset: TransitionDataset, root: Path, camera: int) -> list[dict[str, Any]]:
    """One camera of every episode, one behind the other; returns their places for the rows of meta/episodes."""
    key = IMAGES + dataset.meta.cameras[camera]
    fps, (height, width) = _fps(dataset), dataset.meta.image_size
    places: list[dict[str, Any]] = []
    number, shown, container, path = -1, 0, None, root
    try:
        for episode in dataset.meta.episodes:
            if container is None or path.stat().st_size > _VIDEO_MB * 2**20:
                if container is not None:
                    _end_video(container)
                number, shown = number + 1, 0
                place = {"chunk_index": number // _CHUNK_SIZE, "file_index": number % _CHUNK_SIZE}
                path = root / _VIDEO_PATH.format(video_key=key, **place)
                path.parent.mkdir(parents=True, exist_ok=True)
                container = av.open(str(path), "w")
                # A key frame every other frame keeps reading single frames cheap; CRF 18 is close to the original.
                options = {"crf": "18", "g": "2", "preset": "fast"}
                stream = container.add_stream("libx264", rate=fps, options=options)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for image in dataset.images[episode.start : episode.stop, camera]:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
            begin, shown = shown, shown + episode.length
            places.append(
                {
                    f"videos/{key}/chunk_index": place["chunk_index"],
                    f"videos/{key}/file_index": place["file_index"],
                    f"videos/{key}/from_timestamp": begin / fps,
                    f"videos/{key}/to_timestamp": shown / fps,
                }
            )
        _end_video(container)
        container = None
    finally:
        if container is not None:
            container.close()
    return places


def _end_video(container: Any) -> None:
    container.mux(container.streams.video[0].encode(None))
    container.close()


def _features(dataset: TransitionDataset, *, videos: bool) -> dict[str, dict[str, Any]]:
    meta = dataset.meta
    joints = list(meta.joint_names)

    def vector(dim: int) -> dict[str, Any]:
        return {"dtype": "float32", "shape": [dim], "names": joints if len(joints) == dim else None}

    features = {STATE: vector(meta.state_dim), ACTION: vector(meta.action_dim)}
    for camera in meta.cameras:
        feature: dict[str, Any] = {
            "dtype": "video" if videos else "image",
            "shape": [*meta.image_size, 3],
            "names": ["height", "width", "channels"],
        }
        if videos:
            feature["info"] = {
                "video.height": meta.image_size[0],
                "video.width": meta.image_size[1],
                "video.codec": "h264",
                "video.pix_fmt": "yuv420p",
                "video.fps": _fps(dataset),
                "video.channels": 3,
                "has_audio": False,
                "is_depth_map": False,
            }
        features[IMAGES + camera] = feature
    scalars = {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in (_SCALARS | _EXTRA).items()}
    return features | scalars


def _statistics(dataset: TransitionDataset) -> dict[str, dict[str, Any]]:
    """meta/stats.json: of the vectors as they are, and of the colours of at most a thousand frames per camera."""

    def of(values: np.ndarray, count: int) -> dict[str, Any]:
        stats = {
            "min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0),
            **{f"q{q:02d}": np.quantile(values, q / 100, axis=0) for q in (1, 10, 50, 90, 99)},
        }  # fmt: skip
        return {name: value.tolist() for name, value in stats.items()} | {"count": [count]}

    n = len(dataset)
    result = {
        STATE: of(np.asarray(dataset.states, np.float64), n),
        ACTION: of(np.asarray(dataset.actions, np.float64), n),
    }
    chosen = np.unique(np.linspace(0, n - 1, min(n, 1000)).astype(int))
    for index, camera in enumerate(dataset.meta.cameras):
        pixels = dataset.images[chosen, index].reshape(-1, 3)
        pixels = pixels[:: max(1, len(pixels) // 1_000_000)] / 255.0
        stats = of(pixels, len(chosen))
        result[IMAGES + camera] = {
            name: value if name == "count" else np.reshape(value, (3, 1, 1)).tolist() for name, value in stats.items()
        }
    return result


def _task_table(tasks: list[str]) -> pa.Table:
    """Tasks as pandas writes a frame with the index ``task``, which is what LeRobot reads."""
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": pa.array(tasks, pa.string())})

    def column(name: str, kind: str, numpy_type: str) -> dict[str, Any]:
        return {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy_type, "metadata": None}

    pandas = {
        "index_columns": ["task"],
        "column_indexes": [column("", "unicode", "object") | {"name": None, "field_name": None}],
        "columns": [column("task_index", "int64", "int64"), column("task", "unicode", "object")],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.0.0",
    }
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def _write_parquet(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="snappy")


def _task(dataset: TransitionDataset, episode: Episode) -> str:
    return "" if episode.prompt == PLAY else dataset.meta.prompts[episode.prompt]


def _png(image: np.ndarray) -> bytes:
    _, data = cv2.imencode(".png", image[..., ::-1])
    return data.tobytes()


def _fps(dataset: TransitionDataset) -> int:
    """Frames per second; LeRobot knows whole numbers only."""
    fps = 1e9 / dataset.meta.dt_ns
    if abs(fps - round(fps)) > 1e-3 or round(fps) < 1:
        raise DatasetError(f"{dataset.path}: found {fps:g} frames per second, expected a whole number for LeRobot")
    return round(fps)


# --- command line ---


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m selfalign_core.data.lerobot", description="Convert from and to LeRobotDataset v3 folders."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    reading = commands.add_parser("import", help="make a dataset from a LeRobotDataset v3 folder")
    reading.add_argument("source", type=Path)
    reading.add_argument("--output", required=True, type=Path)
    reading.add_argument("--image-size", type=int, nargs="+", default=[64], metavar="PIXELS", help="default: 64")
    reading.add_argument("--cameras", nargs="+", help="names without observation.images. (default: all but depth)")
    reading.add_argument("--embodiment", help="key of the body in the token bank (default: the robot_type)")
    reading.add_argument(
        "--absolute-actions", action="store_true", help="actions are no positions of the state's joints"
    )
    reading.add_argument("--chunk", type=int, help="actions per chunk, for the statistics (default: 16)")
    writing = commands.add_parser("export", help="write a dataset as a LeRobotDataset v3 folder")
    writing.add_argument("source", type=Path)
    writing.add_argument("--output", required=True, type=Path)
    writing.add_argument("--videos", action="store_true", help="H.264 videos instead of exact PNG images")
    options = parser.parse_args(arguments)

    def work() -> None:
        if options.command == "import":
            import_lerobot(
                options.source,
                options.output,
                image_size=image_size_argument(options.image_size),
                cameras=options.cameras,
                embodiment=options.embodiment,
                absolute_actions=options.absolute_actions,
                statistics_horizon=options.chunk,
                progress=True,
            )
            print(describe(TransitionDataset(options.output)))
        else:
            dataset = TransitionDataset(options.source)
            export_lerobot(dataset, options.output, videos=options.videos, progress=True)
            left_out = "" if dataset.expert_chunks is None else "; expert chunks have no place there and were left out"
            print(f"{options.output}: {len(dataset)} frames in {len(dataset.meta.episodes)} episodes{left_out}")

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
