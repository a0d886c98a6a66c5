"""The launch file under genuine launch: the assertions of test/ros/test_bringup.py, through launch_pytest.

Skipped where launch_pytest is not installed; the same assertions run through the supervisor everywhere.
"""

# ruff: noqa: E402 - imports of launch come after the check that it exists

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
from graph_assertions import (
    assert_aligner_may_die,
    assert_outputs_appear,
    assert_parameters_tune,
    listen,
    write_quick_parameters,
)
from node_testing import ROOT, Probe, wait_for

launch_pytest = pytest.importorskip("launch_pytest", reason="genuine launch_pytest is not installed")

from launch import LaunchDescription
from launch.actions import IncludeLaunchDescription, RegisterEventHandler
from launch.event_handlers import OnProcessStart
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch_pytest.actions import ReadyToTest

STARTED: dict[str, list[int]] = {}
"""Process ids per node, in the order of their starts."""


@launch_pytest.fixture(scope="module")
def bringup(ros_domain: int, tmp_path_factory: pytest.TempPathFactory) -> LaunchDescription:
    folder: Path = tmp_path_factory.mktemp("launch")
    lock = threading.Lock()

    def note(event: object, context: object) -> None:
        with lock:
            name = event.process_name.rpartition("-")[0]  # policy-1 → policy
            STARTED.setdefault(name, []).append(event.pid)

    return LaunchDescription(
        [
            RegisterEventHandler(OnProcessStart(on_start=note)),
            IncludeLaunchDescription(
                PythonLaunchDescriptionSource(str(ROOT / "launch" / "bringup.launch.py")),
                launch_arguments={"params_file": str(write_quick_parameters(folder))}.items(),
            ),
            ReadyToTest(),
        ]
    )


@pytest.mark.launch(fixture=bringup)
def test_outputs_appear_parameters_tune_and_a_killed_aligner_comes_back(probe: Probe) -> None:
    listen(probe)
    assert_outputs_appear(probe)
    assert_parameters_tune(probe)
    aligner = next(name for name in STARTED if "aligner" in name)
    assert_aligner_may_die(
        probe,
        lambda: os.kill(STARTED[aligner][-1], signal.SIGKILL),
        lambda: wait_for(lambda: len(STARTED[aligner]) >= 2, "the aligner's second start"),
    )


@pytest.mark.launch(fixture=bringup, shutdown=True)
def test_nothing_is_left_behind() -> None:
    left = [pid for pids in STARTED.values() for pid in pids if Path(f"/proc/{pid}").exists()]
    assert len(STARTED) == 4 and not left
