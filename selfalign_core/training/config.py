"""What a training run is made of: frozen dataclasses read from YAML, strictly, and overrides ``key=value``.

A key that is unknown, a value of the wrong type or out of range is an error that names file, key, what was found and
what was expected. Knows nothing of torch.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from selfalign_core.errors import ConfigError
from selfalign_core.model.config import ModelConfig
from selfalign_core.policy.transforms import NormMode
from selfalign_core.records import (
    Count,
    Fraction,
    Natural,
    NotNegative,
    Only,
    Positive,
    Range,
    Record,
    load_document,
    named,
    parse_yaml,
    plain,
    read,
    shown,
)


@dataclass(frozen=True)
class ModelSection(Record):
    """The model to train: ``preset`` with fields ``changes``, or the weights of checkpoint directory ``init``.

    ``initialise``: parts that ``init`` may lack and that start fresh (``e_token``, ``alignment``); ``changes`` then
    replaces fields of its configuration that do not move a tensor, or those of the fresh parts.
    """

    preset: str = "tiny"
    init: str | None = None
    initialise: tuple[Literal["e_token", "alignment"], ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        fields = {f.name for f in dataclasses.fields(ModelConfig)} - {"peft_lr"}
        for key in self.changes:
            known = f"a field of ModelConfig ({sorted(fields)})"
            self.expect(key in fields, f"changes.{key}", known, shown(self.changes[key]))

    def build(self) -> ModelConfig:
        """The configuration of the preset with the changes."""
        preset = ModelConfig.preset(self.preset).to_dict()
        return ModelConfig.from_dict({**preset, **_nested(preset, self.changes)})


@dataclass(frozen=True)
class DataSection(Record):
    """``path``: dataset directory. ``holdout``: share of episodes, or of embodiments, kept for evaluation alone.

    ``statistics``: which normalise states and actions, the dataset's or those of ``model.init``, for parts that stand
    still read numbers as they learned to.
    """

    path: str
    holdout: Fraction = 0.1
    holdout_by: Literal["episode", "embodiment"] = "episode"
    state_norm: NormMode = "quantile"
    action_norm: NormMode = "quantile"
    statistics: Literal["data", "init"] = "data"
    tokenizer: str | None = None
    """tokenizer.json or its directory; by default the one in ``model.init``, else one word list of all prompts."""


@dataclass(frozen=True)
class OptimSection(Record):
    """AdamW. ``peft_lr``: rate of the E-Token or its bank, 5 × ``lr`` unless given.

    The rate rises linearly over ``warmup_steps`` and falls along a cosine to ``final_lr_fraction`` of the peak at the
    last step. ``grad_clip`` bounds the gradient norm of the model, ``bank_grad_clip`` that of the tokens apart from it
    (a row of the bank sees only the samples of its body, so the two norms have nothing in common); null turns it off.
    """

    lr: Positive = 3e-4
    peft_lr: Positive | None = None
    weight_decay: NotNegative = 0.01
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: Positive = 1e-8
    warmup_steps: Natural = 100
    final_lr_fraction: Annotated[float, Range(0, 1)] = 0.1
    grad_clip: Positive | None = 1.0
    bank_grad_clip: Positive | None = 1.0

    @property
    def token_lr(self) -> float:
        return 5 * self.lr if self.peft_lr is None else self.peft_lr


@dataclass(frozen=True)
class BankSection(Record):
    """``mode``: one token per embodiment, or one ``shared`` by all. ``capacity``: rows, those of the data by default.

    ``init_std``: standard deviation of the normal initialisation. ``noise_std``: of the noise that is added to the
    token of every training sample, so that the experts learn to read a token's neighbours as nearly the same body.
    ``deploy``: the embodiment whose token the policy is written with; the bank's mean by default.
    ``tokens``: file of tokens by embodiment (:mod:`aligned_tokens`) for bodies that ``model.init`` does not know. All
    tokens stand still then, and the policy is written with the bank and the E-Token of ``model.init``.
    """

    mode: Literal["embodiment", "shared"] = "embodiment"
    capacity: Count | None = None
    init_std: NotNegative = 1.0
    noise_std: NotNegative = 0.0
    deploy: str | None = None
    tokens: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens is not None:
            for name, expected in (("mode", "embodiment"), ("capacity", None), ("deploy", None)):
                alone = f"{expected!r} beside tokens, which leave the bank as it is"
                self.expect(getattr(self, name) == expected, name, alone)


@dataclass(frozen=True)
class LoraSection(Record):
    """Low-rank adapters (``peft``) on the linear layers ``targets`` (regular expression over module names).

    The layers themselves stand still; the adapters are merged into the weights of every policy written.
    """

    rank: Count = 16
    alpha: Positive = 16.0
    targets: str = (
        r".*\.(language_model|gemma_expert|alignment_expert)\..*"
        r"\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            re.compile(self.targets)
        except re.error as error:
            self.expect(False, "targets", "a regular expression", f"{self.targets!r} ({error})")


@dataclass(frozen=True)
class LogSection(Record):
    """Steps between two log lines, gap measurements and evaluations (null: never), and how many samples those read."""

    every: Count = 10
    gap_every: Count | None = 200
    gap_samples: Annotated[int, Range(2)] = 64
    eval_every: Count | None = 500
    eval_samples: Count = 256
    tensorboard: bool = True
    progress: bool = True


@dataclass(frozen=True)
class CheckpointSection(Record):
    """Steps between two checkpoints (one is always written at the end) and how many of the newest to ``keep``."""

    every: Count = 1000
    keep: Count = 2


@dataclass(frozen=True)
class TrainConfig(Record):
    """A training run. ``batch_size`` is the whole batch of a step, over all ranks and accumulated passes.

    ``output``: run directory, shared by all nodes of a job. ``parallel``: how ranks of a torchrun job work together.
    ``freeze``: parts that stand still: ``vision_tower``, ``projector``, ``vlm``, ``action_expert``,
    ``alignment_expert``, or patterns of parameter names such as ``*.embed_tokens.weight``. ``ema_decay``: of the
    averaged weights that policies are written with, null for none. ``cache_features``: run the frozen vision tower once
    per frame and keep its output on the disk.
    ``rtc_max_delay``: with d uniform in 0..rtc_max_delay, the chunk's first d actions are given clean and only the rest
    is learned (training-time real-time chunking, arXiv 2512.05964). ``losses``: ``all`` or the ``action`` loss alone.
    """

    output: Annotated[str, Only(len, "a directory")]
    data: DataSection
    seed: Natural = 0
    steps: Count = 10_000
    batch_size: Count = 64
    accumulation: Count = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    losses: Literal["all", "action"] = "all"
    checkpoint_layers: bool = False
    cache_features: bool = False
    rtc_max_delay: Natural = 0
    ema_decay: Fraction | None = 0.99
    freeze: tuple[str, ...] = ()
    model: ModelSection = field(default_factory=ModelSection)
    optim: OptimSection = field(default_factory=OptimSection)
    bank: BankSection = field(default_factory=BankSection)
    lora: LoraSection | None = None
    log: LogSection = field(default_factory=LogSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = self.batch_size % self.accumulation == 0
        self.expect(whole, "batch_size", f"a multiple of accumulation={self.accumulation}")
        of_init = {"bank.tokens": self.bank.tokens is not None, "data.statistics": self.data.statistics == "init"}
        for key, wanted in of_init.items():
            self.expect(not wanted or self.model.init is not None, "model.init", f"a checkpoint, for {key}", "None")
        warmup = self.optim.warmup_steps
        self.expect(warmup < self.steps, "optim.warmup_steps", "less than steps", str(warmup))
        if self.cache_features:
            self.expect(
                {"vision_tower", "projector"} <= set(self.freeze),
                "cache_features",
                "vision_tower and projector under freeze (features of a tower that learns cannot be kept)",
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict of YAML types; :meth:`from_dict` reads it."""
        return plain(self)

    @classmethod
    def from_dict(cls, values: Any, overrides: Sequence[str] = ()) -> TrainConfig:
        """Strict inverse of :meth:`to_dict`, then ``key=value`` overrides; :class:`ConfigError` names the key."""
        values = copy.deepcopy(values)
        for override in overrides:
            _override(values, override)
        return read(cls, values)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
        """Read a YAML file, then apply ``key=value`` overrides (``optim.lr=1e-3``; values are YAML).

        Raises:
            ConfigError: naming the file or the override, the key, what was found and what was expected.
        """
        values = load_document(path, "a training configuration")
        with named(path):
            return cls.from_dict(values, overrides)


def _override(values: Any, override: str) -> None:
    key, equals, text = override.partition("=")
    _require(bool(equals) and bool(key), override, "key=value")
    with named(f"override {override!r}"):
        value = parse_yaml(text, "a value")
    *sections, last = key.split(".")
    for section in sections:
        if isinstance(values, dict) and values.get(section) is None:
            values[section] = {}
        values = values[section] if isinstance(values, dict) else values
    _require(isinstance(values, dict), override, "a key inside a section")
    values[last] = value


def _require(condition: bool, override: str, expected: str) -> None:
    if not condition:
        raise ConfigError(f"override: found {override!r}, expected {expected}")


def _nested(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``changes`` with its dictionaries merged into those of ``base``."""
    return {
        key: {**base[key], **value} if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in changes.items()
    }
