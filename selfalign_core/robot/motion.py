"""May the robot move, and where to: one state machine for live control, lock-step, tests and any other loop.

:meth:`Motion.on` takes what happened (a control step, the answer of an inference, a person's word) and both clocks, and
says what is to be done: a command, an inference. It promises, whatever it is fed:

- no command is further from the last one than the contract's speed times *steady* time;
- the first command after a hold starts at the measured pose, and at none that a robot cannot have come to;
- a hold is where the robot was told to be last, never ahead on the path;
- nothing moves while a person's word is against it, and nothing begun before that word moves the robot after it.

Must know neither ROS nor threads nor models: events come one after another, and messages are the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from selfalign_core.errors import InputError
from selfalign_core.robot.calibration import Calibration
from selfalign_core.robot.chunking import DelayEstimate, Handover
from selfalign_core.robot.clocks import NS_PER_S, Clocks, Now
from selfalign_core.robot.commands import CommandLimiter, CommandPath, plan_path, step_in_force
from selfalign_core.robot.contract import RobotContract
from selfalign_core.robot.measured import Pose, Tracking, believed_pose
from selfalign_core.robot.types import ActionChunk

INACTIVE = "inactive"
FIRST_CHUNK = "waiting for the first chunk"

LEASH = 0.05
"""How far from where it started an untrained model may move a joint [rad or m]."""

_READING_NS = NS_PER_S // 1000  # at most between the readings of two clocks that are read one after the other


# --- what happens ---


@dataclass(frozen=True)
class Seen:
    """An observation that may be acted on. ``stamp_ns``: of its oldest image. ``measured``: (joints,), its joint state.

    ``poses``: asked for the newest measured poses, oldest first, whenever motion starts.
    """

    stamp_ns: int
    measured: np.ndarray
    poses: Callable[[], Sequence[Pose]]


@dataclass(frozen=True)
class Word:
    """A person's word, in force until the next one: why the robot may not move; "" if it may."""

    against: str


@dataclass(frozen=True)
class Look:
    """A control step. ``seen``: what is to be acted on, or why nothing is."""

    seen: Seen | str


@dataclass(frozen=True)
class Answer:
    """The inference of ``ticket`` has ended, with a chunk or with why there is none."""

    ticket: Ticket
    chunk: ActionChunk | str
    seen: Seen | str


@dataclass(frozen=True)
class Calibrate:
    """Put the calibration motion in place of the policy's chunks; see :class:`Calibration`."""

    seen: Seen | str
    around: Literal["here", "home"]
    duration_s: float
    amplitude: float
    seed: int


@dataclass(frozen=True)
class EndCalibration:
    """The policy gets the robot back; from home on, if that is where the motion is still on its way to."""


Event = Word | Look | Answer | Calibrate | EndCalibration


# --- what is to be done ---


@dataclass(frozen=True)
class Trajectory:
    """For a trajectory controller: to follow ``path``, which counts in ROS time."""

    path: CommandPath
    stamp_ns: int


@dataclass(frozen=True)
class Halt:
    """For a trajectory controller: to be at ``position`` (joints,) so long after this arrives, and to stay there."""

    position: np.ndarray
    duration_ns: int


@dataclass(frozen=True)
class Position:
    """For a forward controller: to be at ``position`` (joints,)."""

    position: np.ndarray


@dataclass(frozen=True)
class Ticket:
    """An inference that is to be started, and what its chunk takes over from. ``round``: void when motion was ended."""

    round: int
    handover: Handover | None


@dataclass
class Order:
    """What is to be done after an event.

    ``executed``: (joints,) commanded position now in force. ``inference``: one is to be started. ``jumped``: time has,
    and what was received before is void. ``dropped``: the answer of an inference that motion has ended since.
    ``refusal``: why a calibration does not begin, or end. ``calibration``: how one has just ended.
    """

    command: Trajectory | Halt | Position | None = None
    executed: np.ndarray | None = None
    inference: Ticket | None = None
    jumped: bool = False
    dropped: bool = False
    refusal: str = ""
    calibration: str = ""


# --- states ---


@dataclass(frozen=True)
class Told:
    """``position`` (joints,) commanded for ``now``. On a course: that of its path at ``path_ns``."""

    position: np.ndarray
    now: Now
    path_ns: int = 0


@dataclass(frozen=True)
class Course:
    """What a trajectory controller follows.

    ``path``: in the controller's time, which begins as ROS time and goes on as steady time. ``by_ros_time``: where one
    is that reads ROS time whatever steady time says; they differ after a jump that is too small to show.
    ``simulated``: ROS time is, and ran at ``pace`` when this was planned.
    """

    path: CommandPath
    by_ros_time: CommandPath
    simulated: bool
    pace: float

    def told(self, last: Told, now: Now) -> Told:
        """Simulated time leads as far as steady time allows. A system's clock, which may be set, is read a little
        earlier or later than the steady one.
        """
        path_ns = self._reach_ns(last, now)
        if self.simulated or abs(now.ros_ns - path_ns) < _READING_NS:
            path_ns = min(max(now.ros_ns, last.path_ns), path_ns)
        return Told(self.path.at(path_ns), now, path_ns)

    def halt(self, last: Told, now: Now, speed: np.ndarray, dt_ns: int) -> Halt:
        """Where the robot was told to be; at most ``speed`` (joints,) for a controller that is elsewhere, too."""
        told = self.told(last, now)
        apart_s = (np.abs(self.by_ros_time.at(now.ros_ns) - told.position) / speed).max()
        beyond_ns = min(self._reach_ns(last, now), int(self.path.stamps_ns[-1])) - told.path_ns
        return Halt(told.position, max(dt_ns, round(apart_s * NS_PER_S), beyond_ns))

    def _reach_ns(self, last: Told, now: Now) -> int:
        """How far along its path steady time lets a robot be."""
        return last.path_ns + int(self.pace * now.steady_since(last.now))


@dataclass(frozen=True)
class Holding:
    """The robot stays where it was told to be last."""

    reason: str


@dataclass(frozen=True)
class Following:
    """The robot follows a chunk: the policy's, or a piece of ``calibration``.

    ``actions`` (horizon, joints): the chunk's, as far as they may be executed. ``told``: the last command. ``course``:
    None for a forward controller.
    """

    chunk: ActionChunk
    actions: np.ndarray
    told: Told
    course: Course | None = None
    calibration: Calibration | None = None


State = Holding | Following


@dataclass(frozen=True)
class Settings:
    """What may change while the robot moves.

    ``trained``, ``handover`` and ``rtc_max_delay`` are the model's (see :mod:`selfalign_core.robot.chunking`).
    ``replan_steps``: control steps from one inference to the next. ``simulated``: ROS time is.
    """

    trained: bool = True
    handover: str = "none"
    rtc_max_delay: int = 0
    replan_steps: int = 1
    simulated: bool = False


@dataclass
class Tally:
    """What has happened so far, for whoever asks."""

    holds: int = 0
    last_hold: str = ""
    late_chunks: int = 0
    calibrations: int = 0
    last_calibration: str = ""


class Motion:
    """See the module. ``commands`` False: the robot moves as a recording says, and chunks are only made."""

    def __init__(self, contract: RobotContract, *, commands: bool = True) -> None:
        self.settings = Settings(replan_steps=contract.replan_steps)
        self.state: State = Holding(INACTIVE)
        self.delay = DelayEstimate()
        self.tally = Tally()
        self.inferring = False
        self._contract, self._commands = contract, commands
        self._limiter = CommandLimiter.from_contract(contract)
        self._clocks, self._tracking = Clocks(), Tracking(contract.joints)
        self._against = INACTIVE
        self._round = 0
        self._due_ns: int | None = None  # the next inference, or piece of a calibration; None: at once
        self._anchor: np.ndarray | None = None  # where an untrained model started

    # --- what is asked of it ---

    @property
    def reason(self) -> str:
        """Why the robot holds; "" if it does not."""
        return self.state.reason if isinstance(self.state, Holding) else ""

    @property
    def calibration(self) -> Calibration | None:
        """The motion that is running in the policy's place."""
        return self.state.calibration if isinstance(self.state, Following) else None

    @property
    def not_following(self) -> str:
        """Which joint does not go where it is told to; "" if all do, and while the robot holds."""
        return self._tracking.fault

    def is_due(self, now_ns: int) -> bool:
        """Whether it is time for the next inference."""
        return self._due_ns is None or now_ns >= self._due_ns

    def on(self, now: Now, event: Event) -> Order:
        """The next state, and what is to be done. After a jump of time nothing that was seen before is acted on."""
        order = Order()
        jump = self._clocks.look(now, simulated=self.settings.simulated)
        if jump:
            order.jumped, self._due_ns = True, None
            self._ban(now, jump, order)
        match event:
            case Word(against):
                self._hear(now, against, order)
            case Look(seen):
                self._look(now, self._may_act_on(seen, jump), order)
            case Answer(ticket, chunk, seen):
                self._take(now, ticket, chunk, self._may_act_on(seen, jump), order)
            case Calibrate():
                self._calibrate(now, event, self._may_act_on(event.seen, jump), order)
            case EndCalibration():
                self._end_calibration(now, order)
        return order

    def _may_act_on(self, seen: Seen | str, jump: str) -> Seen | str:
        return jump or self._against or seen

    # --- events ---

    def _hear(self, now: Now, against: str, order: Order) -> None:
        if against:
            self._ban(now, against, order)
        elif self._against:
            self.state, self._due_ns = Holding(FIRST_CHUNK), None
        self._against = against

    def _look(self, now: Now, seen: Seen | str, order: Order) -> None:
        if isinstance(seen, str):
            self._ban(now, seen, order)
            return
        if self.calibration is not None:
            if self.is_due(now.ros_ns) and not self._follow_piece(now, self.calibration, seen, order):
                self._note_calibration("completed", order)
                self._rest(now, FIRST_CHUNK, order)
        elif not self.inferring and (isinstance(self.state, Holding) or self.is_due(now.ros_ns)):
            order.inference = self._plan_inference(now, seen)
        if isinstance(self.state, Following) and self._commands:
            self._execute(now, self.state, seen, order)

    def _take(self, now: Now, ticket: Ticket, chunk: ActionChunk | str, seen: Seen | str, order: Order) -> None:
        """A chunk is followed from now on, unless motion has been ended since it was asked for: it continues that."""
        self.inferring = False
        if ticket.round != self._round:
            order.dropped = True
            return
        if isinstance(chunk, str) or isinstance(seen, str):
            self._hold(now, chunk if isinstance(chunk, str) else str(seen), order)
            return
        try:
            following = self._plan(now, chunk, seen, order)
        except InputError as error:
            self._hold(now, str(error), order)
            return
        if following is not None:
            self.state = following
            if self._commands:
                self.delay.add(now.ros_ns - chunk.stamp_ns)
        else:
            self.tally.late_chunks += 1
            self._hold(
                now,
                f"late chunk: found its {len(chunk.actions)} actions past when it was ready, "
                f"{(now.ros_ns - chunk.stamp_ns) / NS_PER_S:.3f} s after its observation",
                order,
            )

    def _calibrate(self, now: Now, wanted: Calibrate, seen: Seen | str, order: Order) -> None:
        if self.calibration is not None or isinstance(seen, str):
            order.refusal = seen if isinstance(seen, str) else "a calibration motion is running"
            return
        try:
            calibration = Calibration.plan(
                self._contract,
                self._told_or_measured(now, seen).position,
                now.ros_ns,
                around=wanted.around,
                duration_s=wanted.duration_s,
                amplitude=wanted.amplitude,
                seed=wanted.seed + self.tally.calibrations,
            )
        except InputError as error:
            order.refusal = str(error)
            return
        if not self._follow_piece(now, calibration, seen, order):
            order.refusal = "its first piece is past"
            return
        self.tally.calibrations += 1
        self._round += 1  # the policy's next chunk shall be of what it sees when it is over

    def _end_calibration(self, now: Now, order: Order) -> None:
        """The piece that is under way goes on until the policy's first chunk is there."""
        if not isinstance(self.state, Following) or self.state.calibration is None:
            order.refusal = "no calibration motion is running"
            return
        rest = self.state.calibration.shortened(now.ros_ns)
        self.state, self._due_ns = replace(self.state, calibration=rest), None
        if rest is None:
            self._note_calibration("ended by ~/end_calibration", order)

    # --- transitions ---

    def _plan_inference(self, now: Now, seen: Seen) -> Ticket:
        self.inferring = True
        self._due_ns = now.ros_ns + self.settings.replan_steps * self._contract.dt_ns
        handover = Handover.plan(
            self.settings.handover,
            self.state.chunk if isinstance(self.state, Following) else None,
            stamp_ns=seen.stamp_ns,
            dt_ns=self._contract.dt_ns,
            delay=self.delay.steps(self._contract.dt_ns),
            rtc_max_delay=self.settings.rtc_max_delay,
        )
        return Ticket(self._round, handover)

    def _follow_piece(self, now: Now, calibration: Calibration, seen: Seen, order: Order) -> bool:
        """Follow what comes next of ``calibration``. False if nothing does."""
        piece = calibration.piece(now.ros_ns)
        following = None if piece is None else self._plan(now, piece, seen, order, calibration)
        if following is None:
            return False
        self.state = following
        self._due_ns = min(now.ros_ns + self._contract.replan_steps * self._contract.dt_ns, calibration.end_ns)
        return True

    def _plan(
        self, now: Now, chunk: ActionChunk, seen: Seen, order: Order, calibration: Calibration | None = None
    ) -> Following | None:
        """Following ``chunk`` from where the robot is told to be; None if all of it is past. Raises ``InputError``."""
        if not self._commands:
            return Following(chunk, chunk.actions, Told(seen.measured, now))
        told = self._told_or_measured(now, seen)
        anchor = self._anchor_at(told.position) if calibration is None else None
        actions = chunk.actions if anchor is None else np.clip(chunk.actions, anchor - LEASH, anchor + LEASH)
        if not np.isfinite(actions).all():
            raise InputError("chunk: found actions that are not finite; expected finite positions")
        course = self._plan_course(now, actions, chunk.stamp_ns, told.position)
        if course is None:
            return None
        self._anchor = anchor
        if self._contract.action.interface == "forward_command":
            return Following(chunk, actions, told, calibration=calibration)
        order.command = Trajectory(course.path, chunk.stamp_ns)
        return Following(chunk, actions, Told(told.position, now, now.ros_ns), course, calibration)

    def _plan_course(self, now: Now, actions: np.ndarray, stamp_ns: int, told: np.ndarray) -> Course | None:
        before = self.state.course if isinstance(self.state, Following) else None
        elsewhere = told if before is None else before.by_ros_time.at(now.ros_ns)
        simulated = self.settings.simulated
        pace = self._clocks.pace() if simulated else 1.0
        path = plan_path(
            actions,
            stamp_ns=stamp_ns,
            dt_ns=self._contract.dt_ns,
            now_ns=now.ros_ns,
            reference=told,
            limiter=self._limiter.slowed(pace),
            elsewhere=elsewhere,
        )
        return None if path is None else Course(path, path.starting_at(elsewhere), simulated, pace)

    def _execute(self, now: Now, state: Following, seen: Seen, order: Order) -> None:
        """The step that is in force now."""
        step = step_in_force(
            stamp_ns=state.chunk.stamp_ns,
            dt_ns=self._contract.dt_ns,
            horizon=len(state.actions),
            now_ns=max(now.ros_ns, state.chunk.stamp_ns),  # a camera's clock may be a little ahead
        )
        if step is None:
            self._hold(now, "late chunk: found the end of its horizon before the next chunk was ready", order)
            self.tally.late_chunks += 1
            return
        told = self._told(now, state)
        if state.course is None:
            # Two control steps can come closer together than dt after a delay; the speed limit holds all the same.
            last = state.told
            elapsed_ns = min(now.steady_since(last.now), now.ros_since(last.now), self._contract.dt_ns)
            told = Told(self._limiter.limit(state.actions[step], last.position, elapsed_ns / NS_PER_S), now)
            order.command = Position(told.position)
        self.state = replace(state, told=told)
        self._tracking.add(now.ros_ns, told.position, seen.measured)
        order.executed = told.position

    def _hold(self, now: Now, reason: str, order: Order) -> None:
        """Stop where the robot has been told to be. One that has not been told anything is told nothing."""
        if self.calibration is not None:
            self._note_calibration(f"cancelled: {reason}", order)
        if isinstance(self.state, Following):
            self.tally.holds, self.tally.last_hold = self.tally.holds + 1, reason
        self._rest(now, reason, order)

    def _rest(self, now: Now, reason: str, order: Order) -> None:
        if isinstance(self.state, Following) and self.state.course is not None:
            order.command = self.state.course.halt(self.state.told, now, self._limiter.speed, self._contract.dt_ns)
        self.state = Holding(reason)
        self._tracking = Tracking(self._contract.joints)

    def _ban(self, now: Now, reason: str, order: Order) -> None:
        """Hold, and have no inference that is under way end it."""
        self._round += 1
        self._hold(now, reason, order)

    def _note_calibration(self, outcome: str, order: Order) -> None:
        self._due_ns = None
        order.calibration = self.tally.last_calibration = outcome

    # --- where the robot is ---

    def _told_or_measured(self, now: Now, seen: Seen) -> Told:
        """Where the robot has been told to be by now; where it is, if it holds. Raises ``InputError``."""
        if isinstance(self.state, Following):
            return self._told(now, self.state)
        return Told(believed_pose(seen.poses(), self._contract.joints), now)

    def _told(self, now: Now, state: Following) -> Told:
        return state.told if state.course is None else state.course.told(state.told, now)

    def _anchor_at(self, told: np.ndarray) -> np.ndarray | None:
        """Where an untrained model that goes on from ``told`` started; anew where it is not led here by itself."""
        if self.settings.trained:
            return None
        is_led_away = self._anchor is None or (np.abs(told - self._anchor) > 2 * LEASH).any()
        return told if is_led_away else self._anchor
