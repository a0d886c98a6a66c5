"""Bags to dataset: what is synchronised with what, what is counted, and what is refused, on real bags on disk."""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from selfalign_core.data.dataset import TransitionDataset
from selfalign_core.data.partial import DatasetError
from selfalign_core.data.rosbag import convert, main
from selfalign_core.data.rosbag_file import BagError, find_bags
from selfalign_core.data.rosbag_frames import Segment, Track, make_frames
from selfalign_core.data.rosbag_options import Options
from selfalign_core.robot.contract import RobotContract

NS = 1_000_000_000
BEGIN = 1_700_000_000 * NS
JOINTS = ("pan", "lift")
STORE = get_typestore(Stores.ROS2_JAZZY)
T = STORE.types
CONTRACT = """
name: two_joints
control: {rate_hz: 20.0, replan_steps: 4, max_image_age: 0.1, max_joint_state_age: 0.1}
cameras:
  - {name: front, topic: camera/front/image_raw, encoding: %(encoding)s, height: 8, width: 8}
joint_state: {topic: joint_states}
joints:
  - {name: pan, unit: rad, lower: -2.0, upper: 2.0, max_velocity: 3.0, home: 0.0}
  - {name: lift, unit: rad, lower: -2.0, upper: 2.0, max_velocity: 3.0, home: 0.0}
action: {interface: %(interface)s, topic: commands}
"""


def make_contract(path: Path, interface: str = "forward_command", encoding: str = "raw") -> RobotContract:
    path.mkdir(parents=True, exist_ok=True)
    (path / "contract.yaml").write_text(CONTRACT % {"interface": interface, "encoding": encoding})
    return RobotContract.from_yaml(path / "contract.yaml")


@pytest.fixture
def contract(tmp_path: Path) -> RobotContract:
    return make_contract(tmp_path)


def stamp(ns: int):
    return T["builtin_interfaces/msg/Time"](sec=ns // NS, nanosec=ns % NS)


def header(ns: int):
    return T["std_msgs/msg/Header"](stamp=stamp(ns), frame_id="")


def joint_state(ns: int, positions: dict[str, float]):
    values = np.array(list(positions.values()), np.float64)
    empty = np.zeros(0)
    return T["sensor_msgs/msg/JointState"](
        header=header(ns), name=list(positions), position=values, velocity=empty, effort=empty
    )


def image(ns: int, value: int, size: int = 8):
    data = np.full(size * size * 3, value, np.uint8)
    return T["sensor_msgs/msg/Image"](
        header=header(ns), height=size, width=size, encoding="rgb8", is_bigendian=0, step=3 * size, data=data
    )


def compressed(ns: int, value: int):
    _, data = cv2.imencode(".png", np.full((8, 8, 3), value, np.uint8))
    return T["sensor_msgs/msg/CompressedImage"](header=header(ns), format="png", data=data.ravel())


def forward_command(values: list[float]):
    layout = T["std_msgs/msg/MultiArrayLayout"](dim=[], data_offset=0)
    return T["std_msgs/msg/Float64MultiArray"](layout=layout, data=np.array(values, np.float64))


def trajectory(ns: int, points: list[tuple[float, dict[str, float]]]):
    empty = np.zeros(0)

    def point(after_s: float, positions: dict[str, float]):
        after = T["builtin_interfaces/msg/Duration"](sec=int(after_s), nanosec=round(after_s % 1 * NS))
        values = np.array(list(positions.values()))
        return T["trajectory_msgs/msg/JointTrajectoryPoint"](
            positions=values, velocities=empty, accelerations=empty, effort=empty, time_from_start=after
        )

    return T["trajectory_msgs/msg/JointTrajectory"](
        header=header(ns), joint_names=list(points[0][1]), points=[point(*item) for item in points]
    )


TYPES = {
    "/camera/front/image_raw": "sensor_msgs/msg/Image",
    "/joint_states": "sensor_msgs/msg/JointState",
    "/executed_action": "sensor_msgs/msg/JointState",
}


@dataclass
class Script:
    """What a bag shall hold: (seconds received, topic, message)."""

    messages: list[tuple[float, str, object]] = field(default_factory=list)

    def every(self, topic: str, rate_hz: float, make, *, start: float = 0.0, end: float = 3.0, delay: float = 0.0):
        """``make(ns, n)`` at ``rate_hz``, received ``delay`` seconds after it was stamped."""
        for n in range(round((end - start) * rate_hz)):
            at = start + n / rate_hz
            self.messages.append((at + delay, topic, make(BEGIN + round(at * NS), n)))
        return self

    def write(
        self, path: Path, *, types: dict[str, str] | None = None, plugin=StoragePlugin.MCAP, checksums: bool = False
    ) -> Path:
        types = TYPES | (types or {})
        sums: dict[str, int] = {}
        with Writer(path, version=9, storage_plugin=plugin) as writer:
            used = dict.fromkeys(topic for _, topic, _ in self.messages)
            connections = {topic: writer.add_connection(topic, types[topic], typestore=STORE) for topic in used}
            for seconds, topic, message in sorted(self.messages, key=lambda item: item[0]):
                raw = bytes(STORE.serialize_cdr(message, types[topic]))
                sums[topic] = zlib.crc32(raw, sums.get(topic, 0))
                writer.write(connections[topic], BEGIN + round(seconds * NS), raw)
            for topic, value in sums.items() if checksums else ():
                writer.set_custom_data(f"crc32 {topic}", f"{value:08x}")
        return path


def seconds(ns: int) -> float:
    return (ns - BEGIN) / NS


def cameras(script: Script, **times) -> Script:
    return script.every("/camera/front/image_raw", 30.0, lambda ns, n: image(ns, n), **times)


def joint_states(script: Script, **times) -> Script:
    return script.every(
        "/joint_states", 60.0, lambda ns, n: joint_state(ns, {"pan": seconds(ns), "lift": -1.0}), **times
    )


def executed(script: Script, **times) -> Script:
    return script.every(
        "/executed_action", 20.0, lambda ns, n: joint_state(ns, {"pan": seconds(ns), "lift": 0.5}), **times
    )


def whole(end: float = 3.0) -> Script:
    return executed(joint_states(cameras(Script(), end=end), end=end), end=end)


def run(bags: list[Path], contract: RobotContract, output: Path, **changes) -> TransitionDataset:
    convert(bags, contract, output, Options(image_size=(8, 8), **changes))
    return TransitionDataset(output)


# --- what a frame is ---


def test_a_clean_bag_becomes_one_episode_at_the_control_rate(tmp_path: Path, contract: RobotContract) -> None:
    dataset = run([whole().write(tmp_path / "bag")], contract, tmp_path / "set", prompt="reach")
    assert len(dataset.meta.episodes) == 1
    assert 58 <= len(dataset) <= 60
    assert set(np.diff(dataset.stamps)) == {contract.dt_ns}
    np.testing.assert_allclose(dataset.actions[:, 0], (dataset.stamps - BEGIN) / NS, atol=1e-6)
    assert dataset.meta.prompts == ("reach",)
    assert dataset.meta.embodiments == ("two_joints",)
    assert dataset.meta.joint_names == JOINTS
    assert dataset.meta.counters.get("dropped", 0) == 0
    assert dataset.norm_stats["state"].min[1] == -1.0


def test_without_a_prompt_bags_are_play(tmp_path: Path, contract: RobotContract) -> None:
    dataset = run([whole().write(tmp_path / "bag")], contract, tmp_path / "set", embodiment="left_arm")
    assert [episode.prompt for episode in dataset.meta.episodes] == [-1]
    assert dataset.meta.embodiments == ("left_arm",)


def prompted(*prompts: tuple[float, str]) -> Script:
    script = whole()
    script.messages += [(at, "/prompt", T["std_msgs/msg/String"](data=text)) for at, text in prompts]
    return script


def test_the_recorded_prompt_labels_the_frames_from_when_it_was_given(tmp_path: Path, contract: RobotContract) -> None:
    script = prompted((0.975, "reach the cube"), (1.5, "reach the cube"), (1.975, "reach the ball"))
    bag = script.write(tmp_path / "bag", types={"/prompt": "std_msgs/msg/String"})
    meta = run([bag], contract, tmp_path / "set").meta
    assert meta.prompts == ("reach the cube", "reach the ball")
    assert [episode.prompt for episode in meta.episodes] == [-1, 0, 1]
    assert [episode.start for episode in meta.episodes] == [0, 20, 40]  # the same prompt again ends nothing
    assert run([bag], contract, tmp_path / "said", prompt="wave").meta.prompts == ("wave",)
    assert run([bag], contract, tmp_path / "play", prompt="").meta.prompts == ()


def test_a_prompt_stays_in_force_over_a_jump_of_time(tmp_path: Path, contract: RobotContract) -> None:
    script = executed(joint_states(cameras(prompted((0.0, "reach the cube")), start=5.0, end=8.0), start=5.0, end=8.0),
                      start=5.0, end=8.0)  # fmt: skip
    bag = script.write(tmp_path / "bag", types={"/prompt": "std_msgs/msg/String"})
    meta = run([bag], contract, tmp_path / "set").meta
    assert [episode.prompt for episode in meta.episodes] == [0, 0]


def test_sqlite_and_folders_of_bags_are_read(tmp_path: Path, contract: RobotContract) -> None:
    whole().write(tmp_path / "bags" / "one")
    whole(2.0).write(tmp_path / "bags" / "deep" / "two", plugin=StoragePlugin.SQLITE3)
    assert len(find_bags([tmp_path / "bags"])) == 2
    dataset = run([tmp_path / "bags"], contract, tmp_path / "set")
    assert len(dataset.meta.episodes) == 2
    assert [source["bag"] for source in dataset.meta.sources] == ["two", "one"]


def test_a_storage_file_without_metadata_is_read(tmp_path: Path, contract: RobotContract) -> None:
    bag = whole().write(tmp_path / "bag")
    (bag / "metadata.yaml").unlink()
    assert len(run([bag], contract, tmp_path / "set")) >= 58


def test_delayed_messages_are_placed_by_their_header(tmp_path: Path, contract: RobotContract) -> None:
    script = executed(joint_states(cameras(Script(), delay=0.3), delay=0.02))
    dataset = run([script.write(tmp_path / "bag")], contract, tmp_path / "set")
    times = (dataset.stamps - BEGIN) / NS
    np.testing.assert_array_equal(dataset.images[:, 0, 0, 0, 0], np.floor(times * 30 + 1e-6))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6))
def test_no_frame_knows_the_future(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """Jittered stamps, delays and losses: what is stored is the newest of what was stamped up to the tick."""
    rng = np.random.default_rng(seed)
    path = tmp_path_factory.mktemp("future")
    script = Script()
    times: dict[str, list[int]] = {}
    for topic, rate in (("/camera/front/image_raw", 30.0), ("/joint_states", 60.0), ("/executed_action", 20.0)):
        at = np.sort(np.arange(0, 2, 1 / rate) + rng.uniform(0, 0.02, round(2 * rate)))
        times[topic] = [BEGIN + round(t * NS) for t in at if rng.random() > 0.1]
        for n, ns in enumerate(times[topic]):
            positions = {"pan": seconds(ns), "lift": float(n)}
            message = image(ns, n) if "camera" in topic else joint_state(ns, positions)
            script.messages.append((seconds(ns) + rng.exponential(0.02), topic, message))
    # Some end of the recording is late; that is not what is tested here.
    dataset = run([script.write(path / "bag")], make_contract(path), path / "set", allow_early_end=True)
    for row, tick in enumerate(dataset.stamps):
        newest_image = np.searchsorted(times["/camera/front/image_raw"], tick, side="right") - 1
        assert dataset.images[row, 0, 0, 0, 0] == newest_image
        assert tick - times["/camera/front/image_raw"][newest_image] <= 0.1 * NS
        newest_state = times["/joint_states"][np.searchsorted(times["/joint_states"], tick, side="right") - 1]
        np.testing.assert_allclose(dataset.states[row, 0], seconds(newest_state), atol=1e-6)
        assert dataset.actions[row, 0] <= seconds(int(tick)) + 0.5 / 20 + 1e-6


sorted_stamps = st.lists(st.integers(0, 4000), min_size=1, max_size=60, unique=True).map(
    lambda values: np.array(sorted(values), np.int64) * 1_000_000
)


@given(images=sorted_stamps, states=sorted_stamps, actions=sorted_stamps)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_frames_use_nothing_newer_than_their_tick(
    contract: RobotContract, images: np.ndarray, states: np.ndarray, actions: np.ndarray
) -> None:
    def joints(stamps: np.ndarray) -> np.ndarray:
        return np.stack([stamps, stamps], 1).astype(np.float64)

    counters: Counter[str] = Counter()
    segment = Segment({"front": Track(images, images)}, Track(states, joints(states)), Track(actions, joints(actions)))
    frames = make_frames(segment, contract, Options(), counters)
    for run_ in frames:
        assert len(run_.stamps) >= 2 and set(np.diff(run_.stamps)) == {contract.dt_ns}
        for tick, state, action, seen in zip(run_.stamps, run_.states, run_.actions, run_.images["front"], strict=True):
            assert seen == images[images <= tick].max() and tick - seen <= 0.1 * NS
            assert state[0] == states[states <= tick].max() and tick - state[0] <= 0.1 * NS
            in_force = actions[actions <= tick + contract.dt_ns // 2].max()
            assert action[0] == in_force and tick - in_force <= 1.5 * contract.dt_ns
    assert counters["ticks"] == sum(len(run_.stamps) for run_ in frames) + counters["dropped"]


def test_joints_are_found_by_name(tmp_path: Path, contract: RobotContract) -> None:
    def reordered(ns: int, n: int):
        return joint_state(ns, {"wheel": 9.0, "lift": 0.25, "pan": 0.75})

    script = cameras(Script()).every("/joint_states", 60.0, reordered).every("/executed_action", 20.0, reordered)
    dataset = run([script.write(tmp_path / "bag")], contract, tmp_path / "set")
    assert (dataset.states == [0.75, 0.25]).all()
    assert (dataset.actions == [0.75, 0.25]).all()


def test_joint_states_without_our_joints_are_counted_and_skipped(tmp_path: Path, contract: RobotContract) -> None:
    script = whole().every("/joint_states", 10.0, lambda ns, n: joint_state(ns + 1, {"wheel": 1.0}))
    dataset = run([script.write(tmp_path / "bag")], contract, tmp_path / "set")
    assert dataset.meta.counters["incomplete joint states"] == 30
    assert dataset.meta.counters.get("dropped", 0) == 0


def test_compressed_images_are_decoded(tmp_path: Path) -> None:
    contract = make_contract(tmp_path, encoding="compressed")
    script = executed(joint_states(Script())).every("/camera/front/image_raw", 30.0, compressed)
    types = {"/camera/front/image_raw": "sensor_msgs/msg/CompressedImage"}
    dataset = run([script.write(tmp_path / "bag", types=types)], contract, tmp_path / "set")
    np.testing.assert_array_equal(dataset.images[:, 0, 3, 3, 1], np.floor((dataset.stamps - BEGIN) / NS * 30 + 1e-6))


def test_topics_of_a_namespace_are_found(tmp_path: Path, contract: RobotContract) -> None:
    script = whole()
    script.messages = [(at, f"/robot1{topic}", message) for at, topic, message in script.messages]
    bag = script.write(tmp_path / "bag", types={f"/robot1{topic}": kind for topic, kind in TYPES.items()})
    assert len(run([bag], contract, tmp_path / "set", namespace="/robot1")) >= 58


# --- commands of other people's robots ---


def test_forward_commands_count_from_when_they_were_received(tmp_path: Path, contract: RobotContract) -> None:
    script = joint_states(cameras(Script())).every(
        "/commands", 20.0, lambda ns, n: forward_command([seconds(ns), 0.0]), delay=0.01
    )
    bag = script.write(tmp_path / "bag", types={"/commands": "std_msgs/msg/Float64MultiArray"})
    dataset = run([bag], contract, tmp_path / "set")
    np.testing.assert_allclose(dataset.actions[:, 0], (dataset.stamps - BEGIN) / NS - 0.01, atol=1e-6)


def test_trajectories_are_followed_along_their_path(tmp_path: Path) -> None:
    contract = make_contract(tmp_path, interface="joint_trajectory")
    script = joint_states(cameras(Script())).every(
        "/commands",
        1.0,
        lambda ns, n: trajectory(
            ns, [(0.0, {"lift": 0.0, "pan": seconds(ns)}), (1.5, {"lift": 0.0, "pan": seconds(ns) + 1.5})]
        ),
    )
    bag = script.write(tmp_path / "bag", types={"/commands": "trajectory_msgs/msg/JointTrajectory"})
    dataset = run([bag], contract, tmp_path / "set")
    assert len(dataset.meta.episodes) == 1 and len(dataset) >= 58
    np.testing.assert_allclose(dataset.actions[:, 0], (dataset.stamps - BEGIN) / NS, atol=1e-6)


def test_commands_on_another_clock_are_refused(tmp_path: Path, contract: RobotContract) -> None:
    script = joint_states(cameras(Script(), delay=500.0), delay=500.0).every(
        "/commands", 20.0, lambda ns, n: forward_command([0.0, 0.0]), delay=500.0
    )
    bag = script.write(tmp_path / "bag", types={"/commands": "std_msgs/msg/Float64MultiArray"})
    with pytest.raises(BagError, match=r"topic /commands: found messages received 500.000 s after the header stamps"):
        run([bag], contract, tmp_path / "set")


# --- what is left out, and counted ---


def test_stale_frames_are_dropped_counted_and_split_the_episode(tmp_path: Path, contract: RobotContract) -> None:
    script = cameras(cameras(Script(), end=1.0), start=1.5)
    executed(joint_states(script))
    dataset = run([script.write(tmp_path / "bag")], contract, tmp_path / "set")
    assert len(dataset.meta.episodes) == 2
    counters = dataset.meta.counters
    # The last image before the gap is from 0.967 s and good for 0.1 s: ticks 1.10 … 1.45 s have none.
    assert counters["stale front"] == counters["dropped"] == 8
    assert counters["ticks"] == len(dataset) + 8
    json.dumps(dict(counters))


def test_frames_without_an_action_are_dropped(tmp_path: Path, contract: RobotContract) -> None:
    script = executed(executed(joint_states(cameras(Script())), end=1.0), start=2.0)
    dataset = run([script.write(tmp_path / "bag")], contract, tmp_path / "set")
    assert len(dataset.meta.episodes) == 2
    assert 18 <= dataset.meta.counters["no action"] <= 19


@pytest.mark.parametrize("back_s", [3.0, 0.5])
def test_time_that_jumps_back_starts_another_episode(tmp_path: Path, contract: RobotContract, back_s: float) -> None:
    script, again = whole(), Script()
    for stream in (cameras, joint_states, executed):
        stream(again, start=3.0 - back_s, end=6.0 - back_s)
    script.messages += [(at + back_s, topic, message) for at, topic, message in again.messages]
    dataset = run([script.write(tmp_path / "bag")], contract, tmp_path / "set")
    first, second = dataset.meta.episodes
    assert first.length == second.length
    assert dataset.meta.counters["time jumps"] == 1
    for episode in (first, second):
        assert (np.diff(dataset.states[episode.start : episode.stop, 0]) > 0.04).all()


def test_a_pause_of_hours_does_not_make_hours_of_ticks(tmp_path: Path, contract: RobotContract) -> None:
    script = whole()
    for stream in (cameras, joint_states, executed):
        stream(script, start=10_000.0, end=10_002.0)
    dataset = run([script.write(tmp_path / "bag")], contract, tmp_path / "set")
    assert len(dataset.meta.episodes) == 2
    assert dataset.meta.counters["ticks"] < 110


# --- what is refused ---


def assert_refused(match: str | None, bag: Path, contract: RobotContract) -> None:
    output = bag.parent / "set"
    with pytest.raises(BagError, match=match) as caught:
        run([bag], contract, output)
    assert str(bag) in str(caught.value)
    assert not output.exists()
    assert not list(output.parent.glob(".*.partial"))


def test_a_missing_topic_is_named_with_those_there_are(tmp_path: Path, contract: RobotContract) -> None:
    bag = executed(joint_states(Script())).write(tmp_path / "bag")
    assert_refused(
        "topic /camera/front/image_raw: found no messages.*/executed_action, /joint_states",
        bag, contract,
    )  # fmt: skip


@pytest.mark.parametrize("topic", list(TYPES))
def test_a_topic_that_vanishes_half_way_is_named(tmp_path: Path, contract: RobotContract, topic: str) -> None:
    script = whole(6.0)
    script.messages = [item for item in script.messages if item[1] != topic or item[0] < 3.0]
    bag = script.write(tmp_path / "bag")
    assert_refused(rf"topic {topic}: found its last message [23]\.\d+ s into .* vanished", bag, contract)
    dataset = run([bag], contract, tmp_path / "set", allow_early_end=True)
    assert 55 <= len(dataset) <= 62


@pytest.mark.parametrize("topic", ["/executed_action", "/joint_states"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_positions_that_are_not_finite_are_named(
    tmp_path: Path, contract: RobotContract, topic: str, value: float
) -> None:
    script = whole()
    script.messages.append((1.0, topic, joint_state(BEGIN + NS, {"pan": 0.0, "lift": value})))
    bag = script.write(tmp_path / "bag")
    assert_refused(f"topic {topic}, message stamped .* joint lift: found (nan|inf)", bag, contract)


def test_commands_that_are_not_finite_are_named(tmp_path: Path, contract: RobotContract) -> None:
    script = joint_states(cameras(Script())).every(
        "/commands", 20.0, lambda ns, n: forward_command([0.0, float("nan") if n == 30 else 0.0])
    )
    bag = script.write(tmp_path / "bag", types={"/commands": "std_msgs/msg/Float64MultiArray"})
    assert_refused("topic /commands, .* joint lift: found NaN", bag, contract)


def test_trajectories_that_are_not_finite_are_named(tmp_path: Path) -> None:
    contract = make_contract(tmp_path, interface="joint_trajectory")
    points = [(0.0, {"pan": 0.0, "lift": 0.0}), (1.5, {"pan": float("nan"), "lift": 0.0})]
    script = joint_states(cameras(Script())).every("/commands", 1.0, lambda ns, n: trajectory(ns, points))
    bag = script.write(tmp_path / "bag", types={"/commands": "trajectory_msgs/msg/JointTrajectory"})
    assert_refused("topic /commands, .* joint pan: found NaN", bag, contract)


def test_another_message_type_is_named(tmp_path: Path, contract: RobotContract) -> None:
    script = executed(joint_states(Script())).every("/camera/front/image_raw", 30.0, compressed)
    bag = script.write(tmp_path / "bag", types={"/camera/front/image_raw": "sensor_msgs/msg/CompressedImage"})
    assert_refused("found type sensor_msgs/msg/CompressedImage, expected sensor_msgs/msg/Image", bag, contract)


def test_another_image_size_is_named(tmp_path: Path, contract: RobotContract) -> None:
    script = executed(joint_states(Script())).every("/camera/front/image_raw", 30.0, lambda ns, n: image(ns, n, size=6))
    assert_refused("size: found 6x6, expected 8x8", script.write(tmp_path / "bag"), contract)


def test_stamps_of_zero_are_refused(tmp_path: Path, contract: RobotContract) -> None:
    script = executed(joint_states(Script())).every("/camera/front/image_raw", 30.0, lambda ns, n: image(0, n))
    assert_refused("found header stamp 0", script.write(tmp_path / "bag"), contract)


@pytest.mark.parametrize("plugin", [StoragePlugin.MCAP, StoragePlugin.SQLITE3])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.4, 0.8, 0.999])
def test_a_bag_cut_short_is_refused(tmp_path: Path, contract: RobotContract, plugin, share: float) -> None:
    bag = whole().write(tmp_path / "bag", plugin=plugin)
    file = next(path for path in bag.iterdir() if path.suffix in (".mcap", ".db3"))
    os.truncate(file, int(file.stat().st_size * share))
    assert_refused(None, bag, contract)


@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_bag_never_becomes_half_a_dataset(tmp_path: Path, contract: RobotContract, seed: int) -> None:
    """Bytes overwritten anywhere: either they were image content, or the bag is refused by name."""
    bag = whole().write(tmp_path / "bag")
    file = next(bag.glob("*.mcap"))
    content = bytearray(file.read_bytes())
    rng = np.random.default_rng(seed)
    for begin in rng.integers(100, len(content) - 100, 40):
        content[begin : begin + 30] = rng.bytes(30)
    file.write_bytes(content)
    assert_refused(None, bag, contract)


def test_recorded_checksums_are_compared(tmp_path: Path, contract: RobotContract) -> None:
    """A bit of an image tips over: no reader would notice without them."""
    bag = whole().write(tmp_path / "bag", checksums=True)
    run([bag], contract, tmp_path / "fine")
    file = next(bag.glob("*.mcap"))
    content = bytearray(file.read_bytes())
    content[content.index(b"\x07" * 150) + 20] ^= 1
    file.write_bytes(content)
    assert_refused("topic /camera/front/image_raw: found checksum", bag, contract)


def test_a_message_cut_short_is_named(tmp_path: Path, contract: RobotContract) -> None:
    bag = tmp_path / "bag"
    with Writer(bag, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        script = whole()
        connections = {topic: writer.add_connection(topic, kind, typestore=STORE) for topic, kind in TYPES.items()}
        for at, topic, message in sorted(script.messages, key=lambda item: item[0]):
            raw = bytes(STORE.serialize_cdr(message, TYPES[topic]))
            cut = topic == "/joint_states" and 1.0 < at < 1.02
            writer.write(connections[topic], BEGIN + round(at * NS), raw[: len(raw) // 2] if cut else raw)
    assert_refused("topic /joint_states: found .* bytes that are no sensor_msgs", bag, contract)


def test_a_bad_bag_after_good_ones_leaves_nothing(tmp_path: Path, contract: RobotContract) -> None:
    good, bad = whole().write(tmp_path / "a"), whole().write(tmp_path / "b")
    os.truncate(bad / "b.mcap", 5000)
    with pytest.raises(BagError, match=str(bad)):
        run([good, bad], contract, tmp_path / "set")
    assert not (tmp_path / "set").exists()
    assert len(run([good], contract, tmp_path / "set")) >= 58


def test_a_folder_without_bags_is_named(tmp_path: Path, contract: RobotContract) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BagError, match="found no bag"):
        run([tmp_path / "empty"], contract, tmp_path / "set")
    with pytest.raises(BagError, match="found no such file"):
        run([tmp_path / "nowhere"], contract, tmp_path / "set")


def test_a_bag_in_which_nothing_fits_together_is_refused(tmp_path: Path, contract: RobotContract) -> None:
    script = executed(joint_states(cameras(Script())))
    script.messages = [item for item in script.messages if item[1] != "/executed_action"]
    executed(script, start=2.98, end=3.03)
    with pytest.raises(DatasetError, match="found no usable frame"):
        run([script.write(tmp_path / "bag")], contract, tmp_path / "set")


# --- command line ---


@pytest.mark.usefixtures("contract")
def test_the_command_reports_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    whole().write(tmp_path / "bags" / "one")
    paths = {"--contract": tmp_path / "contract.yaml", "--output": tmp_path / "set"}
    arguments = [str(tmp_path / "bags"), *(str(word) for pair in paths.items() for word in pair)]
    assert main([*arguments, "--image-size", "16", "--prompt", "reach the ball", "--chunk", "4"]) == 0
    dataset = TransitionDataset(tmp_path / "set")
    assert dataset.images.shape[2:] == (16, 16, 3)
    assert dataset.meta.statistics_horizon == 4
    report = capsys.readouterr().out
    assert f"{len(dataset)} frames" in report and "executed_action" in report
    assert main(arguments) == 2  # exists by now
    assert "found an existing path" in capsys.readouterr().err
