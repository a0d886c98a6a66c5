"""What alignment costs the policy: its latencies with alignment off, at 1 Hz and without pause.

    python -m benchmarks.speed.interference --json interference.json

Two processes, as the nodes run: this one infers at the contract's rate, the other makes attempts of alignment
(identify, refine, guard, each within a budget) on random transitions with the aligner node's niceness, one thread each;
on a GPU it hands the device back between layers, as the aligner node does.
The three ways take turns in short rounds, so that what else the machine does meets all of them. On a machine whose
cores are busy with something else, give both processes one core of their own: ``taskset -c 1 make interference``.

Exit status: 0 if the limit is kept, 1 if not, 2 on bad arguments.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from multiprocessing.connection import Connection
from typing import Annotated, Any

import numpy as np
import torch

from benchmarks.harness import Checkpoint, Device, percentiles, print_table, save
from benchmarks.speed.align_speed import Bench
from selfalign_core.command_line import File, command, expect_more_than_0
from selfalign_core.errors import ConfigError
from selfalign_core.model.device_turns import HandBack
from selfalign_core.model.torch_state import check_device
from selfalign_core.policy import Policy
from selfalign_core.robot.contract import RobotContract
from selfalign_core.robot.types import Observation
from selfalign_ros.life.parameter_specs import load_specs
from selfalign_ros.life.process import give_way
from selfalign_ros.life.resources import config_file

LIMIT = 1.15
"""p99 with alignment at 1 Hz, relative to that without."""
PERIODS_S = {"off": None, "1 Hz": 1.0, "maximum": 0.0}
"""Between the starts of two attempts; None: no attempt."""
TRANSITIONS = 32
BUDGET_MS = 100.0
"""Of each stage of an attempt: at 1 Hz, alignment then works about a third of the time."""


def align(checkpoint: str, device: str, orders: Connection) -> None:
    """The other process: attempts at the period that was last ordered, until the order is to stop."""
    torch.set_num_threads(1)
    bench = Bench(Policy.from_checkpoint(checkpoint, dt=0.05, device=device), TRANSITIONS)
    HandBack(bench.policy.model, bench.policy.turns, bench.config.policy_wait_ms)
    give_way(int(load_specs("aligner")["niceness"].default), session=True)
    orders.send("ready")
    period, due, attempts = None, 0.0, 0
    while True:
        if orders.poll(None if period is None else max(0.0, due - time.monotonic())):
            order = orders.recv()
            if order == "stop":
                return
            orders.send(attempts)
            period, due, attempts = order, time.monotonic(), 0
        if period is not None and time.monotonic() >= due:
            due = time.monotonic() + period
            bench.stages(BUDGET_MS)
            attempts += 1


def infer(policy: Policy, observation: Observation, period_s: float, duration_s: float) -> list[float]:
    """Milliseconds of every chunk, one per period."""
    found = []
    begin = time.monotonic()
    for index in range(round(duration_s / period_s)):
        time.sleep(max(0.0, begin + index * period_s - time.monotonic()))
        start = time.perf_counter()
        policy.infer(observation, seed=index)
        found.append(1e3 * (time.perf_counter() - start))
    return found


def run(
    *,
    device: Device = "cpu",
    checkpoint: Checkpoint = "policies/tiny_reach",
    rate: Annotated[float, "chunks per second"] = 20.0,
    rounds: Annotated[int, "of all three ways"] = 5,
    seconds: Annotated[float, "of each way in a round"] = 10.0,
    json: File = None,
) -> int:
    """What alignment costs the policy."""
    check_device(device)
    expect_more_than_0(rate=rate, rounds=rounds, seconds=seconds)
    torch.set_num_threads(1)
    contract = RobotContract.from_yaml(config_file("contracts/sim_reach.yaml"))
    policy = Policy.load(checkpoint, contract=contract, device=device)
    rng = np.random.default_rng(0)
    images = {c: rng.integers(0, 256, (*policy.image_size, 3), dtype=np.uint8) for c in policy.config.cameras if c}
    observation = Observation(images, contract.home.astype(np.float32), "reach the red cube")
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    other = context.Process(target=align, args=(checkpoint, device, theirs), daemon=True)
    other.start()
    while not ours.poll(1.0):
        if not other.is_alive():
            raise ConfigError(f"the aligning process: found it ended with exit code {other.exitcode}, see above")
    ours.recv()
    latencies: dict[str, list[float]] = {name: [] for name in PERIODS_S}
    attempts = dict.fromkeys(PERIODS_S, 0)
    infer(policy, observation, 1.0 / rate, 1.0)

    def order(period: float | None) -> int:
        ours.send(period)
        return ours.recv()

    for _ in range(rounds):
        for name, period in PERIODS_S.items():
            order(period)
            latencies[name] += infer(policy, observation, 1.0 / rate, seconds)
            attempts[name] += order(None)
    ours.send("stop")
    other.join(30.0)
    figures: dict[str, dict[str, Any]] = {
        name: {
            "chunks": len(values),
            "attempts": attempts[name],
            **{f"{key}_ms": value for key, value in percentiles(values, 50, 90, 99).items()},
            "most_ms": max(values),
        }
        for name, values in latencies.items()
    }
    ratios = {name: values["p99_ms"] / figures["off"]["p99_ms"] for name, values in figures.items()}
    met = ratios["1 Hz"] <= LIMIT
    save(
        json, "interference", device=device, policy=checkpoint, rate_hz=rate, limit=LIMIT,
        cores_allowed=len(os.sched_getaffinity(0)), met=met, results=figures, p99_ratio=ratios,
    )  # fmt: skip
    print_table(
        ["alignment", "chunks", "attempts", "p50 ms", "p90 ms", "p99 ms", "most ms", "p99 ratio"],
        [
            [name, *(f"{v:.2f}" if isinstance(v, float) else f"{v}" for v in row.values()), f"{ratios[name]:.2f}"]
            for name, row in figures.items()
        ],
    )
    print(f"limit: p99 at 1 Hz at most {LIMIT} × that without alignment: {'kept' if met else 'NOT kept'}")
    return 0 if met else 1


main = command("benchmarks.speed.interference", run)

if __name__ == "__main__":
    sys.exit(main())
