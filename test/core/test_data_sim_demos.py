"""Simulated demonstrations: what is in them, and that the same arguments give the same bytes."""

import numpy as np

from selfalign_core.data.dataset import TransitionDataset
from selfalign_core.data.sim_demos import DemoConfig, main, sample_bodies
from selfalign_core.sim import BodyConfig

ARGUMENTS = ["--bodies", "2", "--episodes", "2", "--frames", "20", "--image-size", "16", "--seed", "3"]


def test_every_frame_is_labelled_for_every_prompt_and_half_is_play(tmp_path):
    assert main(["--output", str(tmp_path / "demos"), *ARGUMENTS]) == 0
    dataset = TransitionDataset(tmp_path / "demos")
    assert len(dataset) == 2 * 2 * 20
    assert list(dataset.meta.prompts) == ["reach the red cube", "reach the green cube", "reach the blue cube"]
    assert np.isfinite(dataset.expert_chunks).all()
    moved = [np.ptp(dataset.actions[e.start : e.stop], axis=0) for e in dataset.meta.episodes]
    assert all((m > 0.02).all() for m in moved), "an episode in which a joint does not move teaches nothing"


def test_same_arguments_same_bytes(tmp_path):
    for name in ("a", "b"):
        assert main(["--output", str(tmp_path / name), *ARGUMENTS]) == 0
    for array in ("images", "states", "actions", "expert_chunks"):
        np.testing.assert_array_equal(
            np.load(tmp_path / "a" / f"{array}.npy"), np.load(tmp_path / "b" / f"{array}.npy")
        )


def test_bodies_can_be_rebuilt_from_the_dataset(tmp_path):
    assert main(["--output", str(tmp_path / "demos"), *ARGUMENTS]) == 0
    sources = TransitionDataset(tmp_path / "demos").meta.sources
    bodies = {s["embodiment"]: BodyConfig.from_dict(s["body"]) for s in sources}
    assert bodies == sample_bodies(2, 3, DemoConfig(image_size=(16, 16), episodes=2, frames=20))


def test_another_seed_of_the_episodes_gives_other_recordings_of_the_same_bodies(tmp_path):
    for name, more in (("a", []), ("b", ["--episodes-seed", "4"])):
        assert main(["--output", str(tmp_path / name), *ARGUMENTS, *more]) == 0
    a, b = (TransitionDataset(tmp_path / name) for name in ("a", "b"))
    assert a.meta.embodiments == b.meta.embodiments and a.meta.sources == b.meta.sources
    for one in a.meta.episodes:
        for other in b.meta.episodes:
            assert not np.array_equal(a.states[one.start : one.stop], b.states[other.start : other.stop])


def test_a_refused_argument_writes_nothing(tmp_path, capsys):
    assert main(["--output", str(tmp_path / "demos"), *ARGUMENTS, "--play", "1.5"]) == 2
    assert "DemoConfig.play: found 1.5" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_number_of_processes_changes_nothing(tmp_path):
    for name, jobs in (("one", "1"), ("two", "2")):
        assert main(["--output", str(tmp_path / name), *ARGUMENTS, "--nominal-episodes", "3", "--jobs", jobs]) == 0
    for array in ("images", "states", "actions", "expert_chunks"):
        one, two = (np.load(tmp_path / name / f"{array}.npy") for name in ("one", "two"))
        np.testing.assert_array_equal(one, two)
    episodes = TransitionDataset(tmp_path / "one").meta.episodes
    assert [e.embodiment for e in episodes] == [0, 0, 0, 1, 1], "the nominal body has more episodes than the other"
