"""The comparison of two replays as one picture: what differs over the time of the bag. Must not know ROS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfalign_core.study.run_picture import columns_of, finish_panel, where
from selfalign_core.study.run_record import TASKS

_COLOURS = ("C0", "C1")  # of the two runs, in every panel
_TIMED = ("first_action", "jump", "losses", "token", "compute")


def draw(comparison: Mapping[str, Any], path: Path) -> None:
    """Draw a comparison (``selfalign_core.study.replay_comparison``), written to ``path`` (PNG)."""
    from matplotlib.figure import Figure  # late: it takes a second to import

    series = {name: columns_of(table) for name, table in comparison["series"].items()}
    labels = [run["label"] for run in comparison["runs"]]
    layout: list[Any] = [[name, name] for name in _TIMED] + [["bag", "joints"]]
    figure = Figure(figsize=(11, 15), layout="constrained")
    axes = figure.subplot_mosaic(layout)
    figure.suptitle(_headline(comparison), fontsize=11)
    _draw_first_action(axes["first_action"], series["first_action"])
    _draw_jumps(axes["jump"], series["jump"], labels)
    _draw_losses(axes["losses"], series["attempts"], labels)
    _draw_token(axes["token"], series["e_token"], labels)
    _draw_compute(axes["compute"], series["attempts"], labels)
    _draw_bag_losses(axes["bag"], comparison["runs"])
    _draw_joints(axes["joints"], comparison["chunks"]["joints"])
    _draw_accepted([axes[name] for name in _TIMED], comparison["runs"])
    for name in _TIMED:
        axes[name].set_xlim(0, max(comparison["duration_s"], 1e-3))
        axes[name].set_xlabel("time in the bag [s]")
    for axis in axes.values():
        finish_panel(axis)
    figure.savefig(path, dpi=110)


def _draw_first_action(axis: Any, series: Mapping[str, list[Any]]) -> None:
    for number, name in enumerate(name for name in series if name != "t"):
        colour = f"C{len(_COLOURS) + number}"
        axis.plot(series["t"], series[name], ".-", ms=3, lw=0.8, color=colour, label=name)
    axis.set_ylabel("difference of the\nfirst action [rad or m]")
    axis.set_ylim(bottom=0)


def _draw_jumps(axis: Any, series: Mapping[str, list[Any]], labels: Sequence[str]) -> None:
    for run, (label, colour) in enumerate(zip(labels, _COLOURS, strict=True)):
        of_run = _of_run(series, run)
        axis.plot(of_run["t"], of_run["jump"], ".-", ms=3, lw=0.8, color=colour, label=label)
    axis.set_ylabel("jump between chunks\n[rad or m]")
    axis.set_ylim(bottom=0)


def _draw_losses(axis: Any, attempts: Mapping[str, list[Any]], labels: Sequence[str]) -> None:
    for run, (label, colour) in enumerate(zip(labels, _COLOURS, strict=True)):
        of_run = _of_run(attempts, run)
        loss = "inverse_dynamics"
        current, shadow = of_run[f"guard_before.{loss}"], of_run[f"guard_after.{loss}"]
        axis.plot(of_run["t"], current, "-o", ms=4, color=colour, label=f"{label}, current token")
        axis.plot(of_run["t"], shadow, ":x", ms=5, color=colour, label=f"{label}, shadow token")
    axis.set_ylabel("inverse dynamics loss\nat the attempts")


def _draw_token(axis: Any, series: Mapping[str, list[Any]], labels: Sequence[str]) -> None:
    for label, colour, name in zip(labels, _COLOURS, ("norm_first", "norm_second"), strict=True):
        axis.step(series["t"], series[name], where="post", color=colour, label=f"{label}, norm of E")
    axis.set_ylabel("norm of E")
    apart = axis.twinx()
    apart.step(series["t"], _numbers(series["distance_spreads"]), where="post", color="C5", lw=1.2)
    apart.set_ylabel("distance of the two\n[spreads of the bank]", color="C5")
    apart.set_ylim(bottom=0)


def _draw_compute(axis: Any, attempts: Mapping[str, list[Any]], labels: Sequence[str]) -> None:
    for run, (label, colour) in enumerate(zip(labels, _COLOURS, strict=True)):
        of_run = _of_run(attempts, run)
        times, compute = np.array(of_run["t"], float), np.array(of_run["compute_s"], float)
        accepted = np.array(of_run["accepted"], bool)
        for mask, marker, verdict in ((accepted, "^", "accepted"), (~accepted, "x", "refused")):
            if mask.any():
                axis.plot(times[mask], compute[mask], marker, ms=6, color=colour, label=f"{label}, {verdict}")
    axis.set_ylabel("compute per attempt [s]")
    axis.set_ylim(bottom=0)


def _draw_bag_losses(axis: Any, runs: Sequence[Mapping[str, Any]]) -> None:
    places = np.arange(len(TASKS))
    for number, (run, colour) in enumerate(zip(runs, _COLOURS, strict=True)):
        losses = run["losses_on_bag"].get("losses")
        if losses is None:
            continue
        for shift, which, alpha in ((0.0, "before", 0.4), (0.2, "after", 1.0)):
            heights = [losses[loss][which] for loss in TASKS]
            label = run["label"] if which == "after" else None
            axis.bar(places - 0.3 + 0.4 * number + shift, heights, 0.18, color=colour, alpha=alpha, label=label)
    axis.set_xticks(places, [loss.replace("_", " ") for loss in TASKS])
    axis.set_ylabel("loss on the bag\n(pale: first token, full: last)")


def _draw_joints(axis: Any, joints: Sequence[Mapping[str, Any]]) -> None:
    places = np.arange(len(joints))
    axis.bar(places - 0.2, _numbers([joint["mean"] for joint in joints]), 0.38, color="C4", label="mean")
    axis.bar(places + 0.2, _numbers([joint["max"] for joint in joints]), 0.38, color="C6", label="maximum")
    names = [f"{joint['name']}\n[{joint['unit']}]" for joint in joints]
    axis.set_xticks(places, names, rotation=30 if len(joints) > 4 else 0, fontsize=8)
    axis.set_ylabel("difference of chunks")


def _draw_accepted(axes: Sequence[Any], runs: Sequence[Mapping[str, Any]]) -> None:
    """A vertical line through all panels over time where a run accepted a token."""
    for run, colour in zip(runs, _COLOURS, strict=True):
        for number, t in enumerate(run["accepted_at_s"]):
            for axis in axes:
                label = f"{run['label']}, E-Token accepted" if number == 0 and axis is axes[0] else None
                axis.axvline(t, color=colour, lw=1.2, ls="--", alpha=0.8, zorder=0.5, label=label)


def _headline(comparison: Mapping[str, Any]) -> str:
    text = f"{comparison['contract']}, {comparison['duration_s']:.0f} s of {Path(comparison['bag']).name}"
    for run in comparison["runs"]:
        text += f"\n{run['label']}: {run['attempts']} align attempts, {len(run['accepted_at_s'])} accepted, "
        text += f"{run['compute_s']:.1f} s of computing"
    return text


def _of_run(series: Mapping[str, list[Any]], run: int) -> dict[str, list[Any]]:
    return where(series, [number == run for number in series["run"]])


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    """None, which stands for NaN in JSON, is NaN again."""
    return np.array(values, float)
