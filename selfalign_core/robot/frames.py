"""From messages to observations and transitions: the one rule of the nodes, the bag converter and whoever compares.

- An *observation* is made at a tick of the control rate, of what has arrived by then: the newest picture of every
  camera, and the newest joint state that is not newer than the oldest of these pictures. Its stamp is that picture's.
- A *joint state* is put together of the messages that name the contract's joints: of each joint the newest, and the
  whole as old as the oldest of these. Messages that name none of the contract's joints are ignored. While messages
  contradict each other (a joint would have moved faster than it can), and for a moment after, none is believed.
- It becomes a *frame* if it is newer than the last one.
- A *transition* of K actions begins at a frame and ends at the frame nearest to K control steps later. Action i is the
  one in force in the middle of its step. What is missing is never made up: then there is no transition.

"Newest" is by header stamp, so nothing depends on the order in which messages arrive. Knows stamps, not clocks; must
not know ROS, bags or images.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from selfalign_core.errors import InputError
from selfalign_core.robot.contract import Camera, RobotContract
from selfalign_core.robot.frozen import FreezeLimits, PictureRun
from selfalign_core.robot.images import BytesLike
from selfalign_core.robot.joint_states import JointStates, Known, Reading, names_of
from selfalign_core.robot.measured import Pose

_NS_PER_S = 1_000_000_000
DISORDER_NS = _NS_PER_S // 4
"""Messages of one topic may overtake each other by this much. One that is older began a new time."""
IMPLAUSIBLE = "implausible joint_states"
"""The cause of the fault that joint states contradict each other."""

_POSES = 5  # that have to agree before motion starts: foreign ones come in between, or a few in a row
_AGREE_NS = (
    _NS_PER_S // 2
)  # for so long, and over as many joint states, the joints have to be where they can have come to
_ORDERLY = 20  # messages on the joint-state topic, of which no more than two may begin a new time


# --- order ---


class Order(enum.Enum):
    """Where a stamp lies beside the newest one before it."""

    NEWER = enum.auto()
    EQUAL = enum.auto()
    LATE = enum.auto()
    """Overtaken on its way."""
    RESTARTED = enum.auto()
    """Too old for that: time, or what measures it, began anew."""


def order_of(stamp_ns: int, newest_ns: int | None, disorder_ns: int) -> Order:
    """``newest_ns``: None if there is none yet. ``disorder_ns``: by how much a stamp may be late."""
    if newest_ns is None or stamp_ns > newest_ns:
        return Order.NEWER
    if stamp_ns == newest_ns:
        return Order.EQUAL
    return Order.LATE if stamp_ns >= newest_ns - disorder_ns else Order.RESTARTED


# --- observations ---


class Fault(InputError):
    """Why there is no observation. ``cause`` is a short name for it, the same for every stamp and number."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True)
class Selection:
    """The messages of one observation.

    ``pictures``: camera name -> what was added for it. ``state``: (joints,) float64, contract order and units.
    ``stamp_ns``: that of the oldest picture, which is ``oldest``'s.
    """

    pictures: dict[str, Any]
    state: np.ndarray
    stamp_ns: int
    oldest: str


@dataclass(frozen=True)
class _Picture:
    stamp_ns: int
    payload: Any
    problem: str


def _nothing_received(topic: str) -> str:
    return f"no message received on {topic}"


class SensorFrames:
    """The newest picture of every camera and the recent joint states of a contract, as messages arrive.

    Of a message that was overtaken, a joint state is put in its place among the others; a picture is dropped. When a
    topic's stamps fall back by more than :data:`DISORDER_NS`, what was kept of that topic is forgotten; of the joints
    that the message names, if it is a joint state.

    ``counts``: of messages that are no joint state (``foreign joint states``), and of those that contradict the ones
    before (``implausible joint states``).
    ``absence``: topic -> why nothing has arrived, for errors. ``freeze_limits`` is asked whenever they count; by
    default nobody looks whether a camera is frozen.
    """

    def __init__(
        self,
        contract: RobotContract,
        *,
        absence: Callable[[str], str] = _nothing_received,
        freeze_limits: Callable[[], FreezeLimits] = FreezeLimits,
    ) -> None:
        self._contract, self._absence, self._freeze_limits = contract, absence, freeze_limits
        self.counts: Counter[str] = Counter()
        self.clear()

    def clear(self) -> None:
        """Forget everything received, for instance after time jumped back."""
        self._pictures: dict[str, _Picture] = {}
        self._runs = {name: PictureRun() for name in self._contract.camera_names}
        self._states = JointStates(self._contract.joints)
        self._restarts: deque[bool] = deque(maxlen=_ORDERLY)  # of each message, whether it began a new time
        self._ignored = ""  # why the newest message was no joint state; "" if it was one

    def add_picture(
        self, camera: str, stamp_ns: int, payload: Any, *, content: BytesLike = b"", problem: str = ""
    ) -> Order:
        """``payload`` comes out as it goes in. ``content``: its bytes, by which a frozen camera is found, and which
        must not change later. ``problem``: what makes it unusable, to be said when it is needed.
        """
        newest = self._pictures.get(camera)
        order = order_of(stamp_ns, newest.stamp_ns if newest else None, DISORDER_NS)
        if order is Order.LATE:
            return order
        if order is Order.RESTARTED:
            self._runs[camera] = PictureRun()
        self._pictures[camera] = _Picture(stamp_ns, payload, problem)
        if self._freeze_limits().after_s:
            self._runs[camera].add(content, stamp_ns)
            self._note_poses()
        return order

    def add_state(self, stamp_ns: int, reading: Reading) -> Order | None:
        """Where its stamp lies among those of the joints that it names; None if it names none, and is ignored."""
        self._ignored = "" if reading.named else reading.problem
        if not reading.named:
            self.counts["foreign joint states"] += 1
            return None
        order = order_of(stamp_ns, self._states.newest_stamp(reading.named), DISORDER_NS)
        if order is Order.RESTARTED:
            self._states.forget(reading.named)
        self._restarts.append(order is Order.RESTARTED)
        if self._states.add(stamp_ns, reading) or self._disorder():
            self.counts["implausible joint states"] += 1
        self._note_poses()
        return order

    def select(self, now_ns: int) -> Selection:
        """The observation at ``now_ns``.

        The newest picture of each camera, and the newest joint state that is not newer than the oldest of them.
        Raises ``Fault`` naming the topic when anything is missing, too old, from the future, misnamed, NaN or frozen.
        """
        pictures = {camera.name: self._picture(camera, now_ns) for camera in self._contract.cameras}
        stamps = {name: picture.stamp_ns for name, picture in pictures.items()}
        oldest = min(stamps, key=stamps.__getitem__)
        self._check_skew(stamps, oldest)
        state = self._state_for(stamps[oldest], now_ns)
        self._check_pictures()
        payloads = {name: picture.payload for name, picture in pictures.items()}
        return Selection(payloads, state, stamps[oldest], oldest)

    def poses(self) -> list[Pose]:
        """The newest measured poses, oldest first, back to one that cannot be read. Raises ``InputError``."""
        poses = [self._pose(self._newest_state())]
        for known in itertools.islice(self._states.recent(_POSES), 1, None):
            if known.missing or known.problem:
                break
            poses.insert(0, self._pose(known))
        return poses

    def newest_stamps(self) -> dict[str, int]:
        """Topic -> stamp of its newest message, of those that have one; of joint states, that of the oldest joint."""
        cameras = {camera.name: camera.topic for camera in self._contract.cameras}
        stamps = {cameras[name]: picture.stamp_ns for name, picture in self._pictures.items()}
        if len(self._states):
            stamps[self._contract.joint_state_topic] = self._states.newest().oldest_ns
        return stamps

    def _pose(self, known: Known) -> Pose:
        return Pose(known.stamps(len(self._contract.joints)), self._read(known))

    def _picture(self, camera: Camera, now_ns: int) -> _Picture:
        source, picture = f"camera {camera.name}", self._pictures.get(camera.name)
        if picture is None:
            raise Fault(f"stale {camera.name}", f"{source}: {self._absence(camera.topic)}")
        if picture.problem:
            raise Fault(f"unusable {camera.name}", f"{source} ({camera.topic}): {picture.problem}")
        limit_s = self._contract.max_image_age_s
        self._check_age(camera.name, f"{source} ({camera.topic})", picture.stamp_ns, now_ns, limit_s)
        return picture

    def _check_skew(self, stamps: dict[str, int], oldest: str) -> None:
        newest = max(stamps, key=stamps.__getitem__)
        skew_s = (stamps[newest] - stamps[oldest]) / _NS_PER_S
        if skew_s > self._contract.max_camera_skew_s:
            raise Fault(
                "camera skew",
                f"cameras {oldest} and {newest}: found images {skew_s:.3f} s apart; expected at most "
                f"{self._contract.max_camera_skew_s} s",
            )

    def _newest_state(self) -> Known:
        """Raises ``Fault`` if nothing is known of some joint."""
        known, topic = self._states.newest(), self._contract.joint_state_topic
        if known.entries and known.missing:
            names = ", ".join(self._names(known.missing))
            found = f"found no message that names {names}; expected all of the contract's"
            raise Fault("stale joint_states", f"joint states ({topic}): {found}")
        if known.missing:
            found = f" ({topic}): {self._ignored}" if self._ignored else f": {self._absence(topic)}"
            raise Fault("stale joint_states", f"joint states{found}")
        return known

    def _state_for(self, stamp_ns: int, now_ns: int) -> np.ndarray:
        """Where the joints were at ``stamp_ns``, the oldest image's, (joints,) float64."""
        newest = self._newest_state()
        self._check_joints_age(newest, now_ns)
        # The newest one is checked even if an older one is used: a robot that reports NaN now must not move now.
        self._read(newest)
        state = self._states.at(stamp_ns)
        self._check_plausible(newest, state)
        if state.missing:
            ahead_s = (self._states.around(stamp_ns).newest_ns - stamp_ns) / _NS_PER_S
            source = self._source(state.missing if state.entries else 0, " at the oldest image")
            raise Fault(
                "stale joint_states", f"{source}: found the first {ahead_s:.3f} s after it; expected one not newer"
            )
        # After a gap the one before the images can be far older than they are: where the robot was, not is.
        self._check_joints_age(state, stamp_ns, " at the oldest image")
        return self._read(state)

    def _check_plausible(self, newest: Known, state: Known) -> None:
        """Raises ``Fault`` while joint states contradict each other, or did between ``state`` and now."""
        since_ns = min([newest.newest_ns - _AGREE_NS, *([state.oldest_ns] if state.entries else [])])
        if doubt := self._disorder() or self._states.doubt(since_ns, _POSES):
            raise Fault(
                IMPLAUSIBLE,
                f"joint states ({self._contract.joint_state_topic}): {doubt}, and states that agree for "
                f"{_AGREE_NS / _NS_PER_S} s",
            )

    def _disorder(self) -> str:
        """How stamps of joint states fall back again and again, as those of two clocks do; "" if they do not."""
        count = sum(self._restarts)
        found = f"found stamps that fell back {count} times in {len(self._restarts)} messages"
        return f"{found}; expected stamps that rise" if count > 2 else ""

    def _check_joints_age(self, known: Known, at_ns: int, when: str = "") -> None:
        source = self._source(0 if known.is_whole else known.oldest, when)
        limit_s = self._contract.max_joint_state_age_s
        is_silent = self._ignored and at_ns - known.newest_ns > limit_s * _NS_PER_S
        note = f"; the newest message is ignored: {self._ignored}" if is_silent else ""
        for stamp_ns in (known.oldest_ns, known.newest_ns):
            self._check_age("joint_states", source, stamp_ns, at_ns, limit_s, note)

    def _source(self, bits: int, when: str) -> str:
        """``bits``: of the joints whose messages are meant; 0: of messages that name them all."""
        of = f" of {', '.join(self._names(bits))}" if bits else ""
        return f"joint states{of}{when} ({self._contract.joint_state_topic})"

    def _names(self, bits: int) -> list[str]:
        return names_of(bits, self._contract.joint_names)

    def _read(self, known: Known) -> np.ndarray:
        try:
            return known.positions()
        except InputError as error:
            raise Fault("unusable joint_states", f"{self._contract.joint_state_topic}: {error}") from None

    def _check_age(self, name: str, source: str, stamp_ns: int, now_ns: int, limit_s: float, note: str = "") -> None:
        age_s = (now_ns - stamp_ns) / _NS_PER_S
        if age_s > limit_s:
            raise Fault(f"stale {name}", f"{source}: found age {age_s:.3f} s; expected at most {limit_s} s{note}")
        if -age_s > (ahead_s := min(limit_s, self._contract.dt)):
            raise Fault(
                f"future {name}",
                f"{source}: found a stamp {-age_s:.3f} s in the future; expected synchronised clocks, "
                f"at most {ahead_s} s apart",
            )

    # --- frozen cameras ---

    def _note_poses(self) -> None:
        """Where the joints were when a camera's picture was first seen, once joint states have passed that stamp.

        So it does not matter which of the two arrived first.
        """
        for run in self._runs.values():
            if not run.waits_for_pose:
                continue
            newest = self._states.newest()
            if not newest.missing and newest.oldest_ns > run.since_ns:
                with contextlib.suppress(Fault):  # a state that says nothing; ``select`` names it
                    run.pose = self._positions_at(run.since_ns)

    def _positions_at(self, stamp_ns: int) -> np.ndarray:
        """Where the joints were, or where they are first known to have been, (joints,). Raises ``Fault``."""
        return self._read(self._states.around(stamp_ns))

    def _check_pictures(self) -> None:
        limits = self._freeze_limits()
        for camera in self._contract.cameras:
            if fault := self._runs[camera.name].fault(limits, self._contract.joints, self._positions_at):
                raise Fault(f"frozen {camera.name}", f"camera {camera.name} ({camera.topic}): {fault}")


# --- transitions ---


Within = tuple[np.ndarray | int, np.ndarray | int]
"""(begin, end) of the part of an array of stamps to look in: one for all, or (n,) one for each row asked for."""


@dataclass(frozen=True)
class Pairs:
    """For n rows: ``next`` (n,) int64, place of the frame at the end, ``actions`` (n, horizon) int64, places of the
    actions; both mean something only where ``complete`` (n,) bool is True.
    """

    next: np.ndarray
    actions: np.ndarray
    complete: np.ndarray


class Pairing:
    """Which frames and executed actions belong together. All stamps are int64 ns and rise within the part looked in.

    ``dt_ns``: between two actions. ``tolerance_ns``: how far a frame or an action may lie from its due time; half of
    ``dt_ns`` unless given.
    """

    def __init__(self, dt_ns: int, tolerance_ns: int | None = None) -> None:
        self.dt_ns = dt_ns
        self.tolerance_ns = dt_ns // 2 if tolerance_ns is None else tolerance_ns

    def due(self, stamps_ns: np.ndarray, count: int) -> np.ndarray:
        """When each of the ``count`` actions from ``stamps_ns`` (n,) on begins, (n, count)."""
        return stamps_ns[:, None] + np.arange(count, dtype=np.int64) * self.dt_ns

    def nearest(self, stamps_ns: np.ndarray, due_ns: np.ndarray, within: Within) -> np.ndarray:
        """Places of the frames nearest to ``due_ns`` (n,), however far; of two as near, the earlier one."""
        begin, end = within
        before = _newest_not_after(stamps_ns, due_ns, within)
        left, right = np.maximum(before, begin), np.minimum(before + 1, end - 1)
        return np.where(abs(stamps_ns[right] - due_ns) < abs(stamps_ns[left] - due_ns), right, left)

    def is_near(self, stamps_ns: np.ndarray, due_ns: np.ndarray) -> np.ndarray:
        return abs(stamps_ns - due_ns) <= self.tolerance_ns

    def newest(self, stamps_ns: np.ndarray, due_ns: np.ndarray, within: Within) -> np.ndarray:
        """Places of the newest actions by the middle of the steps that begin at ``due_ns`` (n, ...), however old; one
        before the part where there is none.
        """
        return _newest_not_after(stamps_ns, due_ns + self.tolerance_ns, within)

    def in_force(self, stamps_ns: np.ndarray, due_ns: np.ndarray, within: Within) -> tuple[np.ndarray, np.ndarray]:
        """Places of the actions in force in the steps that begin at ``due_ns`` (n, ...), and where there is one, bool.

        An action is in force until the next one, but no longer than a step and the tolerance.
        """
        newest = self.newest(stamps_ns, due_ns, within)
        known = newest >= _columns(within[0], due_ns.ndim)
        age = due_ns - stamps_ns[np.maximum(newest, 0)] if len(stamps_ns) else np.zeros_like(due_ns)
        return newest, known & (age <= self.dt_ns + self.tolerance_ns)

    def pair(
        self,
        frames_ns: np.ndarray,
        actions_ns: np.ndarray,
        rows: np.ndarray,
        horizon: int,
        *,
        frames_within: Within,
        actions_within: Within,
    ) -> Pairs:
        """The transitions of ``horizon`` actions that begin at the frames ``rows`` (n,)."""
        begins = frames_ns[rows]
        ends = begins + horizon * self.dt_ns
        following = self.nearest(frames_ns, ends, frames_within)
        actions, known = self.in_force(actions_ns, self.due(begins, horizon), actions_within)
        return Pairs(following, actions, self.is_near(frames_ns[following], ends) & known.all(axis=1))


def _newest_not_after(stamps_ns: np.ndarray, times_ns: np.ndarray, within: Within) -> np.ndarray:
    """Place of the newest stamp that is not after each time, in the part of the array for its row; one before the part
    where there is none. A binary search of all at once.
    """
    low, high = (np.broadcast_to(_columns(edge, times_ns.ndim), times_ns.shape).astype(np.int64) for edge in within)
    while (is_open := low < high).any():
        middle = (low + high) // 2
        is_later = stamps_ns[np.minimum(middle, len(stamps_ns) - 1)] > times_ns
        high = np.where(is_open & is_later, middle, high)
        low = np.where(is_open & ~is_later, middle + 1, low)
    return low - 1


def _columns(edge: np.ndarray | int, dimensions: int) -> np.ndarray:
    """(n,) as (n, 1, ...) with so many dimensions."""
    edge = np.asarray(edge, np.int64)
    return edge if edge.ndim == 0 else edge.reshape(len(edge), *[1] * (dimensions - 1))
