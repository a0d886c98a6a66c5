"""The whole graph in real processes, started as a user starts it: outputs, faults, report, bag."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from graph_assertions import (
    assert_aligner_may_die,
    assert_outputs_appear,
    assert_parameters_tune,
    listen,
    wait_for_accepted_token,
    write_quick_parameters,
)
from graph_fixtures import GraphRun
from node_testing import ROOT, Probe, wait_for

NODES = ("policy", "buffer", "aligner", "robot_sim")


def test_a_run_from_start_to_stop(probe: Probe, tmp_path: Path) -> None:
    """One run for all that can be seen in one, because starting the nodes takes longest."""
    listen(probe)
    parameters = write_quick_parameters(tmp_path)
    arguments = ("--params", str(parameters), "--report", "run.json", "token_folder:=kept")
    run = GraphRun.module("selfalign_ros.tools.bringup", *arguments, cwd=tmp_path)
    try:
        assert_outputs_appear(probe)
        assert_parameters_tune(probe)
        policy = run.wait_for_pid("policy")
        assert_aligner_may_die(
            probe, lambda: run.kill_node("aligner"), lambda: run.wait_for_line("[aligner-3]: process started", 2)
        )
        wait_for_accepted_token(probe)
        # The robot's other processes go through the same: each comes back, none takes another with it.
        for name in ("robot_sim", "buffer", "policy"):
            run.kill_node(name)
            run.wait_for_pid(name, starts=2)
        chunks = len(probe.messages["action_chunk"])
        wait_for(lambda: len(probe.messages["action_chunk"]) >= chunks + 3, "chunks after everything was killed once")
        run.wait_for_line("align attempts (")  # the progress line
        assert run.pids["policy"][0] == policy and all(len(run.pids[name]) == 2 for name in NODES)
        assert run.stop() == 0, run.output  # what was killed and came back is no failure
    finally:
        run.close()
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {
        "sim_arm.safetensors",  # the aligner's, for ~/rollback
        "sim_arm_in_use.safetensors",  # the policy's
    }
    _check_report(tmp_path)


def _check_report(folder: Path) -> None:
    report = json.loads((folder / "run.json").read_text())
    assert report["ok"] and report["contract"] == "sim_arm"
    assert report["chunks"]["count"] == len(report["series"]["chunks"]["rows"]) >= 8
    latency = report["latency_s"]
    assert 0 < latency["all"]["p50"] <= latency["all"]["p95"] <= latency["all"]["p99"] <= latency["all"]["max"]
    parts = latency["while_aligning"]["count"] + latency["while_not_aligning"]["count"]
    assert parts == latency["all"]["count"] == report["chunks"]["count"]
    assert report["observation_age_s"]["p50"] > 0
    align = report["align"]
    rows, columns = (report["series"]["align"][name] for name in ("rows", "columns"))
    rounds = [dict(zip(columns, row, strict=True)) for row in rows]
    attempts = [call for call in rounds if call["attempted"]]
    assert align["rounds"] == len(rounds) >= 3
    assert align["attempts"] == align["accepted"] + align["refused"] == len(attempts) >= 1
    assert report["e_token"]["last_version"] >= 1 and report["e_token"]["norm"] > 0
    assert all(call["text"] and call["e_token_norm"] > 0 for call in rounds)
    for call in attempts:
        assert call["duration_s"] > 0
        assert all(call[f"guard_before.{loss}"] > 0 for loss in ("perception", "dynamics", "inverse_dynamics"))
    assert set(report["bodies"]) == {"nominal"}
    for camera in ("overhead", "wrist"):
        assert report["frames"][f"camera/{camera}/image_raw"]["received"] > 10
    assert report["distance_to_target_m"]["minimum"] > 0
    assert report["targets"]["attempted"] == len(report["series"]["targets"]["rows"]) >= 2
    assert {name.partition(":")[0] for name in report["diagnostics"]} >= {"policy", "buffer", "aligner"}
    times = [row[0] for row in report["series"]["chunks"]["rows"]]
    assert times == sorted(times) and times[0] > -1.0 and times[-1] < report["duration_s"] + 1.0
    assert (folder / "run.png").read_bytes().startswith(b"\x89PNG")


def test_a_robot_without_cameras_gives_no_chunk_and_says_so(ros_domain: int, tmp_path: Path) -> None:
    run = GraphRun.module(
        "selfalign_ros.tools.bringup", "use_sim:=false", "--duration", "4", "--report", "none.json", cwd=tmp_path
    )
    try:
        assert run.wait() == 1  # stopped by itself
    finally:
        run.close()
    assert "no action chunk was made" in run.output
    report = json.loads((tmp_path / "none.json").read_text())
    assert not report["ok"] and report["chunks"]["count"] == 0 and "no action chunk was made" in report["reason"]


@pytest.mark.parametrize("place", ["", "file/run.json"], ids=["folder", "below_a_file"])
def test_a_report_that_cannot_be_written_is_refused_before_the_run(ros_domain: int, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / place
    run = GraphRun.module("selfalign_ros.tools.bringup", "use_sim:=false", f"report:={path}", cwd=tmp_path)
    try:
        assert run.wait() == 2
    finally:
        run.close()
    assert f"parameter report: found {path}" in run.output
    assert "expected a file that can be written" in run.output
    assert "Traceback" not in run.output


@pytest.mark.parametrize("text", [None, "policy: [ros__parameters"], ids=["missing", "no_yaml"])
def test_a_parameter_file_that_cannot_be_read_stops_everything_at_once(
    ros_domain: int, tmp_path: Path, text: str | None
) -> None:
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    run = GraphRun.module("selfalign_ros.tools.bringup", f"params_file:={path}", cwd=tmp_path)
    try:
        assert run.wait() == 2
    finally:
        run.close()
    assert str(path) in run.output
    assert "restarting" not in run.output
    assert "Traceback" not in run.output


@pytest.fixture
def broken_contract(tmp_path: Path) -> Path:
    contract = yaml.safe_load((ROOT / "config" / "contracts" / "sim_arm.yaml").read_text())
    del contract["cameras"][0]["topic"]
    path = tmp_path / "broken.yaml"
    path.write_text(yaml.safe_dump(contract))
    return path


def test_a_broken_contract_stops_everything_and_names_the_key(
    ros_domain: int, broken_contract: Path, tmp_path: Path
) -> None:
    run = GraphRun.module("selfalign_ros.tools.bringup", f"contract:={broken_contract}", cwd=tmp_path)
    try:
        assert run.wait() == 2
    finally:
        run.close()
    assert "cameras[0].topic: found nothing" in run.output
