"""One run of the bringup graph whose simulated robot has one body after another; the report of it, kept."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rclpy
import yaml
from rclpy.node import Node
from std_msgs.msg import Bool

from benchmarks.graph import Graph
from benchmarks.harness import Cache
from benchmarks.studies.adaptation.settings import Settings, draw_body
from benchmarks.studies.adaptation.shifts import BACK_S, BEFORE_S, SHIFTED_S, SHIFTS
from selfalign.srv import SetBody
from selfalign_core.errors import ConfigError
from selfalign_core.policy import Policy
from selfalign_core.sim import BodyConfig
from selfalign_core.study.processes import policy_of
from selfalign_ros.life.parameter_specs import load_specs
from selfalign_ros.life.resources import checkpoint_folder

UNSEEN, UNSEEN_S = "unseen", 60.0
CASES = (*SHIFTS, UNSEEN)
SERVICE_TIMEOUT_S = 30.0
STARTUP_S = 120.0
"""Limit for the graph to make the robot reach for its first target, until it is over."""

_CALIBRATE = Path(__file__).parents[3] / "config" / "calibrate.yaml"
PARAMETERS: dict[str, dict[str, Any]] = {
    name: {**tree["ros__parameters"], "token_folder": ""}
    for name, tree in yaml.safe_load(_CALIBRATE.read_text(encoding="utf-8")).items()
}
"""A robot whose policy has lost its way hardly moves: let the aligner ask for the motion that it needs."""


@dataclass(frozen=True)
class Course:
    """Bodies one after another, each for so many seconds; the first from when the run's first target is over."""

    bodies: tuple[BodyConfig, ...]
    seconds: tuple[float, ...]

    @classmethod
    def of(cls, case: str, seed: int) -> Course:
        """Of a shift: nominal, shifted, nominal. ``UNSEEN``: body ``seed`` of the study's family "all"."""
        if case == UNSEEN:
            return cls((draw_body(Settings().seed, "all", "inside", seed),), (UNSEEN_S,))
        return cls((BodyConfig(), SHIFTS[case], BodyConfig()), (BEFORE_S, SHIFTED_S, BACK_S))


class Shifter(Node):
    """Changes the body of the simulated robot; knows when a target is over."""

    def __init__(self) -> None:
        super().__init__("shifter")
        self.targets = 0
        self.create_subscription(Bool, "target_reached", self._on_target, 10)
        self._client = self.create_client(SetBody, "robot_sim/set_body")

    def set_body(self, body: BodyConfig) -> None:
        """Raises ``ConfigError`` if the simulated robot does not take it."""
        if not self._client.wait_for_service(SERVICE_TIMEOUT_S):
            raise ConfigError(f"service {self._client.srv_name}: found nobody offering it, expected robot_sim")
        future = self._client.call_async(SetBody.Request(body=yaml.safe_dump(body.to_dict())))
        rclpy.spin_until_future_complete(self, future, timeout_sec=SERVICE_TIMEOUT_S)
        answer = future.result()
        if answer is None or not answer.success:
            raise ConfigError(f"{self._client.srv_name}: {'no answer' if answer is None else answer.message}")

    def _on_target(self, message: Bool) -> None:
        self.targets += 1


def parameters_of(aligned: bool) -> dict[str, dict[str, Any]]:
    """Those of the nodes that are not as by default; without alignment if not ``aligned``."""
    return PARAMETERS | {"aligner": PARAMETERS["aligner"] | ({} if aligned else {"enable": False})}


def model_of(checkpoint: str | None) -> Policy:
    """That of ``checkpoint``, by default of the parameter."""
    return policy_of(checkpoint_folder(checkpoint or str(load_specs("policy")["checkpoint"].default)))


def report_of(case: str, seed: int, output: Path, checkpoint: str | None, *, aligned: bool = True) -> dict[str, Any]:
    """The run report, of a run that is kept under ``output`` if there is one of the same inputs, else of a new one.

    Raises:
        SelfAlignError: no such checkpoint, or see :func:`run_once`.
    """
    name = f"{case}-{seed}" if aligned else f"{case}-{seed}-control"
    parameters, course = parameters_of(aligned), Course.of(case, seed)
    inputs = {
        "model": model_of(checkpoint).digest,
        "bodies": [body.to_dict() for body in course.bodies],
        "seed": seed,
        "seconds": course.seconds,
        "parameters": {
            kind: {spec.name: spec.default for spec in load_specs(kind).values()} | parameters.get(kind, {})
            for kind in ("policy", "buffer", "aligner", "robot_sim")
        },
    }
    make = functools.partial(run_once, course, seed, output / f"{name}.json", checkpoint, parameters)
    return Cache(output / "kept").get(name, inputs, make)


def run_once(
    course: Course, seed: int, report: Path, checkpoint: str | None, settings: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """One run of the graph with the nodes' ``settings``; the run report as plain data.

    Raises:
        ConfigError: the graph ended early, or made no report.
    """
    report.parent.mkdir(parents=True, exist_ok=True)
    parameters, body = report.with_suffix(".yaml"), report.with_suffix(".body.yaml")
    seeded = {"robot_sim": {"seed": seed}, **settings}
    parameters.write_text(yaml.safe_dump({name: {"ros__parameters": values} for name, values in seeded.items()}))
    body.write_text(yaml.safe_dump(course.bodies[0].to_dict()))
    arguments = [f"report:={report}", f"params_file:={parameters}", f"body:={body.resolve()}"]
    arguments += [] if checkpoint is None else [f"checkpoint:={checkpoint}"]
    shifter = Shifter()
    with Graph(report.with_suffix(".log"), arguments) as graph:

        def spin(until: Callable[[], bool]) -> None:
            while not until():
                graph.check()
                rclpy.spin_once(shifter, timeout_sec=0.1)

        def wait(seconds: float) -> None:
            end = time.monotonic() + seconds
            spin(lambda: time.monotonic() >= end)

        limit = time.monotonic() + STARTUP_S
        spin(lambda: shifter.targets > 0 or time.monotonic() > limit)
        for number, (body_now, seconds) in enumerate(zip(course.bodies, course.seconds, strict=True)):
            if number:
                shifter.set_body(body_now)
            wait(seconds)
        graph.stop()
    shifter.destroy_node()
    if not report.is_file():
        raise ConfigError(f"{report}: found no report, expected one; see {graph.log}")
    return json.loads(report.read_text(encoding="utf-8"))
