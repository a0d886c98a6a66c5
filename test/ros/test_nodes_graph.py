"""The whole graph in real processes: outputs appear, parameters tune, and the policy survives its neighbours."""

from __future__ import annotations

import signal

import numpy as np
import pytest
from node_testing import wait_for

pytestmark = pytest.mark.ros

COMMANDS = "joint_trajectory_controller/joint_trajectory"
# Few optimiser steps on few transitions, and no giving way to others: what is tested is the graph, not the result.
ALIGNER = {
    "niceness": 0,
    "align_frequency": 2.0,
    "steps": 2,
    "batch_size": 4,
    "holdout_size": 4,
    "guard_draws": 2,
    "guard_sigmas": 0.0,
}


@pytest.fixture(scope="module")
def contract_path(graph):
    return graph.contract()


@pytest.fixture(scope="module", autouse=True)
def running(graph, probe, contract_path):
    """The four nodes, once for all tests of this file."""
    from sensor_msgs.msg import JointState
    from std_msgs.msg import Float64
    from trajectory_msgs.msg import JointTrajectory

    from selfalign.msg import ActionChunk, AlignReport, EToken
    from selfalign_ros import qos

    probe.listen(ActionChunk, "action_chunk", qos.EVENTS)
    probe.listen(AlignReport, "align_report", qos.EVENTS)
    probe.listen(EToken, "e_token", qos.LATCHED)
    probe.listen(JointState, "executed_action", qos.EVENTS)
    probe.listen(JointState, "joint_states", qos.SENSOR)
    probe.listen(JointTrajectory, COMMANDS, qos.EVENTS)
    probe.listen(Float64, "distance_to_target", 10)
    graph.start("robot_sim", contract=contract_path)
    graph.start("policy", contract=contract_path)
    graph.start("buffer", contract=contract_path)
    graph.start("aligner", contract=contract_path, **ALIGNER)


def count_from_now(probe, topic: str, enough: int) -> None:
    start = len(probe.messages[topic])
    wait_for(lambda: len(probe.messages[topic]) >= start + enough, f"{enough} more messages on {topic}")


def accepted(probe) -> list:
    return [report for report in probe.messages["align_report"] if report.accepted]


@pytest.mark.parametrize(
    "topic", ["joint_states", "distance_to_target", "action_chunk", COMMANDS, "executed_action", "align_report"]
)
def test_output_appears(probe, topic: str) -> None:
    wait_for(lambda: len(probe.messages[topic]) >= 3, f"three messages on {topic}")


def test_robot_follows_the_trajectories(probe) -> None:
    count_from_now(probe, "executed_action", 20)
    commanded, measured = probe.messages["executed_action"][-1], probe.messages["joint_states"][-1]
    assert list(commanded.name) == list(measured.name)
    # It is a servo and follows with some error; without commands it would stand still at its start pose.
    assert np.abs(np.array(commanded.position) - np.array(measured.position)).max() < 0.3
    positions = np.array([message.position for message in probe.messages["joint_states"]])
    assert np.ptp(positions, axis=0).max() > 0.01


def test_trajectory_starts_in_the_future_and_ends_with_its_chunk(probe) -> None:
    from selfalign_ros.conversions import to_ns

    chunks = {to_ns(chunk.header.stamp): chunk for chunk in list(probe.messages["action_chunk"])}
    trajectories = [t for t in list(probe.messages[COMMANDS]) if to_ns(t.header.stamp) in chunks]
    assert trajectories
    for trajectory in trajectories:
        chunk = chunks[to_ns(trajectory.header.stamp)]
        times = [to_ns(point.time_from_start) / 1e9 for point in trajectory.points]
        assert times == sorted(times)
        # Everything that was past when the chunk was ready has been dropped.
        assert times[0] >= chunk.inference_duration
        assert times[-1] == pytest.approx((chunk.horizon - 1) * chunk.dt, abs=1e-6)


def test_token_version_rises_and_chunks_follow(probe) -> None:
    wait_for(lambda: len(accepted(probe)) >= 2, "two accepted align calls")
    report = accepted(probe)[-1]
    assert report.version_after == report.version_before + 1
    assert report.embodiment == "sim_arm"
    assert (report.fit_count, report.holdout_count) == (4, 4)
    assert report.steps == 2
    version = report.version_after
    wait_for(lambda: probe.messages["action_chunk"][-1].e_token_version >= version, f"chunk with version {version}")


def test_align_frequency_takes_effect_at_once(probe) -> None:
    assert probe.set_parameter("aligner", "align_frequency", 0.001).successful
    from std_srvs.srv import Trigger

    # Whatever was running has ended once the diagnostics have come round; then nothing starts for 1000 s ...
    probe.wait_for_diagnostics("aligner: align", 2)
    reports = len(probe.messages["align_report"])
    probe.wait_for_diagnostics("aligner: align", 1)
    assert len(probe.messages["align_report"]) == reports
    # ... except by request, or when the parameter says so.
    response = probe.call(Trigger, "aligner/align_now", Trigger.Request())
    assert response.success, response.message
    wait_for(lambda: len(probe.messages["align_report"]) == reports + 1, "the report of the requested call")
    assert probe.set_parameter("aligner", "align_frequency", 5).successful  # a whole number will do
    count_from_now(probe, "align_report", 3)


def test_steps_take_effect_at_once(probe) -> None:
    assert probe.set_parameter("aligner", "steps", 3).successful
    wait_for(lambda: probe.messages["align_report"][-1].steps == 3, "an align call of three steps")


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("align_frequency", -1.0, ["align_frequency", "-1.0", "50.0"]),
        ("learning_rate", float("nan"), ["learning_rate", "nan", "10.0"]),
        ("lambda_inv", -3.0, ["lambda_inv", "-3.0"]),
        ("niceness", 3, ["read-only", "niceness"]),
    ],
)
def test_bad_parameter_is_refused_with_a_reason(probe, name, value, parts) -> None:
    result = probe.set_parameter("aligner", name, value)
    assert not result.successful
    for part in parts:
        assert part in result.reason


def test_parameters_that_make_no_sense_together_are_refused(probe) -> None:
    assert probe.set_parameter("aligner", "lambda_perc", 0.0).successful
    assert probe.set_parameter("aligner", "lambda_dyn", 0.0).successful
    result = probe.set_parameter("aligner", "lambda_inv", 0.0)
    assert not result.successful
    assert "at least one above 0" in result.reason


def test_parameters_describe_themselves(probe) -> None:
    from rcl_interfaces.srv import DescribeParameters

    request = DescribeParameters.Request(names=["align_frequency"])
    (descriptor,) = probe.call(DescribeParameters, "aligner/describe_parameters", request).descriptors
    assert "[Hz]" in descriptor.description
    assert descriptor.floating_point_range[0].to_value == 50.0


def test_buffer_says_how_many_transitions_there_are(probe) -> None:
    from selfalign.srv import SampleTransitions

    request = SampleTransitions.Request(fit_size=4, holdout_size=4000, seed=1)
    response = probe.call(SampleTransitions, "buffer/sample_transitions", request)
    assert not response.success
    assert "transitions" in response.message


def test_buffer_serves_whole_batches(probe) -> None:
    from selfalign.srv import SampleTransitions

    request = SampleTransitions.Request(fit_size=4, holdout_size=4, seed=1)
    response = probe.call(SampleTransitions, "buffer/sample_transitions", request)
    assert response.success, response.message
    frames = len(response.frame_stamps)
    assert len(response.frames) == frames * len(response.cameras) * response.height * response.width * 3
    assert len(response.obs_index) == len(response.next_index) == 8
    assert response.fit_count == 4


@pytest.mark.parametrize(
    ("points", "reason"),
    [([], "no points"), ([float("nan")] * 7, "finite"), ([0.0] * 6, "expected 7")],
    ids=["empty", "nan", "short"],
)
def test_robot_refuses_a_malformed_command_and_says_why(probe, graph, points, reason) -> None:
    from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

    from selfalign_ros import qos

    message = JointTrajectory(joint_names=list(probe.messages["joint_states"][-1].name))
    if points:
        message.points = [JointTrajectoryPoint(positions=points)]
    publisher = probe.publisher(JointTrajectory, COMMANDS, qos.COMMAND)
    wait_for(lambda: publisher.get_subscription_count() >= 1, "the robot listens to commands")
    publisher.publish(message)
    wait_for(lambda: reason in graph.nodes["robot_sim"].log, f"the robot says {reason!r}")
    probe.node.destroy_publisher(publisher)


def test_killed_aligner_leaves_the_policy_running_and_goes_on_from_its_version(probe, graph, contract_path) -> None:
    graph.nodes["aligner"].stop(signal.SIGKILL)
    count_from_now(probe, "action_chunk", 3)
    version = probe.messages["action_chunk"][-1].e_token_version
    assert version >= 2
    graph.start("aligner", contract=contract_path, **ALIGNER)
    probe.messages["align_report"].clear()
    wait_for(lambda: accepted(probe), "an accepted align call of the restarted aligner")
    assert accepted(probe)[0].version_before == version
    wait_for(lambda: probe.messages["action_chunk"][-1].e_token_version > version, "chunks with a newer version")


def test_killed_robot_stops_the_policy_and_a_restarted_one_moves_again(probe, graph, contract_path) -> None:
    graph.nodes["robot_sim"].stop(signal.SIGKILL)
    probe.wait_for_status("policy: chunks", "holding", "found age")
    graph.start("robot_sim", contract=contract_path)
    probe.wait_for_status("policy: chunks", "moving")


def test_every_node_ends_cleanly_on_a_signal(graph, probe) -> None:
    for number, kind in [
        (signal.SIGINT, "policy"),
        (signal.SIGTERM, "aligner"),
        (signal.SIGINT, "buffer"),
        (signal.SIGTERM, "robot_sim"),
    ]:
        node = graph.nodes[kind]
        assert node.stop(number) == 0, node.log
        assert "Traceback" not in node.log, node.log
