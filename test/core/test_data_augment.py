"""Variants of recorded robots: images, states, actions and labels change together, and nothing else does."""

import math

import numpy as np
import pytest

from selfalign_core.data.augment import Variant, augment, main
from selfalign_core.data.dataset import TransitionDataset
from selfalign_core.data.dataset_writer import DatasetWriter
from selfalign_core.errors import ConfigError

LENGTH, SIZE, JOINTS = 9, 17, 3


def record(path, *, robots=("left", "right"), state_dim=JOINTS):
    rng = np.random.default_rng(0)
    with DatasetWriter(
        path,
        cameras=("front", "wrist"),
        image_size=(SIZE, SIZE),
        state_dim=state_dim,
        action_dim=JOINTS,
        dt_ns=50_000_000,
        prompts=("reach the red cube", "reach the blue ball"),
        chunk_horizon=4,
        delta_mask=(False,) * JOINTS,
    ) as writer:
        for robot in robots:
            for prompt in ("reach the red cube", None):
                writer.add_episode(
                    states=rng.normal(size=(LENGTH, state_dim)).astype(np.float32),
                    actions=rng.normal(size=(LENGTH, JOINTS)).astype(np.float32),
                    stamps=np.arange(LENGTH, dtype=np.int64) * 50_000_000,
                    embodiment=robot,
                    prompt=prompt,
                    images=rng.integers(0, 256, (LENGTH, 2, SIZE, SIZE, 3), dtype=np.uint8),
                    expert_chunks=rng.normal(size=(LENGTH, 2, 4, JOINTS)).astype(np.float32),
                )
    return TransitionDataset(path)


def test_variants_are_embodiments_of_their_own_and_the_recordings_stay(tmp_path):
    source = record(tmp_path / "source")
    assert main([str(tmp_path / "source"), "--output", str(tmp_path / "all"), "--variants", "2"]) == 0
    found = TransitionDataset(tmp_path / "all")
    assert list(found.meta.embodiments) == ["left", "right", "left~1", "right~1", "left~2", "right~2"]
    assert len(found) == 3 * len(source) and found.meta.prompts == source.meta.prompts
    for name in ("images", "states", "actions", "expert_chunks", "stamps"):
        np.testing.assert_array_equal(getattr(found, name)[: len(source)], getattr(source, name))
    described = {entry["embodiment"]: entry for entry in found.meta.sources if "variant_of" in entry}
    assert len(described) == 4 and described["right~2"]["variant_of"] == "right"
    for number, (key, entry) in enumerate(described.items()):
        rows = slice((2 + number) * 2 * LENGTH, (3 + number) * 2 * LENGTH)
        own = slice(number % 2 * 2 * LENGTH, (number % 2 + 1) * 2 * LENGTH)
        scale = np.array(entry["variant"]["scale"], np.float32)
        for name in ("states", "actions", "expert_chunks"):
            expected = getattr(source, name)[own] * scale
            np.testing.assert_allclose(getattr(found, name)[rows], expected, rtol=1e-6, err_msg=f"{key} {name}")
        episodes = [e for e in found.meta.episodes if found.meta.embodiments[e.embodiment] == key]
        assert [e.prompt for e in episodes] == [0, -1]


def test_a_mirrored_or_turned_camera_moves_every_pixel_as_it_says():
    images = np.zeros((1, 1, SIZE, SIZE, 3), np.uint8)
    images[0, 0, 2, 5] = 200  # row 2, column 5
    mirrored = Variant(mirror=True, scale=(1.0,)).images(images)
    assert mirrored[0, 0, 2, SIZE - 6].tolist() == [200] * 3 and mirrored.sum() == images.sum()
    quarter = Variant(rotation=math.pi / 2, scale=(1.0,)).images(images)
    assert np.argwhere(quarter[0, 0, :, :, 0] > 150).tolist() == [[SIZE - 6, 2]]  # counter-clockwise about the centre
    np.testing.assert_array_equal(Variant(scale=(1.0,)).images(images), images)


def test_the_same_arguments_give_the_same_bytes_and_another_seed_other_robots(tmp_path):
    source = record(tmp_path / "source", robots=("arm",))
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        augment(source, tmp_path / name, variants=1, seed=seed)
    a, b, c = ((tmp_path / name / "states.npy").read_bytes() for name in "abc")
    assert a == b != c


def test_what_cannot_be_varied_is_refused_and_nothing_is_written(tmp_path, capsys):
    source = record(tmp_path / "source", state_dim=JOINTS + 1)
    with pytest.raises(ConfigError, match="found state_dim=4 and action_dim=3"):
        augment(source, tmp_path / "out", variants=1, seed=0)
    record(tmp_path / "fits")
    assert main([str(tmp_path / "fits"), "--output", str(tmp_path / "out"), "--variants", "0"]) == 2
    assert "variants: found 0, expected >= 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
