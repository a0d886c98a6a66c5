"""Tokens that alignment finds for the bodies of a dataset which a policy does not know, to train its actions on.

    python -m selfalign_core.training.aligned_tokens CHECKPOINT DATASET --output tokens.safetensors --jobs 2

Alignment looks for what the self-supervised losses call the best token. That says where signs and gains are, and less
exactly where things are than the token that a body is trained with. An action expert that has met such tokens reads
from the image what they do not tell (``bank.tokens`` of a training configuration). For every body: identification and
refinement as the aligner has them, on as many transitions as one attempt of it fits on, spread over the body's
recordings. No guard: it would only keep the worse half of the tokens from being trained on.
"""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from typing import Annotated

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from selfalign_core.alignment.budget import Budget
from selfalign_core.alignment.config import AlignConfig
from selfalign_core.alignment.identify import identify
from selfalign_core.alignment.refine import refine
from selfalign_core.alignment.scoring import Scorer
from selfalign_core.alignment.trusted import Trusted
from selfalign_core.command_line import More, command
from selfalign_core.data.dataset import TransitionDataset
from selfalign_core.errors import DatasetError
from selfalign_core.policy import Policy
from selfalign_core.policy.token_files import save_tokens
from selfalign_core.robot.types import TransitionBatch


def unknown_bodies(policy: Policy, dataset: TransitionDataset) -> list[str]:
    """Embodiments of ``dataset`` of which ``policy``'s bank has no token."""
    return [name for name in dataset.meta.embodiments if name not in policy.config.bank_keys]


def aligned_token(policy: Policy, dataset: TransitionDataset, embodiment: str, align: AlignConfig) -> Tensor:
    """(T, W): from the trusted token that fits the body best, refined. A function of its arguments alone.

    Raises:
        DatasetError: no transition fits into the body's recordings. InputError: they do not fit the policy.
    """
    seed = dataset.meta.embodiments.index(embodiment)
    batch = _spread(dataset, seed, policy.transition_horizon, align.collect.fit_count)
    scorer, trusted = Scorer(policy, align.weights), Trusted.of(policy)
    scorer.check(batch)
    assert policy.e_token is not None  # Scorer refuses a policy without one
    data, deployed = scorer.prepare(batch), torch.from_numpy(policy.e_token.data).to(policy.dim_mask.device)
    found = identify(scorer, data, deployed, trusted, align.identify, seed=seed, budget=Budget.unlimited())
    return refine(scorer, data, found.token, trusted, align, seed=seed, budget=Budget.unlimited()).token.cpu()


def _spread(dataset: TransitionDataset, embodiment: int, horizon: int, count: int) -> TransitionBatch:
    """At most ``count`` transitions, evenly spread over the recordings of a body."""
    starts = dataset.starts(horizon, episodes=np.flatnonzero(dataset.embodiment_of == embodiment))
    if not len(starts):
        name = dataset.meta.embodiments[embodiment]
        raise DatasetError(f"{dataset.path}: found no {horizon + 1} frames in a row of {name!r}, expected some")
    chosen = np.linspace(0, len(starts) - 1, min(count, len(starts))).round().astype(np.int64)
    return dataset.transitions(starts[chosen], horizon)


# ------------------------------------------------------------------------------------------------ command line


@lru_cache(maxsize=1)
def _opened(checkpoint: str, dataset: str) -> tuple[Policy, TransitionDataset]:
    data = TransitionDataset(dataset)
    return Policy.from_checkpoint(checkpoint, dt=data.meta.dt_ns / 1e9), data


def _work(task: tuple[str, str, str]) -> Tensor:
    *paths, embodiment = task
    torch.set_num_threads(1)  # processes share the cores
    return aligned_token(*_opened(*paths), embodiment, AlignConfig().without_budgets())


def run(
    checkpoint: Annotated[str, "directory of the policy"],
    data: Annotated[str, "dataset directory", More(metavar="dataset")],
    *,
    output: Annotated[str, "safetensors file to write"],
    jobs: Annotated[int, "processes"] = 1,
) -> None:
    """Find a token by alignment for every body of a dataset that a policy does not know."""
    policy, dataset = _opened(checkpoint, data)
    names = unknown_bodies(policy, dataset)
    if not names:
        raise DatasetError(f"{dataset.path}: found only bodies that {checkpoint} knows, expected others")
    tasks = [(checkpoint, data, name) for name in names]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = list(tqdm(pool.map(_work, tasks), total=len(tasks), unit="body", mininterval=1.0))
    save_tokens(output, {name: token.numpy() for name, token in zip(names, found, strict=True)}, policy.digest)


main = command("selfalign_core.training.aligned_tokens", run)

if __name__ == "__main__":
    sys.exit(main())
