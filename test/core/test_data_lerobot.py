"""LeRobotDataset v3 folders: there and back without loss, folders as LeRobot writes them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfalign_core.data.dataset import TransitionDataset
from selfalign_core.data.dataset_writer import DatasetWriter
from selfalign_core.data.lerobot import main
from selfalign_core.data.lerobot_reader import import_lerobot
from selfalign_core.data.lerobot_writer import export_lerobot
from selfalign_core.data.partial import DatasetError
from selfalign_core.data.timeline import Track

SIZE = (12, 16)
EPISODES = ((7, "left", "red"), (5, "right", None), (9, "left", "blue"))


def picture(row: int, camera: int) -> np.ndarray:
    """A smooth image that says which row it is, and survives a video codec."""
    image = np.zeros((*SIZE, 3), np.uint8)
    image[..., 0] = 40 + 7 * row
    image[..., 1] = 60 if camera else 200
    image[:, : SIZE[1] // 2, 2] = 180
    return image


@pytest.fixture
def dataset(tmp_path: Path) -> TransitionDataset:
    rng = np.random.default_rng(0)
    with DatasetWriter(
        tmp_path / "ours",
        cameras=["top", "wrist"],
        image_size=SIZE,
        state_dim=3,
        action_dim=3,
        dt_ns=50_000_000,
        prompts=["red", "blue"],
        delta_mask=[True, True, False],
        statistics_horizon=4,
        joint_names=["a", "b", "c"],
    ) as writer:
        for length, body, prompt in EPISODES:
            rows = writer.num_frames + np.arange(length)
            writer.add_episode(
                states=rng.normal(size=(length, 3)),
                actions=rng.normal(size=(length, 3)),
                stamps=1_700_000_000_123_456_789 + rows * 50_000_000,
                embodiment=body,
                prompt=prompt,
                images=np.stack([[picture(row, camera) for camera in range(2)] for row in rows]),
            )
    return TransitionDataset(tmp_path / "ours")


def back(root: Path, **changes) -> TransitionDataset:
    output = root.parent / f"{root.name}_back"
    import_lerobot(root, output, **{"image_size": SIZE, **changes})
    return TransitionDataset(output)


def rewrite(path: Path, change) -> None:
    """Apply ``change`` to the columns of a parquet file."""
    columns = pq.read_table(path).to_pydict()
    change(columns)
    pq.write_table(pa.table(columns), path)


def test_there_and_back_is_the_same(tmp_path: Path, dataset: TransitionDataset) -> None:
    assert export_lerobot(dataset, tmp_path / "lerobot") == (21, 3)
    found = back(tmp_path / "lerobot")
    for name in ("images", "states", "actions", "stamps"):
        np.testing.assert_array_equal(getattr(found, name), getattr(dataset, name))
    for name in ("cameras", "dt_ns", "episodes", "embodiments", "prompts", "delta_mask", "joint_names"):
        assert getattr(found.meta, name) == getattr(dataset.meta, name)
    for name, stats in dataset.norm_stats.items():
        np.testing.assert_array_equal(found.norm_stats[name].q99, stats.q99)


def irregular(path: Path, stamps: list[int], actions: list[int]) -> TransitionDataset:
    """One episode at 20 Hz by times in ms; states and actions say which of them they are of."""

    def rows(times: list[int]) -> np.ndarray:
        return np.repeat(np.array(times, np.float32)[:, None], 3, 1)

    with DatasetWriter(path, cameras=["top"], image_size=SIZE, state_dim=3, action_dim=3, dt_ns=50_000_000) as writer:
        writer.add_episode(
            states=rows(stamps),
            stamps=np.array(stamps) * 1_000_000,
            track=Track(np.array(actions) * 1_000_000, rows(actions)),
            embodiment="left",
            prompt="red",
            images=np.stack([[picture(3 * row, 0)] for row in range(len(stamps))]),
        )
    return TransitionDataset(path)


@pytest.mark.parametrize("videos", [False, True])
def test_frames_of_a_camera_are_put_on_a_grid_and_parted_at_holes(tmp_path: Path, videos: bool) -> None:
    source = irregular(tmp_path / "ours", [1000, 1060, 1140, 1490, 1560], [990, 1055, 1101, 1152, 1480, 1540])
    assert export_lerobot(source, tmp_path / "lerobot", videos=videos) == (7, 2)
    found = back(tmp_path / "lerobot")
    # At 1100 ms the picture of 1140 ms is more than half a step away. At 1200 ms the newest action is 48 ms old and the
    # nearest frame 60; at 1250 ms both are older than 75.
    assert [episode.length for episode in found.meta.episodes] == [5, 2]
    np.testing.assert_array_equal(found.stamps // 1_000_000, [1000, 1050, 1100, 1150, 1200, 1500, 1550])
    np.testing.assert_array_equal(found.states[:, 0], [1000, 1060, 1060, 1140, 1140, 1490, 1560])
    np.testing.assert_array_equal(found.actions[:, 0], [990, 1055, 1101, 1152, 1152, 1480, 1540])
    shown = found.images[:, 0, 4, 12, 0].astype(int) - source.images[[0, 1, 1, 2, 2, 3, 4], 0, 4, 12, 0]
    assert np.abs(shown).max() <= (10 if videos else 0)  # frames differ by 21
    assert found.meta.prompts == ("red",) and found.track is None


def test_a_dataset_without_an_action_in_force_at_any_tick_is_refused(tmp_path: Path) -> None:
    source = irregular(tmp_path / "ours", [1000, 1070], [1090])  # the tick at 1050 ms is too early, 1100 ms too late
    with pytest.raises(DatasetError, match="found no frame with an action in force"):
        export_lerobot(source, tmp_path / "lerobot")
    assert not (tmp_path / "lerobot").exists()


def test_videos_come_back_frame_by_frame(tmp_path: Path, dataset: TransitionDataset) -> None:
    export_lerobot(dataset, tmp_path / "lerobot", videos=True)
    found = back(tmp_path / "lerobot")
    assert len(list((tmp_path / "lerobot").rglob("*.mp4"))) == 2
    np.testing.assert_array_equal(found.actions, dataset.actions)
    # Rows differ by 7 in red: within 3 of the right one is that frame and no other.
    difference = found.images[:, :, 4, 12].astype(int) - dataset.images[:, :, 4, 12]
    assert np.abs(difference[..., 0]).max() <= 3


def test_the_layout_is_lerobots(tmp_path: Path, dataset: TransitionDataset) -> None:
    root = tmp_path / "lerobot"
    export_lerobot(dataset, root)
    info = json.loads((root / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0" and info["fps"] == 20
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (3, 21, 3)
    assert info["features"]["observation.images.top"] == {
        "dtype": "image", "shape": [*SIZE, 3], "names": ["height", "width", "channels"],
    }  # fmt: skip
    table = pq.read_table(root / info["data_path"].format(chunk_index=0, file_index=0))
    assert set(table.column_names) == set(info["features"])
    assert table.schema.field("action").type == pa.list_(pa.float32(), 3)
    assert table.column("frame_index").to_pylist() == [*range(7), *range(5), *range(9)]
    assert table.column("index").to_pylist() == list(range(21))
    np.testing.assert_allclose(table.column("timestamp").to_numpy()[:3], [0.0, 0.05, 0.1], atol=1e-6)
    episodes = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").to_pydict()
    assert episodes["dataset_from_index"] == [0, 7, 12] and episodes["tasks"] == [["red"], [""], ["blue"]]
    assert pq.ParquetFile(root / "data/chunk-000/file-000.parquet").num_row_groups == 3
    assert b"index_columns" in pq.read_schema(root / "meta/tasks.parquet").metadata[b"pandas"]
    assert set(json.loads((root / "meta/stats.json").read_text())["action"]) >= {"mean", "std", "q01", "q99", "count"}


def test_a_folder_that_lerobot_wrote_is_read(tmp_path: Path, dataset: TransitionDataset) -> None:
    """Without our columns: robot_type is the body, stamps follow from the frame rate; lists may be of any length."""
    root = tmp_path / "lerobot"
    export_lerobot(dataset, root)
    (root / "meta/selfalign.json").unlink()
    info = json.loads((root / "meta/info.json").read_text())
    info["robot_type"] = "so100"
    info["features"]["observation.depth"] = {"dtype": "video", "shape": [4, 4, 1], "info": {"is_depth_map": True}}
    (root / "meta/info.json").write_text(json.dumps(info))

    def forget(columns: dict) -> None:
        del columns["stamp_ns"], columns["embodiment_index"]

    rewrite(root / "data/chunk-000/file-000.parquet", forget)
    found = back(root, cameras=["wrist"], absolute_actions=True)
    assert found.meta.embodiments == ("so100",) and found.meta.cameras == ("wrist",)
    assert found.stamps[:3].tolist() == [0, 50_000_000, 100_000_000]
    assert found.meta.delta_mask == (False, False, False)
    np.testing.assert_array_equal(found.states, dataset.states)
    np.testing.assert_array_equal(found.images[:, 0], dataset.images[:, 1])


def test_an_episode_whose_task_changes_is_divided(tmp_path: Path, dataset: TransitionDataset) -> None:
    root = tmp_path / "lerobot"
    export_lerobot(dataset, root)
    rewrite(
        root / "data/chunk-000/file-000.parquet",
        lambda columns: columns["task_index"].__setitem__(slice(4, 7), [1] * 3),
    )
    found = back(root)
    assert [(e.length, e.prompt) for e in found.meta.episodes] == [(4, 0), (3, 1), (5, -1), (9, 1)]


def test_numbers_that_are_not_finite_are_named(tmp_path: Path, dataset: TransitionDataset) -> None:
    root = tmp_path / "lerobot"
    export_lerobot(dataset, root)
    rewrite(
        root / "data/chunk-000/file-000.parquet",
        lambda columns: columns["action"].__setitem__(9, [0.0, float("nan"), 0.0]),
    )
    with pytest.raises(DatasetError, match=r"file-000.parquet: episode_index 1: episode 1, frame 2: actions: found"):
        back(root)
    assert not (tmp_path / "lerobot_back").exists()


def drop_rows(root: Path) -> None:
    file = root / "data/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(file).slice(0, 18), file)


def cut_data(root: Path) -> None:
    file = root / "data/chunk-000/file-000.parquet"
    file.write_bytes(file.read_bytes()[:2000])


def spoil_image(root: Path) -> None:
    rewrite(
        root / "data/chunk-000/file-000.parquet",
        lambda columns: columns["observation.images.top"][3].update(bytes=b"no image"),
    )


def old_version(root: Path) -> None:
    text = (root / "meta/info.json").read_text()
    (root / "meta/info.json").write_text(text.replace("v3.0", "v2.1"))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (drop_rows, "episode 2: found 6 frames, expected the 9"),
        (cut_data, "file-000.parquet: found an unreadable file"),
        (spoil_image, r"file-000.parquet: observation.images.top, row 3"),
        (old_version, "found codebase_version v2.1, expected v3.0"),
        (lambda root: (root / "meta/tasks.parquet").unlink(), "tasks.parquet: found no such file"),
        (lambda root: (root / "meta/info.json").write_text("{"), "info.json: found an unreadable file"),
    ],
)
def test_damage_is_named_and_leaves_nothing(tmp_path: Path, dataset: TransitionDataset, damage, match: str) -> None:
    root = tmp_path / "lerobot"
    export_lerobot(dataset, root)
    damage(root)
    with pytest.raises(DatasetError, match=match):
        back(root)
    assert not (tmp_path / "lerobot_back").exists()
    assert not list(tmp_path.glob(".*.partial"))


def test_a_video_cut_short_or_missing_is_named(tmp_path: Path, dataset: TransitionDataset) -> None:
    root = tmp_path / "lerobot"
    export_lerobot(dataset, root, videos=True)
    file = root / "videos/observation.images.wrist/chunk-000/file-000.mp4"
    file.write_bytes(file.read_bytes()[:600])
    with pytest.raises(DatasetError, match=r"observation.images.wrist/chunk-000/file-000.mp4: found"):
        back(root)
    file.unlink()
    with pytest.raises(DatasetError, match=r"file-000.mp4: found no such file"):
        back(root)


def test_the_commands_convert_both_ways(tmp_path: Path, dataset: TransitionDataset, capsys) -> None:
    assert main(["export", str(dataset.path), "--output", str(tmp_path / "lerobot")]) == 0
    again = ["import", str(tmp_path / "lerobot"), "--output", str(tmp_path / "again"), "--image-size", "8"]
    assert main(again) == 0
    assert TransitionDataset(tmp_path / "again").meta.image_size == (8, 8)
    assert "21 frames" in capsys.readouterr().out
    assert main(again) == 2
    assert "found an existing path" in capsys.readouterr().err
