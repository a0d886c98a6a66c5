"""A robot that changes while it works, in the running graph: the real nodes at real rates, with nobody's help.

    python -m benchmarks.adaptation.in_graph --output runs/in_graph

Each run starts the bringup graph, changes the body of the simulated robot through its service and changes it back, and
reads what the run report saw: when the body changed, which targets were reached, what the aligner did. A run takes
two and a half minutes. Runs that are there, of the same checkpoint, parameters and shift, are not made again.
``--control`` runs have a disabled aligner; no limit is for them.

Exit status: 0 if the limits are kept, 1 if not, 2 on bad arguments.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
import yaml
from rclpy.node import Node
from std_msgs.msg import Bool

from benchmarks.adaptation.long_run import PATIENCE_NS
from benchmarks.adaptation.shifts import (
    BACK_S,
    BEFORE_S,
    CALIBRATION,
    RECOVERY_S,
    SHIFTED_S,
    SHIFTS,
    reached_share,
    recovery_s,
)
from benchmarks.adaptation.work import Cache, policy_of, say
from benchmarks.report import print_table, record, run_command, write_json
from selfalign.srv import SetBody
from selfalign_core.errors import ConfigError
from selfalign_core.policy import Policy
from selfalign_core.sim import BodyConfig
from selfalign_ros.graph import BRINGUP
from selfalign_ros.parameters import load_specs
from selfalign_ros.resources import checkpoint_folder
from selfalign_ros.supervisor import free_domain

RECOVERED_SHARE = 0.9
SERVICE_TIMEOUT_S = 30.0
STARTUP_S = 120.0
"""Limit for the graph to make the robot reach for its first target, until it is over."""

PARAMETERS = {
    "aligner": {"auto_calibrate": True, "auto_calibrate_after": PATIENCE_NS / 1e9, "token_folder": ""},
    "policy": {
        "calibrate_amplitude": CALIBRATION.amplitude,
        "calibrate_around": "home",
        "calibrate_duration": CALIBRATION.duration_s,
        "token_folder": "",
    },
}
"""A robot whose policy has lost its way hardly moves: let the aligner ask for the motion that it needs."""


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


def report_of(shift: str, seed: int, output: Path, checkpoint: str | None, *, aligned: bool = True) -> dict[str, Any]:
    """The run report, of a run that is kept under ``output`` if there is one of the same inputs, else of a new one.

    Raises:
        SelfAlignError: no such checkpoint, or see :func:`run_once`.
    """
    name = f"{shift}-{seed}" if aligned else f"{shift}-{seed}-control"
    parameters = parameters_of(aligned)
    inputs = {
        "model": _model(checkpoint).digest,
        "body": SHIFTS[shift].to_dict(),
        "seed": seed,
        "seconds": [BEFORE_S, SHIFTED_S, BACK_S],
        "parameters": {
            kind: {spec.name: spec.default for spec in load_specs(kind).values()} | parameters.get(kind, {})
            for kind in ("policy", "buffer", "aligner", "robot_sim")
        },
    }
    make = functools.partial(run_once, shift, seed, output / f"{name}.json", checkpoint, parameters)
    return Cache(output / "kept").get(name, inputs, make)


def _model(checkpoint: str | None) -> Policy:
    """That of ``checkpoint``, by default of the parameter."""
    return policy_of(checkpoint_folder(checkpoint or str(load_specs("policy")["checkpoint"].default)))


def run_once(
    shift: str, seed: int, report: Path, checkpoint: str | None, settings: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """One run of the graph with the nodes' ``settings``; the run report as plain data.

    Raises:
        ConfigError: the graph ended early, or made no report.
    """
    report.parent.mkdir(parents=True, exist_ok=True)
    parameters = report.with_suffix(".yaml")
    seeded = {"robot_sim": {"seed": seed}, **settings}
    parameters.write_text(yaml.safe_dump({name: {"ros__parameters": values} for name, values in seeded.items()}))
    command = [sys.executable, "-m", "selfalign_ros.bringup", f"report:={report}", f"params_file:={parameters}"]
    if checkpoint is not None:
        command.append(f"checkpoint:={checkpoint}")
    log = report.with_suffix(".log")
    with log.open("w") as output:
        graph = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    shifter = Shifter()

    def spin(until: Callable[[], bool]) -> None:
        while not until():
            if graph.poll() is not None:
                raise ConfigError(f"the graph ended with exit code {graph.returncode}; see {log}")
            rclpy.spin_once(shifter, timeout_sec=0.1)

    def wait(seconds: float) -> None:
        end = time.monotonic() + seconds
        spin(lambda: time.monotonic() >= end)

    try:
        limit = time.monotonic() + STARTUP_S
        spin(lambda: shifter.targets > 0 or time.monotonic() > limit)
        wait(BEFORE_S)
        shifter.set_body(SHIFTS[shift])
        wait(SHIFTED_S)
        shifter.set_body(BodyConfig())
        wait(BACK_S)
        graph.terminate()
        graph.wait(60.0)
    finally:
        graph.kill()
        graph.wait()
        shifter.destroy_node()
    if not report.is_file():
        raise ConfigError(f"{report}: found no report, expected one; see {log}")
    return json.loads(report.read_text(encoding="utf-8"))


def figures_of(report: dict[str, Any]) -> dict[str, Any]:
    """Recovery and targets reached around each of the two changes of one run, from its report."""
    series = report["series"]
    (_, shift, back), duration = [row[0] for row in series["bodies"]["rows"]], report["duration_s"]
    ends = [(row[0], bool(row[1])) for row in series["targets"]["rows"]]
    # The first target may have begun before the report listened.
    targets = [{"begin": a, "end": b, "reached": reached} for (a, _), (b, reached) in itertools.pairwise(ends)]
    align = [dict(zip(series["align"]["columns"], row, strict=True)) for row in series["align"]["rows"]]
    return {
        "recovery_shift_s": recovery_s(targets, shift, back),
        "recovery_back_s": recovery_s(targets, back, duration),
        "reached_before": reached_share(targets, 0.0, shift),
        "reached_shifted": reached_share(targets, shift + RECOVERY_S, back),
        "reached_back": reached_share(targets, back + RECOVERY_S, duration),
        "accepted": sum(row["accepted"] or row["returned"] for row in align),
        "refused": sum(row["attempted"] and not row["accepted"] for row in align),
        "drifts": sum(row["drift"] for row in align),
    }


def _run(options: argparse.Namespace) -> int:
    if options.runs < 1 or options.control < 0:
        raise ConfigError(
            f"--runs, --control: found {options.runs}, {options.control}, expected at least 1 and at least 0"
        )
    output, runs = Path(options.output), []
    os.environ.setdefault("ROS_DOMAIN_ID", str(free_domain()))
    os.environ.update(BRINGUP({}).environment)
    rclpy.init(args=[])
    try:
        for shift, aligned in itertools.product(options.shifts, (True, False)):
            for seed in range(options.seed, options.seed + (options.runs if aligned else options.control)):
                report = report_of(shift, seed, output, options.checkpoint, aligned=aligned)
                runs.append({"shift": shift, "seed": seed, "aligned": aligned, **figures_of(report)})
                say(f"{_name(shift, aligned)}, seed {seed}: recovered in {_times([runs[-1]])}")
    finally:
        rclpy.try_shutdown()
    rows, kept = [], True
    for shift, aligned in itertools.product(options.shifts, (True, False)):
        group = [run for run in runs if (run["shift"], run["aligned"]) == (shift, aligned)]
        if not group:
            continue
        row = [_name(shift, aligned)]
        for name in ("shift", "back"):
            recovered = [run[f"recovery_{name}_s"] <= RECOVERY_S for run in group]
            kept &= not aligned or np.mean(recovered) >= RECOVERED_SHARE
            row += [f"{sum(recovered)} of {len(group)}"]
        for name in ("before", "shifted", "back"):
            row.append(f"{100 * np.nanmean([run[f'reached_{name}'] for run in group]):.0f} %")
        for name in ("accepted", "refused", "drifts"):
            row.append(f"{np.mean([run[name] for run in group]):.1f}")
        rows.append(row)
    print_table(
        [
            f"runs recovered within {RECOVERY_S:.0f} s of", "the shift", "the shift back", "reached before", "shifted",
            "back", "commits", "refusals", "drifts",
        ],
        rows,
    )  # fmt: skip
    model = _model(options.checkpoint).digest
    write_json(
        output / "in_graph.json", record("in_graph", model=model, parameters=PARAMETERS, kept=bool(kept), runs=runs)
    )
    return 0 if kept else 1


def _name(shift: str, aligned: bool) -> str:
    return shift if aligned else f"{shift}, not aligned"


def _times(runs: Sequence[dict[str, Any]]) -> str:
    """Of the shift and of the shift back."""
    found = [run[f"recovery_{name}_s"] for run in runs for name in ("shift", "back")]
    return ", ".join(f"{s:.0f} s" if math.isfinite(s) else "never" for s in found)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.adaptation.in_graph", description="Shifts of the body in the running graph."
    )
    parser.add_argument("--output", required=True, help="folder for the run reports, their pictures and in_graph.json")
    parser.add_argument("--shifts", nargs="+", choices=list(SHIFTS), default=list(SHIFTS))
    parser.add_argument("--runs", type=int, default=10, help="of each shift")
    parser.add_argument("--control", type=int, default=0, help="runs of each shift with a disabled aligner")
    parser.add_argument("--seed", type=int, default=0, help="of the first run's targets")
    parser.add_argument("--checkpoint", help="checkpoint directory, by default that of the parameter")
    return run_command(lambda: _run(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
