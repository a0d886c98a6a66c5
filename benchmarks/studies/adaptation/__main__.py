"""The command line of the study."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.report import record, run_command, write_json
from benchmarks.studies.adaptation import plots, right, shifts, study, summary, tables
from benchmarks.studies.adaptation.arms import NO_TOKEN, SHARED_TOKEN
from benchmarks.studies.adaptation.own_policy import OwnTask, train_all
from benchmarks.studies.adaptation.settings import FAMILIES, PARTS, RANGES, Settings, UnseenBody
from benchmarks.studies.adaptation.work import policy_of, say
from selfalign_core.errors import ConfigError

T = TypeVar("T")


def _parser() -> argparse.ArgumentParser:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.adaptation",
        description="Self-alignment on unseen simulated bodies, measured.",
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
    parser.add_argument("--shift-runs", type=int, default=4, help="runs of each shift")
    parser.add_argument("--right-runs", type=int, default=40, help="runs of a robot that is already right")
    parser.add_argument("--right-opportunities", type=int, default=5, help="align opportunities in each of them")
    parser.add_argument("--no-token", metavar="DIR", help="a policy trained without a token, measured as it is")
    parser.add_argument("--shared-token", metavar="DIR", help="a policy trained with one token for all bodies")
    parser.add_argument("--own-bodies", type=int, default=0, help="bodies to train a policy of their own on; dear")
    parser.add_argument("--own-config", metavar="FILE", help="training configuration of these policies")
    parser.add_argument("--own-steps", type=int, default=1000, help="training steps of each")
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
        measured[part] = list(_progress(part, results(tasks, options.jobs), len(tasks)))
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
    if options.own_bodies and not options.own_config:
        raise ConfigError("--own-config: found none, expected a training configuration (--own-bodies is given)")
    policy = policy_of(options.checkpoint)
    if policy.e_token is None or policy.config.model.alignment_expert is None:
        raise ConfigError(f"{options.checkpoint}: found no E-Token or no alignment expert, expected both")
    for _, path in _trained(options):
        policy_of(path)


def _trained(options: argparse.Namespace) -> list[tuple[str, str]]:
    named = ((NO_TOKEN, options.no_token), (SHARED_TOKEN, options.shared_token))
    return [(name, path) for name, path in named if path]


def _own_policies(options: argparse.Namespace, bodies: Sequence[UnseenBody], settings: Settings) -> dict[str, str]:
    """Policy directories by name of the body, for the first ``--own-bodies`` bodies like training's."""
    chosen = [body for body in bodies if (body.family, body.range) == ("all", "inside")][: options.own_bodies]
    output, size = str(Path(options.output) / "own"), policy_of(options.checkpoint).image_size
    tasks = [OwnTask(options.own_config, output, body, options.own_steps, settings.seed, size) for body in chosen]
    return dict(_progress("policies of the bodies' own", train_all(tasks, options.jobs), len(tasks)))


def _plan(part: str, options: argparse.Namespace, cache: str, settings: Settings) -> tuple[list[Any], Any]:
    """The tasks of a part, and what does them."""
    checkpoint = options.checkpoint
    if part == "arms":
        tasks = study.plan(checkpoint, cache, options.families, options.ranges, settings)
        own = _own_policies(options, [task.body for task in tasks], settings)
        return study.with_trained(tasks, _trained(options), own), study.results
    if part == "curves":
        return study.plan_curves(checkpoint, cache, options.curve_bodies, settings), study.results
    if part == "shifts":
        return shifts.plan(checkpoint, cache, options.shift_runs, settings), shifts.results
    tasks = right.plan(checkpoint, cache, options.right_runs, options.right_opportunities, settings)
    return tasks, right.results


def _progress(what: str, found: Iterable[T], count: int) -> Iterator[T]:
    for number, one in enumerate(found, start=1):
        if number == count or number % 8 == 0:
            say(f"{what}: {number} of {count}")
        yield one


if __name__ == "__main__":
    sys.exit(main())
