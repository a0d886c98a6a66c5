"""The command line of the study."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from benchmarks.harness import Jobs, save, say
from benchmarks.studies.adaptation import own_policy, plots, right, shifts, study, summary, tables
from benchmarks.studies.adaptation.arms import NO_TOKEN, SHARED_TOKEN
from benchmarks.studies.adaptation.settings import FAMILIES, PARTS, RANGES, Settings
from selfalign_core.command_line import CORES, More, command, expect_at_least
from selfalign_core.errors import ConfigError
from selfalign_core.study.processes import policy_of, run_tasks

T = TypeVar("T")

_DIR = More(metavar="DIR")

_FIGURES: dict[str, tuple[Callable[..., Any], Callable[..., None]]] = {
    "arms": (summary.arms_table, tables.print_arms),
    "curves": (summary.curves_table, tables.print_curves),
    "shifts": (summary.shifts_table, tables.print_shifts),
    "right": (summary.right_figures, tables.print_right),
}


def run(
    checkpoint: Annotated[str, "checkpoint directory of a policy with a bank"],
    *,
    output: Annotated[Path, "directory for measurements, figures (adaptation.json), plots"],
    parts: Annotated[tuple[str, ...], More(choices=PARTS)] = PARTS,
    families: Annotated[tuple[str, ...], More(choices=FAMILIES)] = tuple(FAMILIES),
    ranges: Annotated[tuple[str, ...], More(choices=RANGES)] = tuple(RANGES),
    bodies: Annotated[int, "per family and range"] = Settings.bodies,
    episodes: Annotated[int, "per body and arm"] = Settings.episodes,
    seed: Annotated[int, "of the bodies; not the training's"] = Settings.seed,
    curve_bodies: Annotated[int, "bodies of the curves over transitions"] = 8,
    shift_runs: Annotated[int, "runs of each shift"] = 4,
    right_runs: Annotated[int, "runs of a robot that is already right"] = 40,
    right_opportunities: Annotated[int, "align opportunities in each of them"] = 5,
    no_token: Annotated[str | None, "a policy trained without a token, measured as it is", _DIR] = None,
    shared_token: Annotated[str | None, "a policy trained with one token for all bodies", _DIR] = None,
    own_bodies: Annotated[int, "bodies to train a policy of their own on; dear"] = 0,
    own_config: Annotated[str | None, "training configuration of these policies", More(metavar="FILE")] = None,
    own_steps: Annotated[int, "training steps of each"] = 1000,
    jobs: Jobs = CORES,
) -> None:
    """Self-alignment on unseen simulated bodies, measured."""
    settings = Settings(seed=seed, bodies=bodies, episodes=episodes)
    counts = {"curve_bodies": curve_bodies, "shift_runs": shift_runs, "right_runs": right_runs}
    expect_at_least(1, **counts, right_opportunities=right_opportunities, jobs=jobs)
    if own_bodies and not own_config:
        raise ConfigError("--own-config: found none, expected a training configuration (--own-bodies is given)")
    policy = policy_of(checkpoint)
    if policy.e_token is None or policy.config.model.alignment_expert is None:
        raise ConfigError(f"{checkpoint}: found no E-Token or no alignment expert, expected both")
    trained = [(name, path) for name, path in ((NO_TOKEN, no_token), (SHARED_TOKEN, shared_token)) if path]
    for _, path in trained:
        policy_of(path)
    basis = checkpoint, str(output / "measured"), settings

    def arms() -> list[study.BodyTask]:
        tasks = study.plan(*basis, families, ranges)
        own = [task.body for task in tasks if (task.body.family, task.body.range) == ("all", "inside")][:own_bodies]
        trainings = [
            own_policy.OwnTask(str(own_config), str(output / "own"), body, own_steps, seed, policy.image_size)
            for body in own
        ]
        found = _progress("policies of the bodies' own", own_policy.train_all(trainings, jobs), len(trainings))
        return study.with_trained(tasks, trained, dict(found))

    work: dict[str, tuple[Callable[..., Any], Callable[[], Sequence[Any]]]] = {
        "arms": (study.run_body, arms),
        "curves": (study.run_body, lambda: study.plan_curves(*basis, curve_bodies)),
        "shifts": (shifts.run_shift, lambda: shifts.plan(*basis, shift_runs)),
        "right": (right.run_right, lambda: right.plan(*basis, right_runs, right_opportunities)),
    }
    begin, figures, measured = time.perf_counter(), dict[str, Any](), dict[str, list[Any]]()
    for part in parts:
        do, plan = work[part]
        tasks = plan()
        measured[part] = list(_progress(part, run_tasks(do, tasks, jobs), len(tasks)))
    for part in (part for part in PARTS if part in measured):
        summarise, show = _FIGURES[part]
        figures[part] = summarise(measured[part])
        show(figures[part])
    figures["targets"] = summary.targets(figures)
    tables.print_targets(figures["targets"])
    save(
        output / "adaptation.json", "adaptation", checkpoint=checkpoint, model_digest=policy.digest,
        settings=dataclasses.asdict(settings), seconds=round(time.perf_counter() - begin, 1), **figures,
        measured=measured,
    )  # fmt: skip
    made = plots.save_plots(output, figures, measured.get("shifts", ()))
    print(f"\nWritten to {output / 'adaptation.json'}, {', '.join(path.name for path in made)}.")


def _progress(what: str, found: Iterable[T], count: int) -> Iterator[T]:
    for number, one in enumerate(found, start=1):
        if number == count or number % 8 == 0:
            say(f"{what}: {number} of {count}")
        yield one


main = command("benchmarks.studies.adaptation", run, interrupted="what was measured is kept")

if __name__ == "__main__":
    sys.exit(main())
