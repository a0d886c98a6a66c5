"""The supervisor with real processes: restarts, back-off, exit codes, signals, and nothing left behind."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from graph_fixtures import GraphRun, is_alive
from node_testing import wait_for

from selfalign_ros.graph.declaration import GraphError, NodeProcess
from selfalign_ros.graph.supervisor import RespawnPolicy, check_domain, free_domain

# Nodes are small scripts here; what is tested is what happens to processes.
RUNNER = """
import json, sys
from selfalign_ros.graph.declaration import Graph, NodeProcess
from selfalign_ros.graph.supervisor import RespawnPolicy, Supervisor
request = json.loads(sys.argv[1])
graph = Graph(tuple(NodeProcess(executable="none", **node) for node in request["nodes"]), **request["graph"])
command = lambda node: [sys.executable, "-S", "-u", "-c", request["scripts"][node.name]]
sys.exit(Supervisor(graph, command=command, respawn=RespawnPolicy(**request["respawn"])).run())
"""
SLEEP = "import signal, time\nprint('ready')\nwhile True: time.sleep(60)"
STOPS_CLEANLY = (
    "import signal, sys, time\nsignal.signal(signal.SIGINT, lambda *_: (print('was told to stop'), sys.exit(0)))\n"
    "print('ready')\nwhile True: time.sleep(60)"
)
STUBBORN = (
    "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "print('ready')\nwhile True: time.sleep(60)"
)
Start = Callable[..., GraphRun]


def _command(
    scripts: dict[str, str], respawn: dict | None, nodes: dict[str, dict] | None, graph: dict | None
) -> list[str]:
    request = {
        "scripts": scripts,
        "nodes": [{"name": name, "respawn_delay_s": 0.01} | (nodes or {}).get(name, {}) for name in scripts],
        "respawn": respawn or {},
        "graph": graph or {},
    }
    return [sys.executable, "-c", RUNNER, json.dumps(request)]


@pytest.fixture
def start(ros_domain: int, tmp_path: Path) -> Iterator[Start]:
    runs: list[GraphRun] = []

    def start(
        scripts: dict[str, str],
        respawn: dict | None = None,
        nodes: dict[str, dict] | None = None,
        graph: dict | None = None,
    ) -> GraphRun:
        runs.append(GraphRun(_command(scripts, respawn, nodes, graph), tmp_path))
        return runs[-1]

    yield start
    for run in runs:
        run.close()


def test_killed_node_is_started_again_and_the_others_do_not_notice(start: Start) -> None:
    run = start({"one": STOPS_CLEANLY, "two": STOPS_CLEANLY})
    run.wait_for_line("ready", 2)
    first = run.wait_for_pid("one")
    run.kill_node("one")
    second = run.wait_for_pid("one", starts=2)
    run.wait_for_line("[one-1] ready", 2)
    assert second != first and len(run.pids["two"]) == 1
    assert run.stop() == 0, run.output  # a node that was killed and came back is no failure
    assert run.output.count("] was told to stop\n") == 2


def test_a_crashing_node_is_restarted_ever_later_and_then_given_up(start: Start) -> None:
    run = start(
        {"bad": "raise SystemExit(7)", "good": STOPS_CLEANLY},
        respawn={"max_attempts": 4, "max_delay_s": 0.05},
    )
    run.wait_for_line("given up after 4 restarts in a row")
    delays = [line.split("restarting in ")[1].split(" s")[0] for line in run.lines if "restarting in" in line]
    assert delays == ["0.01", "0.02", "0.04", "0.05"]
    run.wait_for_line("[good-2] ready")
    assert "good" in run.living_nodes()
    assert run.stop() == 7


def test_a_node_that_ran_long_enough_starts_with_the_short_delay_again() -> None:
    node = NodeProcess("one", "one", respawn_delay_s=1.0)
    policy = RespawnPolicy(max_delay_s=5.0)
    assert [policy.delay_s(node, attempt) for attempt in (1, 2, 3, 4, 9)] == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_exit_code_is_that_of_the_worst(start: Start) -> None:
    run = start(
        {"three": "raise SystemExit(3)", "five": "raise SystemExit(5)", "fine": STOPS_CLEANLY},
        nodes={"three": {"respawn": False}, "five": {"respawn": False}},
    )
    run.wait_for_line("process has died", 2)
    run.wait_for_line("ready")
    assert run.stop() == 5


def test_a_configuration_error_stops_everything_at_once(start: Start) -> None:
    run = start({"misconfigured": "print('contract: found no cameras'); raise SystemExit(2)", "other": STOPS_CLEANLY})
    assert run.wait() == 2
    assert "contract: found no cameras" in run.output and "cannot work as configured" in run.output
    assert len(run.pids["misconfigured"]) == 1


def test_a_node_that_ends_the_graph_gives_it_its_exit_code(start: Start) -> None:
    run = start({"report": "raise SystemExit(4)", "other": STOPS_CLEANLY}, nodes={"report": {"ends_graph": True}})
    assert run.wait() == 4
    run = start({"report": "pass", "other": STOPS_CLEANLY}, nodes={"report": {"ends_graph": True}})
    assert run.wait() == 0


def test_a_run_with_a_duration_stops_by_itself(start: Start) -> None:
    run = start({"one": SLEEP}, graph={"duration_s": 0.2})
    assert run.wait() == 0
    assert "duration is over" in run.output


def test_a_node_that_ignores_signals_is_killed_and_that_is_a_failure(start: Start) -> None:
    run = start({"stubborn": STUBBORN}, nodes={"stubborn": {"stop_grace_s": 0.1}})
    run.wait_for_line("ready")
    assert run.stop() == 128 + signal.SIGKILL
    assert "sending SIGTERM" in run.output and "sending SIGKILL" in run.output


def test_further_interrupts_do_not_wait_for_the_grace_period(start: Start) -> None:
    run = start({"stubborn": STUBBORN}, nodes={"stubborn": {"stop_grace_s": 3600.0}})
    run.wait_for_line("ready")
    run.process.send_signal(signal.SIGINT)
    run.wait_for_line("interrupted")
    run.process.send_signal(signal.SIGINT)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGKILL


def test_nodes_die_with_a_supervisor_that_is_killed(start: Start) -> None:
    run = start({"one": STUBBORN, "two": STUBBORN})
    run.wait_for_line("ready", 2)
    pids = [run.wait_for_pid(name) for name in ("one", "two")]
    run.process.kill()
    wait_for(lambda: not any(is_alive(pid) for pid in pids), "the nodes are gone")


def test_what_a_node_started_is_ended_with_it(start: Start) -> None:
    parent = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(3600)'])\n"
        "print('child', child.pid)"
    )
    run = start({"parent": parent}, nodes={"parent": {"respawn": False}})
    assert run.wait() == 0
    child = int(run.output.partition("child ")[2].split()[0])
    wait_for(lambda: not is_alive(child), "the child is gone")


def test_last_words_without_a_line_end_are_shown(start: Start) -> None:
    run = start({"one": "import sys; sys.stdout.write('last words')"}, nodes={"one": {"respawn": False}})
    assert run.wait() == 0
    assert "[one-1] last words\n" in run.lines


def test_a_node_that_closes_its_output_is_still_watched(start: Start) -> None:
    script = f"import os\nprint('closing')\nos.close(1); os.close(2)\n{STOPS_CLEANLY.replace('print', 'id')}"
    run = start({"quiet": script})
    run.wait_for_line("closing")
    assert run.stop() == 0


def test_a_node_that_cannot_be_started_is_named(start: Start, tmp_path: Path) -> None:
    runner = RUNNER.replace('sys.executable, "-S"', '"/nonexistent/python", "-S"')
    request = json.loads(_command({"one": SLEEP}, None, None, None)[3])
    run = GraphRun([sys.executable, "-c", runner, json.dumps(request)], tmp_path)
    try:
        assert run.wait() == 127
        assert "cannot start /nonexistent/python" in run.output
    finally:
        run.close()


def test_status_lines_stay_at_the_bottom_of_a_terminal(ros_domain: int, tmp_path: Path) -> None:
    script = "print('one'); print('50 %', end='\\r', flush=True); print('two'); print('100 %', end='\\r', flush=True)"
    command = _command({"node": script}, None, {"node": {"respawn": False}}, None)
    assert "%" not in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, cwd=tmp_path) as process:
        os.close(theirs)
        shown = b""
        while chunk := _read_terminal(ours):
            shown += chunk
        assert process.wait() == 0
    os.close(ours)
    text = shown.decode()
    assert "\x1b[K50 %" in text and "\x1b[K100 %" in text
    assert "[node-1]\x1b[0m two" in text  # coloured prefix


def _read_terminal(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # the other end is closed
        return b""


def test_a_second_graph_with_the_same_nodes_is_refused_until_the_first_is_gone(start: Start) -> None:
    first = start({"one": STOPS_CLEANLY, "two": STOPS_CLEANLY})
    first.wait_for_line("ready", 2)
    second = start({"three": STOPS_CLEANLY, "two": STOPS_CLEANLY})
    second.wait_for_line("found node /two running already")
    assert second.wait() != 0
    assert "process started" not in second.output
    other = start({"two": STOPS_CLEANLY}, nodes={"two": {"namespace": "/left"}})
    other.wait_for_line("ready")
    first.process.kill()
    first.process.wait()
    start({"two": STOPS_CLEANLY}).wait_for_line("ready")


@pytest.mark.parametrize("text", ["seven", "-1", "233", "1.5"])
def test_a_domain_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(GraphError, match=r"ROS_DOMAIN_ID: found .*expected an integer from 0 to 232"):
        check_domain({"ROS_DOMAIN_ID": text}, 5)


def test_a_domain_whose_ports_other_programs_hold_is_refused() -> None:
    domain = free_domain()
    local = {"ROS_DOMAIN_ID": str(domain), "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
    sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(31)]
    try:
        sockets[0].bind(("", 7400 + 250 * domain))
        for participant, held in enumerate(sockets[1:]):
            held.bind(("", 7410 + 250 * domain + 2 * participant))
        message = rf"ROS_DOMAIN_ID {domain}: found 2 of its 32 discovery ports free .*expected 5"
        with pytest.raises(GraphError, match=message):
            check_domain(local, 5)
        check_domain(local, 2)
        with pytest.raises(GraphError, match=rf"discovery port {7400 + 250 * domain}/udp taken by another program"):
            check_domain(local | {"ROS_AUTOMATIC_DISCOVERY_RANGE": "SUBNET"}, 5)
    finally:
        for held in sockets:
            held.close()
