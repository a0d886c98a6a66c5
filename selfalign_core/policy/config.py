"""What a checkpoint says about itself besides its weights: model sizes, cameras, normalisation, action space.

Imports neither torch nor ROS, so a node that only needs image size and horizon starts at once.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfalign_core.errors import CheckpointError, ConfigError
from selfalign_core.model.config import ModelConfig, build_dataclass
from selfalign_core.policy.transforms import NormMode

FORMAT = "selfalign-policy-1"


@dataclass(frozen=True)
class PolicyConfig:
    """Everything around the model that turns an observation into actions.

    ``cameras``: camera name per image slot of the model; None marks a slot that is fed black and masked out.
    ``delta_mask``: per action dimension, True if the model predicts it relative to the state.
    ``state_dim``, ``action_dim``: the robot's own, before padding to the model's. ``num_steps``: Euler steps.
    ``padding_masked``: padded action dimensions were left out of the training loss (openpi trains them too).
    ``joints``: names of the joints of state and actions, in their order; empty if the data did not say.
    ``lerobot_epsilon``: of a policy whose numbers were normalised by LeRobot's rule (``transforms.Normalizer``).
    ``bank_keys``: embodiment of each row of the checkpoint's E-Token bank (``checkpoint.E_TOKEN_BANK``, which says what
    is derived from it); rows beyond them are free.
    ``rtc_max_delay``: how many of a chunk's first actions the model learned to be given clean (training-time real-time
    chunking, arXiv 2512.05964); 0 if it was not trained for that.
    """

    model: ModelConfig
    cameras: tuple[str | None, ...]
    state_dim: int
    action_dim: int
    state_norm: NormMode = "identity"
    action_norm: NormMode = "identity"
    lerobot_epsilon: float | None = None
    delta_mask: tuple[bool, ...] | None = None
    num_steps: int = 10
    embodiment: str = ""
    padding_masked: bool = False
    bank_keys: tuple[str, ...] = ()
    joints: tuple[str, ...] = ()
    rtc_max_delay: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "cameras", tuple(self.cameras))
        object.__setattr__(self, "bank_keys", tuple(self.bank_keys))
        object.__setattr__(self, "joints", tuple(self.joints))
        if self.joints and not len(self.joints) == self.state_dim == self.action_dim:
            raise ConfigError(
                f"PolicyConfig.joints: found {len(self.joints)} names, expected as many as state_dim="
                f"{self.state_dim} and action_dim={self.action_dim}, or none"
            )
        if self.delta_mask is not None:
            object.__setattr__(self, "delta_mask", tuple(bool(v) for v in self.delta_mask))
            if len(self.delta_mask) != self.action_dim:
                raise ConfigError(
                    f"PolicyConfig.delta_mask: found {len(self.delta_mask)} values, "
                    f"expected action_dim={self.action_dim}"
                )
        if not [camera for camera in self.cameras if camera is not None]:
            raise ConfigError(f"PolicyConfig.cameras: found {self.cameras}, expected at least one camera")
        for name in ("state_dim", "action_dim"):
            value = getattr(self, name)
            if not 1 <= value <= self.model.action_dim:
                raise ConfigError(
                    f"PolicyConfig.{name}: found {value}, expected 1..{self.model.action_dim} (the model's action_dim)"
                )
        if self.lerobot_epsilon is not None and not 0 < self.lerobot_epsilon < 1:
            raise ConfigError(f"PolicyConfig.lerobot_epsilon: found {self.lerobot_epsilon}, expected 0 < value < 1")
        if self.num_steps < 1:
            raise ConfigError(f"PolicyConfig.num_steps: found {self.num_steps}, expected >= 1")
        if not 0 <= self.rtc_max_delay < self.model.action_horizon:
            raise ConfigError(
                f"PolicyConfig.rtc_max_delay: found {self.rtc_max_delay}, expected >= 0 and less than the model's "
                f"action_horizon={self.model.action_horizon}"
            )
        if any((self.delta_mask or ())[self.state_dim :]):
            raise ConfigError(
                f"PolicyConfig.delta_mask: found {self.delta_mask}, expected True only below state_dim={self.state_dim}"
            )

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PolicyConfig:
        values = dict(values)
        found = values.pop("format", None)
        if found != FORMAT:
            raise ConfigError(f"policy config: found format {found!r}, expected {FORMAT!r}")
        values["model"] = ModelConfig.from_dict(values.get("model", {}))
        return build_dataclass(cls, values, "policy")

    @classmethod
    def load(cls, checkpoint: str | Path) -> PolicyConfig:
        """Read ``config.json`` of a SelfAlign checkpoint directory."""
        file = Path(checkpoint) / "config.json"
        if not file.is_file():
            raise CheckpointError(f"{file}: found no such file, expected a checkpoint directory with config.json")
        try:
            return cls.from_dict(read_json(file))
        except ConfigError as error:
            raise CheckpointError(f"{file}: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``."""
    try:
        values = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file}: found invalid JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: found {type(values).__name__}, expected a JSON object")
    return values


def is_foreign(checkpoint: str | Path) -> bool:
    """True if a checkpoint directory was not written by SelfAlign (openpi's, LeRobot's)."""
    file = Path(checkpoint) / "config.json"
    return not file.is_file() or "format" not in read_json(file)


def is_untrained(checkpoint: str) -> bool:
    """True for the names of the built-in tiny model with random weights."""
    return checkpoint in ("", "tiny")


def model_config_of(checkpoint: str) -> ModelConfig:
    """The model configuration behind a ``checkpoint`` parameter, without loading weights."""
    if is_untrained(checkpoint):
        return ModelConfig.preset("tiny")
    path = Path(checkpoint)
    if not path.is_dir():
        raise CheckpointError(f"checkpoint: found no directory {path}, expected one, or '' for the tiny model")
    if is_foreign(path):
        from selfalign_core.policy.foreign import read_foreign  # reads tensors, so it needs torch

        return read_foreign(path).config.model
    return PolicyConfig.load(path).model


def image_size_of(checkpoint: str) -> tuple[int, int]:
    """(H, W) in pixels of the images the model reads."""
    return model_config_of(checkpoint).image_size


def transition_horizon_of(checkpoint: str) -> int:
    """Executed actions per transition."""
    return model_config_of(checkpoint).transition_horizon
