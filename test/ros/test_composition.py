"""The bringup graph with policy, buffer and aligner in one process: it works, comes back and ends like the others."""

from __future__ import annotations

from pathlib import Path

from graph_assertions import assert_outputs_appear, assert_parameters_tune, listen, write_quick_parameters
from graph_fixtures import GraphRun
from node_testing import Probe, wait_for


def test_three_nodes_in_one_process_work_come_back_when_it_is_killed_and_end(probe: Probe, tmp_path: Path) -> None:
    listen(probe)
    parameters = str(write_quick_parameters(tmp_path))
    run = GraphRun.module("selfalign_ros.tools.bringup", "--params", parameters, "composed:=true", cwd=tmp_path)
    try:
        assert_outputs_appear(probe)
        assert_parameters_tune(probe)
        assert set(run.pids) == {"composition", "robot_sim"}
        run.kill_node("composition")
        run.wait_for_pid("composition", starts=2)
        probe.messages["action_chunk"].clear()
        wait_for(lambda: len(probe.messages["action_chunk"]) >= 2, "chunks of the new process")
        assert run.stop() == 0
    finally:
        run.close()
