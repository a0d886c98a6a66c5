"""What a training run is made of: frozen dataclasses read from YAML, strictly, and overrides ``key=value``.

A key that is unknown, a value of the wrong type or out of range is an error that names file, key, what was found and
what was expected. Knows nothing of torch.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import types
import typing
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from selfalign_core.errors import ConfigError
from selfalign_core.model.config import ModelConfig
from selfalign_core.policy.transforms import NormMode


def _require(condition: bool, where: str, found: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{where}: found {found!r}, expected {expected}")


def _at_least(owner: object, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        _require(value is None or value >= minimum, name, value, f"a number >= {minimum:g}")


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        _require(value is None or value > 0, name, value, "a number > 0")


@dataclass(frozen=True)
class ModelSection:
    """The model to train: ``preset`` with fields ``changes``, or the weights of checkpoint directory ``init``.

    ``initialise``: parts that ``init`` may lack and that start fresh (``e_token``, ``alignment``); ``changes`` then
    replaces fields of its configuration that do not move a tensor, or those of the fresh parts.
    """

    preset: str = "tiny"
    init: str | None = None
    initialise: tuple[Literal["e_token", "alignment"], ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fields = {f.name for f in dataclasses.fields(ModelConfig)} - {"peft_lr"}
        for key in self.changes:
            _require(key in fields, f"changes.{key}", self.changes[key], f"a field of ModelConfig ({sorted(fields)})")

    def build(self) -> ModelConfig:
        """The configuration of the preset with the changes."""
        preset = ModelConfig.preset(self.preset).to_dict()
        return ModelConfig.from_dict({**preset, **_nested(preset, self.changes)})


@dataclass(frozen=True)
class DataSection:
    """``path``: dataset directory. ``holdout``: share of episodes, or of embodiments, kept for evaluation alone.

    ``statistics``: which normalise states and actions, the dataset's or those of ``model.init``, for parts that stand
    still read numbers as they learned to.
    """

    path: str
    holdout: float = 0.1
    holdout_by: Literal["episode", "embodiment"] = "episode"
    state_norm: NormMode = "quantile"
    action_norm: NormMode = "quantile"
    statistics: Literal["data", "init"] = "data"
    tokenizer: str | None = None
    """tokenizer.json or its directory; by default the one in ``model.init``, else one word list of all prompts."""

    def __post_init__(self) -> None:
        _require(0.0 <= self.holdout < 1.0, "holdout", self.holdout, "a fraction in [0, 1)")


@dataclass(frozen=True)
class OptimSection:
    """AdamW. ``peft_lr``: rate of the E-Token or its bank, 5 × ``lr`` unless given.

    The rate rises linearly over ``warmup_steps`` and falls along a cosine to ``final_lr_fraction`` of the peak at the
    last step. ``grad_clip`` bounds the gradient norm of the model, ``bank_grad_clip`` that of the tokens apart from it
    (a row of the bank sees only the samples of its body, so the two norms have nothing in common); null turns it off.
    """

    lr: float = 3e-4
    peft_lr: float | None = None
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    warmup_steps: int = 100
    final_lr_fraction: float = 0.1
    grad_clip: float | None = 1.0
    bank_grad_clip: float | None = 1.0

    def __post_init__(self) -> None:
        _positive(self, "lr", "peft_lr", "eps", "grad_clip", "bank_grad_clip")
        _at_least(self, 0, "weight_decay", "warmup_steps")
        _require(all(0 <= b < 1 for b in self.betas), "betas", self.betas, "two numbers in [0, 1)")
        _require(0 <= self.final_lr_fraction <= 1, "final_lr_fraction", self.final_lr_fraction, "a number in [0, 1]")

    @property
    def token_lr(self) -> float:
        return 5 * self.lr if self.peft_lr is None else self.peft_lr


@dataclass(frozen=True)
class BankSection:
    """``mode``: one token per embodiment, or one ``shared`` by all. ``capacity``: rows, those of the data by default.

    ``init_std``: standard deviation of the normal initialisation. ``noise_std``: of the noise that is added to the
    token of every training sample, so that the experts learn to read a token's neighbours as nearly the same body.
    ``deploy``: the embodiment whose token the policy is written with; the bank's mean by default.
    ``tokens``: file of tokens by embodiment (:mod:`aligned_tokens`) for bodies that ``model.init`` does not know. All
    tokens stand still then, and the policy is written with the bank and the E-Token of ``model.init``.
    """

    mode: Literal["embodiment", "shared"] = "embodiment"
    capacity: int | None = None
    init_std: float = 1.0
    noise_std: float = 0.0
    deploy: str | None = None
    tokens: str | None = None

    def __post_init__(self) -> None:
        _at_least(self, 1, "capacity")
        _at_least(self, 0, "init_std", "noise_std")
        if self.tokens is not None:
            for name, expected in (("mode", "embodiment"), ("capacity", None), ("deploy", None)):
                found = getattr(self, name)
                _require(found == expected, name, found, f"{expected!r} beside tokens, which leave the bank as it is")


@dataclass(frozen=True)
class LoraSection:
    """Low-rank adapters (``peft``) on the linear layers ``targets`` (regular expression over module names).

    The layers themselves stand still; the adapters are merged into the weights of every policy written.
    """

    rank: int = 16
    alpha: float = 16.0
    targets: str = (
        r".*\.(language_model|gemma_expert|alignment_expert)\..*"
        r"\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    )

    def __post_init__(self) -> None:
        _at_least(self, 1, "rank")
        _positive(self, "alpha")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ConfigError(f"targets: found {self.targets!r} ({error}), expected a regular expression") from None


@dataclass(frozen=True)
class LogSection:
    """Steps between two log lines, gap measurements and evaluations (null: never), and how many samples those read."""

    every: int = 10
    gap_every: int | None = 200
    gap_samples: int = 64
    eval_every: int | None = 500
    eval_samples: int = 256
    tensorboard: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        _at_least(self, 1, "every", "gap_every", "eval_every", "eval_samples")
        _at_least(self, 2, "gap_samples")


@dataclass(frozen=True)
class CheckpointSection:
    """Steps between two checkpoints (one is always written at the end) and how many of the newest to ``keep``."""

    every: int = 1000
    keep: int = 2

    def __post_init__(self) -> None:
        _at_least(self, 1, "every", "keep")


@dataclass(frozen=True)
class TrainConfig:
    """A training run. ``batch_size`` is the whole batch of a step, over all ranks and accumulated passes.

    ``output``: run directory, shared by all nodes of a job. ``parallel``: how ranks of a torchrun job work together.
    ``freeze``: parts that stand still: ``vision_tower``, ``projector``, ``vlm``, ``action_expert``,
    ``alignment_expert``, or patterns of parameter names such as ``*.embed_tokens.weight``. ``ema_decay``: of the
    averaged weights that policies are written with, null for none. ``cache_features``: run the frozen vision tower once
    per frame and keep its output on the disk.
    ``rtc_max_delay``: with d uniform in 0..rtc_max_delay, the chunk's first d actions are given clean and only the rest
    is learned (training-time real-time chunking, arXiv 2512.05964). ``losses``: ``all`` or the ``action`` loss alone.
    """

    output: str
    data: DataSection
    seed: int = 0
    steps: int = 10_000
    batch_size: int = 64
    accumulation: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    losses: Literal["all", "action"] = "all"
    checkpoint_layers: bool = False
    cache_features: bool = False
    rtc_max_delay: int = 0
    ema_decay: float | None = 0.99
    freeze: tuple[str, ...] = ()
    model: ModelSection = field(default_factory=ModelSection)
    optim: OptimSection = field(default_factory=OptimSection)
    bank: BankSection = field(default_factory=BankSection)
    lora: LoraSection | None = None
    log: LogSection = field(default_factory=LogSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)

    def __post_init__(self) -> None:
        _require(bool(self.output), "output", self.output, "a directory")
        _at_least(self, 0, "seed", "rtc_max_delay")
        _at_least(self, 1, "steps", "batch_size", "accumulation")
        _require(
            self.batch_size % self.accumulation == 0,
            "batch_size",
            self.batch_size,
            f"a multiple of accumulation={self.accumulation}",
        )
        _require(
            self.ema_decay is None or 0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "a number in [0, 1) or null"
        )
        of_init = {"bank.tokens": self.bank.tokens is not None, "data.statistics": self.data.statistics == "init"}
        for key, wanted in of_init.items():
            _require(not wanted or self.model.init is not None, "model.init", None, f"a checkpoint, for {key}")
        _require(self.optim.warmup_steps < self.steps, "optim.warmup_steps", self.optim.warmup_steps, "less than steps")
        if self.cache_features:
            _require(
                {"vision_tower", "projector"} <= set(self.freeze),
                "cache_features",
                True,
                "vision_tower and projector under freeze (features of a tower that learns cannot be kept)",
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict of YAML types; :meth:`from_dict` reads it."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: Any, overrides: Sequence[str] = ()) -> TrainConfig:
        """Strict inverse of :meth:`to_dict`, then ``key=value`` overrides; :class:`ConfigError` names the key."""
        values = copy.deepcopy(values)
        for override in overrides:
            _override(values, override)
        return _parse(cls, values, "")

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
        """Read a YAML file, then apply ``key=value`` overrides (``optim.lr=1e-3``; values are YAML).

        Raises:
            ConfigError: naming the file or the override, the key, what was found and what was expected.
        """
        path = Path(path)
        try:
            values = load_yaml(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: found {error.strerror}, expected a training configuration") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: found invalid YAML ({error})") from None
        try:
            return cls.from_dict(values, overrides)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None


# ------------------------------------------------------------------------------------------------ strict reading


class _Loader(yaml.SafeLoader):
    """YAML where a key counts once and ``1e-3`` is a number (YAML 1.2), not a string."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} found twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def load_yaml(text: str) -> Any:
    """The document in ``text``; raises ``yaml.YAMLError``."""
    return yaml.load(text, _Loader)


def _override(values: Any, override: str) -> None:
    key, equals, text = override.partition("=")
    _require(bool(equals) and bool(key), "override", override, "key=value")
    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: found invalid YAML ({error})") from None
    *sections, last = key.split(".")
    for section in sections:
        if isinstance(values, dict) and values.get(section) is None:
            values[section] = {}
        values = values[section] if isinstance(values, dict) else values
    _require(isinstance(values, dict), "override", override, "a key inside a section")
    values[last] = value


def _parse(kind: Any, value: Any, where: str) -> Any:
    """``value`` (from YAML) as ``kind``: a dataclass, Literal, Optional, tuple, dict or plain type."""
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _parse_section(kind, value, where)
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(kind) if a is not type(None)]
        return None if value is None else _parse(inner[0], value, where)
    if origin is Literal:
        allowed = typing.get_args(kind)
        _require(value in allowed, where, value, "one of " + ", ".join(map(repr, allowed)))
        return value
    if origin is tuple:
        of = typing.get_args(kind)
        _require(isinstance(value, list | tuple), where, value, "a list")
        if of[-1] is not Ellipsis:
            _require(len(value) == len(of), where, value, f"a list of {len(of)}")
        kinds = [of[0]] * len(value) if of[-1] is Ellipsis else of
        return tuple(_parse(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        _require(isinstance(value, dict) and all(isinstance(k, str) for k in value), where, value, "keys and values")
        return dict(value)
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        _require(number, where, value, "a number")
        return float(value)
    names = {int: "an integer", bool: "true or false", str: "a string"}
    _require(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)), where, value, names[kind])
    return value


def _parse_section(kind: type, value: Any, where: str) -> Any:
    at = f"{where}." if where else ""
    _require(isinstance(value, dict), where or "document", value, "keys and values")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in value:
        _require(key in fields, f"{at}{key}", value[key], f"no such key, but one of {', '.join(fields)}")
    for name, f in fields.items():
        if name not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{at}{name}: found nothing, expected a value")
    hints = typing.get_type_hints(kind)
    parsed = {name: _parse(hints[name], found, f"{at}{name}") for name, found in value.items()}
    try:
        return kind(**parsed)
    except ConfigError as error:
        raise ConfigError(f"{at}{error}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def _nested(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``changes`` with its dictionaries merged into those of ``base``."""
    return {
        key: {**base[key], **value} if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in changes.items()
    }
