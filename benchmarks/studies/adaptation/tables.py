"""The study's figures as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.harness import percent, print_table
from benchmarks.studies.adaptation.arms import LABELS, NEAREST


def print_arms(rows: Sequence[dict[str, Any]]) -> None:
    """One table per range and family."""
    for range_, family in dict.fromkeys((row["range"], row["family"]) for row in rows):
        group = [row for row in rows if (row["range"], row["family"]) == (range_, family)]
        print(f"\n{family}, {range_} the training range ({group[0]['bodies']} bodies)\n")
        print_table(_ARMS, [_arm_row(row) for row in group])
        for row in group:
            if over := row.get("over_nearest"):
                print(
                    f"{LABELS[row['arm']]} against {LABELS[NEAREST]}, body by body: success "
                    f"{points(over['success_gain'])}, action error {radians(over['action_error_gain'])}"
                )


_ARMS = (
    "arm", "success", "distance", "action error", "loss", "harmed: success", "harmed: actions", "accepted", "robot",
    "compute",
)  # fmt: skip


def _arm_row(row: dict[str, Any]) -> list[str]:
    return [
        LABELS.get(row["arm"], row["arm"]),
        percent(row["success"]),
        f"{100 * row['final_distance']['mean']:.1f} cm",
        radians(row["action_error"]),
        f"{row['losses']['total']['mean']:.3f}" if "losses" in row else "–",
        percent(row.get("harmed_success")),
        percent(row.get("harmed_action_error")),
        percent(row.get("accepted")),
        _seconds(row.get("robot_s")),
        _seconds(row.get("compute_s")),
    ]


def print_curves(rows: Sequence[dict[str, Any]]) -> None:
    print(f"\nOver transitions, no guard ({rows[0]['bodies']} bodies)\n")
    lines = [
        [f"{LABELS[row['arm']]}, {row.get('asked', 0)}", percent(row["success"]), radians(row["action_error"])]
        for row in rows
    ]
    print_table(("arm, transitions", "success", "action error"), lines)


def print_shifts(rows: Sequence[dict[str, Any]]) -> None:
    print(f"\nShifts in mid-work and back ({rows[0]['runs']} runs each); targets reached from 30 s after a shift on\n")
    header = (
        "shift", "before", "shifted", "back", "recovered: shift", "back", "median", "commits", "refusals", "drifts"
    )  # fmt: skip
    lines = []
    for row in rows:
        median = float(np.median(row["recovery_shift_s"]))
        lines.append(
            [
                f"{row['shift']}, {'self-aligner' if row['aligned'] else 'unaligned'}",
                *(percent(row[f"reached_{name}"]) for name in ("before", "shifted", "back")),
                *(percent(row[f"recovered_{name}"]) for name in ("shift", "back")),
                _seconds(median) if math.isfinite(median) else "never",
                *(f"{row[kind]:.1f}" for kind in ("accepted", "refused", "drift")),
            ]
        )
    print_table(header, lines)


def print_right(figures: dict[str, Any]) -> None:
    print(
        f"\nAlready right: {figures['opportunities']} opportunities in {figures['runs']} runs, "
        f"{figures['accepted']} commits; success {percent(figures['success_before'])} before, "
        f"{percent(figures['success_after'])} after; worse: {percent(figures['harmed_success'])} of the runs by "
        f"success, {percent(figures['harmed_action_error'])} by action error"
    )


def print_targets(found: Sequence[dict[str, Any]]) -> None:
    print("\nTargets\n")
    lines = [
        [one["target"], f"{one['found']:.3f}", f"{one['expected']:.3f}", "yes" if one["met"] else "NO"] for one in found
    ]
    print_table(("target", "found", "expected", "met"), lines)


def points(change: dict[str, float]) -> str:
    """Of a share."""
    mean, low, high = (100 * change[name] for name in ("mean", "low", "high"))
    return f"{mean:+.0f} [{low:+.0f}, {high:+.0f}] points"


def radians(value: dict[str, float]) -> str:
    return f"{value['mean']:.4f} [{value['low']:.4f}, {value['high']:.4f}]"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} s"
