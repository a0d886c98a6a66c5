"""A training run that a study needs: what is there is not trained again, what stopped goes on. Knows no study."""

from __future__ import annotations

import shutil
from pathlib import Path

from selfalign_core.errors import ConfigError
from selfalign_core.training.config import TrainConfig
from selfalign_core.training.parallel import start_ranks
from selfalign_core.training.state import find_checkpoint, read_info
from selfalign_core.training.trainer import Trainer


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
