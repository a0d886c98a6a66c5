"""What is trained and how fast: frozen parts, parameter groups, schedule, gradient clipping, averaged weights.

Works on named parameters, plain or sharded; knows nothing of the model's structure but its parameter names.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from selfalign_core.errors import ConfigError
from selfalign_core.training.config import OptimSection

_PALI = "model.paligemma_with_expert.paligemma."
FREEZABLE_PARTS: dict[str, tuple[str, ...]] = {
    "vision_tower": (_PALI + "model.vision_tower.*",),
    "projector": (_PALI + "model.multi_modal_projector.*",),
    "vlm": (_PALI + "*",),
    "action_expert": (
        "model.paligemma_with_expert.gemma_expert.*",
        "model.action_*",
        "model.time_mlp_*",
        "model.state_proj.*",
    ),
    "alignment_expert": ("model.paligemma_with_expert.alignment_expert.*", "model.alignment_*"),
}
"""Names for parts under ``freeze``, as patterns of parameter names."""

TOKEN_PARAMETERS = ("bank.weight",)
_NO_DECAY = ("norm", "embed", "peft_", "bank.")


def freeze(module: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Stop training the parameters that ``patterns`` name; returns their names.

    Raises:
        ConfigError: a pattern that names no parameter.
    """
    names = [name for name, _ in module.named_parameters()]
    frozen: set[str] = set()
    for pattern in patterns:
        globs = FREEZABLE_PARTS.get(pattern, (pattern, f"model.{pattern}"))
        found = {name for name in names if any(fnmatch.fnmatchcase(name, glob) for glob in globs)}
        if not found:
            raise ConfigError(
                f"freeze: found {pattern!r}, which names no parameter, expected one of {sorted(FREEZABLE_PARTS)} "
                f"or a pattern of names such as {names[0]!r}"
            )
        frozen |= found
    for name, parameter in module.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    return sorted(frozen)


@dataclass(frozen=True)
class Trained:
    """The parameters under training: ``forward`` as the model computes with them, ``master`` as they are optimised.

    The two are the same tensor unless the model runs in bfloat16: then an update would be lost in rounding, so the
    optimiser works on a float32 master, and :meth:`publish` rounds it into the model.
    """

    forward: dict[str, nn.Parameter]
    master: dict[str, nn.Parameter]

    @classmethod
    def of(cls, module: nn.Module, originals: Mapping[str, Tensor] | None = None) -> Trained:
        """Those of ``module`` that require a gradient. ``originals``: their float32 values before the cast."""
        forward = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not forward:
            raise ConfigError("freeze: found every parameter frozen, expected some to train")
        master = {
            name: p
            if p.dtype == torch.float32
            else nn.Parameter((p if originals is None else originals[name]).detach().float().clone())
            for name, p in forward.items()
        }
        return cls(forward, master)

    def collect(self) -> None:
        """Move the gradients of the model onto the masters."""
        for name, parameter in self.forward.items():
            if self.master[name] is not parameter:
                self.master[name].grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the model."""
        for name, parameter in self.forward.items():
            if self.master[name] is not parameter:
                parameter.copy_(self.master[name])

    def named(self, *, tokens: bool) -> dict[str, nn.Parameter]:
        """The masters of the E-Tokens, or all the others."""
        return {name: p for name, p in self.master.items() if is_token(name) == tokens}


def is_token(name: str) -> bool:
    """True for the E-Token's own parameters, which have a rate and a gradient bound of their own."""
    return name in TOKEN_PARAMETERS


def has_decay(name: str, parameter: Tensor) -> bool:
    """Matrices decay; tokens, norms, biases and embeddings do not."""
    return parameter.ndim > 1 and not any(part in name for part in _NO_DECAY)


def make_optimizer(trained: Trained, config: OptimSection) -> torch.optim.AdamW:
    """AdamW over three groups, ``model`` (with decay), ``model_no_decay`` and ``token``; empty ones are left out.

    The token's moments are dense: the row of a body that is not in a batch keeps moving a little on its momentum,
    which only smooths its path (β₁ = 0.9 forgets within ten steps).
    """
    groups: dict[str, list[nn.Parameter]] = {"model": [], "model_no_decay": [], "token": []}
    for name, parameter in trained.master.items():
        if is_token(name):
            groups["token"].append(parameter)
        else:
            groups["model" if has_decay(name, parameter) else "model_no_decay"].append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "name": name,
                "peak_lr": config.token_lr if name == "token" else config.lr,
                "weight_decay": config.weight_decay if name == "model" else 0.0,
            }
            for name, parameters in groups.items()
            if parameters
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
    )


def lr_factor(step: int, steps: int, config: OptimSection) -> float:
    """Share of the peak rate at ``step`` (from 0): linear warm-up, then a cosine to ``final_lr_fraction``."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.final_lr_fraction + (1 - config.final_lr_fraction) * cosine


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Set every group's rate to ``factor`` of its peak; returns rate by group name."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float | None) -> Tensor:
    """Bound the joint gradient norm to ``limit`` (None: only measure it); returns the norm before, a scalar."""
    with_grad = [p for p in parameters if p.grad is not None]
    if not with_grad:
        return torch.zeros(())
    norm = torch.nn.utils.get_total_norm([p.grad for p in with_grad if p.grad is not None])
    norm = full(norm)
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(with_grad, limit, norm)
    return norm


def full(tensor: Tensor) -> Tensor:
    """The whole tensor of a sharded one; a collective call then."""
    # The copy is of the exact size; what is gathered from uneven shards is a view into padded storage.
    return tensor.full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor


class Ema:
    """Exponential moving average of the trained parameters, float32; what policies are written with.

    The decay rises as ``(1 + n) / (10 + n)`` with the number n of updates until it reaches ``decay``, so that a short
    run is not dominated by its random start.
    """

    def __init__(self, trained: Trained, decay: float):
        self.decay = decay
        self.values = {name: p.detach().float().clone() for name, p in trained.master.items()}

    @torch.no_grad()
    def update(self, trained: Trained, updates: int) -> None:
        """Take in the parameters after update number ``updates`` (from 1)."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        for name, value in self.values.items():
            value.lerp_(trained.master[name].detach(), 1 - decay)
