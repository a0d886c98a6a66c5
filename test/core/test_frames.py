"""Messages to observations and transitions: late, doubled and restarted stamps; what is paired with what.

Every way of asking is compared with a search from end to end.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfalign_core.contract import RobotContract
from selfalign_core.frozen import FreezeLimits
from selfalign_core.robot.frames import Fault, Order, Pairing, SensorFrames, order_of

ROOT = Path(__file__).parents[2]
MS = 1_000_000
NOW = 1000 * 1000 * MS


@pytest.fixture(scope="module")
def contract() -> RobotContract:
    """Two cameras, 20 Hz, images and joint states up to 0.2 s old, images up to 0.1 s apart."""
    contract = RobotContract.from_yaml(ROOT / "config" / "contracts" / "sim_arm.yaml")
    return dataclasses.replace(contract, max_image_age_s=0.2, max_joint_state_age_s=0.2, max_camera_skew_s=0.1)


def positions(contract: RobotContract, value: float) -> np.ndarray:
    return np.full(len(contract.joints), value)


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
    frames.add_state(NOW + 30 * MS, positions(contract, 31))  # of equal stamps the last counts, late or not
    assert (frames.select(NOW + 50 * MS).state == 31).all()
    frames.add_state(NOW + 20 * MS, positions(contract, 20))
    assert (frames.select(NOW + 50 * MS).state == 31).all()
    assert (frames.newest_positions() == 50).all()


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
    stamps = [state.stamp_ns for state in frames._states]
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
        (lambda frames: frames.add_state(NOW + MS, None, "found nan"), 10, "unusable joint_states"),
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
