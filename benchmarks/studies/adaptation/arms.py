"""The arms: how each comes to a token for a body that it knows by its motion alone (but for the upper bound)."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.studies.adaptation.expert_fit import fit_token
from benchmarks.studies.adaptation.lab import DT_NS, AlignerLoop, Lab, own_token, transitions
from selfalign_core.alignment import AlignConfig, SelfAligner
from selfalign_core.alignment.budget import Budget
from selfalign_core.alignment.guard import judge
from selfalign_core.alignment.identify import Identification, identify
from selfalign_core.alignment.overlap import spans
from selfalign_core.alignment.refine import refine
from selfalign_core.alignment.scoring import Scorer
from selfalign_core.alignment.trusted import Trusted
from selfalign_core.robot.types import TransitionBatch

UNALIGNED, MEAN, NEAREST, FULL, OURS, EXPERT = "unaligned", "bank_mean", "nearest", "full_adam", "ours", "expert_fit"
ARMS = (UNALIGNED, MEAN, NEAREST, FULL, OURS, EXPERT)
NO_TOKEN, SHARED_TOKEN, OWN_POLICY = "no_token", "shared_token", "own_policy"
"""Policies measured as they are."""

LABELS = {
    UNALIGNED: "unaligned (deployed token)",
    MEAN: "mean of the bank",
    NEAREST: "nearest bank entry",
    FULL: "full-E Adam",
    OURS: "self-aligner",
    EXPERT: "fitted on expert actions",
    NO_TOKEN: "trained without a token",
    SHARED_TOKEN: "trained with one token",
    OWN_POLICY: "trained on the body itself",
}


@dataclass(frozen=True)
class Found:
    """A token (T, W) and what it took: transitions used, seconds of robot time, seconds of one core.

    ``transitions``: of the aligner those of its largest attempt, fitted on and judged by; another attempt may have used
    others of the ``robot_s`` until the last one, so that all of them together may be more.
    ``accepted``: None for an arm that asks no guard. ``text``: what the arm has to say.
    """

    token: np.ndarray
    transitions: int = 0
    robot_s: float = 0.0
    compute_s: float = 0.0
    accepted: bool | None = None
    text: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "token": self.token.tolist()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Found:
        return cls(**{**values, "token": np.array(values["token"], np.float32)})


def find_token(arm: str, lab: Lab) -> Found:
    """The token of an arm: one of ``ARMS``, or ``nearest@N`` and ``ours@N``, unguarded, from N transitions."""
    name, _, count = arm.partition("@")
    if count:
        return _from_few(lab, int(count), refined=name == OURS)
    return _FINDERS[name](lab)


def _unaligned(lab: Lab) -> Found:
    return Found(own_token(lab.policy))


def _mean(lab: Lab) -> Found:
    policy = lab.policy
    if policy.bank is None:
        return Found(own_token(policy))
    return Found(policy.bank[: len(policy.config.bank_keys)].float().mean(0).cpu().numpy())


@functools.lru_cache(maxsize=1)
def _nearest(lab: Lab) -> Found:
    return _from_few(lab, lab.settings.align.collect.count, refined=False)


def _ours(lab: Lab) -> Found:
    """The aligner as it runs beside a robot, called once per second while the calibration motion runs."""
    policy, recording = lab.policy, lab.calibration
    aligner = SelfAligner(policy, lab.settings.align, joints=lab.joints, seed=lab.index)
    loop, seconds, attempts, robot_s = AlignerLoop(policy, aligner), 0.0, [], 0.0
    for step, rows in enumerate(zip(recording.images, recording.states, recording.actions, strict=True)):
        begin = time.process_time()
        report = loop.add(step * DT_NS, *rows)
        seconds += time.process_time() - begin
        if report is not None and report.attempt is not None:
            attempts.append(report)
            robot_s = (step + 1) * DT_NS / 1e9
    counts = [report.attempt.fit_count + report.attempt.guard_count for report in attempts if report.attempt]
    used = max(counts, default=0)
    text = " | ".join(report.text for report in attempts) or "no attempt"
    return Found(aligner.token.data, used, robot_s, seconds, any(report.accepted for report in attempts), text)


def _full(lab: Lab) -> Found:
    """The plain plan: Adam on every element of E from the deployed token, and the guard on newer transitions."""
    align = dataclasses.replace(lab.settings.align, mode="full")
    batch = transitions(lab.policy, lab.calibration, align.collect.count)
    begin, stage = time.process_time(), _Stages(lab, align)
    times = spans(batch)
    newer = times[len(batch) - align.collect.guard_count :]
    fit = batch.select(np.flatnonzero(times[:, 1] <= newer[0, 0]))
    deployed = torch.from_numpy(own_token(lab.policy))
    shadow = stage.refine(fit, deployed)
    guard = batch.select(np.arange(len(batch) - len(newer), len(batch)))
    verdict = judge(
        stage.scorer, stage.scorer.prepare(guard), newer, deployed, shadow, stage.trusted, align.guard,
        seed=lab.index, budget=Budget.unlimited(),
    )  # fmt: skip
    token = shadow if verdict.accepted else deployed
    seconds = time.process_time() - begin
    return Found(token.numpy(), len(batch), lab.settings.motion_s, seconds, verdict.accepted, verdict.reason)


def _expert(lab: Lab) -> Found:
    """From the nearest entry and from the deployed token, whichever ends better."""
    nearest = _nearest(lab).token
    starts = torch.from_numpy(np.stack([nearest, own_token(lab.policy)]))
    fit, validation = lab.labelled
    begin = time.process_time()
    token, scores = fit_token(lab.policy, fit, validation, starts, lab.settings.expert_fit, seed=lab.index)
    text = f"validation loss {scores[0]:.4f} from the nearest entry, {scores[1]:.4f} from the deployed token"
    return Found(token.numpy(), 0, len(fit.states) * DT_NS / 1e9, time.process_time() - begin, None, text)


_FINDERS: dict[str, Callable[[Lab], Found]] = {
    UNALIGNED: _unaligned, MEAN: _mean, NEAREST: _nearest, FULL: _full, OURS: _ours, EXPERT: _expert,
}  # fmt: skip


def _from_few(lab: Lab, count: int, *, refined: bool) -> Found:
    """Identify, and refine if asked to, on ``count`` transitions spread over the calibration motion; no guard."""
    batch = transitions(lab.policy, lab.calibration, count)
    begin, stage = time.process_time(), _Stages(lab, lab.settings.align)
    found = stage.identify(batch)
    token = stage.refine(batch, found.token) if refined else found.token
    seconds = time.process_time() - begin
    return Found(token.numpy(), len(batch), lab.settings.motion_s, seconds, None, f"started from {found.name!r}")


class _Stages:
    """The aligner's stages by themselves, without limits of time."""

    def __init__(self, lab: Lab, align: AlignConfig):
        policy = lab.policy
        self.scorer = Scorer(policy, align.weights)
        self.trusted, self._align, self._seed = Trusted.of(policy), align, lab.index
        self._deployed = torch.from_numpy(own_token(policy))

    def identify(self, batch: TransitionBatch) -> Identification:
        return identify(
            self.scorer, self.scorer.prepare(batch), self._deployed, self.trusted, self._align.identify,
            seed=self._seed, budget=Budget.unlimited(),
        )  # fmt: skip

    def refine(self, batch: TransitionBatch, start: Tensor) -> Tensor:
        data = self.scorer.prepare(batch)
        found = refine(self.scorer, data, start, self.trusted, self._align, seed=self._seed, budget=Budget.unlimited())
        return found.token
