"""A robot that changes while it works, or that training never saw, in the running graph, with nobody's help.

    python -m benchmarks.studies.adaptation.in_graph --output runs/in_graph

Each run starts the bringup graph, the real nodes at real rates, changes the body of the simulated robot through its
service and changes it back, and reads what the run report saw: when the body changed, which targets were reached, what
the aligner did. In a run ``unseen`` the robot has another body from its start to its end, number SEED of the study's
family "all" inside the training range. A run takes two and a half minutes, an unseen one 75 s. Runs that are there, of
the same checkpoint, parameters and bodies, are not made again. ``--control`` runs have a disabled aligner; no limit is
for them, nor for unseen bodies.

Exit status: 0 if the limits are kept, 1 if not, 2 on bad arguments.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from benchmarks import graph
from benchmarks.harness import print_table, save, say
from benchmarks.studies.adaptation.graph_run import CASES, PARAMETERS, UNSEEN, model_of, report_of
from benchmarks.studies.adaptation.shifts import RECOVERY_S, SHIFTS, reached_share, recovery_s
from selfalign_core.command_line import More, command, expect_at_least

RECOVERED_SHARE = 0.9


def figures_of(report: dict[str, Any]) -> dict[str, Any]:
    """Recovery and targets reached from one run's report: around each of two changes, or from its start on."""
    series = report["series"]
    changes, duration = [row[0] for row in series["bodies"]["rows"]], report["duration_s"]
    ends = [(row[0], bool(row[1])) for row in series["targets"]["rows"]]
    # The first target may have begun before the report listened.
    targets = [{"begin": a, "end": b, "reached": reached} for (a, _), (b, reached) in itertools.pairwise(ends)]
    align = [dict(zip(series["align"]["columns"], row, strict=True)) for row in series["align"]["rows"]]
    if len(changes) == 1:
        begin = series["chunks"]["rows"][0][0]  # until then nothing moves
        found = {
            "recovery_start_s": recovery_s(targets, begin, duration),
            "reached_later": reached_share(targets, begin + RECOVERY_S, duration),
        }
    else:
        _, shift, back = changes
        found = {
            "recovery_shift_s": recovery_s(targets, shift, back),
            "recovery_back_s": recovery_s(targets, back, duration),
            "reached_before": reached_share(targets, 0.0, shift),
            "reached_shifted": reached_share(targets, shift + RECOVERY_S, back),
            "reached_back": reached_share(targets, back + RECOVERY_S, duration),
        }
    return {
        **found,
        "accepted": sum(row["accepted"] or row["returned"] for row in align),
        "refused": sum(row["attempted"] and not row["accepted"] for row in align),
        "drifts": sum(row["drift"] for row in align),
    }


def run(
    *,
    output: Annotated[Path, "folder for the run reports, their pictures and in_graph.json"],
    shifts: Annotated[tuple[str, ...], "and unseen bodies", More(choices=CASES)] = CASES,
    runs: Annotated[int, "of each shift, and unseen bodies"] = 10,
    control: Annotated[int, "runs of each with a disabled aligner"] = 0,
    seed: Annotated[int, "of the first run's targets; number of the unseen body"] = 0,
    checkpoint: Annotated[str | None, "checkpoint directory, by default that of the parameter"] = None,
) -> int:
    """Shifts of the body, and unseen bodies, in the running graph."""
    expect_at_least(1, runs=runs)
    expect_at_least(0, control=control)
    made = []
    with graph.ros():
        for case, aligned in itertools.product(shifts, (True, False)):
            for number in range(seed, seed + (runs if aligned else control)):
                report = report_of(case, number, output, checkpoint, aligned=aligned)
                made.append({"shift": case, "seed": number, "aligned": aligned, **figures_of(report)})
                say(f"{_name(case, aligned)}, seed {number}: recovered in {_times(made[-1])}")
    groups = {
        (case, aligned): [run for run in made if (run["shift"], run["aligned"]) == (case, aligned)]
        for case, aligned in itertools.product(shifts, (True, False))
    }
    _print_shifts({key: group for key, group in groups.items() if group and key[0] in SHIFTS})
    _print_unseen({key: group for key, group in groups.items() if group and key[0] == UNSEEN})
    kept = all(
        np.mean([run[f"recovery_{name}_s"] <= RECOVERY_S for run in group]) >= RECOVERED_SHARE
        for (case, aligned), group in groups.items()
        for name in ("shift", "back")
        if aligned and case in SHIFTS
    )
    model = model_of(checkpoint).digest
    save(output / "in_graph.json", "in_graph", model=model, parameters=PARAMETERS, kept=kept, runs=made)
    return 0 if kept else 1


Groups = dict[tuple[str, bool], list[dict[str, Any]]]


def _print_shifts(groups: Groups) -> None:
    if not groups:
        return
    print_table(
        [
            f"runs recovered within {RECOVERY_S:.0f} s of", "the shift", "the shift back", "reached before", "shifted",
            "back", *_DONE,
        ],
        [
            [
                _name(*key), *(_recovered(group, name) for name in ("shift", "back")),
                *(_reached(group, name) for name in ("before", "shifted", "back")), *_done(group),
            ]
            for key, group in groups.items()
        ],
    )  # fmt: skip


def _print_unseen(groups: Groups) -> None:
    """Apart, where there are controls: bodies on which a policy that is not aligned reaches nothing, and the others."""
    if not groups:
        return
    control = groups.get((UNSEEN, False), [])
    lost = {run["seed"] for run in control if not run["reached_later"] > 0}
    rows = []
    for key, group in groups.items():
        parts = {"": group}
        if control:
            parts = {
                ", lost as it is": [run for run in group if run["seed"] in lost],
                ", not lost": [run for run in group if run["seed"] not in lost],
            }
        rows += [
            [
                _name(*key) + what, _recovered(part, "start"), _recovered(part, "start", math.inf),
                _reached(part, "later"), *_done(part),
            ]
            for what, part in parts.items() if part
        ]  # fmt: skip
    print_table(
        ["from the start", f"runs recovered within {RECOVERY_S:.0f} s", "ever", "reached from then on", *_DONE], rows
    )


_DONE = ("commits", "refusals", "drifts")


def _done(group: Sequence[dict[str, Any]]) -> list[str]:
    return [f"{np.mean([run[name] for run in group]):.1f}" for name in ("accepted", "refused", "drifts")]


def _recovered(group: Sequence[dict[str, Any]], name: str, limit_s: float = RECOVERY_S) -> str:
    """How many, and the median of all."""
    times = [run[f"recovery_{name}_s"] for run in group]
    found = sum(math.isfinite(s) and s <= limit_s for s in times)
    return f"{found} of {len(group)}, median {_seconds(float(np.median(times)))}"


def _reached(group: Sequence[dict[str, Any]], name: str) -> str:
    return f"{100 * np.nanmean([run[f'reached_{name}'] for run in group]):.0f} %"


def _name(case: str, aligned: bool) -> str:
    return case if aligned else f"{case}, not aligned"


def _times(run: dict[str, Any]) -> str:
    """Of every change of the body, or of its start."""
    found = [seconds for name, seconds in run.items() if name.startswith("recovery_")]
    return ", ".join(map(_seconds, found))


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if math.isfinite(seconds) else "never"


main = command("benchmarks.studies.adaptation.in_graph", run, interrupted="the runs that were made are kept")

if __name__ == "__main__":
    sys.exit(main())
