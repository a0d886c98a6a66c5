"""What SelfAlign's own checkpoint says beside its weights: model sizes, cameras, normalisation, action space.

Imports neither torch nor ROS.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from selfalign_core.errors import CheckpointError, ConfigError
from selfalign_core.model.config import ModelConfig
from selfalign_core.policy.transforms import NormMode
from selfalign_core.records import Count, Natural, Only, Range, Record, load, plain, read
from selfalign_core.robot.contract import RobotContract

FORMAT = "selfalign-policy-1"


@dataclass(frozen=True)
class PolicyConfig(Record):
    """Everything around the model that turns an observation into actions.

    ``cameras``: camera name per image slot of the model; None marks a slot that is fed black and masked out.
    ``delta_mask``: per action dimension, True if the model predicts it relative to the state.
    ``state_dim``, ``action_dim``: the robot's own, before padding to the model's. ``num_steps``: Euler steps.
    ``padding_masked``: padded action dimensions were left out of the training loss (openpi trains them too).
    ``joints``: names of the joints of state and actions, in their order; empty if the data did not say.
    ``lerobot_epsilon``: of a policy whose numbers were normalised by LeRobot's rule (``transforms.Normalizer``).
    ``bank_keys``: embodiment of each row of the checkpoint's E-Token bank (``tensors.E_TOKEN_BANK``, which says what
    is derived from it); rows beyond them are free.
    ``rtc_max_delay``: how many of a chunk's first actions the model learned to be given clean (training-time real-time
    chunking, arXiv 2512.05964); 0 if it was not trained for that.
    """

    model: ModelConfig
    cameras: Annotated[tuple[str | None, ...], Only(any, "at least one camera")]
    state_dim: int
    action_dim: int
    state_norm: NormMode = "identity"
    action_norm: NormMode = "identity"
    lerobot_epsilon: Annotated[float, Range(above=0, below=1)] | None = None
    delta_mask: tuple[bool, ...] | None = None
    num_steps: Count = 10
    embodiment: str = ""
    padding_masked: bool = False
    bank_keys: tuple[str, ...] = ()
    joints: tuple[str, ...] = ()
    rtc_max_delay: Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, dim in (("state_dim", self.state_dim), ("action_dim", self.action_dim)):
            most = self.model.action_dim
            self.expect(1 <= dim <= most, name, f"1..{most} (the model's action_dim)")
        self.expect(
            not self.joints or len(self.joints) == self.state_dim == self.action_dim,
            "joints",
            f"as many as state_dim={self.state_dim} and action_dim={self.action_dim}, or none",
            f"{len(self.joints)} names",
        )
        mask = self.delta_mask or ()
        self.expect(
            self.delta_mask is None or len(mask) == self.action_dim,
            "delta_mask",
            f"action_dim={self.action_dim}",
            f"{len(mask)} values",
        )
        self.expect(not any(mask[self.state_dim :]), "delta_mask", f"True only below state_dim={self.state_dim}")
        horizon = self.model.action_horizon
        self.expect(self.rtc_max_delay < horizon, "rtc_max_delay", f"less than the model's action_horizon={horizon}")

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **plain(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PolicyConfig:
        """Strict inverse of :meth:`to_dict`; :class:`ConfigError` names the key."""
        return read(cls, values, formats=(FORMAT,))

    @classmethod
    def load(cls, checkpoint: str | Path) -> PolicyConfig:
        """Read ``config.json`` of a SelfAlign checkpoint directory."""
        file = Path(checkpoint) / "config.json"
        return load(cls, file, "a checkpoint directory with config.json", error=CheckpointError, formats=(FORMAT,))

    def check_contract(self, contract: RobotContract) -> None:
        """Raise :class:`ConfigError` if the robot lacks what the checkpoint reads or commands."""
        names = contract.camera_names
        missing = [camera for camera in self.cameras if camera is not None and camera not in names]
        if missing:
            raise ConfigError(f"contract: found cameras {names}, expected {missing} too (the checkpoint reads them)")
        for name, dim in (("state_dim", self.state_dim), ("action_dim", self.action_dim)):
            if dim != len(contract.joints):
                raise ConfigError(
                    f"contract: found {len(contract.joints)} joints, expected the checkpoint's {name}={dim}"
                )
        if self.joints and self.joints != contract.joint_names:
            raise ConfigError(
                f"contract: found joints {', '.join(contract.joint_names)}; expected those that the checkpoint was "
                f"trained on, in their order: {', '.join(self.joints)} (joints in its config.json)"
            )
