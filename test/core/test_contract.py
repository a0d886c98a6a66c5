"""A contract that loads is usable; one that does not says where, what was found and what was expected."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from selfalign_core.robot.contract import ContractError, RobotContract
from selfalign_core.sim import CAMERAS, JOINTS

CONTRACTS = Path(__file__).parents[2] / "config" / "contracts"

VALID: dict[str, Any] = {
    "name": "bench_arm",
    "control": {"rate_hz": 20.0, "replan_steps": 8, "max_image_age": 0.2, "max_joint_state_age": 0.1},
    "cameras": [
        {"name": "front", "topic": "camera/front/image_raw", "encoding": "raw", "height": 48, "width": 64},
        {
            "name": "wrist",
            "topic": "camera/wrist/compressed",
            "encoding": "compressed",
            "height": 48,
            "width": 64,
        },
    ],
    "joint_state": {"topic": "joint_states"},
    "joints": [
        {"name": "pan", "unit": "rad", "lower": -1.0, "upper": 1.0, "max_velocity": 2.0, "home": 0.0},
        {
            "name": "slide",
            "unit": "m",
            "lower": 0,
            "upper": 0.3,
            "max_velocity": 0.5,
            "max_step": 0.01,
            "home": 0.1,
        },
    ],
    "action": {"interface": "forward_command", "topic": "commands"},
}

DELETE = object()


def write(tmp_path: Path, document: Any) -> Path:
    path = tmp_path / "robot.yaml"
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return path


def changed(keys: list[str | int], value: Any) -> dict[str, Any]:
    document = copy.deepcopy(VALID)
    target: Any = document
    for key in keys[:-1]:
        target = target[key]
    if value is DELETE:
        del target[keys[-1]]
    else:
        target[keys[-1]] = value
    return document


@pytest.mark.parametrize("path", sorted(CONTRACTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_contracts_load(path: Path) -> None:
    contract = RobotContract.from_yaml(path)
    assert set(contract.joint_names) <= set(JOINTS) and set(contract.camera_names) <= set(CAMERAS)
    reach = path.stem == "sim_reach"
    assert contract.joint_names == (JOINTS[:3] if reach else JOINTS)
    assert contract.camera_names == (("overhead",) if reach else ("overhead", "wrist"))


def test_values_and_units_arrive(tmp_path: Path) -> None:
    contract = RobotContract.from_yaml(write(tmp_path, VALID))
    assert contract.embodiment == "bench_arm"
    assert contract.joint_names == ("pan", "slide")
    assert contract.dt == pytest.approx(0.05) and contract.dt_ns == 50_000_000
    np.testing.assert_allclose(contract.lower, [-1.0, 0.0])
    np.testing.assert_allclose(contract.home, [0.0, 0.1])
    # pan has only its velocity limit; slide's 0.01 m per step at 20 Hz is stricter than its 0.5 m/s.
    np.testing.assert_allclose(contract.speed_limit, [2.0, 0.2])


@pytest.mark.parametrize(
    ("keys", "value", "expected"),
    [
        (["cameras", 0, "topic"], DELETE, ["cameras[0].topic", "found nothing", "topic name"]),
        (["cameras", 0, "topic"], "camera front", ["cameras[0].topic", "'camera front'", "topic name"]),
        (
            ["cameras", 1, "topic"],
            "camera/front/image_raw",
            ["cameras[1].topic", "cameras[0].topic", "distinct"],
        ),
        (["cameras", 1, "name"], "front", ["cameras[1].name", "'front'", "cameras[0]", "unique"]),
        (["cameras", 0, "encoding"], "16UC1", ["cameras[0].encoding", "'16UC1'", "raw, compressed"]),
        (["cameras", 0, "height"], 0, ["cameras[0].height", "found 0", "at least 1"]),
        (["cameras", 0, "height"], 48.5, ["cameras[0].height", "48.5", "integer"]),
        (["cameras", 0, "hight"], 48, ["cameras[0].hight", "unknown key", "height"]),
        (["cameras"], [], ["cameras", "found []", "non-empty list"]),
        (["joints", 0, "unit"], "deg", ["joints[0].unit", "'deg'", "rad, m"]),
        (["joints", 0, "upper"], 110.0, ["joints[0].upper", "110.0", "degrees", "pan"]),
        (["joints", 0, "lower"], float("nan"), ["joints[0].lower", "nan", "finite"]),
        (["joints", 0, "lower"], 1.0, ["joints[0].lower", "1.0", "less than upper"]),
        (["joints", 0, "max_velocity"], 0.0, ["joints[0].max_velocity", "0.0", "above 0 in rad/s"]),
        (["joints", 0, "max_velocity"], True, ["joints[0].max_velocity", "True", "above 0"]),
        (["joints", 1, "max_step"], -0.01, ["joints[1].max_step", "-0.01", "m per step"]),
        (["joints", 1, "home"], 0.5, ["joints[1].home", "0.5", "between lower"]),
        (["joints", 1, "name"], "pan", ["joints[1].name", "'pan'", "unique"]),
        (
            ["action", "interface"],
            "effort",
            ["action.interface", "'effort'", "joint_trajectory, forward_command"],
        ),
        (["action", "topic"], "joint_states", ["action.topic", "joint_state.topic", "distinct"]),
        (["control", "rate_hz"], float("inf"), ["control.rate_hz", "inf", "finite"]),
        (["control", "replan_steps"], 0, ["control.replan_steps", "found 0", "at least 1"]),
        (["control", "max_image_age"], "200ms", ["control.max_image_age", "'200ms'", "in s"]),
        (["gripper"], {}, ["gripper", "unknown key", "joints"]),
        (["joint_state"], "joint_states", ["joint_state", "'joint_states'", "mapping"]),
    ],
)
def test_bad_value_is_named(tmp_path: Path, keys: list[str | int], value: Any, expected: list[str]) -> None:
    path = write(tmp_path, changed(keys, value))
    with pytest.raises(ContractError) as caught:
        RobotContract.from_yaml(path)
    message = str(caught.value)
    for part in [str(path), *expected]:
        assert part in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["found None", "mapping"]),
        ("- 1\n- 2\n", ["found [1, 2]", "mapping"]),
        ("name: [unclosed\n", ["invalid YAML"]),
        ("name: a\nname: b\n", ["name", "found twice", "line 2"]),
        ("name: !!python/object/apply:os.system ['true']\n", ["invalid YAML"]),
    ],
)
def test_bad_document_is_named(tmp_path: Path, text: str, expected: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ContractError) as caught:
        RobotContract.from_yaml(path)
    for part in [str(path), *expected]:
        assert part in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"nowhere\.yaml.*no such file"):
        RobotContract.from_yaml(tmp_path / "nowhere.yaml")


def test_shipped_contracts_differ_only_in_the_action_interface() -> None:
    trajectory = RobotContract.from_yaml(CONTRACTS / "sim_arm.yaml")
    forward = RobotContract.from_yaml(CONTRACTS / "sim_arm_forward.yaml")
    assert (trajectory.action.interface, forward.action.interface) == ("joint_trajectory", "forward_command")
    assert trajectory.joints == forward.joints and trajectory.cameras == forward.cameras
