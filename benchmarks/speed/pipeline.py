"""From a camera's message to the published command through the real policy node: how much of it is not the model.

    taskset -c 1 python -m benchmarks.speed.pipeline --json pipeline.json

This process plays the robot: pictures at 29.97 Hz, so that every place between two control steps has its turn, joint
states at 60 Hz, and it receives the commands. The policy node runs in a process of its own, with the contract of the
simulated arm for a camera of the given size, and notes when what it does begins and ends. Waiting for the next control
step is not work; it is shown beside the rest. So is the processor time that the node takes from its start to its first
command.

======== ==========================================================================================
arrival  from the picture's stamp, taken before it is published, to the node's callback
wait     to the control step that starts an inference
prepare  checks, decoding, resizing, tokens and normalisation, and the way to the node's worker thread
model    sampling the actions
finish   until the command has been published: units, limits, the way back from the worker thread, the message
return   from the call that publishes to the callback of a robot in Python; not the node's work, shown beside the rest
======== ==========================================================================================

Exit status: 0 if the limit is kept, 1 if not, 2 on bad arguments.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
import yaml
from rclpy.node import Node
from sensor_msgs.msg import Image, JointState
from trajectory_msgs.msg import JointTrajectory

from benchmarks import graph
from benchmarks.harness import Checkpoint, percentiles, print_table, save
from selfalign_core.command_line import File, command, expect_more_than_0
from selfalign_core.errors import ConfigError
from selfalign_core.robot.contract import RobotContract
from selfalign_ros.bridge import qos
from selfalign_ros.bridge.conversions import image_message, joint_state_message, to_ns, to_stamp
from selfalign_ros.life import node
from selfalign_ros.life.resources import config_file
from selfalign_ros.nodes.policy_node import PolicyNode

LIMIT_MS = 5.0
"""Of everything but waiting and the model, median."""
CAMERA_HZ, JOINTS_HZ = 29.97, 60.0
PARTS = ("arrival", "wait", "prepare", "model", "finish", "return")
START_S = 120.0


class TimedPolicyNode(PolicyNode):
    """The policy node, which also writes down when things happen: one line per command, in ns of the system's clock."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        self._log, self._times = log.open("w"), dict[str, int]()

    def arrived(self, topic: str) -> None:
        if topic == self.contract.cameras[0].topic:
            self._times["arrived"] = time.time_ns()
        super().arrived(topic)

    def open_topics(self) -> None:
        super().open_topics()
        publisher: Any = self._command_publisher
        sampler: Any = self._policy and self._policy._sampler
        publish = publisher.publish
        sample = sampler.sample_actions

        def timed_publish(message: JointTrajectory) -> None:
            line: dict[str, float] = dict(self._times)
            line |= {"publishing": time.time_ns(), "stamp": to_ns(message.header.stamp)}
            publish(message)
            line["published"] = time.time_ns()
            line["processor_s"] = time.process_time()
            print(json.dumps(line), file=self._log, flush=True)

        def timed_sample(*args: Any, **options: Any) -> Any:
            self._times["model_begin"] = time.time_ns()
            actions = sample(*args, **options)
            self._times["model_end"] = time.time_ns()
            return actions

        publisher.publish, sampler.sample_actions = timed_publish, timed_sample

    def _start_inference(self, *args: Any) -> None:
        arrived = self._times["arrived"]  # of the newest picture, which is the one that is used
        self._times |= {"started": time.time_ns(), "used": arrived}
        super()._start_inference(*args)


class Robot(Node):
    """Publishes pictures, each another one, and joint states, notes when a command arrives."""

    def __init__(self, contract: RobotContract) -> None:
        super().__init__("pipeline_robot")
        self._contract, self.commands = contract, dict[int, int]()
        camera = contract.cameras[0]
        self._picture = np.random.default_rng(0).integers(0, 256, (camera.height, camera.width, 3), dtype=np.uint8)
        self._message: Image = image_message(self._picture, to_stamp(0), camera.name)
        self._images = self.create_publisher(Image, camera.topic, qos.SENSOR)
        self._joints = self.create_publisher(JointState, contract.joint_state_topic, qos.SENSOR)
        self.create_subscription(JointTrajectory, contract.action.topic, self._on_command, qos.COMMAND)
        self.create_timer(1.0 / CAMERA_HZ, self._see)
        self.create_timer(1.0 / JOINTS_HZ, self._feel)

    def _see(self) -> None:
        self._message.data[0] = (self._message.data[0] + 1) % 256
        self._message.header.stamp = to_stamp(time.time_ns())
        self._images.publish(self._message)

    def _feel(self) -> None:
        names = self._contract.joint_names
        self._joints.publish(joint_state_message(names, self._contract.home, time.time_ns()))

    def _on_command(self, message: JointTrajectory) -> None:
        self.commands[to_ns(message.header.stamp)] = time.time_ns()


def contract_file(folder: Path, width: int, height: int) -> Path:
    """The simulated arm's contract with a camera of that size."""
    values = yaml.safe_load(config_file("contracts/sim_reach.yaml").read_text())
    values["cameras"][0] |= {"width": width, "height": height}
    path = folder / "contract.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def measure(folder: Path, camera: tuple[int, int], checkpoint: str, seconds: float) -> tuple[np.ndarray, float]:
    """(parts, commands) ms of every part of every command, and seconds of the processor before the first one."""
    path, log = contract_file(folder, *camera), folder / "times.jsonl"
    command = [
        "benchmarks.speed.pipeline", "--node", str(log), "--ros-args",
        "-p", f"contract:={path}", "-p", f"checkpoint:={checkpoint}", "-p", "replan_steps:=4",
    ]  # fmt: skip
    with graph.Process(folder / "node.log", command) as process:
        robot = Robot(RobotContract.from_yaml(path))
        deadline = time.monotonic() + START_S
        end = None
        while end is None or time.monotonic() < end:
            rclpy.spin_once(robot, timeout_sec=0.05)
            if end is None and len(robot.commands) >= 5:
                robot.commands.clear()
                end = time.monotonic() + seconds
            if process.has_ended or (end is None and time.monotonic() > deadline):
                raise ConfigError(f"policy node: found no command:\n{process.log.read_text()[-2000:]}")
        process.stop()
    rows = []
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for t in lines:
        if t["stamp"] in robot.commands and "used" in t:
            moments = [t[name] for name in ("stamp", "used", "started", "model_begin", "model_end", "published")]
            spans = [*itertools.pairwise(moments), (t["publishing"], robot.commands[t["stamp"]])]
            rows.append([(second - first) / 1e6 for first, second in spans])
    return np.array(rows).T, lines[0]["processor_s"]


def run(
    *,
    width: int = 640,
    height: int = 480,
    checkpoint: Checkpoint = "policies/tiny_reach",
    seconds: float = 40.0,
    json: File = None,
) -> int:
    """From a camera's message to the published command."""
    expect_more_than_0(width=width, height=height, seconds=seconds)
    with tempfile.TemporaryDirectory() as folder, graph.ros(Path(folder) / "ros_home"):
        rows, start_s = measure(Path(folder), (width, height), checkpoint, seconds)
    if rows.size < 10 * len(PARTS):
        raise ConfigError(f"--seconds: found {rows.shape[-1]} commands in {seconds:g} s, expected 10")
    of = dict(zip(PARTS, rows, strict=True))
    of["outside the model"] = of["arrival"] + of["prepare"] + of["finish"]
    of["share outside the model"] = of["outside the model"] / (of["outside the model"] + of["model"])
    figures = {name: percentiles(values, 50, 90, 99) for name, values in of.items()}
    met = figures["outside the model"]["p50"] <= LIMIT_MS
    save(
        json, "pipeline", camera=[width, height], policy=checkpoint, commands=rows.shape[1],
        cores_allowed=len(os.sched_getaffinity(0)), limit_ms=LIMIT_MS, met=met, milliseconds=figures,
        processor_s_to_first_command=start_s,
    )  # fmt: skip
    print_table(
        [f"camera {width}×{height} to published command, ms", "p50", "p90", "p99"],
        [[name, *(f"{v:.2f}" for v in values.values())] for name, values in figures.items()],
    )
    print(f"from the start of the node to its first command: {start_s:.2f} s of the processor")
    print(f"limit: {LIMIT_MS:g} ms outside the model, median: {'kept' if met else 'NOT kept'}")
    return 0 if met else 1


main = command("benchmarks.speed.pipeline", run)

if __name__ == "__main__":
    if "--node" in sys.argv[1:2]:
        node.run(lambda: TimedPolicyNode(Path(sys.argv[2])), [sys.argv[0], *sys.argv[3:]])
    sys.exit(main())
