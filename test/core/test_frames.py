"""Messages to observations and transitions: late, doubled and restarted stamps; what is paired with what.

Every way of asking is compared with a search from end to end.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfalign_core.errors import InputError
from selfalign_core.robot.contract import RobotContract
from selfalign_core.robot.frames import IMPLAUSIBLE, Fault, Order, Pairing, SensorFrames, order_of
from selfalign_core.robot.frozen import FreezeLimits
from selfalign_core.robot.joint_states import Reading, read_joints
from selfalign_core.robot.measured import believed_pose

ROOT = Path(__file__).parents[2]
MS = 1_000_000
NOW = 1000 * 1000 * MS


@pytest.fixture(scope="module")
def contract() -> RobotContract:
    """Two cameras, 20 Hz, images and joint states up to 0.2 s old, images up to 0.1 s apart; no joint is too fast."""
    contract = RobotContract.from_yaml(ROOT / "config" / "contracts" / "sim_arm.yaml")
    joints = tuple(dataclasses.replace(joint, max_velocity=1e15) for joint in contract.joints)
    return dataclasses.replace(
        contract, joints=joints, max_image_age_s=0.2, max_joint_state_age_s=0.2, max_camera_skew_s=0.1
    )


def positions(contract: RobotContract, value: float) -> Reading:
    return Reading.whole(np.full(len(contract.joints), value))


def filled(contract: RobotContract, **options) -> SensorFrames:
    """Pictures and a joint state of NOW, which say 0, and a joint state 10 ms before, which says -10."""
    frames = SensorFrames(contract, **options)
    for name in contract.camera_names:
        frames.add_picture(name, NOW, f"{name} 0")
    for ms in (-10, 0):
        frames.add_state(NOW + ms * MS, positions(contract, ms))
    return frames


# --- observations ---


def test_an_observation_is_of_its_oldest_picture(contract: RobotContract) -> None:
    frames = filled(contract)
    frames.add_picture("wrist", NOW + 30 * MS, "wrist 30")
    frames.add_state(NOW + 20 * MS, positions(contract, 20))
    found = frames.select(NOW + 40 * MS)
    assert found.pictures == {"overhead": "overhead 0", "wrist": "wrist 30"}
    assert (found.stamp_ns, found.oldest) == (NOW, "overhead")
    assert (found.state == 0).all()


def test_a_picture_that_was_overtaken_replaces_nothing(contract: RobotContract) -> None:
    frames = filled(contract)
    assert frames.add_picture("wrist", NOW - 20 * MS, "wrist -20") is Order.LATE
    assert frames.select(NOW).pictures["wrist"] == "wrist 0"
    assert frames.add_picture("wrist", NOW, "wrist again") is Order.EQUAL
    assert frames.select(NOW).pictures["wrist"] == "wrist again"


def test_a_joint_state_that_was_overtaken_is_put_in_its_place(contract: RobotContract) -> None:
    frames = filled(contract)
    for name in contract.camera_names:
        frames.add_picture(name, NOW + 35 * MS, name)
    frames.add_state(NOW + 50 * MS, positions(contract, 50))
    assert (frames.select(NOW + 50 * MS).state == 0).all()
    assert frames.add_state(NOW + 30 * MS, positions(contract, 30)) is Order.LATE
    assert (frames.select(NOW + 50 * MS).state == 30).all()
    frames.add_state(NOW + 30 * MS, positions(contract, 30.01))  # of equal stamps the last counts, late or not
    assert (frames.select(NOW + 50 * MS).state == 30.01).all()
    frames.add_state(NOW + 20 * MS, positions(contract, 20))
    assert (frames.select(NOW + 50 * MS).state == 30.01).all()
    assert (frames.poses()[-1].position == 50).all()


def test_the_oldest_of_a_full_memory_leaves_for_one_that_was_overtaken(contract: RobotContract) -> None:
    frames = filled(contract)
    for step in range(2000):
        frames.add_state(NOW + step * MS // 10, positions(contract, step))
    assert frames.add_state(NOW, positions(contract, -1)) is Order.LATE  # older than everything that is kept
    assert frames.add_state(NOW + 190 * MS + 1, positions(contract, -2)) is Order.LATE
    for name in contract.camera_names:
        frames.add_picture(name, NOW + 190 * MS + 2, name)
    assert (frames.select(NOW + 200 * MS).state == -2).all()
    assert len(frames._states) == 1024
    stamps = [entry.stamp_ns for entry in frames._states._entries]
    assert stamps == sorted(set(stamps))


def test_a_topic_that_begins_a_new_time_forgets_its_old_one(contract: RobotContract) -> None:
    """A driver that is started again with another clock; without it the newest would stay the newest for ever."""
    frames = filled(contract)
    later = NOW - 60_000 * MS
    assert frames.add_state(later, positions(contract, 5)) is Order.RESTARTED
    with pytest.raises(Fault, match=r"joint_states\): found age 60\.000 s") as caught:
        frames.select(NOW)
    assert caught.value.cause == "stale joint_states"
    for name in contract.camera_names:
        assert frames.add_picture(name, later, name) is Order.RESTARTED
    found = frames.select(later)
    assert found.stamp_ns == later and (found.state == 5).all()
    assert frames.newest_stamps() == dict.fromkeys([c.topic for c in contract.cameras] + ["joint_states"], later)


def test_a_camera_that_begins_a_new_time_is_not_frozen_since_the_old_one(contract: RobotContract) -> None:
    frames = filled(contract, freeze_limits=lambda: FreezeLimits(0.1, 0.01))

    def show(begin_ns: int, end_ms: int) -> None:
        for ms in range(0, end_ms, 20):
            for name in contract.camera_names:
                frames.add_picture(name, begin_ns + ms * MS, name, content=b"the same")
            frames.add_state(begin_ns + ms * MS + 1, positions(contract, ms / 100))

    show(NOW + MS, 300)
    with pytest.raises(Fault, match="found the same picture, bit for bit"):
        frames.select(NOW + 300 * MS)
    show(NOW - 60_000 * MS, 100)
    assert frames.select(NOW - 60_000 * MS + 100 * MS).stamp_ns == NOW - 60_000 * MS + 80 * MS


@pytest.mark.parametrize(
    ("change", "now_ms", "cause"),
    [
        (lambda frames: frames.clear(), 0, "stale overhead"),
        (lambda frames: None, 201, "stale overhead"),
        (lambda frames: None, -51, "future overhead"),
        (lambda frames: frames.add_picture("wrist", NOW + 101 * MS, ""), 101, "camera skew"),
        (lambda frames: frames.add_picture("wrist", NOW + MS, "", problem="size"), 10, "unusable wrist"),
        (lambda frames: frames.add_state(NOW + MS, Reading.unusable(7, "found nan")), 10, "unusable joint_states"),
    ],
)
def test_what_is_wrong_has_a_short_name(contract: RobotContract, change, now_ms: int, cause: str) -> None:
    frames = filled(contract)
    change(frames)
    with pytest.raises(Fault) as caught:
        frames.select(NOW + now_ms * MS)
    assert caught.value.cause == cause


@given(st.lists(st.tuples(st.sampled_from(["overhead", "wrist", "joints"]), st.integers(-240, 240)), max_size=40))
@settings(deadline=None)
def test_the_order_of_arrival_does_not_matter(contract: RobotContract, messages: list[tuple[str, int]]) -> None:
    """As long as no message is overtaken by more than the limit: then a new time would begin."""
    limits = dataclasses.replace(contract, max_image_age_s=1.0, max_joint_state_age_s=1.0, max_camera_skew_s=1.0)
    messages = [(topic, ms // 2) for topic, ms in messages]

    def outcome(ordered: list[tuple[str, int]]):
        frames = SensorFrames(limits)
        for topic, ms in ordered:
            if topic == "joints":
                frames.add_state(NOW + ms * MS, positions(limits, ms))
            else:
                frames.add_picture(topic, NOW + ms * MS, ms)
        try:
            found = frames.select(NOW + 120 * MS)
        except Fault as fault:
            return fault.cause
        stamps = {name: max(ms for topic, ms in ordered if topic == name) for name in limits.camera_names}
        assert found.pictures == stamps
        oldest = min(stamps.values())
        assert found.stamp_ns == NOW + oldest * MS
        assert found.state[0] == max(ms for topic, ms in ordered if topic == "joints" and ms <= oldest)
        return found.pictures, found.state.tolist(), found.stamp_ns

    assert outcome(messages) == outcome(sorted(messages)) == outcome(messages[::-1])


@pytest.mark.parametrize(
    ("stamp", "order"),
    [(101, Order.NEWER), (100, Order.EQUAL), (99, Order.LATE), (90, Order.LATE), (89, Order.RESTARTED)],
)
def test_order(stamp: int, order: Order) -> None:
    assert order_of(stamp, 100, 10) is order
    assert order_of(stamp, None, 10) is Order.NEWER


# --- joint states in several messages ---


ARM, GRIPPER = 0b0111111, 0b1000000


def part(contract: RobotContract, named: int, value: float) -> Reading:
    """A message that says of the joints ``named`` that they are at ``value``."""
    names = [joint for i, joint in enumerate(contract.joint_names) if named >> i & 1]
    return read_joints(["wheel", *names], [9.0, *[value] * len(names)], contract.joint_names)


def seen(contract: RobotContract, now_ns: int = NOW, **options) -> SensorFrames:
    frames = SensorFrames(contract, **options)
    for name in contract.camera_names:
        frames.add_picture(name, now_ns, name)
    return frames


def test_arm_and_gripper_are_put_together_each_with_its_own_age(contract: RobotContract) -> None:
    frames = seen(contract)
    frames.add_state(NOW - 20 * MS, part(contract, ARM, 1.0))
    with pytest.raises(Fault, match=r"\(joint_states\): found no message that names gripper; expected") as caught:
        frames.select(NOW)
    assert caught.value.cause == "stale joint_states"
    assert frames.add_state(NOW - 100 * MS, part(contract, GRIPPER, 0.5)) is Order.NEWER
    frames.add_state(NOW + 5 * MS, part(contract, ARM, 1.1))
    assert frames.select(NOW + 5 * MS).state.tolist() == [1.0] * 6 + [0.5]
    assert frames.newest_stamps()["joint_states"] == NOW - 100 * MS
    (pose,) = frames.poses()[-1:]
    assert pose.position.tolist() == [1.1] * 6 + [0.5]
    assert pose.stamp_ns.tolist() == [NOW + 5 * MS] * 6 + [NOW - 100 * MS]
    for ms in range(10, 120, 10):  # the gripper falls silent, the arm goes on
        frames.add_state(NOW + ms * MS, part(contract, ARM, 1.1))
        frames.add_picture("overhead", NOW + ms * MS, "")
        frames.add_picture("wrist", NOW + ms * MS, "")
    with pytest.raises(Fault, match=r"joint states of gripper \(joint_states\): found age 0\.210 s; expected at most"):
        frames.select(NOW + 110 * MS)


def test_what_names_none_of_our_joints_is_ignored_and_named_while_nothing_else_comes(contract: RobotContract) -> None:
    frames = seen(contract)
    wheels = read_joints(["wheel_left", "wheel_right"], [0.1, math.nan], contract.joint_names)
    assert frames.add_state(NOW, wheels) is None
    with pytest.raises(
        Fault, match=r"\(joint_states\): found joints \['wheel_left', .* expected some of \['shoulder_pan'"
    ):
        frames.select(NOW)
    assert frames.newest_stamps().keys() == {"camera/overhead/image_raw", "camera/wrist/image_raw"}
    frames.add_state(NOW - MS, positions(contract, 1.0))
    frames.add_state(0, wheels)
    without_positions = read_joints(contract.joint_names, [], contract.joint_names)
    assert frames.add_state(NOW, without_positions) is None
    assert (frames.select(NOW).state == 1.0).all()
    assert frames.counts == {"foreign joint states": 3}
    for name in contract.camera_names:
        frames.add_picture(name, NOW + 300 * MS, name)
    with pytest.raises(Fault, match=r"found age 0\.301 s; .*; the newest message is ignored: .* without positions"):
        frames.select(NOW + 300 * MS)


def test_a_fault_of_the_gripper_lasts_until_the_gripper_is_well(contract: RobotContract) -> None:
    frames = seen(contract)
    frames.add_state(NOW - 20 * MS, part(contract, GRIPPER, math.nan))
    frames.add_state(NOW - 10 * MS, part(contract, ARM, 1.0))
    with pytest.raises(Fault, match="joint gripper: found nan; expected a finite position") as caught:
        frames.select(NOW)
    assert caught.value.cause == "unusable joint_states"
    frames.add_state(NOW - 5 * MS, part(contract, GRIPPER, 0.5))
    assert frames.select(NOW).state.tolist() == [1.0] * 6 + [0.5]


def test_a_gripper_with_a_clock_of_its_own_takes_nothing_from_the_arm(contract: RobotContract) -> None:
    frames = seen(contract)
    for ms in range(-50, 0, 10):
        frames.add_state(NOW + ms * MS, part(contract, ARM, 1.0))
        assert frames.add_state(0, part(contract, GRIPPER, 0.5)) in (Order.NEWER, Order.EQUAL)
    with pytest.raises(Fault, match=r"joint states of gripper .*: found age 1000\.000 s"):
        frames.select(NOW)
    frames.add_state(NOW - MS, part(contract, GRIPPER, 0.5))
    assert frames.select(NOW).state.tolist() == [1.0] * 6 + [0.5]
    assert frames.add_state(NOW - 900 * MS, part(contract, GRIPPER, 0.1)) is Order.RESTARTED
    with pytest.raises(Fault, match=r"joint states of gripper"):
        frames.select(NOW)


def test_of_a_message_only_the_joints_it_shares_count_and_a_bad_one_is_named(contract: RobotContract) -> None:
    names = [*contract.joint_names[::-1], "lid"]
    whole = read_joints(names, list(range(8)), contract.joint_names)
    assert whole.all_positions(contract.joint_names).tolist() == [6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    for found, values, problem in (
        (names, [0.0] * 7, "found 7 positions for 8 names"),
        ([*names, "lid"], [0.0] * 9, r"found joints \['lid'\] more than once"),
        (names, [math.inf] * 8, "joint shoulder_pan: found inf"),
        (names[1:], [0.0] * 7, r"expected also \['gripper'\]"),
    ):
        with pytest.raises(InputError, match=problem):
            read_joints(found, values, contract.joint_names).all_positions(contract.joint_names)


def test_a_message_of_many_names_makes_no_long_text(contract: RobotContract) -> None:
    many = ["x" * 1000] * 20_000
    for names in (many, [*many, "gripper"]):
        reading = read_joints(names, [0.0] * len(names), contract.joint_names)
        assert 0 < len(reading.problem) < 2000


@given(
    st.lists(st.tuples(st.integers(0, 0b111), st.integers(-200, 200), st.booleans()), max_size=30),
    st.integers(-200, 200),
)
@settings(deadline=None)
def test_each_joint_is_where_the_newest_message_that_names_it_says(
    contract: RobotContract, messages: list[tuple[int, int, bool]], at_ms: int
) -> None:
    """However the joints are spread over messages, and in whatever order these come; beside a search of them all."""
    contract = dataclasses.replace(contract, joints=contract.joints[:3], cameras=contract.cameras[:1])
    frames = SensorFrames(contract)
    camera = contract.camera_names[0]
    frames.add_picture(camera, NOW + at_ms * MS, "")
    newest: dict[int, int | None] = {}
    kept: list[tuple[int, int, float | None]] = []
    for number, (named, ms, is_bad) in enumerate(messages):
        order = frames.add_state(NOW + ms * MS, part(contract, named, math.nan if is_bad else number / 1000))
        columns = [column for column in range(3) if named >> column & 1]
        heard = [newest[column] for column in columns if newest.get(column) is not None]
        assert (order is None) == (not named)
        if heard and ms < max(heard) - 250:
            assert order is Order.RESTARTED
            kept = [(column, stamp, value) for column, stamp, value in kept if column not in columns]
            newest |= dict.fromkeys(columns, None)
        for column in columns:
            newest[column] = ms if newest.get(column) is None else max(ms, newest[column])
            kept.append((column, ms, None if is_bad else number / 1000))

    def known(until_ms: int) -> list[tuple[int, float | None]]:
        """Stamp and value of each joint that anything is known of; of one stamp the last counts."""
        said = ([(ms, value) for column, ms, value in kept if column == c and ms <= until_ms] for c in range(3))
        return [max(reversed(of_joint), key=lambda item: item[0]) for of_joint in said if of_joint]

    now, then = known(10_000), known(at_ms)
    good = len(then) == len(now) == 3 and all(value is not None for _, value in [*now, *then])
    fresh = good and at_ms - min(ms for ms, _ in then) <= 200 and 200 - min(ms for ms, _ in now) <= 200
    try:
        selection = frames.select(NOW + 200 * MS)
    except Fault:
        assert not fresh or 200 - at_ms > 200
    else:
        assert fresh
        assert selection.state.tolist() == [value for _, value in then]


# --- joint states that contradict each other ---


@pytest.fixture(scope="module")
def real(contract: RobotContract) -> RobotContract:
    """With the joints' own speed: 3 rad/s."""
    own = RobotContract.from_yaml(ROOT / "config" / "contracts" / "sim_arm.yaml")
    return dataclasses.replace(contract, joints=own.joints)


class Alive:
    """A robot whose messages come every 10 ms, pictures and joint states of one stamp."""

    def __init__(self, contract: RobotContract) -> None:
        self.frames, self.now_ns, self._contract = SensorFrames(contract), NOW, contract

    def pass_time(self, ms: int, place: float | None, at_rest: float = 0.0) -> None:
        """All joints but the last are at ``place``, in radians; None: it says nothing."""
        for _ in range(0, ms, 10):
            self.now_ns += 10 * MS
            if place is not None:
                self.say(place, at_rest=at_rest)
            for name in self._contract.camera_names:
                self.frames.add_picture(name, self.now_ns, "")

    def say(self, place: float, *, at_rest: float = 0.0, ago_ms: int = 0) -> None:
        self.frames.add_state(self.now_ns - ago_ms * MS, Reading.whole(np.array([place] * 6 + [at_rest])))

    def state(self) -> float | str:
        """What an observation would say now, or why there is none."""
        try:
            return float(self.frames.select(self.now_ns).state[0])
        except Fault as fault:
            return fault.cause


def test_while_joint_states_contradict_each_other_none_is_believed(real: RobotContract) -> None:
    """A second publisher says zeros; see what a robot at 0.8 rad does, and that a single false state is enough."""
    robot = Alive(real)
    robot.pass_time(100, 0.8)
    assert robot.state() == 0.8
    robot.say(0.0, ago_ms=5)
    assert robot.state() == IMPLAUSIBLE
    with pytest.raises(
        Fault, match=r"found shoulder_pan 0\.800 rad further after 0\.005 s; expected at most 0\.050, and"
    ):
        robot.frames.select(robot.now_ns)
    for _ in range(100):  # as long as it goes on
        robot.pass_time(10, 0.8)
        robot.say(0.0, ago_ms=5)
        assert robot.state() == IMPLAUSIBLE
    robot.pass_time(500, 0.8)
    assert robot.state() == IMPLAUSIBLE
    robot.pass_time(10, 0.8)
    assert robot.state() == 0.8
    assert robot.frames.counts["implausible joint states"] == 101


def test_a_robot_that_is_somewhere_else_is_believed_after_a_moment(real: RobotContract) -> None:
    robot = Alive(real)
    robot.pass_time(100, 0.8)
    robot.pass_time(500, -0.8)
    assert robot.state() == IMPLAUSIBLE
    robot.pass_time(20, -0.8)
    assert robot.state() == -0.8
    robot.pass_time(300, None)  # nobody has looked for a while: it may have been moved as far as it can
    robot.pass_time(10, 0.8)
    assert robot.state() == 0.8


def test_a_moment_is_at_least_five_joint_states(real: RobotContract) -> None:
    contract = dataclasses.replace(real, max_image_age_s=1.0, max_joint_state_age_s=1.0)
    robot = Alive(contract)
    robot.pass_time(100, 0.5)
    robot.pass_time(10, -0.5)
    for _ in range(4):
        robot.pass_time(390, None)
        robot.pass_time(10, -0.5)
        assert robot.state() == IMPLAUSIBLE
    robot.pass_time(390, None)
    robot.pass_time(10, -0.5)
    assert robot.state() == -0.5


def test_two_places_at_one_stamp_are_named_and_noise_is_not(real: RobotContract) -> None:
    robot = Alive(real)
    robot.pass_time(100, 0.8)
    robot.say(0.81)
    assert robot.state() == 0.81
    robot.say(0.0)
    with pytest.raises(Fault, match=r"shoulder_pan 0\.810 rad apart in two messages of one stamp; expected at most"):
        robot.frames.select(robot.now_ns)
    robot.say(0.8)
    assert robot.state() == IMPLAUSIBLE
    robot.pass_time(600, 0.8)
    assert robot.state() == 0.8


def test_a_false_state_that_an_old_picture_would_be_paired_with_is_no_observation(real: RobotContract) -> None:
    contract = dataclasses.replace(real, max_image_age_s=2.0, max_joint_state_age_s=2.0)
    robot = Alive(contract)
    robot.pass_time(100, 0.8)
    robot.now_ns += 10 * MS
    robot.say(0.0)
    for name in contract.camera_names:
        robot.frames.add_picture(name, robot.now_ns, "")
    for _ in range(100):
        robot.now_ns += 10 * MS
        robot.say(0.8)
    assert robot.state() == IMPLAUSIBLE
    robot.pass_time(10, 0.8)
    assert robot.state() == 0.8


def test_two_clocks_on_the_topic_are_named_and_one_that_begins_anew_is_not(real: RobotContract) -> None:
    robot = Alive(real)
    robot.pass_time(100, 0.8)
    robot.now_ns -= 5000 * MS
    robot.pass_time(300, 0.8)
    assert robot.state() == 0.8
    for _ in range(30):
        robot.say(0.8, ago_ms=700)
        robot.pass_time(10, 0.8)
    with pytest.raises(Fault, match="found stamps that fell back 10 times in 20 messages; expected stamps that rise"):
        robot.frames.select(robot.now_ns)
    robot.pass_time(600, 0.8)
    assert robot.state() == 0.8


def test_a_gripper_that_jumps_is_named_by_its_own_messages(real: RobotContract) -> None:
    """Nor is an arm that moves as fast as it may taken for one that jumps when the gripper's message comes between."""
    frames = seen(real)
    for step in range(50):
        frames.add_state(NOW - (50 - step) * 20 * MS, part(real, ARM, 0.06 * step))
        frames.add_state(NOW - (50 - step) * 20 * MS + 19 * MS, part(real, GRIPPER, 0.5))
        if step:
            believed_pose(frames.poses(), real.joints)
    assert frames.select(NOW).state[0] == pytest.approx(0.06 * 49)
    frames.add_state(NOW, part(real, GRIPPER, 1.5))
    with pytest.raises(Fault, match=r"found gripper 1\.000 rad further after 0\.001 s"):
        frames.select(NOW)


@given(
    st.lists(st.tuples(st.integers(-200, 200), st.floats(-0.5, 0.5)), max_size=30, unique_by=lambda item: item[0]),
    st.randoms(use_true_random=False),
)
@settings(deadline=None)
def test_what_is_implausible_does_not_hang_on_the_order_of_arrival(real: RobotContract, said, random) -> None:
    """Stamps on either side of a moment before the newest; beside a look at every pair."""
    contract = dataclasses.replace(real, max_image_age_s=2.0, max_joint_state_age_s=2.0)
    frames = SensorFrames(contract)
    shuffled = list(said)
    random.shuffle(shuffled)
    for name in contract.camera_names:
        frames.add_picture(name, NOW + 1000 * MS, "")
    arrived: list[tuple[int, float]] = []
    for ms, place in shuffled:
        if arrived and ms < max(arrived)[0] - 60:
            continue  # 240 ms, with stamps four times as far apart: no new time
        arrived.append((ms, place))
        frames.add_state(NOW + 4 * ms * MS, Reading.whole(np.full(7, place)))
    arrived.sort()
    jumps = [
        number
        for number, ((ms, place), (ms_after, place_after)) in enumerate(itertools.pairwise(arrived), start=1)
        if abs(place_after - place) > 6.0 * 4 * (ms_after - ms) / 1000 + 0.02
    ]
    counted = [n for n in jumps if n >= len(arrived) - 5 or 4 * arrived[n][0] >= 4 * arrived[-1][0] - 500]
    try:
        found = float(frames.select(NOW + 1000 * MS).state[0])
    except Fault as fault:
        found = fault.cause
    assert found == (IMPLAUSIBLE if counted else arrived[-1][1] if arrived else "stale joint_states")


# --- transitions ---


rising = st.lists(st.integers(0, 2000), min_size=1, max_size=30, unique=True).map(sorted)


@given(st.lists(st.tuples(rising, rising), min_size=1, max_size=4), st.integers(1, 4), st.sampled_from([None, 0, 30]))
@settings(deadline=None)
def test_pairs_are_those_of_a_search_from_end_to_end(
    episodes: list[tuple[list[int], list[int]]], horizon: int, tolerance: int | None
) -> None:
    """Several episodes one behind the other, none of which sees anything of another."""
    dt, pairing = 100, Pairing(100, tolerance)
    tolerance = 50 if tolerance is None else tolerance
    frames = np.concatenate([np.array(f, np.int64) for f, _ in episodes])
    actions = np.concatenate([np.array(a, np.int64) for _, a in episodes])
    lengths = [np.array([len(part) for part in parts]) for parts in zip(*episodes, strict=True)]
    within = []
    for count in lengths:
        ends = np.repeat(np.cumsum(count), lengths[0])
        within.append((ends - np.repeat(count, lengths[0]), ends))
    found = pairing.pair(
        frames, actions, np.arange(len(frames)), horizon, frames_within=within[0], actions_within=within[1]
    )
    row = 0
    for own_frames, own_actions in episodes:
        for stamp in own_frames:
            end = stamp + horizon * dt
            nearest = min(own_frames, key=lambda other: (abs(other - end), other))
            chosen = [
                max((a for a in own_actions if a <= stamp + i * dt + tolerance), default=None) for i in range(horizon)
            ]
            in_force = [a is not None and stamp + i * dt - a <= dt + tolerance for i, a in enumerate(chosen)]
            assert found.complete[row] == (abs(nearest - end) <= tolerance and all(in_force))
            assert frames[found.next[row]] == nearest
            for place, action in zip(found.actions[row], chosen, strict=True):
                assert action is None or actions[place] == action
            row += 1
