"""Two stages before the joint training of a tiny policy, on labelled frames of the simulator: seeing, then reading.

    python -m selfalign_core.training.pretrain --output DIR

1. Vision: tower and projector learn where the targets and the arm's points are in the picture. Joint training freezes
   them, so image features are computed once per frame, and they are the dynamics task's targets.
2. Grounding: over frozen features, the language model learns where the object named by the prompt is, and to say so
   in each layer that an expert reads. Without this stage the prompt stays unread for a long time in joint training.

Writes a policy directory with an untrained action and alignment expert, for ``model.init`` of
:mod:`selfalign_core.train`. Knows neither bodies nor actions.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn
from tqdm import tqdm

from selfalign_core.command_line import command
from selfalign_core.data.sim_demos import REACH_JOINTS
from selfalign_core.data.sim_frames import POINTS, Frames, random_frames
from selfalign_core.errors import ConfigError, SelfAlignError
from selfalign_core.files import PartialDirectory
from selfalign_core.model.config import ModelConfig
from selfalign_core.model.pi0 import Pi0
from selfalign_core.policy.codec import pixels_to_model
from selfalign_core.policy.config import PolicyConfig
from selfalign_core.policy.policy import Policy
from selfalign_core.policy.tokenizer import PromptTokenizer, word_tokenizer
from selfalign_core.policy.untrained import TINY_WORDS
from selfalign_core.sim import TARGET_NAMES, prompt_for

HELD_OUT = 1000
"""Frames at the end that are scored and never trained on."""

_OFFSET_SCALE = 0.2  # of the picture's width, per unit of the head's output
_CELL_WEIGHT = 0.1  # of the cross entropy that names the patch, beside 5 times the distance
_PEAK_LR = 2e-3
_EVERY = 250  # steps between two log lines

Log = Callable[[dict[str, float | int | str]], None]


class PointHead(nn.Module):
    """Image tokens (B, patches, width) → points (B, P, 2) and the weight of each patch for each point (B, P, patches).

    A point is the weighted mean, over the patches, of the patch's centre plus an offset it names.
    """

    def __init__(self, width: int, points: int, side: int):
        super().__init__()
        self.weights = nn.Linear(width, points)
        self.offsets = nn.Linear(width, 2 * points)
        centre = (torch.arange(side) + 0.5) / side
        y, x = torch.meshgrid(centre, centre, indexing="ij")
        self.register_buffer("centres", torch.stack([x, y], -1).reshape(-1, 1, 2))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.weights(tokens).softmax(1)
        places = self.centres + _OFFSET_SCALE * self.offsets(tokens).unflatten(2, (-1, 2))
        return (weights[..., None] * places).sum(1), weights.transpose(1, 2)


def visible(points: Tensor) -> Tensor:
    """(..., 2) → (...) bool: inside the picture."""
    return ((points > 0) & (points < 1)).all(-1)


def _mean_where(values: Tensor, where: Tensor) -> Tensor:
    return (values * where).sum() / where.sum().clamp(min=1)


def train_vision(model: Pi0, frames: Frames, *, steps: int, batch_size: int, seed: int, log: Log) -> None:
    """Stage 1; logs the mean distance in pixels per point on the held-out frames."""
    vlm, vision = model.paligemma_with_expert, model.config.vision
    side = vision.image_size // vision.patch_size
    head = PointHead(model.config.text.width, len(POINTS), side)
    images, points = torch.from_numpy(frames.images), torch.from_numpy(frames.points).nan_to_num(-1.0)
    parameters = [
        *vlm.paligemma.model.vision_tower.parameters(),
        *vlm.paligemma.model.multi_modal_projector.parameters(),
        *head.parameters(),
    ]

    def loss_of(rows: Tensor) -> Tensor:
        wanted = points[rows]
        seen = visible(wanted)
        found, weights = head(vlm.embed_image(pixels_to_model(images[rows])))
        cell = (wanted.clamp(0, 0.999) * side).long()
        chosen = weights.gather(2, (cell[..., 1] * side + cell[..., 0])[..., None]).squeeze(-1)
        distance = _mean_where((found - wanted).abs().sum(-1), seen)
        return 5.0 * distance + _CELL_WEIGHT * _mean_where(-(chosen + 1e-6).log(), seen)

    def score() -> dict[str, float]:
        wanted = points[-HELD_OUT:]
        found = torch.cat([head(vlm.embed_image(pixels_to_model(part)))[0] for part in images[-HELD_OUT:].split(100)])
        away = (found - wanted).norm(dim=-1) * vision.image_size
        seen = visible(wanted)
        return {f"pixels_{name}": float(_mean_where(away[:, i], seen[:, i])) for i, name in enumerate(POINTS)}

    rows = _batches(len(images) - HELD_OUT, batch_size, seed)
    _optimise("vision", parameters, lambda: loss_of(next(rows)), score, steps, log)


def train_grounding(
    model: Pi0, frames: Frames, prompts: tuple[Tensor, Tensor], *, steps: int, batch_size: int, seed: int, log: Log
) -> None:
    """Stage 2, every prompt for each frame of a batch.

    The point is read from what an expert would get by looking at the prompt: the mean of the prompt tokens' attention
    values, in each layer that the experts read.

    Args:
        prompts: ids and masks, each (targets, max_token_len), in the order of ``TARGET_NAMES``.
    """
    vlm, config = model.paligemma_with_expert, model.config
    first, last = config.expert_layer_offset, config.expert_layer_offset + config.action_expert.depth
    heads = nn.ModuleList(nn.Linear(config.text.num_kv_heads * config.text.head_dim, 2) for _ in range(first, last))
    images = torch.from_numpy(frames.images)
    points = torch.from_numpy(frames.points[:, : len(TARGET_NAMES)]).nan_to_num(-1.0)
    with torch.no_grad():
        features = torch.cat([vlm.embed_image(pixels_to_model(part)).half() for part in images.split(250)])
    parameters = [*vlm.language_model.parameters(), *heads.parameters()]

    def locate(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Points found per layer (layers, prompts * rows, 2) and wanted (prompts * rows, 2)."""
        tokens, masks = (part.repeat_interleave(len(rows), 0) for part in prompts)
        seen = features[rows].float().repeat(len(TARGET_NAMES), 1, 1)
        present = torch.ones(len(seen), dtype=torch.bool)
        prefix, _ = vlm.run_prefix(*vlm.embed_prefix([seen], [present], tokens, masks))
        share = (masks / masks.sum(1, keepdim=True))[:, None, :, None]
        found = [
            head((layer.values[:, :, prefix.image_length :] * share).sum(2).flatten(1))
            for head, layer in zip(heads, prefix.layers[first:last], strict=True)
        ]
        return torch.stack(found), points[rows].transpose(0, 1).flatten(0, 1)

    def loss_of(rows: Tensor) -> Tensor:
        found, wanted = locate(rows)
        return _mean_where((found - wanted).abs().sum(-1).mean(0), visible(wanted))

    def score() -> dict[str, float]:
        found, wanted = locate(torch.arange(len(images) - HELD_OUT, len(images) - HELD_OUT + 250))
        away = (found - wanted).norm(dim=-1) * config.vision.image_size
        return {f"pixels_layer_{i}": float(_mean_where(a, visible(wanted))) for i, a in enumerate(away, first)}

    rows = _batches(len(images) - HELD_OUT, batch_size, seed)
    _optimise("grounding", parameters, lambda: loss_of(next(rows)), score, steps, log)


def _batches(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(0, count, (batch_size,), generator=generator)


def _optimise(
    stage: str,
    parameters: Sequence[nn.Parameter],
    loss: Callable[[], Tensor],
    score: Callable[[], dict[str, float]],
    steps: int,
    log: Log,
) -> None:
    """AdamW with one warm-up and cosine cycle."""
    optimizer = torch.optim.AdamW(parameters, lr=_PEAK_LR, weight_decay=1e-4, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK_LR, steps, pct_start=min(0.1, 250 / steps))
    begin = time.perf_counter()
    for step in tqdm(range(1, steps + 1), desc=stage, mininterval=5.0):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if not math.isfinite(value.item()):
            raise SelfAlignError(f"{stage}, step {step}: found loss {value.item()}, expected a finite number")
        if step % _EVERY == 0 or step == steps:
            with torch.no_grad():
                scores = {name: round(pixels, 3) for name, pixels in score().items()}
            seconds = round(time.perf_counter() - begin, 1)
            log({"stage": stage, "step": step, "loss": round(value.item(), 4), **scores, "seconds": seconds})


def pretrain(
    *,
    output: Annotated[Path, "policy directory to make"],
    frames: int = 30_000,
    vision_steps: int = 6000,
    grounding_steps: int = 2000,
    seed: int = 0,
    jobs: Annotated[int, "processes that draw frames"] = 1,
) -> None:
    """Pre-train the vision tower and language model of a tiny policy.

    Runs both stages and writes the policy directory ``output`` with ``pretrain.jsonl`` in it.

    Raises:
        DatasetError: ``output`` exists. ConfigError: too few frames to hold some out.
    """
    if frames < 2 * HELD_OUT:
        raise ConfigError(f"frames: found {frames}, expected at least {2 * HELD_OUT}")
    directory = PartialDirectory(output)
    directory.open()
    try:
        data = random_frames(frames, seed, jobs=jobs, progress=True)
        torch.manual_seed(seed)
        model = Pi0(ModelConfig.preset("tiny", feature_tokens_per_camera=16))
        tokenizer = word_tokenizer(TINY_WORDS)
        encode = PromptTokenizer(tokenizer, max_len=model.config.max_token_len, pi05=False)
        encoded = [encode(prompt_for(name)) for name in TARGET_NAMES]
        ids, masks = (torch.stack([torch.from_numpy(item[i]) for item in encoded]) for i in range(2))
        with open(directory.path / "pretrain.jsonl", "w", encoding="utf-8") as file:

            def log(values: dict[str, float | int | str]) -> None:
                file.write(json.dumps(values) + "\n")
                file.flush()

            train_vision(model, data, steps=vision_steps, batch_size=64, seed=seed, log=log)
            train_grounding(model, data, (ids, masks), steps=grounding_steps, batch_size=24, seed=seed, log=log)
        joints = len(REACH_JOINTS)
        config = PolicyConfig(model=model.config, cameras=("overhead",), state_dim=joints, action_dim=joints)
        Policy(model, config, tokenizer, {}, dt=0.05).save(directory.path)
        directory.publish()
    finally:
        directory.remove()  # nothing is left to remove once it has been published


main = command("selfalign_core.training.pretrain", pretrain)

if __name__ == "__main__":
    sys.exit(main())
