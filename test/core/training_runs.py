"""A tiny dataset of several bodies and a tiny model, for the tests of training. No test depends on the numbers.

The state (2 joints) is drawn into the image as brightness of its halves; a body moves by its own gain (with sign)
times the action, so only who knows the body can tell actions from images.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from selfalign_core.data.dataset_writer import DatasetWriter
from selfalign_core.training.config import TrainConfig
from selfalign_core.training.parallel import Ranks, end_process, start_ranks
from selfalign_core.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
GAINS = {"arm a": 1.0, "arm b": -1.0, "arm c": 0.5}
SIZE = 28

_STACK = {"width": 16, "depth": 2, "mlp_dim": 24, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
SMALL_MODEL = {
    "vision": {"width": 16, "depth": 1, "mlp_dim": 24, "num_heads": 2, "image_size": SIZE, "patch_size": 14},
    "text": {**_STACK, "depth": 3},
    "action_expert": _STACK,
    "alignment_expert": _STACK,
    "expert_layer_offset": 1,
    "action_dim": 3,
    "action_horizon": 4,
    "transition_horizon": 2,
    "feature_tokens_per_camera": 4,
}


def write_dataset(
    path: Path, *, bodies: int = 3, episodes: int = 4, length: int = 12, action_offset: float = 0.0
) -> Path:
    """``episodes`` per body; the last one of each body is play, without a prompt.

    With ``action_offset`` a body can be told by its actions alone: their mean is the offset times its gain.
    """
    rng = np.random.default_rng(0)
    with DatasetWriter(
        path,
        cameras=("front",),
        image_size=(SIZE, SIZE),
        state_dim=2,
        action_dim=2,
        dt_ns=50_000_000,
        delta_mask=(False, False),
        prompts=("reach the red cube", "reach the blue ball"),
        statistics_horizon=4,
    ) as writer:
        for body, gain in list(GAINS.items())[:bodies]:
            for episode in range(episodes):
                actions = (rng.uniform(-0.2, 0.2, (length, 2)) + action_offset * gain).astype(np.float32)
                states = rng.uniform(-0.2, 0.2, 2) + np.cumsum(gain * actions, axis=0) - gain * actions
                images = np.zeros((length, 1, SIZE, SIZE, 3), np.uint8)
                for side in range(2):
                    brightness = np.clip(127 + 120 * states[:, side], 0, 255)
                    half = slice(side * SIZE // 2, (side + 1) * SIZE // 2)
                    images[:, :, :, half] = brightness[:, None, None, None, None]
                prompt = ("reach the red cube", "reach the blue ball")[episode % 2]
                writer.add_episode(
                    states=states.astype(np.float32),
                    actions=actions,
                    stamps=np.arange(length, dtype=np.int64) * 50_000_000,
                    embodiment=body,
                    prompt=None if episode == episodes - 1 else prompt,
                    images=images,
                )
    return path


def values(output: Path, data: Path, **changes: Any) -> dict[str, Any]:
    """A configuration as YAML has it; ``changes`` are dotted keys with ``__`` for the dot."""
    base: dict[str, Any] = {
        "output": str(output),
        "data": {"path": str(data), "holdout": 0.1},
        "steps": 6,
        "batch_size": 8,
        "device": "cpu",
        "model": {"preset": "tiny", "changes": SMALL_MODEL},
        "optim": {"lr": 3e-3, "warmup_steps": 2},
        "log": {"every": 1, "gap_every": None, "eval_every": None, "tensorboard": False, "progress": False},
        "checkpoint": {"every": 100},
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        at = base
        for section in sections:
            at = at.setdefault(section, {})
        at[last] = {**at[last], **value} if isinstance(at.get(last), dict) and isinstance(value, dict) else value
    return base


def config(output: Path, data: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.from_dict(values(output, data, **changes))


def alone() -> Ranks:
    import torch

    return Ranks(0, 1, torch.device("cpu"), False)


def trainer(output: Path, data: Path, *, resume: bool | Path = False, **changes: Any) -> Trainer:
    return Trainer(config(output, data, **changes), alone(), resume=resume)


def train(output: Path, data: Path, *, resume: bool | Path = False, **changes: Any) -> Trainer:
    """Train in this process to the end."""
    made = trainer(output, data, resume=resume, **changes)
    made.run()
    return made


def write_config(path: Path, output: Path, data: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(values(output, data, **changes)))
    return path


def command(*arguments: str | Path, ranks: int = 0) -> list[str]:
    """The command line of training, under torchrun if ``ranks``."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    return [sys.executable, *launcher, "-m", "selfalign_core.train", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


if __name__ == "__main__":  # one training run after the other, begun or resumed, as a rank of one torchrun job
    with start_ranks("cpu") as ranks:
        for file in sys.argv[1:]:
            Trainer(TrainConfig.load(file), ranks, resume=True).run()
    end_process(0)
