"""The arms on every body, and the curves over transitions: one task per body, every arm of it kept by itself."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import Cache
from benchmarks.studies.adaptation.arms import (
    ARMS,
    EXPERT,
    MEAN,
    NEAREST,
    OURS,
    OWN_POLICY,
    UNALIGNED,
    Found,
    find_token,
)
from benchmarks.studies.adaptation.lab import Lab
from benchmarks.studies.adaptation.measure import Measure
from benchmarks.studies.adaptation.settings import COUNTS, RANGES, Settings, UnseenBody
from selfalign_core.policy import Policy
from selfalign_core.study.processes import policy_of

_TOKEN_INPUTS = {
    UNALIGNED: (), MEAN: (), EXPERT: ("seed", "motion_s", "motion_amplitude", "align", "expert_fit"),
}  # fmt: skip
_MOTION_INPUTS = ("seed", "motion_s", "motion_amplitude", "align")
"""Settings that a token depends on, if it is not one of the above."""

_MEASURE_INPUTS = ("seed", "episodes", "frames")


@dataclass(frozen=True)
class BodyTask:
    """The ``arms`` of one body; ``trained``: (arm, checkpoint) of policies measured as they are."""

    checkpoint: str
    kept: str
    settings: Settings
    body: UnseenBody
    arms: tuple[str, ...]
    trained: tuple[tuple[str, str], ...] = ()


def plan(
    checkpoint: str, kept: str, settings: Settings, families: Sequence[str], ranges: Sequence[str]
) -> list[BodyTask]:
    """The main part. The upper bound is for the training range, whose targets are about it."""
    return [
        BodyTask(checkpoint, kept, settings, body, tuple(arm for arm in ARMS if arm != EXPERT or RANGES[range_] <= 1))
        for range_ in ranges
        for family in families
        for body in settings.unseen(family, range_)
    ]


def with_trained(
    tasks: Sequence[BodyTask], everywhere: Sequence[tuple[str, str]], own: dict[str, str]
) -> list[BodyTask]:
    """The same tasks with other policies too: (arm, checkpoint) for every body, checkpoints by name of the body."""
    return [
        dataclasses.replace(
            task, trained=(*everywhere, *((OWN_POLICY, path) for name, path in own.items() if name == task.body.name))
        )
        for task in tasks
    ]


def plan_curves(checkpoint: str, kept: str, settings: Settings, bodies: int) -> list[BodyTask]:
    """Tokens of bodies like training's from few transitions to many."""
    arms = (UNALIGNED, *(f"{arm}@{count}" for count in COUNTS for arm in (NEAREST, OURS)))
    unseen = settings.unseen("all", "inside", bodies)
    return [BodyTask(checkpoint, kept, settings, body, arms) for body in unseen]


def run_body(task: BodyTask) -> dict[str, Any]:
    """What the body is, and the figures of each arm; finds and measures what is not kept yet."""
    body, settings, cache = task.body, task.settings, Cache(task.kept)
    policy = policy_of(task.checkpoint)
    lab = Lab(policy, body.config, body.index, settings)
    measure, arms = Measure(lab), {}
    basis = {"model": policy.digest, "body": body.config.to_dict()}
    for arm in task.arms:
        names = _TOKEN_INPUTS.get(arm, _MOTION_INPUTS)
        inputs = {**basis, **settings.of(*names)}
        make = functools.partial(_find, arm, lab)
        found = cache.get(f"{body.name}/{arm}.token", inputs, make)
        inputs = {**basis, **settings.of(*_MEASURE_INPUTS), "token": found["token"]}
        figures = cache.get(f"{body.name}/{arm}", inputs, functools.partial(measure, Found.from_dict(found).token))
        arms[arm] = {**{k: v for k, v in found.items() if k != "token"}, **figures}
    for arm, checkpoint in task.trained:
        arms[arm] = _as_it_is(arm, policy_of(checkpoint), cache, task, measure)
    return {"family": body.family, "range": body.range, "body": body.name, "arms": arms}


def _find(arm: str, lab: Lab) -> dict[str, Any]:
    return find_token(arm, lab).to_dict()


def _as_it_is(arm: str, other: Policy, cache: Cache, task: BodyTask, measure: Measure) -> dict[str, Any]:
    """Another policy with its own token, if it has one."""
    inputs = {"model": other.digest, "body": task.body.config.to_dict(), **task.settings.of(*_MEASURE_INPUTS)}
    return cache.get(f"{task.body.name}/{arm}", inputs, functools.partial(measure, None, other))
