"""Do the arms rank alike whatever the seed of the training? All of it anew per seed, in a reduced setting.

    python -m benchmarks.studies.adaptation.seeds --output runs/adaptation_seeds

Per training seed: untrained experts of its own behind the vision tower and language model of a trained policy, which
stand still; with them a training with a bank, one with one token for all bodies, one without a token (same bodies,
frames, steps), and for a few unseen bodies a policy trained on that body alone. Then every arm of the study on the same
unseen bodies of the family "all" inside the training range: the bank's policy with the token that an arm finds, the
others as they are.

Demonstrations (the same for all seeds), trainings and measurements are kept under ``--output``: what is there is not
made again, an interrupted training goes on. On one core the defaults take two to three hours.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from benchmarks.harness import Jobs, percent, print_table, save, say
from benchmarks.studies.ablations import VARIANTS
from benchmarks.studies.adaptation import study, summary
from benchmarks.studies.adaptation.arms import LABELS, NO_TOKEN, OURS, SHARED_TOKEN
from benchmarks.studies.adaptation.own_policy import OwnTask, train_all
from benchmarks.studies.adaptation.settings import Settings
from benchmarks.studies.adaptation.tables import radians
from benchmarks.studies.training import configured, trained
from selfalign_core.command_line import More, command
from selfalign_core.data import sim_demos
from selfalign_core.model.pi0 import Pi0
from selfalign_core.policy import Policy
from selfalign_core.study.processes import policy_of, run_tasks
from selfalign_core.training.config import TrainConfig

BANK = "bank"
TRAINED = (BANK, SHARED_TOKEN, NO_TOKEN)
"""Of ``ablations.VARIANTS``."""

_DATA_SEED = 1


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is trained per seed of ``seeds``, by training configuration ``config``, under ``output``.

    ``vlm``: policy whose vision tower and language model everything starts from. ``train_bodies``: in the
    demonstrations, ``train_episodes`` of ``train_frames`` each. ``own_bodies``: per seed, other ones each, to train a
    policy on that body alone for ``own_steps``.
    """

    output: str
    config: str
    vlm: str
    seeds: tuple[int, ...]
    train_bodies: int
    train_episodes: int
    train_frames: int
    own_bodies: int
    own_steps: int

    @property
    def demos(self) -> Path:
        return Path(self.output) / "demos"

    def folder(self, seed: int) -> Path:
        return Path(self.output) / f"seed_{seed}"

    def overrides(self, seed: int) -> tuple[str, ...]:
        """Of the configuration: what a training with this seed starts from."""
        return f"seed={seed}", f"model.init={json.dumps(str(self.folder(seed) / 'start'))}"

    def train_config(self, seed: int, name: str) -> TrainConfig:
        """The configuration of variant ``name``."""
        overrides = *self.overrides(seed), *VARIANTS[name].overrides
        return configured(self.config, self.folder(seed) / name, self.demos, overrides)


def make_demos(grid: Grid, jobs: int) -> None:
    if grid.demos.is_dir():
        return
    say(f"recording {grid.train_bodies} bodies")
    size = policy_of(grid.vlm).image_size
    config = sim_demos.DemoConfig(
        image_size=size, episodes=grid.train_episodes, nominal_episodes=8 * grid.train_episodes,
        frames=grid.train_frames,
    )  # fmt: skip
    bodies = sim_demos.sample_bodies(grid.train_bodies, _DATA_SEED, config)
    sim_demos.record(str(grid.demos), bodies, _DATA_SEED, config, jobs=jobs)


def make_start(grid: Grid, seed: int) -> None:
    """Vision tower and language model of ``grid.vlm``, experts as drawn from ``seed``, no bank."""
    path = grid.folder(seed) / "start"
    if path.is_dir():
        return
    known = policy_of(grid.vlm)
    torch.manual_seed(seed)
    model = Pi0(known.config.model)
    vlm, source = (m.paligemma_with_expert.paligemma for m in (model, known.model))
    vlm.load_state_dict(source.state_dict())
    config = dataclasses.replace(known.config, bank_keys=(), embodiment="")
    Policy(model, config, known.codec.tokenizer, known.codec.stats, dt=known.dt).save(path)


def train_seed(grid: Grid, seed: int, jobs: int) -> dict[str, str]:
    """Policy directories by variant; trains what is left to train."""
    make_start(grid, seed)
    say(f"seed {seed}: training {', '.join(TRAINED)}")
    configs = [grid.train_config(seed, name) for name in TRAINED]
    return dict(zip(TRAINED, map(str, run_tasks(trained, configs, jobs)), strict=True))


def train_own(grid: Grid, seed: int, settings: Settings, jobs: int) -> dict[str, str]:
    """Policy directories by name of the body that each was trained on alone."""
    first = grid.seeds.index(seed) * grid.own_bodies
    bodies = settings.unseen("all", "inside")[first : first + grid.own_bodies]
    say(f"seed {seed}: training on {len(bodies)} bodies each alone")
    output, size = str(grid.folder(seed) / "own"), policy_of(grid.vlm).image_size
    tasks = [
        OwnTask(grid.config, output, body, grid.own_steps, settings.seed, size, grid.overrides(seed)) for body in bodies
    ]
    return dict(train_all(tasks, jobs))


def measure_seed(grid: Grid, seed: int, settings: Settings, jobs: int) -> list[dict[str, Any]]:
    """The arms per unseen body with this seed's policies."""
    policies, own = train_seed(grid, seed, jobs), train_own(grid, seed, settings, jobs)
    say(f"seed {seed}: measuring")
    tasks = study.plan(policies.pop(BANK), str(grid.folder(seed) / "measured"), settings, ["all"], ["inside"])
    return list(run_tasks(study.run_body, study.with_trained(tasks, list(policies.items()), own), jobs))


def over_seeds(measured: Sequence[summary.Bodies], arm: str) -> list[dict[str, Any]]:
    """Every body that has ``arm`` once: its episodes and frames in one list, of the seeds that measured ``arm`` on it.

    What an arm took is the mean over these seeds.
    """
    merged = []
    for bodies in zip(*measured, strict=True):
        having = [body["arms"] for body in bodies if arm in body["arms"]]
        if having:
            common = [name for name in having[0] if all(name in arms for arms in having)]
            arms = {name: _joined([arms[name] for arms in having]) for name in common}
            merged.append({**bodies[0], "arms": arms})
    return merged


def _joined(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    lists = {name: [v for one in found for v in one[name]] for name in ("success", "final_distance", "action_error")}
    took = [name for name in ("transitions", "robot_s", "compute_s") if name in found[0]]
    return lists | {name: float(np.mean([one[name] for one in found])) for name in took}


def arms_table(measured: Mapping[str, summary.Bodies]) -> list[dict[str, Any]]:
    """A row per arm: its figures over all seeds, intervals over bodies, and the same of each seed in ``seeds``."""
    return [
        {"arm": arm, **by_seed.pop("all"), "seeds": by_seed} for arm, by_seed in _by_arm(measured, summary.arm_figures)
    ]


def differences(measured: Mapping[str, summary.Bodies]) -> dict[str, dict[str, Any]]:
    """The self-aligner minus each other arm, paired by body: over all seeds (``all``) and per seed, by arm."""

    def figures(bodies: summary.Bodies, other: str) -> dict[str, Any]:
        return {"bodies": len(bodies), **summary.against(bodies, OURS, other)}

    return {arm: by_seed for arm, by_seed in _by_arm(measured, figures) if arm != OURS}


def _by_arm(
    measured: Mapping[str, summary.Bodies], figures: Callable[[summary.Bodies, str], dict[str, Any]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(arm, ``figures`` of it over all seeds and per seed)."""
    groups = {"all": list(measured.values()), **{seed: [bodies] for seed, bodies in measured.items()}}
    for arm in dict.fromkeys(arm for bodies in measured.values() for body in bodies for arm in body["arms"]):
        merged = {name: over_seeds(group, arm) for name, group in groups.items()}
        yield arm, {name: figures(bodies, arm) for name, bodies in merged.items() if bodies}


def print_arms(rows: Sequence[dict[str, Any]]) -> None:
    lines = []
    for row in rows:
        seeds = row["seeds"].values()
        lines.append(
            [
                LABELS[row["arm"]],
                str(row["bodies"]),
                percent(row["success"]),
                " / ".join(f"{100 * one['success']['mean']:.0f}" for one in seeds),
                radians(row["action_error"]),
                " / ".join(f"{one['action_error']['mean']:.3f}" for one in seeds),
                percent(row.get("harmed_success")),
            ]
        )
    print_table(("arm", "bodies", "success", "per seed", "action error [rad]", "per seed", "harmed: success"), lines)


def print_differences(found: dict[str, dict[str, Any]]) -> None:
    def text(value: dict[str, float], scale: float, digits: int) -> str:
        mean, low, high = (f"{scale * value[name]:+.{digits}f}" for name in ("mean", "low", "high"))
        return f"{mean} [{low}, {high}]"

    print("\nThe self-aligner minus another arm, paired by body\n")
    lines = [
        [
            LABELS[other] if seed == "all" else f"  seed {seed}",
            str(one["bodies"]),
            text(one["success_gain"], 100, 0),
            text(one["action_error_gain"], 1, 4),
        ]
        for other, by_seed in found.items()
        for seed, one in by_seed.items()
    ]
    print_table(("minus", "bodies", "success, points", "action error [rad]"), lines)


def run(
    *,
    output: Annotated[str, "directory for data, runs and figures (adaptation_seeds.json)"],
    config: Annotated[str, "training configuration"] = "config/training/tiny_policy_reduced.yaml",
    vlm: Annotated[str, "policy whose VLM is started from", More(metavar="DIR")] = "policies/tiny_reach",
    seeds: Annotated[tuple[int, ...], "of the training"] = (0, 1, 2),
    train_bodies: int = 160,
    train_episodes: Annotated[int, "per body; of the nominal one 8 times as many"] = 6,
    train_frames: Annotated[int, "per episode"] = 36,
    own_bodies: Annotated[int, "per seed, to train a policy on that body alone"] = 2,
    own_steps: int = 1000,
    bodies: Annotated[int, "to measure on"] = Settings.bodies,
    episodes: Annotated[int, "per body and arm"] = Settings.episodes,
    jobs: Jobs = 1,
) -> None:
    """The study's arms over seeds of the training."""
    begin = time.perf_counter()
    demos = train_bodies, train_episodes, train_frames
    grid = Grid(output, config, vlm, tuple(seeds), *demos, own_bodies, own_steps)
    settings = Settings(bodies=bodies, episodes=episodes)
    reference = grid.train_config(grid.seeds[0], BANK)  # what is wrong with it is said at once
    make_demos(grid, jobs)
    measured = {str(seed): measure_seed(grid, seed, settings, jobs) for seed in grid.seeds}
    rows, found = arms_table(measured), differences(measured)
    print_arms(rows)
    print_differences(found)
    path = Path(output) / "adaptation_seeds.json"
    save(
        path, "adaptation_seeds", grid=dataclasses.asdict(grid), training=reference.to_dict(),
        settings=dataclasses.asdict(settings), seconds=round(time.perf_counter() - begin, 1), arms=rows,
        differences=found, measured=measured,
    )  # fmt: skip
    print(f"\nMean over {len(seeds)} training seeds with 95 % interval over bodies. Written to {path}.")


main = command("benchmarks.studies.adaptation.seeds", run, interrupted="what is done is kept")

if __name__ == "__main__":
    sys.exit(main())
