"""How two replays of one bag differ, in numbers: what another parameter file or another checkpoint changes.

Pure functions over replay reports (``selfalign_core.study.replay_report``) and the losses on the bag
(``selfalign_core.study.bag_losses``). Must not know ROS, torch, or how a replay is run. A comparison is one JSON
object:

=============== =======================================================================================================
key             content
=============== =======================================================================================================
schema, version ``"selfalign/replay_comparison"``, 2
bag, contract   what was replayed, on which robot; ``duration_s`` of the bag, ``joints`` (name and unit)
parameters      those that differ: ``node.name`` -> [value in the first, value in the second]
chunks          ``paired``: how many were made from the same observation; over these, ``joints``: mean and maximum
                absolute difference of each joint over all actions, and of its first action [rad or m]
e_token         distance of the two tokens in force, at the end and at its largest, in spreads of the bank (null, with
                a ``reason``, where they belong to different models)
runs            the two replays, each with ``label`` and what :func:`_run` says
series          over time, seconds since the bag began, ``columns`` and ``rows``: first_action (difference per joint),
                jump (of either run at its own chunks, largest over joints), e_token (norms and distance), attempts
=============== =======================================================================================================

A jump is how far the first action of a chunk lies from the action that the chunk before has for the same time: what a
robot would feel at a hand-over without blending. What was not measured is NaN or None.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from selfalign_core.errors import InputError
from selfalign_core.robot.commands import step_in_force
from selfalign_core.robot.types import token_norm
from selfalign_core.study.replay_report import record_of
from selfalign_core.study.run_record import TASKS, AlignRound, Chunk, RunRecord
from selfalign_core.text_table import align_columns

SCHEMA = "selfalign/replay_comparison"
SCHEMA_VERSION = 2
_SAME = ("bag", "contract", "joints", "dt_ns", "start_ns", "end_ns")


@dataclass(frozen=True)
class _Replay:
    """One report, what was said in it, and ``scores``: what ``score_change`` said of its tokens."""

    label: str
    report: Mapping[str, Any]
    scores: Mapping[str, Any]

    @cached_property
    def record(self) -> RunRecord:
        return record_of(self.report)

    @cached_property
    def tokens(self) -> list[tuple[int, np.ndarray]]:
        """(In force from [ns], (T, W)), in order."""
        data = {token.version: token.data for token in self.record.tokens}
        later = [(one.stamp_ns, data[one.version_after]) for one in self.record.rounds if one.accepted]
        return [(self.record.start_ns, self.record.tokens[0].data), *later]

    @property
    def digest(self) -> str:
        return self.record.tokens[0].model_digest

    @cached_property
    def jumps(self) -> list[tuple[float, float]]:
        """Where a chunk follows one that still has an action for its stamp: seconds, and the largest joint's jump."""
        found, dt_ns = [], self.report["dt_ns"]
        for before, chunk in itertools.pairwise(self.record.chunks):
            step = step_in_force(
                stamp_ns=before.stamp_ns, dt_ns=dt_ns, horizon=len(before.actions), now_ns=chunk.stamp_ns
            )
            if step is not None:
                jump = np.abs(chunk.actions[0] - before.actions[step]).max()
                found.append((self.record.seconds(chunk.stamp_ns), float(jump)))
        return found

    def times(self, rounds: Iterable[AlignRound]) -> list[float]:
        """When they were, in seconds."""
        return [self.record.seconds(one.stamp_ns) for one in rounds]


def compare(
    reports: Sequence[Mapping[str, Any]], scores: Sequence[Mapping[str, Any]], labels: Sequence[str]
) -> dict[str, Any]:
    """The comparison (see the module) of two replay reports; ``scores``: what ``score_change`` said of each.

    Raises:
        InputError: they are not of the same bag and robot.
    """
    for name in _SAME:
        one, other = (report[name] for report in reports)
        if one != other:
            raise InputError(f"replays to compare: found {name} {one} and {other}; expected the same")
    first, second = (_Replay(*each) for each in zip(labels, reports, scores, strict=True))
    common, joints, seconds = first.report, first.report["joints"], first.record.seconds
    pairs = _pairs(first.record.chunks, second.record.chunks)
    tokens = _token_series(first, second)
    distances = [row[-1] for row in tokens]
    return {
        "schema": SCHEMA,
        "version": SCHEMA_VERSION,
        "bag": common["bag"],
        "contract": common["contract"],
        "duration_s": first.record.duration_s,
        "joints": joints,
        "parameters": _differing(*(report["parameters"] for report in reports)),
        "chunks": {"paired": len(pairs), "joints": _chunk_differences(pairs, joints)},
        "e_token": {
            "distance_last_spreads": distances[-1],
            "distance_max_spreads": max(distances),
            "reason": "" if first.digest == second.digest else "the two belong to different models",
        },
        "runs": [_run(first), _run(second)],
        "series": {
            "first_action": {
                "columns": ["t", *(joint["name"] for joint in joints)],
                "rows": [[seconds(a.stamp_ns), *abs(b.actions[0] - a.actions[0]).tolist()] for a, b in pairs],
            },
            "jump": {
                "columns": ["run", "t", "jump"],
                "rows": [[number, *jump] for number, replay in enumerate((first, second)) for jump in replay.jumps],
            },
            "e_token": {"columns": ["t", "norm_first", "norm_second", "distance_spreads"], "rows": tokens},
            "attempts": _attempt_series(first, second),
        },
    }


def _run(replay: _Replay) -> dict[str, Any]:
    """Counts and times of the attempts, what they cost, the token they led to, the losses before and after."""
    record, tokens = replay.record, [token for _, token in replay.tokens]
    attempts = record.attempts
    return {
        "label": replay.label,
        "chunks": len(record.chunks),
        "inference_s": _mean_max([chunk.inference_s for chunk in record.chunks]),
        "jump": _mean_max([jump for _, jump in replay.jumps]),
        "rounds": len(record.rounds),
        "last_round": record.rounds[-1].text if record.rounds else "",
        "attempts": len(attempts),
        "accepted_at_s": replay.times(one for one in attempts if one.accepted),
        "refused_at_s": replay.times(one for one in attempts if not one.accepted),
        "drift_at_s": replay.times(one for one in record.rounds if one.drift),
        "compute_per_attempt_s": _mean_max([one.compute_s for one in attempts]),
        "compute_s": math.fsum(one.compute_s for one in record.rounds),
        "e_token": {
            "norm_first": token_norm(tokens[0]),
            "norm_last": token_norm(tokens[-1]),
            "moved_spreads": _distance(tokens[0], tokens[-1], replay.scores["spread"]),
        },
        "losses_on_bag": {name: value for name, value in replay.scores.items() if name != "spread"},
    }


def _pairs(first: Sequence[Chunk], second: Sequence[Chunk]) -> list[tuple[Chunk, Chunk]]:
    """Chunks of the two that were made from the same observation, in order."""
    by_stamp = {chunk.stamp_ns: chunk for chunk in second}
    return [(chunk, by_stamp[chunk.stamp_ns]) for chunk in first if chunk.stamp_ns in by_stamp]


def _chunk_differences(
    pairs: Sequence[tuple[Chunk, Chunk]], joints: Sequence[Mapping[str, str]]
) -> list[dict[str, Any]]:
    differences = []
    for a, b in pairs:
        steps = min(len(a.actions), len(b.actions))  # two checkpoints may look ahead differently far
        differences.append(np.abs(b.actions[:steps] - a.actions[:steps]))
    every = np.concatenate(differences) if differences else np.full((1, len(joints)), math.nan)
    first = np.stack([difference[0] for difference in differences]) if differences else every
    return [
        {
            **joint,
            "mean": float(every[:, column].mean()),
            "max": float(every[:, column].max()),
            "first_action_mean": float(first[:, column].mean()),
            "first_action_max": float(first[:, column].max()),
        }
        for column, joint in enumerate(joints)
    ]


def _token_series(first: _Replay, second: _Replay) -> list[list[float]]:
    """Time, norm in either run and distance [spreads], whenever a token changes and at the end."""
    changes = {stamp for replay in (first, second) for stamp, _ in replay.tokens}
    rows = []
    for stamp in sorted(changes | {first.record.end_ns}):
        one, other = (_in_force(replay.tokens, stamp) for replay in (first, second))
        same = first.digest == second.digest
        distance = _distance(one, other, first.scores["spread"]) if same else math.nan
        rows.append([first.record.seconds(stamp), token_norm(one), token_norm(other), distance])
    return rows


def _in_force(tokens: Sequence[tuple[int, np.ndarray]], stamp_ns: int) -> np.ndarray:
    return [token for begin, token in tokens if begin <= stamp_ns][-1]


def _distance(one: np.ndarray, other: np.ndarray, spread: float) -> float:
    """Root mean square over the elements, in spreads of the bank, as ``Trusted.nearest`` measures."""
    return float(np.sqrt(np.square(one - other).mean()) / spread)


def _attempt_series(*replays: _Replay) -> dict[str, list[Any]]:
    sets = ("guard_before", "guard_after")
    names = ("accepted", "start", "steps", "difference_mean", "difference_stderr", "compute_s")
    rows = [
        [
            number,
            replay.record.seconds(one.stamp_ns),
            *(getattr(one, name) for name in names),
            *(one.losses[which][loss] for which in sets for loss in TASKS),
            one.text,
        ]
        for number, replay in enumerate(replays)
        for one in replay.record.attempts
    ]
    columns = ["run", "t", *names, *(f"{which}.{loss}" for which in sets for loss in TASKS), "text"]
    return {"columns": columns, "rows": rows}


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {
        f"{node}.{name}": [value, second[node][name]]
        for node, values in first.items()
        for name, value in values.items()
        if value != second[node][name]
    }


def _mean_max(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    array = np.asarray(values, np.float64)
    mean, largest = (float(array.mean()), float(array.max())) if array.size else (math.nan, math.nan)
    return {"mean": mean, "max": largest}


# ---------------------------------------------------------------------------------------------------------- for people


def table(comparison: Mapping[str, Any]) -> str:
    """The comparison as text: what differs, the two runs side by side, every attempt, the joints."""
    blocks = [
        f"Replays of {comparison['bag']} ({comparison['duration_s']:.1f} s) on {comparison['contract']}",
        "\n".join(f"  {name}: {one} → {other}" for name, (one, other) in comparison["parameters"].items())
        or "  no parameter differs",
        align_columns(_run_lines(comparison)),
        "\n".join(_notes(comparison)),
        *([align_columns(_attempt_lines(comparison))] if comparison["series"]["attempts"]["rows"] else []),
        align_columns(_joint_lines(comparison)),
    ]
    return "\n\n".join(blocks)


def _run_lines(comparison: Mapping[str, Any]) -> list[tuple[str, ...]]:
    runs, token = comparison["runs"], comparison["e_token"]

    def line(name: str, of: Any, together: str = "") -> tuple[str, ...]:
        return (name, *(of(run) for run in runs), together)

    lines = [
        line("", lambda run: run["label"], "between the two"),
        line("chunks", lambda run: str(run["chunks"]), f"{comparison['chunks']['paired']} of the same observation"),
        line("inference [ms]: mean, max", lambda run: _pair(run["inference_s"], 1e3, ".1f")),
        line("jump between chunks [rad or m]: mean, max", lambda run: _pair(run["jump"], 1, ".4f")),
        line("rounds of the aligner", lambda run: str(run["rounds"])),
        line("attempts to align", lambda run: str(run["attempts"])),
        line("  accepted (at [s])", lambda run: _times(run["accepted_at_s"])),
        line("  refused (at [s])", lambda run: _times(run["refused_at_s"])),
        line("  drift noticed (at [s])", lambda run: _times(run["drift_at_s"])),
        line("compute per attempt [s]: mean, max", lambda run: _pair(run["compute_per_attempt_s"], 1, ".2f")),
        line("compute of all rounds [s]", lambda run: f"{run['compute_s']:.2f}"),
        line(
            "E-Token norm: first → last",
            lambda run: f"{run['e_token']['norm_first']:.3f} → {run['e_token']['norm_last']:.3f}",
        ),
        line(
            "E-Token moved, distance at the end [spreads]",
            lambda run: f"{run['e_token']['moved_spreads']:.3f}",
            token["reason"] or _number(token["distance_last_spreads"]),
        ),
    ]
    lines += [
        line(f"{loss.replace('_', ' ')} loss on the bag", lambda run, loss=loss: _loss_change(run, loss))
        for loss in TASKS
    ]
    return lines


def _notes(comparison: Mapping[str, Any]) -> list[str]:
    """What either run ended with, and why losses were not measured."""
    notes = []
    for run in comparison["runs"]:
        notes.append(f"{run['label']}: last round: {run['last_round'] or 'none'}")
        if reason := run["losses_on_bag"].get("reason"):
            notes.append(f"{run['label']}: losses on the bag not measured: {reason}")
    return notes


def _attempt_lines(comparison: Mapping[str, Any]) -> list[tuple[str, ...]]:
    series, labels = comparison["series"]["attempts"], [run["label"] for run in comparison["runs"]]
    losses = (loss.replace("_", " ") for loss in TASKS)
    lines: list[tuple[str, ...]] = [("attempt", "at [s]", "verdict", "compute [s]", "loss change", *losses, "from")]
    for row in series["rows"]:
        a = dict(zip(series["columns"], row, strict=True))
        losses = (f"{_number(a[f'guard_before.{loss}'])} → {_number(a[f'guard_after.{loss}'])}" for loss in TASKS)
        change = f"{_percent(a['difference_mean'], '+')} ± {_percent(a['difference_stderr'])} %"
        verdict = "accepted" if a["accepted"] else "refused"
        lines.append((labels[a["run"]], f"{a['t']:.1f}", verdict, f"{a['compute_s']:.2f}", change, *losses, a["start"]))
    return lines


def _joint_lines(comparison: Mapping[str, Any]) -> list[tuple[str, ...]]:
    names = ("mean", "max", "first_action_mean", "first_action_max")
    head = ("difference of chunks", "mean", "max", "mean, first action", "max, first action")
    rows = comparison["chunks"]["joints"]
    return [head, *((f"{j['name']} [{j['unit']}]", *(_number(j[name], ".4f") for name in names)) for j in rows)]


def _pair(values: Mapping[str, float], factor: float, form: str) -> str:
    if _is_missing(values["mean"]):
        return "none"
    return f"{factor * values['mean']:{form}}, {factor * values['max']:{form}}"


def _times(times: Sequence[float]) -> str:
    return f"{len(times)} ({', '.join(f'{t:.1f}' for t in times)})" if times else "0"


def _loss_change(run: Mapping[str, Any], loss: str) -> str:
    found = run["losses_on_bag"]
    if "losses" not in found:
        return "not measured"
    values = found["losses"][loss]
    change = f"{values['difference']:+.4f} ± {_number(values['stderr'], '.4f')}"
    return f"{values['before']:.4f} → {values['after']:.4f} ({change})"


def _number(value: float | None, form: str = ".3f") -> str:
    return "none" if _is_missing(value) else f"{value:{form}}"


def _percent(value: float | None, sign: str = "") -> str:
    return _number(None if value is None else 100 * value, f"{sign}.1f")


def _is_missing(value: float | None) -> bool:
    """NaN, or what stands for it and for infinity in JSON."""
    return value is None or not math.isfinite(value)
