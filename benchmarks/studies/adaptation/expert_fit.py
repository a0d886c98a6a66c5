"""The upper bound: a token fitted on the scripted expert's actions on the very body, which no robot has.

Everything but the token is frozen. Several starts are fitted at once, and the one with the least action loss on frames
that it was not fitted on is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from selfalign_core.model import flow_matching as flow
from selfalign_core.model.gemma import PrefixCache
from selfalign_core.model.pi0 import ModelInputs
from selfalign_core.policy import Policy
from selfalign_core.sim import TARGET_NAMES, prompt_for

_VALIDATION_DRAWS = 4


@dataclass(frozen=True)
class ExpertFit:
    """``steps`` of Adam on ``batch`` random frames and prompts each; the rate falls to zero."""

    steps: int = 160
    batch: int = 32
    learning_rate: float = 0.05


@dataclass(frozen=True)
class Labelled:
    """Frames of one body with the expert's chunk for every prompt.

    ``images``: (n, cameras, H, W, 3) uint8 RGB. ``states``: (n, joints) float32. ``chunks``: (n, prompts, horizon,
    joints) float32, motor frame [rad]; prompts in the order of ``TARGET_NAMES``.
    """

    images: np.ndarray
    states: np.ndarray
    chunks: np.ndarray

    def __len__(self) -> int:
        return len(self.states)

    def select(self, rows: np.ndarray | slice) -> Labelled:
        return Labelled(self.images[rows], self.states[rows], self.chunks[rows])


def model_inputs(policy: Policy, frames: Labelled, targets: np.ndarray) -> ModelInputs:
    """The frames as a batch, frame i with the prompt of target number ``targets[i]``."""
    cameras = [camera for camera in policy.config.cameras if camera is not None]
    images = {camera: frames.images[:, i] for i, camera in enumerate(cameras)}
    return policy.codec.inputs(images, frames.states, [prompt_for(TARGET_NAMES[target]) for target in targets])


@dataclass(frozen=True)
class _Rows:
    """Every frame with every prompt; nothing here depends on the token."""

    prefix: PrefixCache
    state: Tensor
    chunks: Tensor

    def __len__(self) -> int:
        return len(self.state)

    def losses(self, policy: Policy, rows: Tensor, noise: Tensor, time: Tensor, tokens: Tensor) -> Tensor:
        """(S,) mean action loss of each of ``tokens`` (S, T, W) at the same rows, noise and times."""
        count, size = len(tokens), len(rows)
        rows, noise, time = rows.repeat(count), noise.repeat(count, 1, 1), time.repeat(count)
        found = policy.model.action_loss(
            self.prefix.select(rows),
            self.state[rows],
            self.chunks[rows],
            noise,
            time,
            token=tokens.repeat_interleave(size, 0),
        )
        return found[..., policy.dim_mask].mean((1, 2)).reshape(count, size).mean(1)


def _rows(policy: Policy, frames: Labelled) -> _Rows:
    every = np.repeat(np.arange(len(frames)), len(TARGET_NAMES))
    targets = np.tile(np.arange(len(TARGET_NAMES)), len(frames))
    with torch.no_grad():
        prefix = policy.model.prefix(model_inputs(policy, frames.select(every), targets))
    chunks = frames.chunks[every, targets, : policy.horizon]
    return _Rows(
        prefix,
        policy.codec.state_to_model(frames.states[every]),
        policy.codec.actions_to_model(chunks, frames.states[every]),
    )


def fit_token(
    policy: Policy, frames: Labelled, validation: Labelled, starts: Tensor, config: ExpertFit, *, seed: int
) -> tuple[Tensor, list[float]]:
    """The best fitted token (T, W) of ``starts`` (S, T, W), and the validation loss of each."""
    rows, generator = _rows(policy, frames), torch.Generator().manual_seed(seed)
    tokens = starts.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([tokens], lr=config.learning_rate)
    for step in range(config.steps):
        drawn = torch.randint(len(rows), (config.batch,), generator=generator)
        losses = rows.losses(policy, drawn, *_noise(rows, drawn, generator), tokens)
        (tokens.grad,) = torch.autograd.grad(losses.sum(), [tokens])
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * (1 - step / config.steps)
        optimiser.step()
    with torch.inference_mode():
        rows = _rows(policy, validation)
        drawn = torch.arange(len(rows)).repeat(_VALIDATION_DRAWS)
        scores = rows.losses(policy, drawn, *_noise(rows, drawn, generator), tokens)
    return tokens.detach()[int(scores.argmin())], scores.tolist()


def _noise(rows: _Rows, drawn: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    noise = torch.randn((len(drawn), *rows.chunks.shape[1:]), generator=generator)
    return noise, flow.sample_time(len(drawn), generator=generator)
