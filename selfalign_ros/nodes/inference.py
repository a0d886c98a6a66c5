"""The policy node's model: loaded, warmed up and asked for chunks, all in the node's worker.

Holds no opinion on motion, nor on which E-Token is to be used.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from selfalign_core.errors import InputError
from selfalign_core.robot.chunking import Handover, choose_method
from selfalign_core.robot.contract import RobotContract
from selfalign_core.robot.frames import Selection
from selfalign_core.robot.types import ActionChunk, Observation
from selfalign_ros.bridge.conversions import NS_PER_S
from selfalign_ros.life.diagnostics import Latency, Rate
from selfalign_ros.life.managed_node import ManagedNode
from selfalign_ros.nodes.inputs import decoded

if TYPE_CHECKING:
    from selfalign_core.policy import Policy


@dataclass(frozen=True)
class Inference:
    """One chunk and what it took."""

    chunk: ActionChunk
    age_s: float
    duration_s: float


class Figures:
    """Of the inferences so far, for diagnostics."""

    def __init__(self) -> None:
        self._rate = Rate()
        self._durations, self._ages = Latency("inference duration"), Latency("observation age")
        self._last: Inference | None = None

    def add(self, inference: Inference) -> None:
        self._last = inference
        self._rate.tick()
        self._durations.add(inference.duration_s)
        self._ages.add(inference.age_s)

    def values(self) -> dict[str, object]:
        values: dict[str, object] = {"chunks": self._rate.count, "chunk rate [Hz]": self._rate.hz}
        if self._last is not None:
            values["inference duration [s]"] = self._last.duration_s
            values["observation age [s]"] = self._last.age_s
        return values | self._durations.values() | self._ages.values()


def load_policy(node: ManagedNode, checkpoint: str, parameters: dict[str, Any], prompt: str) -> Policy:
    """The policy of ``checkpoint``, after its first inferences: they pay for lazy initialisation, which the robot shall
    not wait for.
    """
    node.say_progress(f"loading the model {checkpoint or 'tiny'}")
    from selfalign_core.model.torch_state import use_stream, use_threads

    use_threads(parameters["torch_threads"])
    use_stream(parameters["device"], urgent=True)
    from selfalign_core.policy import Policy

    started, contract = time.perf_counter(), node.contract
    device, precision = parameters["device"], parameters["precision"]
    policy = Policy.load(checkpoint, contract=contract, device=device, precision=precision)
    policy.fast = parameters["fast"]
    method = choose_method(parameters["chunk_handover"], policy.config.rtc_max_delay)
    node.say_progress(f"warming up ({time.perf_counter() - started:.1f} s so far)")
    height, width = policy.image_size
    blank = {name: np.zeros((height, width, 3), np.uint8) for name in contract.camera_names}
    home = contract.home.astype(np.float32)
    for handover in (None, *Handover.rehearsal(method, home, policy.horizon, policy.config.rtc_max_delay)):
        policy.infer(Observation(blank, home, prompt, 0), handover=handover)
    kind = "" if policy.trained else " (untrained: random weights)"
    node.get_logger().info(f"model {policy.digest[:12]}{kind} ready in {time.perf_counter() - started:.1f} s")
    return policy


def infer(
    policy: Policy,
    contract: RobotContract,
    selection: Selection,
    *,
    now_ns: int,
    prompt: str,
    seed: int,
    handover: Handover | None,
) -> Inference:
    """The chunk for what was selected at ``now_ns``. Raises ``InputError``."""
    started = time.perf_counter()
    observation = Observation(
        images=decoded(selection, contract, policy.image_size),
        state=selection.state.astype(np.float32),
        prompt=prompt,
        stamp_ns=selection.stamp_ns,
    )
    chunk = policy.infer(observation, seed=seed, handover=handover)
    if not np.isfinite(chunk.actions).all():
        raise InputError("model output: found actions that are not finite; expected finite positions")
    return Inference(chunk, (now_ns - selection.stamp_ns) / NS_PER_S, time.perf_counter() - started)
