"""Nobody reads the output (Ctrl-S, a pager, a stopped tee, a full pipe): the nodes work on, and a signal stops them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from graph_assertions import write_quick_parameters
from graph_fixtures import is_alive
from node_testing import Probe, wait_for
from test_supervisor import RUNNER

GONE_WITHIN_S = 15.0  # of a machine that is busy with other things; a node has 10 s before SIGTERM follows

# Writes far more than any pipe and queue hold, and says in a file how far it has come.
TALKS = """
import itertools, os, pathlib, signal, sys
signal.signal(signal.SIGINT, lambda *_: (pathlib.Path("{name}.told").touch(), sys.exit(0)))
pathlib.Path("{name}.pid").write_text(str(os.getpid()))
for number in itertools.count():
    print(f"line {{number}} " + 80 * "x")
    if number == 30_000:
        pathlib.Path("{name}.much").touch()
"""
STUBBORN = """
import os, pathlib, signal, time
signal.signal(signal.SIGINT, lambda *_: pathlib.Path("{name}.told").touch())
signal.signal(signal.SIGTERM, lambda *_: pathlib.Path("{name}.told_again").touch())
pathlib.Path("{name}.pid").write_text(str(os.getpid()))
while True:
    print(80 * "x")
    time.sleep(0.001)
"""


def command(**scripts: str) -> list[str]:
    request = {
        "scripts": {name: text.format(name=name) for name, text in scripts.items()},
        "nodes": [{"name": name, "stop_grace_s": 3600.0} for name in scripts],
        "respawn": {},
        "graph": {},
    }
    return [sys.executable, "-c", RUNNER, json.dumps(request)]


@contextlib.contextmanager
def unread(words: list[str], folder: Path, **options: Any) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A command and the reading end of its output: a pipe that is full after one page."""
    ours, theirs = os.pipe()
    fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 4096)
    environment = dict(os.environ) | {"ROS_HOME": str(folder / "ros_home")}
    process = subprocess.Popen(words, cwd=folder, stdout=theirs, stderr=theirs, env=environment, **options)
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def pid_of(folder: Path, name: str) -> int:
    path = folder / f"{name}.pid"
    wait_for(lambda: path.exists() and path.read_text(), f"{name} runs")
    return int(path.read_text())


def wait_for_end(process: subprocess.Popen[bytes], pids: list[int]) -> int:
    wait_for(lambda: not any(map(is_alive, pids)), "the nodes are gone", GONE_WITHIN_S)
    return process.wait(GONE_WITHIN_S)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_stops_nodes_that_never_waited_for_a_reader(tmp_path: Path, number: signal.Signals) -> None:
    with unread(command(one=TALKS, two=TALKS), tmp_path) as (process, _):
        pids = [pid_of(tmp_path, name) for name in ("one", "two")]
        wait_for(lambda: all((tmp_path / f"{name}.much").exists() for name in ("one", "two")), "more than is read")
        process.send_signal(number)
        assert wait_for_end(process, pids) == 0
        assert (tmp_path / "one.told").exists() and (tmp_path / "two.told").exists()


def test_further_signals_come_through_as_well(tmp_path: Path) -> None:
    with unread(command(one=STUBBORN), tmp_path) as (process, _):
        pid = pid_of(tmp_path, "one")
        process.send_signal(signal.SIGINT)
        wait_for((tmp_path / "one.told").exists, "the first signal has come")
        process.send_signal(signal.SIGINT)
        wait_for((tmp_path / "one.told_again").exists, "the second has")
        process.send_signal(signal.SIGTERM)
        assert wait_for_end(process, [pid]) == 128 + signal.SIGKILL


def test_what_does_not_fit_is_counted_and_the_rest_is_whole(tmp_path: Path) -> None:
    with unread(command(one=TALKS), tmp_path) as (process, output):
        pid_of(tmp_path, "one")
        wait_for((tmp_path / "one.much").exists, "more than is kept")
        with os.fdopen(os.dup(output), "rb") as reader:
            lines = []
            while not lines or b"lines were dropped here" not in lines[-1]:
                lines.append(reader.readline())
            process.send_signal(signal.SIGINT)
            lines += reader.readlines()
        process.wait(GONE_WITHIN_S)
    text = b"".join(lines).decode()
    assert text.endswith("\n") and "process has finished cleanly" in text
    numbers = [int(line.split()[2]) for line in text.splitlines() if line.startswith("[one-1] line ")]
    dropped = [int(line.split()[2]) for line in text.splitlines() if "lines were dropped here" in line]
    assert numbers[:1000] == list(range(1000)) and numbers == sorted(set(numbers))
    assert sum(dropped) > 1000 and len(numbers) + sum(dropped) >= 30_000


def test_without_a_signal_nothing_is_lost_on_a_slow_reader(tmp_path: Path) -> None:
    script = "for number in range(2000): print('line', number)"
    request = {
        "scripts": {"one": script}, "nodes": [{"name": "one", "respawn": False}], "respawn": {}, "graph": {}
    }  # fmt: skip
    with unread([sys.executable, "-c", RUNNER, json.dumps(request)], tmp_path) as (process, output):
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(5.0)
        with os.fdopen(os.dup(output), "rb") as reader:
            text = reader.read().decode()
        assert process.wait(GONE_WITHIN_S) == 0
    assert text.count("[one-1] line ") == 2000 and "dropped" not in text


def test_a_line_without_an_end_is_cut(tmp_path: Path) -> None:
    script = "import sys\nfor _ in range(300): sys.stdout.write(1000 * 'x')"
    request = {
        "scripts": {"one": script}, "nodes": [{"name": "one", "respawn": False}], "respawn": {}, "graph": {}
    }  # fmt: skip
    shown = subprocess.run(
        [sys.executable, "-c", RUNNER, json.dumps(request)], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert shown.count("x") >= 300_000 and max(map(len, shown.splitlines())) < 200_000


def take_terminal() -> None:
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.parametrize("stop", [b"\x03", b""], ids=["ctrl_c", "sigterm"])
def test_a_terminal_that_was_stopped_with_ctrl_s(tmp_path: Path, stop: bytes) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(one=TALKS), cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=take_terminal
    )
    os.close(theirs)
    try:
        pid = pid_of(tmp_path, "one")
        os.write(ours, b"\x13\x1a")  # Ctrl-S; Ctrl-Z, too, must leave the supervisor at work
        wait_for((tmp_path / "one.much").exists, "more than a terminal takes")
        assert process.poll() is None
        if stop:
            os.write(ours, stop)
        else:
            process.terminate()
        wait_for(lambda: not is_alive(pid), "the node is gone", GONE_WITHIN_S)
        os.set_blocking(ours, False)
        deadline = time.monotonic() + GONE_WITHIN_S
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError, OSError):
                os.read(ours, 65536) if stop else None  # Ctrl-C makes the terminal go on
            time.sleep(0.01)
        assert process.poll() == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_robot_holds_when_nobody_reads_and_the_graph_is_told_to_stop(
    probe: Probe, tmp_path: Path, number: signal.Signals
) -> None:
    from trajectory_msgs.msg import JointTrajectory

    from selfalign_ros.bridge import qos

    topic = "joint_trajectory_controller/joint_trajectory"
    probe.listen(JointTrajectory, topic, qos.COMMAND)
    commands = probe.messages[topic]
    commands.clear()
    parameters = write_quick_parameters(tmp_path)
    words = [sys.executable, "-m", "selfalign_ros.tools.bringup", "--params", str(parameters), "token_folder:=none"]
    with unread([*words, "log_level:=debug"], tmp_path) as (process, _):

        def is_moving() -> bool:
            return any(command.points[0].positions != command.points[-1].positions for command in list(commands))

        wait_for(is_moving, "the robot moves")
        pids = nodes_of(process.pid)
        assert len(pids) == 4
        process.send_signal(number)
        assert wait_for_end(process, pids) == 0

    def stands_still() -> bool:
        last = commands[-1]
        at_once = last.header.stamp.sec == 0
        return at_once and len({tuple(point.positions) for point in last.points}) == 1

    wait_for(stands_still, "the last command, which may be on its way when its sender has ended, is to stand still")


def nodes_of(supervisor: int) -> list[int]:
    found = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    return [int(pid) for pid in found]
