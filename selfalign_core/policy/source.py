"""What a checkpoint is and what its files say, before any weight is read: SelfAlign's own, openpi's or LeRobot's.

The one place that tells them apart; ``foreign`` knows how the others write things down. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from selfalign_core.errors import CheckpointError, ConfigError
from selfalign_core.model.config import ModelConfig
from selfalign_core.policy.config import PolicyConfig
from selfalign_core.policy.foreign import fit_to_robot, read_foreign
from selfalign_core.policy.statistics_files import load_norm_stats
from selfalign_core.policy.transforms import NormStats
from selfalign_core.policy.untrained import is_untrained
from selfalign_core.records import load_document
from selfalign_core.robot.contract import RobotContract


@dataclass(frozen=True)
class Source:
    """A checkpoint directory: its configuration and statistics; ``foreign``: SelfAlign did not write it."""

    path: Path
    config: PolicyConfig
    stats: dict[str, NormStats]
    foreign: bool

    @classmethod
    def read(cls, path: str | Path, **options: Any) -> Source:
        """Read the files of a directory.

        Args:
            options: of :func:`~selfalign_core.policy.foreign.read_foreign`, where SelfAlign did not write it.

        Raises:
            CheckpointError: naming the file and what it lacks. ConfigError: options that would not be read.
        """
        path = Path(path)
        if is_foreign(path):
            return cls(path, *read_foreign(path, **options), foreign=True)
        if options:
            raise ConfigError(
                f"{path}: found option(s) {sorted(options)}, expected none (they describe openpi's and LeRobot's "
                "directories; here the configuration says everything)"
            )
        config = PolicyConfig.load(path)
        normalised = {config.state_norm, config.action_norm} != {"identity"}
        return cls(path, config, load_norm_stats(path / "norm_stats.json") if normalised else {}, foreign=False)

    def fit(self, contract: RobotContract) -> Source:
        """The same for the robot of ``contract``: a foreign one has cameras and joints matched to it.

        Raises:
            ConfigError: how they do not fit.
        """
        if not self.foreign:
            self.config.check_contract(contract)
            return self
        config = replace(self.config, embodiment=contract.embodiment)
        config, stats = fit_to_robot(config, self.stats, len(contract.joints), contract.camera_names)
        return replace(self, config=config, stats=stats)


def is_foreign(checkpoint: str | Path) -> bool:
    """True if a checkpoint directory was not written by SelfAlign (openpi's, LeRobot's)."""
    file = Path(checkpoint) / "config.json"
    if not file.is_file():
        return True
    values = load_document(file, "a JSON object", error=CheckpointError)
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: found {type(values).__name__}, expected a JSON object")
    return "format" not in values


def directory_of(checkpoint: str) -> Path:
    """The directory that a ``checkpoint`` parameter names; :class:`CheckpointError` if there is none."""
    path = Path(checkpoint)
    if not path.is_dir():
        raise CheckpointError(f"checkpoint: found no directory {path}, expected one, or '' for the tiny model")
    return path


def model_config_of(checkpoint: str) -> ModelConfig:
    """The model configuration behind a ``checkpoint`` parameter, without loading weights."""
    if is_untrained(checkpoint):
        return ModelConfig.preset("tiny")
    path = directory_of(checkpoint)
    return (Source.read(path).config if is_foreign(path) else PolicyConfig.load(path)).model


def image_size_of(checkpoint: str) -> tuple[int, int]:
    """(H, W) in pixels of the images the model reads."""
    return model_config_of(checkpoint).image_size


def transition_horizon_of(checkpoint: str) -> int:
    """Executed actions per transition."""
    return model_config_of(checkpoint).transition_horizon
