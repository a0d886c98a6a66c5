"""The study's figures as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.studies.adaptation.arms import LABELS, NEAREST, OURS
from benchmarks.studies.adaptation.shifts import BEFORE_S, SHIFTED_S
from selfalign_core.files import write_atomically

_COLOURS = ("#9aa0a6", "#c5b0d5", "#56b4e9", "#e69f00", "#009e73", "#333333", "#cc79a7", "#d55e00", "#f0e442")
_SMOOTH = 12  # quarter seconds


def save_plots(directory: str | Path, figures: dict[str, Any], runs: Sequence[dict[str, Any]]) -> list[Path]:
    """Write a PNG per part that was measured; ``runs`` are the logs of the shifts."""
    made = []
    for name, draw, data in (
        ("arms", _draw_arms, figures.get("arms")),
        ("curves", _draw_curves, figures.get("curves")),
        ("shifts", _draw_shifts, runs),
    ):
        if not data:
            continue
        figure = draw(data)
        path = Path(directory) / f"{name}.png"
        write_atomically(path, partial(figure.savefig, dpi=110, format="png"))
        made.append(path)
    return made


def _draw_arms(rows: Sequence[dict[str, Any]]) -> Figure:
    """Success and action error per family, a bar per arm."""
    ranges = list(dict.fromkeys(row["range"] for row in rows))
    figure = Figure(figsize=(7.5 * len(ranges), 7), layout="constrained")
    axes = figure.subplots(2, len(ranges), squeeze=False)
    for column, range_ in enumerate(ranges):
        group = [row for row in rows if row["range"] == range_]
        families = list(dict.fromkeys(row["family"] for row in group))
        arms = list(dict.fromkeys(row["arm"] for row in group))
        for line, (key, unit) in enumerate((("success", "success"), ("action_error", "action error [rad]"))):
            axis = axes[line, column]
            for number, arm in enumerate(arms):
                found = {row["family"]: row[key] for row in group if row["arm"] == arm}
                chosen = [place for place, family in enumerate(families) if family in found]
                means, lows, highs = (
                    np.array([found[families[i]][end] for i in chosen]) for end in ("mean", "low", "high")
                )
                ends = np.nan_to_num(np.stack([means - lows, highs - means])).clip(0)
                place = np.array(chosen) + (number - (len(arms) - 1) / 2) * 0.8 / len(arms)
                bars = {"yerr": ends, "error_kw": {"lw": 0.8}, "color": _COLOURS[number % len(_COLOURS)]}
                axis.bar(place, means, 0.8 / len(arms), label=LABELS.get(arm, arm), **bars)
            axis.set_xticks(range(len(families)), families, rotation=20)
            axis.set_ylabel(unit)
            axis.set_ylim(bottom=0)
            axis.set_title(f"{range_} the training range")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", fontsize=8, ncols=3)
    return figure


def _draw_curves(rows: Sequence[dict[str, Any]]) -> Figure:
    """Success and action error over the number of transitions."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, key, unit in ((axes[0], "success", "success"), (axes[1], "action_error", "action error [rad]")):
        for arm, colour in ((NEAREST, _COLOURS[2]), (OURS, _COLOURS[4])):
            group = [row for row in rows if row["arm"] == arm]
            counts = [row.get("asked", 0) for row in group]
            low, mean, high = ([row[key][name] for row in group] for name in ("low", "mean", "high"))
            axis.plot(counts, mean, "o-", color=colour, label=f"{LABELS[arm]}, no guard")
            axis.fill_between(counts, low, high, color=colour, alpha=0.2)
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.set_xlabel("transitions")
        axis.set_ylabel(unit)
    axes[0].legend()
    return figure


def _draw_shifts(runs: Sequence[dict[str, Any]]) -> Figure:
    """Distance to the target over time, mean over runs; commits and refusals below."""
    shifts = list(dict.fromkeys(run["shift"] for run in runs))
    figure = Figure(figsize=(9, 2.8 * len(shifts)), layout="constrained")
    axes = figure.subplots(len(shifts), 1, squeeze=False)
    for axis, shift in zip(axes[:, 0], shifts, strict=True):
        for aligned, label, colour, width in (
            (False, "unaligned", _COLOURS[0], 4.0),  # wider, so that it shows below one that never differs
            (True, LABELS[OURS], _COLOURS[4], 1.5),
        ):
            group = [run for run in runs if (run["shift"], run["aligned"]) == (shift, aligned)]
            if not group:
                continue
            mean = np.mean([run["distance"] for run in group], axis=0)
            smooth = np.convolve(np.pad(mean, (_SMOOTH - 1, 0), "edge"), np.ones(_SMOOTH) / _SMOOTH, "valid")
            axis.plot(np.arange(len(mean)) / 4, 100 * smooth, color=colour, lw=width, label=label)
            for kind, marker in (("accepted", "^"), ("refused", "x"), ("drift", "|")):
                times = [event["time"] for run in group for event in run["events"] if event["kind"] == kind]
                if times:
                    axis.plot(times, np.full(len(times), -0.5), marker, color=colour, ms=5, alpha=0.6, label=kind)
        for second in (BEFORE_S, BEFORE_S + SHIFTED_S):
            axis.axvline(second, color="k", lw=0.8, ls="--")
        axis.set_ylabel("distance [cm]")
        axis.set_title(f"{shift}: shift at {BEFORE_S:.0f} s, back at {BEFORE_S + SHIFTED_S:.0f} s")
    axes[-1, 0].set_xlabel("time [s]")
    drawn: dict[str, Any] = {}
    for axis in axes[:, 0]:
        lines, labels = axis.get_legend_handles_labels()
        drawn.update(zip(labels, lines, strict=True))
    figure.legend(list(drawn.values()), list(drawn), loc="outside lower center", fontsize=8, ncols=5)
    return figure
