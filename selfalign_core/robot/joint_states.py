"""Where the joints are, from messages that need not name every joint: arm, gripper and base may each send their own.

A message says something of the contract's joints that it names with a position; one that does so of none is no state.
Each joint is where the newest message that names it says, and all together are as old as the oldest of these messages.
Messages that contradict each other are found by how far a joint can have moved from one to the next.

Must know neither ROS nor limits of age: what is too old is for ``selfalign_core.robot.frames`` to say.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from selfalign_core.errors import InputError
from selfalign_core.robot.contract import Joint
from selfalign_core.robot.measured import Pose, Reach

# Enough to reach back past the oldest image allowed and the limit for frozen cameras, at a thousand per second.
_READINGS_KEPT = 1024
_NAMES_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Reading:
    """What one message says of a contract's joints.

    ``named``: bit i is set if it says something of joint i; 0: it is no state, for the reason ``problem``.
    ``positions``: (joints,) float64 in contract order, of which only the joints named count; None if there is a
    ``problem`` with them.
    """

    named: int
    positions: np.ndarray | None
    problem: str = ""

    @classmethod
    def whole(cls, positions: np.ndarray) -> Reading:
        """Of all joints, (joints,) float64."""
        return cls(everything(len(positions)), positions)

    @classmethod
    def unusable(cls, joints: int, problem: str) -> Reading:
        """Of so many joints, of which nobody can say where they are."""
        return cls(everything(joints), None, problem)

    def all_positions(self, joint_names: Sequence[str]) -> np.ndarray:
        """(joints,) float64. Raises ``InputError`` if there is a problem, or if joints are missing."""
        if self.positions is None:
            raise InputError(self.problem)
        if missing := names_of(everything(len(joint_names)) & ~self.named, joint_names):
            named = names_of(self.named, joint_names)
            raise InputError(f"found joints {named}; expected also {missing}")
        return self.positions


def everything(joints: int) -> int:
    """The bits of all joints."""
    return (1 << joints) - 1


def names_of(bits: int, joint_names: Sequence[str]) -> list[str]:
    return [joint_names[column] for column in _columns(bits)]


def read_joints(names: Sequence[str], positions: Sequence[float], joint_names: Sequence[str]) -> Reading:
    """The reading of a message that has ``positions`` for ``names``; joints that are not the contract's are ignored.

    Nothing takes longer than in proportion to the message, and no text grows with it.
    """
    column_of = _places(tuple(joint_names))
    found = [(column_of[name], place) for place, name in enumerate(names) if name in column_of]
    if not found:
        return Reading(0, None, f"found joints {_shown(names)}; expected some of {_shown(joint_names)}")
    if not len(positions):
        return Reading(0, None, f"found joints {_shown(names)} without positions; expected a position for each")
    named = 0
    for column, _ in found:
        named |= 1 << column
    if len(positions) != len(names):
        problem = f"found {len(positions)} positions for {len(names)} names; expected as many"
        return Reading(named, None, problem)
    if len(set(names)) != len(names):
        doubled = [name for name, count in Counter(names).items() if count > 1]
        return Reading(named, None, f"found joints {_shown(doubled)} more than once; expected each once")
    values = np.full(len(joint_names), np.nan)
    for column, place in sorted(found):
        values[column] = position = positions[place]
        if not math.isfinite(position):
            problem = f"joint {joint_names[column]}: found {position}; expected a finite position"
            return Reading(named, None, problem)
    return Reading(named, values)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A reading at its stamp; of the joints ``named`` alone, which may be fewer than the reading's.

    ``clash``: how it contradicts one of its stamp that came before it. ``jump``: how it contradicts older ones.
    """

    stamp_ns: int
    named: int
    reading: Reading
    clash: str = ""
    jump: str = ""

    @property
    def doubt(self) -> str:
        return self.clash or self.jump

    def pose(self) -> Pose:
        """NaN where it says nothing of a joint."""
        positions = self.reading.positions
        assert positions is not None
        if self.named != everything(len(positions)):
            positions = np.where(_mask(self.named, len(positions)), positions, np.nan)
        return Pose(self.stamp_ns, positions)


@dataclass(frozen=True)
class Known:
    """What is known of the joints at a time.

    ``entries``: bits of joints and the entry that says where these are, newest first. ``missing``: bits of the joints
    that nothing is known of.
    """

    entries: tuple[tuple[int, _Entry], ...]
    missing: int

    @property
    def is_whole(self) -> bool:
        """Whether one message says it all."""
        return len(self.entries) == 1 and not self.missing

    @property
    def newest_ns(self) -> int:
        return max(entry.stamp_ns for _, entry in self.entries)

    @property
    def oldest_ns(self) -> int:
        """The stamp of the whole: that of its oldest joint."""
        return min(entry.stamp_ns for _, entry in self.entries)

    @property
    def oldest(self) -> int:
        """Bits of the oldest joints."""
        return min(self.entries, key=lambda part: part[1].stamp_ns)[0]

    @property
    def problem(self) -> str:
        """What makes it unusable; "" if nothing does."""
        return next((entry.reading.problem for _, entry in self.entries if entry.reading.positions is None), "")

    def positions(self) -> np.ndarray:
        """(joints,) float64. Raises ``InputError`` if there is a problem with them."""
        if self.problem:
            raise InputError(self.problem)
        parts = [(bits, entry.reading.positions) for bits, entry in self.entries]
        together = parts[0][1]
        assert together is not None
        for bits, positions in parts[1:]:
            assert positions is not None
            together = np.where(_mask(bits, len(together)), positions, together)
        return together

    def stamps(self, joints: int) -> int | np.ndarray:
        """That of the message that says it all, or (joints,) int64, one for each."""
        if self.is_whole:
            return self.oldest_ns
        stamps = np.zeros(joints, np.int64)
        for bits, entry in self.entries:
            stamps[_mask(bits, joints)] = entry.stamp_ns
        return stamps


class JointStates:
    """The recent readings of a robot's ``joints``, in order of stamps."""

    def __init__(self, joints: Sequence[Joint]) -> None:
        self._all, self._reach = everything(len(joints)), Reach(joints)
        self._entries: deque[_Entry] = deque()
        self._newest: dict[int, int] = {}  # joint -> stamp

    def __len__(self) -> int:
        return len(self._entries)

    def newest_stamp(self, named: int) -> int | None:
        """Of the readings that name one of these joints; None if there are none."""
        return max((self._newest[column] for column in _columns(named) if column in self._newest), default=None)

    def add(self, stamp_ns: int, reading: Reading) -> str:
        """In its place among the others; it takes that of those at its stamp which name no other joint.

        Returns how it contradicts them; "" if it does not.
        """
        entries, new = self._entries, _Entry(stamp_ns, reading.named, reading)
        for column in _columns(reading.named):
            self._newest[column] = max(stamp_ns, self._newest.get(column, stamp_ns))
        place = len(entries)
        while place and entries[place - 1].stamp_ns > stamp_ns:
            place -= 1
        behind = place
        while behind and entries[behind - 1].stamp_ns == stamp_ns:
            behind -= 1
            new = replace(new, clash=new.clash or entries[behind].clash or self._clash(entries[behind], new))
            if not entries[behind].named & ~new.named:
                del entries[behind]
                place -= 1
        if len(entries) >= _READINGS_KEPT:
            if not place:
                return ""  # the oldest of a full memory leaves, be it this one
            entries.popleft()
            place -= 1
        entries.insert(place, new)
        self._judge(place)
        rest = new.named
        for later in range(place + 1, len(entries)):
            if not rest:
                break
            if bits := entries[later].named & rest:
                self._judge(later)
                rest &= ~bits
        return entries[place].doubt

    def doubt(self, since_ns: int, least: int) -> str:
        """How one of the readings contradicts those before it, if any stamped since or of the ``least`` newest does."""
        for number, entry in enumerate(reversed(self._entries)):
            if number >= least and entry.stamp_ns < since_ns:
                break
            if entry.doubt:
                return entry.doubt
        return ""

    def _clash(self, before: _Entry, after: _Entry) -> str:
        is_readable = before.reading.positions is not None and after.reading.positions is not None
        return self._reach.beyond(before.pose(), after.pose()) if is_readable else ""

    def _judge(self, place: int) -> None:
        """Note how the entry there contradicts what was said of its joints before."""
        entry, behind = self._entries[place], place
        if entry.reading.positions is None:
            return
        jump, missing = "", entry.named
        while missing and behind and not jump:
            behind -= 1
            before = self._entries[behind]
            if bits := before.named & missing if before.reading.positions is not None else 0:
                jump = self._reach.beyond(replace(before, named=bits).pose(), entry.pose())
                missing &= ~bits
        if jump != entry.jump:
            self._entries[place] = replace(entry, jump=jump)

    def forget(self, named: int) -> None:
        """All that was said of these joints."""
        rest = [replace(entry, named=bits) for entry in self._entries if (bits := entry.named & ~named)]
        self._entries = deque(rest)
        for column in _columns(named):
            self._newest.pop(column, None)

    def newest(self) -> Known:
        """What is known now."""
        return self._gather(reversed(self._entries))

    def at(self, stamp_ns: int) -> Known:
        """What was known by ``stamp_ns``: nothing newer."""
        return self._gather(entry for entry in reversed(self._entries) if entry.stamp_ns <= stamp_ns)

    def around(self, stamp_ns: int) -> Known:
        """What was known by ``stamp_ns``, and of joints that nothing was known of then, what is known first."""
        known = self.at(stamp_ns)
        if not known.missing:
            return known
        first = self._gather(self._entries, known.missing)
        return Known((*reversed(first.entries), *known.entries), first.missing)

    def recent(self, count: int) -> Iterable[Known]:
        """What is known now, and what was known when each of the messages before the newest came, newest first."""
        stamps = [self._entries[-1 - back].stamp_ns for back in range(min(count, len(self._entries)))]
        return (self.at(stamp_ns) for stamp_ns in stamps)

    def _gather(self, entries: Iterable[_Entry], missing: int | None = None) -> Known:
        missing, found = self._all if missing is None else missing, []
        for entry in entries:
            if bits := entry.named & missing:
                found.append((bits, entry))
                missing &= ~bits
                if not missing:
                    break
        return Known(tuple(found), missing)


@lru_cache(maxsize=256)
def _columns(bits: int) -> tuple[int, ...]:
    return tuple(column for column in range(bits.bit_length()) if bits >> column & 1)


@lru_cache(maxsize=256)
def _mask(bits: int, joints: int) -> np.ndarray:
    """(joints,) bool."""
    return np.array([bool(bits >> column & 1) for column in range(joints)])


@lru_cache(maxsize=16)
def _places(joint_names: tuple[str, ...]) -> dict[str, int]:
    return {name: column for column, name in enumerate(joint_names)}


def _shown(names: Sequence[str]) -> str:
    shown = [name[:64] for name in names[:_NAMES_SHOWN]]
    return f"{shown}" if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"
