"""The run report as one picture: everything in a report over one time axis. Must not know ROS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfalign_ros.run_summary import LOSSES


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw a run report: six panels over one time axis, written to ``path`` (PNG)."""
    import matplotlib  # late: it takes a second to import, and a robot's run may need no picture

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    series = {name: _columns(table) for name, table in report["series"].items()}
    chunks, aligns, tokens, distance = (series[name] for name in ("chunks", "align", "e_token", "distance_to_target"))
    targets = series["targets"]
    figure, axes = plt.subplots(6, 1, figsize=(11, 14), sharex=True, layout="constrained")
    figure.suptitle(_headline(report), fontsize=11)
    latency_axis, age_axis, loss_axis, difference_axis, token_axis, distance_axis = axes

    for index, (t, duration) in enumerate(zip(aligns["t"], aligns["duration_s"], strict=True)):
        for axis in axes:
            label = "align call" if index == 0 and axis is latency_axis else None
            axis.axvspan(t - duration, t, color="0.88", lw=0, label=label)

    latency_axis.plot(chunks["t"], _scaled(chunks["latency_s"], 1e3), ".-", ms=4, lw=0.7, label="inference")
    for name, style in (("p50", ":"), ("p99", "--")):
        if (value := report["latency_s"]["all"][name]) is not None:
            latency_axis.axhline(value * 1e3, color="0.4", lw=0.9, ls=style, label=f"{name} {value * 1e3:.1f} ms")
    latency_axis.set_ylabel("chunk latency [ms]")

    age_axis.plot(chunks["t"], _scaled(chunks["observation_age_s"], 1e3), ".-", ms=4, lw=0.7, color="C4")
    age_axis.set_ylabel("observation age [ms]")

    for colour, loss in zip(("C0", "C1", "C2"), LOSSES, strict=False):
        name = loss.replace("_", " ")
        loss_axis.plot(aligns["t"], aligns[f"holdout_before.{loss}"], "-", marker="o", ms=3, color=colour, label=name)
        loss_axis.plot(aligns["t"], aligns[f"holdout_after.{loss}"], ":", marker="x", ms=4, color=colour)
    loss_axis.plot([], [], "-o", color="0.4", ms=3, label="current token")
    loss_axis.plot([], [], ":x", color="0.4", ms=4, label="shadow token")
    loss_axis.set_ylabel("hold-out loss")

    times, means, errors = (np.array(aligns[name]) for name in ("t", "difference_mean", "difference_stderr"))
    verdicts = np.array(aligns["accepted"], bool)
    for mask, colour, name in ((verdicts, "C2", "accepted"), (~verdicts, "C3", "refused")):
        if mask.any():
            difference_axis.errorbar(
                times[mask], means[mask], 2 * errors[mask], fmt="o", ms=4, capsize=2, color=colour, label=name
            )
    difference_axis.axhline(0.0, color="0.4", lw=0.8)
    difference_axis.set_ylabel("shadow − current\n(hold-out total, ± 2 s.e.)")

    token_axis.step(chunks["t"], chunks["e_token_version"], where="post", color="C0", label="version used by chunks")
    token_axis.plot(tokens["t"], tokens["version"], "o", ms=4, color="C1", label="version published")
    token_axis.set_ylabel("E-Token version")
    token_axis.yaxis.get_major_locator().set_params(integer=True)
    norm_axis = token_axis.twinx()
    norm_axis.plot(aligns["t"], aligns["e_token_norm"], "-", color="C3", lw=0.9, label="norm of E")
    norm_axis.set_ylabel("norm of E", color="C3")

    distance_axis.plot(distance["t"], _scaled(distance["metres"], 100), color="C5", lw=1)
    ends, reached = np.array(targets["t"]), np.array(targets["reached"], bool)
    for mask, colour, name in ((reached, "C2", "target reached"), (~reached, "C3", "time over, not reached")):
        for index, end in enumerate(ends[mask]):
            distance_axis.axvline(end, color=colour, lw=0.9, ls="--", label=name if index == 0 else None)
    distance_axis.set_ylabel("distance to target [cm]")
    distance_axis.set_xlabel("time [s]")
    distance_axis.set_xlim(0, max(report["duration_s"], 1e-3))
    for axis in (latency_axis, age_axis, distance_axis):
        axis.set_ylim(bottom=0)

    for axis in axes:
        axis.grid(alpha=0.3)
        handles, labels = axis.get_legend_handles_labels()
        if axis is token_axis:
            more_handles, more_labels = norm_axis.get_legend_handles_labels()
            handles, labels = handles + more_handles, labels + more_labels
        if handles:
            # Above the panel: inside it would cover data.
            axis.legend(
                handles, labels, fontsize=8, ncols=len(labels), loc="lower right", bbox_to_anchor=(1, 1), frameon=False
            )
        if not any(line.get_xdata().size for line in axis.get_lines() if hasattr(line.get_xdata(), "size")):
            axis.text(0.5, 0.5, "nothing received", transform=axis.transAxes, ha="center", va="center", color="0.5")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _headline(report: Mapping[str, Any]) -> str:
    if not report["ok"]:
        return f"{report['contract']}: {report['reason']}"
    align, latency, token = report["align"], report["latency_s"], report["e_token"]
    text = (
        f"{report['contract']}, {report['duration_s']:.0f} s: {report['chunks']['count']} chunks, "
        f"latency p50 {latency['all']['p50'] * 1e3:.1f} ms, p99 {latency['all']['p99'] * 1e3:.1f} ms; "
        f"{align['calls']} align calls, {align['accepted']} accepted; E-Token {token['first_version']} → "
        f"{token['last_version']}"
    )
    ratio = latency["ratio"]["p99"]
    dropped = sum(camera["dropped"] for camera in report["frames"].values())
    text += f"\nframes dropped: {dropped}"
    text += f"; p99 while aligning / otherwise: {ratio:.2f}" if ratio is not None else ""
    targets = report["targets"]
    return text + (f"; {targets['reached']} of {targets['attempted']} targets reached" if targets["attempted"] else "")


def _columns(table: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    rows = table["rows"]
    return {name: [row[index] for row in rows] for index, name in enumerate(table["columns"])}


def _scaled(values: Sequence[float], factor: float) -> list[float]:
    return [value * factor for value in values]
