"""What a training starts from: the model of a checkpoint or a new one, its tokenizer and statistics, and a token bank.

Nothing here depends on ranks, precision or steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfalign_core.data.dataset import TransitionDataset
from selfalign_core.errors import ConfigError
from selfalign_core.model.config import ModelConfig
from selfalign_core.model.pi0 import Pi0
from selfalign_core.policy.bank import SHARED_KEY, TokenBank, bank_mean
from selfalign_core.policy.checkpoint import load_model
from selfalign_core.policy.codec import Codec
from selfalign_core.policy.config import PolicyConfig
from selfalign_core.policy.policy import Policy
from selfalign_core.policy.source import Source, is_foreign
from selfalign_core.policy.token_files import load_tokens
from selfalign_core.policy.tokenizer import load_tokenizer, word_tokenizer
from selfalign_core.policy.untrained import TINY_WORDS
from selfalign_core.training.config import TrainConfig

KnownBank = tuple[tuple[str, ...], Tensor]
"""A checkpoint's keys and their tokens (entries, T, W)."""


@dataclass(frozen=True)
class Start:
    """The float32 ``model`` to train and the ``codec`` of the policies it becomes.

    ``known``: the checkpoint's bank if it has one, ``embodiment``: the body whose token it carries. ``found``: tokens
    of other bodies, which stand still like the bank's.
    """

    model: Pi0
    codec: Codec
    known: KnownBank | None
    embodiment: str = ""
    found: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, config: TrainConfig, dataset: TransitionDataset) -> Start:
        """Raises ``ConfigError`` or ``CheckpointError`` if ``config``, its checkpoint and ``dataset`` do not fit."""
        origin = _origin(config, dataset.meta.dt_ns / 1e9)
        model = origin.model
        tokenizer = _tokenizer(config, dataset, model.config, origin.tokenizer)
        policy_config = _policy_config(config, dataset, model.config)
        normalised = {config.data.state_norm, config.data.action_norm} != {"identity"}
        stats = origin.stats if config.data.statistics == "init" else dataset.norm_stats
        if normalised and not stats:
            raise ConfigError(f"data.statistics: found none in {config.model.init}, expected those of the checkpoint")
        found = {}
        if config.bank.tokens is not None:
            if origin.known is None:
                raise ConfigError(f"bank.tokens: found no bank in {config.model.init}, expected one to leave as it is")
            tokens = load_tokens(config.bank.tokens, model_digest=origin.digest)
            found = {key: torch.from_numpy(token) for key, token in tokens.items()}
        codec = Codec(policy_config, dict(stats) if normalised else {}, tokenizer)
        return cls(model, codec, origin.known, origin.embodiment, found)

    def new_bank(self, config: TrainConfig, dataset: TransitionDataset, episodes: np.ndarray) -> TokenBank | None:
        """A token for every embodiment in ``episodes``, or one for all; None if the model has no E-Token.

        Of tokens that stand still there is one for every embodiment, also of held-out ones: none is trained on.

        Raises:
            ConfigError: the key to deploy is not among them, or a body has no token that could stand still.
        """
        section, model = config.bank, self.model.config
        if not model.use_peft_prefix_token:
            return None
        keys: Sequence[str] = (SHARED_KEY,)
        if section.mode == "embodiment":
            used = np.unique(dataset.embodiment_of[episodes if section.tokens is None else slice(None)])
            keys = [dataset.meta.embodiments[i] for i in used]
        bank = TokenBank(
            keys,
            tokens=model.peft_num_tokens,
            width=model.action_expert.width,
            capacity=section.capacity,
            init_std=section.init_std,
            seed=config.seed,
        )
        if section.deploy is not None and section.deploy not in bank.keys:
            raise ConfigError(f"bank.deploy: found {section.deploy!r}, expected one of the bank's keys: {bank.keys}")
        if self.known is not None:  # bodies that the checkpoint knows keep their tokens, new ones start from its mean
            known, weight = self.known
            tokens = {**self.found, **dict(zip(known, weight, strict=False))}
            if section.tokens is not None and (missing := [key for key in keys if key not in tokens]):
                raise ConfigError(
                    f"bank.tokens: found no token of {', '.join(missing[:3])} ({len(missing)} of {len(keys)} bodies) "
                    f"in {section.tokens} or {config.model.init}, expected one for every body of {dataset.path}"
                )
            mean = bank_mean(weight[: len(known)])
            with torch.no_grad():
                for row, key in enumerate(keys):
                    bank.weight[row] = tokens.get(key, mean)
        return bank


@dataclass(frozen=True)
class _Origin:
    """What a checkpoint has beside its model, or nothing."""

    model: Pi0
    tokenizer: Any = None
    stats: Mapping[str, Any] = field(default_factory=dict)
    known: KnownBank | None = None
    embodiment: str = ""
    digest: str = ""


def _origin(config: TrainConfig, dt: float) -> _Origin:
    section = config.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if section.init is None:
            return _Origin(Pi0(section.build()))
        path = Path(section.init)
        changes = section.changes
        if is_foreign(path):
            source = Source.read(path)
            changed = source.config.model.replace(**changes)
            model = load_model(path, changed, initialise=section.initialise, seed=config.seed).float()
            return _Origin(model, load_tokenizer(config.data.tokenizer or path), source.stats)
        policy = Policy.from_checkpoint(path, dt=dt, initialise=section.initialise)
        if changes:
            changed = ModelConfig.from_dict({**policy.config.model.to_dict(), **changes})
            without: tuple[str, ...] = () if changed.use_peft_prefix_token else ("e_token",)
            without += () if changed.alignment_expert is not None else ("alignment",)
            policy.model = load_model(path, changed, initialise=section.initialise, leave_out=without, seed=config.seed)
        model = policy.model.float().requires_grad_(True)
        model.paligemma_with_expert.gemma_expert.lm_head.requires_grad_(False)
        bank = None if policy.bank is None else (policy.config.bank_keys, policy.bank)
        codec, embodiment = policy.codec, "" if policy.e_token is None else policy.e_token.embodiment
        return _Origin(model, codec.tokenizer, codec.stats, bank, embodiment, policy.digest)


def _tokenizer(config: TrainConfig, dataset: TransitionDataset, model: ModelConfig, of_checkpoint: Any) -> Any:
    """The configured one, else the checkpoint's, else one of the words in the dataset's prompts."""
    tokenizer = of_checkpoint
    if config.data.tokenizer is not None:
        tokenizer = load_tokenizer(config.data.tokenizer)
    elif tokenizer is None:
        if model.pi05:
            raise ConfigError("data.tokenizer: found none, expected one (π0.5 writes the state into the prompt)")
        words = {word for prompt in dataset.meta.prompts for word in prompt.lower().replace("_", " ").split()}
        tokenizer = word_tokenizer([*TINY_WORDS, *sorted(words - set(TINY_WORDS))])
    size = tokenizer.get_vocab_size()
    if size > model.vocab_size:
        raise ConfigError(f"model.changes.vocab_size: found {model.vocab_size}, expected {size} (the tokenizer's)")
    return tokenizer


def _policy_config(config: TrainConfig, dataset: TransitionDataset, model: ModelConfig) -> PolicyConfig:
    meta, data = dataset.meta, config.data
    return PolicyConfig(
        model=model.replace(peft_lr=config.optim.token_lr),
        cameras=meta.cameras,
        state_dim=meta.state_dim,
        action_dim=meta.action_dim,
        state_norm=data.state_norm,
        action_norm=data.action_norm,
        delta_mask=meta.delta_mask,
        padding_masked=True,
        joints=meta.joint_names if meta.state_dim == meta.action_dim else (),
        rtc_max_delay=config.rtc_max_delay,
    )
