"""The run report's numbers and picture, from records made by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from selfalign_core.study.run_picture import draw
from selfalign_core.study.run_record import LOSSES, SETS, AlignRound, Chunk, RunRecord, Status, Token
from selfalign_core.study.run_summary import frame_counts, progress_line, split_by_align, summarise
from selfalign_core.study.statistics import finite, statistics


def ns(seconds: float) -> int:
    return round(seconds * 1e9)


def chunk(stamp: float, latency: float = 0.02, age: float = 0.01, version: int = 0) -> Chunk:
    return Chunk(ns(stamp), version, np.zeros((16, 7), np.float32), latency, age)


def align(
    end: float, duration: float = 0.5, version: int = 0, accepted: bool = True, loss: float = 1.0, **options: Any
) -> AlignRound:
    losses = {name: dict.fromkeys(LOSSES, loss) for name in SETS}
    values: dict[str, Any] = {
        "attempted": True, "steps": 8, "attempt_duration": 2 * duration, "difference_mean": -0.1,
        "difference_stderr": 0.02, "losses": losses,
    }  # fmt: skip
    return AlignRound(
        ns(end), "collect", "because", version, version + accepted, 1.5, 40, duration, accepted=accepted,
        **(values | options),
    )  # fmt: skip


def watching(end: float, **options: Any) -> AlignRound:
    return AlignRound(ns(end), "watch", "watching", 1, 1, 1.5, 12, 0.01, **options)


def record(start: float = 0.0, duration: float = 10.0, contract: str = "arm") -> RunRecord:
    return RunRecord(contract, ns(start), ns(start + duration))


def records() -> RunRecord:
    run = record(100.0, 4.0, "sim_arm")
    run.chunks = [chunk(100.0 + 0.4 * i, latency=0.02 + 0.001 * i) for i in range(10)]
    run.rounds = [
        align(102.0), align(103.0, version=1, accepted=False),
        watching(103.2, drift_tested=True, drift_factor=1.1),
        watching(103.5, drift_tested=True, drift=True, drift_factor=2.0),
    ]  # fmt: skip
    run.bodies = [(ns(100.1), "nominal"), (ns(103.3), "bent")]
    run.tokens = [Token(ns(100.5), 0, "d", np.ones(1)), Token(ns(102.0), 1, "d", np.full(1, 1.5))]
    run.frames = {"camera/overhead": [ns(100.0 + i / 30) for i in range(60) if i not in (7, 8, 20)]}
    run.distances = [(ns(100.0), 0.4), (ns(101.0), 0.3), (ns(102.0), 0.35)]
    run.targets = [(ns(100.8), True), (ns(102.0), True), (ns(103.5), False)]
    run.statuses = {"policy: chunks": Status(0, "moving", {"chunks": "10"})}
    return run


def test_statistics_are_percentiles_of_all_values() -> None:
    assert statistics([i / 100 for i in range(101)]) == pytest.approx(
        {"count": 101, "mean": 0.5, "p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
    )
    assert statistics([]) == {"count": 0, "mean": None, "p50": None, "p95": None, "p99": None, "max": None}


@pytest.mark.parametrize(
    ("stamp", "during"),
    [(1.0, False), (1.45, True), (1.485, True), (1.6, True), (1.98, True), (2.0, False)],
)
def test_a_chunk_counts_as_made_while_aligning_if_its_inference_overlaps(stamp: float, during: bool) -> None:
    # The inference runs from 10 ms to 60 ms after the stamp, the align call from 1.5 to 2.0.
    chunks = [chunk(stamp, latency=0.05, age=0.01)]
    assert split_by_align(chunks, [align(2.0)]) == ((chunks, []) if during else ([], chunks))


def test_latency_ratio_compares_with_and_without_align_calls() -> None:
    run = record()
    run.chunks = [chunk(0.1 * i, latency=0.03 if 20 <= i < 25 else 0.02) for i in range(50)]
    run.rounds = [align(2.5, duration=0.505)]
    latency = summarise(run)["latency_s"]
    assert latency["while_aligning"]["count"] == 5 and latency["while_not_aligning"]["count"] == 45
    assert latency["ratio"]["p99"] == pytest.approx(1.5)
    run.rounds = []
    assert summarise(run)["latency_s"]["ratio"]["p99"] is None


def test_gaps_in_the_stamps_are_dropped_frames() -> None:
    counts = frame_counts([ns(i / 30) for i in range(90) if i not in (7, 8, 20)])
    assert counts["received"] == 87 and counts["dropped"] == 3
    assert counts["rate_hz"] == pytest.approx(30.0)
    assert frame_counts([]) == {"received": 0, "dropped": 0, "rate_hz": None}
    assert frame_counts([ns(5.0)]) == {"received": 1, "dropped": 0, "rate_hz": None}


def test_jitter_of_the_stamps_is_no_dropped_frame() -> None:
    jitter = [0.004, -0.005, 0.001, 0.005, -0.002]
    assert frame_counts([ns(i / 30 + jitter[i % 5]) for i in range(90)])["dropped"] == 0


def test_report_holds_what_happened() -> None:
    report = summarise(records())
    assert report["ok"] and report["reason"] == ""
    assert (report["schema"], report["version"]) == ("selfalign/run_report", 4)
    assert report["chunks"] == {"count": 10, "rate_hz": pytest.approx(2.5), "first_t": 0.0, "horizon": 16, "dim": 7}
    expected = {"rounds": 4, "attempts": 2, "accepted": 1, "refused": 1, "returned": 0, "drifts": 1, "duration_s": None}
    assert report["align"] | {"duration_s": None} == expected
    assert report["align"]["duration_s"]["max"] == 1.0
    assert report["e_token"] == {"first_version": 0, "last_version": 1, "norm": 1.5}
    assert report["frames"]["camera/overhead"]["dropped"] == 3
    distance = report["distance_to_target_m"]
    assert (distance["first"], distance["last"], distance["minimum"]) == (0.4, 0.35, 0.3)
    targets = report["targets"]
    assert (targets["attempted"], targets["reached"]) == (3, 2)
    # From the end of one target to that of the next; when the first one began is not known.
    assert targets["seconds_to_reach"]["count"] == 1 and targets["seconds_to_reach"]["max"] == pytest.approx(1.2)
    assert report["series"]["targets"]["rows"][2] == [pytest.approx(3.5), False]
    assert report["diagnostics"]["policy: chunks"] == {"level": "ok", "message": "moving", "values": {"chunks": "10"}}
    table = report["series"]["align"]
    assert len(table["rows"]) == 4 and len(table["columns"]) == len(table["rows"][0])
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    assert rows[0]["t"] == pytest.approx(2.0) and rows[0]["guard_after.inverse_dynamics"] == 1.0
    assert [row["accepted"] for row in rows] == [True, False, False, False]
    assert [row["drift"] for row in rows] == [False, False, False, True]
    assert report["bodies"] == ["nominal", "bent"]
    assert report["series"]["bodies"]["rows"][1] == [pytest.approx(3.3), "bent"]


def test_a_run_without_chunks_says_what_the_nodes_complain_about() -> None:
    run = record(duration=3.0)
    assert summarise(run)["reason"] == "no action chunk was made in 3.0 s (no node published diagnostics)"
    run.statuses = {
        "policy: inputs": Status(2, "camera wrist: no message received on /camera/wrist", {}),
        "buffer: transitions": Status(0, "0 transitions", {}),
    }
    report = summarise(run)
    assert not report["ok"]
    assert report["reason"] == (
        "no action chunk was made in 3.0 s (policy: inputs: camera wrist: no message received on /camera/wrist)"
    )
    assert "camera wrist" in progress_line(run, 3.0, 10.0)


def test_numbers_that_are_not_finite_are_null_in_json() -> None:
    run = records()
    run.rounds.append(align(103.5, version=1, loss=math.nan))
    text = json.dumps(finite(summarise(run)), allow_nan=False)
    assert json.loads(text)["series"]["align"]["rows"][4][-1] is None


def test_progress_line_tells_the_state_of_the_run() -> None:
    line = progress_line(records(), elapsed=4.0, total=30.0)
    for part in (
        "4/30 s", "10 chunks", "2 align attempts (1 accepted)", "E-Token v1", "35.0 cm to target",
        "2 of 3 targets reached",
    ):  # fmt: skip
        assert part in line


@pytest.mark.parametrize("run", [records(), record(duration=3.0)], ids=["full", "empty"])
def test_picture_is_drawn(run: RunRecord, tmp_path: Path) -> None:
    draw(summarise(run), tmp_path / "run.png")
    with Image.open(tmp_path / "run.png") as image:
        assert image.format == "PNG" and image.width >= 1000 and image.height >= 1000
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 20)) > 10  # something was drawn
