"""Tasks in parallel processes, and results kept in files, so that an interrupted study goes on where it was."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.report import write_json
from benchmarks.studies.adaptation.measure import close_environments
from selfalign_core.policy import Policy
from selfalign_core.study.table import load_policy

T = TypeVar("T")
R = TypeVar("R")


class Cache:
    """JSON files under ``root``; one counts only if it was made from the same ``inputs``."""

    def __init__(self, root: str | Path):
        self._root = Path(root)

    def get(self, name: str, inputs: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The plain data kept as ``name``, made and kept first if it is missing or of other inputs."""
        path, inputs = self._root / f"{name}.json", json.loads(json.dumps(inputs))
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["inputs"] == inputs:
                return kept["value"]
        value = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"inputs": inputs, "value": value})
        return json.loads(json.dumps(value))


@lru_cache(maxsize=4)
def policy_of(checkpoint: str) -> Policy:
    """The policy of a checkpoint directory, read once per process."""
    return load_policy(checkpoint)


def run_tasks(function: Callable[[T], R], tasks: Sequence[T], jobs: int) -> Iterator[R]:
    """Results in order; each process has one thread, also if there is only this one."""
    if jobs == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield from map(function, tasks)
        finally:
            close_environments()
            torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(function, tasks)


def say(text: str) -> None:
    """Progress, on stderr by way of the terminal's user."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
