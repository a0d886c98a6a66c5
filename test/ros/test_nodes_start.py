"""What keeps a node from starting is said in one line, with its own exit code and without a traceback."""

from __future__ import annotations

import signal

import pytest
from node_testing import wait_for

pytestmark = pytest.mark.ros

CONFIGURATION_ERROR = 2


@pytest.mark.parametrize(
    ("kind", "parameters", "parts"),
    [
        ("buffer", {"contract": "nowhere.yaml"}, ["nowhere.yaml", "found neither"]),
        ("aligner", {"align_frequency": -1.0}, ["align_frequency", "-1.0", "from 0.001 to 50.0 Hz"]),
        ("buffer", {"capacity": "many"}, ["capacity", "'many'", "int from 16"]),
        ("buffer", {"checkpoint": "nowhere"}, ["checkpoint", "nowhere"]),
        ("robot_sim", {"body": "nobody.yaml"}, ["nobody.yaml"]),
    ],
    ids=["contract", "range", "type", "checkpoint", "body"],
)
def test_bad_start_parameter_is_named(graph, kind, parameters, parts) -> None:
    node = graph.start(kind, **parameters)
    assert node.process.wait(60) == CONFIGURATION_ERROR
    for part in parts:
        assert part in node.log
    assert "Traceback" not in node.log


def test_bad_contract_is_named_with_its_key(graph) -> None:
    contract = graph.contract(action={"interface": "telepathy", "topic": "commands"})
    node = graph.start("buffer", contract=contract)
    assert node.process.wait(60) == CONFIGURATION_ERROR
    for part in [str(contract), "action.interface", "'telepathy'", "joint_trajectory"]:
        assert part in node.log


def test_missing_checkpoint_ends_the_policy_after_it_has_started(graph) -> None:
    node = graph.start("policy", contract=graph.contract(), checkpoint="nowhere")
    assert node.process.wait(60) == CONFIGURATION_ERROR
    assert "nowhere" in node.log
    assert "Traceback" not in node.log


def test_misspelt_parameter_is_named(graph) -> None:
    node = graph.start("buffer", contract=graph.contract(), capasity=64, use_sim_time=True)
    wait_for(lambda: "parameters capasity: not known to buffer" in node.log, "the misspelt name is warned of")
    assert node.stop() == 0, node.log
    assert "use_sim_time" not in node.log


def test_whole_number_is_accepted_for_a_double(graph) -> None:
    node = graph.start("robot_sim", contract=graph.contract(), camera_rate=10)
    wait_for(lambda: "simulated arm ready" in node.log, "the simulated arm starts")
    assert node.stop(signal.SIGTERM) == 0, node.log
    assert "Traceback" not in node.log
