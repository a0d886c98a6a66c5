"""Benchmarks of speed: the work they count is the model's, and both ways they compare are what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_models import small_policy

from benchmarks.speed import align_speed, latency
from benchmarks.speed.work import Card, Work, count
from selfalign_core.model.config import ModelConfig

POLICY = Path(__file__).resolve().parents[2] / "policies" / "tiny_reach"


def test_operations_of_a_step_are_those_of_its_matrix_products() -> None:
    config = ModelConfig.preset("tiny")
    prompt, cameras, size = 5, 2, config.action_expert
    suffix = config.peft_num_tokens + 1 + config.action_horizon
    keys = cameras * config.vision.num_patches + prompt + suffix
    heads, width = size.num_heads * size.head_dim, size.width
    layer = width * (2 * heads + 2 * size.head_dim) + 3 * width * size.mlp_dim
    products = suffix * size.depth * layer + 2 * suffix * keys * heads * size.depth
    actions = config.action_horizon * (2 * config.action_dim * width + 3 * width * width)
    expected = 2 * (products + actions + config.action_dim * width)
    assert count(config, cameras=cameras, prompt=prompt, precision="float32")["step"].operations == expected


def test_a_floor_is_the_longer_of_computing_and_reading() -> None:
    assert Work(8.0, 1.0).floor_ms(Card(4.0, 1.0)) == 2000.0
    assert Work(8.0, 3.0).floor_ms(Card(4.0, 1.0)) == 3000.0


def test_plain_and_fast_are_timed_in_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "latency.json"
    arguments = ["--sizes", "tiny-pi05", "--seconds", "0.01", "--checkpoint", str(POLICY), "--json", str(file)]
    status = latency.main(arguments)
    found = json.loads(file.read_text())
    policy, pi05 = found["results"][:2]
    assert status == (0 if policy["met"] else 1)
    for result in (policy, pi05):
        assert result["difference"] < 1e-5
        assert result["ratio"] > 1  # measured in turns; how much more is for the benchmark to say
        assert set(result["stages"]) >= {"image", "prefix", "step", "fixed"}
    counted = {result["size"]: result for result in found["results"][2:]}
    assert counted["pi0"]["chunk"]["floor_ms"]["H200"] == pytest.approx(6.5, abs=0.5)  # known to be about 7
    assert counted["pi05"]["chunk"]["floor_ms"]["H200"] == pytest.approx(7.5, abs=0.5)
    assert "GPU: not measured" in capsys.readouterr().out
    assert latency.main(["--seconds", "0"]) == 2


def test_both_ways_lead_to_the_tokens_gradient() -> None:
    policy = small_policy()
    bench = align_speed.Bench(policy, 4)
    assert float(bench.step().abs().sum()) > 0
    assert all(parameter.grad is None for parameter in policy.model.parameters())
    assert float(bench.joint().abs().sum()) > 0
    assert not any(parameter.requires_grad for parameter in policy.model.parameters())
    assert set(bench.stages(limit_ms=50.0)) == {"prepare", "identify", "refine", "guard"}


def test_an_alignment_step_takes_a_part_of_the_joint_pass() -> None:
    """Counted without numbers, here at the tiny size."""
    found = align_speed.counted("tiny", 32)
    assert found["ratio"] == pytest.approx(found["joint"] / found["step"])
    assert found["ratio"] > 3
