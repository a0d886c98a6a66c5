"""The transition buffer: bounded, untroubled by late, double and missing messages, and the same for everyone who asks.

Random message sequences are compared with a reference that keeps dictionaries and searches them from end to end.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from selfalign_core.errors import InputError
from selfalign_core.robot.buffer import TransitionBuffer
from selfalign_core.robot.types import TransitionBatch

DT = 100
CAMERAS = ("front", "wrist")


def make(*, capacity: int = 50, horizon: int = 2, tolerance_ns: int | None = None) -> TransitionBuffer:
    return TransitionBuffer(
        cameras=CAMERAS, image_size=(2, 3), state_dim=2, action_dim=1, horizon=horizon, dt_ns=DT, capacity=capacity,
        tolerance_ns=tolerance_ns,
    )  # fmt: skip


def images(stamp: int) -> dict[str, np.ndarray]:
    """Pixels tell the stamp and the camera."""
    return {c: np.full((2, 3, 3), (stamp // 10 + 100 * i) % 256, np.uint8) for i, c in enumerate(CAMERAS)}


def state(stamp: int) -> np.ndarray:
    return np.array([stamp, -stamp], np.float32)


def put_frame(buffer: TransitionBuffer, stamp: int) -> None:
    buffer.add_frame(stamp, images(stamp), state(stamp))


def put_action(buffer: TransitionBuffer, stamp: int, value: float | None = None) -> None:
    buffer.add_action(stamp, np.array([stamp if value is None else value], np.float32))


def filled(frames: int = 20, **options) -> TransitionBuffer:
    """A perfect recording: a frame and an action every DT."""
    buffer = make(**options)
    for i in range(frames):
        put_frame(buffer, i * DT)
        put_action(buffer, i * DT)
    return buffer


def everything(buffer: TransitionBuffer) -> TransitionBatch:
    """All transitions, oldest first."""
    return buffer.newest(buffer.num_transitions, since_ns=-(10**18), stride=0)


# ---------------------------------------------------------------- against the reference


@dataclasses.dataclass
class Reference:
    capacity: int
    horizon: int
    tolerance: int
    frames: set[int] = dataclasses.field(default_factory=set)
    actions: dict[int, float] = dataclasses.field(default_factory=dict)

    def add_frame(self, stamp: int) -> None:
        if stamp in self.frames or (len(self.frames) == self.capacity and stamp < min(self.frames)):
            return
        if len(self.frames) == self.capacity:
            self.frames.remove(min(self.frames))
        self.frames.add(stamp)
        self.forget()

    def add_action(self, stamp: int, value: float) -> None:
        self.actions[stamp] = value
        self.forget()

    def forget(self) -> None:
        """Actions that ended before the oldest frame of a full ring, and more than all frames together can use."""
        if len(self.frames) == self.capacity:
            before = [s for s in self.actions if s <= min(self.frames)]
            for stamp in sorted(before)[:-1]:
                del self.actions[stamp]
        for stamp in sorted(self.actions)[: max(len(self.actions) - self.capacity * self.horizon, 0)]:
            del self.actions[stamp]

    def transitions(self) -> list[tuple[int, int, list[float]]]:
        """(stamp of obs_t, stamp of obs_{t+k}, executed actions)."""
        found = []
        for start in sorted(self.frames):
            end = start + self.horizon * DT
            nearest = min(self.frames, key=lambda s: (abs(s - end), s))
            if abs(nearest - end) > self.tolerance:
                continue
            actions = []
            for step in range(self.horizon):
                due = start + step * DT
                in_force = [s for s in self.actions if s <= due + self.tolerance]
                if in_force and due - max(in_force) <= DT + self.tolerance:
                    actions.append(self.actions[max(in_force)])
            if len(actions) == self.horizon:
                found.append((start, nearest, actions))
        return found


# Stamps on a grid, now and then off it, in any order, some twice, some never.
offsets = st.sampled_from([0, 0, 0, 20, -30, 49, 51, -60])
stamps = st.builds(lambda step, offset: step * DT + offset, st.integers(0, 14), offsets)
messages = st.lists(st.tuples(st.sampled_from(["frame", "action"]), stamps), max_size=60)


@settings(max_examples=150)
@given(messages, st.integers(2, 12), st.integers(1, 3), st.sampled_from([None, 0, 25]))
def test_random_messages_give_the_reference_transitions(
    sequence: list[tuple[str, int]], capacity: int, horizon: int, tolerance_ns: int | None
) -> None:
    buffer = make(capacity=capacity, horizon=horizon, tolerance_ns=tolerance_ns)
    reference = Reference(capacity, horizon, DT // 2 if tolerance_ns is None else tolerance_ns)
    most = 0
    for number, (kind, stamp) in enumerate(sequence):
        if kind == "frame":
            put_frame(buffer, stamp)
            reference.add_frame(stamp)
        else:
            put_action(buffer, stamp, number)
            reference.add_action(stamp, number)
        most = max(most, buffer.nbytes)
        assert buffer.num_frames == len(reference.frames) <= capacity
    expected = reference.transitions()
    assert buffer.num_transitions == len(expected)
    assert most <= capacity * (len(CAMERAS) * 2 * 3 * 3 + 2 * 4) + capacity * horizon * 4
    if not expected:
        return
    batch = everything(buffer)
    for row, (start, end, actions) in enumerate(expected):
        for index, stamp in ((batch.obs_index[row], start), (batch.next_index[row], end)):
            assert batch.frame_stamps[index] == stamp
            np.testing.assert_array_equal(batch.frame_states[index], state(stamp))
            for camera, name in enumerate(CAMERAS):
                np.testing.assert_array_equal(batch.frames[index, camera], images(stamp)[name])
        np.testing.assert_array_equal(batch.actions[row, :, 0], actions)


@given(messages, st.integers(1, 5), st.integers(0, 3))
def test_a_batch_follows_from_the_content_alone_and_holds_each_frame_once(
    sequence: list[tuple[str, int]], count: int, seed: int
) -> None:
    buffer, shuffled = make(capacity=20), make(capacity=20)
    for i in range(8):  # enough to choose from
        sequence = [*sequence, ("frame", 16 * DT + i * DT), ("action", 16 * DT + i * DT)]
    for kind, stamp in sequence:
        (put_frame if kind == "frame" else put_action)(buffer, stamp)
    assume(buffer.num_transitions > count)
    batch = buffer.newest(count, since_ns=-(10**18), stride=0)
    assert len(batch) == count
    assert len(np.unique(batch.frame_stamps)) == len(batch.frame_stamps)
    used = np.unique(np.concatenate([batch.obs_index, batch.next_index]))
    np.testing.assert_array_equal(used, np.arange(len(batch.frames)))
    starts = batch.frame_stamps[batch.obs_index]
    assert (np.diff(starts) > 0).all() and (batch.frame_stamps[batch.next_index] > starts).all()
    np.testing.assert_array_equal(starts, begins(everything(buffer))[-count:])
    # The same content, filled in another order.
    for i in np.random.default_rng(seed).permutation(len(buffer._stamps)):
        put_frame(shuffled, buffer._stamps[i])
    for stamp, action in zip(buffer._action_stamps, buffer._actions, strict=True):
        shuffled.add_action(stamp, action)
    other = shuffled.newest(count, since_ns=-(10**18), stride=0)
    for field in dataclasses.fields(batch):
        np.testing.assert_array_equal(getattr(batch, field.name), getattr(other, field.name))


# ---------------------------------------------------------------- case by case


def test_a_perfect_recording_gives_every_transition() -> None:
    buffer = filled(20, horizon=3)
    assert buffer.num_transitions == 20 - 3
    batch = everything(buffer)
    np.testing.assert_array_equal(batch.next_index - batch.obs_index, 3)
    np.testing.assert_array_equal(batch.actions[4, :, 0], [400, 500, 600])
    assert len(batch.frames) == 20
    assert buffer.counters == {"frames": 20, "actions": 20, "out_of_order": 0, "duplicate": 0, "too_old": 0}


def test_a_missing_frame_costs_only_the_transitions_that_need_it() -> None:
    buffer = make()
    for i in range(10):
        put_action(buffer, i * DT)
        if i != 5:
            put_frame(buffer, i * DT)
    starts = everything(buffer).frame_stamps[everything(buffer).obs_index]
    assert set(starts) == {i * DT for i in range(8)} - {5 * DT, 3 * DT}


def test_a_gap_in_the_actions_costs_only_the_transitions_that_need_them() -> None:
    buffer = make()
    for i in range(12):
        put_frame(buffer, i * DT)
        if i not in (5, 6):
            put_action(buffer, i * DT)
    starts = {s // DT for s in everything(buffer).frame_stamps[everything(buffer).obs_index]}
    # The action of 4 may still be in force one step late; at 6 no action is.
    assert starts == {0, 1, 2, 3, 4, 7, 8, 9}


def test_late_and_double_messages_change_nothing_but_the_counters() -> None:
    straight, jumbled = filled(10), make()
    order = [3, 0, 1, 4, 2, 7, 5, 6, 9, 8]
    for i in order:
        put_action(jumbled, i * DT)
        put_frame(jumbled, i * DT)
        put_frame(jumbled, i * DT)
    a, b = everything(straight), everything(jumbled)
    for field in dataclasses.fields(a):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))
    assert jumbled.counters["duplicate"] == 10
    assert jumbled.counters["out_of_order"] > 0
    assert jumbled.num_frames == 10


def test_a_double_frame_keeps_the_first_and_a_double_action_the_last() -> None:
    buffer = filled(3)
    buffer.add_frame(0, images(50), state(50))
    put_action(buffer, DT, 77.0)
    batch = everything(buffer)
    np.testing.assert_array_equal(batch.frame_states[0], state(0))
    np.testing.assert_array_equal(batch.actions[0, :, 0], [0.0, 77.0])


def test_it_is_a_ring_and_its_memory_does_not_grow() -> None:
    buffer = filled(8, capacity=8)
    before = buffer.nbytes
    for i in range(8, 500):
        put_frame(buffer, i * DT)
        put_action(buffer, i * DT)
        assert buffer.num_frames == 8
        assert buffer.nbytes <= before + 8
    batch = everything(buffer)
    np.testing.assert_array_equal(batch.frame_stamps, np.arange(492, 500) * DT)
    put_frame(buffer, 3 * DT)
    assert buffer.counters["too_old"] == 1
    assert buffer.num_frames == 8


@pytest.mark.parametrize("frames", [0, 1, 8])
def test_actions_alone_do_not_fill_the_memory(frames: int) -> None:
    """A camera that died must not cost more memory every second."""
    buffer = filled(frames, capacity=8)
    images_and_states = make(capacity=8).nbytes
    for i in range(frames, 3000):
        put_action(buffer, i * DT)
    assert buffer.nbytes - images_and_states <= 8 * buffer.horizon * 4


def test_reported_bytes_are_the_bytes_of_the_arrays() -> None:
    buffer = filled(5, capacity=50)
    assert buffer.nbytes == 50 * (2 * 2 * 3 * 3) + 50 * 2 * 4 + 5 * 4


def test_frames_handed_out_are_copies() -> None:
    buffer = filled(5)
    first = everything(buffer)
    first.frames[:], first.actions[:] = 0, 0
    second = everything(buffer)
    assert second.frames.any()
    assert second.actions.any()


def test_what_is_put_in_is_copied() -> None:
    buffer, picture, angles, action = make(), images(5), state(5), np.array([5], np.float32)
    buffer.add_frame(0, picture, angles)
    buffer.add_action(0, action)
    put_action(buffer, DT)
    put_frame(buffer, 2 * DT)
    for array in (*picture.values(), angles, action):
        array[:] = 0
    batch = everything(buffer)
    np.testing.assert_array_equal(batch.frame_states[0], state(5))
    np.testing.assert_array_equal(batch.frames[0, 1], images(5)["wrist"])
    assert batch.actions[0, 0, 0] == 5


def test_clear_forgets_everything() -> None:
    buffer = filled(10)
    buffer.clear()
    assert (buffer.num_frames, buffer.num_transitions) == (0, 0)
    put_frame(buffer, 0)  # earlier stamps are welcome again
    assert buffer.num_frames == 1


def begins(batch: TransitionBatch) -> list[int]:
    return batch.frame_stamps[batch.obs_index].tolist()


@given(messages, st.integers(0, 6), st.integers(1, 4), st.integers(-1, 8))
def test_the_newest_transitions_are_spaced_and_not_too_old(
    sequence: list[tuple[str, int]], count: int, stride: int, since: int
) -> None:
    buffer = make(capacity=12)
    for kind, stamp in sequence:
        (put_frame if kind == "frame" else put_action)(buffer, stamp)
    allowed = [b for b in begins(everything(buffer)) if b >= since * DT]
    expected: list[int] = []
    for begin in reversed(allowed):
        if len(expected) < count and (not expected or begin <= expected[0] - stride * DT + DT // 2):
            expected.insert(0, begin)
    batch = buffer.newest(count, since_ns=since * DT, stride=stride)
    assert begins(batch) == expected


def test_the_newest_of_a_perfect_recording() -> None:
    buffer = filled(20)  # the last transition of two steps begins at 17
    assert begins(buffer.newest(4, since_ns=0)) == [14 * DT, 15 * DT, 16 * DT, 17 * DT]
    batch = buffer.newest(4, since_ns=0, stride=3)
    assert begins(batch) == [8 * DT, 11 * DT, 14 * DT, 17 * DT]
    np.testing.assert_array_equal(batch.actions[:, :, 0] // DT, [[8, 9], [11, 12], [14, 15], [17, 18]])
    assert begins(buffer.newest(40, since_ns=15 * DT)) == [15 * DT, 16 * DT, 17 * DT]
    nothing = buffer.newest(4, since_ns=18 * DT)
    assert len(nothing) == 0
    assert nothing.frames.shape == (0, 2, 2, 3, 3)
    assert len(make().newest(4, since_ns=0)) == 0


def test_bad_messages_are_refused_by_name_and_leave_no_trace() -> None:
    buffer = filled(5)
    cases = [
        (lambda: buffer.add_frame(900, {"front": images(0)["front"]}, state(0)), r"expected 'wrist' too"),
        (lambda: buffer.add_frame(900, {**images(0), "wrist": np.zeros((2, 2, 3), np.uint8)}, state(0)),
         r"frame at 900 ns, camera 'wrist': found \(2, 2, 3\) uint8, expected \(2, 3, 3\) uint8"),
        (lambda: buffer.add_frame(900, {**images(0), "front": np.zeros((2, 3, 3), np.float32)}, state(0)),
         r"camera 'front': found \(2, 3, 3\) float32"),
        (lambda: buffer.add_frame(900, images(0), np.array([1, np.nan])), r"state: found \[1.0, nan\], expected"),
        (lambda: buffer.add_frame(900, images(0), np.zeros(3)), r"state: found shape \(3,\), expected \(2,\)"),
        (lambda: buffer.add_action(900, np.array([np.inf])), "action: found"),
        (lambda: buffer.add_action(900, np.zeros(2)), r"action: found shape \(2,\), expected \(1,\)"),
    ]  # fmt: skip
    counters = dict(buffer.counters)
    for call, message in cases:
        with pytest.raises(InputError, match=message):
            call()
    assert buffer.num_frames == 5
    assert buffer.counters == counters


@pytest.mark.parametrize("change", [{"capacity": 1}, {"horizon": 0}, {"dt_ns": 0}, {"state_dim": 0}])
def test_a_bad_size_is_named(change: dict) -> None:
    options = {"cameras": CAMERAS, "image_size": (2, 3), "state_dim": 2, "action_dim": 1, "horizon": 1, "dt_ns": DT,
               "capacity": 5}  # fmt: skip
    with pytest.raises(InputError, match=f"TransitionBuffer.{next(iter(change))}: found"):
        TransitionBuffer(**{**options, **change})


def test_selecting_keeps_only_the_frames_in_use() -> None:
    batch = everything(filled(20))
    part = batch.select(np.array([7, 3]))
    assert len(part) == 2
    assert len(part.frames) == 4
    for row, original in enumerate((7, 3)):
        for name in ("obs_index", "next_index"):
            ours, theirs = getattr(part, name)[row], getattr(batch, name)[original]
            assert part.frame_stamps[ours] == batch.frame_stamps[theirs]
        np.testing.assert_array_equal(part.actions[row], batch.actions[original])


def test_a_batch_that_contradicts_itself_is_refused_by_name() -> None:
    batch = everything(filled(6))
    for change, message in (
        ({"frames": batch.frames.astype(np.float32)}, "frames: found dtype float32, expected uint8"),
        ({"cameras": ("front",)}, r"frames: found shape \(6, 2, 2, 3, 3\), expected \(N, 1, H, W, 3\)"),
        ({"frame_states": batch.frame_states[:-1]}, r"frame_states: found shape \(5, 2\)"),
        ({"next_index": batch.next_index + 5}, r"next_index: found rows 7..10, expected 0..5"),
        ({"actions": batch.actions[:, :, 0]}, r"actions: found shape \(4, 2\), expected 3 dimension"),
    ):
        with pytest.raises(InputError, match=rf"TransitionBatch\.{message}"):
            dataclasses.replace(batch, **change)
