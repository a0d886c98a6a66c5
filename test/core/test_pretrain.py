"""Labelled frames, and the two stages that teach a tiny policy to see and to read."""

import json

import numpy as np
import pytest

from selfalign_core.data.sim_frames import ARM_POINTS, POINTS, random_frames
from selfalign_core.policy import Policy
from selfalign_core.sim import TARGET_NAMES, ArmSim, BodyConfig, CameraBody
from selfalign_core.training import pretrain


def colour_centre(image: np.ndarray, channel: int) -> np.ndarray:
    """(x, y) fraction of the picture where one colour channel stands out most."""
    values = image.astype(np.float64)
    weight = np.clip(values[..., channel] - np.delete(values, channel, 2).max(2) - 40, 0, None)
    y, x = np.indices(weight.shape) + 0.5
    return np.array([(x * weight).sum(), (y * weight).sum()]) / weight.sum() / len(image)


@pytest.mark.parametrize("mirror", [False, True])
def test_a_projected_cube_is_where_its_colour_is_in_the_picture(mirror: bool) -> None:
    sim = ArmSim(BodyConfig(overhead=CameraBody(rotation=(0.05, -0.08, 0.1), mirror=mirror)), seed=4)
    sim.place(np.array([1.8, -0.5, 0.0, 0.0, 0.0, 0.0, 0.0]))  # out of the picture's middle
    image = sim.render("overhead", 224, 224)
    for channel, name in enumerate(TARGET_NAMES):
        found = sim.project("overhead", sim.data.body(name).xpos[None])[0]
        assert np.abs(found - colour_centre(image, channel)).max() < 0.02, name
    sim.close()


def test_frames_are_the_same_whatever_the_number_of_processes() -> None:
    one, two = random_frames(40, 5), random_frames(40, 5, jobs=2)
    assert one.images.shape == (40, 64, 64, 3) and one.points.shape == (40, len(TARGET_NAMES) + len(ARM_POINTS) + 1, 2)
    np.testing.assert_array_equal(one.images, two.images)
    np.testing.assert_array_equal(one.points, two.points)


def test_both_stages_learn_and_write_a_policy_to_start_from(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(pretrain, "HELD_OUT", 250)
    monkeypatch.setattr(pretrain, "_EVERY", 25)
    arguments = ["--output", str(tmp_path / "made"), "--frames", "1000", "--vision-steps", "100"]
    assert pretrain.main([*arguments, "--grounding-steps", "25"]) == 0
    log = [json.loads(line) for line in (tmp_path / "made/pretrain.jsonl").read_text().splitlines()]
    cubes = [np.mean([line[f"pixels_{n}"] for n in TARGET_NAMES]) for line in log if line["stage"] == "vision"]
    assert cubes[-1] < 0.7 * cubes[0], cubes
    assert {f"pixels_{name}" for name in POINTS} < set(log[0])
    assert [line["step"] for line in log if line["stage"] == "grounding"] == [25]
    policy = Policy.from_checkpoint(tmp_path / "made", dt=0.05)
    assert policy.config.cameras == ("overhead",) and not policy.model.next_obs_mean.any()
    assert pretrain.main(arguments) == 2
    assert "found an existing path" in capsys.readouterr().err


def test_too_few_frames_are_refused(tmp_path, capsys) -> None:
    assert pretrain.main(["--output", str(tmp_path / "made"), "--frames", "100"]) == 2
    assert "frames: found 100, expected at least" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
