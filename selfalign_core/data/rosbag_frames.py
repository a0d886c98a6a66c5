"""How a frame of the dataset is put together from recorded topics, at a tick of the control rate.

- image of every camera and joint state: the newest one stamped (header) at or before the tick, never a later one;
  if it is older than the contract allows, the tick is dropped and counted
- action: the one in force in the middle of the step that starts at the tick (the rule of the online buffer): from
  ``executed_action`` by header stamp, or, in bags of robots that SelfAlign did not drive, from the contract's command
  topic by receive stamp
- prompt: the one in force at the tick, by receive stamp, from the topic ``prompt``; none before the first (play)
- ticks that follow one another make an episode; a dropped tick, a jump of time or another prompt ends it

Knows stamps and numbers, but neither bags nor images.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from selfalign_core.data.rosbag_options import Options
from selfalign_core.robot.contract import RobotContract

_NS = 1_000_000_000
_OLDEST_ACTION = 1.5  # control steps that an action stays in force if no other comes


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


def make_frames(segment: Segment, contract: RobotContract, options: Options, counters: Counter[str]) -> list[Frames]:
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
