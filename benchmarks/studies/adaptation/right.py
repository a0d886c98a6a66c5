"""A robot that is already right: does the aligner leave it so? The nominal body, its own token, natural motion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.studies.adaptation.lab import Lab
from benchmarks.studies.adaptation.long_run import LongRun
from benchmarks.studies.adaptation.measure import Measure
from benchmarks.studies.adaptation.settings import Settings
from benchmarks.studies.adaptation.work import Cache, policy_of, run_tasks
from selfalign_core.alignment import SelfAligner
from selfalign_core.sim import JOINTS, BodyConfig

EPISODES = 40
_LIMIT_S = 30.0
"""Of work per opportunity, for a robot that hardly moves."""


@dataclass(frozen=True)
class RightTask:
    """One run of ``opportunities`` attempts, one after the other."""

    checkpoint: str
    cache: str
    run: int
    opportunities: int
    settings: Settings


def plan(checkpoint: str, cache: str, runs: int, opportunities: int, settings: Settings) -> list[RightTask]:
    return [RightTask(checkpoint, cache, run, opportunities, settings) for run in range(runs)]


def results(tasks: Sequence[RightTask], jobs: int) -> Iterator[dict[str, Any]]:
    """Per run: attempts, how many were accepted, and success before and after on the same episodes."""
    yield from run_tasks(run_right, tasks, jobs)


def run_right(task: RightTask) -> dict[str, Any]:
    """Let the aligner try again and again while the policy works; then compare the token it ended with."""
    policy, settings, cache = policy_of(task.checkpoint), task.settings, Cache(task.cache)
    basis = {"model": policy.digest, "seed": settings.seed}

    def work() -> dict[str, Any]:
        aligner = SelfAligner(policy, settings.align, joints=JOINTS[: policy.action_dim], seed=task.run)
        attempts: list[str] = []

        def again(report: Any) -> None:
            if report.attempt is not None:
                attempts.append(report.text)
                aligner.align_now()

        run = LongRun(policy, BodyConfig(), settings.seed * 2000 + task.run, aligner=aligner, after_report=again)
        run.run(_LIMIT_S * task.opportunities, lambda: len(attempts) >= task.opportunities)
        return {"attempts": attempts, "token": aligner.token.data.tolist(), "accepted": aligner.token.version}

    inputs = {**basis, **settings.of("align"), "opportunities": task.opportunities}
    found = cache.get(f"right/{task.run:02d}", inputs, work)
    # Index 0 for every run: the same episodes, so that the token it began with is measured once.
    measure = Measure(Lab(policy, BodyConfig(), 0, settings))
    own = policy.e_token.data.tolist()
    figures = {}
    for name, token in (("before", own), ("after", found["token"])):
        same = token == own
        kept = "right/own" if same else f"right/{task.run:02d}-after"
        inputs = {**basis, "token": token, "episodes": EPISODES, "frames": settings.frames}
        figures[name] = cache.get(kept, inputs, lambda token=token: _figures(measure, np.array(token, np.float32)))
    return {"run": task.run, "attempts": found["attempts"], "accepted": found["accepted"], **figures}


def _figures(measure: Measure, token: np.ndarray) -> dict[str, Any]:
    rollouts = measure.rollouts(token, None, EPISODES)
    return {**rollouts, "action_error": measure.action_error(token, measure.lab.policy)}
