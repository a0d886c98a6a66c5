"""The simulated robot on a contract that names three of its joints: what it holds, refuses and counts."""

from __future__ import annotations

import re

import numpy as np
import pytest
from node_testing import wait_for

COMMANDS = "joint_trajectory_controller/joint_trajectory"
COMMANDED = ["shoulder_pan", "shoulder_lift", "elbow_flex"]
HELD = ["forearm_roll", "wrist_flex", "wrist_roll", "gripper"]
SAG = 0.02  # rad: a servo under load, or shaken by the other joints, is off by no more
EPISODE_S = 1.0


@pytest.fixture(scope="module", autouse=True)
def robot(graph, probe):
    from sensor_msgs.msg import JointState
    from std_msgs.msg import Bool, Float64, String
    from trajectory_msgs.msg import JointTrajectory

    from selfalign_ros.bridge import qos

    probe.listen(JointState, "joint_states", qos.SENSOR)
    probe.listen(Float64, "distance_to_target", 100)
    probe.listen(Bool, "target_reached", 100)
    probe.listen(String, "prompt", qos.LATCHED)
    probe.listen(String, "body", qos.LATCHED)
    probe.listen(JointTrajectory, "followed_command", qos.RECENT_EVENTS)
    return graph.start("robot_sim", contract=graph.contract("sim_reach.yaml"), episode_seconds=EPISODE_S, seed=3)


@pytest.fixture(scope="module")
def commands(probe, robot):
    from trajectory_msgs.msg import JointTrajectory

    from selfalign_ros.bridge import qos

    publisher = probe.publisher(JointTrajectory, COMMANDS, qos.COMMAND)
    wait_for(lambda: publisher.get_subscription_count() >= 1, "the robot listens to commands")
    return publisher


def trajectory(positions: dict[str, float], seconds: float = 0.5):
    from builtin_interfaces.msg import Duration
    from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

    due = Duration(nanosec=round(seconds * 1e9))
    point = JointTrajectoryPoint(positions=list(positions.values()), time_from_start=due)
    return JointTrajectory(joint_names=list(positions), points=[point])


def measured(probe, names: list[str]) -> np.ndarray:
    """(messages, names) of every joint state heard so far."""
    messages = list(probe.messages["joint_states"])
    return np.array([[message.position[list(message.name).index(name)] for name in names] for message in messages])


def test_every_joint_is_measured_the_commanded_ones_first(probe) -> None:
    wait_for(lambda: probe.messages["joint_states"], "joint states")
    assert list(probe.messages["joint_states"][0].name) == COMMANDED + HELD


def test_joints_that_are_not_commanded_hold_the_pose_they_start_in(probe, commands) -> None:
    """Swung to and fro as fast as the contract allows, from the first joint state on."""
    wait_for(lambda: len(probe.messages["joint_states"]) >= 20, "joint states before any command")
    before = measured(probe, COMMANDED)
    for target in (0.8, -0.8, 0.4):
        commands.publish(trajectory(dict.fromkeys(reversed(COMMANDED), target)))
        wait_for(lambda: np.abs(measured(probe, COMMANDED)[-1] - target).max() < 0.1, f"the arm at {target}")  # noqa: B023
    assert np.ptp(before, axis=0).max() < SAG  # no command, no motion
    held = measured(probe, HELD)
    assert np.abs(held - held[0]).max() < SAG, np.abs(held - held[0]).max(axis=0)
    wait_for(lambda: len(probe.messages["followed_command"]) == 3, "the robot's own word for it")
    assert [m.points[-1].positions[0] for m in probe.messages["followed_command"]] == [0.8, -0.8, 0.4]


@pytest.mark.parametrize(
    "names",
    [[*COMMANDED, "wrist_flex"], [*COMMANDED, *HELD], COMMANDED[:2], ["shoulder_pan", "shoulder_lift", "wrist_flex"]],
    ids=["one_more", "all", "too_few", "another"],
)
def test_a_command_for_other_joints_than_the_contracts_is_refused_and_moves_nothing(
    probe, commands, robot, names: list[str]
) -> None:
    wait_for(lambda: np.ptp(measured(probe, COMMANDED)[-20:], axis=0).max() < 0.001, "the arm at rest")
    start = measured(probe, COMMANDED + HELD)[-1]
    refusals = robot.log.count("command refused")
    commands.publish(trajectory(dict.fromkeys(names, -0.9), seconds=0.05))
    wait_for(lambda: robot.log.count("command refused") > refusals, "the refusal")
    said = [line for line in robot.log.splitlines() if "command refused" in line][-1]
    assert f"found joints {names}; expected {COMMANDED}" in said
    count = len(probe.messages["joint_states"])
    wait_for(lambda: len(probe.messages["joint_states"]) > count + 20, "more joint states")
    assert np.abs(measured(probe, COMMANDED + HELD)[-1] - start).max() < SAG
    assert names not in [list(message.joint_names) for message in probe.messages["followed_command"]]


def test_a_contract_with_a_joint_the_arm_does_not_have_is_refused(graph, ros_domain: int, tmp_path) -> None:
    from node_testing import NodeGraph

    other = NodeGraph(tmp_path)
    joint = {"name": "elbow_roll", "unit": "rad", "lower": -1.0, "upper": 1.0, "max_velocity": 1.0, "home": 0.0}
    node = other.start("robot_sim", contract=other.contract("sim_reach.yaml", joints=[joint]))
    assert node.process.wait(60) == 2
    assert "contract joints[0].name: found 'elbow_roll'; expected one of shoulder_pan" in node.log


def test_targets_follow_one_another_and_are_counted(probe, robot) -> None:
    """Nobody reaches for them: time is over for one after another, and each gets a prompt of its own."""
    wait_for(lambda: len(probe.messages["target_reached"]) >= 3, "three targets are over")
    assert not any(message.data for message in probe.messages["target_reached"])
    wait_for(lambda: len(probe.messages["prompt"]) >= 3, "their prompts")
    assert {message.data for message in probe.messages["prompt"]} <= {
        "reach the red cube", "reach the green cube", "reach the blue cube"
    }  # fmt: skip
    assert "0 of 3 targets reached" in robot.log


def test_a_target_counts_as_reached_when_the_tip_stays_near(probe, robot) -> None:
    assert probe.set_parameter("robot_sim", "reach_distance", 1.0).successful  # anywhere is near enough now
    count = len(probe.messages["target_reached"])
    wait_for(lambda: len(probe.messages["target_reached"]) >= count + 3, "three more targets are over")
    assert all(message.data for message in probe.messages["target_reached"][count + 1 :])
    line = next(line for line in robot.log.splitlines() if ": reached the " in line)
    assert "targets reached)" in line


def test_the_order_of_targets_depends_on_the_seed_alone(probe, robot) -> None:
    """The log says it from the first one on; who listens to the prompts may have come too late for the first ones."""
    from selfalign_core.sim import ArmSim, prompt_for

    heard = [message.data for message in probe.messages["prompt"]]
    over = re.findall(r"(?:reached|did not reach) the (\w+) cube in", robot.log)
    assert len(over) >= 3
    sim = ArmSim(seed=3)
    targets = [sim.target]
    for number in range(1, len(over) + 3):
        rng = np.random.default_rng([3, number])
        while sim.target == targets[-1]:  # never the same twice in a row
            sim.reset_targets(rng)
        targets.append(sim.target)
    sim.close()
    assert [f"{colour} cube" for colour in over] == targets[: len(over)]
    prompts = [prompt_for(target) for target in targets]
    assert len(heard) >= 4
    assert any(heard == prompts[missed : missed + len(heard)] for missed in range(3)), (heard, prompts)


def set_body(probe, body: str):
    from selfalign.srv import SetBody

    return probe.call(SetBody, "robot_sim/set_body", SetBody.Request(body=body))


def test_the_body_changes_while_it_runs_and_everyone_is_told(probe, robot, commands) -> None:
    assert [message.data for message in probe.messages["body"]] == ["nominal"]
    commands.publish(trajectory(dict.fromkeys(COMMANDED, 0.5)))
    wait_for(lambda: np.abs(measured(probe, COMMANDED)[-1] - 0.5).max() < 0.1, "the arm at 0.5")
    response = set_body(probe, "{name: turned, joints: {shoulder_pan: {sign: -1, offset: 0.2}}}")
    assert response.success and response.message == "body 'turned' is in force"
    wait_for(lambda: probe.messages["body"][-1].data == "turned", "the new body's name")
    assert "body changed from 'nominal' to 'turned'" in robot.log
    # The arm stays where it is: q = 0.5, which the new encoder calls -(0.5 - 0.2).
    wait_for(lambda: np.abs(measured(probe, COMMANDED)[-1] - [-0.3, 0.5, 0.5]).max() < 0.1, "the new encoder's reading")
    held = measured(probe, HELD)
    assert np.abs(held[-1] - held[0]).max() < 2 * SAG
    # Commands are the new body's.
    commands.publish(trajectory(dict.fromkeys(COMMANDED, 0.4)))
    wait_for(lambda: np.abs(measured(probe, COMMANDED)[-1] - 0.4).max() < 0.1, "the arm at 0.4 of the new body")
    assert set_body(probe, "bodies/nominal.yaml").success
    wait_for(lambda: probe.messages["body"][-1].data == "nominal", "the nominal body's name")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("bodies/none.yaml", "file 'bodies/none.yaml': found neither"),
        ("{name: bent, arms: 2}", "arms: found an unknown key (2)"),
        ("{name: bent, payload: -3}", "payload: found -3"),
        ("payload: 0.1", "name: found nothing"),
        ("{name: [", "invalid YAML"),
    ],
)
def test_a_body_that_is_none_is_refused_and_nothing_changes(probe, robot, body: str, reason: str) -> None:
    names = len(probe.messages["body"])
    response = set_body(probe, body)
    assert not response.success and reason in response.message, response.message
    count = len(probe.messages["joint_states"])
    wait_for(lambda: len(probe.messages["joint_states"]) > count + 5, "more joint states")
    assert len(probe.messages["body"]) == names
