"""The calibration motion stays where and as slow as the contract wants it, and moves every joint by itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfalign_core.errors import ConfigError, InputError
from selfalign_core.robot.calibration import CalibrationConfig, calibration_motion
from selfalign_core.robot.contract import ActionInterface, Camera, Joint, RobotContract

CONTRACTS = Path(__file__).parents[2] / "config" / "contracts"


def contract_of(joints: list[Joint], rate_hz: float) -> RobotContract:
    camera = Camera("front", "image", "raw", 64, 64)
    action = ActionInterface("joint_trajectory", "command")
    return RobotContract("robot", (camera,), "joint_states", tuple(joints), action, rate_hz, 8, 0.2, 0.2, 0.2)


@st.composite
def robots(draw) -> tuple[RobotContract, np.ndarray]:
    """A robot of 1 to 7 joints, and a pose within its limits."""
    joints, pose = [], []
    rate = draw(st.sampled_from([10.0, 20.0, 50.0]))
    for index in range(draw(st.integers(1, 7))):
        lower = draw(st.floats(-3.0, 2.0))
        upper = lower + draw(st.floats(0.05, 5.0))
        speed = draw(st.floats(0.1, 5.0))
        step = draw(st.floats(0.2, 2.0)) * speed / rate
        pose.append(lower + draw(st.floats(0.0, 1.0)) * (upper - lower))
        joints.append(Joint(f"joint_{index}", "rad", lower, upper, speed, lower, step))
    pose = np.clip(pose, [j.lower for j in joints], [j.upper for j in joints])
    return contract_of(joints, rate), pose


CONFIGS = st.builds(
    CalibrationConfig,
    duration_s=st.floats(6.0, 20.0),
    amplitude=st.floats(0.05, 1.0),
    velocity_fraction=st.floats(0.1, 1.0),
    segment_s=st.floats(0.4, 1.5),
)


@settings(max_examples=50)
@given(robot=robots(), config=CONFIGS, seed=st.integers(0, 2**32))
def test_no_joint_leaves_its_limits_or_its_amplitude_or_is_too_fast(robot, config, seed) -> None:
    contract, start = robot
    motion = calibration_motion(contract, start, config, seed=seed)
    assert len(motion) == round(config.duration_s * contract.rate_hz)
    assert (motion >= contract.lower).all()
    assert (motion <= contract.upper).all()
    assert (np.abs(motion - start) <= config.amplitude + 1e-9).all()
    speed = np.abs(np.diff(motion, axis=0, prepend=start[None])) * contract.rate_hz
    assert (speed <= config.velocity_fraction * contract.speed_limit * (1 + 1e-6) + 1e-9).all()


@settings(max_examples=50)
@given(robot=robots(), config=CONFIGS, seed=st.integers(0, 2**32))
def test_the_motion_begins_gently_at_the_start_pose_and_returns_to_it(robot, config, seed) -> None:
    contract, start = robot
    motion = calibration_motion(contract, start, config, seed=seed)
    ends = np.stack([motion[0] - start, motion[-2] - start])
    assert (np.abs(ends) <= 0.2 * contract.speed_limit / contract.rate_hz + 1e-9).all()
    np.testing.assert_array_equal(motion[-1], start)


@settings(max_examples=50)
@given(robot=robots(), config=CONFIGS, share=st.floats(0.0, 1.0), seed=st.integers(0, 2**32))
def test_around_another_pose_it_goes_there_first_straight_and_no_faster(robot, config, share, seed) -> None:
    contract, start = robot
    around = contract.lower + share * (contract.upper - contract.lower)
    motion = calibration_motion(contract, start, config, around=around, seed=seed)
    approach, there = np.split(motion, [len(motion) - round(config.duration_s * contract.rate_hz)])
    np.testing.assert_array_equal(there, calibration_motion(contract, around, config, seed=seed))
    speed = np.abs(np.diff(motion, axis=0, prepend=start[None])) * contract.rate_hz
    assert (speed <= config.velocity_fraction * contract.speed_limit * (1 + 1e-6) + 1e-9).all()
    assert (motion >= contract.lower).all() and (motion <= contract.upper).all()
    if len(approach):
        np.testing.assert_array_equal(approach[-1], around)
        way = around - start
        shares = (approach - start) @ way / (way @ way)
        np.testing.assert_allclose(approach, start + shares[:, None] * way, atol=1e-9)
        assert (np.diff(shares, prepend=0.0) >= -1e-9).all()
    else:
        np.testing.assert_array_equal(start, around)


@settings(max_examples=50)
@given(robot=robots(), seed=st.integers(0, 2**32))
def test_every_joint_is_excited_as_far_as_its_limits_allow(robot, seed) -> None:
    contract, start = robot
    config = CalibrationConfig()
    motion = calibration_motion(contract, start, config, seed=seed)
    fastest = config.velocity_fraction * contract.speed_limit * config.segment_s / 1.875
    amplitude = np.minimum(config.amplitude, fastest / 2)
    room = np.minimum(start + amplitude, contract.upper) - np.maximum(start - amplitude, contract.lower)
    assert (np.ptp(motion, axis=0) >= 0.9 * room).all()
    assert (motion.std(0) >= 0.15 * room).all()


@pytest.mark.parametrize("name", ["sim_arm", "sim_reach"])
@pytest.mark.parametrize("seed", range(20))
def test_joints_move_independently_of_each_other(name, seed) -> None:
    contract = RobotContract.from_yaml(CONTRACTS / f"{name}.yaml")
    motion = calibration_motion(contract, contract.home, seed=seed)
    change = motion[8:] - motion[:-8]  # over a transition of 0.4 s
    correlation = np.corrcoef(change.T)[np.triu_indices(len(contract.joints), 1)]
    assert np.abs(correlation).max() < 0.75
    assert (change.std(0) >= 0.05).all()


def test_a_seed_is_a_motion() -> None:
    contract = RobotContract.from_yaml(CONTRACTS / "sim_reach.yaml")
    first, again, other = (calibration_motion(contract, contract.home, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1


@pytest.mark.parametrize(
    ("start", "words"),
    [
        ([0.0, 0.0], r"found shape \(2,\), expected \(3,\): shoulder_pan"),
        ([0.0, 1.9, 0.0], "found 1.9 rad for joint shoulder_lift, expected -1.75 to 1.75"),
        ([0.0, 0.0, float("nan")], "found nan rad for joint elbow_flex"),
    ],
)
def test_a_pose_outside_the_limits_is_refused(start, words) -> None:
    contract = RobotContract.from_yaml(CONTRACTS / "sim_reach.yaml")
    with pytest.raises(InputError, match=words):
        calibration_motion(contract, np.array(start))
    with pytest.raises(InputError, match=words.replace("start", "around")):
        calibration_motion(contract, contract.home, around=np.array(start))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"amplitude": 0.0}, "amplitude: found 0.0"),
        ({"velocity_fraction": 1.5}, "velocity_fraction: found 1.5, expected at most 1"),
        ({"duration_s": 2.0}, "expected at least 4 segments"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, words) -> None:
    with pytest.raises(ConfigError, match=words):
        CalibrationConfig(**changes)
