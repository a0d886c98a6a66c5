"""From measurements per body and run to figures with 95 % intervals, and whether the targets were met. Plain data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.harness import interval, share, share_over_bodies
from benchmarks.studies.adaptation.arms import EXPERT, NEAREST, OURS, UNALIGNED
from benchmarks.studies.adaptation.settings import COUNTS
from benchmarks.studies.adaptation.shifts import (
    BACK_S,
    BEFORE_S,
    RECOVERY_S,
    SHIFTED_S,
    reached_share,
    recovery_s,
)

POOLED = "every family"
Bodies = Sequence[dict[str, Any]]


def arms_table(bodies: Bodies) -> list[dict[str, Any]]:
    """A row per range, family and arm; ``POOLED`` is all families together."""
    rows = []
    for range_ in dict.fromkeys(body["range"] for body in bodies):
        of_range = [body for body in bodies if body["range"] == range_]
        families = list(dict.fromkeys(body["family"] for body in of_range))
        groups = {family: [body for body in of_range if body["family"] == family] for family in families}
        if len(groups) > 1:
            groups[POOLED] = of_range
        for family, group in groups.items():
            for arm in dict.fromkeys(arm for body in group for arm in body["arms"]):
                having = [body for body in group if arm in body["arms"]]
                rows.append({"range": range_, "family": family, "arm": arm, **arm_figures(having, arm)})
    return rows


def arm_figures(bodies: Bodies, arm: str) -> dict[str, Any]:
    """The figures of one arm over ``bodies``.

    ``success``, ``final_distance`` [m], ``action_error`` [rad], ``losses``: intervals over bodies; ``..._gain``: the
    same minus the unaligned arm's body by body. ``harmed_...``: share of bodies that do worse than unaligned by more
    than one standard error. ``over_nearest``: of the aligner, the same against the nearest entry's arm.
    """
    measured = [body["arms"][arm] for body in bodies]
    figures: dict[str, Any] = {"bodies": len(bodies), "success": share_over_bodies([m["success"] for m in measured])}
    for name in ("final_distance", "action_error"):
        figures[name] = interval([float(np.mean(m[name])) for m in measured])
    if "losses" in measured[0]:
        figures["losses"] = {k: interval([m["losses"][k] for m in measured]) for k in measured[0]["losses"]}
    for name in ("transitions", "robot_s", "compute_s"):
        if name in measured[0]:
            figures[name] = float(np.mean([m[name] for m in measured]))
    if measured[0].get("accepted") is not None:
        figures["accepted"] = share([m["accepted"] for m in measured])
    if UNALIGNED in bodies[0]["arms"]:
        figures |= against(bodies, arm, UNALIGNED)
    if arm == OURS and NEAREST in bodies[0]["arms"]:
        figures["over_nearest"] = against(bodies, OURS, NEAREST)
    return figures


def against(bodies: Bodies, arm: str, other: str) -> dict[str, Any]:
    """``..._gain`` and ``harmed_...`` of :func:`arm_figures`, of ``arm`` against ``other``."""
    pairs = [(body["arms"][other], body["arms"][arm]) for body in bodies]
    differences = {
        name: [float(np.mean(after[name])) - float(np.mean(before[name])) for before, after in pairs]
        for name in ("success", "action_error")
    }
    harmed_success = [is_worse(after["success"], before["success"]) for before, after in pairs]
    harmed_error = [is_worse(before["action_error"], after["action_error"]) for before, after in pairs]
    return {
        "success_gain": interval(differences["success"]),
        "action_error_gain": interval(differences["action_error"]),
        "harmed_success": share(harmed_success),
        "harmed_action_error": share(harmed_error),
    }


def is_worse(lower: Sequence[float], higher: Sequence[float]) -> bool:
    """Whether ``higher`` lies above ``lower``, pair by pair, by more than one standard error of the mean."""
    rise = np.asarray(higher, np.float64) - np.asarray(lower, np.float64)
    stderr = rise.std(ddof=1) / math.sqrt(len(rise)) if len(rise) > 1 else 0.0
    return bool(rise.mean() > stderr)


def curves_table(bodies: Bodies) -> list[dict[str, Any]]:
    """A row per arm and number of transitions; 0 is unaligned."""
    rows = [{"arm": arm, "transitions": 0, **arm_figures(bodies, UNALIGNED)} for arm in (NEAREST, OURS)]
    for arm in (NEAREST, OURS):
        rows += [{"arm": arm, **arm_figures(bodies, f"{arm}@{count}"), "asked": count} for count in COUNTS]
    return rows


def shifts_table(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per shift, with and without the aligner.

    Shares of targets reached before the shift, more than 30 s after it, and more than 30 s after the shift back;
    seconds to recovery after each; runs that recovered in time.
    """
    rows = []
    back, end = BEFORE_S + SHIFTED_S, BEFORE_S + SHIFTED_S + BACK_S
    for shift, aligned in dict.fromkeys((run["shift"], run["aligned"]) for run in runs):
        group = [run for run in runs if (run["shift"], run["aligned"]) == (shift, aligned)]
        targets = [run["targets"] for run in group]
        row: dict[str, Any] = {"shift": shift, "aligned": aligned, "runs": len(group)}
        spans = {"before": (0.0, BEFORE_S), "shifted": (BEFORE_S + RECOVERY_S, back), "back": (back + RECOVERY_S, end)}
        for name, span in spans.items():
            row[f"reached_{name}"] = interval([reached_share(t, *span) for t in targets])
        for name, span in (("shift", (BEFORE_S, back)), ("back", (back, end))):
            seconds = [recovery_s(t, *span) for t in targets]
            row[f"recovery_{name}_s"] = seconds
            row[f"recovered_{name}"] = share([s <= RECOVERY_S for s in seconds])
        for kind in ("accepted", "refused", "drift"):
            row[kind] = float(np.mean([sum(event["kind"] == kind for event in run["events"]) for run in group]))
        rows.append(row)
    return rows


def right_figures(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Success before and after all opportunities, and the share of runs that ended worse."""
    pairs = [(run["before"], run["after"]) for run in runs]
    change = [float(np.mean(after["success"])) - float(np.mean(before["success"])) for before, after in pairs]
    return {
        "runs": len(runs),
        "opportunities": sum(len(run["attempts"]) for run in runs),
        "accepted": sum(run["accepted"] for run in runs),
        "success_before": interval([float(np.mean(before["success"])) for before, _ in pairs]),
        "success_after": interval([float(np.mean(after["success"])) for _, after in pairs]),
        "success_change": interval(change),
        "harmed_success": share([is_worse(after["success"], before["success"]) for before, after in pairs]),
        "harmed_action_error": share(
            [is_worse(before["action_error"], after["action_error"]) for before, after in pairs]
        ),
    }


def targets(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """What was to be reached, what was found, and whether it was met; only for what was measured."""
    found = [*_arm_targets(figures.get("arms", []))]
    if "right" in figures:
        right = figures["right"]
        found += [
            _target("already right: success falls by at most 1 point", right["success_change"]["mean"], -0.01, _above),
            _target("already right: runs that end worse, at most", right["harmed_success"]["mean"], 0.02, _below),
            _target(
                "already right: runs that end worse by action error, at most",
                right["harmed_action_error"]["mean"],
                0.02,
                _below,
            ),
        ]
    for row in figures.get("shifts", []):
        if row["aligned"]:
            for name, what in (("shift", "the shift"), ("back", "the shift back")):
                text = f"{row['shift']}: runs recovered within {RECOVERY_S:.0f} s of {what}, at least"
                found.append(_target(text, row[f"recovered_{name}"]["mean"], 0.9, _above))
    return found


def _arm_targets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    by_place = {(row["range"], row["family"], row["arm"]): row for row in rows}
    for (range_, family, arm), ours in by_place.items():
        if arm != OURS:
            continue
        expert, nearest = (by_place.get((range_, family, name)) for name in (EXPERT, NEAREST))
        where = f"{family}, {range_} the training range"
        success = ours["success"]["mean"]
        if range_ == "inside" and family in ("all", POOLED):
            found += [
                _target(f"{where}: transitions, at most", ours["transitions"], 32, _below),
                _target(f"{where}: seconds of robot time, at most", ours["robot_s"], 30, _below),
            ]
            if expert:
                least = 0.9 * expert["success"]["mean"]
                found.append(_target(f"{where}: success, 0.9 of the upper bound", success, least, _above))
            if nearest:
                text = f"{where}: action error's upper end, below the nearest entry's lower end"
                found.append(_target(text, ours["action_error"]["high"], nearest["action_error"]["low"], _below))
            found.append(_target(f"{where}: success gained on unaligned", ours["success_gain"]["mean"], 0.3, _above))
        if range_ == "beyond":
            least = -ours["success_gain"]["stderr"]
            text = f"{where}: success gained, no less than minus one standard error"
            found.append(_target(text, ours["success_gain"]["mean"], least, _above))
    return found


def _above(value: float, limit: float) -> bool:
    return value >= limit


def _below(value: float, limit: float) -> bool:
    return value <= limit


def _target(text: str, value: float, limit: float, test: Callable[[float, float], bool]) -> dict[str, Any]:
    return {"target": text, "found": value, "expected": limit, "met": bool(test(value, limit))}
