"""Two clocks: ROS time, which stamps messages and may jump or be simulated, and steady time, in which robots move.

Must not know what is done when time has jumped.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass

NS_PER_S = 1_000_000_000

_JUMP_NS = NS_PER_S // 4
"""How far ROS time may run ahead of steady time from one look to the next; a system clock also how far behind."""
_LATE_READINGS = 4  # looks among which one has read simulated time that is up to date
_LOOKS = 20  # by which the pace of simulated time is judged
_NOISE = 1.1  # simulated time that seems to run faster than steady time by less runs as fast


@dataclass(frozen=True)
class Now:
    """Both clocks at one look."""

    ros_ns: int
    steady_ns: int

    @property
    def ahead_ns(self) -> int:
        """ROS time less steady time: a number that tells something in comparison only."""
        return self.ros_ns - self.steady_ns

    def steady_since(self, earlier: Now) -> int:
        """Nanoseconds, never less than none."""
        return max(0, self.steady_ns - earlier.steady_ns)

    def ros_since(self, earlier: Now) -> int:
        """Nanoseconds, never less than none."""
        return max(0, self.ros_ns - earlier.ros_ns)


class Clocks:
    """The last looks at both clocks: whether ROS time has jumped, and how fast it runs."""

    def __init__(self) -> None:
        self._looks: deque[Now] = deque(maxlen=_LOOKS)

    def look(self, now: Now, *, simulated: bool) -> str:
        """How ROS time has jumped since the last look; "" if it has not.

        Simulated time may be slow, fast, paused and stepped: only what runs ahead by itself, or back, has jumped.
        """
        jump = self._jump(now, simulated) if self._looks else ""
        if jump:
            self._looks.clear()
        self._looks.append(now)
        return jump

    def pace(self) -> float:
        """How many times faster than steady time ROS time runs, at least 1."""
        if len(self._looks) < _LOOKS // 2:
            return 1.0
        first, last = self._looks[0], self._looks[-1]
        pace = last.ros_since(first) / max(1, last.steady_since(first))
        return pace if pace > _NOISE else 1.0

    def _jump(self, now: Now, simulated: bool) -> str:
        last = self._looks[-1]
        if now.ros_ns < last.ros_ns:
            return "time jumped back"
        lately = itertools.islice(reversed(self._looks), _LATE_READINGS if simulated else 1)
        ahead_ns = now.ahead_ns - max(look.ahead_ns for look in lately)
        behind_ns = 0 if simulated else last.ahead_ns - now.ahead_ns
        if max(ahead_ns, behind_ns) <= _JUMP_NS:
            return ""
        where, by = ("ahead", "more") if ahead_ns > 0 else ("back", "less")
        seconds = abs(ahead_ns) / NS_PER_S
        return f"time jumped {where}: found {seconds:.3f} s {by} than went by; expected ROS time to go on steadily"
