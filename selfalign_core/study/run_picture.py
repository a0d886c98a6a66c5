"""The run report as one picture: everything in a report over one time axis. Must not know ROS."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfalign_core.study.run_record import LOSSES

_EVENTS = {
    "body changed": {"color": "black", "lw": 1.6, "ls": "-"},
    "drift noticed": {"color": "C1", "lw": 1.2, "ls": "-."},
    "E-Token accepted": {"color": "C2", "lw": 1.2, "ls": "--"},
    "E-Token refused": {"color": "C3", "lw": 1.0, "ls": ":"},
}


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw a run report: five panels over one time axis, written to ``path`` (PNG)."""
    from matplotlib.figure import Figure  # late: it takes a second to import, and a robot's run may need no picture

    series = {name: columns_of(table) for name, table in report["series"].items()}
    figure = Figure(figsize=(11, 13), layout="constrained")
    axes = figure.subplots(5, 1, sharex=True)
    figure.suptitle(_headline(report), fontsize=11)
    attempts = where(series["align"], series["align"]["attempted"])
    _draw_distance(axes[0], series)
    _draw_losses(axes[1], attempts)
    _draw_verdicts(axes[2], attempts, series["align"])
    _draw_token(axes[3], series, report["duration_s"])
    _draw_latency(axes[4], series["chunks"], report)
    _draw_events(axes, series)
    axes[-1].set_xlabel("time [s]")
    axes[-1].set_xlim(0, max(report["duration_s"], 1e-3))
    for axis in axes:
        finish_panel(axis)
    figure.savefig(path, dpi=110)


def _draw_distance(axis: Any, series: Mapping[str, Any]) -> None:
    distance, targets = series["distance_to_target"], series["targets"]
    axis.plot(distance["t"], _scaled(distance["metres"], 100), color="C0", lw=1)
    ends, reached = np.array(targets["t"]), np.array(targets["reached"], bool)
    for mask, colour, marker, name in ((reached, "C2", "^", "target reached"), (~reached, "C3", "x", "time over")):
        if mask.any():
            axis.plot(ends[mask], np.zeros(mask.sum()), marker, color=colour, ms=6, label=name, clip_on=False)
    axis.set_ylabel("distance to target [cm]")
    axis.set_ylim(bottom=0)


def _draw_losses(axis: Any, attempts: Mapping[str, Any]) -> None:
    for colour, loss in zip(("C0", "C1", "C4"), LOSSES, strict=False):
        name = loss.replace("_", " ")
        axis.plot(attempts["t"], attempts[f"guard_before.{loss}"], "-o", ms=4, color=colour, label=name)
        axis.plot(attempts["t"], attempts[f"guard_after.{loss}"], ":x", ms=5, color=colour)
    axis.plot([], [], "-o", color="0.4", ms=4, label="current token")
    axis.plot([], [], ":x", color="0.4", ms=5, label="shadow token")
    axis.set_yscale("log")
    axis.set_ylabel("loss on the guard's\ntransitions")


def _draw_verdicts(axis: Any, attempts: Mapping[str, Any], rounds: Mapping[str, Any]) -> None:
    times, means, errors = (np.array(attempts[n], float) for n in ("t", "difference_mean", "difference_stderr"))
    accepted = np.array(attempts["accepted"], bool)
    for mask, colour, name in ((accepted, "C2", "accepted"), (~accepted, "C3", "refused")):
        mask = mask & np.isfinite(errors)
        if mask.any():
            bars = 200 * errors[mask]
            axis.errorbar(times[mask], 100 * means[mask], bars, fmt="o", ms=4, capsize=2, color=colour, label=name)
    factors = np.array(rounds["drift_factor"], float)
    if (tested := np.isfinite(factors)).any():
        times, rise = np.array(rounds["t"], float)[tested], 100 * (factors[tested] - 1)
        axis.plot(times, rise, ".", ms=4, color="C1", label="loss against baseline (watch)")
    axis.axhline(0.0, color="0.4", lw=0.8)
    axis.set_yscale("symlog", linthresh=50.0)  # a drift is many times as large as what decides an attempt
    axis.set_yticks([-100, 0, 100, 1000], ["−100", "0", "100", "1000"])
    axis.set_ylabel("shadow − current\n[% of loss, ± 2 s.e.]")


def _draw_token(axis: Any, series: Mapping[str, Any], duration_s: float) -> None:
    chunks, tokens = series["chunks"], series["e_token"]
    norms = [*tokens["norm"], *tokens["norm"][-1:]]
    axis.step([*tokens["t"], *[duration_s][: len(tokens["t"])]], norms, where="post", color="C5", label="norm of E")
    axis.plot(tokens["t"], tokens["norm"], "o", ms=4, color="C5")
    axis.set_ylabel("norm of E", color="C5")
    if norms:
        axis.set_ylim(0.95 * min(norms), 1.05 * max(norms) + 1e-6)
    versions = axis.twinx()
    versions.step(chunks["t"], chunks["e_token_version"], where="post", color="0.4", lw=1)
    versions.set_ylabel("version used by chunks", color="0.4")
    if used := chunks["e_token_version"]:
        versions.set_ylim(min(used) - 0.5, max(used) + 0.5)
    versions.yaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def _draw_latency(axis: Any, chunks: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    p50, p99 = (report["latency_s"]["all"][name] for name in ("p50", "p99"))
    name = f"inference (p50 {p50 * 1e3:.0f} ms, p99 {p99 * 1e3:.0f} ms)" if p50 is not None else "inference"
    axis.plot(chunks["t"], _scaled(chunks["latency_s"], 1e3), ".-", ms=3, lw=0.6, label=name)
    ages = _scaled(chunks["observation_age_s"], 1e3)
    axis.plot(chunks["t"], ages, ".-", ms=3, lw=0.6, color="C4", label="age of its observation")
    axis.set_ylabel("chunk latency [ms]")
    axis.set_ylim(bottom=0)


def _draw_events(axes: Sequence[Any], series: Mapping[str, Any]) -> None:
    """Vertical lines through all panels; the new body's name above the first."""
    aligns, bodies = series["align"], series["bodies"]
    rounds = [dict(zip(aligns, row, strict=True)) for row in zip(*aligns.values(), strict=True)]
    named = list(zip(bodies["t"], bodies["name"], strict=True))
    changes = [(t, name) for (_, before), (t, name) in itertools.pairwise(named) if name != before]
    times = {
        "body changed": [t for t, _ in changes],
        "drift noticed": [r["t"] for r in rounds if r["drift"]],
        "E-Token accepted": [r["t"] for r in rounds if r["accepted"] or r["returned"]],
        "E-Token refused": [r["t"] for r in rounds if r["attempted"] and not r["accepted"]],
    }
    for kind, style in _EVENTS.items():
        for axis in axes:
            for index, t in enumerate(times[kind]):
                axis.axvline(t, label=kind if index == 0 and axis is axes[0] else None, alpha=0.8, zorder=0.5, **style)
    for t, name in changes:
        axes[0].annotate(
            name, (t, 1), xycoords=("data", "axes fraction"), xytext=(3, -3), textcoords="offset points",
            va="top", fontsize=8, fontweight="bold",
        )  # fmt: skip


def finish_panel(axis: Any) -> None:
    """Grid, legend above the panel, and a word where there is nothing to see."""
    axis.grid(alpha=0.3)
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        # Above the panel: inside it would cover data.
        axis.legend(
            handles, labels, fontsize=8, ncols=len(labels), loc="lower right", bbox_to_anchor=(1, 1), frameon=False
        )
    lines = any(np.size(line.get_xdata()) and line.get_transform() == axis.transData for line in axis.get_lines())
    if not lines and not axis.patches:
        axis.text(0.5, 0.5, "nothing received", transform=axis.transAxes, ha="center", va="center", color="0.5")


def _headline(report: Mapping[str, Any]) -> str:
    if not report["ok"]:
        return f"{report['contract']}: {report['reason']}"
    align, latency, token, targets = (report[name] for name in ("align", "latency_s", "e_token", "targets"))
    text = f"{report['contract']}, {report['duration_s']:.0f} s"
    text += f": {targets['reached']} of {targets['attempted']} targets reached" if targets["attempted"] else ""
    text += (
        f"; {align['attempts']} align attempts, {align['accepted']} accepted; E-Token {token['first_version']} → "
        f"{token['last_version']}"
    )
    dropped = sum(camera["dropped"] for camera in report["frames"].values())
    ratio = latency["ratio"]["p99"]
    text += f"\n{report['chunks']['count']} chunks; frames dropped: {dropped}"
    return text + (f"; latency p99 while aligning / otherwise: {ratio:.2f}" if ratio is not None else "")


def columns_of(table: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Column name -> values of a table with ``columns`` and ``rows``."""
    rows = table["rows"]
    return {name: [row[index] for row in rows] for index, name in enumerate(table["columns"])}


def where(columns: Mapping[str, list[Any]], mask: Sequence[bool]) -> dict[str, list[Any]]:
    """The columns in the rows that ``mask`` keeps."""
    return {name: [v for v, keep in zip(values, mask, strict=True) if keep] for name, values in columns.items()}


def _scaled(values: Sequence[float], factor: float) -> list[float]:
    return [value * factor for value in values]
