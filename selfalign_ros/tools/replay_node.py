"""The replay node: plays a bag through policy, buffer and aligner in lock-step, so that outputs repeat bit for bit.

Time advances in control steps. At each, the recorded messages up to it are published as the bytes they were recorded
as, ``/clock`` is set, and the ``step`` services of buffer, policy and aligner are called in this order; the next step
begins when all have answered and what they produced has arrived. Nothing depends on how fast the machine is. Exit
code: 0; 1 when a step failed or the comparison found a difference; 2 when the bag cannot be played.
"""

from __future__ import annotations

import array
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rcl_interfaces.srv import GetParameters
from rclpy.client import Client
from rclpy.parameter import parameter_value_to_python
from rclpy.task import Future
from rosgraph_msgs.msg import Clock

from selfalign.msg import ActionChunk, AlignReport, EToken
from selfalign.srv import Step
from selfalign_core.data.rosbag_file import ABOUT_NAMESPACE, BagError, BagFile
from selfalign_core.errors import ConfigError
from selfalign_core.study.replay_report import first_difference, read_report, replay_report
from selfalign_core.study.run_record import RunRecord
from selfalign_core.study.run_summary import SEPARATOR, align_words
from selfalign_core.study.statistics import finite
from selfalign_ros.bridge import qos
from selfalign_ros.bridge.conversions import NS_PER_S, to_stamp
from selfalign_ros.bridge.topics import Topic, camera_topics, graph_topics
from selfalign_ros.life.parameter_specs import load_specs
from selfalign_ros.life.tool_node import ToolNode, check_report_path, run_tool, write_report

NODES = ("buffer", "policy", "aligner")  # the order of their steps
# What must be in a bag; the prompt need not, it has a parameter that stands in for it.
_OPTIONAL = ("prompt",)
# Stamps and times of recording further apart than this are not of the same clock.
_CLOCK_TOLERANCE_NS = 5 * NS_PER_S
_SPIN_S = 0.05
_PROGRESS_PERIOD_S = 2.0


class ReplayError(RuntimeError):
    """The replay cannot go on: names the node and the step."""


class Replay(ToolNode):
    """See the module. ``record`` is what the nodes said."""

    def __init__(self, cli_args: list[str] | None = None) -> None:
        super().__init__("replay", cli_args)
        if not self.parameters["bag"]:
            raise ConfigError("parameter bag: found nothing; expected the folder of a bag")
        self._bag = BagFile.completed(Path(self.parameters["bag"]))
        if self.parameters["report"]:
            check_report_path(Path(self.parameters["report"]))
        self._earlier = read_report(Path(self.parameters["compare"])) if self.parameters["compare"] else None
        self._inputs = self._recorded_inputs()
        self._types = {recorded: topic.type_name for recorded, topic in self._inputs.items()}
        self._first_ns, self._last_ns = self._bag.span(self._types)
        self._check_clock()
        self.record = RunRecord(self.contract.name, self._first_ns, self._last_ns)
        self._node_parameters: dict[str, dict[str, Any]] = {}
        self._ticks = 0
        self._error = ""

        self._input_publishers = {
            recorded: self.create_publisher(
                topic.type, topic.name, qos.LOCKSTEP_LATCHED if topic.name == "prompt" else qos.LOCKSTEP
            )
            for recorded, topic in self._inputs.items()
        }
        self._published = dict.fromkeys(self._inputs, 0)
        self._clock_publisher = self.create_publisher(Clock, "/clock", 10)
        for kind, topic, profile in (
            (ActionChunk, "action_chunk", qos.LOCKSTEP),
            (EToken, "e_token", qos.LOCKSTEP_LATCHED),
            (AlignReport, "align_report", qos.LOCKSTEP),
        ):
            self.create_subscription(kind, topic, partial(self.record.hear, topic, now_ns=0), profile)
        # After the subscriptions: discovery keeps this order, so a node that answers a call knows those too.
        self._steps = {name: self.create_client(Step, f"{name}/step") for name in NODES}
        self._handshakes = {name: self.create_client(GetParameters, f"{name}/get_parameters") for name in NODES}

    # --- the bag, before anything moves ---

    def _recorded_inputs(self) -> dict[str, Topic]:
        """The bag's name of every topic to publish. Raises ``BagError`` for one that is missing or of another type."""
        namespace = self._bag.about.get(ABOUT_NAMESPACE, "/").rstrip("/")
        types, counts = self._bag.types, self._bag.message_counts()
        inputs: dict[str, Topic] = {}
        for topic in (topic for topic in graph_topics(self.contract) if topic.is_input):
            recorded = topic.name if topic.name.startswith("/") else f"{namespace}/{topic.name}"
            if recorded not in types:
                if topic.name in _OPTIONAL:
                    continue
                raise BagError(
                    f"bag {self._bag.path}, topic {recorded}: found none; expected it, the contract "
                    f"{self.contract.name} names it (the bag has {', '.join(sorted(types)) or 'no topics'})"
                )
            if types[recorded] != topic.type_name:
                raise BagError(
                    f"bag {self._bag.path}, topic {recorded}: found type {types[recorded]}; expected {topic.type_name}"
                )
            if not counts[recorded] and topic.name not in (*_OPTIONAL, "executed_action"):
                raise BagError(f"bag {self._bag.path}, topic {recorded}: found no message; expected some")
            inputs[recorded] = topic
        return inputs

    def _check_clock(self) -> None:
        cameras = [topic.name for topic in camera_topics(self.contract)]
        for recorded in (name for name, topic in self._inputs.items() if topic.name in cameras):
            _, received_ns, raw = next(self._bag.messages({recorded: self._types[recorded]}))
            late_ns = received_ns - self._bag.header_stamp(recorded, raw)
            if abs(late_ns) > _CLOCK_TOLERANCE_NS:
                raise BagError(
                    f"bag {self._bag.path}, topic {recorded}: found a header stamp {late_ns / NS_PER_S:.1f} s before "
                    "its time of recording; expected one clock for both (record with use_sim_time if the robot was "
                    "simulated)"
                )

    # --- playing ---

    def work(self) -> None:
        try:
            self._start()
            self._play()
        except ReplayError as error:
            self._error = str(error)

    def _start(self) -> None:
        """Wait until every node is there, in lock-step, and connected to what this one publishes."""
        deadline = time.monotonic() + self.parameters["start_timeout"]
        readers = {"executed_action": 1, "prompt": 1}  # buffer; policy. Cameras and joints: both

        def unconnected() -> str:
            for name in NODES:
                if not (self._steps[name].service_is_ready() and self._handshakes[name].service_is_ready()):
                    return f"service {name}/step: found nobody offering it; expected the node in lock-step"
            for recorded, publisher in self._input_publishers.items():
                topic = self._inputs[recorded]
                expected, found = readers.get(topic.name, 2), publisher.get_subscription_count()
                if found < expected:
                    return f"topic {topic.name}: found {found} readers; expected {expected}"
            return ""

        self._wait(lambda: not unconnected(), deadline, unconnected)
        for name in NODES:
            request = GetParameters.Request(names=list(load_specs(name)))
            response = self._call(self._handshakes[name], request, deadline, f"{name}/get_parameters")
            values = map(parameter_value_to_python, response.values)
            self._node_parameters[name] = dict(zip(request.names, values, strict=False))
            if not self._node_parameters[name].get("lockstep"):
                raise ReplayError(f"node {name}: found lockstep false; expected true")
        for recorded, topic in self._inputs.items():
            if (found := self.count_publishers(topic.name)) != 1:
                raise ReplayError(
                    f"topic {topic.name}: found {found} publishers for {recorded}; expected the replay alone "
                    "(is a robot running in this domain?)"
                )
        # The aligner's own token, said once when its model is loaded, belongs to the outputs.
        self._wait(
            lambda: bool(self.record.tokens), deadline, lambda: "e_token: found none; expected the aligner's first"
        )
        self.get_logger().info(f"playing {self._bag.path}")

    def _play(self) -> None:
        messages = self._bag.messages(self._types)
        pending = next(messages, None)
        now_ns, shown = self._first_ns, time.monotonic()
        while pending is not None:
            now_ns += self.contract.dt_ns
            while pending is not None and pending[1] <= now_ns:
                self._publish(*pending)
                pending = next(messages, None)
            self._step_all(now_ns)
            self._ticks += 1
            if self.is_interrupted():
                raise ReplayError(f"interrupted {(now_ns - self._first_ns) / NS_PER_S:.1f} s into the bag")
            if time.monotonic() - shown > _PROGRESS_PERIOD_S:
                shown = time.monotonic()
                print(self._progress(now_ns), flush=True)

    def _publish(self, recorded: str, _: int, raw: bytes) -> None:
        self._input_publishers[recorded].publish(bytes(raw))
        self._published[recorded] += 1

    def _step_all(self, now_ns: int) -> None:
        stamp = to_stamp(now_ns)
        self._clock_publisher.publish(Clock(clock=stamp))
        request = Step.Request(
            stamp=stamp,
            topics=[self._inputs[recorded].name for recorded in self._published],
            counts=array.array("Q", self._published.values()),
        )
        for name in NODES:
            self._step(name, request, f"{name}/step at {now_ns} ns")

    def _step(self, name: str, request: Any, what: str) -> None:
        outputs: dict[str, Sequence[object]] = {"policy": self.record.chunks, "aligner": self.record.rounds}
        made, deadline = outputs.get(name, ()), time.monotonic() + self.parameters["step_timeout"]
        before = len(made)
        request.e_token_version = self._last_version
        response = self._call(self._steps[name], request, deadline, what)
        if not response.success:
            raise ReplayError(f"{what}: {response.message}")
        if response.acted:
            lacking = f"{what}: found no output; expected what it says it made"
            self._wait(lambda: len(made) > before and self._has_last_token(), deadline, lambda: lacking)

    @property
    def _last_version(self) -> int:
        return self.record.rounds[-1].version_after if self.record.rounds else 0

    def _has_last_token(self) -> bool:
        return self.record.tokens[-1].version >= self._last_version

    def _wait(self, condition: Callable[[], bool], deadline: float, problem: Callable[[], str]) -> None:
        while not condition():
            if self.is_interrupted():
                raise ReplayError("interrupted")
            if time.monotonic() > deadline:
                raise ReplayError(f"timed out: {problem()}")
            self.spin_once(_SPIN_S)

    def _call(self, client: Client, request: Any, deadline: float, what: str) -> Any:
        future: Future = client.call_async(request)
        self._wait(future.done, deadline, lambda: f"{what}: found no answer")
        return future.result()

    # --- the outcome ---

    def finish(self) -> int:
        if self._error:
            self.get_logger().error(f"replay stopped: {self._error}")
        elif not self.record.chunks:
            self._error = "no action chunk was made"
            self.get_logger().error(f"replay: {self._error} in {self._ticks} steps")
        joints = [{"name": joint.name, "unit": joint.unit} for joint in self.contract.joints]
        report = finite(
            replay_report(
                self.record, self._error, bag=str(self._bag.path), joints=joints, dt_ns=self.contract.dt_ns,
                parameters=self._node_parameters, ticks=self._ticks,
            )
        )  # fmt: skip
        if self.parameters["report"]:
            write_report(Path(self.parameters["report"]), report)
        print(self._progress(self._last_ns), flush=True)
        if self._error:
            return 1
        if self._earlier is not None:
            if difference := first_difference(self._earlier, report):
                self.get_logger().error(f"this replay differs from {self.parameters['compare']}: {difference}")
                return 1
            self.get_logger().info(f"identical to {self.parameters['compare']}, bit for bit")
        return 0

    def _progress(self, now_ns: int) -> str:
        played, length = ((ns - self._first_ns) / NS_PER_S for ns in (min(now_ns, self._last_ns), self._last_ns))
        words = f"{played:.0f}/{length:.0f} s of the bag", f"{len(self.record.chunks)} chunks", align_words(self.record)
        return SEPARATOR.join(words)


def main(args: list[str] | None = None) -> int:
    return run_tool(Replay, args)


if __name__ == "__main__":
    sys.exit(main())
