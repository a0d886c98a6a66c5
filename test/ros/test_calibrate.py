"""The calibration motion, with real nodes: it excites every joint, never leaves the contract's limits, ends when told.

The contract is narrow and slow and the amplitude asked for is far too large, so that any way past the limits shows.
"""

from __future__ import annotations

import numpy as np
import pytest
from node_testing import wait_for
from std_srvs.srv import Trigger

pytestmark = pytest.mark.ros

CHUNKS = "policy: chunks"
COMMANDS = "joint_trajectory_controller/joint_trajectory"
JOINTS = [
    {"name": "shoulder_pan", "unit": "rad", "lower": -0.25, "upper": 1.0, "max_velocity": 0.5, "home": 0.0},
    {"name": "shoulder_lift", "unit": "rad", "lower": -1.5, "upper": 1.5, "max_velocity": 3.0, "home": 0.0},
    {"name": "elbow_flex", "unit": "rad", "lower": -0.4, "upper": 0.4, "max_velocity": 2.0, "home": 0.0},
]
LOWER, UPPER, SPEED = (np.array([joint[key] for joint in JOINTS]) for key in ("lower", "upper", "max_velocity"))


@pytest.fixture(scope="module", autouse=True)
def running(graph, probe):
    from sensor_msgs.msg import JointState
    from trajectory_msgs.msg import JointTrajectory

    from selfalign.msg import ActionChunk
    from selfalign_ros.bridge import qos

    probe.listen(ActionChunk, "action_chunk", qos.EVENTS)
    probe.listen(JointState, "executed_action", qos.EVENTS)
    probe.listen(JointTrajectory, COMMANDS, qos.EVENTS)
    contract = graph.contract("sim_reach.yaml", max_age_s=5.0, joints=JOINTS)
    graph.start("robot_sim", contract=contract, seed=1)
    graph.start("policy", contract=contract, calibrate_duration=5, calibrate_amplitude=3)
    probe.wait_for_status(CHUNKS, "moving")


def calibrate(probe):
    return probe.call(Trigger, "policy/calibrate", Trigger.Request())


def last_calibration(probe) -> str:
    return {value.key: value.value for value in probe.status(CHUNKS).values}["last calibration"]


def executed(probe, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Times (N,) s and positions (N, joints) since message ``start``."""
    from selfalign_ros.bridge.conversions import to_ns

    messages = list(probe.messages["executed_action"])[start:]
    times = np.array([to_ns(message.header.stamp) for message in messages])
    return (times - times[0]) / 1e9, np.array([message.position for message in messages])


def assert_within_limits(probe, times: np.ndarray, positions: np.ndarray, trajectories: list) -> None:
    assert (positions >= LOWER - 1e-9).all() and (positions <= UPPER + 1e-9).all()
    # Commands a few milliseconds late are measured against the path, which keeps its own time; how far along it the
    # robot is, is of steady time, and a millisecond may pass from the reading of one clock to that of the other.
    speed = np.abs(np.diff(positions, axis=0)) / (np.diff(times) + 1e-3)[:, None]
    assert (speed <= SPEED * (1 + 1e-6)).all(), speed.max(axis=0)
    for trajectory in trajectories:
        points = np.array([point.positions for point in trajectory.points])
        due = np.array([p.time_from_start.sec + p.time_from_start.nanosec / 1e9 for p in trajectory.points])
        assert (points >= LOWER - 1e-9).all() and (points <= UPPER + 1e-9).all()
        speed = np.abs(np.diff(points, axis=0)) / np.diff(due)[:, None]
        assert (speed <= SPEED * (1 + 1e-6)).all(), speed.max(axis=0)


def test_the_motion_excites_every_joint_within_the_limits_and_hands_back(probe) -> None:
    executed_before, commands_before = len(probe.messages["executed_action"]), len(probe.messages[COMMANDS])
    response = calibrate(probe)
    assert response.success and response.message == "moving for 5 s", response.message
    again = calibrate(probe)
    assert not again.success and "is running" in again.message
    probe.wait_for_status(CHUNKS, "calibrating")
    chunks = len(probe.messages["action_chunk"])
    status = wait_for(
        lambda: (s := probe.status(CHUNKS)) and {v.key: v.value for v in s.values}["last calibration"] and s, "the end"
    )
    assert {value.key: value.value for value in status.values}["last calibration"] == "completed"
    times, positions = executed(probe, executed_before)
    assert_within_limits(probe, times, positions, list(probe.messages[COMMANDS])[commands_before:])
    # Each joint moves as far as limits and speed allow in a motion of four seconds.
    assert (np.ptp(positions, axis=0) > [0.1, 0.5, 0.2]).all(), np.ptp(positions, axis=0)
    # And the policy has the robot again.
    wait_for(lambda: len(probe.messages["action_chunk"]) >= chunks + 3, "chunks after the motion")
    probe.wait_for_status(CHUNKS, "moving")


def test_it_is_ended_without_a_hold_and_the_policy_has_the_robot_again(probe) -> None:
    refused = probe.call(Trigger, "policy/end_calibration", Trigger.Request())
    assert not refused.success and "no calibration motion is running" in refused.message
    executed_before, commands_before = len(probe.messages["executed_action"]), len(probe.messages[COMMANDS])
    assert probe.set_parameter("policy", "calibrate_duration", 60.0).successful
    assert calibrate(probe).success
    probe.wait_for_status(CHUNKS, "calibrating")
    holds = {value.key: value.value for value in probe.status(CHUNKS).values}["holds"]
    wait_for(lambda: len(probe.messages["executed_action"]) > executed_before + 40, "two seconds of motion")
    chunks = len(probe.messages["action_chunk"])
    ended = probe.call(Trigger, "policy/end_calibration", Trigger.Request())
    assert ended.success and ended.message == "the policy has the robot again"
    wait_for(lambda: len(probe.messages["action_chunk"]) >= chunks + 3, "chunks after the motion")
    probe.wait_for_status(CHUNKS, "moving")
    assert last_calibration(probe) == "ended by ~/end_calibration"
    assert {value.key: value.value for value in probe.status(CHUNKS).values}["holds"] == holds
    # The command goes on from the motion to the policy's chunks as smoothly as from chunk to chunk.
    assert_within_limits(probe, *executed(probe, executed_before), list(probe.messages[COMMANDS])[commands_before:])
    assert probe.set_parameter("policy", "calibrate_duration", 5.0).successful


def test_around_home_it_goes_there_first(probe) -> None:
    assert not probe.set_parameter("policy", "calibrate_around", "there").successful
    assert probe.set_parameter("policy", "calibrate_around", "home").successful
    assert probe.set_parameter("policy", "calibrate_amplitude", 0.02).successful
    before, commands = len(probe.messages["executed_action"]), len(probe.messages[COMMANDS])
    response = calibrate(probe)
    assert response.success and response.message.startswith("moving for "), response.message
    probe.wait_for_status(CHUNKS, "calibrating")
    wait_for(lambda: last_calibration(probe) == "completed", "the end")
    times, positions = executed(probe, before)
    assert_within_limits(probe, times, positions, list(probe.messages[COMMANDS])[commands:])
    home = np.array([joint["home"] for joint in JOINTS])
    near = (np.abs(positions - home) <= 0.02 + 1e-6).all(axis=1)
    assert np.ptp(times[near]) > 4.0  # of five seconds; the policy moves on from there
    assert probe.set_parameter("policy", "calibrate_around", "here").successful
    assert probe.set_parameter("policy", "calibrate_amplitude", 3.0).successful


def test_ended_on_its_way_home_it_gets_there_first(graph) -> None:
    from selfalign_core.robot.calibration import Calibration
    from selfalign_core.robot.contract import RobotContract

    contract = RobotContract.from_yaml(graph.contract("sim_reach.yaml", max_age_s=5.0, joints=JOINTS))
    start, settings = np.array([0.8, -1.0, 0.3]), {"duration_s": 5.0, "amplitude": 0.3, "seed": 0}
    away = Calibration.plan(contract, start, 0, around="home", **settings)
    there_ns = away.approach_steps * contract.dt_ns
    assert there_ns >= 1.875 * 0.8 / 0.5 * 1e9  # no faster than the slowest joint may
    for now_ns in (0, there_ns // 2, there_ns - 1):
        rest = away.shortened(now_ns)
        np.testing.assert_array_equal(rest.positions, away.positions[: away.approach_steps])
        np.testing.assert_array_equal(rest.piece(there_ns - 1).actions[-1], contract.home)
        assert rest.piece(there_ns) is None  # and the policy goes on
    assert away.shortened(there_ns) is None
    assert Calibration.plan(contract, start, 0, around="here", **settings).shortened(0) is None


def test_disabling_cancels_it_and_a_disabled_robot_refuses(probe) -> None:
    assert calibrate(probe).success
    probe.wait_for_status(CHUNKS, "calibrating")
    assert probe.set_parameter("policy", "enable", False).successful
    status = probe.wait_for_status(CHUNKS, "holding: disabled")
    assert {value.key: value.value for value in status.values}["last calibration"].startswith("cancelled: disabled")
    count = len(probe.messages["executed_action"])
    refused = calibrate(probe)
    assert not refused.success and "disabled" in refused.message
    probe.wait_for_diagnostics(CHUNKS, 2)
    assert len(probe.messages["executed_action"]) == count
    # The motion does not go on where it stopped.
    assert probe.set_parameter("policy", "enable", True).successful
    probe.wait_for_status(CHUNKS, "moving")


def test_another_motion_and_settings_that_change_meanwhile_keep_the_limits(probe) -> None:
    before, commands = len(probe.messages["executed_action"]), len(probe.messages[COMMANDS])
    assert calibrate(probe).success
    assert probe.set_parameter("policy", "replan_steps", 1).successful
    assert probe.set_parameter("policy", "calibrate_amplitude", 0.01).successful
    assert not probe.set_parameter("policy", "calibrate_amplitude", 100.0).successful
    wait_for(lambda: len(probe.messages["executed_action"]) > before + 60, "three seconds of motion")
    assert_within_limits(probe, *executed(probe, before), list(probe.messages[COMMANDS])[commands:])
    assert probe.set_parameter("policy", "replan_steps", 0).successful


def test_without_a_fresh_observation_it_is_cancelled_and_refused(probe, graph) -> None:
    probe.wait_for_status(CHUNKS, "moving")
    assert probe.set_parameter("policy", "calibrate_duration", 60.0).successful
    assert calibrate(probe).success
    graph.nodes["robot_sim"].kill()
    status = probe.wait_for_status(CHUNKS, "holding", "found age")
    assert "cancelled" in {value.key: value.value for value in status.values}["last calibration"]
    refused = calibrate(probe)
    assert not refused.success and "found age" in refused.message
