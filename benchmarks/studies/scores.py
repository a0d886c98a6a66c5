"""Losses of a policy on recordings with a token of its bank, and the token that a robot would pick for a new body.

Everything random is common to whatever is compared: samples, prompts, noise and times follow from the seed and the
place of an episode or body alone. Knows nothing of checkpoints, runs or tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from selfalign_core.alignment.scoring import Scorer
from selfalign_core.data.dataset import TransitionDataset
from selfalign_core.data.loader import Batch, Loader
from selfalign_core.errors import ConfigError, InputError
from selfalign_core.model.config import ModelConfig
from selfalign_core.policy import Policy
from selfalign_core.policy.bank import MEAN_ROW, TokenBank
from selfalign_core.training.joint import JointModel
from selfalign_core.training.samples import Encoder, check_fits
from selfalign_core.training.trainer import LOSSES

_NOISE_DRAWS = 2
"""Per transition, when a token is picked."""


@dataclass(frozen=True)
class Draw:
    """Random samples of some episodes; ``positions`` (B,) decide their noise and times."""

    batch: Batch
    positions: np.ndarray


def draw(
    dataset: TransitionDataset, model: ModelConfig, episodes: Sequence[int], count: int, *, seed: int, place: int
) -> Draw:
    """``count`` samples of ``episodes``, all of them if there are fewer; ``place`` tells one draw from another.

    Raises:
        DatasetError: no transition fits into the episodes.
    """
    available = len(dataset.starts(model.transition_horizon, episodes=episodes))
    loader = Loader(
        dataset,
        batch_size=max(1, min(count, available)),
        chunk=model.action_horizon,
        transition=model.transition_horizon,
        seed=(seed << 32) + place,
        episodes=episodes,
    )
    return Draw(loader.batch(0), (place << 32) + loader.positions(0))


def halves(dataset: TransitionDataset, body: str) -> tuple[list[int], list[int]]:
    """The episodes of ``body``, halved: those to pick a token by, and those to measure it on.

    Raises:
        InputError: fewer than two episodes.
    """
    index = dataset.meta.embodiments.index(body)
    episodes = np.flatnonzero(dataset.embodiment_of == index).tolist()
    if len(episodes) < 2:
        raise InputError(f"{dataset.path}: found {len(episodes)} episode(s) of {body!r}, expected at least two")
    return episodes[: len(episodes) // 2], episodes[len(episodes) // 2 :]


@dataclass(frozen=True)
class Unseen:
    """Losses on a body that was not trained on, with the token of ``row``, which was picked for it, and the mean."""

    row: int
    picked: dict[str, float]
    mean: dict[str, float]


class RecordedLosses:
    """Losses of ``policy`` on ``dataset``.

    Raises:
        ConfigError: the policy does not fit the dataset.
    """

    def __init__(self, policy: Policy, dataset: TransitionDataset, *, seed: int = 0):
        if policy.config.cameras != dataset.meta.cameras:
            raise ConfigError(
                f"{dataset.path}: found cameras {dataset.meta.cameras}, expected the policy's {policy.config.cameras}"
            )
        for name in ("state_dim", "action_dim"):
            found, expected = getattr(dataset.meta, name), getattr(policy.config, name)
            if found != expected:
                raise ConfigError(f"{dataset.path}: found {name} {found}, expected the policy's {expected}")
        check_fits(policy.config, dataset)
        self.policy, self.seed, self._dataset = policy, seed, dataset
        self.bank = _bank_of(policy)
        self.device = policy.dim_mask.device
        self._joint = JointModel(policy.model, self.bank, policy.dim_mask).to(self.device)
        self._encoder = Encoder(
            policy.codec,
            dataset,
            row_of=[0] * len(dataset.meta.embodiments),
            seed=seed,
            alignment=policy.config.model.alignment_expert is not None,
        )

    def row(self, body: str) -> int:
        """Row of the bank for a body trained on: its own, or the only one."""
        return 0 if self.bank is None or len(self.bank.keys) == 1 else self.bank.row(body)

    @torch.no_grad()
    def losses(self, drawn: Draw, row: int) -> dict[str, float]:
        """Mean of each loss with the token of ``row`` (:data:`~selfalign_core.policy.bank.MEAN_ROW`: the mean).

        The action loss is over the samples that have actions to imitate; NaN if none has.
        """
        sample = self._encoder(drawn.batch, drawn.positions).to(self.device)
        sample.rows.fill_(row)
        found = self._joint(sample, reduction="none")
        values = {name: getattr(found, name).double() for name in LOSSES}
        values["action"] = values["action"][sample.labelled]
        return {name: float(v.mean()) if len(v) else math.nan for name, v in values.items()}

    def unseen(self, body: str, place: int, *, pick: int, scored: int) -> Unseen:
        """A token is picked by ``pick`` samples of one half of the body's episodes; ``scored`` of the other half."""
        first, second = halves(self._dataset, body)
        model = self.policy.config.model
        row = self.identify(draw(self._dataset, model, first, pick, seed=0, place=2 * place + 1))
        drawn = draw(self._dataset, model, second, scored, seed=0, place=2 * place)
        mean = MEAN_ROW if self.bank is not None else 0
        return Unseen(row, self.losses(drawn, row), self.losses(drawn, mean))

    @torch.no_grad()
    def identify(self, drawn: Draw) -> int:
        """Row of the bank with the lowest weighted self-supervised loss on the transitions, common noise."""
        if self.bank is None or len(self.bank.keys) == 1:
            return 0
        config, prompts = self.policy.config.model, self._dataset.meta.prompts
        weights = config.lambda_perc, config.lambda_dyn, config.lambda_inv
        scorer = Scorer(self.policy, weights, prompt=prompts[0] if prompts else "")
        data = scorer.prepare(self._dataset.transitions(drawn.batch.index, config.transition_horizon))
        noise = scorer.noise(data, _NOISE_DRAWS, self.seed)
        rows = torch.arange(len(noise.time), device=self.device)
        return int(scorer.score(data, noise, self.bank.used(), rows).mean(1).argmin())


def _bank_of(policy: Policy) -> TokenBank | None:
    """The bank of the checkpoint; its one token where it has no bank; None without an E-Token."""
    config = policy.config.model
    if not config.use_peft_prefix_token:
        return None
    weight = policy.model.peft_prefix_token[None] if policy.bank is None else policy.bank
    keys = policy.config.bank_keys or ("policy",)
    bank = TokenBank(keys, tokens=config.peft_num_tokens, width=config.action_expert.width)
    with torch.no_grad():
        bank.weight.copy_(weight[: len(keys)])
    return bank
