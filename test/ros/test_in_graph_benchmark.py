"""The benchmark of shifts in the running graph: which runs are made again. No node is started."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.studies.adaptation import graph_run
from benchmarks.studies.adaptation.graph_run import Course, report_of
from benchmarks.studies.adaptation.in_graph import figures_of
from benchmarks.studies.adaptation.long_run import PATIENCE_NS
from benchmarks.studies.adaptation.shifts import CALIBRATION


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The runs that were made: names of their bodies, seed, checkpoint. Each checkpoint is a model of its own."""
    runs: list[tuple] = []

    def run_once(course: Course, seed: int, report: Path, checkpoint: str | None, settings: dict) -> dict[str, Any]:
        runs.append(([body.name for body in course.bodies], seed, checkpoint))
        return {"number": len(runs), "file": report.name, "enable": settings["aligner"].get("enable", True)}

    monkeypatch.setattr(graph_run, "run_once", run_once)
    monkeypatch.setattr(graph_run, "model_of", lambda checkpoint: SimpleNamespace(digest=f"digest of {checkpoint}"))
    return runs


def test_a_run_is_made_again_if_anything_that_decides_it_is_another(
    made: list[tuple], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def number(shift: str = "servo", seed: int = 0, checkpoint: str | None = None) -> int:
        return report_of(shift, seed, tmp_path, checkpoint)["number"]

    assert [number(), number()] == [1, 1]
    assert number(seed=1) == 2
    assert number(shift="payload") == 3
    assert number() == 1
    assert [number(checkpoint="other"), number(checkpoint="other")] == [4, 4]
    servo, payload = (["nominal", shift, "nominal"] for shift in ("servo", "payload"))
    assert made == [(servo, 0, None), (servo, 1, None), (payload, 0, None), (servo, 0, "other")]
    monkeypatch.setitem(graph_run.PARAMETERS, "aligner", {"auto_calibrate": False})
    assert [number(checkpoint="other"), number(checkpoint="other")] == [5, 5]
    monkeypatch.setitem(graph_run.SHIFTS, "servo", graph_run.SHIFTS["payload"])
    assert number(checkpoint="other") == 6


def test_a_control_is_a_run_of_its_own_with_a_disabled_aligner(made: list[tuple], tmp_path: Path) -> None:
    aligned, control = (report_of("servo", 0, tmp_path, None, aligned=aligned) for aligned in (True, False))
    assert (aligned["file"], aligned["enable"]) == ("servo-0.json", True)
    assert (control["file"], control["enable"]) == ("servo-0-control.json", False)
    assert len(made) == 2 and "enable" not in graph_run.PARAMETERS["aligner"]


def test_the_model_is_that_of_the_parameter_if_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_run, "policy_of", lambda folder: Path(folder).name)
    assert graph_run.model_of(None) == "tiny_reach"


def test_the_nodes_calibrate_as_long_runs_without_them_do() -> None:
    policy, aligner = graph_run.PARAMETERS["policy"], graph_run.PARAMETERS["aligner"]
    assert policy["calibrate_duration"] == CALIBRATION.duration_s
    assert policy["calibrate_amplitude"] == CALIBRATION.amplitude
    assert aligner["auto_calibrate_after"] == PATIENCE_NS / 1e9


def test_an_unseen_body_is_there_from_the_start_the_one_of_the_seed(made: list[tuple], tmp_path: Path) -> None:
    for seed in (0, 3):
        report_of("unseen", seed, tmp_path, None)
    assert [bodies for bodies, *_ in made] == [["unseen_1000_0"], ["unseen_1000_3"]]


def report(bodies: list[float], targets: list[tuple[float, bool]]) -> dict[str, Any]:
    """A run of 100 s whose first chunk came after 5 s."""
    rows = {"bodies": [[t, "body"] for t in bodies], "targets": targets, "chunks": [[5.0], [5.4]], "align": []}
    return {"duration_s": 100.0, "series": {name: {"columns": [], "rows": found} for name, found in rows.items()}}


def test_an_unseen_body_has_recovered_after_three_targets_in_a_row_from_the_first_chunk_on() -> None:
    ends = [(13.0, False), (21.0, False), (24.0, True), (32.0, False), (34.0, True), (36.0, True), (39.0, True)]
    found = figures_of(report([0.0], ends))
    assert (found["recovery_start_s"], found["reached_later"]) == (34.0, 1.0)
    assert math.isinf(figures_of(report([0.0], ends[:-1]))["recovery_start_s"])


def test_a_shift_has_figures_before_it_after_it_and_after_the_shift_back() -> None:
    ends = [(float(t), t <= 30 or t > 40) for t in range(2, 100, 2)]
    found = figures_of(report([0.0, 30.0, 65.0], ends))
    assert (found["recovery_shift_s"], found["recovery_back_s"]) == (16.0, 7.0)
    assert (found["reached_before"], found["reached_shifted"], found["reached_back"]) == (1.0, 1.0, 1.0)
