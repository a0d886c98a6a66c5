"""What a run was like, in numbers: from the record of what was said in it to the run report.

Pure functions over a run's record; this module must not know ROS. The report is one JSON object:

==================== ==================================================================================================
key                  content
==================== ==================================================================================================
schema, version      ``"selfalign/run_report"``, 4
ok, reason           whether the run made chunks, and why not
duration_s           how long was listened; all ``t`` below are seconds since then started
contract             name of the robot contract
chunks               count, rate_hz, first_t, horizon, dim
latency_s            inference time per chunk, statistics ``all``, ``while_aligning``, ``while_not_aligning`` and
                     ``ratio`` (while_aligning over while_not_aligning, for p50, p95 and p99)
observation_age_s    age of the observation when inference started, statistics
frames               per camera topic: received, dropped (gaps in the stamps), rate_hz
e_token              first_version, last_version, norm (of the last, as guard_max_norm bounds it)
align                rounds, attempts, accepted, refused, returned (to an earlier token), drifts, duration_s (statistics
                     over attempts)
bodies               of a simulated robot: the names of the bodies it had, in their order
distance_to_target_m first, last, mean, minimum
targets              of a simulated robot: attempted (over, reached or not), reached, seconds_to_reach (statistics)
diagnostics          last status of each name: level (ok, warn, error, stale), message, values
series               over time: chunks, align (every round), e_token, distance_to_target, targets, bodies, each with
                     ``columns`` and ``rows``
==================== ==================================================================================================

Statistics are ``count, mean, p50, p95, p99, max``, the last five null when count is 0. A number that was not finite is
null.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from selfalign_core.study.run_record import LOSSES, SETS, AlignRound, Chunk, RunRecord
from selfalign_core.study.statistics import statistics

SCHEMA = "selfalign/run_report"
SCHEMA_VERSION = 4
LEVELS = {0: "ok", 1: "warn", 2: "error", 3: "stale"}


def split_by_align(chunks: Sequence[Chunk], rounds: Sequence[AlignRound]) -> tuple[list[Chunk], list[Chunk]]:
    """The chunks whose inference overlapped a round of the aligner, and the others."""
    spans = [(one.stamp_ns - 1e9 * one.duration, one.stamp_ns) for one in rounds]
    during: list[Chunk] = []
    apart: list[Chunk] = []
    for chunk in chunks:
        start, end = chunk.inference
        overlaps = any(start < span_end and span_start < end for span_start, span_end in spans)
        (during if overlaps else apart).append(chunk)
    return during, apart


def frame_counts(stamps_ns: Sequence[int]) -> dict[str, float | int | None]:
    """Frames received and dropped, from header stamps alone.

    The camera's period is the median distance of two stamps; a gap of n periods is n - 1 frames dropped.
    """
    gaps = np.diff(np.unique(np.asarray(stamps_ns, np.int64))) / 1e9
    if gaps.size == 0:
        return {"received": len(stamps_ns), "dropped": 0, "rate_hz": None}
    period = float(np.median(gaps))
    dropped = int(np.maximum(np.rint(gaps / period) - 1, 0).sum())
    return {"received": len(stamps_ns), "dropped": dropped, "rate_hz": 1.0 / period}


def summarise(record: RunRecord) -> dict[str, Any]:
    """The run report (see the module)."""
    chunks, tokens, attempts = record.chunks, record.tokens, record.attempts
    during, apart = split_by_align(chunks, record.rounds)
    latency = {
        name: statistics([chunk.inference_s for chunk in some])
        for name, some in (("all", chunks), ("while_aligning", during), ("while_not_aligning", apart))
    }
    latency["ratio"] = {
        name: _ratio(latency["while_aligning"][name], latency["while_not_aligning"][name])
        for name in ("p50", "p95", "p99")
    }
    reason = why_no_chunk(record)
    accepted = sum(one.accepted for one in attempts)
    horizon, dim = chunks[-1].actions.shape if chunks else (None, None)
    return {
        "schema": SCHEMA,
        "version": SCHEMA_VERSION,
        "ok": not reason,
        "reason": reason,
        "contract": record.contract,
        "duration_s": record.duration_s,
        "chunks": {
            "count": len(chunks),
            "rate_hz": _rate([chunk.stamp_ns for chunk in chunks]),
            "first_t": record.seconds(chunks[0].stamp_ns) if chunks else None,
            "horizon": horizon,
            "dim": dim,
        },
        "latency_s": latency,
        "observation_age_s": statistics([chunk.observation_age_s for chunk in chunks]),
        "frames": {topic: frame_counts(stamps) for topic, stamps in record.frames.items()},
        "e_token": {
            "first_version": tokens[0].version if tokens else None,
            "last_version": tokens[-1].version if tokens else None,
            "norm": tokens[-1].norm if tokens else None,
        },
        "align": {
            "rounds": len(record.rounds),
            "attempts": len(attempts),
            "accepted": accepted,
            "refused": len(attempts) - accepted,
            "returned": sum(one.returned for one in record.rounds),
            "drifts": sum(one.drift for one in record.rounds),
            "duration_s": statistics([one.attempt_duration for one in attempts]),
        },
        "bodies": [name for _, name in record.bodies],
        "distance_to_target_m": _distance_summary([distance for _, distance in record.distances]),
        "targets": _target_summary(record.targets),
        "diagnostics": {
            name: {"level": LEVELS.get(status.level, "?"), "message": status.message, "values": dict(status.values)}
            for name, status in sorted(record.statuses.items())
        },
        "series": _series(record),
    }


def why_no_chunk(record: RunRecord) -> str:
    """Empty if chunks were made; otherwise one sentence with what the nodes themselves complain about."""
    if record.chunks:
        return ""
    said = [f"{name}: {status.message}" for name, status in sorted(record.statuses.items()) if status.level > 0]
    if not record.statuses:
        said = ["no node published diagnostics"]
    elif not said:
        said = ["no node complains"]
    return f"no action chunk was made in {record.duration_s:.1f} s ({'; '.join(said)})"


def progress_line(record: RunRecord, elapsed: float, total: float) -> str:
    """One line about the run so far; ``total`` 0 means it has no set end. Times in seconds."""
    parts = [f"{elapsed:.0f}/{total:.0f} s" if total else f"{elapsed:.0f} s", f"{len(record.chunks)} chunks"]
    if record.chunks:
        p50, p99 = np.percentile([1e3 * chunk.inference_s for chunk in record.chunks], (50, 99))
        parts[-1] += f" ({p50:.0f} ms, p99 {p99:.0f} ms)"
    parts.append(align_words(record))
    if record.distances:
        parts.append(f"{record.distances[-1][1] * 100:.1f} cm to target")
    if record.targets:
        parts.append(f"{sum(reached for _, reached in record.targets)} of {len(record.targets)} targets reached")
    if not record.chunks:
        worst = max(record.statuses.items(), key=lambda item: item[1].level, default=None)
        if worst is not None and worst[1].level > 0:
            parts.append(f"{worst[0]}: {worst[1].message}")
    return SEPARATOR.join(parts)


SEPARATOR = "  ·  "


def align_words(record: RunRecord) -> str:
    """Attempts to align so far, and the E-Token that they led to."""
    attempts = record.attempts
    words = f"{len(attempts)} align attempts ({sum(one.accepted for one in attempts)} accepted)"
    return words + (f"{SEPARATOR}E-Token v{record.tokens[-1].version}" if record.tokens else "")


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _rate(stamps_ns: Sequence[int]) -> float | None:
    span = (stamps_ns[-1] - stamps_ns[0]) / 1e9 if len(stamps_ns) > 1 else 0.0
    return (len(stamps_ns) - 1) / span if span > 0 else None


def _distance_summary(distances: Sequence[float]) -> dict[str, float | None]:
    if not distances:
        return {"first": None, "last": None, "mean": None, "minimum": None}
    mean = math.fsum(distances) / len(distances)
    return {"first": distances[0], "last": distances[-1], "mean": mean, "minimum": min(distances)}


def _target_summary(targets: Sequence[tuple[int, bool]]) -> dict[str, Any]:
    # The first one may have begun before anyone listened.
    times = [(end - begin) / 1e9 for (begin, _), (end, reached) in itertools.pairwise(targets) if reached]
    return {
        "attempted": len(targets),
        "reached": sum(reached for _, reached in targets),
        "seconds_to_reach": statistics(times),
    }


_ALIGN = (
    "duration_s", "state", "text", "version_before", "version_after", "e_token_norm", "transitions", "drift",
    "drift_factor", "returned", "attempted", "accepted", "start", "steps", "attempt_s", "difference_mean",
    "difference_stderr",
)  # fmt: skip


def _align_row(one: AlignRound) -> list[Any]:
    """In the order of ``_ALIGN``, then the losses; NaN where the round has not measured it."""
    judged, nothing = one.attempted or one.returned, dict.fromkeys(LOSSES, math.nan)
    values = vars(one) | {
        "duration_s": one.duration,
        "attempt_s": one.attempt_duration,
        "drift_factor": one.drift_factor if one.drift_tested else math.nan,
        "difference_mean": one.difference_mean if judged else math.nan,
        "difference_stderr": one.difference_stderr if judged else math.nan,
    }
    losses = one.losses if one.attempted else dict.fromkeys(SETS, nothing)
    return [*(values[name] for name in _ALIGN), *(losses[which][loss] for which in SETS for loss in LOSSES)]


def _series(record: RunRecord) -> dict[str, dict[str, list[Any]]]:
    def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, list[Any]]:
        return {"columns": ["t", *columns], "rows": [[record.seconds(at), *values] for at, *values in rows]}

    chunks = [(c.stamp_ns, c.inference_s, c.observation_age_s, c.e_token_version) for c in record.chunks]
    return {
        "chunks": table(("latency_s", "observation_age_s", "e_token_version"), chunks),
        "align": table(
            (*_ALIGN, *(f"{which}.{loss}" for which in SETS for loss in LOSSES)),
            [(one.stamp_ns, *_align_row(one)) for one in record.rounds],
        ),
        "e_token": table(("version", "norm"), [(t.stamp_ns, t.version, t.norm) for t in record.tokens]),
        "distance_to_target": table(("metres",), record.distances),
        "targets": table(("reached",), record.targets),
        "bodies": table(("name",), record.bodies),
    }
