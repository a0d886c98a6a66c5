"""What the study measures: bodies in families, and every number that decides a result. Knows no policy."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.studies.adaptation.expert_fit import ExpertFit
from selfalign_core.alignment.config import AlignConfig
from selfalign_core.data.sim_demos import REACH_JOINTS
from selfalign_core.errors import ConfigError
from selfalign_core.robot.contract import RobotContract
from selfalign_core.sim import FAMILIES as EVERYTHING
from selfalign_core.sim import BodyConfig, BodyRanges

FAMILIES: dict[str, tuple[str, ...]] = {
    "actuator": ("sign", "gain"),
    "offset": ("offset",),
    "link": ("link",),
    "dynamics": ("payload", "damping", "strength"),
    "camera": ("camera",),
    "appearance": ("mirror", "colour", "light"),
    "all": EVERYTHING,
}
"""What strays from nominal on the bodies of a family; ``all`` is what training drew from."""

RANGES = {"inside": 1.0, "beyond": 1.5}
"""Width of the ranges that bodies are drawn from, as a multiple of training's."""

PARTS = ("arms", "curves", "shifts", "right")
COUNTS = (1, 2, 4, 8, 16, 32, 64)
"""Transitions along a curve."""

_CONTRACT = Path(__file__).parents[3] / "config" / "contracts" / "sim_arm.yaml"


@dataclass(frozen=True)
class UnseenBody:
    """Body number ``index`` of a family and range; equal indices share what they have in common."""

    family: str
    range: str
    index: int
    config: BodyConfig

    @property
    def name(self) -> str:
        return f"{self.family}-{self.range}-{self.index:02d}"


@dataclass(frozen=True)
class Settings:
    """``bodies`` per family and range, ``episodes`` in closed loop per body and arm, ``motion_s`` of calibration
    within ``motion_amplitude`` [rad] of the start pose.

    ``seed`` of the bodies and all that is drawn on them; training's must be another one. ``frames``: labelled ones
    per body on which the action error is measured.
    """

    seed: int = 1000
    bodies: int = 16
    episodes: int = 4
    motion_s: float = 20.0
    motion_amplitude: float = 0.7
    frames: int = 48
    align: AlignConfig = field(default_factory=lambda: AlignConfig().without_budgets())
    expert_fit: ExpertFit = field(default_factory=ExpertFit)

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("bodies", 1), ("episodes", 1), ("frames", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name}: found {getattr(self, name)}, expected at least {least}")

    def of(self, *names: str) -> dict[str, Any]:
        """Those of the settings as plain data."""
        return {name: _plain(getattr(self, name)) for name in names}

    def unseen(self, family: str, range_: str, count: int | None = None) -> list[UnseenBody]:
        """The bodies of one family and range."""
        return [
            UnseenBody(family, range_, index, draw_body(self.seed, family, range_, index))
            for index in range(self.bodies if count is None else count)
        ]


def draw_body(seed: int, family: str, range_: str, index: int) -> BodyConfig:
    """Body ``index``; what two families or ranges have in common is drawn alike."""
    return BodyConfig.sample(
        np.random.default_rng([seed, index]),
        families=FAMILIES[family],
        ranges=BodyRanges().scaled(RANGES[range_]),
        active_joints=REACH_JOINTS,
        name=f"unseen_{seed}_{index}",
    )


def contract_for(joints: tuple[str, ...]) -> RobotContract:
    """The simulated arm's contract for some of its joints."""
    contract = RobotContract.from_yaml(_CONTRACT)
    by_name = {joint.name: joint for joint in contract.joints}
    return dataclasses.replace(contract, joints=tuple(by_name[name] for name in joints))


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if isinstance(value, AlignConfig | ExpertFit) else value
