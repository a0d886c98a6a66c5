"""What holds for a running graph, whether genuine ``ros2 launch`` or the supervisor started it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from node_testing import ROOT, Probe, wait_for

# Small batches and frequent align calls, so that a test sees several of them in a few seconds; no giving way to others.
_QUICK = {
    "niceness": 0,
    "align_frequency": 4.0,
    "steps": 2,
    "batch_size": 4,
    "holdout_size": 4,
    "guard_draws": 4,
    "time_budget_ms": 60000.0,
}


def write_quick_parameters(folder: Path) -> Path:
    """A parameter file for quick tests: all joints and cameras, the latter small, patient age limits, the untrained
    model, small align calls, a new target every second.
    """
    contract = yaml.safe_load((ROOT / "config" / "contracts" / "sim_arm.yaml").read_text())
    for camera in contract["cameras"]:
        camera["height"] = camera["width"] = 64
    contract["control"].update(max_image_age=5.0, max_joint_state_age=5.0)
    (folder / "contract.yaml").write_text(yaml.safe_dump(contract))
    parameters = {
        "/**": {"ros__parameters": {"contract": str(folder / "contract.yaml"), "checkpoint": "tiny"}},
        "/aligner": {"ros__parameters": _QUICK},
        "/robot_sim": {"ros__parameters": {"episode_seconds": 1.0}},
    }
    path = folder / "quick.yaml"
    path.write_text(yaml.safe_dump(parameters))
    return path


def listen(probe: Probe) -> None:
    """Record what the assertions look at."""
    from selfalign.msg import ActionChunk, AlignReport, EToken
    from selfalign_ros import qos

    probe.listen(ActionChunk, "action_chunk", qos.EVENTS)
    probe.listen(AlignReport, "align_report", qos.EVENTS)
    probe.listen(EToken, "e_token", qos.LATCHED)


def assert_outputs_appear(probe: Probe) -> None:
    """Chunks are made, in the contract's shape, and align calls run."""
    wait_for(lambda: len(probe.messages["action_chunk"]) >= 3, "three chunks")
    chunk = probe.messages["action_chunk"][-1]
    assert len(chunk.data) == chunk.horizon * chunk.dim and chunk.dim == len(chunk.joint_names) == 7
    wait_for(lambda: len(probe.messages["align_report"]) >= 2, "two align calls")
    wait_for(lambda: probe.messages["e_token"], "an E-Token")
    reports = probe.messages["align_report"]
    assert all(report.version_after == report.version_before + report.accepted for report in reports)


def assert_parameters_tune(probe: Probe) -> None:
    """Turning the aligner off and on takes effect at once; a bad value is refused with a reason."""
    assert probe.set_parameter("aligner", "enable", False).successful
    probe.wait_for_status("aligner: align", "disabled")
    refusal = probe.set_parameter("aligner", "align_frequency", -1.0)
    assert not refusal.successful and "align_frequency" in refusal.reason
    before = len(probe.messages["align_report"])
    assert probe.set_parameter("aligner", "enable", True).successful
    wait_for(lambda: len(probe.messages["align_report"]) > before, "an align call after enable")


def assert_aligner_may_die(probe: Probe, kill: Callable[[], Any], wait_for_restart: Callable[[], Any]) -> None:
    """The policy goes on without an aligner, on the token it has, and the aligner comes back with a higher version."""
    kill()
    chunks = len(probe.messages["action_chunk"])
    wait_for(lambda: len(probe.messages["action_chunk"]) >= chunks + 2, "chunks without an aligner")
    wait_for_restart()
    version = probe.messages["action_chunk"][-1].e_token_version
    reports = len(probe.messages["align_report"])
    wait_for(lambda: len(probe.messages["align_report"]) > reports, "an align call of the new aligner")
    assert probe.messages["align_report"][-1].version_before >= version  # it continued from the token in use
