"""The whole graph in real processes: outputs appear, parameters tune, and the policy survives its neighbours."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Iterator

import numpy as np
import pytest
from graph_assertions import QUICK_ALIGNER, from_xml, wait_for_accepted_token
from node_testing import ROOT, wait_for
from rclpy.context import Context
from rclpy.node import Node
from std_srvs.srv import Trigger

from selfalign_ros.tools.security_policy import interface_of

pytestmark = pytest.mark.ros

COMMANDS = "joint_trajectory_controller/joint_trajectory"
ALIGNER = QUICK_ALIGNER | {"align_frequency": 2.0}


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
    from selfalign_ros.bridge import qos

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


def wait_for_chunk(probe, version: int) -> None:
    wait_for(lambda: probe.messages["action_chunk"][-1].e_token_version == version, f"a chunk with version {version}")


def count_from_now(probe, topic: str, enough: int) -> None:
    start = len(probe.messages[topic])
    wait_for(lambda: len(probe.messages[topic]) >= start + enough, f"{enough} more messages on {topic}")


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
    from selfalign_ros.bridge.conversions import to_ns

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
    report = wait_for_accepted_token(probe)
    assert report.version_after == report.version_before + 1
    assert report.embodiment == "sim_arm"
    assert report.attempted and report.guard_count == 4 and 1 <= report.fit_count <= 4
    assert report.steps == 2
    version = report.version_after
    wait_for(lambda: probe.messages["action_chunk"][-1].e_token_version >= version, f"chunk with version {version}")


def test_every_stage_is_reported_in_words_and_numbers(probe) -> None:
    def reports(condition) -> list:
        return [report for report in list(probe.messages["align_report"]) if condition(report)]

    counting = wait_for(lambda: reports(lambda r: r.text.startswith("collecting: ")), "a report of collection")[0]
    assert counting.state == "collect" and not counting.attempted and not counting.joints
    attempt = wait_for(lambda: reports(lambda r: r.attempted), "a report of an attempt")[0]
    assert attempt.text.split(":")[0] in ("accepted", "refused") and attempt.start
    assert list(attempt.joints) == list(probe.messages["joint_states"][-1].name)
    assert len(attempt.command_spread) == len(attempt.motion_spread) == len(attempt.joints)
    assert attempt.guard_before.total > 0 and attempt.guard_after.total > 0 and attempt.e_token_norm > 0
    assert -2 <= attempt.difference_mean <= 2
    # What differs at all from the current token passes a guard without margin in about half of the attempts; the others
    # are followed by a watch.
    refused = wait_for(
        lambda: reports(lambda r: r.attempted and not r.accepted) or not wait_for_accepted_token(probe), "a refusal"
    )[0]
    assert refused.state == "watch" and refused.version_after == refused.version_before
    watched = wait_for(lambda: reports(lambda r: r.drift_tested), "a drift test")[0]
    assert watched.drift_factor > 0 and "standard errors" in watched.text


@contextlib.contextmanager
def observer() -> Iterator[Node]:
    """A node of a participant of its own, new to the graph."""
    context = Context()
    context.init()
    node = Node("observer", context=context)
    try:
        yield node
    finally:
        node.destroy_node()
        context.shutdown()


def test_security_policy_allows_what_the_nodes_use_and_nothing_else() -> None:
    committed = from_xml((ROOT / "config" / "sros2" / "policies.xml").read_text())
    assert set(committed) == {"/policy", "/buffer", "/aligner", "/robot_sim"}
    found = {}

    def is_as_committed(node: Node) -> bool:
        found.update({name: interface_of(node, name) for name in committed})
        return found == committed

    for _ in range(3):  # a participant that missed what another one told of its endpoints is not told again
        with observer() as node, contextlib.suppress(pytest.fail.Exception):  # what differs is shown below
            wait_for(lambda node=node: is_as_committed(node), "the interfaces of all nodes", 20.0)
            break
    for name, expected in committed.items():
        assert found[name] == expected, f"{name}: run `make sros2-policies`"


def test_align_frequency_takes_effect_at_once(probe) -> None:
    assert probe.set_parameter("aligner", "align_frequency", 0.001).successful
    # Whatever was running has ended once the diagnostics have come round; then nothing starts for 1000 s ...
    probe.wait_for_diagnostics("aligner: align", 2)
    reports = len(probe.messages["align_report"])
    probe.wait_for_diagnostics("aligner: align", 1)
    assert len(probe.messages["align_report"]) == reports
    # ... except by request, or when the parameter says so.
    response = probe.call(Trigger, "aligner/align_now", Trigger.Request())
    assert response.success, response.message
    wait_for(lambda: len(probe.messages["align_report"]) == reports + 1, "the report of the requested round")
    assert probe.messages["align_report"][-1].text == response.message
    assert probe.set_parameter("aligner", "align_frequency", 5).successful  # a whole number will do
    count_from_now(probe, "align_report", 3)


def test_settings_of_the_stages_take_effect_at_once(probe) -> None:
    assert probe.set_parameter("aligner", "refine_steps", 3).successful
    assert probe.set_parameter("aligner", "collect_guard_count", 5).successful
    count = len(probe.messages["align_report"])

    def with_new_settings(steps: int) -> bool:
        """Whether there was such an attempt; the first one may have begun with the old settings."""
        probe.call(Trigger, "aligner/align_now", Trigger.Request())
        tried = [report for report in list(probe.messages["align_report"])[count:] if report.attempted]
        return any((report.steps, report.guard_count) == (steps, 5) for report in tried)

    wait_for(lambda: with_new_settings(3), "an attempt with 3 steps and 5 transitions to judge by")
    assert probe.set_parameter("aligner", "mode", "bank").successful
    wait_for(lambda: with_new_settings(0), "an attempt in mode bank")
    assert probe.set_parameter("aligner", "mode", "subspace").successful


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("align_frequency", -1.0, ["align_frequency", "-1.0", "50.0"]),
        ("refine_learning_rate", float("nan"), ["refine_learning_rate", "nan", "10.0"]),
        ("mode", "best", ["mode", "best", "bank, subspace, full"]),
        ("collect_guard_count", 1, ["collect_guard_count", "1", "4096"]),
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


def sample(probe, **options):
    from selfalign.srv import SampleTransitions

    request = SampleTransitions.Request(**({"count": 8, "stride": 2, "least": 4} | options))
    return probe.call(SampleTransitions, "buffer/sample_transitions", request)


def test_buffer_serves_whole_batches(probe) -> None:
    response = wait_for(lambda: (r := sample(probe)).found >= 4 and r, "four transitions")
    assert response.success, response.message
    frames = len(response.frame_stamps)
    assert len(response.frames) == frames * len(response.cameras) * response.height * response.width * 3
    assert len(response.obs_index) == len(response.next_index) == response.found <= 8
    begins = np.array(response.frame_stamps)[np.array(response.obs_index)]
    assert (np.diff(begins) > 0).all()


def test_buffer_sends_no_frames_that_nobody_needs(probe) -> None:
    wait_for(lambda: sample(probe).found == 8, "eight transitions")
    few = sample(probe, least=9)
    assert (few.success, few.found, len(few.frames)) == (True, 8, 0)
    old = sample(probe, newer_than_ns=2**62)
    assert (old.success, old.found, len(old.frames)) == (True, 8, 0)
    none = sample(probe, since_ns=2**62)
    assert (none.success, none.found, len(none.frames)) == (True, 0, 0)
    bad = sample(probe, stride=0)
    assert not bad.success and "stride: found 0" in bad.message


def test_a_token_can_be_rolled_back_and_reset(probe) -> None:
    def digest(version: int) -> bytes:
        tokens = probe.messages["e_token"]
        wait_for(lambda: tokens and tokens[-1].version >= version, f"E-Token version {version}")
        return next(token.data.tobytes() for token in reversed(list(tokens)) if token.version == version)

    # No attempt of its own in between.
    assert probe.set_parameter("aligner", "enable", False).successful
    first = wait_for_accepted_token(probe)
    before = digest(first.version_before)
    response = probe.call(Trigger, "aligner/rollback", Trigger.Request())
    version = first.version_after + 1
    assert response.success and response.message == f"in use as E-Token version {version}"
    assert digest(version) == before != digest(first.version_after)
    wait_for_chunk(probe, version)

    response = probe.call(Trigger, "aligner/reset", Trigger.Request())
    if before != digest(0):
        assert response.success and digest(version + 1) == digest(0)
        wait_for_chunk(probe, version + 1)
    response = probe.call(Trigger, "aligner/reset", Trigger.Request())
    assert not response.success and "found the policy's own token in use" in response.message
    response = probe.call(Trigger, "aligner/save", Trigger.Request())
    assert not response.success and "token_folder" in response.message
    assert probe.set_parameter("aligner", "enable", True).successful


@pytest.mark.parametrize(
    ("points", "reason"),
    [([], "no points"), ([float("nan")] * 7, "finite"), ([0.0] * 6, "expected 7")],
    ids=["empty", "nan", "short"],
)
def test_robot_refuses_a_malformed_command_and_says_why(probe, graph, points, reason) -> None:
    from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

    from selfalign_ros.bridge import qos

    message = JointTrajectory(joint_names=list(probe.messages["joint_states"][-1].name))
    if points:
        message.points = [JointTrajectoryPoint(positions=points)]
    publisher = probe.publisher(JointTrajectory, COMMANDS, qos.COMMAND)
    wait_for(lambda: publisher.get_subscription_count() >= 1, "the robot listens to commands")
    publisher.publish(message)
    wait_for(lambda: reason in graph.nodes["robot_sim"].log, f"the robot says {reason!r}")
    probe.node.destroy_publisher(publisher)


def test_the_aligner_may_ask_for_motion_when_there_is_too_little_and_ends_it_when_it_has_enough(probe, graph) -> None:
    assert probe.set_parameter("policy", "calibrate_duration", 120.0).successful
    assert probe.set_parameter("aligner", "collect_min_command", 10.0).successful
    probe.call(Trigger, "aligner/align_now", Trigger.Request())  # out of a rest, if it is in one
    probe.wait_for_status("aligner: align", "waiting for motion", "expected at least 10.000")
    assert "calibration motion" not in graph.nodes["policy"].log  # nobody has allowed it
    assert probe.set_parameter("aligner", "auto_calibrate_after", 1.0).successful
    assert probe.set_parameter("aligner", "auto_calibrate", True).successful
    wait_for(lambda: "calibration motion: moving for 120 s" in graph.nodes["policy"].log, "the motion")
    wait_for(lambda: "asked for motion (waiting for motion" in graph.nodes["aligner"].log, "the aligner says so")
    assert probe.set_parameter("aligner", "collect_min_command", 0.0).successful
    wait_for(lambda: "calibration motion ended by ~/end_calib" in graph.nodes["policy"].log, "the end of the motion")
    assert probe.set_parameter("aligner", "auto_calibrate", False).successful


def test_killed_aligner_leaves_the_policy_running_and_goes_on_from_its_version(probe, graph, contract_path) -> None:
    wait_for(lambda: probe.messages["action_chunk"][-1].e_token_version >= 2, "chunks with an accepted token")
    graph.nodes["aligner"].stop(signal.SIGKILL)
    count_from_now(probe, "action_chunk", 3)
    version = probe.messages["action_chunk"][-1].e_token_version
    graph.start("aligner", contract=contract_path, **ALIGNER)
    # Its first reports may come before they are listened to.
    begun = wait_for(lambda: re.search(r"continuing from E-Token version (\d+)\n", graph.nodes["aligner"].log), "that")
    # The token accepted last may have reached the policy after the chunk above.
    assert int(begun[1]) in (version, version + 1)
    report = wait_for_accepted_token(probe)
    wait_for(lambda: probe.messages["action_chunk"][-1].e_token_version >= report.version_after, "chunks with it")


def test_accepted_tokens_survive_a_restart_of_everything(probe, graph, contract_path, tmp_path) -> None:
    graph.nodes["aligner"].stop(signal.SIGKILL)
    probe.messages["align_report"].clear()
    graph.start("aligner", contract=contract_path, token_folder=tmp_path, **ALIGNER)
    # A call before it is heard could go to the one that was killed.
    wait_for(lambda: probe.messages["align_report"], "a round of the restarted aligner")
    report = wait_for_accepted_token(probe)
    assert probe.set_parameter("aligner", "enable", False).successful
    response = probe.call(Trigger, "aligner/save", Trigger.Request())
    path = tmp_path / "sim_arm.safetensors"
    assert response.success and response.message.endswith(f"saved to {path}") and path.is_file()
    version = int(response.message.split()[2])
    assert version >= report.version_after
    saved = next(t.data.tobytes() for t in reversed(list(probe.messages["e_token"])) if t.version == version)

    def kill_both() -> None:
        for name in ("aligner", "policy"):
            graph.nodes[name].stop(signal.SIGKILL)
        probe.messages["e_token"].clear()
        probe.messages["action_chunk"].clear()

    kill_both()
    # A policy that starts afresh has its own token, version 0, until the aligner hands it the saved one.
    graph.start("policy", contract=contract_path, token_folder=tmp_path)
    graph.start("aligner", contract=contract_path, token_folder=tmp_path, **ALIGNER, enable=False)
    wait_for(lambda: probe.messages["e_token"], "an E-Token")
    assert probe.messages["e_token"][0].version == version
    assert probe.messages["e_token"][0].data.tobytes() == saved
    wait_for(lambda: probe.messages["action_chunk"], "a chunk")
    wait_for_chunk(probe, version)
    # What it was handed it has kept itself: the aligner may be on another machine, or gone. Nobody asked it to save.
    assert (tmp_path / "sim_arm_in_use.safetensors").is_file()
    kill_both()
    graph.start("policy", contract=contract_path, token_folder=tmp_path)
    wait_for(lambda: probe.messages["action_chunk"], "a chunk")
    assert {chunk.e_token_version for chunk in probe.messages["action_chunk"]} == {version}


def test_a_saved_token_that_does_not_fit_is_named_and_left_alone(probe, graph, contract_path, tmp_path) -> None:
    path = tmp_path / "sim_arm.safetensors"
    path.write_bytes(b"not a token")
    graph.nodes["aligner"].stop(signal.SIGKILL)
    probe.messages["align_report"].clear()
    node = graph.start("aligner", contract=contract_path, token_folder=tmp_path, **ALIGNER)
    wait_for(lambda: probe.messages["align_report"], "a round of the aligner all the same")
    assert f"saved E-Token {path} not used" in node.log
    # It goes on from the policy's token, which is saved in its place; what was found there is kept.
    wait_for(lambda: (tmp_path / "sim_arm.safetensors.refused").exists(), "the file is moved aside")
    assert (tmp_path / "sim_arm.safetensors.refused").read_bytes() == b"not a token"


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
