"""Datasets whose frames are where a camera took them: what is paired with what, and what becomes of the track."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfalign_core.data.augment import augment
from selfalign_core.data.dataset import TransitionDataset, describe, merge
from selfalign_core.data.dataset_meta import Episode
from selfalign_core.data.dataset_writer import DatasetWriter
from selfalign_core.data.loader import Loader
from selfalign_core.data.partial import DatasetError
from selfalign_core.data.timeline import Timeline, Track

SHAPE = {"cameras": ["top"], "image_size": (4, 6), "state_dim": 2, "action_dim": 2, "dt_ns": 50}
STAMPS = [1003, 1047, 1104, 1301, 1352]  # a hole after the third
ACTIONS = [990, 1041, 1090, 1140, 1290, 1345]


def rows_of(stamps: list[int], offset: float = 0.0) -> np.ndarray:
    """(n, 2) float32 that say which stamp they are of."""
    return (np.array(stamps)[:, None] + np.array([offset, offset + 0.5])).astype(np.float32)


def track(stamps: list[int]) -> Track:
    return Track(np.array(stamps, np.int64), rows_of(stamps))


def episode(stamps: list[int] = STAMPS, executed: list[int] = ACTIONS, **changes) -> dict:
    pictures = np.array(stamps)[:, None, None, None, None] % 256
    return {
        "states": rows_of(stamps, 0.25),
        "stamps": np.array(stamps),
        "track": track(executed),
        "images": np.broadcast_to(pictures, (len(stamps), 1, 4, 6, 3)).astype(np.uint8),
        "embodiment": "body",
        "prompt": "reach",
        **changes,
    }


def regular(length: int = 4, **changes) -> dict:
    values = episode([7 * i for i in range(length)], **changes)
    del values["track"]
    return {**values, "actions": rows_of(list(range(length)))}


def write(path: Path, *episodes: dict, **changes) -> TransitionDataset:
    with DatasetWriter(path, **(SHAPE | changes)) as writer:
        for values in episodes:
            writer.add_episode(**values)
    return TransitionDataset(path)


def test_a_track_is_kept_beside_the_frames(tmp_path: Path) -> None:
    found = write(tmp_path / "set", episode(), episode([2000, 2051], [2000, 2050]))
    assert json.loads((found.path / "meta.json").read_text())["format"] == "selfalign-dataset-2"
    np.testing.assert_array_equal(found.track.stamps, [*ACTIONS, 2000, 2050])
    np.testing.assert_array_equal(found.track.actions, rows_of([*ACTIONS, 2000, 2050]))
    assert [(e.track_start, e.track_length) for e in found.meta.episodes] == [(0, 6), (6, 2)]
    # The action in force in the middle of each frame's step: stamped up to 25 after it and at most 75 before.
    np.testing.assert_array_equal(found.actions[:, 0], [990, 1041, 1090, 1290, 1345, 2000, 2050])
    assert "7 frames (0.0 s" in describe(found)


def test_a_frame_without_an_action_says_so(tmp_path: Path) -> None:
    found = write(tmp_path / "set", episode([1000, 1050, 1180], [1000, 1050]))
    np.testing.assert_array_equal(found.actions[:, 0], [1000, 1050, np.nan])
    assert found.starts(1).tolist() == [0]
    assert found.norm_stats["actions"].max[0] < 60  # relative to the state, and no NaN


def test_without_a_track_the_format_is_the_first(tmp_path: Path) -> None:
    found = write(tmp_path / "set", regular())
    meta = json.loads((found.path / "meta.json").read_text())
    assert meta["format"] == "selfalign-dataset-1"
    assert meta["episodes"] == [{"start": 0, "length": 4, "embodiment": 0, "prompt": 0}]
    assert found.track is None
    # Rows are a control step apart whatever their stamps say, and they are 7 apart.
    assert found.starts(2).tolist() == [0, 1]
    np.testing.assert_array_equal(found.transitions(np.array([1]), 2).actions[0, :, 0], [1, 2])


def test_transitions_go_over_no_hole(tmp_path: Path) -> None:
    found = write(tmp_path / "set", episode())
    assert found.starts(1).tolist() == [0, 1, 3]
    assert found.starts(2).tolist() == [0]
    assert found.starts(2, tails=True).tolist() == [0, 1, 2, 3, 4]
    batch = found.transitions(found.starts(2), 2)
    assert batch.frame_stamps.tolist() == [1003, 1104]
    np.testing.assert_array_equal(batch.actions[0, :, 0], [990, 1041])


def test_a_transition_may_go_over_a_frame_that_is_missing(tmp_path: Path) -> None:
    found = write(tmp_path / "set", episode([1000, 1101, 1149], [1000, 1050, 1100, 1150]))
    batch = found.transitions(found.starts(2), 2)
    assert batch.frame_stamps.tolist() == [1000, 1101]
    np.testing.assert_array_equal(batch.actions[0, :, 0], [1000, 1050])


@pytest.mark.parametrize("tails", [False, True])
def test_a_sample_has_the_actions_that_were_in_force_and_masks_where_there_was_none(
    tmp_path: Path, tails: bool
) -> None:
    found = write(tmp_path / "set", episode(), episode([2000, 2051, 2103], [1999, 2050, 2101], prompt=None))
    loader = Loader(found, batch_size=len(found.starts(1, tails=tails)), chunk=6, transition=1, tails=tails)
    batch = loader.batch(0)
    row = {int(index): place for place, index in enumerate(batch.index)}
    first, fourth = row[0], row[3]
    # Due at 1003, 1053, ... 1253: in the hole the newest is too old, and the episode goes on after it.
    np.testing.assert_array_equal(batch.actions[first, :, 0], [990, 1041, 1090, 1140, 1140, 1140])
    assert batch.action_masks[first].tolist() == [True, True, True, True, True, False]
    # Due at 1301, 1351, 1401, ...: the last frame is at 1352.
    np.testing.assert_array_equal(batch.actions[fourth, :, 0], [1290, 1345, 1345, 1345, 1345, 1345])
    assert batch.action_masks[fourth].tolist() == [True, True, False, False, False, False]
    assert not batch.action_masks[row[5]].any() and batch.executed_masks[row[5]].all()  # play
    np.testing.assert_array_equal(batch.next_index[[first, fourth]], [1, 4])
    assert (found.episode_of[batch.index] == found.episode_of[batch.next_index]).all()
    if tails:
        assert batch.next_index[row[2]] == 2  # 1104 is nearer to 1154 than 1301
        assert batch.executed_masks[:, 0].all()


def test_statistics_are_of_the_actions_that_were_in_force(tmp_path: Path) -> None:
    found = write(tmp_path / "set", episode(), statistics_horizon=2, delta_mask=[False, False])
    # Per frame the actions of two steps, as long as the episode lasts and there are some.
    chunks = [990, 1041, 1041, 1090, 1090, 1140, 1290, 1345, 1345]
    np.testing.assert_allclose(found.norm_stats["actions"].mean[0], np.mean(chunks), rtol=1e-6)


steps = st.lists(st.integers(1, 120), min_size=1, max_size=15).map(np.cumsum)


@given(st.lists(st.tuples(steps, steps), min_size=1, max_size=3), st.integers(1, 5))
@settings(deadline=None)
def test_actions_from_are_those_of_a_search_from_end_to_end(parts, count: int) -> None:
    episodes, stamps, actions = [], [], []
    for frames, executed in parts:
        episodes.append(Episode(len(stamps), len(frames), 0, 0, len(actions), len(executed)))
        stamps += frames.tolist()
        actions += executed.tolist()
    timeline = Timeline(episodes, 50, stamps=np.array(stamps), actions=np.zeros(0), track=track(actions))
    found, known = timeline.actions_from(np.arange(len(stamps)), count)
    row = 0
    for frames, executed in parts:
        for stamp in frames:
            for i in range(count):
                due = stamp + 50 * i
                newest = max((a for a in executed if a <= min(due, frames[-1]) + 25), default=executed[0])
                is_in_force = due - 75 <= newest <= due + 25 and due <= frames[-1]
                assert (found[row, i, 0], known[row, i]) == (newest, is_in_force)
            row += 1


# --- from one dataset to another ---


def test_merging_keeps_tracks_and_gives_one_to_who_has_none(tmp_path: Path) -> None:
    own = write(tmp_path / "own", regular(), regular(3, prompt=None))
    bag = write(tmp_path / "bag", episode())
    merge([own, bag], tmp_path / "both")
    both = TransitionDataset(tmp_path / "both")
    np.testing.assert_array_equal(both.stamps, [0, 50, 100, 150, 0, 50, 100, *STAMPS])
    np.testing.assert_array_equal(both.track.stamps, [0, 50, 100, 150, 0, 50, 100, *ACTIONS])
    np.testing.assert_array_equal(both.actions, np.concatenate([own.actions, bag.actions]))
    for horizon in (1, 2):
        expected = [*own.starts(horizon), *(bag.starts(horizon) + len(own))]
        assert both.starts(horizon).tolist() == expected
    merge([own, own], tmp_path / "twice")
    assert TransitionDataset(tmp_path / "twice").track is None


def test_variants_move_the_track_along(tmp_path: Path) -> None:
    source = write(tmp_path / "set", episode())
    augment(source, tmp_path / "all", variants=1, seed=0)
    found = TransitionDataset(tmp_path / "all")
    scale = np.array(found.meta.sources[0]["variant"]["scale"], np.float32)
    np.testing.assert_array_equal(found.track.stamps, ACTIONS * 2)
    np.testing.assert_array_equal(found.track.actions[:6], source.track.actions)
    np.testing.assert_allclose(found.track.actions[6:], source.track.actions * scale, rtol=1e-6)
    np.testing.assert_allclose(found.actions[5:], source.actions * scale, rtol=1e-6)


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"track": track([5, 5])}, r"episode 1, action 1: track stamps: found 5 after 5, expected later ones"),
        ({"track": track([])}, "episode 1: track: found no action, expected at least one"),
        ({"track": track([500])}, "episode 1: track: found no action in force at any frame"),
        ({"track": Track(np.arange(2), np.full((2, 2), np.nan))}, "episode 1, action 0: track: found .nan, nan."),
        ({"track": Track(np.arange(3), np.zeros((2, 2)))}, r"episode 1: track stamps: found \(3,\)"),
        ({"track": None}, "episode 1: found no track, expected one as in the episodes before"),
        ({"actions": rows_of(STAMPS)}, "episode 1: actions: found some beside a track"),
    ],
)
def test_a_bad_track_is_named_and_nothing_is_written(tmp_path: Path, changes: dict, match: str) -> None:
    with pytest.raises(DatasetError, match=match):
        write(tmp_path / "set", episode(), episode(**changes))
    assert list(tmp_path.iterdir()) == []


def test_the_first_episode_decides_whether_there_is_a_track(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="episode 1: found a track, expected none as in the episodes before"):
        write(tmp_path / "set", regular(), episode())
    with pytest.raises(DatasetError, match="episode 0: found neither actions nor a track"):
        write(tmp_path / "set", episode(track=None))


def put(name: str, array: np.ndarray):
    return lambda path: np.save(path / name, array)


def edit_meta(change):
    def edit(path: Path) -> None:
        values = json.loads((path / "meta.json").read_text())
        change(values)
        (path / "meta.json").write_text(json.dumps(values))

    return edit


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda path: (path / "track.npy").unlink(), "track.npy: found no such file"),
        (put("track.npy", np.full((6, 2), np.inf, np.float32)), "track.npy: episode 0, action 0: found .inf, inf"),
        (put("track_stamps.npy", np.zeros(6, np.int64)), "track_stamps.npy: episode 0, action 1: found 0 after 0"),
        (put("stamps.npy", np.zeros(5, np.int64)), "stamps.npy: episode 0, frame 1: found 0 after 0"),
        (edit_meta(lambda meta: meta.update(format="selfalign-dataset-1")), "format: found 'selfalign-dataset-1'"),
        (edit_meta(lambda meta: meta["episodes"][0].update(track_start=1)), r"episodes\[0\]: found track_start 1"),
    ],
)
def test_a_damaged_track_is_named_when_a_dataset_is_opened(tmp_path: Path, damage, match: str) -> None:
    path = write(tmp_path / "set", episode()).path
    damage(path)
    with pytest.raises(DatasetError, match=match):
        TransitionDataset(path)
