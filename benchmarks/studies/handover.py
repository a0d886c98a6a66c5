"""How smoothly one chunk follows another on the simulated arm, per hand-over method and inference latency.

    python -m benchmarks.studies.handover policies/tiny_reach --json handover.json

Closed loop in simulated time, as the policy node runs it: an observation is taken every ``replan_steps`` control steps,
its chunk is ready a latency later, actions that are due by then are skipped by their time stamps, and the arm follows
the limited path meanwhile, interpolated as by a joint trajectory controller. ``wait`` is what a runtime does that
computes one chunk after the other: the arm stands still meanwhile, and executes each chunk from its first action on.
Every method meets the same episodes with the same noise.

- jerk: third difference of the joint positions at the control steps over dt³ [rad/s³], commanded and measured, from
  the first hand-over on: root mean square and largest of an episode, mean over the episodes.
- jump: how far the first action of a new chunk that is executed is from what the old one had for that time [mrad]:
  largest joint, mean over an episode's hand-overs.
- stall: share of the control steps, from the first chunk on, without an action.
- reached: episodes in which the target was reached, which ends them.

Intervals are of 95 %, over episodes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from benchmarks.harness import interval, print_table, save, share, take_turns
from selfalign_core.command_line import File, More, command
from selfalign_core.errors import ConfigError
from selfalign_core.policy import Policy
from selfalign_core.robot.chunking import AUTO, METHODS, DelayEstimate, Handover, choose_method
from selfalign_core.robot.commands import CommandLimiter, CommandPath, plan_path
from selfalign_core.robot.contract import RobotContract
from selfalign_core.robot.types import ActionChunk, Observation
from selfalign_core.sim import TARGET_NAMES, ReachEnv, prompt_for
from selfalign_core.study.processes import BATCH, load_policy
from selfalign_core.study.rollout import EpisodeSpec, PolicyPlanner, RolloutConfig, RunningEpisode
from selfalign_core.study.table import OWN, find_bodies, plan_row

CONTRACT = Path(__file__).parents[2] / "config/contracts/sim_reach.yaml"
LATENCIES_MS = (0, 50, 150, 300)
WAIT = "wait"
_METHODS = f"of {', '.join((WAIT, *METHODS))}; default: all that the checkpoint allows"
SUBSTEPS = 10
"""Of a control step, in which the path is interpolated."""


class Arm(RunningEpisode):
    """An episode whose arm is told where to be as the policy node tells a joint trajectory controller."""

    def __init__(self, episode: EpisodeSpec, env: ReachEnv, config: RolloutConfig, contract: RobotContract) -> None:
        super().__init__(episode, env, config)
        self._dt_ns, self._limiter = contract.dt_ns, CommandLimiter.from_contract(contract)
        self.chunk: ActionChunk | None = None
        self._path = CommandPath(np.zeros(1, np.int64), self._hold[self.columns][None])
        self._commanded: list[np.ndarray] = []
        self._measured: list[np.ndarray] = []
        self._jumps: list[float] = []
        self._begin = self._first_handover = 0
        self._stalled = self._near_steps = 0

    def adopt(self, chunk: ActionChunk, now_ns: int, *, steps: int | None = None) -> None:
        """Execute what of a chunk is not past, no more than ``steps`` actions of it."""
        actions = chunk.actions[:steps]
        path = plan_path(
            actions,
            stamp_ns=chunk.stamp_ns,
            dt_ns=self._dt_ns,
            now_ns=now_ns,
            reference=self._path.at(now_ns),
            limiter=self._limiter,
        )
        if path is None:
            raise ConfigError(f"latency: found every action past {(now_ns - chunk.stamp_ns) / 1e9:g} s after its stamp")
        if self.chunk is None:
            self._begin = self.step
        else:
            due_ns = int(path.stamps_ns[1])
            fresh = actions[(due_ns - chunk.stamp_ns) // self._dt_ns]
            self._jumps.append(float(np.abs(fresh - self._path.at(due_ns)).max()))
            self._first_handover = self._first_handover or self.step
        self.chunk, self._path = chunk, path

    def advance(self) -> None:
        """One control step along the path."""
        sim, goal, now_ns = self.env.sim, self._hold.copy(), self.step * self._dt_ns
        self._commanded.append(self._path.at(now_ns))
        self._measured.append(sim.joint_state().position[self.columns])
        self._stalled += self.chunk is not None and now_ns >= self._path.stamps_ns[-1]
        for substep in range(SUBSTEPS):
            goal[self.columns] = self._path.at(now_ns + substep * self._dt_ns // SUBSTEPS)
            sim.command(goal)
            sim.step(self.env.dt / SUBSTEPS)
        self.step += 1
        self._images.clear()
        self._near_steps = self._near_steps + 1 if sim.distance() < self.env.success_distance else 0
        self.success = self._near_steps >= self.env.success_steps
        self.done = self.success or self.step >= self.env.max_steps

    def figures(self) -> dict[str, float]:
        """Of the episode; NaN where it was too short for them."""
        values = {"reached": float(self.success), "steps": float(self.step)}
        values["stall"] = self._stalled / max(1, self.step - self._begin)
        values["jump"] = float(np.mean(self._jumps)) if self._jumps else math.nan
        # The third difference that the first action of the second chunk is part of is the first one.
        since = max(0, self._first_handover - 2)
        for name, positions in (("commanded", self._commanded), ("measured", self._measured)):
            jerk = np.diff(np.array(positions[since:]), 3, axis=0) / self.env.dt**3
            enough = len(jerk) and self._first_handover
            values[f"{name}_jerk"] = float(np.sqrt(np.square(jerk).mean())) if enough else math.nan
            values[f"{name}_jerk_max"] = float(np.abs(jerk).max()) if enough else math.nan
        return values


def run(
    planner: PolicyPlanner, arms: Sequence[Arm], contract: RobotContract, method: str, latency_ns: int
) -> list[dict[str, float]]:
    """The figures of each arm."""
    dt_ns, waits = contract.dt_ns, method == WAIT
    delay = DelayEstimate()
    delay.add(latency_ns)
    now_ns = due_ns = ready_ns = 0
    computing: dict[int, ActionChunk] | None = None
    running = list(arms)
    while running:
        if computing is None and now_ns >= due_ns:
            ready_ns = now_ns + latency_ns
            # A chunk that is executed from its first action on is due when it is ready.
            stamp_ns = ready_ns if waits else now_ns
            actions = planner(running, None if waits else _handover(planner.policy, running, method, now_ns, delay))
            made = zip(running, actions, strict=True)
            computing = {id(arm): ActionChunk(rows, contract.dt, stamp_ns, 0, 0.0) for arm, rows in made}
            due_ns = stamp_ns + contract.replan_steps * dt_ns
        if computing is not None and now_ns >= ready_ns:
            for arm in running:
                arm.adopt(computing[id(arm)], now_ns, steps=contract.replan_steps + 1 if waits else None)
            computing = None
        for arm in running:
            arm.advance()
        running = [arm for arm in running if not arm.done]
        now_ns += dt_ns
    return [arm.figures() for arm in arms]


def _handover(
    policy: Policy, running: Sequence[Arm], method: str, now_ns: int, delay: DelayEstimate
) -> Handover | None:
    """Of all arms at once; their chunks began at the same time."""
    dt_ns = round(policy.dt * 1e9)
    plans = [
        Handover.plan(
            method,
            arm.chunk,
            stamp_ns=now_ns,
            dt_ns=dt_ns,
            delay=delay.steps(dt_ns),
            rtc_max_delay=policy.config.rtc_max_delay,
        )
        for arm in running
    ]
    known = [plan for plan in plans if plan is not None]
    return replace(known[0], previous=np.stack([plan.previous for plan in known])) if known else None


def inference_ms(policy: Policy, methods: Sequence[str], *, repeats: int = 30) -> dict[str, float]:
    """Median duration of one inference with each hand-over; methods take turns."""
    rng = np.random.default_rng(0)
    size = (*policy.image_size, 3)
    images = {camera: rng.integers(0, 256, size).astype(np.uint8) for camera in policy.config.cameras if camera}
    pose = np.zeros(policy.action_dim, np.float32)
    observation = Observation(images, np.zeros(policy.state_dim, np.float32), prompt_for(TARGET_NAMES[0]))
    plans = {m: Handover.rehearsal(m, pose, policy.horizon, policy.config.rtc_max_delay)[-1] for m in methods}
    calls = {method: partial(policy.infer, observation, handover=plan) for method, plan in plans.items()}
    return {method: float(np.median(ms)) for method, ms in take_turns(calls, repeats=repeats).items()}


def summary(method: str, latency_ms: float, episodes: Sequence[dict[str, float]]) -> dict[str, Any]:
    """One row: an interval per figure."""
    row: dict[str, Any] = {"latency_ms": latency_ms, "method": method, "episodes": len(episodes)}
    reached = share([bool(one["reached"]) for one in episodes])
    row["reached"] = {"share": reached["mean"], "low": reached["low"], "high": reached["high"]}
    return row | {name: interval([one[name] for one in episodes]) for name in episodes[0] if name != "reached"}


def _print(rows: Sequence[dict[str, Any]], durations: dict[str, float]) -> None:
    header = ("latency, hand-over", "reached", "jerk commanded", "largest", "measured", "largest", "jump", "stall")
    print_table(
        header,
        [
            (
                f"{row['latency_ms']:g} ms, {row['method']}",
                f"{100 * row['reached']['share']:.0f} % ({100 * row['reached']['low']:.0f} … "
                f"{100 * row['reached']['high']:.0f})",
                f"{row['commanded_jerk']['mean']:.0f} ± {_reach(row['commanded_jerk']):.0f}",
                f"{row['commanded_jerk_max']['mean']:.0f}",
                f"{row['measured_jerk']['mean']:.0f} ± {_reach(row['measured_jerk']):.0f}",
                f"{row['measured_jerk_max']['mean']:.0f}",
                f"{1e3 * row['jump']['mean']:.1f} mrad",
                f"{100 * row['stall']['mean']:.0f} %",
            )
            for row in rows
        ],
    )
    print("Jerk in rad/s³. One inference: " + ", ".join(f"{name} {value:.1f} ms" for name, value in durations.items()))


def _reach(figure: dict[str, float]) -> float:
    return figure["high"] - figure["mean"]


def measure(
    checkpoint: Annotated[str, "checkpoint directory, of the arm of config/contracts/sim_reach.yaml"],
    *,
    methods: Annotated[tuple[str, ...] | None, _METHODS, More(choices=(WAIT, *METHODS), metavar="METHOD")] = None,
    latencies: Annotated[tuple[float, ...], "inference's", More(metavar="MS")] = LATENCIES_MS,
    episodes: Annotated[int, "per row"] = 60,
    seed: Annotated[int, "of the episodes"] = 0,
    json: File = None,
) -> None:
    """How smoothly one chunk follows another."""
    torch.set_num_threads(1)
    if min(latencies) < 0:
        raise ConfigError(f"latencies: found {min(latencies):g} ms, expected >= 0")
    policy = load_policy(checkpoint)
    contract = RobotContract.from_yaml(CONTRACT)
    policy.config.check_contract(contract)
    trained = policy.config.rtc_max_delay > 0
    chosen = methods or [WAIT, *(m for m in reversed(METHODS) if trained or m != "prefix")]
    for method in chosen:
        if method != WAIT:
            choose_method(method, policy.config.rtc_max_delay)
    planner, config = PolicyPlanner(policy), RolloutConfig(joints=contract.joint_names)
    planned = plan_row(OWN, policy, find_bodies("nominal"), episodes, seed)
    pool = [ReachEnv(cameras=(), control_hz=contract.rate_hz) for _ in range(min(BATCH, len(planned)))]
    rows = []
    try:
        for latency_ms in latencies:
            for method in chosen:
                figures: list[dict[str, float]] = []
                for begin in range(0, len(planned), BATCH):
                    batch = planned[begin : begin + BATCH]
                    arms = [Arm(one.episode, env, config, contract) for one, env in zip(batch, pool, strict=False)]
                    figures += run(planner, arms, contract, method, round(latency_ms * 1e6))
                rows.append(summary(method, latency_ms, figures))
    finally:
        for env in pool:
            env.close()
    durations = inference_ms(policy, [method for method in chosen if method != WAIT])
    _print(rows, durations)
    auto = choose_method(AUTO, policy.config.rtc_max_delay)
    about = {"checkpoint": checkpoint, "model_digest": policy.digest, "auto": auto, "seed": seed}
    save(json, "handover", **about, inference_ms=durations, rows=rows)


main = command("benchmarks.studies.handover", measure)

if __name__ == "__main__":
    sys.exit(main())
