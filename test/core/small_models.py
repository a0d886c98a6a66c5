"""Small models and random inputs for the tests of the core. No test depends on the numbers chosen here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfalign_core.model.config import GemmaSize, ModelConfig, VisionSize
from selfalign_core.model.pi0 import AlignmentNoise, ModelInputs, Pi0, Transitions
from selfalign_core.policy import Policy
from selfalign_core.policy.config import PolicyConfig
from selfalign_core.policy.tokenizer import word_tokenizer
from selfalign_core.robot.types import Observation, TransitionBatch

WORDS = ("pick", "up", "the", "red", "cube")


def small_config(pi05: bool = False, *, expert_depth: int = 2, **changes: Any) -> ModelConfig:
    """Two cameras' worth of 28-pixel images in four patches each, stacks of width 24 / 16, an alignment expert."""
    expert = GemmaSize(width=16, depth=expert_depth, mlp_dim=24, num_heads=2, num_kv_heads=1, head_dim=8)
    values: dict[str, Any] = {
        "pi05": pi05,
        "vision": VisionSize(width=16, depth=1, mlp_dim=24, num_heads=2, image_size=28, patch_size=14),
        "text": GemmaSize(width=24, depth=max(2, expert_depth), mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=8),
        "action_expert": expert,
        "alignment_expert": expert,
        "vocab_size": 32,
        "max_token_len": 6,
        "action_dim": 5,
        "action_horizon": 4,
        "transition_horizon": 3,
        "feature_tokens_per_camera": 2,
        "peft_init": "normal",
    }
    return ModelConfig(**{**values, **changes})


def randomise(model: Pi0, seed: int) -> Pi0:
    """Every parameter and buffer random and of a size that shows: norms, biases and adaptive norms are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            value = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim > 1 and "embed" not in name and "peft" not in name:
                value *= 1.2 / tensor[0].numel() ** 0.5
            elif tensor.ndim == 1:
                value *= 0.3
            tensor.copy_(value.abs() + 0.5 if name == "next_obs_std" else value)
    return model.eval()


def small_model(pi05: bool = False, *, seed: int = 0, **changes: Any) -> Pi0:
    return randomise(Pi0(small_config(pi05, **changes)), seed)


def random_inputs(config: ModelConfig, *, batch: int = 2, cameras: int = 2, seed: int = 1) -> ModelInputs:
    """Random images and prompts; one camera of the last sample is absent and the prompts are padded."""
    generator = torch.Generator().manual_seed(seed)
    length = config.max_token_len
    masks = [torch.ones(batch, dtype=torch.bool) for _ in range(cameras)]
    if cameras > 1:
        masks[-1][-1] = False
    valid = torch.tensor([max(1, length - 1 - 2 * row) for row in range(batch)])
    return ModelInputs(
        images=[torch.rand(batch, 3, *config.image_size, generator=generator) * 2 - 1 for _ in range(cameras)],
        image_masks=masks,
        tokens=torch.randint(0, config.vocab_size, (batch, length), generator=generator),
        token_masks=torch.arange(length)[None] < valid[:, None],
        state=torch.randn(batch, config.action_dim, generator=generator),
    )


def random_actions(config: ModelConfig, *, batch: int = 2, seed: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Clean actions and noise (batch, horizon, action_dim), and times (batch,)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, config.action_horizon, config.action_dim)
    return (
        torch.randn(shape, generator=generator),
        torch.randn(shape, generator=generator),
        torch.rand(batch, generator=generator) * 0.9 + 0.05,
    )


def random_transitions(
    config: ModelConfig, *, batch: int = 2, cameras: int = 2, actions: int | None = None, seed: int = 3
) -> tuple[Transitions, AlignmentNoise]:
    """Transitions without masks, and noise for them."""
    generator = torch.Generator().manual_seed(seed)
    steps, tokens = actions or config.transition_horizon, cameras * config.feature_tokens_per_camera

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    state, executed = (batch, config.action_dim), (batch, steps, config.action_dim)
    features = (batch, tokens, config.text.width)
    return (
        Transitions(normal(*state), normal(*executed), normal(*features)),
        AlignmentNoise(normal(*state), normal(*features), normal(*executed), torch.rand(batch, generator=generator)),
    )


def small_policy(
    pi05: bool = False, *, seed: int = 0, state_dim: int = 3, words: tuple[str, ...] = WORDS, **changes: Any
) -> Policy:
    """A policy around :func:`small_model` with cameras ``front`` and ``wrist`` and no normalisation."""
    numbers = [str(n) for n in range(-1, 256)] + [f"{n};\nAction:" for n in range(-1, 256)]
    pieces = [f"{w}," for w in words] + ["Task:", "State:", *numbers]
    vocabulary = word_tokenizer([*words, *(pieces if pi05 else [])])
    sizes = {"vocab_size": vocabulary.get_vocab_size(), "max_token_len": 16 if pi05 else 6}
    model = small_model(pi05, seed=seed, **{**sizes, **changes})
    config = PolicyConfig(
        model=model.config,
        cameras=("front", "wrist"),
        state_dim=state_dim,
        action_dim=state_dim,
        num_steps=3,
        embodiment="test arm",
    )
    return Policy(model, config, vocabulary, {}, dt=0.05)


def random_observation(policy: Policy, *, seed: int = 0, stamp_ns: int = 5) -> Observation:
    rng = np.random.default_rng(seed)
    images = {c: rng.integers(0, 256, (*policy.image_size, 3)).astype(np.uint8) for c in policy.config.cameras if c}
    return Observation(images, rng.uniform(-1, 1, policy.state_dim).astype(np.float32), "pick up", stamp_ns)


def random_batch(policy: Policy, size: int, *, seed: int = 0) -> TransitionBatch:
    """``size`` transitions over ``size + 1`` frames of noise."""
    rng = np.random.default_rng(seed)
    cameras = tuple(c for c in policy.config.cameras if c)
    frames = rng.integers(0, 256, (size + 1, len(cameras), *policy.image_size, 3)).astype(np.uint8)
    return TransitionBatch(
        cameras=cameras,
        frames=frames,
        frame_states=rng.normal(size=(size + 1, policy.state_dim)).astype(np.float32),
        frame_stamps=np.arange(size + 1, dtype=np.int64) * 50_000_000,
        obs_index=np.arange(size, dtype=np.int64),
        next_index=np.arange(1, size + 1, dtype=np.int64),
        actions=rng.normal(size=(size, policy.transition_horizon, policy.action_dim)).astype(np.float32),
    )


# ------------------------------------------------------------------------------------------------ who depends on whom


@contextmanager
def added_to(module: torch.nn.Module, delta: Tensor) -> Iterator[None]:
    """While open, ``delta`` is added to what ``module`` returns."""
    hook = module.register_forward_hook(lambda _module, _args, output: output + delta)
    try:
        yield
    finally:
        hook.remove()


def jacobians(outputs: Tensor, sources: dict[str, Tensor]) -> dict[str, Tensor]:
    """Per source (outputs, source) all derivatives, one backward pass per output; zero where there is no path."""
    rows: dict[str, list[Tensor]] = {name: [] for name in sources}
    for value in outputs.flatten():
        gradients = torch.autograd.grad(value, list(sources.values()), retain_graph=True, allow_unused=True)
        for (name, source), row in zip(sources.items(), gradients, strict=True):
            rows[name].append(torch.zeros(source.numel()) if row is None else row.flatten())
    return {name: torch.stack(values) for name, values in rows.items()}


def jacobian(outputs: Tensor, source: Tensor) -> Tensor:
    """(outputs, source) all derivatives."""
    return jacobians(outputs, {"source": source})["source"]
