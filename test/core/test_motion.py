"""Motion keeps its promises whatever it is fed: any order of events, clocks that jump, a robot that lags or is moved.

``TestAnyOrder`` judges by a controller as robots have it, and by comparing commands with the steady time between them.
``MOTION_RUNS`` and ``MOTION_STEPS`` say how many runs of how many steps; ``make motion-property`` takes 2,000 of 200.
"""

from __future__ import annotations

import os
from collections import deque
from typing import Literal

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from selfalign_core.robot.clocks import Clocks, Now
from selfalign_core.robot.commands import CommandPath
from selfalign_core.robot.contract import ActionInterface, Camera, Joint, RobotContract
from selfalign_core.robot.measured import Pose
from selfalign_core.robot.motion import (
    FIRST_CHUNK,
    INACTIVE,
    LEASH,
    Answer,
    Calibrate,
    EndCalibration,
    Event,
    Following,
    Halt,
    Holding,
    Look,
    Motion,
    Order,
    Position,
    Seen,
    Settings,
    Ticket,
    Trajectory,
    Word,
)
from selfalign_core.robot.types import ActionChunk

MS, S = 1_000_000, 1_000_000_000
JOINTS = (
    Joint("lift", "rad", -1.5, 1.5, max_velocity=3.0, max_step=0.15, home=0.0),
    Joint("slide", "m", 0.0, 0.6, max_velocity=0.5, max_step=0.02, home=0.1),
)
SPEED = np.array([3.0, 0.4])
HORIZON, REPLAN = 12, 4
EPS = 1e-7


def contract(interface: str = "joint_trajectory") -> RobotContract:
    camera = Camera("front", "front/image_raw", "raw", 64, 64)
    return RobotContract(
        "arm", (camera,), "joint_states", JOINTS, ActionInterface(interface, "commands"), 20.0, REPLAN, 0.25, 0.25, 0.25
    )


DT = contract().dt_ns


class Controller:
    """Of the robot: where it is told to be now, in its own time [ns], which no message can change.

    It starts a trajectory from where it is and leaves out points that are past, as controllers do. Its time is the ROS
    time that it reads, which jumps for it as for everybody (``reads_ros``), or is its own.
    """

    def __init__(self, position: np.ndarray, reads_ros: bool) -> None:
        self.reads_ros = reads_ros
        self._path = CommandPath(np.zeros(1, np.int64), position[None])

    def at(self, own_ns: int) -> np.ndarray:
        return self._path.at(own_ns)

    def take(self, command: Trajectory | Halt | Position, own_ns: int, ros_ns: int) -> None:
        if isinstance(command, Position):
            self.be_at(command.position)
            return
        if isinstance(command, Halt):
            stamps, positions = np.array([own_ns + command.duration_ns]), command.position[None]
        else:
            stamps, positions = command.path.stamps_ns[1:] + (own_ns - ros_ns), command.path.positions[1:]
        ahead = stamps > own_ns
        assert ahead.any(), "a controller refuses a trajectory that is past"
        self._path = CommandPath(
            np.array([own_ns, *stamps[ahead]], np.int64), np.concatenate([self.at(own_ns)[None], positions[ahead]])
        )

    def be_at(self, position: np.ndarray) -> None:
        self._path = CommandPath(np.zeros(1, np.int64), position[None])


class ForeignPose(Pose):
    """Of another robot."""


def ends_inferences(event: Event, order: Order) -> bool:
    """Whether what was begun before this shall not move the robot."""
    match event:
        case Word(against):
            return bool(against)
        case Look(seen):
            return isinstance(seen, str)
        case Calibrate():
            return not order.refusal
    return False


class Robot:
    """A robot, its clocks, and a motion that drives it: every order that is given is judged here.

    ``rate``: simulated seconds per steady second. ``follows``: the share of the way to where it is told to be that the
    robot goes in a control step.
    """

    def __init__(self, interface: str, *, simulated: bool, reads_ros: bool, trained: bool = True) -> None:
        self.motion = Motion(contract(interface))
        self.motion.settings = Settings(trained=trained, handover="blend", replan_steps=REPLAN, simulated=simulated)
        self.rate, self.follows = 1.0, 1.0
        self.steady_ns = self.own_ns = 5 * S
        self.ros_ns = 1000 * S
        self.measured = np.array([0.2, 0.3])
        self.controller = Controller(self.measured, reads_ros)
        self.poses: deque[Pose] = deque([Pose(self.ros_ns, self.measured)], maxlen=5)
        self.ticket: Ticket | None = None
        self.observed_ns = 0
        self.against = INACTIVE
        self.told: tuple[np.ndarray, int] | None = None  # and when, in steady time; None while the robot holds
        self.anchor: np.ndarray | None = None
        self.begun = self.measured  # where it was when it began to follow the chunk that it follows
        self.is_judged = True  # the controller; not one that is elsewhere than any clock says, until motion starts anew
        self.has_jumped = False  # ROS time, since the last event
        self.void: Ticket | None = None  # an inference whose answer shall move nothing
        self.last = self.now

    # --- what happens to it ---

    def pass_time(self, steady_ns: int) -> None:
        before = self.setpoint()
        passed_ns = round(self.rate * steady_ns)
        self.steady_ns += steady_ns
        self.ros_ns += passed_ns
        self.own_ns += passed_ns
        after = self.setpoint()
        if self.is_judged:
            assert (np.abs(after - before) <= SPEED * passed_ns / S + EPS).all(), (after - before) / passed_ns * S
        self.measured = self.measured + self.follows * (after - self.measured)
        self.report(self.measured)

    def setpoint(self) -> np.ndarray:
        return self.controller.at(self.ros_ns if self.controller.reads_ros else self.own_ns)

    def report(self, position: np.ndarray, kind: type[Pose] = Pose) -> None:
        self.poses.append(kind(self.ros_ns, position))

    def jump_ros(self, ns: int) -> None:
        self.ros_ns = max(0, self.ros_ns + ns)
        self.has_jumped = True

    def jump_steady(self, ns: int) -> None:
        self.steady_ns = max(0, self.steady_ns + ns)
        self.is_judged = False  # no clock that a robot moves by does that

    # --- what is done about it ---

    @property
    def now(self) -> Now:
        return Now(self.ros_ns, self.steady_ns)

    def seen(self) -> Seen | str:
        if not self.poses:
            return "joint states: no message received"
        return Seen(self.ros_ns, self.poses[-1].position, lambda: list(self.poses))

    def look(self) -> Order:
        order = self.on(Look(self.seen()))
        if order.inference is not None:
            assert self.ticket is None, "two inferences at a time"
            self.ticket, self.observed_ns = order.inference, self.ros_ns
        return order

    def answer(self, actions: np.ndarray | str) -> Order:
        assert self.ticket is not None
        ticket, self.ticket = self.ticket, None
        return self.on(Answer(ticket, self.chunk(actions), self.seen()))

    def chunk(self, actions: np.ndarray | str) -> ActionChunk | str:
        if isinstance(actions, str):
            return actions
        return ActionChunk(np.asarray(actions, np.float32), DT / S, self.observed_ns, 0, 0.01)

    def on(self, event: Event) -> Order:
        before = self.motion.state
        order = self.motion.on(self.now, event)
        self.judge_clocks(order)
        has_own_time = self.motion.settings.simulated and not self.controller.reads_ros
        if has_own_time and self.has_jumped and (not order.jumped or self.rate > 1):
            self.is_judged = False  # a simulation that is not where its clock says it is
        self.has_jumped = False
        if order.jumped:
            self.poses.clear()
        if isinstance(event, Word):
            self.against = event.against
        if isinstance(event, Answer):
            assert order.dropped == (event.ticket is self.void or order.jumped)
        elif self.ticket is not None and (order.jumped or ends_inferences(event, order)):
            self.void = self.ticket
        self.judge(before, order)
        return order

    def judge_clocks(self, order: Order) -> None:
        """Whether a jump is seen, and none where there is none; of simulated time, whose pace may change, only back."""
        ros_ns, steady_ns = (getattr(self.now, name) - getattr(self.last, name) for name in ("ros_ns", "steady_ns"))
        self.last = self.now
        if not self.motion.settings.simulated:
            assert order.jumped == (ros_ns < 0 or abs(ros_ns - steady_ns) > S // 4)
        elif ros_ns < 0 or ros_ns == steady_ns:
            assert order.jumped == (ros_ns < 0)

    def judge(self, before: Following | Holding, order: Order) -> None:
        state, command = self.motion.state, order.command
        if self.against or isinstance(state, Holding):
            assert isinstance(state, Holding) and state.reason
            assert command is None or isinstance(command, Halt)
            assert order.executed is None
        if self.against:
            assert order.inference is None
        if isinstance(before, Holding):
            assert not isinstance(command, Halt), "a robot that holds already"
            if isinstance(state, Following):
                self.start()
        if isinstance(command, Trajectory):
            self.judge_told(command.path.positions[0])
        if isinstance(state, Following) and state.chunk is not getattr(before, "chunk", None):
            self.note_anchor()
        for position in (p for p in (order.executed, getattr(command, "position", None)) if p is not None):
            self.judge_told(position)
        if isinstance(command, Trajectory):
            path = command.path
            due_s = np.diff(path.stamps_ns)[:, None] / S
            assert (due_s > 0).all() and int(path.stamps_ns[0]) == self.ros_ns
            assert (np.abs(np.diff(path.positions, axis=0)) <= SPEED * due_s + EPS).all()
            self.judge_places(path.positions[1:])
        if isinstance(command, Position):
            self.judge_places(command.position[None])
        if command is not None:
            self.controller.take(command, self.ros_ns if self.controller.reads_ros else self.own_ns, self.ros_ns)
        if isinstance(state, Holding):
            self.told = None

    def start(self) -> None:
        """A hold has ended: motion starts where the robot was measured, and a foreign pose is no such place."""
        assert not isinstance(self.poses[-1], ForeignPose)
        pose = self.poses[-1].position
        self.told = pose, self.steady_ns
        self.controller.be_at(pose)
        self.is_judged = True

    def judge_told(self, position: np.ndarray) -> None:
        """No further from what was said last than the steady time since then allows."""
        assert self.told is not None and np.isfinite(position).all()
        last, since_ns = self.told
        reach = SPEED * max(0, self.steady_ns - since_ns) / S
        assert (np.abs(position - last) <= reach + EPS).all(), (position, last, reach)
        self.told = position, self.steady_ns

    def note_anchor(self) -> None:
        """A chunk is followed from now on: where an untrained model started, it or somebody else."""
        assert self.told is not None
        begin = self.told[0]
        if self.motion.settings.trained or self.motion.calibration is not None:
            self.anchor = None
        elif self.anchor is None or (np.abs(begin - self.anchor) > 2 * LEASH).any():
            self.anchor = begin
        self.begun = begin

    def judge_places(self, positions: np.ndarray) -> None:
        """Inside the limits, or on the way back; near where it started, if the model is untrained."""
        lower, upper = (np.array([getattr(joint, name) for joint in JOINTS]) for name in ("lower", "upper"))
        assert (positions >= np.minimum(lower, self.begun) - EPS).all()
        assert (positions <= np.maximum(upper, self.begun) + EPS).all()
        if self.anchor is not None:
            leash = np.maximum(LEASH, np.abs(self.begun - self.anchor))
            assert (np.abs(np.clip(positions, lower, upper) - np.clip(self.anchor, lower, upper)) <= leash + 1e-6).all()


# ---------------------------------------------------------------- any order

span_ns = st.sampled_from([1, MS, DT // 3, DT, DT, DT, DT + MS, 3 * DT, 2 * S])
jumps_ns = st.sampled_from([1, 10 * MS, 100 * MS, 240 * MS, 260 * MS, 700 * MS, 3 * S, 3600 * S])
signs = st.sampled_from([-1, 1])
places = st.tuples(st.floats(-2, 2), st.floats(-0.3, 1.0)).map(np.array)


class AnyOrder(RuleBasedStateMachine):
    @initialize(
        interface=st.sampled_from(["joint_trajectory", "joint_trajectory", "forward_command"]),
        simulated=st.booleans(),
        reads_ros=st.booleans(),
        trained=st.sampled_from([True, True, False]),
        follows=st.sampled_from([1.0, 0.5, 0.05, 0.0]),
    )
    def begin(self, interface: str, simulated: bool, reads_ros: bool, trained: bool, follows: float) -> None:
        self.robot = Robot(interface, simulated=simulated, reads_ros=reads_ros, trained=trained)
        self.robot.follows, self.trained = follows, trained
        self.robot.on(Word(""))

    @rule(steps=st.integers(1, 8), span=span_ns, ends=places, late=st.integers(1, 3))
    def go_on(self, steps: int, span: int, ends: np.ndarray, late: int) -> None:
        """Control steps as they come, answered by an inference that takes ``late`` of them."""
        robot = self.robot
        for step in range(steps):
            robot.pass_time(span)
            robot.look()
            if robot.ticket is not None and step % late == 0:
                robot.answer(np.linspace(robot.measured, ends, HORIZON))

    @rule(span=span_ns)
    def wait(self, span: int) -> None:
        self.robot.pass_time(span)

    @rule()
    def look(self) -> None:
        self.robot.look()

    @precondition(lambda self: self.robot.ticket is not None)
    @rule(
        actions=st.lists(places, min_size=HORIZON, max_size=HORIZON).map(np.array)
        | st.sampled_from(["inference failed: a test", np.full((HORIZON, 2), np.nan), np.full((HORIZON, 2), 1e30)])
    )
    def answer(self, actions: np.ndarray | str) -> None:
        self.robot.answer(actions)

    @rule(fault=st.sampled_from(["camera front: found age", "E-Token version 3 refused"]))
    def look_at_nothing(self, fault: str) -> None:
        order = self.robot.on(Look(fault))
        assert order.inference is None and self.robot.motion.reason

    @rule(against=st.sampled_from(["stopped by ~/stop", INACTIVE]), looks=st.integers(0, 2), cleared=st.booleans())
    def stop(self, against: str, looks: int, cleared: bool) -> None:
        self.robot.on(Word(against))
        for _ in range(looks):
            self.robot.pass_time(DT)
            self.robot.look()
        if cleared:
            self.robot.on(Word(""))

    @rule()
    def clear_stop(self) -> None:
        self.robot.on(Word(""))

    @rule(around=st.sampled_from(["here", "home"]), amplitude=st.sampled_from([0.02, 3.0]))
    def calibrate(self, around: Literal["here", "home"], amplitude: float) -> None:
        robot = self.robot
        was_running = robot.motion.calibration is not None
        order = robot.on(Calibrate(robot.seen(), around, 5.0, amplitude, 0))
        assert bool(order.refusal) == (was_running or robot.motion.calibration is None)

    @rule()
    def end_calibration(self) -> None:
        self.robot.on(EndCalibration())

    @rule(ns=jumps_ns, sign=signs)
    def jump_ros(self, ns: int, sign: int) -> None:
        self.robot.jump_ros(sign * ns)

    @rule(
        ns=jumps_ns,
        sign=signs,
        ends=places,
        unnoticed_ns=st.sampled_from([0, DT // 3, 3 * DT]),
        noticed=st.sampled_from(["look", "stop", "answer"]),
    )
    def jump_in_mid_motion(self, ns: int, sign: int, ends: np.ndarray, unnoticed_ns: int, noticed: str) -> None:
        robot = self.robot
        robot.on(Word(""))
        self.go_on(steps=5, span=DT, ends=ends, late=2)
        robot.jump_ros(sign * ns)
        robot.pass_time(unnoticed_ns)
        if noticed == "stop":
            robot.on(Word("stopped by ~/stop"))
        elif noticed == "answer" and robot.ticket is not None:
            robot.answer(np.tile(ends, (HORIZON, 1)))
        else:
            robot.look()
        robot.pass_time(DT // 2)

    @rule(ns=jumps_ns, sign=signs)
    def jump_steady(self, ns: int, sign: int) -> None:
        self.robot.jump_steady(sign * ns)

    @rule(rate=st.sampled_from([0.0, 0.3, 0.9, 1.0, 1.0, 3.0]))
    def change_rate(self, rate: float) -> None:
        if self.robot.motion.settings.simulated:
            self.robot.rate = rate

    @rule(place=places, held=st.booleans())
    def report_a_foreign_pose(self, place: np.ndarray, held: bool) -> None:
        """While the robot moves, or at the very moment that it would start."""
        robot = self.robot
        if held:
            robot.on(Look("a fault"))
        if not robot.poses or (np.abs(place - robot.measured) < 2.1 * SPEED * 0.3 + 0.1).all():
            return
        robot.report(place, ForeignPose)
        robot.look()
        if robot.ticket is not None:
            robot.answer(np.tile(place, (HORIZON, 1)))

    @rule(place=places)
    def move_by_hand(self, place: np.ndarray) -> None:
        if isinstance(self.robot.motion.state, Holding):
            self.robot.measured = place
            self.robot.poses.clear()  # nobody has looked for a while
            self.robot.report(place)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=int(os.environ.get("MOTION_RUNS", "100")),
    stateful_step_count=int(os.environ.get("MOTION_STEPS", "60")),
)


# ---------------------------------------------------------------- one by one


def moving(interface: str = "joint_trajectory", *, ends: tuple[float, float] = (1.2, 0.5), **options: bool) -> Robot:
    """A robot that follows its first chunk, straight to ``ends``."""
    robot = Robot(interface, **{"simulated": False, "reads_ros": False} | options)
    robot.on(Word(""))
    robot.pass_time(DT)
    robot.look()
    robot.answer(np.linspace(robot.measured, ends, HORIZON))
    assert robot.motion.reason == ""
    return robot


def control(robot: Robot, steps: int, *, ends: tuple[float, float] | None = None, steady_ns: int = DT) -> None:
    """So many control steps; inferences, towards ``ends``, end at once, or not at all."""
    for _ in range(steps):
        robot.pass_time(steady_ns)
        robot.look()
        if robot.ticket is not None and ends is not None:
            robot.answer(np.tile(ends, (HORIZON, 1)))


@pytest.mark.parametrize("reads_ros", [False, True])
@pytest.mark.parametrize("simulated", [False, True])
def test_a_clock_that_jumps_ahead_is_named_and_the_robot_stays_where_it_is(simulated: bool, reads_ros: bool) -> None:
    robot = moving(simulated=simulated, reads_ros=reads_ros)
    control(robot, 3)
    here = robot.setpoint()
    robot.jump_ros(3600 * S)
    order = robot.look()
    assert order.jumped and "time jumped ahead: found 3600.000 s more than went by" in robot.motion.reason
    assert isinstance(order.command, Halt)
    np.testing.assert_allclose(order.command.position, here)
    control(robot, 20)  # judges the way back of a controller that has jumped as well
    np.testing.assert_allclose(robot.setpoint(), here)


def test_a_system_clock_that_is_set_back_while_nobody_looks_is_named() -> None:
    robot = moving()
    robot.pass_time(S)
    robot.jump_ros(-S // 2)
    assert robot.look().jumped and "time jumped back: found 0.500 s less than went by" in robot.motion.reason


def test_whatever_is_done_to_the_systems_clock_a_robot_has_come_as_far_as_steady_time_says() -> None:
    robot = moving()
    for ns in (200 * MS, -140 * MS, 240 * MS, -140 * MS):  # too little to show
        robot.jump_ros(ns)
        robot.pass_time(3 * DT)
        robot.look()
        assert robot.motion.reason == "" and robot.told is not None
        np.testing.assert_allclose(robot.told[0], robot.setpoint())
        if robot.ticket is not None:
            robot.answer(np.tile((0.0, 0.1), (HORIZON, 1)))


def test_a_controller_that_reads_a_clock_that_is_set_a_little_is_led_as_gently() -> None:
    robot = moving(reads_ros=True, ends=(1.5, 0.9))
    robot.jump_ros(240 * MS)
    for ends in ((-1.2, 0.0), (1.2, 0.5), (-1.2, 0.0)):  # each before the way to the one before has been gone
        control(robot, REPLAN, ends=ends)
    assert robot.motion.tally.holds == 0


def test_a_simulation_that_goes_on_though_its_clock_is_set_back_is_brought_back_gently() -> None:
    robot = moving(simulated=True, ends=(1.5, 0.6))
    robot.pass_time(3 * DT)
    robot.jump_ros(-10 * S)
    order = robot.look()
    assert isinstance(order.command, Halt) and order.command.duration_ns == 3 * DT
    control(robot, 5)


@pytest.mark.parametrize(("rate", "steady_ns"), [(0.1, 10 * DT), (0.5, 2 * DT), (3.0, DT // 3)])
def test_simulated_time_that_is_slow_or_fast_is_no_jump_and_is_led_as_far_as_steady_time_allows(
    rate: float, steady_ns: int
) -> None:
    robot = moving(simulated=True, reads_ros=True, ends=(0.2, 0.3))
    robot.rate = rate
    control(robot, 30, ends=(0.2, 0.3), steady_ns=steady_ns)
    for step in range(40):
        before = robot.setpoint()
        control(robot, 1, ends=(1.5, 0.6), steady_ns=steady_ns)
        assert robot.motion.reason == "" and robot.told is not None
        moved = np.abs(robot.setpoint() - before)
        assert (moved <= SPEED * min(steady_ns, DT) / S + EPS).all(), step
        np.testing.assert_allclose(robot.told[0], robot.setpoint(), atol=1e-6)


def test_a_simulation_that_is_paused_and_stepped_goes_on() -> None:
    robot = moving(simulated=True, reads_ros=True)
    for _ in range(20):
        robot.rate = 0.0
        robot.pass_time(7 * S)
        robot.rate = 1.0
        control(robot, 1, ends=(1.2, 0.5))
    assert robot.motion.tally.holds == 0


def test_simulated_time_that_was_read_late_and_catches_up_has_not_jumped() -> None:
    clocks = Clocks()
    for steady_ms, ros_ms in ((0, 0), (50, 50), (700, 60), (705, 700), (750, 750)):
        assert clocks.look(Now(ros_ms * MS, steady_ms * MS), simulated=True) == ""
    assert clocks.look(Now(1100 * MS, 800 * MS), simulated=True).startswith("time jumped ahead")


@pytest.mark.parametrize("interface", ["joint_trajectory", "forward_command"])
def test_nothing_that_was_under_way_at_a_stop_moves_the_robot_after_it(interface: str) -> None:
    robot = moving(interface)
    control(robot, REPLAN)
    assert robot.ticket is not None
    robot.on(Word("stopped by ~/stop"))
    assert robot.motion.reason == "stopped by ~/stop"
    for _ in range(5):  # nor does time, an observation, or a calibration
        robot.pass_time(DT)
        assert robot.look().command is None
        assert robot.on(Calibrate(robot.seen(), "here", 5.0, 0.1, 0)).refusal == "stopped by ~/stop"
    robot.on(Word(""))
    assert robot.motion.reason == FIRST_CHUNK
    order = robot.answer(np.zeros((HORIZON, 2)))
    assert order.dropped and order.command is None
    control(robot, 1, ends=(0.0, 0.1))
    assert robot.motion.reason == ""


def test_a_stop_ends_a_calibration_for_good() -> None:
    robot = moving()
    assert robot.on(Calibrate(robot.seen(), "here", 5.0, 0.1, 0)).refusal == ""
    control(robot, 10)
    order = robot.on(Word("stopped by ~/stop"))
    assert order.calibration == "cancelled: stopped by ~/stop" and isinstance(order.command, Halt)
    robot.on(Word(""))
    control(robot, 10)
    assert robot.motion.calibration is None and robot.motion.reason == FIRST_CHUNK


def test_an_inference_begun_before_a_calibration_does_not_end_it() -> None:
    robot = moving()
    control(robot, REPLAN)
    robot.on(Calibrate(robot.seen(), "here", 5.0, 0.1, 0))
    assert robot.answer(np.zeros((HORIZON, 2))).dropped
    assert robot.motion.calibration is not None


@pytest.mark.parametrize("interface", ["joint_trajectory", "forward_command"])
def test_a_pose_that_the_robot_cannot_have_come_to_is_no_place_to_start_from(interface: str) -> None:
    robot = moving(interface)
    control(robot, 2)
    robot.on(Look("camera front: found age"))
    robot.pass_time(DT)
    robot.report(robot.measured + np.array([1.6, 0.0]), ForeignPose)
    robot.look()
    robot.answer(np.zeros((HORIZON, 2)))
    assert "joint states: found lift 1.600 rad apart in two messages of one stamp" in robot.motion.reason
    control(robot, 1, ends=(0.0, 0.1))
    assert "no pose to start from" in robot.motion.reason  # somebody else may be on the topic
    control(robot, 6, ends=(0.0, 0.1))
    assert robot.motion.reason == ""


@pytest.mark.parametrize("interface", ["joint_trajectory", "forward_command"])
def test_an_untrained_model_stays_where_it_started(interface: str) -> None:
    robot = moving(interface, trained=False)
    start = robot.measured
    control(robot, 40, ends=(1.4, 0.6))
    assert np.abs(robot.setpoint() - start).max() <= LEASH + 1e-6
    assert (np.abs(robot.setpoint() - start) > LEASH - 1e-6).all()
    for ends in ((1.4, 0.6), (-1.4, 0.0)):  # nor does it get further by being stopped
        robot.on(Word("stopped by ~/stop"))
        robot.on(Word(""))
        control(robot, 40, ends=ends)
        assert np.abs(robot.setpoint() - start).max() <= LEASH + 1e-6


def test_an_untrained_model_starts_anew_where_somebody_else_has_moved_the_robot() -> None:
    robot = moving(trained=False)
    robot.on(Calibrate(robot.seen(), "home", 5.0, 0.3, 0))
    while robot.motion.calibration is not None:
        control(robot, 1)
    control(robot, 40, ends=(1.4, 0.6))
    home = np.array([joint.home for joint in JOINTS])
    np.testing.assert_allclose(robot.setpoint(), home + LEASH, atol=1e-6)


@pytest.mark.parametrize("follows", [1.0, 0.3])
def test_a_robot_that_lags_follows(follows: float) -> None:
    robot = moving()
    robot.follows = follows
    for ends in ((1.2, 0.5), (-1.0, 0.1), (1.2, 0.5)):
        control(robot, 40, ends=ends)
        assert robot.motion.not_following == ""


def test_a_joint_that_does_not_follow_is_named_until_it_does() -> None:
    robot = moving()
    robot.follows = 0.0
    control(robot, 60, ends=(1.2, 0.5))
    assert robot.motion.not_following.startswith("lift does not follow: found it at 0.200 rad, told to be at 1.200")
    robot.follows = 1.0
    control(robot, 2, ends=(1.2, 0.5))
    assert robot.motion.not_following == ""


def test_in_lock_step_chunks_take_over_from_each_other_and_nothing_is_commanded() -> None:
    motion = Motion(contract(), commands=False)
    motion.settings = Settings(handover="blend", replan_steps=REPLAN)
    measured = np.array([0.2, 0.3])
    motion.on(Now(0, 0), Word(""))
    handovers = []
    for step in range(3 * REPLAN):
        now = Now(step * DT, step * DT)
        if not motion.is_due(now.ros_ns):
            continue
        seen = Seen(now.ros_ns, measured, lambda: [])
        orders = [motion.on(now, Look(seen))]
        assert orders[0].inference is not None
        handovers.append(orders[0].inference.handover)
        chunk = ActionChunk(np.zeros((HORIZON, 2), np.float32), DT / S, now.ros_ns, 0, 0.0)
        orders.append(motion.on(now, Answer(orders[0].inference, chunk, seen)))
        assert all(order.command is None and order.executed is None for order in orders)
    assert [handover and handover.overlap for handover in handovers] == [None, HORIZON - REPLAN, HORIZON - REPLAN]
