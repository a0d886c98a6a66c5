"""What test_two_machines.py asserts, seen from the robot's network namespace: its aligner runs in another one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from graph_assertions import listen, wait_for_accepted_token, write_quick_parameters
from graph_fixtures import GraphRun
from node_testing import ROOT, Probe, wait_for

WORKSTATION, LINK = os.environ["WORKSTATION"], os.environ["WORKSTATION_LINK"]
ON_WORKSTATION = ["ip", "netns", "exec", WORKSTATION, "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh"]
RESET = """
from node_testing import Probe
from std_srvs.srv import Trigger
probe = Probe()
response = probe.call(Trigger, "aligner/reset", Trigger.Request())
probe.close()
assert response.success, response.message
"""


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Probe]:
    """On the robot."""
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "SUBNET")
    probe = Probe()
    yield probe
    probe.close()


@pytest.fixture
def parameters(tmp_path: Path) -> str:
    path = write_quick_parameters(tmp_path)
    document = yaml.safe_load(path.read_text())
    document["/**/aligner"]["ros__parameters"]["sample_timeout"] = 1.0
    path.write_text(yaml.safe_dump(document))
    return str(path)


def start(folder: Path, parameters: str, nodes: str, prefix: list[str], *more: str) -> GraphRun:
    arguments = [f"nodes:={nodes}", f"params_file:={parameters}", "discovery_range:=SUBNET", *more]
    return GraphRun([*prefix, sys.executable, "-m", "selfalign_ros.tools.bringup", *arguments], folder)


def set_link(state: str) -> None:
    subprocess.run(["ip", "-n", WORKSTATION, "link", "set", LINK, state], check=True)


def test_tokens_cross_the_link_and_the_policy_outlives_it(probe: Probe, parameters: str, tmp_path: Path) -> None:
    listen(probe)
    chunks = probe.messages["action_chunk"]
    robot = start(tmp_path, parameters, "policy,buffer,robot_sim", [])
    workstation = start(tmp_path, parameters, "aligner", ON_WORKSTATION)
    try:
        accepted = wait_for_accepted_token(probe).version_after
        wait_for(lambda: chunks[-1].e_token_version >= accepted, "a chunk with the token of the other machine")
        # From here on only what is asked for changes the token.
        assert probe.set_parameter("aligner", "enable", False).successful
        probe.wait_for_status("aligner: align", "disabled")
        before = probe.messages["e_token"][-1].version
        wait_for(lambda: chunks[-1].e_token_version == before, "a chunk with the last token before the cut")

        set_link("down")
        made = len(chunks)
        subprocess.run(
            [*ON_WORKSTATION, sys.executable, "-c", RESET],
            check=True,
            env=dict(os.environ) | {"PYTHONPATH": f"{ROOT}/test/ros:{os.environ.get('PYTHONPATH', '')}"},
        )
        wait_for(lambda: len(chunks) >= made + 5, "chunks without a link")
        assert {chunk.e_token_version for chunk in chunks[made:]} == {before}
        assert probe.messages["e_token"][-1].version == before

        set_link("up")
        wait_for(lambda: chunks[-1].e_token_version == before + 1, "a chunk with the token published during the cut")
        assert probe.set_parameter("aligner", "enable", True).successful
        assert wait_for_accepted_token(probe).version_before >= before + 1
        assert robot.stop() == 0, robot.output
        assert workstation.stop() == 0, workstation.output
        assert all(len(pids) == 1 for run in (robot, workstation) for pids in run.pids.values()), "a node restarted"
    finally:
        robot.close()
        workstation.close()


def test_static_peers_find_each_other_over_a_router(probe: Probe, parameters: str, tmp_path: Path) -> None:
    listen(probe)
    chunks = probe.messages["action_chunk"]
    to_workstation = f"static_peers:={os.environ['WORKSTATION_ADDRESS']}"
    to_robot = f"static_peers:={os.environ['ROBOT_ADDRESS']}"
    runs = [start(tmp_path, parameters, "policy,buffer,robot_sim", [], to_workstation)]
    try:
        # This aligner names no peer, and neither does the probe: no multicast lets them hear of each other.
        runs.append(start(tmp_path, parameters, "aligner", ON_WORKSTATION))
        runs[-1].wait_for_line("lifecycle: active")
        wait_for(lambda: len(chunks) >= 5, "chunks")
        assert "aligner" not in probe.node.get_node_names()
        assert runs[-1].stop() == 0, runs[-1].output
        runs.pop().close()

        runs.append(start(tmp_path, parameters, "aligner", ON_WORKSTATION, to_robot))
        accepted = wait_for_accepted_token(probe).version_after
        wait_for(lambda: chunks[-1].e_token_version >= accepted, "a chunk with the token of the other machine")
        assert [run.stop() for run in runs] == [0, 0]
    finally:
        for run in runs:
            run.close()
