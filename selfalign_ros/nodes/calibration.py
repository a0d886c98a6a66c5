"""The calibration motion on its way through the policy node: handed out in pieces that look like action chunks.

In pieces, so that a robot whose policy node dies stops within two of them instead of finishing the motion alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from selfalign_core.robot.contract import RobotContract
from selfalign_core.robot.types import ActionChunk
from selfalign_ros.bridge.conversions import NS_PER_S


@dataclass(frozen=True)
class Calibration:
    """``positions`` (steps, joints): row i is in force from ``stamp_ns + i * dt`` on; the first ``approach_steps`` of
    them lead to where the motion is to take place.
    """

    contract: RobotContract
    positions: np.ndarray
    approach_steps: int
    stamp_ns: int

    @classmethod
    def plan(
        cls,
        contract: RobotContract,
        start: np.ndarray,
        now_ns: int,
        *,
        around: Literal["here", "home"],
        duration_s: float,
        amplitude: float,
        seed: int,
    ) -> Calibration:
        """The motion from ``start`` (joints,), beginning now, around it or the robot's home.

        Raises:
            InputError: one of the two is outside the limits.
        """
        from selfalign_core.robot.calibration import CalibrationConfig, calibration_motion

        config = CalibrationConfig(duration_s=duration_s, amplitude=amplitude)
        middle = contract.home if around == "home" else start
        positions = calibration_motion(contract, start, config, around=middle, seed=seed)
        return cls(contract, positions, len(positions) - config.steps(contract.rate_hz), now_ns)

    def shortened(self, now_ns: int) -> Calibration | None:
        """What is left of it to be gone through if it is to end now: the way to where it is to take place."""
        left = self.stamp_ns + self.approach_steps * self.contract.dt_ns > now_ns
        return replace(self, positions=self.positions[: self.approach_steps]) if left else None

    @property
    def duration_s(self) -> float:
        return len(self.positions) * self.contract.dt_ns / NS_PER_S

    @property
    def end_ns(self) -> int:
        return self.stamp_ns + len(self.positions) * self.contract.dt_ns

    def piece(self, now_ns: int) -> ActionChunk | None:
        """What comes next, two inferences' worth of it, after the end at rest; None when the motion is over."""
        if now_ns >= self.end_ns:
            return None
        first = (now_ns - self.stamp_ns) // self.contract.dt_ns
        rows = np.arange(first, first + 2 * self.contract.replan_steps)
        return ActionChunk(
            actions=self.positions[np.minimum(rows, len(self.positions) - 1)],
            dt=self.contract.dt_ns / NS_PER_S,
            stamp_ns=self.stamp_ns + first * self.contract.dt_ns,
            e_token_version=0,
            inference_s=0.0,
        )
