"""What the three self-supervised losses of given E-Tokens are on a whole recorded bag, whatever an aligner saw of it.

Must not know ROS, nodes, or where the tokens come from.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selfalign_core.alignment.scoring import Scorer
from selfalign_core.contract import RobotContract
from selfalign_core.data.dataset import TransitionDataset
from selfalign_core.data.rosbag import convert
from selfalign_core.data.rosbag_options import Options
from selfalign_core.policy import Policy
from selfalign_core.replay_comparison import LOSSES
from selfalign_core.types import EToken, TransitionBatch

TRANSITIONS = 64
"""Most transitions of a bag that are scored, evenly spread over it."""
_DRAWS = 16
_WEIGHTS = (1.0, 1.0, 1.0)  # each loss is told by itself


def transitions_of_bag(
    bag: Path, contract: RobotContract, policy: Policy, *, namespace: str = "/", most: int = TRANSITIONS
) -> TransitionBatch:
    """Up to ``most`` transitions, evenly spread over the bag, none overlapping another; none if none fits.

    They are those that the buffer has of the bag when it is replayed through the nodes.

    Raises:
        BagError, DatasetError: the bag cannot be read, or has no usable frame.
    """
    options = Options(image_size=policy.image_size, prompt="", namespace=namespace, allow_early_end=True)
    with tempfile.TemporaryDirectory() as folder:
        convert([bag], contract, Path(folder) / "dataset", options)
        dataset = TransitionDataset(Path(folder) / "dataset")
        horizon = policy.transition_horizon
        starts = dataset.starts(horizon)
        apart: list[int] = []
        free = 0  # the first row that none of them has reached over
        for start, end in zip(starts, dataset.timeline.pair(starts, horizon).next, strict=True):
            if start >= free:
                apart.append(int(start))
                free = end
        chosen = np.array(apart, np.int64)
        if len(chosen) > most:
            chosen = chosen[np.linspace(0, len(chosen) - 1, most).round().astype(np.int64)]
        return dataset.transitions(chosen, horizon)


def score_change(
    policy: Policy, batch: TransitionBatch, before: EToken, after: EToken, *, prompt: str = ""
) -> dict[str, Any]:
    """Losses of the token ``before`` and of the one ``after`` it on the same transitions, noise and times.

    Returns ``transitions`` (how many) and ``losses``: for each of :data:`LOSSES` the means ``before`` and ``after``,
    the ``difference`` after - before and its ``stderr`` over transitions.

    Raises:
        InputError: a token or the transitions do not fit the policy.
    """
    for token in (before, after):
        policy.check_e_token(token)
    scorer = Scorer(policy, _WEIGHTS, prompt=prompt)
    scorer.check(batch)
    data = scorer.prepare(batch)
    device = policy.dim_mask.device
    tensors = [torch.from_numpy(np.array(token.data, np.float32)).to(device) for token in (before, after)]
    samples = [scorer.samples(data, token, _DRAWS, seed=0) for token in tensors]
    losses = {}
    for name in LOSSES:
        one, other = (getattr(s, name).double().reshape(_DRAWS, -1).mean(0).cpu().numpy() for s in samples)
        change, count = other - one, len(batch)
        losses[name] = {
            "before": float(one.mean()),
            "after": float(other.mean()),
            "difference": float(change.mean()),
            "stderr": float(change.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan,
        }
    return {"transitions": len(batch), "losses": losses}
