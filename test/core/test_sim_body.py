"""Body files: strict reading, plain data and back, random bodies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from selfalign_core.errors import ConfigError
from selfalign_core.sim import FAMILIES, JOINTS, BodyConfig, BodyRanges, JointBody

BODIES = Path(__file__).parents[2] / "config" / "bodies"


@pytest.mark.parametrize("path", sorted(BODIES.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_body_files_load_and_are_named_after_their_file(path: Path) -> None:
    assert BodyConfig.from_yaml(path).name == path.stem


def test_nominal_file_is_the_default_body() -> None:
    assert BodyConfig.from_yaml(BODIES / "nominal.yaml") == BodyConfig()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nheight: 2", ["height", "unknown key", "payload"]),
        ("payload: 0.1", ["name", "found nothing"]),
        ("name: 3", ["name", "3", "string"]),
        ("name: a\npayload: heavy", ["payload", "'heavy'", "[0, 2]"]),
        ("name: a\npayload: true", ["payload", "True", "number"]),
        ("name: a\npayload: .nan", ["payload", "nan"]),
        ("name: a\npayload: 1\npayload: 2", ["payload", "found twice", "line 3"]),
        ("name: a\nlinks: {upper_arm: 9}", ["links.upper_arm", "9", "[0.5, 1.5]"]),
        ("name: a\nlinks: {tail: 1}", ["links.tail", "unknown key", "forearm"]),
        ("name: a\njoints: {knee: {}}", ["joints.knee", "unknown key", "elbow_flex"]),
        ("name: a\njoints: {elbow_flex: {sign: 0}}", ["joints.elbow_flex.sign", "0", "1 or -1"]),
        ("name: a\njoints: {elbow_flex: {sine: 1}}", ["joints.elbow_flex.sine", "unknown key", "sign"]),
        ("name: a\njoints: {elbow_flex: 1}", ["joints.elbow_flex", "1", "sign"]),
        ("name: a\ncameras: {wrist: {mirror: 1}}", ["cameras.wrist.mirror", "1", "true or false"]),
        ("name: a\ncameras: {wrist: {position: [0, 0]}}", ["cameras.wrist.position", "a list of 3, each a number in"]),
        ("name: a\ncameras: {wrist: {rotation: [0, 0, x]}}", ["cameras.wrist.rotation[2]", "'x'"]),
        ("name: a\ncameras: {ceiling: {}}", ["cameras.ceiling", "unknown key", "overhead"]),
        ("name: a\nlight: {direction: [0, 0, 0]}", ["light.direction", "not zero"]),
        ("- 1", ["[1]", "name"]),
        ("name: [", ["invalid YAML"]),
        ("", ["None", "name"]),
    ],
)
def test_bad_file_names_file_key_found_and_expected(tmp_path: Path, text: str, expected: list[str]) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        BodyConfig.from_yaml(path)
    for part in ["broken.yaml", *expected]:
        assert part in str(error.value)


def test_sampled_body_survives_plain_data() -> None:
    body = BodyConfig.sample(np.random.default_rng(0))
    assert BodyConfig.from_dict(body.to_dict()) == body


def test_no_family_is_nominal_and_a_family_changes_only_itself() -> None:
    nominal = BodyConfig(name="sampled")
    assert BodyConfig.sample(np.random.default_rng(1), families=()) == nominal
    body = BodyConfig.sample(np.random.default_rng(1), families=("offset",))
    everything = BodyConfig.sample(np.random.default_rng(1))
    assert [j.offset for j in body.joints] == [j.offset for j in everything.joints]
    assert body != nominal
    zeroed = tuple(JointBody() for _ in JOINTS)
    assert BodyConfig.from_dict({**body.to_dict(), "joints": {}}) == nominal
    assert nominal.joints == zeroed


def test_every_family_changes_something() -> None:
    nominal = BodyConfig(name="sampled")
    for family in FAMILIES:
        draws = [BodyConfig.sample(np.random.default_rng(seed), families=(family,)) for seed in range(5)]
        assert any(body != nominal for body in draws), family


def test_inactive_joints_stay_nominal_and_same_seed_same_body() -> None:
    draws = [BodyConfig.sample(np.random.default_rng(3), active_joints=JOINTS[:3]) for _ in range(2)]
    assert draws[0] == draws[1]
    assert draws[0].joints[3:] == (JointBody(),) * 4
    assert draws[0].joints[:3] != (JointBody(),) * 3


def test_scaled_ranges_give_wider_valid_bodies() -> None:
    for seed in range(50):
        BodyConfig.sample(np.random.default_rng(seed), ranges=BodyRanges().scaled(1.6))
    with pytest.raises(ConfigError, match="gain"):
        BodyRanges().scaled(10.0)


def test_unknown_family_and_joint_are_named() -> None:
    with pytest.raises(ConfigError, match="'taste'"):
        BodyConfig.sample(np.random.default_rng(0), families=("taste",))
    with pytest.raises(ConfigError, match="'knee'"):
        BodyConfig.sample(np.random.default_rng(0), active_joints=("knee",))
