"""A robot that changes while it works, and changes back: how it reaches over time, with and without the aligner."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.harness import Cache
from benchmarks.studies.adaptation.long_run import LongRun
from benchmarks.studies.adaptation.settings import Settings
from selfalign_core.alignment import SelfAligner
from selfalign_core.robot.calibration import CalibrationConfig
from selfalign_core.sim import JOINTS, BodyConfig, CameraBody
from selfalign_core.study.processes import policy_of

BEFORE_S, SHIFTED_S, BACK_S = 30.0, 60.0, 60.0
RECOVERY_S = 30.0
CALIBRATION = CalibrationConfig(duration_s=10.0, amplitude=0.7)
"""The motion that the aligner may ask for: wider than the default, for a robot that has lost its way."""

_IN_A_ROW = 3
"""Targets begun after the shift and reached one after another: the robot has recovered."""

_NOMINAL = BodyConfig()
_SHIFTED = {
    "payload": dataclasses.replace(_NOMINAL, payload=0.25),
    "camera": dataclasses.replace(
        _NOMINAL, overhead=CameraBody(position=(0.04, -0.04, 0.03), rotation=(0.1, -0.1, 0.12))
    ),
    "actuator": _NOMINAL.replace_joint("shoulder_lift", strength=0.6).replace_joint("elbow_flex", strength=0.6),
    "servo": _NOMINAL.replace_joint("elbow_flex", sign=-1),
}
SHIFTS: dict[str, BodyConfig] = {name: dataclasses.replace(body, name=name) for name, body in _SHIFTED.items()}
"""As far as training's ranges go: a payload is gripped, the camera is bumped, two actuators weaken, and a servo is
replaced by one that turns the other way, which is the one that stops a policy from reaching at all."""


def plan(checkpoint: str, kept: str, settings: Settings, runs: int) -> list[tuple[Any, ...]]:
    """Arguments of :func:`run_shift`: each shift ``runs`` times, with and without the aligner."""
    cases = itertools.product(SHIFTS, range(runs), (True, False))
    return [(checkpoint, kept, settings, *case) for case in cases]


def run_shift(checkpoint: str, kept: str, settings: Settings, shift: str, run: int, aligned: bool) -> dict[str, Any]:
    """The log of a run on the nominal body, shifted, and on the nominal body again; ``aligned``: with the aligner."""
    policy, shifted = policy_of(checkpoint), SHIFTS[shift]

    def make() -> dict[str, Any]:
        joints = JOINTS[: policy.action_dim]
        aligner = SelfAligner(policy, settings.align, joints=joints, seed=run) if aligned else None
        changes = [(BEFORE_S, shifted), (BEFORE_S + SHIFTED_S, _NOMINAL)]
        work = LongRun(
            policy, _NOMINAL, settings.seed * 1000 + run, aligner=aligner, changes=changes, calibration=CALIBRATION
        )
        return work.run(BEFORE_S + SHIFTED_S + BACK_S).to_dict()

    names = ("seed", "align") if aligned else ("seed",)
    motion = dataclasses.asdict(CALIBRATION) if aligned else None
    inputs = {"model": policy.digest, "body": shifted.to_dict(), "calibration": motion, **settings.of(*names)}
    name = f"shifts/{shift}-{run:02d}-{'aligned' if aligned else 'unaligned'}"
    log = Cache(kept).get(name, inputs, make)
    return {"shift": shift, "run": run, "aligned": aligned, **log}


def recovery_s(targets: Sequence[dict[str, Any]], begin: float, end: float) -> float:
    """Seconds from ``begin`` until the robot has reached three targets in a row; infinity if not before ``end``."""
    row = 0
    for target in targets:
        if target["begin"] >= begin and target["end"] <= end:
            row = row + 1 if target["reached"] else 0
            if row == _IN_A_ROW:
                return target["end"] - begin
    return math.inf


def reached_share(targets: Sequence[dict[str, Any]], begin: float, end: float) -> float:
    """Of the targets that lie within the span; NaN without any."""
    found = [target["reached"] for target in targets if target["begin"] >= begin and target["end"] <= end]
    return float(np.mean(found)) if found else math.nan
