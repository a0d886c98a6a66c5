"""The first pass over a bag: joint states, commands, prompts and the stamps of the images, sorted into segments.

What is wrong with a bag (a topic that is missing or vanishes, a NaN, two clocks) is found here, before anything is
written. No image is decoded.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from selfalign_core.data.rosbag_file import NS, BagError, BagFile
from selfalign_core.data.rosbag_frames import Command, Commands, Segment, Track
from selfalign_core.data.rosbag_options import Options
from selfalign_core.errors import InputError
from selfalign_core.robot.contract import RobotContract

EXECUTED_TOPIC = "executed_action"
PROMPT_TOPIC = "prompt"
IMAGE_TYPES = {"raw": "sensor_msgs/msg/Image", "compressed": "sensor_msgs/msg/CompressedImage"}
_JOINT_STATE_TYPE = "sensor_msgs/msg/JointState"
_PROMPT_TYPE = "std_msgs/msg/String"
_COMMAND_TYPES = {
    "joint_trajectory": "trajectory_msgs/msg/JointTrajectory",
    "forward_command": "std_msgs/msg/Float64MultiArray",
}
# Stamps further apart than this do not belong to one recording of one clock, and a topic that ends this much before
# the others has vanished. Delays between topics of a working robot are far below.
_JUMP_NS = NS
_DISORDER_NS = NS // 4  # messages of one topic may overtake each other by less than this


@dataclass
class _Stream:
    """One topic as it comes out of the bag: header stamp, receive stamp and values per message, in reading order."""

    topic: str
    stamps: array = field(default_factory=lambda: array("q"))
    received: array = field(default_factory=lambda: array("q"))
    segments: array = field(default_factory=lambda: array("i"))
    values: array = field(default_factory=lambda: array("d"))

    def add(self, stamp_ns: int, received_ns: int, segment: int, values: Sequence[float] = ()) -> None:
        self.stamps.append(stamp_ns)
        self.received.append(received_ns)
        self.segments.append(segment)
        self.values.extend(values)

    def track(self, segment: int, values: np.ndarray, counters: Counter[str]) -> Track:
        """The messages of a segment in order of their stamps; of equal stamps the last one counts."""
        chosen = np.flatnonzero(np.frombuffer(self.segments, np.int32) == segment)
        stamps = np.frombuffer(self.stamps, np.int64)[chosen]
        counters["out of order"] += int((np.diff(stamps) < 0).sum())
        order = np.argsort(stamps, kind="stable")
        stamps, chosen = stamps[order], chosen[order]
        keep = np.append(np.diff(stamps) > 0, True)[: len(stamps)]
        counters["duplicate stamp"] += int((~keep).sum())
        return Track(stamps[keep], values[chosen[keep]])


@dataclass
class Recording:
    """A bag after the first pass."""

    contract: RobotContract
    cameras: dict[str, _Stream]
    joint_states: _Stream
    executed: _Stream
    commands: list[tuple[int, Command]]  # with the number of their segment
    prompts: list[tuple[int, int, str]]  # number of the segment, receive stamp [ns], text
    action_topic: str
    num_segments: int
    counters: Counter[str]

    def segments(self) -> Iterator[Segment]:
        """The stretches in which every topic has messages."""
        joints = len(self.contract.joints)
        for number in range(self.num_segments):
            cameras = {
                name: stream.track(number, np.arange(len(stream.stamps)), self.counters)
                for name, stream in self.cameras.items()
            }
            joint_states = self.joint_states.track(
                number, np.frombuffer(self.joint_states.values).reshape(-1, joints), self.counters
            )
            if not all(len(track.stamps) for track in [*cameras.values(), joint_states]):
                continue
            prompts = self._prompts_of(number)
            if self.executed.stamps:
                values = np.frombuffer(self.executed.values).reshape(-1, joints)
                executed = self.executed.track(number, values, self.counters)
                if len(executed.stamps):
                    yield Segment(cameras, joint_states, executed, prompts)
            elif commands := [command for segment, command in self.commands if segment == number]:
                yield Segment(cameras, joint_states, Commands(commands), prompts)

    def _prompts_of(self, number: int) -> tuple[tuple[int, str], ...]:
        """The prompt a segment begins with, if it had been given before, and those given in it."""
        before = [(np.iinfo(np.int64).min, text) for segment, _, text in self.prompts if segment < number]
        return (*before[-1:], *((stamp, text) for segment, stamp, text in self.prompts if segment == number))


class _Clock:
    """Numbers the stretches between jumps of time.

    Another one starts with a stamp far from the newest of the current one, and where the stamps of one topic fall
    back: messages of a topic arrive in order, but for a little. A message that was under way while time jumped still
    belongs to the stretch before.
    """

    def __init__(self) -> None:
        self.number = -1
        self._newest: list[int] = []
        self._newest_of: list[dict[str, int]] = []

    def place(self, topic: str, stamp_ns: int) -> int:
        """The number of the stretch that a message belongs to; messages come in the order received."""
        for number in range(self.number, max(self.number - 2, -1), -1):
            near = abs(stamp_ns - self._newest[number]) <= _JUMP_NS
            if near and stamp_ns >= self._newest_of[number].get(topic, stamp_ns) - _DISORDER_NS:
                break
        else:
            number = self.number = self.number + 1
            self._newest.append(stamp_ns)
            self._newest_of.append({})
        self._newest[number] = max(self._newest[number], stamp_ns)
        self._newest_of[number][topic] = max(self._newest_of[number].get(topic, stamp_ns), stamp_ns)
        return number


def read_recording(bag: BagFile, contract: RobotContract, options: Options) -> Recording:
    cameras = {options.topic(camera.topic): camera for camera in contract.cameras}
    joint_topic = options.topic(contract.joint_state_topic)
    executed_topic, command_topic = options.topic(EXECUTED_TOPIC), options.topic(contract.action.topic)
    types = {topic: IMAGE_TYPES[camera.encoding] for topic, camera in cameras.items()}
    types[joint_topic] = _JOINT_STATE_TYPE
    counts = bag.message_counts()
    if counts.get(executed_topic):
        action_topic = executed_topic
        types[executed_topic] = _JOINT_STATE_TYPE
    else:
        action_topic = command_topic
        types[command_topic] = _COMMAND_TYPES[contract.action.interface]
    prompt_topic = options.topic(PROMPT_TOPIC)
    if options.prompt is None and counts.get(prompt_topic):
        types[prompt_topic] = _PROMPT_TYPE
    for topic in types:
        if not counts.get(topic):
            wanted = f"{topic} (or {executed_topic})" if topic == command_topic else topic
            raise BagError(
                f"{bag.path}: topic {wanted}: found no messages, expected some; recorded are "
                f"{', '.join(sorted(name for name, count in counts.items() if count)) or 'none'}"
            )

    names = contract.joint_names
    streams = {topic: _Stream(topic) for topic in types if topic != prompt_topic}
    commands: list[tuple[int, Command]] = []
    prompts: list[tuple[int, int, str]] = []
    counters: Counter[str] = Counter()
    clock = _Clock()
    offset = _Offset(bag.path)
    incomplete = ""
    for topic, received_ns, raw in bag.messages(types):
        if topic == prompt_topic:
            text = bag.decode(topic, _PROMPT_TYPE, raw).data.strip()
            prompts.append((max(clock.number, 0), received_ns, text))
            continue
        stream = streams[topic]
        if topic in cameras:
            stamp = bag.header_stamp(topic, raw)
            stream.add(stamp, received_ns, clock.place(topic, stamp))
            continue
        message = bag.decode(topic, types[topic], raw)
        if topic == action_topic == command_topic:
            # A command has no stamp of its own, or one that says when it starts; it counts from when it was received.
            command = _command(bag.path, topic, message, names, received_ns)
            stream.add(received_ns, received_ns, max(clock.number, 0))
            commands.append((max(clock.number, 0), command))
            continue
        stamp = bag.header_stamp(topic, raw)
        segment = clock.place(topic, stamp)
        try:
            position = _positions(message, names)
        except InputError as error:
            raise BagError(f"{bag.path}: topic {topic}, message stamped {stamp / NS:.3f} s: {error}") from None
        if position is None:
            incomplete = f"found joints {list(message.name)}, expected also {sorted(set(names) - set(message.name))}"
            counters["incomplete joint states"] += 1
            continue
        if topic == joint_topic:
            offset.add(stamp, received_ns)
        stream.add(stamp, received_ns, segment, position)

    for topic in (joint_topic, executed_topic):
        if topic in streams and not streams[topic].stamps:
            raise BagError(f"{bag.path}: topic {topic}: {incomplete}, in every message")
    if not options.allow_early_end:
        _check_ends(bag.path, streams, {command_topic: commands[-1][1].end_ns} if commands else {})
    for topic, found in ((command_topic, commands), (prompt_topic, prompts)):
        if found:
            offset.check(topic)
    if clock.number > 0:
        counters["time jumps"] = clock.number
    return Recording(
        contract=contract,
        cameras={camera.name: streams[topic] for topic, camera in cameras.items()},
        joint_states=streams[joint_topic],
        executed=streams.get(executed_topic, _Stream(executed_topic)),
        commands=commands,
        prompts=prompts,
        action_topic=action_topic,
        num_segments=clock.number + 1,
        counters=counters,
    )


class _Offset:
    """Commands and prompts are placed by receive stamps among header stamps, which needs one clock behind both."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offsets = array("q")

    def add(self, stamp_ns: int, received_ns: int) -> None:
        self._offsets.append(received_ns - stamp_ns)

    def check(self, topic: str) -> None:
        median = float(np.median(np.frombuffer(self._offsets, np.int64))) / NS
        if abs(median) * NS > _JUMP_NS:
            raise BagError(
                f"{self._path}: topic {topic}: found messages received {median:.3f} s after the header stamps of the "
                "joint states, expected one clock; messages without stamps can only be placed by when they were "
                f"received (record {EXECUTED_TOPIC}, give the prompt, or record with --use-sim-time where the robot "
                "runs on simulated time)"
            )


def _check_ends(path: Path, streams: dict[str, _Stream], executing_until: dict[str, int]) -> None:
    ends = {topic: stream.received[-1] for topic, stream in streams.items()}
    begin = min(stream.received[0] for stream in streams.values())
    end = max(ends.values())
    for topic, last in ends.items():
        # A long trajectory is still being executed when no newer command comes.
        if end - max(last, executing_until.get(topic, 0)) > _JUMP_NS:
            raise BagError(
                f"{path}: topic {topic}: found its last message {(last - begin) / NS:.2f} s into a recording of "
                f"{(end - begin) / NS:.2f} s, expected messages to its end; the topic vanished "
                "(--allow-early-end uses what came before)"
            )


def _positions(message: Any, names: Sequence[str]) -> list[float] | None:
    """Positions in the order of ``names``, other joints left out; None if some are missing.

    Raises ``InputError``.
    """
    if len(message.position) != len(message.name):
        raise InputError(f"found {len(message.position)} positions for {len(message.name)} names, expected as many")
    position = dict(zip(message.name, message.position.tolist(), strict=True))
    if len(position) != len(message.name):
        raise InputError(f"found joints {list(message.name)}, expected each once")
    if any(name not in position for name in names):
        return None
    for name in names:
        if not math.isfinite(position[name]):
            raise InputError(f"joint {name}: found {position[name]}, expected a finite position")
    return [position[name] for name in names]


def _command(path: Path, topic: str, message: Any, names: Sequence[str], received_ns: int) -> Command:
    where = f"{path}: topic {topic}, message received at {received_ns / NS:.3f} s"
    if not hasattr(message, "points"):
        positions, times = np.asarray(message.data, np.float64)[None], np.array([received_ns], np.int64)
        if positions.shape[1] != len(names):
            raise BagError(f"{where}: found {positions.shape[1]} values, expected {len(names)} ({', '.join(names)})")
    else:
        columns = {name: column for column, name in enumerate(message.joint_names)}
        if missing := [name for name in names if name not in columns]:
            raise BagError(f"{where}: found joints {list(message.joint_names)}, expected also {missing}")
        if not message.points or any(len(p.positions) != len(message.joint_names) for p in message.points):
            raise BagError(f"{where}: found points without a position per joint, expected at least one with all")
        order = [columns[name] for name in names]
        positions = np.array([point.positions for point in message.points], np.float64)[:, order]
        start = _nanoseconds(message.header.stamp) or received_ns
        times = np.array([start + _nanoseconds(point.time_from_start) for point in message.points], np.int64)
    if not np.isfinite(positions).all():
        joint = names[int(np.argmax(~np.isfinite(positions).all(axis=0)))]
        raise BagError(f"{where}: joint {joint}: found NaN or an infinite position, expected finite positions")
    if (np.diff(times) < 0).any():
        raise BagError(f"{where}: found points in falling order of time, expected rising")
    return Command(received_ns, times, positions)


def _nanoseconds(time: Any) -> int:
    return time.sec * NS + time.nanosec
