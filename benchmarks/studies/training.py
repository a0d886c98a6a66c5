"""A training run that a study needs: what is there is not trained again, what stopped goes on. Knows no study."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from selfalign_core.errors import ConfigError
from selfalign_core.training.config import TrainConfig
from selfalign_core.training.parallel import start_ranks
from selfalign_core.training.state import find_checkpoint, read_info
from selfalign_core.training.trainer import Trainer


def configured(
    config: str, output: Path, data: Path, overrides: Sequence[str] = (), *, steps: int | None = None
) -> TrainConfig:
    """The training configuration ``config`` for a run of a study: other data, another length with a shorter warm-up."""
    words = [*overrides, f"output={json.dumps(str(output))}", f"data.path={json.dumps(str(data))}"]
    if steps is not None:
        warm_up = min(TrainConfig.load(config).optim.warmup_steps, steps // 10)
        words += [f"steps={steps}", f"optim.warmup_steps={warm_up}"]
    return TrainConfig.load(config, [*words, "log.progress=false", "log.tensorboard=false", "checkpoint.keep=1"])


def trained(config: TrainConfig) -> Path:
    """The policy directory of ``config``'s run at its last step.

    Raises:
        ConfigError: what is there was trained with another configuration.
    """
    output = Path(config.output)
    found = find_checkpoint(output)
    if found is not None:
        info = read_info(found)
        if info["config"] != config.to_dict():
            raise ConfigError(f"{found}: found a run with another configuration, expected to find this one or none")
        if info["step"] == config.steps:
            return found / "policy"
    with start_ranks(config.device) as ranks:
        policy = Trainer(config, ranks, resume=True).run()
    shutil.rmtree(output / "features", ignore_errors=True)
    return policy
