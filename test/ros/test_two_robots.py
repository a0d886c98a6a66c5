"""Two robots in one ROS domain, told apart by their namespaces alone: neither hears the other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from graph_assertions import write_quick_parameters
from graph_fixtures import GraphRun
from node_testing import Probe, wait_for
from std_srvs.srv import Trigger

from selfalign.msg import ActionChunk, AlignReport, EToken
from selfalign_ros.bridge import qos

ROBOTS = ("left", "right")
SHARED = {"/diagnostics", "/parameter_events", "/rosout"}


@pytest.fixture(scope="module")
def robots(probe: Probe, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, GraphRun]]:
    """The whole graph once for each robot, each of an embodiment of its own."""
    runs = {}
    for name in ROBOTS:
        for message_type, topic, profile in (
            (ActionChunk, "action_chunk", qos.EVENTS),
            (AlignReport, "align_report", qos.EVENTS),
            (EToken, "e_token", qos.LATCHED),
        ):
            probe.listen(message_type, f"/{name}/{topic}", profile)
        folder = tmp_path_factory.mktemp(name)
        parameters = write_quick_parameters(folder)
        contract = folder / "contract.yaml"
        contract.write_text(yaml.safe_dump(yaml.safe_load(contract.read_text()) | {"name": name}))
        runs[name] = start(folder, parameters, name)
    yield runs
    for run in runs.values():
        run.close()


def start(folder: Path, parameters: Path, name: str) -> GraphRun:
    return GraphRun.module(
        "selfalign_ros.tools.bringup", f"namespace:={name}", f"params_file:={parameters}", cwd=folder
    )


def test_chunks_tokens_and_commands_stay_with_their_robot(robots: dict[str, GraphRun], probe: Probe) -> None:
    chunks = {name: probe.messages[f"/{name}/action_chunk"] for name in ROBOTS}
    for name in ROBOTS:
        wait_for(lambda name=name: len(chunks[name]) >= 3, f"three chunks of {name}")
        wait_for(lambda name=name: probe.messages[f"/{name}/align_report"], f"a round of {name}'s aligner")
        # From here on only what is asked for changes a token.
        assert probe.set_parameter(f"/{name}/aligner", "enable", False).successful
        probe.wait_for_status(f"{name}/aligner: align", "disabled")
        newest = probe.messages[f"/{name}/e_token"]
        wait_for(lambda name=name, newest=newest: newest[-1].version == chunks[name][-1].e_token_version, "it is used")
    right = chunks["right"][-1].e_token_version

    def is_ahead() -> bool:
        probe.call(Trigger, "/left/aligner/align_now", Trigger.Request())
        return probe.messages["/left/e_token"][-1].version > right

    wait_for(is_ahead, "a token of the left robot with a version that the right one never had")
    left = probe.messages["/left/e_token"][-1].version
    wait_for(lambda: chunks["left"][-1].e_token_version == left, "the left robot uses its new token")
    made = len(chunks["right"])
    wait_for(lambda: len(chunks["right"]) >= made + 3, "more chunks of the right robot")
    assert {chunk.e_token_version for chunk in chunks["right"][made:]} == {right}

    assert probe.set_parameter("/left/policy", "enable", False).successful
    probe.wait_for_status("left/policy: chunks", "holding: disabled")
    made = len(chunks["right"])
    wait_for(lambda: len(chunks["right"]) >= made + 3, "the right robot goes on while the left one holds")
    for name in ROBOTS:
        for topic in ("align_report", "e_token"):
            assert {message.embodiment for message in probe.messages[f"/{name}/{topic}"]} == {name}


def test_no_topic_or_service_is_shared(robots: dict[str, GraphRun], probe: Probe) -> None:
    own = tuple(f"/{name}/" for name in ROBOTS)

    def seen() -> tuple[set[str], set[str]]:
        """Topics and services; nodes of earlier tests that were killed go when their lease is over."""
        services = {name for name, _ in probe.node.get_service_names_and_types() if "probe" not in name}
        return {name for name, _ in probe.node.get_topic_names_and_types()}, services

    def shared() -> set[str]:
        return {name for name in set.union(*seen()) if not name.startswith(own)}

    with contextlib.suppress(pytest.fail.Exception):  # what differs is shown below
        wait_for(lambda: shared() == SHARED, "only these are shared")
    assert shared() == SHARED
    topics, services = seen()
    for name in ROBOTS:
        assert f"/{name}/policy/e_token_in_use" in topics and f"/{name}/aligner/align_now" in services


def test_both_stop_cleanly(robots: dict[str, GraphRun]) -> None:
    for name in ROBOTS:
        assert robots[name].stop() == 0, robots[name].output
