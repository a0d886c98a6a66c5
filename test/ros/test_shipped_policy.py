"""The first thing a newcomer does: bringup with nothing said, and a robot that does its task again and again."""

from __future__ import annotations

from pathlib import Path

from graph_fixtures import GraphRun
from node_testing import Probe, wait_for


def test_the_first_bringup_reaches_one_target_after_another(probe: Probe, tmp_path: Path) -> None:
    from std_msgs.msg import Bool, String

    from selfalign_ros.bridge import qos

    probe.listen(Bool, "target_reached", 100)
    probe.listen(String, "prompt", qos.LATCHED)
    run = GraphRun.module("selfalign_ros.tools.bringup", cwd=tmp_path)
    try:
        reached = probe.messages["target_reached"]
        wait_for(lambda: sum(message.data for message in list(reached)) >= 3, "three targets reached")
        assert len({message.data for message in probe.messages["prompt"]}) >= 2  # not one place over and over
        assert "untrained" not in run.output
        assert run.stop() == 0, run.output
    finally:
        run.close()
