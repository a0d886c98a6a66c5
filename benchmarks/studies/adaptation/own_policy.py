"""A policy trained on the target body itself, with one token: what no alignment can be expected to reach for free.

A reduced setting of the shipped policy's training: fewer steps, and demonstrations of that body alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.studies.adaptation.settings import UnseenBody
from benchmarks.studies.training import configured, trained
from selfalign_core.data import sim_demos
from selfalign_core.study.processes import run_tasks

EPISODES = 40


@dataclass(frozen=True)
class OwnTask:
    """Train on ``body`` for ``steps``, by the training configuration ``config``, under ``output``.

    ``seed`` of the demonstrations; ``image_size``: (H, W) in pixels that the model reads; ``overrides`` of ``config``.
    """

    config: str
    output: str
    body: UnseenBody
    steps: int
    seed: int
    image_size: tuple[int, int]
    overrides: tuple[str, ...] = ()


def train_all(tasks: Sequence[OwnTask], jobs: int) -> Iterator[tuple[str, str]]:
    """(body's name, policy directory) of each, in order; what is there is not trained again."""
    yield from zip((task.body.name for task in tasks), run_tasks(train, tasks, jobs), strict=True)


def train(task: OwnTask) -> str:
    """The policy directory.

    Raises:
        ConfigError: what is there was trained with another configuration.
    """
    directory = Path(task.output) / task.body.name
    data, run = directory / "demos", directory / "run"
    if not data.is_dir():
        demos = sim_demos.DemoConfig(episodes=EPISODES, image_size=task.image_size)
        directory.mkdir(parents=True, exist_ok=True)
        sim_demos.record(str(data), {task.body.name: task.body.config}, task.seed, demos)
    overrides = (*task.overrides, "bank.mode=shared", "bank.deploy=null")
    return str(trained(configured(task.config, run, data, overrides, steps=task.steps)))
