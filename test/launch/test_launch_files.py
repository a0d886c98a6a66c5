"""The launch files under the ``ros2 launch`` command: their arguments are documented, and a bag is replayed.

Skipped where ``ros2 launch`` is not installed; test/ros/test_bringup_graph.py and test/ros/test_replay.py assert the
same of the supervisor everywhere.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from graph_assertions import assert_identical, assert_replay_report
from graph_fixtures import GraphRun
from node_testing import ROOT

from selfalign_ros.graph.declaration import BRINGUP, RECORD, REPLAY, GraphDeclaration

pytestmark = pytest.mark.skipif(
    shutil.which("ros2") is None or importlib.util.find_spec("launch_ros") is None,
    reason="genuine ros2 launch is not installed",
)


def launch_file(name: str) -> str:
    return str(ROOT / "launch" / f"{name}.launch.py")


@pytest.mark.parametrize(("name", "declaration"), [("bringup", BRINGUP), ("record", RECORD), ("replay", REPLAY)])
def test_every_argument_is_documented(ros_domain: int, name: str, declaration: GraphDeclaration) -> None:
    command = ["ros2", "launch", launch_file(name), "--show-args"]
    text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    shown = " ".join(text.split())
    for argument in declaration.arguments:
        assert f"'{argument.name}':" in shown
        assert " ".join(argument.description.split()) in shown, argument.name


def replay(folder: Path, *arguments: str) -> GraphRun:
    run = GraphRun(["ros2", "launch", launch_file("replay"), *arguments], folder)
    try:
        assert run.wait() == 0, run.output
    finally:
        run.close()
    return run


def test_a_bag_is_replayed_the_same_in_several_processes_and_in_one(
    recording: Path, folder: Path, parameters: Path
) -> None:
    common = (f"bag:={recording}", f"params_file:={parameters}")
    apart = replay(folder, *common, "report:=apart.json")
    report = json.loads((folder / "apart.json").read_text())
    assert_replay_report(report)
    assert set(apart.pids) == {"policy", "buffer", "aligner", "replay"}
    together = replay(folder, *common, "report:=together.json", "compare:=apart.json", "composed:=true")
    assert set(together.pids) == {"composition"}
    assert_identical(json.loads((folder / "together.json").read_text()), report)


def test_a_bag_that_is_none_ends_the_launch_with_an_error(ros_domain: int, tmp_path: Path) -> None:
    run = GraphRun(["ros2", "launch", launch_file("replay"), f"bag:={tmp_path / 'nothing'}"], tmp_path)
    try:
        assert run.wait() != 0
        assert "found nothing; expected a bag's folder" in run.output
    finally:
        run.close()
