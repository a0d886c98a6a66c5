"""From a camera's message to the command: the benchmark follows the real node's chunks from one end to the other."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.speed import pipeline


def test_every_part_of_the_way_is_timed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("ROS_DOMAIN_ID", raising=False)
    file = tmp_path / "pipeline.json"
    assert pipeline.main(["--seconds", "4", "--json", str(file)]) in (0, 1)
    found = json.loads(file.read_text())
    assert found["commands"] >= 10
    assert set(found["milliseconds"]) >= set(pipeline.PARTS)
    assert 0.1 < found["processor_s_to_first_command"] < 1000
    for part in ("arrival", "prepare", "model", "finish", "return"):
        assert found["milliseconds"][part]["p50"] > 0, part
