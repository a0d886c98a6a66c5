"""The comparison of two replays: its numbers from reports made by hand, and the losses of tokens on the same motion."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from small_models import random_batch, small_policy

from selfalign_core.alignment.scoring import Scorer
from selfalign_core.errors import InputError
from selfalign_core.robot.types import EToken
from selfalign_core.study.bag_losses import score_change
from selfalign_core.study.replay_comparison import compare, table
from selfalign_core.study.run_record import TASKS

NS = 10**9
DT_NS = NS // 10
START_NS = 50 * NS
LABELS = ("a.yaml", "b.yaml")


def losses(value: float) -> dict[str, dict[str, float]]:
    sets = ("fit_before", "fit_after", "guard_before", "guard_after")
    return {name: dict.fromkeys((*TASKS, "total"), value) for name in sets}


def call(t: float, **values: Any) -> dict[str, Any]:
    nothing = {"attempted": False, "accepted": False, "drift": False, "version_before": 0, "version_after": 0}
    nothing |= {"start": "", "steps": 0, "difference_mean": 0.0, "difference_stderr": 0.0, "text": "collecting"}
    return {"stamp_ns": START_NS + round(t * NS), "losses": losses(0.0), **nothing, **values}


def attempt(t: float, accepted: bool, version: int = 0) -> dict[str, Any]:
    return call(
        t, attempted=True, accepted=accepted, version_before=version, version_after=version + accepted, steps=40,
        start="body_3", difference_mean=-0.1, difference_stderr=0.02, losses=losses(0.5), text="because",
    )  # fmt: skip


def token(version: int, *values: float) -> dict[str, Any]:
    return {"version": version, "model_digest": "d1", "shape": [1, 2], "data": list(values)}


def report() -> dict[str, Any]:
    """Four chunks of three actions of one rising joint and one that rests, half a second of overlap between them."""
    chunks = [
        {"stamp_ns": START_NS + i * 2 * DT_NS, "actions": [[0.1 * (2 * i + j), 1.0] for j in range(3)]}
        for i in range(4)
    ]
    return {
        "bag": "bag",
        "contract": "arm",
        "joints": [{"name": "lift", "unit": "rad"}, {"name": "slide", "unit": "m"}],
        "dt_ns": DT_NS,
        "start_ns": START_NS,
        "end_ns": START_NS + 5 * NS,
        "parameters": {"policy": {"seed": 0}, "aligner": {"align_frequency": 1.0, "mode": "subspace"}},
        "chunks": chunks,
        "e_tokens": [token(0, 3.0, 4.0)],
        "aligns": [call(1.0)],
        "measured": {"inference_s": [0.02] * 4, "align_s": [0.01]},
    }


def aligned() -> dict[str, Any]:
    """The same at another frequency: two attempts, the second accepted; the last chunk is another then."""
    other = report()
    other["parameters"]["aligner"]["align_frequency"] = 4.0
    other["aligns"] = [attempt(1.0, accepted=False), call(2.0, drift=True), attempt(3.0, accepted=True)]
    other["measured"]["align_s"] = [0.5, 0.25, 1.5]
    other["e_tokens"] = [token(0, 3.0, 4.0), token(1, 3.0, 5.0)]
    other["chunks"][3]["actions"] = [[0.6, 1.2], [0.7, 1.0], [0.8, 1.0]]
    return other


def scores(spread: float = 0.5) -> dict[str, Any]:
    measured = {"before": 0.4, "after": 0.3, "difference": -0.1, "stderr": 0.01}
    return {"spread": spread, "transitions": 12, "losses": dict.fromkeys(TASKS, measured)}


def test_a_comparison_says_how_chunks_attempts_and_tokens_differ() -> None:
    found = compare((report(), aligned()), (scores(), scores()), LABELS)
    assert found["parameters"] == {"aligner.align_frequency": [1.0, 4.0]}
    assert found["duration_s"] == 5.0

    assert found["chunks"]["paired"] == 4
    lift, slide = found["chunks"]["joints"]
    assert (lift["mean"], lift["max"]) == pytest.approx((0.0, 0.0))
    # One action of twelve, and one first action of four, is 0.2 m away.
    assert slide["mean"] == pytest.approx(0.2 / 12) and slide["max"] == pytest.approx(0.2)
    assert slide["first_action_mean"] == pytest.approx(0.05) and slide["first_action_max"] == pytest.approx(0.2)
    rows = found["series"]["first_action"]["rows"]
    assert [row[0] for row in rows] == pytest.approx([0.0, 0.2, 0.4, 0.6])
    assert rows[-1][1:] == pytest.approx([0.0, 0.2])

    first, second = found["runs"]
    assert (first["attempts"], first["rounds"], first["accepted_at_s"], first["compute_s"]) == (0, 1, [], 0.01)
    assert (second["attempts"], second["accepted_at_s"], second["refused_at_s"]) == (2, [3.0], [1.0])
    assert second["drift_at_s"] == [2.0]
    assert second["compute_per_attempt_s"] == {"mean": 1.0, "max": 1.5} and second["compute_s"] == 2.25
    # Root mean square, as guard_max_norm bounds it.
    norms = second["e_token"]["norm_first"], second["e_token"]["norm_last"]
    assert norms == pytest.approx((12.5**0.5, 17**0.5))

    # The element that changed did so by 1: 0.5 ** 0.5 as root mean square, twice as many spreads of 0.5.
    assert second["e_token"]["moved_spreads"] == pytest.approx(2 * 0.5**0.5)
    assert found["e_token"]["distance_last_spreads"] == pytest.approx(2 * 0.5**0.5)
    assert [row[0] for row in found["series"]["e_token"]["rows"]] == [0.0, 3.0, 5.0]
    assert found["series"]["e_token"]["rows"][0][-1] == 0.0


def test_a_jump_is_measured_where_the_chunk_before_still_has_an_action() -> None:
    smooth, rough = report(), report()
    rough["chunks"][2]["actions"][0][0] += 0.3
    rough["chunks"][3]["stamp_ns"] = START_NS + 4 * NS  # long after the horizon of the one before
    found = compare((smooth, rough), (scores(), scores()), LABELS)
    assert found["runs"][0]["jump"] == {"mean": pytest.approx(0.0), "max": pytest.approx(0.0)}
    assert found["runs"][1]["jump"] == {"mean": pytest.approx(0.15), "max": pytest.approx(0.3)}
    assert found["chunks"]["paired"] == 3


def test_tokens_of_different_models_have_no_distance() -> None:
    other = report()
    other["e_tokens"][0]["model_digest"] = "d2"
    found = compare((report(), other), (scores(), scores()), LABELS)
    assert np.isnan(found["e_token"]["distance_last_spreads"])
    assert "different models" in table(found)


def test_replays_of_different_bags_are_not_compared() -> None:
    other = report() | {"bag": "another"}
    with pytest.raises(InputError, match="found bag bag and another; expected the same"):
        compare((report(), other), (scores(), scores()), LABELS)


def test_the_table_answers_what_tuning_asks() -> None:
    second = aligned()
    second["aligns"][0]["difference_stderr"] = None  # infinite, so null in JSON
    text = table(compare((report(), second), (scores(), {"spread": 0.5, "reason": "too short"}), LABELS))
    lines = {line.split("  ")[0].strip() or line.strip(): line for line in text.splitlines()}
    assert "aligner.align_frequency: 1.0 → 4.0" in text
    assert lines["attempts to align"].split()[-2:] == ["0", "2"]
    assert "accepted (at [s])" in text and "1 (3.0)" in text and "1 (1.0)" in text
    assert "1.00, 1.50" in lines["compute per attempt [s]: mean, max"]
    assert "0.4000 → 0.3000 (-0.1000 ± 0.0100)" in lines["inverse dynamics loss on the bag"]
    assert "not measured" in lines["inverse dynamics loss on the bag"] and "too short" in text
    assert "-10.0 ± none %" in text and "-10.0 ± 2.0 %" in text


def test_nothing_made_is_no_error() -> None:
    empty = report() | {"chunks": [], "aligns": [], "measured": {"inference_s": [], "align_s": []}}
    found = compare((empty, copy.deepcopy(empty)), (scores(), scores()), LABELS)
    assert found["chunks"]["paired"] == 0 and "none" in table(found)


def test_losses_before_and_after_are_those_of_the_scorer_under_common_noise() -> None:
    policy = small_policy()
    batch = random_batch(policy, 6)
    own = policy.e_token
    moved = EToken(own.data + 0.5, 1, own.embodiment, own.model_digest)
    same = score_change(policy, batch, own, own)
    assert all(values["difference"] == values["stderr"] == 0.0 for values in same["losses"].values())
    found = score_change(policy, batch, own, moved)
    assert found["transitions"] == 6 and json.dumps(found)
    scorer = Scorer(policy, (1.0, 1.0, 1.0))
    summary = scorer.summary(scorer.prepare(batch), torch.from_numpy(moved.data), 16, 0)
    for loss in TASKS:
        values = found["losses"][loss]
        assert values["after"] == pytest.approx(getattr(summary, loss), rel=1e-5)
        assert values["difference"] == pytest.approx(values["after"] - values["before"])
        assert values["difference"] != 0.0 and values["stderr"] > 0.0
    with pytest.raises(InputError, match="digest"):
        score_change(policy, batch, own, EToken(own.data, 1, own.embodiment, "another"))
