"""Low-rank adapters through ``peft``, and merging them back into plain weights. Knows nothing of training."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from selfalign_core.errors import ConfigError
from selfalign_core.training.config import LoraSection

_ADAPTER = "default"


def inject(model: nn.Module, config: LoraSection, *, unreached: Collection[str] = (), seed: int = 0) -> None:
    """Put adapters on the layers that ``config.targets`` matches, in place; their own weights stand still.

    Other parameters keep training or not as before. Adapters of ``unreached`` parameters, which no loss depends on,
    are not trained. All start from ``seed``, so every rank has the same.

    Raises:
        ConfigError: ``peft`` is not installed, or no layer matches.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(f"lora: found no package peft ({error}), expected it installed (pip install peft)") from error
    before = {id(p): p.requires_grad for p in model.parameters()}
    options = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft only divides it by the rank; its type says int
        lora_dropout=0.0,
        target_modules=config.targets,
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(options, model)
    except ValueError as error:
        raise ConfigError(f"lora.targets: found {config.targets!r} ({error}), expected linear layers") from error
    for name, parameter in model.named_parameters():
        if ".lora_" in name and name.partition(".lora_")[0] + ".weight" in unreached:
            parameter.requires_grad_(False)
        if id(parameter) in before:
            parameter.requires_grad_(before[id(parameter)] and ".base_layer." not in name)


def merge(state: dict[str, Tensor], config: LoraSection) -> dict[str, Tensor]:
    """A state dict with adapters → one of the plain model: ``W + alpha / rank · B A``."""
    merged = {}
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        if ".base_layer." in name:
            layer, _, kind = name.partition(".base_layer.")
            if kind == "weight":
                down, up = (state[f"{layer}.lora_{part}.{_ADAPTER}.weight"] for part in "AB")
                tensor = tensor + config.alpha / config.rank * (up @ down)
            name = f"{layer}.{kind}"
        merged[name] = tensor
    return merged
