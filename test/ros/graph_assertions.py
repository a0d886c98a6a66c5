"""What holds for a running graph, whether genuine ``ros2 launch`` or the supervisor started it."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from graph_fixtures import GraphRun
from node_testing import ROOT, Probe, wait_for

from selfalign_ros.tools.security_policy import NodeInterface

QUICK_ALIGNER = {
    "niceness": 0,
    "align_frequency": 4.0,
    "collect_fit_count": 4,
    "collect_guard_count": 4,
    "collect_min_command": 0.0,
    "collect_min_motion": 0.0,
    "refine_steps": 2,
    "guard_draws": 2,
    "guard_sigmas": 0.0,
    "guard_margin": 0.0,
    "guard_inverse_margin": 0.0,
    "watch_count": 4,
    **{f"{stage}_budget_ms": 300_000.0 for stage in ("identify", "refine", "guard", "watch")},
}
"""Few transitions, however little the robot moves, and few steps; no giving way to others, no end for want of time on a
busy machine, and a guard that lets about every second token pass: what is tested is the graph, not the result."""


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
        "/**/aligner": {"ros__parameters": QUICK_ALIGNER},
        "/**/robot_sim": {"ros__parameters": {"episode_seconds": 1.0}},
    }
    path = folder / "quick.yaml"
    path.write_text(yaml.safe_dump(parameters))
    return path


def listen(probe: Probe) -> None:
    """Record what the assertions look at."""
    from selfalign.msg import ActionChunk, AlignReport, EToken
    from selfalign_ros.bridge import qos

    probe.listen(ActionChunk, "action_chunk", qos.EVENTS)
    probe.listen(AlignReport, "align_report", qos.EVENTS)
    probe.listen(EToken, "e_token", qos.LATCHED)


def record_bag(probe: Probe, folder: Path, parameters: Path) -> Path:
    """A bag of a real run, long enough for two attempts to align."""
    listen(probe)
    run = GraphRun.module("selfalign_ros.tools.record", "--output", "bag", "--params", str(parameters), cwd=folder)
    try:
        wait_for(lambda: sum(r.attempted for r in list(probe.messages["align_report"])) >= 2, "two attempts to align")
        assert run.stop() == 0, run.output
    finally:
        run.close()
    return folder / "bag"


def assert_replay_report(report: dict[str, Any]) -> None:
    """The nodes worked through the bag, in its order: chunks, attempts to align, a token for each that was accepted."""
    assert report["ok"] and len(report["chunks"]) >= 3
    assert any(call["attempted"] for call in report["aligns"])
    assert len({chunk["sha256"] for chunk in report["chunks"]}) > 1
    assert len(report["e_tokens"]) == 1 + sum(call["accepted"] for call in report["aligns"])
    stamps = [chunk["stamp_ns"] for chunk in report["chunks"]]
    assert stamps == sorted(stamps)


def assert_identical(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two replay reports differ in nothing but what was measured, which depends on the machine."""
    assert {**one, "measured": None} == {**other, "measured": None}


def assert_outputs_appear(probe: Probe) -> None:
    """Chunks are made, in the contract's shape, and align calls run."""
    wait_for(lambda: len(probe.messages["action_chunk"]) >= 3, "three chunks")
    chunk = probe.messages["action_chunk"][-1]
    assert len(chunk.data) == chunk.horizon * chunk.dim and chunk.dim == len(chunk.joint_names) == 7
    wait_for(lambda: len(probe.messages["align_report"]) >= 2, "two rounds of the aligner")
    wait_for(lambda: probe.messages["e_token"], "an E-Token")
    wait_for(lambda: any(report.attempted for report in probe.messages["align_report"]), "an attempt to align")
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
    wait_for(lambda: len(probe.messages["align_report"]) > before, "a round after enable")


def wait_for_accepted_token(probe: Probe) -> Any:
    """The report of a token accepted from now on; asks for attempts, because after a refusal the aligner rests."""
    from std_srvs.srv import Trigger

    start = len(probe.messages["align_report"])

    def accepted() -> Any:
        reports = [report for report in list(probe.messages["align_report"])[start:] if report.accepted]
        if not reports:
            probe.call(Trigger, "aligner/align_now", Trigger.Request())
        return reports

    return wait_for(accepted, "an accepted token")[0]


def assert_aligner_may_die(probe: Probe, kill: Callable[[], Any], wait_for_restart: Callable[[], Any]) -> None:
    """The policy goes on without an aligner, on the token it has, and the aligner comes back with a higher version."""
    kill()
    chunks = len(probe.messages["action_chunk"])
    wait_for(lambda: len(probe.messages["action_chunk"]) >= chunks + 2, "chunks without an aligner")
    wait_for_restart()
    version = probe.messages["action_chunk"][-1].e_token_version
    reports = len(probe.messages["align_report"])
    wait_for(lambda: len(probe.messages["align_report"]) > reports, "a round of the new aligner")
    assert probe.messages["align_report"][-1].version_before >= version  # it continued from the token in use


def from_xml(text: str) -> dict[str, NodeInterface]:
    """The interfaces that a security policy of ``to_xml`` holds, by the nodes' full names."""

    def names(profile: ET.Element, group: str, access: str) -> tuple[str, ...]:
        return tuple(entry.text or "" for entry in profile.findall(f"{group}[@{access}='ALLOW']/*"))

    return {
        f"{profile.get('ns', '').rstrip('/')}/{profile.get('node')}": NodeInterface(
            names(profile, "topics", "publish"),
            names(profile, "topics", "subscribe"),
            names(profile, "services", "reply"),
            names(profile, "services", "request"),
        )
        for profile in ET.fromstring(text).iter("profile")
    }
