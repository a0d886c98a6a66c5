"""The nodes as managed nodes: what each transition does, what a failed one leaves behind, that nobody falls silent."""

from __future__ import annotations

import shutil

import pytest
from node_testing import ROOT, wait_for

pytestmark = pytest.mark.ros

POLICY = ROOT / "policies" / "tiny_reach"
KINDS = ("policy", "buffer", "aligner")


@pytest.fixture(scope="module")
def contract_path(graph):
    """Of the shipped policy, with age limits that a busy machine can keep."""
    return graph.contract("sim_reach.yaml", max_age_s=2.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Where the nodes look for their checkpoint; nothing is there yet."""
    return tmp_path_factory.mktemp("checkpoint") / "policy"


@pytest.fixture(scope="module", autouse=True)
def running(graph, probe, contract_path, checkpoint):
    from lifecycle_msgs.msg import TransitionEvent
    from sensor_msgs.msg import JointState
    from trajectory_msgs.msg import JointTrajectory

    from selfalign.msg import ActionChunk, EToken
    from selfalign_ros.bridge import qos

    probe.listen(ActionChunk, "action_chunk", qos.EVENTS)
    probe.listen(EToken, "e_token", qos.LATCHED)
    probe.listen(JointState, "executed_action", qos.EVENTS)
    probe.listen(JointTrajectory, "joint_trajectory_controller/joint_trajectory", qos.EVENTS)
    for kind in KINDS:
        probe.listen(TransitionEvent, f"{kind}/transition_event", 10)
    graph.start("robot_sim", contract=contract_path)
    for kind in KINDS:
        graph.start(kind, contract=contract_path, checkpoint=checkpoint, autostart=False, niceness=0)


def change(probe, node: str, label: str) -> bool:
    from lifecycle_msgs.msg import Transition
    from lifecycle_msgs.srv import ChangeState

    request = ChangeState.Request(transition=Transition(label=label))
    return probe.call(ChangeState, f"{node}/change_state", request).success


def state(probe, node: str) -> str:
    from lifecycle_msgs.srv import GetState

    return probe.call(GetState, f"{node}/get_state", GetState.Request()).current_state.label


def interfaces(probe, node: str) -> set[str]:
    """Topics and services of a node other than those every node has."""
    ours, namespace = probe.node, "/"
    found = [
        *ours.get_publisher_names_and_types_by_node(node, namespace),
        *ours.get_subscriber_names_and_types_by_node(node, namespace),
        *ours.get_service_names_and_types_by_node(node, namespace),
        *ours.get_client_names_and_types_by_node(node, namespace),
    ]
    return {name for name, _ in found}


@pytest.mark.parametrize("kind", KINDS)
def test_without_autostart_a_node_waits_and_has_no_interface_of_its_own(probe, kind: str) -> None:
    assert state(probe, kind) == "unconfigured"
    probe.wait_for_status(f"{kind}: lifecycle", "unconfigured")
    names = interfaces(probe, kind)
    assert "/action_chunk" not in names and "/e_token" not in names and "/buffer/sample_transitions" not in names


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_configure_says_why_and_leaves_nothing_behind(probe, graph, kind: str) -> None:
    state(probe, kind)
    before = interfaces(probe, kind)
    assert not change(probe, kind, "configure")
    assert state(probe, kind) == "unconfigured"
    log = graph.nodes[kind].log
    assert "Traceback" in log and "checkpoint" in log
    probe.wait_for_status(f"{kind}: lifecycle", "configuring failed", "checkpoint")
    wait_for(lambda: interfaces(probe, kind) == before, "the interfaces are those from before")


def test_a_transition_that_is_not_possible_is_refused_and_the_node_lives_on(probe, graph) -> None:
    assert not change(probe, "policy", "deactivate")
    assert not change(probe, "policy", "transition_success")
    assert "expected one of configure, shutdown" in graph.nodes["policy"].log
    assert state(probe, "policy") == "unconfigured"


def test_a_node_is_configured_after_a_failure_and_serves_everyone_meanwhile(probe, checkpoint) -> None:
    """The heartbeat of diagnostics goes on while models are loaded; so do the answers to questions for the state."""
    from lifecycle_msgs.msg import Transition
    from lifecycle_msgs.srv import ChangeState, GetState

    shutil.copytree(POLICY, checkpoint)
    clients = [probe.node.create_client(ChangeState, f"{kind}/change_state") for kind in KINDS]
    asked = probe.node.create_client(GetState, "policy/get_state")
    for client in (*clients, asked):
        wait_for(client.service_is_ready, "the services are offered")
    probe.wait_for_status("robot_sim: simulation")
    request = ChangeState.Request(transition=Transition(label="configure"))
    before, labels = dict(probe.status_counts), set()
    futures = [client.call_async(request) for client in clients]

    def configured() -> bool:
        future = asked.call_async(GetState.Request())
        wait_for(future.done, "an answer while the model is loaded")
        labels.add(future.result().current_state.label)
        return all(future.done() for future in futures)

    wait_for(configured, "all three are configured")
    assert all(future.result().success for future in futures)
    assert "configuring" in labels
    # Measured by the heartbeat of a node that loads nothing: the machine may be slow.
    beats = {name: count - before[name] for name, count in probe.status_counts.items() if name in before}
    for kind in KINDS:
        assert beats[f"{kind}: lifecycle"] >= 0.7 * beats["robot_sim: simulation"], beats
    for client in (*clients, asked):
        probe.node.destroy_client(client)


def test_inactive_nodes_do_nothing(probe) -> None:
    for kind in KINDS:
        assert state(probe, kind) == "inactive"
    probe.wait_for_status("policy: chunks", "holding", "inactive")
    probe.wait_for_diagnostics("policy: chunks", 1)
    assert not probe.messages["action_chunk"] and not probe.messages["e_token"]


def test_active_nodes_work_and_deactivating_the_policy_holds_the_robot_where_it_is(probe) -> None:
    commands = probe.messages["joint_trajectory_controller/joint_trajectory"]
    for kind in KINDS:
        assert change(probe, kind, "activate")
    wait_for(lambda: len(probe.messages["executed_action"]) > 20 and probe.messages["e_token"], "the graph works")
    assert change(probe, "policy", "deactivate")
    executed, last = list(probe.messages["executed_action"])[-1], commands[-1]
    assert list(last.points[0].positions) == list(last.points[-1].positions)  # stands still ...
    gap = max(abs(a - b) for a, b in zip(last.points[0].positions, executed.position, strict=True))
    assert gap < 0.3  # ... where it was told to be, not at zero
    count = len(commands)
    probe.wait_for_diagnostics("policy: lifecycle", 2)
    assert len(commands) == count and state(probe, "policy") == "inactive"


def test_cleanup_frees_the_model_and_the_nodes_can_begin_again(probe) -> None:
    assert change(probe, "aligner", "deactivate") and change(probe, "buffer", "deactivate")
    for kind in KINDS:
        assert change(probe, kind, "cleanup")
        wait_for(lambda kind=kind: "/camera/overhead/image_raw" not in interfaces(probe, kind), "no interfaces")
    probe.messages["action_chunk"].clear()
    for label in ("configure", "activate"):
        for kind in KINDS:
            assert change(probe, kind, label)
    wait_for(lambda: probe.messages["action_chunk"], "a chunk after all was begun again")
    goals = [event.goal_state.label for event in probe.messages["policy/transition_event"]]
    assert goals[:2] == ["configuring", "unconfigured"] and goals[-1] == "active"


def test_shutdown_is_final_and_a_signal_ends_the_process_cleanly(probe, graph) -> None:
    for kind in KINDS:
        assert change(probe, kind, "shutdown")
        assert state(probe, kind) == "finalized"
    for kind in KINDS:
        assert graph.nodes[kind].stop() == 0
