"""A recording played to the rule of the nodes: what has arrived at each tick of the control rate becomes a frame.

- messages are taken in the order in which they arrived; ticks come one control step apart from the first of them on, as
  when the bag is replayed through the nodes
- frame: the observation that the nodes would have made at the tick (``selfalign_core.robot.frames``), if it is newer
  than the last one; its stamp is that of its oldest picture, never the tick
- actions: a track of what was executed, from ``executed_action`` by header stamp, or, in bags of robots that SelfAlign
  did not drive, of what the contract's command topic asked for, by receive stamp
- prompt: the one in force at the tick, from the topic ``prompt``; none before the first (play)
- an episode goes on over ticks that gave no frame. Another prompt ends it, a hole of a second, and a time that begins
  anew

Knows stamps and numbers, but neither bags nor images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from selfalign_core.data.rosbag_options import Options
from selfalign_core.data.timeline import Track
from selfalign_core.robot.contract import RobotContract
from selfalign_core.robot.frames import DISORDER_NS, Fault, Order, Pairing, Selection, SensorFrames, order_of
from selfalign_core.robot.joint_states import Reading

_PAUSE_NS = 1_000_000_000
"""Without a message for so long, or a frame, the recording paused: nothing belongs together across it."""


@dataclass(frozen=True, slots=True)
class Command:
    """Positions (points, joints) float64 due at ``times_ns`` (points,); counts from ``begin_ns`` on.

    An executed action is one of a single point, due when it begins.
    """

    begin_ns: int
    times_ns: np.ndarray
    positions: np.ndarray

    @property
    def end_ns(self) -> int:
        """When its last point is reached, from where on a controller holds."""
        return max(int(self.times_ns[-1]), self.begin_ns)

    def at(self, time_ns: int) -> np.ndarray:
        """Where its path is, (joints,) float64."""
        if len(self.times_ns) == 1:
            return self.positions[0]
        offsets = (self.times_ns - self.times_ns[0]).astype(np.float64)
        elapsed = float(time_ns - self.times_ns[0])
        return np.array([np.interp(elapsed, offsets, column) for column in self.positions.T])


@dataclass(frozen=True, slots=True)
class Picture:
    """``ordinal``: which of its camera's messages in the bag it is."""

    camera: str
    ordinal: int


@dataclass(frozen=True, slots=True)
class Joints:
    """What a joint state says of the contract's joints."""

    reading: Reading


@dataclass(frozen=True, slots=True)
class Prompt:
    text: str


Content = Picture | Joints | Command | Prompt


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a recording. ``stamp_ns`` is its header's, where it has one."""

    arrival_ns: int
    stamp_ns: int
    content: Content


@dataclass(frozen=True)
class Run:
    """Messages in the order in which they arrived, on one clock; ticks are counted from ``begin_ns`` on."""

    begin_ns: int
    messages: Iterator[Message]


@dataclass(frozen=True)
class Frames:
    """An episode before its images are decoded: ``images`` are ordinals in the bag, (n,) int64 per camera.

    ``stamps`` (n,) int64 ns, ``states`` (n, joints) float64.
    """

    stamps: np.ndarray
    states: np.ndarray
    images: dict[str, np.ndarray]
    track: Track
    prompt: str = ""


@dataclass
class _Stretch:
    """What was seen and done until time began anew."""

    selections: list[Selection] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)


class Player:
    """Plays the runs of a bag, one after the other; ``counters`` says what was left out, and why.

    Of ``ticks`` each gave a frame, or none that was newer (``repeated`` and the camera that kept it), or is among the
    ``dropped``, under the cause as well.
    """

    def __init__(self, contract: RobotContract, options: Options, counters: Counter[str]) -> None:
        self._contract, self._options, self.counters = contract, options, counters
        self._pairing = Pairing(contract.dt_ns)
        self._prompt = ""

    def episodes(self, run: Run) -> list[Frames]:
        """Those of the next run. A prompt stays in force from one run to the next."""
        self._frames = SensorFrames(self._contract)
        self._newest_frame_ns: int | None = None
        self._newest_command_ns: int | None = None
        self._stretches = [_Stretch()]
        self._play(run)
        self.counters.update(self._frames.counts)
        return [episode for stretch in self._stretches for episode in self._parted(stretch)]

    # --- from messages to frames ---

    def _play(self, run: Run) -> None:
        dt_ns = self._contract.dt_ns
        now_ns = arrived_ns = run.begin_ns
        message = next(run.messages, None)
        while message is not None:
            now_ns += dt_ns
            if now_ns > arrived_ns + _PAUSE_NS and message.arrival_ns > now_ns:
                now_ns += -((now_ns - message.arrival_ns) // dt_ns) * dt_ns
            while message is not None and message.arrival_ns <= now_ns:
                self._take(message)
                arrived_ns = message.arrival_ns
                message = next(run.messages, None)
            self._tick(now_ns)

    def _take(self, message: Message) -> None:
        content = message.content
        if isinstance(content, Picture):
            self._count(self._frames.add_picture(content.camera, message.stamp_ns, content.ordinal))
        elif isinstance(content, Joints):
            self._count(self._frames.add_state(message.stamp_ns, content.reading))
        elif isinstance(content, Command):
            order = order_of(content.begin_ns, self._newest_command_ns, DISORDER_NS)
            self._count(order)
            if order is not Order.LATE:
                self._newest_command_ns = content.begin_ns
            self._stretches[-1].commands.append(content)
        elif self._options.prompt is None:
            self._prompt = content.text

    def _count(self, order: Order | None) -> None:
        names = {Order.LATE: "out of order", Order.EQUAL: "duplicate stamp", Order.RESTARTED: "time jumps"}
        if order is not None and order in names:
            self.counters[names[order]] += 1

    def _tick(self, now_ns: int) -> None:
        """As the buffer node does it."""
        self.counters["ticks"] += 1
        try:
            selection = self._frames.select(now_ns)
        except Fault as fault:
            self._drop(fault.cause, 1)
            return
        order = order_of(selection.stamp_ns, self._newest_frame_ns, self._contract.dt_ns)
        if order in (Order.EQUAL, Order.LATE):
            self.counters[f"repeated {selection.oldest}"] += 1
            return
        if order is Order.RESTARTED:
            self._stretches.append(_Stretch())
        self._newest_frame_ns = selection.stamp_ns
        self._stretches[-1].selections.append(selection)
        self._stretches[-1].prompts.append(self._prompt)

    def _drop(self, cause: str, count: int) -> None:
        if count:
            self.counters[cause] += count
            self.counters["dropped"] += count

    # --- from frames to episodes ---

    def _parted(self, stretch: _Stretch) -> Iterator[Frames]:
        dt_ns, longest_s = self._contract.dt_ns, self._options.max_action_age_s
        hold_ns = dt_ns + self._pairing.tolerance_ns
        longest_ns = hold_ns if longest_s is None else round(longest_s * 1e9)
        track = track_of(stretch.commands, dt_ns, longest_ns - hold_ns, joints=len(self._contract.joints))
        stamps = np.array([selection.stamp_ns for selection in stretch.selections], np.int64)
        begins, ends = self._use(stamps, track)
        rows = np.flatnonzero(ends)
        is_first = np.ones(len(rows), bool)
        prompts = np.array(stretch.prompts, object)[rows]
        is_first[1:] = (np.diff(stamps[rows]) > _PAUSE_NS) | (prompts[1:] != prompts[:-1])
        for part in np.split(rows, np.flatnonzero(is_first)[1:]) if len(rows) else ():
            # Before its first action an episode has nothing that a frame could be the end of.
            begun = part[int(np.argmax(begins[part])) :] if begins[part].any() else part[:0]
            self._drop("no action", len(part) - len(begun))
            if len(begun) >= max(self._options.min_frames, 1):
                yield self._episode([stretch.selections[row] for row in begun], track, stretch.prompts[begun[0]])
            else:
                self._drop("too short", len(begun))
        self._drop("no action", len(stamps) - len(rows))

    def _use(self, stamps: np.ndarray, track: Track) -> tuple[np.ndarray, np.ndarray]:
        """Which frames an action was in force at, and which can be the end of a transition, (n,) bool.

        The last action of a transition is in force in a step that began a step before its end, give or take the
        tolerance.
        """
        if not len(track):
            return np.zeros(len(stamps), bool), np.zeros(len(stamps), bool)
        newest, in_force = self._pairing.in_force(track.stamps, stamps, (0, len(track)))
        age = stamps - track.stamps[np.maximum(newest, 0)]
        longest_ns = 2 * (self._contract.dt_ns + self._pairing.tolerance_ns)
        return in_force, (newest >= 0) & (age <= longest_ns)

    def _episode(self, selections: Sequence[Selection], track: Track, prompt: str) -> Frames:
        stamps = np.array([selection.stamp_ns for selection in selections], np.int64)
        tolerance_ns = self._pairing.tolerance_ns
        edges = (stamps[0] - self._contract.dt_ns - tolerance_ns, stamps[-1] + tolerance_ns + 1)
        part = slice(*np.searchsorted(track.stamps, edges))
        return Frames(
            stamps=stamps,
            states=np.stack([selection.state for selection in selections]),
            images={
                name: np.array([selection.pictures[name] for selection in selections], np.int64)
                for name in self._contract.camera_names
            },
            track=Track(track.stamps[part], track.actions[part]),
            prompt=prompt,
        )


def track_of(commands: Sequence[Command], dt_ns: int, hold_ns: int, *, joints: int) -> Track:
    """What was executed, as ``executed_action`` says it: once per control step, from when a command begins.

    A command counts until the next one, of two that begin together the last, but no longer than ``hold_ns`` after its
    end.
    """
    latest = {command.begin_ns: command for command in commands}
    begins = np.array(sorted(latest), np.int64)
    until = np.append(begins[1:], np.iinfo(np.int64).max)
    stamps: list[int] = []
    values: list[Any] = []
    for begin, next_begin in zip(begins.tolist(), until.tolist(), strict=True):
        command = latest[begin]
        last = command.end_ns + hold_ns
        own = [*range(begin, min(last, next_begin), dt_ns), *([last] if last < next_begin else [])]
        stamps += own
        values += [command.at(stamp) for stamp in own]
    return Track(np.array(stamps, np.int64), np.array(values, np.float32).reshape(len(stamps), joints))
