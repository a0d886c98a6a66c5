"""A dataset becomes a LeRobotDataset v3 folder. The folder is described in ``selfalign_core.data.lerobot_layout``.

LeRobot knows frames by their number, so frames that are not one control step apart are put on a regular grid
(``selfalign_core.data.regular``).

Must not know ROS, the model or torch; the ``lerobot`` package is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from selfalign_core.data.dataset import TransitionDataset
from selfalign_core.data.dataset_meta import PLAY, Episode
from selfalign_core.data.lerobot_layout import (
    ACTION,
    CODEBASE_VERSION,
    DATA_PATH,
    EPISODES_PATH,
    EXTRA,
    IMAGES,
    OURS,
    STATE,
    VIDEO_PATH,
)
from selfalign_core.data.partial import DatasetError, PartialDirectory
from selfalign_core.data.regular import Part, regular_parts

_CHUNK_SIZE = 1000  # files per chunk directory
_DATA_MB, _VIDEO_MB = 100, 200  # file sizes after which another one is begun
_SCALARS = {
    "timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64", "task_index": "int64"
}  # fmt: skip


def export_lerobot(
    dataset: TransitionDataset, root: str | Path, *, videos: bool = False, progress: bool = False
) -> tuple[int, int]:
    """Write ``dataset`` as the LeRobotDataset v3 folder ``root``, which must not exist; how many frames and episodes.

    Images are kept exactly, as PNG in the rows; with ``videos`` as H.264, which is smaller and not exact. An episode
    with holes becomes several.

    Raises:
        DatasetError: ``root`` exists, the image size is odd and cannot be a video, or no action was ever in force.
    """
    meta, parts = dataset.meta, list(regular_parts(dataset))
    if not parts:
        raise DatasetError(f"{dataset.path}: found no frame with an action in force, expected some")
    frames = sum(map(len, parts))
    if videos and (meta.image_size[0] % 2 or meta.image_size[1] % 2):
        raise DatasetError(f"{dataset.path}: image size: found {meta.image_size}, expected even numbers for videos")
    partial = PartialDirectory(Path(root))
    partial.open()
    try:
        tasks = list(meta.prompts) + ([""] if any(episode.prompt == PLAY for episode in meta.episodes) else [])
        with tqdm(total=frames, desc=Path(root).name, unit="frame", disable=None if progress else True) as bar:
            rows = _write_data(dataset, parts, partial.path, tasks, videos=videos, bar=bar)
            if videos:
                for camera in range(len(meta.cameras)):
                    for row, place in zip(rows, _write_videos(dataset, parts, partial.path, camera), strict=True):
                        row.update(place)
        _write_parquet(partial.path / EPISODES_PATH.format(chunk_index=0, file_index=0), pa.Table.from_pylist(rows))
        _write_parquet(partial.path / "meta" / "tasks.parquet", _task_table(tasks))
        info = {
            "codebase_version": CODEBASE_VERSION,
            "robot_type": meta.embodiments[0] if len(meta.embodiments) == 1 else None,
            "total_episodes": len(parts),
            "total_frames": frames,
            "total_tasks": len(tasks),
            "chunks_size": _CHUNK_SIZE,
            "data_files_size_in_mb": _DATA_MB,
            "video_files_size_in_mb": _VIDEO_MB,
            "fps": _fps(dataset),
            "splits": {"train": f"0:{len(parts)}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if videos else None,
            "features": _features(dataset, videos=videos),
        }
        ours = {
            "embodiments": list(meta.embodiments),
            "dt_ns": meta.dt_ns,
            "delta_mask": list(meta.delta_mask),
            "statistics_horizon": meta.statistics_horizon,
        }
        for name, values in (("meta/info.json", info), ("meta/stats.json", _statistics(dataset, parts)), (OURS, ours)):
            (partial.path / name).write_text(json.dumps(values, indent=4), encoding="utf-8")
        partial.publish()
    finally:
        partial.remove()
    return frames, len(parts)


def _write_data(
    dataset: TransitionDataset, parts: Sequence[Part], root: Path, tasks: list[str], *, videos: bool, bar: tqdm
) -> list[dict[str, Any]]:
    """The rows of every frame; returns the rows of meta/episodes."""
    rows: list[dict[str, Any]] = []
    writer: pq.ParquetWriter | None = None
    number, path, start = -1, root, 0
    try:
        for index, part in enumerate(parts):
            table = _frame_table(dataset, index, start, part, tasks, videos=videos)
            # One row group per episode, so that an episode can be read by itself.
            if writer is None or path.stat().st_size > _DATA_MB * 2**20:
                if writer is not None:
                    writer.close()
                number += 1
                path = root / DATA_PATH.format(chunk_index=number // _CHUNK_SIZE, file_index=number % _CHUNK_SIZE)
                path.parent.mkdir(parents=True, exist_ok=True)
                writer = pq.ParquetWriter(path, table.schema, compression="snappy")
            writer.write_table(table, row_group_size=len(part))
            bar.update(len(part))
            rows.append(
                {
                    "episode_index": index,
                    "tasks": [_task(dataset, dataset.meta.episodes[part.episode])],
                    "length": len(part),
                    "data/chunk_index": number // _CHUNK_SIZE,
                    "data/file_index": number % _CHUNK_SIZE,
                    "dataset_from_index": start,
                    "dataset_to_index": start + len(part),
                    "meta/episodes/chunk_index": 0,
                    "meta/episodes/file_index": 0,
                }
            )
            start += len(part)
    finally:
        if writer is not None:
            writer.close()
    return rows


def _frame_table(
    dataset: TransitionDataset, index: int, start: int, part: Part, tasks: list[str], *, videos: bool
) -> pa.Table:
    n, episode = len(part), dataset.meta.episodes[part.episode]
    scalars = {
        "timestamp": np.arange(n) / _fps(dataset),
        "frame_index": np.arange(n),
        "episode_index": np.full(n, index),
        "index": np.arange(start, start + n),
        "task_index": np.full(n, tasks.index(_task(dataset, episode))),
        "embodiment_index": np.full(n, episode.embodiment),
        "stamp_ns": part.stamps,
    }
    columns: dict[str, pa.Array] = {}
    for key, values in ((STATE, dataset.states[part.rows]), (ACTION, part.actions)):
        flat, dim = pa.array(np.ravel(values), pa.float32()), values.shape[1]
        columns[key] = flat if dim == 1 else pa.FixedSizeListArray.from_arrays(flat, dim)
    if not videos:
        image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        for camera, name in enumerate(dataset.meta.cameras):
            images = [
                {"bytes": _png(image), "path": f"frame-{frame:06d}.png"}
                for frame, image in enumerate(dataset.images[part.rows, camera])
            ]
            columns[IMAGES + name] = pa.array(images, image_type)
    for name, dtype in (_SCALARS | EXTRA).items():
        columns[name] = pa.array(scalars[name].astype(dtype))
    return pa.table(columns)


def _write_videos(dataset: TransitionDataset, parts: Sequence[Part], root: Path, camera: int) -> list[dict[str, Any]]:
    """One camera of every episode, one behind the other; returns their places for the rows of meta/episodes."""
    key = IMAGES + dataset.meta.cameras[camera]
    fps, (height, width) = _fps(dataset), dataset.meta.image_size
    places: list[dict[str, Any]] = []
    number, shown, container, path = -1, 0, None, root
    try:
        for part in parts:
            if container is None or path.stat().st_size > _VIDEO_MB * 2**20:
                if container is not None:
                    _end_video(container)
                number, shown = number + 1, 0
                place = {"chunk_index": number // _CHUNK_SIZE, "file_index": number % _CHUNK_SIZE}
                path = root / VIDEO_PATH.format(video_key=key, **place)
                path.parent.mkdir(parents=True, exist_ok=True)
                container = av.open(str(path), "w")
                # A key frame every other frame keeps reading single frames cheap; CRF 18 is close to the original.
                options = {"crf": "18", "g": "2", "preset": "fast"}
                stream = container.add_stream("libx264", rate=fps, options=options)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for image in dataset.images[part.rows, camera]:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
            begin, shown = shown, shown + len(part)
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
    scalars = {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in (_SCALARS | EXTRA).items()}
    return features | scalars


def _statistics(dataset: TransitionDataset, parts: Sequence[Part]) -> dict[str, dict[str, Any]]:
    """meta/stats.json: of the vectors as they are, and of the colours of at most a thousand frames per camera."""

    def of(values: np.ndarray, count: int) -> dict[str, Any]:
        stats = {
            "min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0),
            **{f"q{q:02d}": np.quantile(values, q / 100, axis=0) for q in (1, 10, 50, 90, 99)},
        }  # fmt: skip
        return {name: value.tolist() for name, value in stats.items()} | {"count": [count]}

    rows = np.concatenate([part.rows for part in parts])
    n = len(rows)
    result = {
        STATE: of(np.asarray(dataset.states[rows], np.float64), n),
        ACTION: of(np.concatenate([np.asarray(part.actions, np.float64) for part in parts]), n),
    }
    chosen = rows[np.unique(np.linspace(0, n - 1, min(n, 1000)).astype(int))]
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
