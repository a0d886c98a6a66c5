"""A robot that works without a pause: one target after another, the aligner beside it, its body changing on the way.

With ``calibration`` it moves as the aligner node has it moved (``auto_calibrate``), else by its work alone.

The task is that of the simulator node: a target that was reached, or not within 8 s, is followed by another one.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.studies.adaptation.lab import DT_NS, AlignerLoop, cameras_of, own_token, see
from benchmarks.studies.adaptation.settings import contract_for
from selfalign_core.alignment import SelfAligner, StageReport
from selfalign_core.alignment.motion_wanted import MotionWanted
from selfalign_core.policy import Policy
from selfalign_core.robot.calibration import CalibrationConfig, calibration_motion
from selfalign_core.robot.types import Observation
from selfalign_core.sim import JOINTS, ArmSim, BodyConfig
from selfalign_core.study.rollout import CONTROL_HZ

_REPLAN_STEPS = 8
_TARGET_STEPS = round(8 * CONTROL_HZ)
_NEAR_M, _NEAR_STEPS = 0.03, 5
_LOG_STEPS = 5
PATIENCE_NS = 5 * 10**9
"""Without motion that suffices, before the calibration motion is asked for."""


@dataclass
class Log:
    """What happened; times in seconds from the start.

    ``distance`` [m] every quarter second. ``targets``: begin, end and whether it was reached. ``events``: what the
    aligner did, and the calibration motions that it asked for. ``norm`` of E (root mean square), every quarter second.
    """

    distance: list[float] = field(default_factory=list)
    norm: list[float] = field(default_factory=list)
    targets: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class LongRun:
    """``changes``: (second, body) in order. Without ``aligner`` the policy's own token stays.

    ``after_report`` is called with every report of the aligner.
    """

    def __init__(
        self,
        policy: Policy,
        body: BodyConfig,
        seed: int,
        *,
        aligner: SelfAligner | None = None,
        changes: Sequence[tuple[float, BodyConfig]] = (),
        calibration: CalibrationConfig | None = None,
        after_report: Callable[[StageReport], None] | None = None,
    ):
        self._policy, self._seed, self._body = policy, seed, body
        self._changes = {round(second * CONTROL_HZ): other for second, other in changes}
        self._loop = None if aligner is None else AlignerLoop(policy, aligner)
        self._after_report = after_report
        self._calibration, self._wanted, self._motion = calibration, MotionWanted(), deque[np.ndarray]()
        self._columns = [JOINTS.index(joint) for joint in JOINTS[: policy.action_dim]]
        self.log = Log()

    def run(self, seconds: float, should_end: Callable[[], bool] = lambda: False) -> Log:
        """Work for ``seconds`` from a fresh start; the policy has its own token again afterwards."""
        own, self._sim = self._policy.e_token, ArmSim(self._body)
        rng, self._near = np.random.default_rng(self._seed), 0
        self._sim.reset(rng)
        self._hold, begin = self._sim.setpoint(), 0
        try:
            for step in range(round(seconds * CONTROL_HZ)):
                if should_end():
                    break
                self._step(step)
                reached = self._near >= _NEAR_STEPS
                if reached or step + 1 - begin >= _TARGET_STEPS:
                    times = {"begin": begin / CONTROL_HZ, "end": (step + 1) / CONTROL_HZ}
                    self.log.targets.append({**times, "reached": reached})
                    begin, self._near, before = step + 1, 0, self._sim.target
                    while self._sim.target == before:
                        self._sim.reset_targets(rng)
        finally:
            self._sim.close()
            if own is not None:
                self._policy.set_e_token(own)
        return self.log

    def _step(self, step: int) -> None:
        sim, policy = self._sim, self._policy
        if step in self._changes:
            sim.apply_body(self._changes[step])
            self._hold = sim.setpoint()
        state = sim.joint_state().position[self._columns].astype(np.float32)
        place = step % _REPLAN_STEPS
        if place == 0 or self._loop is not None:
            images = see(sim, policy)
        if place == 0:
            named = dict(zip(cameras_of(policy), images, strict=True))
            observation = Observation(named, state, sim.prompt, step * DT_NS)
            self._chunk = policy.infer(observation, seed=self._seed).actions
        setpoint = self._motion.popleft() if self._motion else self._chunk[place]
        action = self._hold.copy()
        action[self._columns] = setpoint
        if self._loop is not None:
            report = self._loop.add(step * DT_NS, images, state, setpoint)
            if report is not None:
                self._on_report(step, report, setpoint)
        sim.command(action)
        sim.step(1 / CONTROL_HZ)
        self._near = self._near + 1 if sim.distance() < _NEAR_M else 0
        if step % _LOG_STEPS == 0:
            self.log.distance.append(round(sim.distance(), 4))
            self.log.norm.append(round(float(np.sqrt(np.mean(np.square(own_token(policy))))), 4))

    def _on_report(self, step: int, report: StageReport, setpoint: np.ndarray) -> None:
        if report.accepted:
            self._policy.set_e_token(report.token)
        if report.eventful:
            kind = "accepted" if report.accepted else "refused" if report.refused else "drift"
            self.log.events.append({"time": step / CONTROL_HZ, "kind": kind, "text": report.text})
        self._wanted = self._wanted.after(report, step * DT_NS, PATIENCE_NS)
        if self._wanted.asks and self._calibration and not self._motion:
            self._begin_calibration(step, setpoint, self._calibration)
        if self._wanted.served:
            self._end_calibration(step)
        if self._after_report is not None:
            self._after_report(report)

    def _begin_calibration(self, step: int, setpoint: np.ndarray, config: CalibrationConfig) -> None:
        contract = contract_for(JOINTS[: self._policy.action_dim])
        start = np.clip(setpoint, contract.lower, contract.upper)
        motion = calibration_motion(contract, start, config, around=contract.home, seed=step)
        self._motion.extend(motion.astype(np.float32))
        self._approach_end = step + len(motion) - config.steps(contract.rate_hz)
        if self._wanted.anew and self._loop is not None:
            self._loop.aligner.forget(step * DT_NS)
        self.log.events.append({"time": step / CONTROL_HZ, "kind": "calibration", "text": ""})

    def _end_calibration(self, step: int) -> None:
        """Let the motion end with the way home, if it is on it, and with the next inference."""
        last = max(step, self._approach_end) if self._motion else step
        keep = last - step + -(last + 1) % _REPLAN_STEPS
        while len(self._motion) > keep:
            self._motion.pop()
