"""The first pass over a bag: joint states, commands, prompts and the stamps of the images, in the order of arrival.

What is wrong with a bag (a topic that is missing or vanishes, a NaN, two clocks) is found here, before anything is
written. No image is decoded.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from selfalign_core.data.rosbag_file import NS, BagError, BagFile
from selfalign_core.data.rosbag_frames import Command, Content, Joints, Message, Picture, Prompt, Run
from selfalign_core.data.rosbag_messages import (
    COMMAND_TYPES,
    IMAGE_TYPES,
    JOINT_STATE_TYPE,
    PROMPT_TYPE,
    command_of,
)
from selfalign_core.data.rosbag_options import Options
from selfalign_core.errors import InputError
from selfalign_core.robot.contract import RobotContract
from selfalign_core.robot.frames import DISORDER_NS
from selfalign_core.robot.joint_states import Reading, names_of, read_joints

EXECUTED_TOPIC = "executed_action"
PROMPT_TOPIC = "prompt"
# Stamps further apart than this do not belong to one recording of one clock, and a topic that ends this much before
# the others has vanished. Delays between topics of a working robot are far below.
_JUMP_NS = NS
_NO_STAMP = np.iinfo(np.int64).min
_NO_STATE = Joints(Reading(0, None))


class Recording:
    """What a bag says, message by message, in the order received."""

    def __init__(self, action_topic: str) -> None:
        self.action_topic = action_topic
        self.counters: Counter[str] = Counter()
        self.has_one_clock = True
        self._contents: list[Content] = []
        self._stamps, self._received, self._stretches = array("q"), array("q"), array("i")

    def add(self, content: Content, stamp_ns: int | None, received_ns: int, stretch: int) -> None:
        """``stamp_ns``: the header's, None where there is none. ``stretch``: which stretch of time it belongs to."""
        self._contents.append(content)
        self._stamps.append(_NO_STAMP if stamp_ns is None else stamp_ns)
        self._received.append(received_ns)
        self._stretches.append(stretch)

    def runs(self) -> Iterator[Run]:
        """All of it as received, where receive and header stamps are of one clock.

        Else by header stamps, each stretch of time by itself: a message has arrived when the newest that was received
        up to it was stamped.
        """
        if self.has_one_clock:
            arrivals = zip(self._received, self._stamps, self._contents, strict=True)
            yield Run(self._received[0], (Message(arrival, stamp, content) for arrival, stamp, content in arrivals))
            return
        stretches = np.frombuffer(self._stretches, np.int32)
        for number in range(int(stretches.max()) + 1):
            rows = np.flatnonzero(stretches == number)
            stamps = np.frombuffer(self._stamps, np.int64)[rows]
            if not (stamped := stamps[stamps != _NO_STAMP]).size:
                continue
            arrivals_ns = np.maximum.accumulate(np.maximum(stamps, stamped[0]))
            yield Run(
                int(arrivals_ns[0]),
                (
                    Message(int(arrival), int(stamp), self._contents[row])
                    for arrival, stamp, row in zip(arrivals_ns, stamps, rows, strict=True)
                ),
            )


def read_recording(bag: BagFile, contract: RobotContract, options: Options) -> Recording:
    """Raises ``BagError`` naming file and topic."""
    return _Reader(bag, contract, options).read()


class _Reader:
    """Reads one bag once."""

    def __init__(self, bag: BagFile, contract: RobotContract, options: Options) -> None:
        self._bag, self._contract, self._options = bag, contract, options
        self._names = contract.joint_names
        self._joint_topic, self._executed_topic, self._command_topic, self._prompt_topic = (
            options.topic(name)
            for name in (contract.joint_state_topic, EXECUTED_TOPIC, contract.action.topic, PROMPT_TOPIC)
        )
        self._cameras = {options.topic(camera.topic): camera for camera in contract.cameras}
        self._types = self._wanted(bag.message_counts())
        has_executed = self._executed_topic in self._types
        self._recording = Recording(self._executed_topic if has_executed else self._command_topic)
        self._clock, self._offset = _Clock(), _Offset(bag.path)
        self._ordinals = dict.fromkeys(self._cameras, 0)
        self._received: dict[str, list[int]] = {}  # topic, or joint of one -> when its first and newest message came
        self._executing_until = 0  # by the newest command
        self._incomplete: str | None = None  # what executed actions lack, if they all lack something
        self._ignored = ""  # why the newest message was no joint state

    def read(self) -> Recording:
        take: dict[str, Callable[[str, int, bytes], None]] = {
            **dict.fromkeys(self._cameras, self._take_image),
            self._command_topic: self._take_command,
            self._executed_topic: self._take_executed,
            self._joint_topic: self._take_state,
            self._prompt_topic: self._take_prompt,
        }
        for topic, received_ns, raw in self._bag.messages(self._types):
            take[topic](topic, received_ns, raw)
        if self._incomplete:
            raise BagError(f"{self._bag.path}: topic {self._executed_topic}: {self._incomplete}, in every message")
        self._check_joints()
        self._check_ends()
        for topic in (self._command_topic, self._prompt_topic):
            if topic in self._types and not (topic == self._prompt_topic and self._options.prompt is not None):
                self._offset.check(topic)
        return self._finished()

    def _finished(self) -> Recording:
        recording, oldest_s = self._recording, self._contract.max_joint_state_age_s
        # A robot whose joint states were too old when they arrived would not have moved: then it is another clock.
        recording.has_one_clock = self._offset.is_within(-min(oldest_s, self._contract.dt), oldest_s)
        if not recording.has_one_clock and self._clock.number > 0:
            recording.counters["time jumps"] = self._clock.number
        return recording

    def _wanted(self, counts: dict[str, int]) -> dict[str, str]:
        """Topic -> type of what is to be read. Raises ``BagError`` if something is not there."""
        types = {topic: IMAGE_TYPES[camera.encoding] for topic, camera in self._cameras.items()}
        types[self._joint_topic] = JOINT_STATE_TYPE
        if counts.get(self._executed_topic):
            types[self._executed_topic] = JOINT_STATE_TYPE
        else:
            types[self._command_topic] = COMMAND_TYPES[self._contract.action.interface]
        for topic in types:
            if not counts.get(topic):
                wanted = f"{topic} (or {self._executed_topic})" if topic == self._command_topic else topic
                raise BagError(
                    f"{self._bag.path}: topic {wanted}: found no messages, expected some; recorded are "
                    f"{', '.join(sorted(name for name, count in counts.items() if count)) or 'none'}"
                )
        if counts.get(self._prompt_topic):
            types[self._prompt_topic] = PROMPT_TYPE  # whatever it says: the ticks are counted from the first message on
        return types

    def _take_image(self, topic: str, received_ns: int, raw: bytes) -> None:
        stamp_ns = self._bag.header_stamp(topic, raw)
        self._arrived(topic, received_ns)
        content = Picture(self._cameras[topic].name, self._ordinals[topic])
        self._ordinals[topic] += 1
        self._recording.add(content, stamp_ns, received_ns, self._clock.place(topic, stamp_ns))

    def _take_state(self, topic: str, received_ns: int, raw: bytes) -> None:
        message = self._decode(topic, raw)
        reading = read_joints(message.name, message.position.tolist(), self._names)
        if not reading.named:  # it says nothing of this robot, and its stamp nothing of this robot's clock
            self._recording.add(_NO_STATE, None, received_ns, max(self._clock.number, 0))
            self._ignored = reading.problem
            return
        stamp_ns = self._bag.header_stamp(topic, raw)
        self._check_reading(reading, topic, stamp_ns)
        for source in (topic, *(f"{topic}, joint {name}" for name in names_of(reading.named, self._names))):
            self._arrived(source, received_ns)
        self._offset.add(stamp_ns, received_ns)
        # Messages of other joints may be of another sender, which is late by itself.
        stretch = self._clock.place(f"{topic} {reading.named}", stamp_ns)
        self._recording.add(Joints(reading), stamp_ns, received_ns, stretch)

    def _take_executed(self, topic: str, received_ns: int, raw: bytes) -> None:
        stamp_ns, message = self._bag.header_stamp(topic, raw), self._decode(topic, raw)
        reading = read_joints(message.name, message.position.tolist(), self._names)
        self._check_reading(reading, topic, stamp_ns)
        self._arrived(topic, received_ns)
        stretch = self._clock.place(topic, stamp_ns)
        try:
            positions = reading.all_positions(self._names)
        except InputError as error:  # the buffer, too, stores no action that is not whole
            self._incomplete = self._incomplete if self._incomplete is not None else str(error)
            self._recording.counters["incomplete executed actions"] += 1
            return
        self._incomplete = ""
        action = Command(stamp_ns, np.array([stamp_ns], np.int64), positions[None])
        self._recording.add(action, stamp_ns, received_ns, stretch)

    def _check_reading(self, reading: Reading, topic: str, stamp_ns: int) -> None:
        if reading.named and reading.positions is None:
            where = f"topic {topic}, message stamped {stamp_ns / NS:.3f} s"
            raise BagError(f"{self._bag.path}: {where}: {reading.problem}")

    def _take_command(self, topic: str, received_ns: int, raw: bytes) -> None:
        with self._naming(f"topic {topic}, message received at {received_ns / NS:.3f} s"):
            command = command_of(self._decode(topic, raw), self._names, received_ns)
        self._arrived(topic, received_ns)
        self._executing_until = command.end_ns
        self._recording.add(command, None, received_ns, max(self._clock.number, 0))

    def _take_prompt(self, topic: str, received_ns: int, raw: bytes) -> None:
        text = self._decode(topic, raw).data.strip()
        self._recording.add(Prompt(text), None, received_ns, max(self._clock.number, 0))

    def _decode(self, topic: str, raw: bytes) -> Any:
        return self._bag.decode(topic, self._types[topic], raw)

    @contextmanager
    def _naming(self, where: str) -> Iterator[None]:
        """Turns an ``InputError`` into a ``BagError`` that names bag and message."""
        try:
            yield
        except InputError as error:
            raise BagError(f"{self._bag.path}: {where}: {error}") from None

    def _arrived(self, source: str, received_ns: int) -> None:
        self._received.setdefault(source, [received_ns, 0])[1] = received_ns

    def _check_joints(self) -> None:
        """Raises ``BagError`` if some joint is named by no joint state."""
        missing = [name for name in self._names if f"{self._joint_topic}, joint {name}" not in self._received]
        if missing:
            problem = self._ignored if len(missing) == len(self._names) else f"found no joints {missing}"
            raise BagError(f"{self._bag.path}: topic {self._joint_topic}: {problem}, in every message")

    def _check_ends(self) -> None:
        if self._options.allow_early_end:
            return
        ends = self._received.values()
        begin, end = min(first for first, _ in ends), max(last for _, last in ends)
        for topic, (_, last) in self._received.items():
            # A long trajectory is still being executed when no newer command comes.
            until = max(last, self._executing_until) if topic == self._command_topic else last
            if end - until > _JUMP_NS:
                raise BagError(
                    f"{self._bag.path}: topic {topic}: found its last message {(last - begin) / NS:.2f} s into a "
                    f"recording of {(end - begin) / NS:.2f} s, expected messages to its end; the topic vanished "
                    "(--allow-early-end uses what came before)"
                )


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
            if near and stamp_ns >= self._newest_of[number].get(topic, stamp_ns) - DISORDER_NS:
                break
        else:
            number = self.number = self.number + 1
            self._newest.append(stamp_ns)
            self._newest_of.append({})
        self._newest[number] = max(self._newest[number], stamp_ns)
        self._newest_of[number][topic] = max(self._newest_of[number].get(topic, stamp_ns), stamp_ns)
        return number


class _Offset:
    """How much later joint states were received than they are stamped, by their median."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offsets = array("q")

    def add(self, stamp_ns: int, received_ns: int) -> None:
        self._offsets.append(received_ns - stamp_ns)

    def is_within(self, least_s: float, most_s: float) -> bool:
        return least_s <= self._median_s <= most_s

    def check(self, topic: str) -> None:
        """Messages without stamps are placed by receive stamps among header stamps: one clock has to be behind both."""
        if abs(self._median_s) * NS > _JUMP_NS:
            raise BagError(
                f"{self._path}: topic {topic}: found messages received {self._median_s:.3f} s after the header stamps "
                "of the joint states, expected one clock; messages without stamps can only be placed by when they were "
                f"received (record {EXECUTED_TOPIC}, give the prompt, or record with --use-sim-time where the robot "
                "runs on simulated time)"
            )

    @property
    def _median_s(self) -> float:
        return float(np.median(np.frombuffer(self._offsets, np.int64))) / NS
