"""What a run was like, in numbers: from records of what was received to the run report.

Pure functions over plain records; this module must not know ROS. The report is one JSON object:

==================== ==================================================================================================
key                  content
==================== ==================================================================================================
schema, version      ``"selfalign/run_report"``, 3
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

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SCHEMA = "selfalign/run_report"
SCHEMA_VERSION = 3
LOSSES = ("perception", "dynamics", "inverse_dynamics", "total")
SETS = ("fit_before", "fit_after", "guard_before", "guard_after")
LEVELS = {0: "ok", 1: "warn", 2: "error", 3: "stale"}


@dataclass(frozen=True)
class ChunkRecord:
    """One action chunk. Times in seconds; ``stamp`` is that of its observation."""

    stamp: float
    observation_age: float
    latency: float
    e_token_version: int
    horizon: int
    dim: int

    @property
    def inference(self) -> tuple[float, float]:
        """Start and end of the inference."""
        start = self.stamp + self.observation_age
        return start, start + self.latency


@dataclass(frozen=True)
class AlignRecord:
    """One round of the aligner that ended at ``end`` [s] after ``duration_s`` of computing.

    ``losses[set][loss]`` for the names in ``SETS`` and ``LOSSES``, None without an attempt; numbers that were not
    measured are NaN. ``attempt_s``: of computing for the attempt, in an earlier round, too.
    """

    end: float
    duration_s: float
    state: str
    text: str
    version_before: int
    version_after: int
    e_token_norm: float
    transitions: int = 0
    drift: bool = False
    drift_factor: float = math.nan
    returned: bool = False
    attempted: bool = False
    accepted: bool = False
    start: str = ""
    steps: int = 0
    attempt_s: float = 0.0
    difference_mean: float = math.nan
    difference_stderr: float = math.nan
    losses: Mapping[str, Mapping[str, float]] | None = None


@dataclass(frozen=True)
class TokenRecord:
    """One E-Token as it was published."""

    stamp: float
    version: int
    norm: float


@dataclass(frozen=True)
class StatusRecord:
    """The last diagnostic status of one name."""

    level: int
    message: str
    values: Mapping[str, str]


@dataclass
class RunRecords:
    """Everything received in one run, in the order of arrival. ``start`` and all stamps: seconds on one clock."""

    contract: str
    start: float
    duration: float = 0.0
    chunks: list[ChunkRecord] = field(default_factory=list)
    aligns: list[AlignRecord] = field(default_factory=list)
    tokens: list[TokenRecord] = field(default_factory=list)
    frames: dict[str, list[float]] = field(default_factory=dict)  # camera topic -> header stamps
    distances: list[tuple[float, float]] = field(default_factory=list)  # (time of arrival, metres)
    targets: list[tuple[float, bool]] = field(default_factory=list)  # (when it was over, whether it was reached)
    bodies: list[tuple[float, str]] = field(default_factory=list)  # (when it was in force, its name)
    statuses: dict[str, StatusRecord] = field(default_factory=dict)


def statistics(values: Sequence[float]) -> dict[str, float | int | None]:
    """Count, mean, percentiles (linear between samples) and maximum; null where there are no values."""
    if not values:
        return {"count": 0, "mean": None, "p50": None, "p95": None, "p99": None, "max": None}
    array = np.asarray(values, np.float64)
    p50, p95, p99 = np.percentile(array, (50, 95, 99))
    numbers = {"mean": array.mean(), "p50": p50, "p95": p95, "p99": p99, "max": array.max()}
    return {"count": len(values)} | {name: float(value) for name, value in numbers.items()}


def split_by_align(
    chunks: Sequence[ChunkRecord], aligns: Sequence[AlignRecord]
) -> tuple[list[ChunkRecord], list[ChunkRecord]]:
    """The chunks whose inference overlapped a round of the aligner, and the others."""
    calls = [(call.end - call.duration_s, call.end) for call in aligns]
    during: list[ChunkRecord] = []
    apart: list[ChunkRecord] = []
    for chunk in chunks:
        start, end = chunk.inference
        overlaps = any(start < call_end and call_start < end for call_start, call_end in calls)
        (during if overlaps else apart).append(chunk)
    return during, apart


def frame_counts(stamps: Sequence[float]) -> dict[str, float | int | None]:
    """Frames received and dropped, from header stamps alone.

    The camera's period is the median distance of two stamps; a gap of n periods is n - 1 frames dropped.
    """
    gaps = np.diff(np.unique(np.asarray(stamps, np.float64)))
    if gaps.size == 0:
        return {"received": len(stamps), "dropped": 0, "rate_hz": None}
    period = float(np.median(gaps))
    dropped = int(np.maximum(np.rint(gaps / period) - 1, 0).sum())
    return {"received": len(stamps), "dropped": dropped, "rate_hz": 1.0 / period}


def summarise(records: RunRecords) -> dict[str, Any]:
    """The run report (see the module)."""
    chunks = records.chunks
    during, apart = split_by_align(chunks, records.aligns)
    latency = {
        "all": statistics([chunk.latency for chunk in chunks]),
        "while_aligning": statistics([chunk.latency for chunk in during]),
        "while_not_aligning": statistics([chunk.latency for chunk in apart]),
    }
    latency["ratio"] = {
        name: _ratio(latency["while_aligning"][name], latency["while_not_aligning"][name])
        for name in ("p50", "p95", "p99")
    }
    reason = why_no_chunk(records)
    attempts = [call for call in records.aligns if call.attempted]
    accepted = sum(call.accepted for call in attempts)
    versions = [token.version for token in records.tokens]
    return {
        "schema": SCHEMA,
        "version": SCHEMA_VERSION,
        "ok": not reason,
        "reason": reason,
        "contract": records.contract,
        "duration_s": records.duration,
        "chunks": {
            "count": len(chunks),
            "rate_hz": _rate([chunk.stamp for chunk in chunks]),
            "first_t": chunks[0].stamp - records.start if chunks else None,
            "horizon": chunks[-1].horizon if chunks else None,
            "dim": chunks[-1].dim if chunks else None,
        },
        "latency_s": latency,
        "observation_age_s": statistics([chunk.observation_age for chunk in chunks]),
        "frames": {topic: frame_counts(stamps) for topic, stamps in records.frames.items()},
        "e_token": {
            "first_version": versions[0] if versions else None,
            "last_version": versions[-1] if versions else None,
            "norm": records.tokens[-1].norm if versions else None,
        },
        "align": {
            "rounds": len(records.aligns),
            "attempts": len(attempts),
            "accepted": accepted,
            "refused": len(attempts) - accepted,
            "returned": sum(call.returned for call in records.aligns),
            "drifts": sum(call.drift for call in records.aligns),
            "duration_s": statistics([call.attempt_s for call in attempts]),
        },
        "bodies": [name for _, name in records.bodies],
        "distance_to_target_m": _distance_summary([distance for _, distance in records.distances]),
        "targets": _target_summary(records.targets),
        "diagnostics": {
            name: {"level": LEVELS.get(status.level, "?"), "message": status.message, "values": dict(status.values)}
            for name, status in sorted(records.statuses.items())
        },
        "series": _series(records),
    }


def why_no_chunk(records: RunRecords) -> str:
    """Empty if chunks were made; otherwise one sentence with what the nodes themselves complain about."""
    if records.chunks:
        return ""
    said = [f"{name}: {status.message}" for name, status in sorted(records.statuses.items()) if status.level > 0]
    if not records.statuses:
        said = ["no node published diagnostics"]
    elif not said:
        said = ["no node complains"]
    return f"no action chunk was made in {records.duration:.1f} s ({'; '.join(said)})"


def progress_line(records: RunRecords, elapsed: float, total: float) -> str:
    """One line about the run so far; ``total`` 0 means it has no set end. Times in seconds."""
    parts = [f"{elapsed:.0f}/{total:.0f} s" if total else f"{elapsed:.0f} s"]
    latency = statistics([chunk.latency for chunk in records.chunks])
    parts.append(f"{len(records.chunks)} chunks")
    if records.chunks:
        parts[-1] += f" ({latency['p50'] * 1e3:.0f} ms, p99 {latency['p99'] * 1e3:.0f} ms)"
    attempts, accepted = (sum(getattr(call, name) for call in records.aligns) for name in ("attempted", "accepted"))
    parts.append(f"{attempts} align attempts ({accepted} accepted)")
    if records.tokens:
        parts.append(f"E-Token v{records.tokens[-1].version}")
    if records.distances:
        parts.append(f"{records.distances[-1][1] * 100:.1f} cm to target")
    if records.targets:
        parts.append(f"{sum(reached for _, reached in records.targets)} of {len(records.targets)} targets reached")
    if not records.chunks:
        worst = max(records.statuses.items(), key=lambda item: item[1].level, default=None)
        if worst is not None and worst[1].level > 0:
            parts.append(f"{worst[0]}: {worst[1].message}")
    return "  ·  ".join(parts)


def finite(value: Any) -> Any:
    """``value`` with every number that is not finite replaced by None: JSON knows no NaN."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _rate(stamps: Sequence[float]) -> float | None:
    span = stamps[-1] - stamps[0] if len(stamps) > 1 else 0.0
    return (len(stamps) - 1) / span if span > 0 else None


def _distance_summary(distances: Sequence[float]) -> dict[str, float | None]:
    if not distances:
        return {"first": None, "last": None, "mean": None, "minimum": None}
    mean = math.fsum(distances) / len(distances)
    return {"first": distances[0], "last": distances[-1], "mean": mean, "minimum": min(distances)}


def _target_summary(targets: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    # The first one may have begun before anyone listened.
    times = [end - begin for (begin, _), (end, reached) in itertools.pairwise(targets) if reached]
    return {
        "attempted": len(targets),
        "reached": sum(reached for _, reached in targets),
        "seconds_to_reach": statistics(times),
    }


def _series(records: RunRecords) -> dict[str, dict[str, list[Any]]]:
    start = records.start
    names = [field.name for field in dataclasses.fields(AlignRecord) if field.name not in ("end", "losses")]
    nothing = dict.fromkeys(LOSSES, math.nan)
    align_rows = [
        [
            call.end - start,
            *(getattr(call, name) for name in names),
            *((call.losses or dict.fromkeys(SETS, nothing))[name][loss] for name in SETS for loss in LOSSES),
        ]
        for call in records.aligns
    ]
    align_columns = ["t", *names, *(f"{name}.{loss}" for name in SETS for loss in LOSSES)]
    return {
        "chunks": {
            "columns": ["t", "latency_s", "observation_age_s", "e_token_version"],
            "rows": [
                [chunk.stamp - start, chunk.latency, chunk.observation_age, chunk.e_token_version]
                for chunk in records.chunks
            ],
        },
        "align": {"columns": align_columns, "rows": align_rows},
        "e_token": {
            "columns": ["t", "version", "norm"],
            "rows": [[token.stamp - start, token.version, token.norm] for token in records.tokens],
        },
        "distance_to_target": {
            "columns": ["t", "metres"],
            "rows": [[stamp - start, distance] for stamp, distance in records.distances],
        },
        "targets": {
            "columns": ["t", "reached"],
            "rows": [[stamp - start, reached] for stamp, reached in records.targets],
        },
        "bodies": {"columns": ["t", "name"], "rows": [[stamp - start, name] for stamp, name in records.bodies]},
    }
