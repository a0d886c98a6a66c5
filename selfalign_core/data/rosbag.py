"""From ROS 2 bags (MCAP or sqlite3) to a dataset, through the robot contract. No ROS installation is needed.

Every bag is read twice. The first pass takes the joint states, the commands and the stamps of the images, so that
what is wrong with a bag is known before anything is written; the second decodes each image that is used, once, into
the memory-mapped file. Memory does not grow with the number or the size of the images.

How a frame is put together, at a tick of the control rate:

- image of every camera and joint state: the newest one stamped (header) at or before the tick, never a later one;
  if it is older than the contract allows, the tick is dropped and counted
- action: the one in force in the middle of the step that starts at the tick (the rule of the online buffer): from
  ``executed_action`` by header stamp, or, in bags of robots that SelfAlign did not drive, from the contract's command
  topic by receive stamp
- prompt: the one in force at the tick, by receive stamp, from the topic ``prompt``; none before the first (play)
- ticks that follow one another make an episode; a dropped tick, a jump of time or another prompt ends it

Must not know the model, torch or rclpy.
"""

from __future__ import annotations

import argparse
import itertools
import math
import struct
import sys
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rosbags.rosbag2 import Reader
from rosbags.typesys import Stores, get_typestore
from tqdm import tqdm

from selfalign_core.contract import RobotContract
from selfalign_core.data.dataset import (
    DatasetError,
    DatasetWriter,
    TransitionDataset,
    describe,
    image_size_argument,
    run_command,
)
from selfalign_core.errors import InputError
from selfalign_core.images import decode_compressed, decode_image, resize_with_pad

EXECUTED_TOPIC = "executed_action"
PROMPT_TOPIC = "prompt"
_IMAGE_TYPES = {"raw": "sensor_msgs/msg/Image", "compressed": "sensor_msgs/msg/CompressedImage"}
_JOINT_STATE_TYPE = "sensor_msgs/msg/JointState"
_PROMPT_TYPE = "std_msgs/msg/String"
_COMMAND_TYPES = {
    "joint_trajectory": "trajectory_msgs/msg/JointTrajectory",
    "forward_command": "std_msgs/msg/Float64MultiArray",
}
_STORAGE_SUFFIXES = (".mcap", ".db3")
_CHECKSUM_KEY = "crc32 "  # SelfAlign's recorder keeps one checksum per topic in the bag's custom data
_NS = 1_000_000_000
# Stamps further apart than this do not belong to one recording of one clock, and a topic that ends this much before
# the others has vanished. Delays between topics of a working robot are far below.
_JUMP_NS = _NS
_DISORDER_NS = _NS // 4  # messages of one topic may overtake each other by less than this
_OLDEST_ACTION = 1.5  # control steps that an action stays in force if no other comes


class BagError(DatasetError):
    """A bag that cannot be used: the message names file and topic, what was found and what was expected."""


@dataclass(frozen=True)
class Options:
    """What a user may choose besides the contract.

    ``prompt``: what the robot was told in these bags, "" for play; None: what their topic ``prompt`` says, and play in
    bags that have none. ``namespace``: of relative topic names.
    ``max_action_age_s``: longest time an action is taken to stay in force [s]; None: 1.5 control steps.
    ``absolute``: joints whose actions are not taken relative to the state in the statistics (grippers).
    ``allow_early_end``: use what was recorded before a topic vanished, instead of refusing the bag.
    """

    image_size: tuple[int, int] = (64, 64)
    prompt: str | None = None
    embodiment: str | None = None
    namespace: str = "/"
    max_action_age_s: float | None = None
    min_frames: int = 2
    allow_early_end: bool = False
    absolute: tuple[str, ...] = ()
    statistics_horizon: int | None = None

    def topic(self, name: str) -> str:
        """The absolute name of a topic of the contract."""
        return name if name.startswith("/") else f"{self.namespace.rstrip('/')}/{name}"


@dataclass
class BagReport:
    """What became of one bag."""

    bag: str
    frames: int = 0
    episodes: int = 0
    action_topic: str = ""
    counters: Counter[str] = field(default_factory=Counter)

    def line(self) -> str:
        causes = ", ".join(f"{name} {count}" for name, count in sorted(self.counters.items()) if name != "ticks")
        return (
            f"{self.bag}: {self.frames} frames of {self.counters['ticks']} ticks in {self.episodes} episode(s), "
            f"actions from {self.action_topic}" + (f" ({causes})" if causes else "")
        )

    def to_dict(self) -> dict[str, Any]:
        counters = dict(sorted(self.counters.items()))
        return {"bag": self.bag, "frames": self.frames, "episodes": self.episodes, "counters": counters}


def convert(
    bags: Sequence[str | Path],
    contract: RobotContract,
    output: str | Path,
    options: Options | None = None,
    *,
    progress: bool = False,
) -> list[BagReport]:
    """Write the dataset ``output`` from bags, or from folders that hold bags, and say what became of each bag.

    Raises:
        BagError: naming file and topic; nothing is left at ``output`` then.
        DatasetError: ``output`` exists, or there is not one usable frame.
    """
    options = options or Options()
    joints = len(contract.joints)
    if unknown := sorted(set(options.absolute) - set(contract.joint_names)):
        raise DatasetError(f"absolute: found joints {unknown}, expected some of {list(contract.joint_names)}")
    paths = find_bags(bags)
    reports = []
    with DatasetWriter(
        output,
        cameras=contract.camera_names,
        image_size=options.image_size,
        state_dim=joints,
        action_dim=joints,
        dt_ns=contract.dt_ns,
        joint_names=contract.joint_names,
        delta_mask=[name not in options.absolute for name in contract.joint_names],
        statistics_horizon=options.statistics_horizon,
    ) as writer:
        for path in paths:
            reports.append(_add_bag(path, contract, options, writer, progress=progress))
        total: Counter[str] = sum((report.counters for report in reports), Counter())
        writer.counters = dict(sorted(total.items()))
        writer.sources = [report.to_dict() for report in reports]
        if writer.num_frames == 0:
            details = "; ".join(report.line() for report in reports)
            raise BagError(f"found no usable frame, expected at least {options.min_frames} in a row: {details}")
    return reports


def find_bags(paths: Sequence[str | Path]) -> list[Path]:
    """The bags among and below ``paths``: directories with a metadata.yaml, and storage files outside of those."""
    found: list[Path] = []

    def search(path: Path) -> None:
        if path.is_file():
            if path.suffix in _STORAGE_SUFFIXES:
                found.append(path)
        elif (path / "metadata.yaml").is_file():
            found.append(path)
        else:
            for child in sorted(path.iterdir()):
                if child.is_dir() or child.suffix in _STORAGE_SUFFIXES:
                    search(child)

    for path in map(Path, paths):
        if not path.exists():
            raise BagError(f"{path}: found no such file or directory, expected a bag")
        before = len(found)
        search(path)
        if len(found) == before:
            raise BagError(f"{path}: found no bag, expected metadata.yaml with .mcap or .db3 files in or below it")
    return list(dict.fromkeys(found))


# --- one bag ---


def _add_bag(
    path: Path, contract: RobotContract, options: Options, writer: DatasetWriter, *, progress: bool
) -> BagReport:
    bag = _Bag(path)
    recording = _read_recording(bag, contract, options)
    report = BagReport(str(path.name), action_topic=recording.action_topic, counters=recording.counters)
    frames: list[Frames] = []
    for segment in recording.segments():
        frames += make_frames(segment, contract, options, report.counters)
    wanted: dict[str, dict[int, list[int]]] = {camera.name: {} for camera in contract.cameras}
    for run in frames:
        start = writer.add_episode(
            states=run.states,
            actions=run.actions,
            stamps=run.stamps,
            embodiment=options.embodiment or contract.embodiment,
            prompt=(run.prompt if options.prompt is None else options.prompt) or None,
        )
        for camera in contract.camera_names:
            for frame, ordinal in enumerate(run.images[camera]):
                wanted[camera].setdefault(int(ordinal), []).append(start + frame)
        report.frames += len(run.stamps)
        report.episodes += 1
    _write_images(bag, contract, options, wanted, writer, progress=progress)
    return report


@dataclass(frozen=True)
class Track:
    """One topic: header stamps in ascending order, and for each either its value or its ordinal in the bag.

    ``stamps`` (n,) int64 ns; ``values`` (n, joints) float64, or (n,) int64 ordinals of images.
    """

    stamps: np.ndarray
    values: np.ndarray

    def newest_not_after(self, ticks_ns: np.ndarray) -> np.ndarray:
        """Per tick the index of the newest message stamped at or before it; -1 if there is none."""
        return np.searchsorted(self.stamps, ticks_ns, side="right") - 1


@dataclass(frozen=True)
class Command:
    """Positions (points, joints) float64 due at ``times_ns`` (points,); counts from ``received_ns`` on."""

    received_ns: int
    times_ns: np.ndarray
    positions: np.ndarray

    @property
    def end_ns(self) -> int:
        """When its last point is reached, from where on a controller holds."""
        return max(int(self.times_ns[-1]), self.received_ns)


class Commands:
    """What a command topic asked for, in the order it was received."""

    def __init__(self, commands: Sequence[Command]) -> None:
        self.stamps = np.array([command.received_ns for command in commands], np.int64)
        self._commands = commands

    def newest_not_after(self, ticks_ns: np.ndarray) -> np.ndarray:
        """Per tick the index of the newest command received at or before it; -1 if there is none."""
        return np.searchsorted(self.stamps, ticks_ns, side="right") - 1

    def at(self, ticks_ns: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the path of command ``chosen`` is at each tick, (n, joints) float64, and when it ends, (n,) ns."""
        values, ends = [], []
        for tick, index in zip(ticks_ns, chosen, strict=True):
            command = self._commands[index]
            offsets = (command.times_ns - command.times_ns[0]).astype(np.float64)
            elapsed = float(tick - command.times_ns[0])
            values.append([np.interp(elapsed, offsets, column) for column in command.positions.T])
            ends.append(command.end_ns)
        return np.array(values), np.array(ends, np.int64)


@dataclass(frozen=True)
class Segment:
    """What was recorded between two jumps of time."""

    cameras: dict[str, Track]
    joint_states: Track
    actions: Track | Commands
    prompts: tuple[tuple[int, str], ...] = ()  # (in force from [ns], text), in order

    def prompts_at(self, ticks_ns: np.ndarray) -> list[str]:
        """The prompt in force at each tick; "" where there is none."""
        begins = np.array([begin for begin, _ in self.prompts], np.int64)
        texts = ["", *(text for _, text in self.prompts)]
        return [texts[i] for i in np.searchsorted(begins, ticks_ns, side="right")]

    @property
    def first_action_ns(self) -> int:
        return int(self.actions.stamps[0])

    def actions_at(self, ticks_ns: np.ndarray, dt_ns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Actions in force in the middle of the steps that start at ``ticks_ns`` (n,).

        Returns (n, joints) float64, their ages at the ticks (n,) int64 ns, and (n,) bool: False where there is none.
        """
        newest = self.actions.newest_not_after(ticks_ns + dt_ns // 2)
        if isinstance(self.actions, Commands):
            values, ends = self.actions.at(ticks_ns, newest)
        else:
            values, ends = self.actions.values[newest], self.actions.stamps[newest]
        return values, ticks_ns - ends, newest >= 0


@dataclass(frozen=True)
class Frames:
    """An episode before its images are decoded: ``images`` are ordinals in the bag, (n,) int64 per camera."""

    stamps: np.ndarray
    states: np.ndarray
    actions: np.ndarray
    images: dict[str, np.ndarray]
    prompt: str = ""


def make_frames(
    segment: Segment, contract: RobotContract, options: Options, counters: Counter[str]
) -> list[Frames]:
    """The episodes of a segment, and in ``counters`` what was left out; a tick may count under several causes."""
    tracks = {**segment.cameras, "joint_states": segment.joint_states}
    first = max(int(track.stamps[0]) for track in tracks.values())
    last = min(int(track.stamps[-1]) for track in tracks.values())
    dt = contract.dt_ns
    # Ticks fall where the actions are stamped; before the first action there is nothing to learn.
    if segment.first_action_ns > first:
        first = segment.first_action_ns
    else:
        first += (segment.first_action_ns - first) % dt
    if last < first:
        return []
    ticks = np.arange(first, last + 1, dt, dtype=np.int64)
    usable = np.ones(len(ticks), bool)
    chosen = {}
    for name, track in tracks.items():
        limit_s = contract.max_joint_state_age_s if name == "joint_states" else contract.max_image_age_s
        chosen[name] = track.newest_not_after(ticks)
        stale = ticks - track.stamps[chosen[name]] > round(limit_s * _NS)
        counters[f"stale {name}"] += int(stale.sum())
        usable &= ~stale
    actions, age, known = segment.actions_at(ticks, dt)
    longest_s = _OLDEST_ACTION * contract.dt if options.max_action_age_s is None else options.max_action_age_s
    none = ~known | (age > round(longest_s * _NS))
    counters["no action"] += int(none.sum())
    usable &= ~none
    prompts = segment.prompts_at(ticks)
    episodes = []
    for begin, end in _runs(usable, prompts):
        if end - begin < options.min_frames:
            counters["too short"] += end - begin
            usable[begin:end] = False
            continue
        rows = slice(begin, end)
        episodes.append(
            Frames(
                stamps=ticks[rows],
                states=segment.joint_states.values[chosen["joint_states"][rows]],
                actions=actions[rows],
                images={name: track.values[chosen[name][rows]] for name, track in segment.cameras.items()},
                prompt=prompts[begin],
            )
        )
        for name in segment.cameras:
            counters[f"repeated {name}"] += int((np.diff(chosen[name][rows]) == 0).sum())
    counters["ticks"] += len(ticks)
    counters["dropped"] += int((~usable).sum())
    for name in [name for name, count in counters.items() if count == 0]:
        del counters[name]
    return episodes


def _runs(flags: np.ndarray, labels: Sequence[str]) -> Iterator[tuple[int, int]]:
    """(begin, end) of every run of True with one label."""
    begin = 0
    for (flag, _), run in itertools.groupby(zip(flags, labels, strict=True)):
        end = begin + sum(1 for _ in run)
        if flag:
            yield begin, end
        begin = end


# --- first pass ---


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
class _Recording:
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


def _read_recording(bag: _Bag, contract: RobotContract, options: Options) -> _Recording:
    cameras = {options.topic(camera.topic): camera for camera in contract.cameras}
    joint_topic = options.topic(contract.joint_state_topic)
    executed_topic, command_topic = options.topic(EXECUTED_TOPIC), options.topic(contract.action.topic)
    types = {topic: _IMAGE_TYPES[camera.encoding] for topic, camera in cameras.items()}
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
            raise BagError(f"{bag.path}: topic {topic}, message stamped {stamp / _NS:.3f} s: {error}") from None
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
    return _Recording(
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
        median = float(np.median(np.frombuffer(self._offsets, np.int64))) / _NS
        if abs(median) * _NS > _JUMP_NS:
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
                f"{path}: topic {topic}: found its last message {(last - begin) / _NS:.2f} s into a recording of "
                f"{(end - begin) / _NS:.2f} s, expected messages to its end; the topic vanished "
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
    where = f"{path}: topic {topic}, message received at {received_ns / _NS:.3f} s"
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
    return time.sec * _NS + time.nanosec


# --- second pass ---


def _write_images(
    bag: _Bag,
    contract: RobotContract,
    options: Options,
    wanted: dict[str, dict[int, list[int]]],
    writer: DatasetWriter,
    *,
    progress: bool,
) -> None:
    """Decode the images in ``wanted`` (camera -> ordinal -> rows) and write each to its rows."""
    cameras = {options.topic(camera.topic): (index, camera) for index, camera in enumerate(contract.cameras)}
    ordinals = dict.fromkeys(cameras, -1)
    total = sum(len(images) for images in wanted.values())
    types = {topic: _IMAGE_TYPES[camera.encoding] for topic, (_, camera) in cameras.items()}
    # disable=None: no bar where the output is not a terminal
    with tqdm(total=total, desc=bag.path.name, unit="image", disable=None if progress else True) as bar:
        for topic, _, raw in bag.messages(types):
            index, camera = cameras[topic]
            ordinals[topic] += 1
            rows = wanted[camera.name].get(ordinals[topic])
            if rows is None:
                continue
            message = bag.decode(topic, types[topic], raw)
            try:
                image = _image(message, camera.encoding)
                if image.shape[:2] != (camera.height, camera.width):
                    raise InputError(
                        f"size: found {image.shape[1]}x{image.shape[0]}, expected {camera.width}x{camera.height}"
                    )
            except InputError as error:
                stamp = bag.header_stamp(topic, raw)
                raise BagError(f"{bag.path}: topic {topic}, image stamped {stamp / _NS:.3f} s: {error}") from None
            image = resize_with_pad(image, *options.image_size)
            for row in rows:
                writer.write_image(row, index, image)
            bar.update()


def _image(message: Any, encoding: str) -> np.ndarray:
    if encoding == "compressed":
        return decode_compressed(message.data)
    return decode_image(
        message.data, height=message.height, width=message.width, step=message.step, encoding=message.encoding
    )


class _Bag:
    """One bag through ``rosbags``, with every way it can be damaged turned into a ``BagError``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._store = get_typestore(Stores.ROS2_JAZZY)  # the types read here are the same in every distribution

    def message_counts(self) -> dict[str, int]:
        """Topic -> messages, as the bag itself says."""
        counts: Counter[str] = Counter()
        with self._open() as reader:
            for connection in reader.connections:
                counts[connection.topic] += connection.msgcount
        return dict(counts)

    def messages(self, types: dict[str, str]) -> Iterator[tuple[str, int, bytes]]:
        """(topic, receive stamp [ns], CDR bytes) of every message on the topics, which must have these types."""
        with self._open() as reader:
            connections = [connection for connection in reader.connections if connection.topic in types]
            for connection in connections:
                if connection.msgtype != types[connection.topic]:
                    raise BagError(
                        f"{self.path}: topic {connection.topic}: found type {connection.msgtype}, "
                        f"expected {types[connection.topic]}"
                    )
            promised = Counter({c.topic: 0 for c in connections})
            for connection in connections:
                promised[connection.topic] += connection.msgcount
            found: Counter[str] = Counter()
            checksums = dict.fromkeys(types, 0)
            messages = reader.messages(connections) if connections else iter(())
            while (item := self._next(messages)) is not None:
                connection, received_ns, raw = item
                found[connection.topic] += 1
                checksums[connection.topic] = zlib.crc32(raw, checksums[connection.topic])
                yield connection.topic, received_ns, raw
            for topic, count in promised.items():
                if found[topic] != count:
                    raise BagError(
                        f"{self.path}: topic {topic}: found {found[topic]} messages, expected the {count} that the "
                        "bag's own index counts; the file is damaged or cut short"
                    )
                recorded = (reader.storage.metadata.custom or {}).get(f"{_CHECKSUM_KEY}{topic}")
                if recorded is not None and recorded != f"{checksums[topic]:08x}":
                    raise BagError(
                        f"{self.path}: topic {topic}: found checksum {checksums[topic]:08x}, expected {recorded} as "
                        "recorded; the file was damaged or changed"
                    )

    def decode(self, topic: str, message_type: str, raw: bytes) -> Any:
        try:
            return self._store.deserialize_cdr(raw, message_type)
        except Exception as error:  # rosbags lets struct, index, assertion and unicode errors through
            raise BagError(
                f"{self.path}: topic {topic}: found {len(raw)} bytes that are no {message_type} ({_shown(error)}); "
                "the file is damaged"
            ) from error

    def header_stamp(self, topic: str, raw: bytes) -> int:
        """``header.stamp`` [ns] of a message that begins with its header, without decoding the rest."""
        if len(raw) < 12:
            raise BagError(f"{self.path}: topic {topic}: found a message of {len(raw)} bytes, expected a header")
        sec, nanosec = struct.unpack_from("<iI" if raw[1] & 1 else ">iI", raw, 4)
        if sec == 0 and nanosec == 0:
            raise BagError(f"{self.path}: topic {topic}: found header stamp 0, expected the time of the measurement")
        return sec * _NS + nanosec

    @contextmanager
    def _open(self) -> Iterator[Reader]:
        reader = self._guarded(lambda: Reader(self.path))
        self._guarded(reader.open)
        try:
            yield reader
        finally:
            reader.close()

    def _files(self) -> str:
        if self.path.is_file():
            return str(self.path)
        return ", ".join(str(f) for f in sorted(self.path.iterdir()) if f.suffix in _STORAGE_SUFFIXES) or str(self.path)

    def _next(self, messages: Iterator[Any]) -> Any:
        return self._guarded(lambda: next(messages, None))

    def _guarded(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # rosbags lets errors of struct, zstd, sqlite, assertions and more through
            raise BagError(
                f"{self._files()}: found an unreadable bag ({_shown(error)}), expected a complete MCAP or sqlite3 "
                "recording; the file is damaged or cut short (was the recorder killed? try `ros2 bag reindex` or "
                "`mcap recover` on a copy)"
            ) from error


def _shown(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# --- command line ---


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m selfalign_core.data.rosbag",
        description="Make a training dataset from ROS 2 bags (MCAP or sqlite3).",
    )
    parser.add_argument("bags", nargs="+", type=Path, metavar="BAGS", help="bags, or folders that hold bags")
    parser.add_argument("--contract", required=True, type=Path, help="robot contract (YAML)")
    parser.add_argument("--output", required=True, type=Path, help="dataset directory to make")
    parser.add_argument(
        "--image-size", type=int, nargs="+", default=[64], metavar="PIXELS",
        help="height and width of the stored images, or one number for both; what the model reads (default: 64)",
    )  # fmt: skip
    parser.add_argument(
        "--prompt",
        help="what the robot was told to do, '' for play (default: as recorded on the topic prompt; else play)",
    )
    parser.add_argument("--embodiment", help="key of this body in the token bank (default: the contract's name)")
    parser.add_argument("--namespace", default="/", help="namespace of the topics (default: /)")
    parser.add_argument(
        "--max-action-age", type=float, metavar="SECONDS",
        help="longest time an action stays in force when no newer one comes (default: 1.5 control steps)",
    )  # fmt: skip
    parser.add_argument(
        "--absolute", nargs="+", default=[], metavar="JOINT",
        help="joints whose actions are not taken relative to the state, such as grippers",
    )  # fmt: skip
    parser.add_argument("--min-frames", type=int, default=2, help="shortest episode to keep (default: 2 frames)")
    parser.add_argument(
        "--chunk", type=int, help="actions per chunk, for the statistics of relative actions (default: 16)"
    )
    parser.add_argument(
        "--allow-early-end", action="store_true", help="use what was recorded before a topic vanished"
    )
    options = parser.parse_args(arguments)

    def work() -> None:
        reports = convert(
            options.bags,
            RobotContract.from_yaml(options.contract),
            options.output,
            Options(
                image_size=image_size_argument(options.image_size),
                prompt=options.prompt,
                embodiment=options.embodiment,
                namespace=options.namespace,
                max_action_age_s=options.max_action_age,
                min_frames=options.min_frames,
                absolute=tuple(options.absolute),
                allow_early_end=options.allow_early_end,
                statistics_horizon=options.chunk,
            ),
            progress=True,
        )
        for report in reports:
            print(report.line())
        print(describe(TransitionDataset(options.output)))

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
