"""Work in parallel processes, each with one thread, so that their number changes no result; and what a process keeps
between two tasks, because it is slow to make: policies and simulated arms.
"""

from __future__ import annotations

import atexit
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from selfalign_core.errors import CheckpointError
from selfalign_core.policy import Policy
from selfalign_core.sim import ReachEnv
from selfalign_core.study.rollout import CONTROL_HZ, EpisodeResult, EpisodeSpec, PolicyPlanner, RolloutConfig, rollout

R = TypeVar("R")

BATCH = 20
"""Episodes that share one inference. Sums depend on it in the last bits, so it is one number for all."""

_environments: list[ReachEnv] = []


def run_tasks(function: Callable[..., R], tasks: Sequence[Any], jobs: int) -> Iterator[R]:
    """``function`` of each task, a tuple being its arguments, in order; in this process if ``jobs`` is 1."""
    if jobs == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield from (_do(function, task) for task in tasks)
        finally:
            close_environments()
            torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(_do, [function] * len(tasks), tasks)


def _do(function: Callable[..., R], task: Any) -> R:
    return function(*task) if isinstance(task, tuple) else function(task)


def load_policy(checkpoint: str) -> Policy:
    """The policy of a checkpoint directory; ``CheckpointError`` if it is none."""
    if not Path(checkpoint).is_dir():
        raise CheckpointError(f"checkpoint: found no directory {checkpoint}, expected a checkpoint directory")
    return Policy.from_checkpoint(checkpoint, dt=1.0 / CONTROL_HZ)


policy_of = lru_cache(maxsize=4)(load_policy)
"""The same, read once per process."""


def in_batches(
    planner: PolicyPlanner, episodes: Sequence[EpisodeSpec], config: RolloutConfig | None = None
) -> list[EpisodeResult]:
    """The results of ``episodes``, ``BATCH`` of them side by side, on arms that this process keeps."""
    results = []
    for begin in range(0, len(episodes), BATCH):
        results += rollout(planner, episodes[begin : begin + BATCH], config, environments=_environments)
    return results


@atexit.register
def close_environments() -> None:
    """Free this process's drawing contexts."""
    while _environments:
        _environments.pop().close()
