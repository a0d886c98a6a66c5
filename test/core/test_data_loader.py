"""The loader: the same samples whoever reads them, wherever it resumes; relabelling, masks and held-out splits."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from selfalign_core.data.dataset import TransitionDataset
from selfalign_core.data.dataset_writer import DatasetWriter
from selfalign_core.data.loader import Loader, main
from selfalign_core.errors import DatasetError

CHUNK, TRANSITION = 3, 4
LENGTHS = (9, 14, 6)


def write(path: Path, *, chunk_horizon: int | None = None, prompts: tuple[str | None, ...] = ("red", "blue", None)):
    """Three episodes whose every number says which row it belongs to."""
    known = [prompt for prompt in prompts if prompt is not None]
    with DatasetWriter(
        path,
        cameras=["a", "b"],
        image_size=(4, 5),
        state_dim=2,
        action_dim=2,
        dt_ns=50,
        prompts=known,
        chunk_horizon=chunk_horizon,
    ) as writer:
        for number, (length, prompt) in enumerate(zip(LENGTHS, prompts, strict=True)):
            rows = writer.num_frames + np.arange(length)
            values = rows[:, None].astype(np.float32) + np.array([0.0, 0.5], np.float32)
            chunks = None
            if chunk_horizon is not None:
                chunks = np.full((length, len(known), chunk_horizon, 2), np.nan, np.float32)
                for column in range(len(known)):
                    chunks[::2, column] = (1000 * (column + 1) + rows[::2])[:, None, None]
            writer.add_episode(
                states=values,
                actions=values + 100,
                stamps=rows * 50,
                embodiment=f"body{number}",
                prompt=prompt,
                images=np.broadcast_to(rows[:, None, None, None, None], (length, 2, 4, 5, 3)).astype(np.uint8),
                expert_chunks=chunks,
            )
    return TransitionDataset(path)


@pytest.fixture
def dataset(tmp_path: Path) -> TransitionDataset:
    return write(tmp_path / "set")


def loader(dataset: TransitionDataset, **changes) -> Loader:
    return Loader(dataset, **{"batch_size": 4, "chunk": CHUNK, "transition": TRANSITION, **changes})


def test_a_sample_is_a_frame_its_actions_and_the_frame_after_them(dataset: TransitionDataset) -> None:
    for step in range(20):
        batch = loader(dataset).batch(step)
        np.testing.assert_array_equal(batch.next_index, batch.index + TRANSITION)
        np.testing.assert_array_equal(batch.images[:, 1, 0, 0, 0], batch.index)
        np.testing.assert_array_equal(batch.next_images[:, 0, -1, -1, 2], batch.index + TRANSITION)
        np.testing.assert_array_equal(batch.state[:, 0], batch.index)
        np.testing.assert_array_equal(batch.executed[:, :, 0], batch.index[:, None] + 100 + np.arange(TRANSITION))
        assert batch.executed_masks.all()
        assert (dataset.episode_of[batch.index] == dataset.episode_of[batch.next_index]).all()
        np.testing.assert_array_equal(batch.embodiment, dataset.episode_of[batch.index])


def test_play_has_no_action_target_and_prompted_frames_have_one(dataset: TransitionDataset) -> None:
    for step in range(20):
        batch = loader(dataset).batch(step)
        np.testing.assert_array_equal(batch.action_masks.any(1), batch.prompt >= 0)
        assert batch.executed_masks.all()  # play teaches the dynamics all the same


def test_every_sample_comes_once_per_epoch(dataset: TransitionDataset) -> None:
    one = loader(dataset)
    stream = np.concatenate([one.batch(step).index for step in range(one.num_samples)])  # batch_size epochs
    for epoch in np.split(stream, 4):
        np.testing.assert_array_equal(np.sort(epoch), one.rows)
    assert not np.array_equal(stream[: one.num_samples], stream[one.num_samples : 2 * one.num_samples])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_same_global_batches(tmp_path: Path, world_size: int) -> None:
    dataset = write(tmp_path / "set", chunk_horizon=5)
    whole = loader(dataset, batch_size=8)
    shares = [loader(dataset, batch_size=8 // world_size, rank=r, world_size=world_size) for r in range(world_size)]
    for step in range(12):
        together = [share.batch(step) for share in shares]
        for name in ("index", "prompt", "actions", "images"):
            joined = np.concatenate([getattr(batch, name) for batch in together])
            np.testing.assert_array_equal(joined, getattr(whole.batch(step), name))


def test_resuming_needs_the_step_alone(tmp_path: Path) -> None:
    dataset = write(tmp_path / "set", chunk_horizon=5)
    straight = loader(dataset).batches(prefetch=3, threads=2)
    seen = list(itertools.islice(straight, 15))
    straight.close()
    resumed = loader(TransitionDataset(dataset.path)).batches(9, prefetch=1)
    for expected, found in zip(seen[9:], resumed, strict=False):
        for name in ("images", "state", "actions", "action_masks", "executed", "prompt", "embodiment", "next_images"):
            assert (getattr(expected, name) == getattr(found, name)).all()
    resumed.close()


def test_another_seed_is_another_order(dataset: TransitionDataset) -> None:
    assert not np.array_equal(loader(dataset, seed=1).batch(0).index, loader(dataset, seed=2).batch(0).index)


def test_expert_chunks_relabel_every_frame_that_has_one(tmp_path: Path) -> None:
    dataset = write(tmp_path / "set", chunk_horizon=5)
    drawn = set()
    for step in range(40):
        batch = loader(dataset).batch(step)
        start = np.array([episode.start for episode in dataset.meta.episodes])[dataset.episode_of[batch.index]]
        has_chunk = (batch.index - start) % 2 == 0
        expected = 1000 * (batch.prompt + 1) + batch.index
        np.testing.assert_array_equal(batch.actions[has_chunk, 0, 0], expected[has_chunk])
        assert batch.action_masks[has_chunk].all()  # play frames too
        recorded = ~has_chunk
        np.testing.assert_array_equal(batch.actions[recorded, 0, 0], batch.index[recorded] + 100)
        drawn |= {(int(i), int(p)) for i, p in zip(batch.index[has_chunk], batch.prompt[has_chunk], strict=True)}
    assert len(drawn) > 1.5 * len({i for i, _ in drawn})  # most frames were seen with both prompts


def test_held_out_episodes_are_never_drawn(dataset: TransitionDataset) -> None:
    train, held = dataset.split(0.3, by="embodiment", seed=0)
    assert len(held) == 1 and not set(train) & set(held)
    for step in range(20):
        batch = loader(dataset, episodes=train).batch(step)
        assert not np.isin(dataset.episode_of[batch.index], held).any()


def test_without_images_the_rest_is_the_same(dataset: TransitionDataset) -> None:
    bare = loader(dataset, with_images=False).batch(3)
    assert bare.images is None and bare.next_images is None
    np.testing.assert_array_equal(bare.index, loader(dataset).batch(3).index)


def test_batches_read_ahead_are_those_of_their_steps(dataset: TransitionDataset) -> None:
    batches = loader(dataset).batches()
    batch = next(batches)
    batches.close()
    assert batch.images.dtype == np.uint8 and batch.images.shape == (4, 2, 4, 5, 3)
    assert batch.action_masks.dtype == bool and batch.prompt.dtype == np.int64
    np.testing.assert_array_equal(batch.index, loader(dataset).batch(0).index)


def test_an_error_while_reading_ahead_reaches_the_reader(dataset: TransitionDataset) -> None:
    one = loader(dataset)

    def broken(step: int):
        if step >= 2:
            raise OSError("disk gone")
        return Loader.batch(one, step)

    one.batch = broken
    batches = one.batches()
    assert len(next(batches)) == 4 and len(next(batches)) == 4
    with pytest.raises(OSError, match="disk gone"):
        next(batches)


def test_what_cannot_be_sampled_is_refused(tmp_path: Path, dataset: TransitionDataset) -> None:
    with pytest.raises(DatasetError, match="found no frame with 20 more behind it"):
        loader(dataset, transition=20)
    with pytest.raises(DatasetError, match="expert chunks of 5 actions, expected at least chunk=6"):
        loader(write(tmp_path / "other", chunk_horizon=5), chunk=6)
    with pytest.raises(DatasetError, match="rank: found 2"):
        loader(dataset, rank=2, world_size=2)


def test_throughput_is_measured_by_one_command(dataset: TransitionDataset, capsys: pytest.CaptureFixture) -> None:
    sizes = ["--batch-size", "4", "--chunk", "3", "--transition", "4", "--steps", "3", "--step-ms", "1"]
    assert main([str(dataset.path), *sizes]) == 0
    assert "samples/s" in capsys.readouterr().out
