"""The dataset on disk: what is written is read, what is wrong is named, and a writer that dies leaves no dataset."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from selfalign_core.data import statistics
from selfalign_core.data.dataset import TransitionDataset, main, merge
from selfalign_core.data.dataset_writer import DatasetWriter
from selfalign_core.errors import DatasetError

SHAPE = {"cameras": ["top"], "image_size": (4, 6), "state_dim": 2, "action_dim": 2, "dt_ns": 50}


def episode(length: int, seed: int = 0, **changes) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "states": rng.normal(size=(length, 2)).astype(np.float32),
        "actions": rng.normal(size=(length, 2)).astype(np.float32),
        "stamps": np.arange(length) * 50,
        "images": rng.integers(0, 256, (length, 1, 4, 6, 3), dtype=np.uint8),
        "embodiment": "body",
        **changes,
    }


def write(path: Path, *episodes: dict, **changes) -> TransitionDataset:
    with DatasetWriter(path, **(SHAPE | changes)) as writer:
        for values in episodes or (episode(5),):
            writer.add_episode(**values)
    return TransitionDataset(path)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    first, second = episode(5, prompt="reach"), episode(3, seed=1, embodiment="other")
    found = write(tmp_path / "set", first, second)
    for name in ("states", "actions", "stamps", "images"):
        np.testing.assert_array_equal(getattr(found, name), np.concatenate([first[name], second[name]]))
    assert len(found) == 8
    assert found.meta.prompts == ("reach",) and found.meta.embodiments == ("body", "other")
    assert found.episode_of.tolist() == [0] * 5 + [1] * 3
    assert found.prompt_of.tolist() == [0, -1]
    assert isinstance(found.images, np.memmap) and not found.images.flags.writeable
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [
        "actions.npy", "images.npy", "meta.json", "norm_stats.json", "stamps.npy", "states.npy",
    ]  # fmt: skip


def test_images_may_follow_one_by_one(tmp_path: Path) -> None:
    whole = episode(6)
    with DatasetWriter(tmp_path / "set", **SHAPE) as writer:
        start = writer.add_episode(**{**whole, "images": None})
        for frame in (3, 0, 5, 1, 4, 2):
            writer.write_image(start + frame, 0, whole["images"][frame, 0])
        writer.add_episode(**whole)
    np.testing.assert_array_equal(TransitionDataset(tmp_path / "set").images, np.concatenate([whole["images"]] * 2))


def test_an_image_that_never_came_is_named(tmp_path: Path) -> None:
    def write_one_image_only() -> None:
        with DatasetWriter(tmp_path / "set", **SHAPE) as writer:
            writer.add_episode(**episode(6, images=None))
            writer.write_image(0, 0, np.zeros((4, 6, 3), np.uint8))

    with pytest.raises(DatasetError, match="frame 1, camera 'top': found no image"):
        write_one_image_only()
    assert list(tmp_path.iterdir()) == []


def test_action_statistics_are_relative_to_the_state_over_the_chunk(tmp_path: Path) -> None:
    values = episode(6)
    found = write(tmp_path / "set", values, delta_mask=[True, False], statistics_horizon=3)
    rows = [values["actions"][i + k] - [values["states"][i, 0], 0.0] for i in range(6) for k in range(3) if i + k < 6]
    stats = found.norm_stats["actions"]
    np.testing.assert_allclose(stats.mean, np.mean(rows, axis=0), rtol=1e-5)
    np.testing.assert_allclose(stats.std, np.std(rows, axis=0), rtol=1e-5)
    np.testing.assert_allclose(stats.q99, np.quantile(rows, 0.99, axis=0), rtol=1e-5)
    np.testing.assert_allclose(found.norm_stats["state"].min, values["states"].min(0))
    assert found.meta.delta_mask == (True, False)


def test_statistics_include_the_experts_chunks(tmp_path: Path) -> None:
    chunks = np.full((5, 2, 3, 2), np.nan, np.float32)
    chunks[2, 1] = 50.0
    options = {"prompts": ["a", "b"], "chunk_horizon": 3, "delta_mask": [False, False]}
    found = write(tmp_path / "set", episode(5, expert_chunks=chunks), **options)
    assert found.norm_stats["actions"].max.tolist() == [50.0, 50.0]
    np.testing.assert_array_equal(found.expert_chunks, chunks)


def test_statistics_of_many_rows_are_close_to_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [episode(3000, seed=seed) for seed in range(3)]
    exact = write(tmp_path / "exact", *values).norm_stats["actions"]
    monkeypatch.setattr(statistics, "_QUANTILE_ROWS", 20_000)
    sampled = write(tmp_path / "sampled", *values).norm_stats["actions"]
    np.testing.assert_array_equal(sampled.mean, exact.mean)
    np.testing.assert_allclose(sampled.q99, exact.q99, atol=0.1)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"actions": np.full((5, 2), np.nan)}, r"episode 1, frame 0: actions: found \[nan, nan\], expected finite"),
        ({"states": np.array([[0, 0]] * 4 + [[0, np.inf]])}, "episode 1, frame 4: states"),
        ({"actions": np.zeros((4, 2))}, r"episode 1: actions: found \(4, 2\) float64, expected \(5, 2\)"),
        ({"images": np.zeros((5, 1, 4, 4, 3), np.uint8)}, "episode 1: images"),
        ({"images": np.zeros((5, 1, 4, 6, 3), np.float32)}, "episode 1: images: found .* float32"),
        ({"stamps": np.array([0, 50, 40, 90, 100])}, "episode 1, frame 2: stamps: found 40 after 50"),
        ({"prompt": ""}, "episode 1: prompt"),
        ({"expert_chunks": np.zeros((5, 1, 3, 2))}, "episode 1: expert_chunks"),
    ],
)
def test_bad_values_are_named_and_nothing_is_written(tmp_path: Path, changes: dict, match: str) -> None:
    with pytest.raises(DatasetError, match=match):
        write(tmp_path / "set", episode(5), episode(5, **changes))
    assert list(tmp_path.iterdir()) == []


def test_chunks_that_are_partly_nan_are_named(tmp_path: Path) -> None:
    chunks = np.zeros((5, 2, 3, 2), np.float32)
    chunks[3, 1, 2, 0] = np.nan
    with pytest.raises(DatasetError, match="episode 0, frame 3: expert_chunks: found a chunk for prompt 1"):
        write(tmp_path / "set", episode(5, expert_chunks=chunks), prompts=["a", "b"], chunk_horizon=3)


def test_an_existing_path_is_never_touched(tmp_path: Path) -> None:
    first = write(tmp_path / "set")
    with pytest.raises(DatasetError, match="found an existing path"):
        write(tmp_path / "set", episode(9))
    assert len(TransitionDataset(first.path)) == 5


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="found no frames"), DatasetWriter(tmp_path / "set", **SHAPE):
        pass
    assert list(tmp_path.iterdir()) == []


def one_episode(start: int, length: int, embodiment: int = 0) -> list[dict]:
    return [{"start": start, "length": length, "embodiment": embodiment, "prompt": -1}]


def edit_meta(**changes):
    def edit(path: Path) -> None:
        file = path / "meta.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


def put(name: str, array: np.ndarray):
    return lambda path: np.save(path / name, array)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (edit_meta(format="other"), r"meta.json: format: found 'other', expected 'selfalign-dataset-1'"),
        (edit_meta(cameras=None), "meta.json: cameras: found None, expected at least one camera"),
        (edit_meta(episodes=one_episode(1, 4)), r"episodes\[0\].start: found 1"),
        (edit_meta(episodes=one_episode(0, 4)), r"images.npy: found \(5, 1"),
        (edit_meta(episodes=one_episode(0, 5, 3)), r"embodiment: found 3"),
        (lambda path: (path / "meta.json").write_text("{"), "meta.json: found invalid JSON"),
        (lambda path: (path / "meta.json").unlink(), "meta.json: found no such file"),
        (lambda path: (path / "stamps.npy").unlink(), "stamps.npy: found no such file"),
        (lambda path: os.truncate(path / "images.npy", 200), "images.npy: found an unreadable array"),
        (put("states.npy", np.zeros((5, 3), np.float32)), r"states.npy: found \(5, 3\) float32, expected \(5, 2\)"),
        (put("states.npy", np.zeros((5, 2))), "states.npy: found .* float64"),
        (put("actions.npy", np.array([[0, 0]] * 3 + [[np.nan, 0]] * 2, np.float32)), "episode 0, frame 3: found"),
    ],
)
def test_damage_is_named_when_a_dataset_is_opened(tmp_path: Path, damage, match: str) -> None:
    path = write(tmp_path / "set").path
    damage(path)
    with pytest.raises(DatasetError, match=match) as caught:
        TransitionDataset(path)
    assert str(path) in str(caught.value)


def test_a_killed_writer_leaves_no_dataset_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    script = """
        import os, signal, sys
        import numpy as np
        from selfalign_core.data.dataset_writer import DatasetWriter
        shape = dict(cameras=["top"], image_size=(4, 6), state_dim=2, action_dim=2, dt_ns=50)
        with DatasetWriter(sys.argv[1], **shape) as writer:
            zeros = np.zeros((5, 2), np.float32)
            images = np.zeros((5, 1, 4, 6, 3), np.uint8)
            writer.add_episode(states=zeros, actions=zeros, stamps=np.arange(5), embodiment="body", images=images)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    target = tmp_path / "set"
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(target)], timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not target.exists()
    write(target)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_two_writers_do_not_share_a_target(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "set", **SHAPE) as first:
        first.add_episode(**episode(5))
        with pytest.raises(DatasetError, match="found another process writing it"):
            write(tmp_path / "set")
    assert len(TransitionDataset(tmp_path / "set")) == 5


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(DatasetError, match=r"images.npy: could not write the dataset \(.*File too large"):
            write(tmp_path / "set", *(episode(50, seed=seed) for seed in range(10)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(tmp_path.iterdir()) == []


def test_merging_unites_keys_and_relabels(tmp_path: Path) -> None:
    def chunks(value: float, prompts: int) -> np.ndarray:
        return np.full((5, prompts, 3, 2), value, np.float32)

    horizon = {"chunk_horizon": 3}
    one = write(tmp_path / "a", episode(5, prompt="red", expert_chunks=chunks(1, 1)), prompts=["red"], **horizon)
    other = write(
        tmp_path / "b",
        episode(5, seed=1, prompt="red", embodiment="second", expert_chunks=chunks(2, 2)),
        prompts=["blue", "red"],
        **horizon,
    )
    merge([one, other], tmp_path / "both")
    both = TransitionDataset(tmp_path / "both")
    assert both.meta.prompts == ("red", "blue") and both.meta.embodiments == ("body", "second")
    assert both.prompt_of.tolist() == [0, 0] and both.embodiment_of.tolist() == [0, 1]
    assert np.isnan(both.expert_chunks[:5, 1]).all() and (both.expert_chunks[5:] == 2).all()
    np.testing.assert_array_equal(both.images[5:], other.images)
    small = write(tmp_path / "small", episode(5, images=np.zeros((5, 1, 2, 6, 3), np.uint8)), image_size=(2, 6))
    with pytest.raises(DatasetError, match=r"small: image_size: found \(2, 6\), expected \(4, 6\)"):
        merge([write(tmp_path / "plain"), small], tmp_path / "no")


def test_held_out_parts_are_disjoint_and_repeatable(tmp_path: Path) -> None:
    found = write(tmp_path / "set", *(episode(4, seed=i, embodiment=f"body{i // 2}") for i in range(10)))
    train, held = found.split(0.4, by="embodiment", seed=3)
    assert len(set(found.embodiment_of[held])) == 2
    assert not set(found.embodiment_of[held]) & set(found.embodiment_of[train])
    assert sorted([*train, *held]) == list(range(10))
    assert found.split(0.4, by="embodiment", seed=3)[1].tolist() == held.tolist()
    assert len(found.split(0.05, by="episode")[1]) == 1 and len(found.split(0.0, by="episode")[1]) == 0
    with pytest.raises(DatasetError, match=r"found 1 embodiment\(s\)"):
        write(tmp_path / "one").split(0.5, by="embodiment")


def test_the_command_shows_and_merges(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path / "a"), write(tmp_path / "b", episode(7, embodiment="second"))
    assert main(["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "c")]) == 0
    assert "12 frames" in capsys.readouterr().out
    assert main(["info", str(tmp_path / "nothing")]) == 2
    assert "found no such file" in capsys.readouterr().err
