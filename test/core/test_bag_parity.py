"""What the nodes see and what a bag of the same messages becomes are the same: every observation, every transition.

Random robots: one or two cameras, joint states and executed actions at rates, delays and jitter of their own, with
messages that are lost, late, doubled and out of order. One road is that of the nodes, driven message by message; the
other a bag on the disk that is converted.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bag_scripts import BEGIN, JOINTS, NS, STORE, TYPES, T, header, joint_state, make_contract
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from rosbags.rosbag2 import StoragePlugin, Writer

from selfalign_core.data.dataset import TransitionDataset
from selfalign_core.data.rosbag import convert
from selfalign_core.data.rosbag_file import BagError
from selfalign_core.data.rosbag_options import Options
from selfalign_core.robot.buffer import TransitionBuffer
from selfalign_core.robot.contract import Camera, RobotContract
from selfalign_core.robot.frames import Fault, Order, SensorFrames, order_of
from selfalign_core.robot.images import decode_resized
from selfalign_core.robot.joint_states import read_joints
from selfalign_core.robot.types import TransitionBatch
from selfalign_core.study.bag_losses import transitions_of_bag

MS = 1_000_000
LENGTH_S = 2.0
SIZE = (5, 6)
WRIST = Camera("wrist", "camera/wrist/image_raw", "raw", 8, 8)
STATES, ACTIONS = "/joint_states", "/executed_action"
CHANNELS = {"rgb8": 3, "bgr8": 3, "mono8": 1, "rgba8": 4, "bgra8": 4}


@dataclasses.dataclass(frozen=True)
class Sent:
    """One message: when it was stamped and when it arrived, and a number that nothing else has.

    ``joints``: those that a joint state names.
    """

    topic: str
    stamp_ns: int
    arrival_ns: int
    number: int
    joints: tuple[str, ...] = JOINTS


@dataclasses.dataclass(frozen=True)
class Robot:
    contract: RobotContract
    horizon: int
    messages: tuple[Sent, ...]  # in order of arrival


# --- random robots ---

incidents = st.lists(
    st.tuples(
        st.integers(0, 3),  # of which topic
        st.floats(0.0, LENGTH_S),  # the message that was stamped then
        st.sampled_from(["lost", "late", "later", "doubled", "false", "silence"]),
    ),
    max_size=12,
)


@st.composite
def robots(draw: Any, contract: RobotContract) -> Robot:
    two = draw(st.booleans(), "two cameras")
    limit_s = draw(st.sampled_from([0.1, 0.25, 2.0]), "age limit")
    contract = dataclasses.replace(
        contract,
        cameras=(*contract.cameras, WRIST) if two else contract.cameras,
        max_image_age_s=limit_s,
        max_joint_state_age_s=limit_s,
        max_camera_skew_s=draw(st.sampled_from([0.05, 0.2]), "skew limit"),
    )
    senders = draw(st.sampled_from([[JOINTS], [JOINTS, ("wheel",)], [("pan",), ("wheel", "lift")]]), "joint states")
    topics = [ACTIONS, *(f"/{camera.topic}" for camera in contract.cameras)]
    rng = np.random.default_rng(draw(st.integers(0, 2**32), "jitter"))
    sent: list[Sent] = []
    for topic, joints in [*((STATES, joints) for joints in senders), *((topic, JOINTS) for topic in topics)]:
        rate_hz = draw(st.sampled_from([20.0] if topic == ACTIONS else [9.0, 15.0, 20.0, 30.0, 59.0]), f"{topic} rate")
        delay_s, jitter_s = (
            draw(st.sampled_from([0.0, 0.01, 0.05]), f"{topic} {what}") for what in ("delay", "jitter")
        )
        stamps = np.arange(rng.uniform(0, 0.1), LENGTH_S, 1 / rate_hz)
        stamps = stamps + rng.normal(0, 0.004, len(stamps)) * (jitter_s > 0)
        for stamp, lag in zip(stamps, rng.uniform(0, jitter_s, len(stamps)), strict=True):
            stamp_ns = BEGIN + round(stamp * NS)
            sent.append(Sent(topic, stamp_ns, stamp_ns + round((delay_s + lag) * NS), len(sent), joints))
    topics.insert(0, STATES)
    for place, at_s, what in draw(incidents, "incidents"):
        sent = happened(sent, topics[place % len(topics)], BEGIN + round(at_s * NS), what)
    sent.sort(key=lambda message: message.arrival_ns)
    return Robot(contract, draw(st.integers(1, 8), "horizon"), tuple(sent))


def happened(sent: list[Sent], topic: str, stamp_ns: int, what: str) -> list[Sent]:
    """The messages after something has happened to the first one of ``topic`` from ``stamp_ns`` on."""
    index = next((i for i, m in enumerate(sent) if m.topic == topic and m.stamp_ns >= stamp_ns), None)
    if index is None:
        return sent
    message = sent[index]
    if what == "silence":
        return [m for m in sent if m.topic != topic or abs(m.stamp_ns - message.stamp_ns) > 200 * MS]
    changed = {
        "lost": [],
        "late": [dataclasses.replace(message, arrival_ns=message.arrival_ns + 90 * MS)],
        # Behind newer ones by more than a topic may be out of order: to the receiver a new time begins.
        "later": [dataclasses.replace(message, arrival_ns=message.arrival_ns + 400 * MS)],
        "false": [dataclasses.replace(message, number=message.number + 1_000_000)],
        "doubled": [message, dataclasses.replace(message, arrival_ns=message.arrival_ns + MS, number=len(sent) + 1000)],
    }
    return [*sent[:index], *changed[what], *sent[index + 1 :]]


def picture(number: int) -> tuple[str, np.ndarray]:
    """Encoding and (8, 8, channels) uint8 of a message."""
    encoding = list(CHANNELS)[number % len(CHANNELS)]
    return encoding, np.random.default_rng(number).integers(0, 256, (8, 8, CHANNELS[encoding]), np.uint8)


def positions(message: Sent) -> dict[str, float]:
    values = {"pan": message.number * 1e-5, "lift": message.number * -2e-5, "wheel": 1.0}
    return {name: values[name] for name in message.joints}


# --- two roads ---


@dataclasses.dataclass(frozen=True)
class Seen:
    """``frames``: stamp -> (state, pixels), per time that began anew. ``transitions``: in order of time."""

    frames: list[dict[int, tuple[bytes, bytes]]]
    transitions: list[tuple]


def told(batch: TransitionBatch) -> list[tuple]:
    """Everything about every transition of a batch."""

    def frame(row: int) -> tuple:
        return int(batch.frame_stamps[row]), batch.frame_states[row].tobytes(), batch.frames[row].tobytes()

    rows = zip(batch.obs_index, batch.next_index, batch.actions, strict=True)
    return [(*frame(obs), *frame(nxt), actions.tobytes()) for obs, nxt, actions in rows]


class Nodes:
    """The buffer node without ROS: what has arrived, a tick of the control rate at a time."""

    def __init__(self, robot: Robot) -> None:
        self.contract, joints = robot.contract, len(robot.contract.joints)
        self.cameras = {f"/{camera.topic}": camera.name for camera in self.contract.cameras}
        self.inputs = SensorFrames(self.contract)
        self.buffer = TransitionBuffer(
            cameras=self.contract.camera_names, image_size=SIZE, state_dim=joints, action_dim=joints,
            horizon=robot.horizon, dt_ns=self.contract.dt_ns, capacity=1000,
        )  # fmt: skip
        self.last_ns: int | None = None
        self.seen = Seen([{}], [])
        self.happened: set[str] = set()
        self.actions: list[list[int]] = [[]]  # stamps, per time that began anew

    def run(self, robot: Robot) -> Seen:
        messages = list(robot.messages)
        now_ns = messages[0].arrival_ns
        while messages:
            now_ns += self.contract.dt_ns
            while messages and messages[0].arrival_ns <= now_ns:
                self.take(messages.pop(0))
            self.tick(now_ns)
        self.keep()
        return self.seen

    def take(self, message: Sent) -> None:
        if message.topic in (STATES, ACTIONS):
            values = positions(message)
            reading = read_joints(list(values), list(values.values()), self.contract.joint_names)
        if message.topic == STATES:
            self.inputs.add_state(message.stamp_ns, reading)
        elif message.topic == ACTIONS:
            action = reading.all_positions(self.contract.joint_names)
            self.buffer.add_action(message.stamp_ns, action.astype(np.float32))
            self.actions[-1].append(message.stamp_ns)
        else:
            self.inputs.add_picture(self.cameras[message.topic], message.stamp_ns, message.number)

    def tick(self, now_ns: int) -> None:
        try:
            selection = self.inputs.select(now_ns)
        except Fault as fault:
            self.happened.add(fault.cause)
            return
        order = order_of(selection.stamp_ns, self.last_ns, self.contract.dt_ns)
        if order is Order.RESTARTED:
            self.happened.add("time began anew")
            self.keep()
            self.buffer.clear()
            self.seen.frames.append({})
            self.actions.append([])
        elif order is not Order.NEWER:
            return
        self.last_ns = selection.stamp_ns
        images = {}
        for name, number in selection.pictures.items():
            encoding, pixels = picture(number)
            images[name] = decode_resized(
                pixels.tobytes(), height=8, width=8, step=8 * pixels.shape[2], encoding=encoding, size=SIZE
            )
        state = selection.state.astype(np.float32)
        self.buffer.add_frame(selection.stamp_ns, images, state)
        stacked = np.stack([images[name] for name in self.contract.camera_names])
        self.seen.frames[-1][selection.stamp_ns] = (state.tobytes(), stacked.tobytes())

    def keep(self) -> None:
        every = self.buffer.newest(self.buffer.num_transitions, since_ns=0, stride=0)
        self.seen.transitions.extend(told(every))


def record(path: Path, messages: tuple[Sent, ...]) -> None:
    types = TYPES | {f"/{WRIST.topic}": "sensor_msgs/msg/Image"}
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        topics = dict.fromkeys(message.topic for message in messages)
        connections = {topic: writer.add_connection(topic, types[topic], typestore=STORE) for topic in topics}
        for message in messages:
            if message.topic in (STATES, ACTIONS):
                content = joint_state(message.stamp_ns, positions(message))
            else:
                encoding, pixels = picture(message.number)
                content = T["sensor_msgs/msg/Image"](
                    header=header(message.stamp_ns), height=8, width=8, encoding=encoding, is_bigendian=0,
                    step=8 * pixels.shape[2], data=pixels.ravel(),
                )  # fmt: skip
            raw = bytes(STORE.serialize_cdr(content, types[message.topic]))
            writer.write(connections[message.topic], message.arrival_ns, raw)


def converted(robot: Robot, folder: Path) -> tuple[Seen, Counter[str]]:
    record(folder / "bag", robot.messages)
    options = Options(image_size=SIZE, min_frames=1, allow_early_end=True)
    try:
        (report,) = convert([folder / "bag"], robot.contract, folder / "set", options)
    except BagError as error:
        if "found no" in str(error) or "expected some of" in str(error):  # usable frame, message of a topic, joint
            return Seen([], []), Counter()
        raise
    dataset = TransitionDataset(folder / "set")
    frames = [
        {
            int(dataset.stamps[row]): (dataset.states[row].tobytes(), dataset.images[row].tobytes())
            for row in range(episode.start, episode.stop)
        }
        for episode in dataset.meta.episodes
    ]
    return Seen(frames, told(dataset.transitions(dataset.starts(robot.horizon), robot.horizon))), report.counters


def is_in_force(stamps: list[int], due_ns: int, dt_ns: int) -> bool:
    newest = max((stamp for stamp in stamps if stamp <= due_ns + dt_ns // 2), default=None)
    return newest is not None and due_ns - newest <= dt_ns + dt_ns // 2


@pytest.fixture(scope="module")
def contract(tmp_path_factory: pytest.TempPathFactory) -> RobotContract:
    return make_contract(tmp_path_factory.mktemp("parity"))


def test_what_replays_are_compared_on_is_what_the_nodes_saw(contract: RobotContract, tmp_path: Path) -> None:
    """Of every transition of a bag some, evenly spread, of which none overlaps another."""
    sent = []
    camera = f"/{contract.cameras[0].topic}"
    for topic, rate_hz, delay_ms in ((camera, 30.0, 40), (STATES, 60.0, 2), (ACTIONS, 20.0, 1)):
        for stamp in np.arange(0.0, 4.0, 1 / rate_hz):
            stamp_ns = BEGIN + round(stamp * NS)
            sent.append(Sent(topic, stamp_ns, stamp_ns + delay_ms * MS, len(sent)))
    # Two thirds of a second without a picture.
    sent = [m for m in sent if m.topic != camera or not 2 <= (m.stamp_ns - BEGIN) / NS < 2.67]
    robot = Robot(contract, 4, tuple(sorted(sent, key=lambda message: message.arrival_ns)))
    record(tmp_path / "bag", robot.messages)
    policy = SimpleNamespace(image_size=SIZE, transition_horizon=robot.horizon)
    live = Nodes(robot).run(robot).transitions
    found = told(transitions_of_bag(tmp_path / "bag", contract, policy))
    assert set(found) <= set(live) and 13 <= len(found) <= 16
    for one, after in itertools.pairwise(found):
        assert one[3] <= after[0]  # the end of one is no later than the beginning of the next
    few = told(transitions_of_bag(tmp_path / "bag", contract, policy, most=2))
    assert few == [found[0], found[-1]]


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_bag_becomes_what_the_nodes_saw(contract: RobotContract, data: Any) -> None:
    robot = data.draw(robots(contract))
    nodes = Nodes(robot)
    live = nodes.run(robot)
    with tempfile.TemporaryDirectory() as folder:
        bag, counters = converted(robot, Path(folder))
    for what in sorted(nodes.happened):
        event(what)
    event("transitions" if live.transitions else "no transition")
    assert bag.transitions == live.transitions

    kept: dict[tuple[int, bytes, bytes], int] = Counter(
        (stamp, *content) for frames in bag.frames for stamp, content in frames.items()
    )
    for frames, actions in zip(live.frames, nodes.actions, strict=True):
        for stamp, content in frames.items():
            # A frame with no action near it can be no part of a transition, and is left out.
            if kept[(stamp, *content)]:
                kept[(stamp, *content)] -= 1
            else:
                assert not is_in_force(actions, stamp, robot.contract.dt_ns)
    assert not +kept, "frames that the nodes have not seen"
    repeated = sum(count for name, count in counters.items() if name.startswith("repeated"))
    assert counters["ticks"] == sum(map(len, bag.frames)) + counters["dropped"] + repeated
