"""A robot that is already right: does the aligner leave it so? The nominal body, its own token, natural motion."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from benchmarks.harness import Cache
from benchmarks.studies.adaptation.lab import Lab, own_token
from benchmarks.studies.adaptation.long_run import LongRun
from benchmarks.studies.adaptation.measure import Measure
from benchmarks.studies.adaptation.settings import Settings
from selfalign_core.alignment import SelfAligner
from selfalign_core.sim import JOINTS, BodyConfig
from selfalign_core.study.processes import policy_of

EPISODES = 40
_LIMIT_S = 30.0
"""Of work per opportunity, for a robot that hardly moves."""


def plan(checkpoint: str, kept: str, settings: Settings, runs: int, opportunities: int) -> list[tuple[Any, ...]]:
    """Arguments of :func:`run_right`."""
    return [(checkpoint, kept, settings, run, opportunities) for run in range(runs)]


def run_right(checkpoint: str, kept: str, settings: Settings, run: int, opportunities: int) -> dict[str, Any]:
    """Let the aligner try ``opportunities`` times while the policy works; then compare the token it ended with.

    Attempts, how many were accepted, and success before and after on the same episodes.
    """
    policy, cache = policy_of(checkpoint), Cache(kept)
    basis = {"model": policy.digest, "seed": settings.seed}

    def make() -> dict[str, Any]:
        aligner = SelfAligner(policy, settings.align, joints=JOINTS[: policy.action_dim], seed=run)
        attempts: list[str] = []

        def again(report: Any) -> None:
            if report.attempt is not None:
                attempts.append(report.text)
                aligner.align_now()

        work = LongRun(policy, BodyConfig(), settings.seed * 2000 + run, aligner=aligner, after_report=again)
        work.run(_LIMIT_S * opportunities, lambda: len(attempts) >= opportunities)
        return {"attempts": attempts, "token": aligner.token.data.tolist(), "accepted": aligner.token.version}

    inputs = {**basis, **settings.of("align"), "opportunities": opportunities}
    found = cache.get(f"right/{run:02d}", inputs, make)
    # Index 0 for every run: the same episodes, so that the token it began with is measured once.
    measure = Measure(Lab(policy, BodyConfig(), 0, settings))
    own = own_token(policy).tolist()
    figures = {}
    for name, token in (("before", own), ("after", found["token"])):
        same = token == own
        name_kept = "right/own" if same else f"right/{run:02d}-after"
        inputs = {**basis, "token": token, "episodes": EPISODES, "frames": settings.frames}
        figures[name] = cache.get(name_kept, inputs, functools.partial(_figures, measure, token))
    return {"run": run, "attempts": found["attempts"], "accepted": found["accepted"], **figures}


def _figures(measure: Measure, values: list[Any]) -> dict[str, Any]:
    token = np.array(values, np.float32)
    rollouts = measure.rollouts(token, None, EPISODES)
    return {**rollouts, "action_error": measure.action_error(token, measure.lab.policy)}
