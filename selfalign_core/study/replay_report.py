"""The report of a replay: everything that the nodes said in it, exactly, and what was measured on the way.

Two replays are equal bit for bit if their ``chunks``, ``e_tokens`` and ``aligns`` are. Must not know ROS.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from selfalign_core.errors import ConfigError
from selfalign_core.study.run_record import AlignRound, Chunk, RunRecord, Token

SCHEMA = "selfalign/replay"
SCHEMA_VERSION = 5
COMPARED = ("chunks", "e_tokens", "aligns")
_ALIGN = (
    "stamp_ns", "version_before", "version_after", "state", "text", "returned", "attempted", "accepted", "start",
    "steps", "difference_mean", "difference_stderr", "drift", "e_token_norm", "losses",
)  # fmt: skip


def replay_report(record: RunRecord, error: str, **about: Any) -> dict[str, Any]:
    """Plain data. ``error``: why the replay is not whole, or "". ``about``: what was replayed, and how."""
    return {
        "schema": SCHEMA,
        "version": SCHEMA_VERSION,
        "ok": not error,
        "reason": error,
        "contract": record.contract,
        "start_ns": record.start_ns,
        "end_ns": record.end_ns,
        **about,
        "chunks": [
            {
                "stamp_ns": chunk.stamp_ns,
                "e_token_version": chunk.e_token_version,
                "shape": list(chunk.actions.shape),
                "sha256": _digest(chunk.actions),
                "actions": chunk.actions.tolist(),
            }
            for chunk in record.chunks
        ],
        "e_tokens": [
            {
                "version": token.version,
                "sha256": _digest(token.data),
                "model_digest": token.model_digest,
                "shape": list(token.data.shape),
                "data": token.data.ravel().tolist(),
            }
            for token in record.tokens
        ],
        "aligns": [{name: getattr(one, name) for name in _ALIGN} for one in record.rounds],
        # Measured, not computed: of no account when two replays are compared bit for bit.
        "measured": {
            "inference_s": [chunk.inference_s for chunk in record.chunks],
            "align_s": [one.compute_s for one in record.rounds],
        },
    }


def record_of(report: Mapping[str, Any]) -> RunRecord:
    """What was said in the replay of a report, and the times measured, as far as the report tells."""
    measured = report["measured"]
    seconds = zip(report["aligns"], measured["align_s"], strict=True)
    return RunRecord(
        report["contract"],
        report["start_ns"],
        report["end_ns"],
        chunks=[
            Chunk(one["stamp_ns"], one.get("e_token_version", 0), np.array(one["actions"], np.float64), inference_s)
            for one, inference_s in zip(report["chunks"], measured["inference_s"], strict=True)
        ],
        tokens=[
            Token(0, one["version"], one["model_digest"], np.array(one["data"], np.float64).reshape(one["shape"]))
            for one in report["e_tokens"]
        ],
        rounds=[AlignRound(**one, duration=spent, attempt_duration=spent) for one, spent in seconds],
    )


def first_difference(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> str:
    """Where two replay reports first differ in what the nodes produced; "" if they do not."""
    for name in COMPARED:
        for index, (one, other) in enumerate(zip(earlier[name], later[name], strict=False)):
            if one != other:
                keys = [key for key in one if one[key] != other.get(key)]
                return f"{name}[{index}].{keys[0]}: found {other.get(keys[0])}; expected {one[keys[0]]}"
        if len(earlier[name]) != len(later[name]):
            return f"{name}: found {len(later[name])} of them; expected {len(earlier[name])}"
    return ""


def read_report(path: Path) -> dict[str, Any]:
    """The report of an earlier replay. Raises ``ConfigError`` if the file holds none of this version."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"replay report {path}: found {error}; expected a report to compare with") from None
    kind = (report.get("schema"), report.get("version")) if isinstance(report, dict) else None
    if kind != (SCHEMA, SCHEMA_VERSION):
        raise ConfigError(f"replay report {path}: found {kind}; expected {(SCHEMA, SCHEMA_VERSION)}")
    return report


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()
