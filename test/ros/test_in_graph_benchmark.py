"""The benchmark of shifts in the running graph: which runs are made again. No node is started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.adaptation import in_graph


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The runs that were made: shift, seed, checkpoint. Each checkpoint is a model of its own."""
    runs: list[tuple] = []

    def run_once(shift: str, seed: int, report: Path, checkpoint: str | None, settings: dict) -> dict[str, Any]:
        runs.append((shift, seed, checkpoint))
        return {"number": len(runs), "file": report.name, "enable": settings["aligner"].get("enable", True)}

    monkeypatch.setattr(in_graph, "run_once", run_once)
    monkeypatch.setattr(in_graph, "_model", lambda checkpoint: SimpleNamespace(digest=f"digest of {checkpoint}"))
    return runs


def test_a_run_is_made_again_if_anything_that_decides_it_is_another(
    made: list[tuple], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def number(shift: str = "servo", seed: int = 0, checkpoint: str | None = None) -> int:
        return in_graph.report_of(shift, seed, tmp_path, checkpoint)["number"]

    assert [number(), number()] == [1, 1]
    assert number(seed=1) == 2
    assert number(shift="payload") == 3
    assert number() == 1
    assert [number(checkpoint="other"), number(checkpoint="other")] == [4, 4]
    assert made == [("servo", 0, None), ("servo", 1, None), ("payload", 0, None), ("servo", 0, "other")]
    monkeypatch.setitem(in_graph.PARAMETERS, "aligner", {"auto_calibrate": False})
    assert [number(checkpoint="other"), number(checkpoint="other")] == [5, 5]
    monkeypatch.setitem(in_graph.SHIFTS, "servo", in_graph.SHIFTS["payload"])
    assert number(checkpoint="other") == 6


def test_a_control_is_a_run_of_its_own_with_a_disabled_aligner(made: list[tuple], tmp_path: Path) -> None:
    aligned, control = (in_graph.report_of("servo", 0, tmp_path, None, aligned=aligned) for aligned in (True, False))
    assert (aligned["file"], aligned["enable"]) == ("servo-0.json", True)
    assert (control["file"], control["enable"]) == ("servo-0-control.json", False)
    assert len(made) == 2 and "enable" not in in_graph.PARAMETERS["aligner"]


def test_the_model_is_that_of_the_parameter_if_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_graph, "policy_of", lambda folder: Path(folder).name)
    assert in_graph._model(None) == "tiny_reach"
