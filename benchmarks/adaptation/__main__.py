"""The command line of the study."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.adaptation import plots, right, shifts, study, summary, tables
from benchmarks.adaptation.settings import FAMILIES, PARTS, RANGES, Settings
from benchmarks.adaptation.work import policy_of, say
from benchmarks.report import record, run_command, write_json
from selfalign_core.errors import ConfigError


def _parser() -> argparse.ArgumentParser:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.adaptation", description="Self-alignment on unseen simulated bodies, measured."
    )
    parser.add_argument("checkpoint", help="checkpoint directory of a policy with a bank")
    parser.add_argument("--output", required=True, help="directory for measurements, figures (adaptation.json), plots")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--ranges", nargs="+", choices=RANGES, default=list(RANGES))
    parser.add_argument("--bodies", type=int, default=defaults.bodies, help="per family and range")
    parser.add_argument("--episodes", type=int, default=defaults.episodes, help="per body and arm")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of the bodies; not the training's")
    parser.add_argument("--curve-bodies", type=int, default=8, help="bodies of the curves over transitions")
    parser.add_argument("--shift-runs", type=int, default=10, help="runs of each shift")
    parser.add_argument("--right-runs", type=int, default=40, help="runs of a robot that is already right")
    parser.add_argument("--right-opportunities", type=int, default=5, help="align opportunities in each of them")
    parser.add_argument("--no-token", metavar="DIR", help="a policy trained without a token, measured as it is")
    parser.add_argument("--shared-token", metavar="DIR", help="a policy trained with one token for all bodies")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; changes no result")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 when measured, 2 on anything a user can act on."""
    return run_command(lambda: _run(_parser().parse_args(arguments)))


def _run(options: argparse.Namespace) -> int:
    settings = Settings(seed=options.seed, bodies=options.bodies, episodes=options.episodes)
    _check(options)
    cache, output = str(Path(options.output) / "measured"), Path(options.output)
    begin, figures, measured = time.perf_counter(), {}, {}
    for part in options.parts:
        tasks, results = _plan(part, options, cache, settings)
        measured[part] = _collect(part, results(tasks, options.jobs), len(tasks))
    if "arms" in measured:
        figures["arms"] = summary.arms_table(measured["arms"])
        tables.print_arms(figures["arms"])
    if "curves" in measured:
        figures["curves"] = summary.curves_table(measured["curves"])
        tables.print_curves(figures["curves"])
    if "shifts" in measured:
        figures["shifts"] = summary.shifts_table(measured["shifts"])
        tables.print_shifts(figures["shifts"])
    if "right" in measured:
        figures["right"] = summary.right_figures(measured["right"])
        tables.print_right(figures["right"])
    figures["targets"] = summary.targets(figures)
    tables.print_targets(figures["targets"])
    policy = policy_of(options.checkpoint)
    document = record(
        "adaptation", checkpoint=options.checkpoint, model_digest=policy.digest, settings=dataclasses.asdict(settings),
        seconds=round(time.perf_counter() - begin, 1), **figures, measured=measured,
    )  # fmt: skip
    write_json(output / "adaptation.json", document)
    made = plots.save_plots(output, figures, measured.get("shifts", ()))
    print(f"\nWritten to {output / 'adaptation.json'}, {', '.join(path.name for path in made)}.")
    return 0


def _check(options: argparse.Namespace) -> None:
    for name in ("curve_bodies", "shift_runs", "right_runs", "right_opportunities", "jobs"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: found {getattr(options, name)}, expected at least 1")
    policy = policy_of(options.checkpoint)
    if policy.e_token is None or policy.config.model.alignment_expert is None:
        raise ConfigError(f"{options.checkpoint}: found no E-Token or no alignment expert, expected both")
    for _, path in _trained(options):
        policy_of(path)


def _trained(options: argparse.Namespace) -> list[tuple[str, str]]:
    named = (("no_token", options.no_token), ("shared_token", options.shared_token))
    return [(name, path) for name, path in named if path]


def _plan(part: str, options: argparse.Namespace, cache: str, settings: Settings) -> tuple[list[Any], Any]:
    """The tasks of a part, and what does them."""
    checkpoint = options.checkpoint
    if part == "arms":
        tasks = study.plan(checkpoint, cache, options.families, options.ranges, _trained(options), settings)
        return tasks, study.results
    if part == "curves":
        return study.plan_curves(checkpoint, cache, options.curve_bodies, settings), study.results
    if part == "shifts":
        return shifts.plan(checkpoint, cache, options.shift_runs, settings), shifts.results
    tasks = right.plan(checkpoint, cache, options.right_runs, options.right_opportunities, settings)
    return tasks, right.results


def _collect(part: str, found: Iterable[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    kept = []
    for one in found:
        kept.append(one)
        if len(kept) == count or len(kept) % 8 == 0:
            say(f"{part}: {len(kept)} of {count}")
    return kept


if __name__ == "__main__":
    sys.exit(main())
