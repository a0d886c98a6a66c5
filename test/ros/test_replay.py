"""Recording a run and replaying it: the bag is a real rosbag2, replays are identical, bad bags are refused by name."""

from __future__ import annotations

import array
import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from graph_assertions import assert_identical, assert_replay_report
from graph_fixtures import GraphRun
from node_testing import ROOT, NodeGraph, Probe, wait_for
from PIL import Image
from rosbags.rosbag2 import Reader
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from selfalign_core.data.dataset import TransitionDataset
from selfalign_core.data.rosbag import convert
from selfalign_core.data.rosbag_file import BagError, BagFile
from selfalign_core.data.rosbag_options import Options
from selfalign_core.robot.contract import RobotContract
from selfalign_core.study.recording import main as report_recording
from selfalign_ros.life.resources import config_file
from selfalign_ros.tools.bag import BagWriter

CAMERAS = ("/camera/overhead/image_raw", "/camera/wrist/image_raw")
LATCHED = ("/e_token", "/prompt", "/body", "/followed_command")


def replay(bag: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "selfalign_ros.tools.replay", str(bag), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


# --- recording ---


def test_recording_holds_every_topic_with_definitions_and_qos(recording: Path) -> None:
    metadata = yaml.safe_load((recording / "metadata.yaml").read_text())["rosbag2_bagfile_information"]
    assert metadata["storage_identifier"] == "mcap"
    assert [(recording / path).is_file() for path in metadata["relative_file_paths"]] == [True]
    topics = {entry["topic_metadata"]["name"]: entry for entry in metadata["topics_with_message_count"]}
    expected = {
        **dict.fromkeys(CAMERAS, "sensor_msgs/msg/Image"),
        "/joint_states": "sensor_msgs/msg/JointState",
        "/joint_trajectory_controller/joint_trajectory": "trajectory_msgs/msg/JointTrajectory",
        "/followed_command": "trajectory_msgs/msg/JointTrajectory",
        "/executed_action": "sensor_msgs/msg/JointState",
        "/prompt": "std_msgs/msg/String",
        "/action_chunk": "selfalign/msg/ActionChunk",
        "/e_token": "selfalign/msg/EToken",
        "/align_report": "selfalign/msg/AlignReport",
        "/distance_to_target": "std_msgs/msg/Float64",
        "/target_reached": "std_msgs/msg/Bool",
        "/body": "std_msgs/msg/String",
        "/diagnostics": "diagnostic_msgs/msg/DiagnosticArray",
    }
    assert {name: entry["topic_metadata"]["type"] for name, entry in topics.items()} == expected
    assert sum(entry["message_count"] for entry in topics.values()) == metadata["message_count"] > 0
    for name, entry in topics.items():
        assert entry["message_count"] > 0, name
        assert entry["topic_metadata"]["serialization_format"] == "cdr"
        profiles = entry["topic_metadata"]["offered_qos_profiles"]
        for profile in profiles:
            assert profile["durability"] == ("transient_local" if name in LATCHED else "volatile"), name
            sensor = name in (*CAMERAS, "/joint_states")
            assert profile["reliability"] == ("best_effort" if sensor else "reliable"), name
        assert profiles, name


def test_recorded_messages_are_readable_with_the_definitions_in_the_bag(recording: Path) -> None:
    """A reader that knows nothing of selfalign takes the types from the bag."""
    store = get_typestore(Stores.ROS2_JAZZY)
    counts: dict[str, int] = {}
    with Reader(recording) as reader:
        for connection in reader.connections:
            if connection.msgtype.startswith("selfalign/"):
                store.register(get_types_from_msg(connection.msgdef.data, connection.msgtype))
        for connection, time_ns, data in reader.messages():
            message = store.deserialize_cdr(data, connection.msgtype)
            counts[connection.topic] = counts.get(connection.topic, 0) + 1
            if connection.topic == "/action_chunk":
                assert message.data.shape == (message.horizon * message.dim,)
            if connection.topic in CAMERAS:
                stamp_ns = message.header.stamp.sec * 10**9 + message.header.stamp.nanosec
                assert message.data.size == message.height * message.step and 0 <= time_ns - stamp_ns < 60 * 10**9
    assert counts["/action_chunk"] >= 3 and counts["/align_report"] >= 3


def test_a_recording_has_the_report_of_its_run(recording: Path, tmp_path: Path) -> None:
    """Read from the bag alone, by what reads the live topics."""
    contract, file = config_file("contracts/sim_arm.yaml"), tmp_path / "run.json"
    assert report_recording([str(recording), "--contract", str(contract), "--report", str(file)]) == 0
    report = json.loads(file.read_text())
    with Reader(recording) as reader:
        counts = {connection.topic: connection.msgcount for connection in reader.connections}
    assert report["chunks"]["count"] == counts["/action_chunk"] and report["align"]["rounds"] == counts["/align_report"]
    assert {f"/{name}": found["received"] for name, found in report["frames"].items()} == {
        c: counts[c] for c in CAMERAS
    }
    assert report["latency_s"]["all"]["p50"] > 0 and report["e_token"]["norm"] > 0
    assert report["bodies"] and len(report["series"]["distance_to_target"]["rows"]) == counts["/distance_to_target"]
    assert report["diagnostics"]["policy: chunks"]["level"] in ("ok", "warn")
    with Image.open(file.with_suffix(".png")) as picture:
        assert picture.size[0] > 800


def test_type_hashes_are_those_of_ros(recording: Path) -> None:
    """The hashes in the bag are those rosidl computes, so that ROS takes the types for its own."""
    from ament_index_python.packages import get_package_share_directory

    metadata = yaml.safe_load((recording / "metadata.yaml").read_text())["rosbag2_bagfile_information"]
    for entry in metadata["topics_with_message_count"]:
        package, _, name = entry["topic_metadata"]["type"].split("/")
        described = Path(get_package_share_directory(package)) / "msg" / f"{name}.json"
        hashes = {item["type_name"]: item["hash_string"] for item in json.loads(described.read_text())["type_hashes"]}
        assert entry["topic_metadata"]["type_description_hash"] == hashes[f"{package}/msg/{name}"]


def test_an_existing_folder_is_not_overwritten(ros_domain: int, tmp_path: Path) -> None:
    (tmp_path / "bag").mkdir()
    run = GraphRun.module("selfalign_ros.tools.record", "--output", "bag", cwd=tmp_path)
    try:
        assert run.wait() == 2
    finally:
        run.close()
    assert "already; expected a new folder" in run.output and not run.pids  # nothing was started
    assert list((tmp_path / "bag").iterdir()) == []
    with pytest.raises(BagError, match="expected a new folder"):
        BagWriter(tmp_path / "bag", {})


# --- replaying ---


@pytest.fixture(scope="module")
def compared(ros_domain: int, recording: Path, folder: Path, parameters: Path) -> subprocess.CompletedProcess[str]:
    """Two replays, one with the quick parameters and one that never aligns, and their comparison."""
    document = yaml.safe_load(parameters.read_text())
    document["/**/aligner"]["ros__parameters"]["enable"] = False
    (folder / "resting.yaml").write_text(yaml.safe_dump(document))
    arguments = ("--params", str(parameters), "--against", "resting.yaml", "--report", "comparison.json")
    result = replay(recording, folder, *arguments, f"domain:={ros_domain}")
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def report(compared: subprocess.CompletedProcess[str], folder: Path) -> dict[str, Any]:
    """What the replay with the quick parameters wrote."""
    return json.loads((folder / "comparison.first.json").read_text())


def test_a_replay_tells_what_the_nodes_produced(report: dict[str, Any]) -> None:
    assert_replay_report(report)


@pytest.fixture
def busy_machine() -> Iterator[None]:
    """Every core has something else to do."""
    command = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(command) for _ in os.sched_getaffinity(0)]
    yield
    assert all(other.poll() is None for other in others)
    for other in others:
        other.kill()
        other.wait()


@pytest.mark.parametrize(
    ("arguments", "processes"),
    [
        pytest.param((), ["policy", "buffer", "aligner", "replay"], id="in four processes"),
        pytest.param(("composed:=true",), ["composition"], id="in one process"),
    ],
)
def test_another_replay_is_identical_on_a_busy_machine(
    ros_domain: int,
    recording: Path,
    folder: Path,
    parameters: Path,
    report: dict[str, Any],
    busy_machine: None,
    arguments: tuple[str, ...],
    processes: list[str],
) -> None:
    """To the one in four processes on a machine with nothing else to do."""
    common = ("--params", str(parameters), f"domain:={ros_domain}", "--compare", "comparison.first.json")
    result = replay(recording, folder, "--report", "again.json", *common, *arguments)
    assert result.returncode == 0, result.stdout
    assert "identical to" in result.stdout
    assert re.findall(r"\[(\w+)-\d\]: process started", result.stdout) == processes
    assert_identical(json.loads((folder / "again.json").read_text()), report)


def test_a_composition_that_cannot_work_ends_with_its_reason(ros_domain: int, recording: Path, folder: Path) -> None:
    result = replay(recording, folder, f"domain:={ros_domain}", "composed:=true", "checkpoint:=nowhere")
    assert result.returncode == 2
    assert "checkpoint 'nowhere': found neither" in result.stdout


def test_two_parameter_files_are_compared_in_numbers_and_a_picture(
    compared: subprocess.CompletedProcess[str], folder: Path
) -> None:
    """What an engineer asks: how many attempts, accepted when, at what cost, and what they did to token and losses."""
    found = json.loads((folder / "comparison.json").read_text())
    assert found["parameters"] == {"aligner.enable": [True, False]}
    quick, resting = found["runs"]
    assert (quick["label"], resting["label"]) == ("quick.yaml", "resting.yaml")
    assert quick["attempts"] >= 1 and quick["compute_per_attempt_s"]["max"] > 0
    assert len(quick["accepted_at_s"]) + len(quick["refused_at_s"]) == quick["attempts"]
    assert (resting["attempts"], resting["rounds"], resting["e_token"]["moved_spreads"]) == (0, 0, 0.0)
    assert found["chunks"]["paired"] == quick["chunks"] == resting["chunks"] >= 3
    assert len(found["chunks"]["joints"]) == 7
    # Without an accepted token nothing may differ, with one the token does: chunks follow the token alone.
    accepted = bool(quick["accepted_at_s"])
    assert (found["e_token"]["distance_last_spreads"] > 0) == accepted
    losses = quick["losses_on_bag"]["losses"]
    assert all(values["before"] > 0 for values in losses.values())
    assert any(values["difference"] != 0 for values in losses.values()) == accepted
    assert all(values["difference"] == 0 for values in resting["losses_on_bag"]["losses"].values())
    assert "inverse dynamics loss on the bag" in compared.stdout and "attempts to align" in compared.stdout
    with Image.open(folder / "comparison.png") as picture:
        assert picture.size[0] > 800


def test_a_comparison_that_cannot_be_made_is_refused_before_anything_starts(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "bag")
    result = replay(bag, tmp_path, "--against", "other.yaml", "--compare", "first.json")
    assert result.returncode == 2 and "argument compare: found it with another replay" in result.stderr
    assert "process started" not in result.stdout


def test_differences_are_named() -> None:
    from selfalign_core.study.replay_report import first_difference

    one: dict[str, Any] = {
        "chunks": [{"stamp_ns": 1, "sha256": "aa"}, {"stamp_ns": 2, "sha256": "bb"}],
        "e_tokens": [{"version": 0, "sha256": "cc"}],
        "aligns": [],
    }
    assert first_difference(one, copy.deepcopy(one)) == ""
    other = copy.deepcopy(one)
    other["chunks"][1]["sha256"] = "xx"
    assert first_difference(one, other) == "chunks[1].sha256: found xx; expected bb"
    other = copy.deepcopy(one)
    other["e_tokens"].append({"version": 1, "sha256": "dd"})
    assert first_difference(one, other) == "e_tokens: found 2 of them; expected 1"


# --- what a bag becomes ---

BUFFERED = (*CAMERAS, "/joint_states", "/executed_action")


def disturb(bag: Path, path: Path) -> None:
    """Write the bag anew, with messages lost, late by up to three frames, doubled, and thereby out of order."""
    rng = np.random.default_rng(0)
    source = BagFile(bag)
    with BagWriter(path, source.about) as writer:
        messages = []
        for topic in ("/prompt", *BUFFERED):
            writer.add_topic(topic, source.types[topic], [])
            for _, received_ns, data in source.messages({topic: source.types[topic]}):
                fate = rng.random() if topic != "/prompt" else 1.0
                if fate > 0.05:
                    late_ns = int(rng.integers(1, 10**8)) if fate < 0.3 else 0
                    messages.append((received_ns + late_ns, topic, data))
                if 0.3 <= fate < 0.35:
                    messages.append((received_ns + 10**7, topic, data))
        for time_ns, topic, data in sorted(messages):
            writer.write(topic, time_ns, data)


def play(probe: Probe, bag: Path, contract: RobotContract) -> None:
    """Play a bag to a buffer node in lock-step, as the replay node does it."""
    from selfalign.srv import Step
    from selfalign_ros.bridge import qos
    from selfalign_ros.bridge.conversions import to_stamp
    from selfalign_ros.bridge.topics import graph_topics

    types = {f"/{topic.name}": topic.type for topic in graph_topics(contract)}
    publishers = {topic: probe.publisher(types[topic], topic, qos.LOCKSTEP) for topic in BUFFERED}
    client = probe.node.create_client(Step, "buffer/step")
    wait_for(client.service_is_ready, "the buffer works in lock-step")
    wait_for(lambda: all(p.get_subscription_count() for p in publishers.values()), "the buffer listens")
    published = dict.fromkeys(publishers, 0)
    opened = BagFile(bag)
    now_ns, _ = opened.span({topic: opened.types[topic] for topic in ("/prompt", *BUFFERED)})
    messages = list(opened.messages({topic: opened.types[topic] for topic in BUFFERED}))
    while messages:
        now_ns += contract.dt_ns
        while messages and messages[0][1] <= now_ns:
            topic, _, data = messages.pop(0)
            publishers[topic].publish(data)
            published[topic] += 1
        topics, counts = [name.strip("/") for name in published], array.array("Q", published.values())
        future = client.call_async(Step.Request(stamp=to_stamp(now_ns), topics=topics, counts=counts))
        wait_for(future.done, "the buffer answers")
        assert future.result().success, future.result().message
    probe.node.destroy_client(client)
    for publisher in publishers.values():
        probe.node.destroy_publisher(publisher)


def test_the_buffer_of_a_replay_and_the_dataset_of_the_bag_have_the_same_transitions(
    recording: Path, folder: Path, probe: Probe, graph: NodeGraph
) -> None:
    """To the last bit, of a real run whose messages were disturbed on their way."""
    from selfalign.srv import SampleTransitions
    from selfalign_ros.bridge.conversions import read_transitions

    contract = RobotContract.from_yaml(folder / "contract.yaml")
    disturb(recording, folder / "disturbed")
    node = graph.start("buffer", contract=folder / "contract.yaml", lockstep=True, capacity=2000)
    play(probe, folder / "disturbed", contract)
    request = SampleTransitions.Request(count=1000, stride=1)
    response = probe.call(SampleTransitions, "buffer/sample_transitions", request)
    node.stop()
    live = read_transitions(response, contract)

    options = Options(image_size=(response.height, response.width), prompt="", allow_early_end=True)
    convert([folder / "disturbed"], contract, folder / "dataset", options)
    dataset = TransitionDataset(folder / "dataset")
    counters = dataset.meta.counters
    assert counters["out of order"] > 20 and counters["duplicate stamp"] > 5
    chosen: list[int] = []
    for start in dataset.starts(response.horizon)[::-1]:
        # The buffer hands out none that begins less than half a control step before the one after it.
        if not chosen or dataset.stamps[chosen[0]] - dataset.stamps[start] >= contract.dt_ns // 2:
            chosen.insert(0, int(start))
    bag = dataset.transitions(np.array(chosen), response.horizon)
    assert len(live) == len(bag) >= 30
    for name in ("frames", "frame_states", "frame_stamps", "obs_index", "next_index", "actions"):
        np.testing.assert_array_equal(getattr(live, name), getattr(bag, name), err_msg=name)


# --- bags that cannot be played ---


def write_bag(path: Path, *, leave_out: str = "", types: dict[str, str] | None = None, late_ns: int = 0) -> Path:
    """A small bag with everything a replay needs; ``late_ns``: how much later than its stamps it was recorded."""
    store = get_typestore(Stores.ROS2_JAZZY)
    image, joints = (store.types[f"sensor_msgs/msg/{name}"] for name in ("Image", "JointState"))
    header, time = store.types["std_msgs/msg/Header"], store.types["builtin_interfaces/msg/Time"]
    topics = dict.fromkeys(CAMERAS, "sensor_msgs/msg/Image")
    topics |= dict.fromkeys(("/joint_states", "/executed_action"), "sensor_msgs/msg/JointState")
    with BagWriter(path, {}) as writer:
        for topic, type_name in (topics | (types or {})).items():
            if topic == leave_out:
                continue
            writer.add_topic(topic, type_name, [])
            for i in range(3):
                stamp_ns = 10**18 + i * 10**8
                head = header(time(stamp_ns // 10**9, stamp_ns % 10**9), "")
                if type_name.endswith("Image"):
                    pixels = np.full(12, i, np.uint8)
                    message = image(head, 2, 2, "rgb8", 0, 6, pixels)
                else:
                    empty = np.zeros(0)
                    message = joints(head, ["a"], np.zeros(1), empty, empty)
                data = b"" if type_name == "std_msgs/msg/Empty" else store.serialize_cdr(message, topics[topic])
                writer.write(topic, stamp_ns + late_ns, bytes(data))
    return path


def test_bag_module_writes_what_it_reads(tmp_path: Path) -> None:
    bag = BagFile.completed(write_bag(tmp_path / "bag"))
    assert bag.message_counts() == {**dict.fromkeys(CAMERAS, 3), "/joint_states": 3, "/executed_action": 3}
    first, last = bag.span(bag.types)
    assert (first, last) == (10**18, 10**18 + 2 * 10**8)
    messages = list(bag.messages({"/joint_states": "sensor_msgs/msg/JointState"}))
    assert [received_ns - first for _, received_ns, _ in messages] == [0, 10**8, 2 * 10**8]


def _truncate(bag: Path) -> None:
    mcap = next(bag.glob("*.mcap"))
    mcap.write_bytes(mcap.read_bytes()[: mcap.stat().st_size // 2])


def _damage(bag: Path) -> None:
    mcap = next(bag.glob("*.mcap"))
    data = bytearray(mcap.read_bytes())
    pixels = data.index(bytes([2] * 12))
    data[pixels] = 77
    mcap.write_bytes(data)


def _unfinished(bag: Path) -> None:
    (bag / "metadata.yaml").unlink()


def _no_bag(bag: Path) -> None:
    shutil.rmtree(bag)


def _lost_file(bag: Path) -> None:
    next(bag.glob("*.mcap")).unlink()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_truncate, "damaged or cut short"),
        (_unfinished, "found no metadata.yaml; expected a bag whose recording was completed"),
        (_no_bag, "found nothing; expected a bag's folder"),
        (_lost_file, "damaged or cut short"),
    ],
)
def test_a_bag_that_is_not_whole_is_refused_before_anything_starts(
    break_it: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    bag = write_bag(tmp_path / "bag")
    break_it(bag)
    result = replay(bag, tmp_path)
    assert result.returncode == 2
    assert message in result.stderr and str(bag) in result.stderr
    assert "process started" not in result.stdout


def test_an_altered_message_is_found(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "bag")
    _damage(bag)
    opened = BagFile.completed(bag)
    with pytest.raises(BagError, match=r"topic /camera/.*found checksum .*damaged or changed"):
        opened.span(opened.types)


def _refusing_replay(bag: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "selfalign_ros.tools.replay_node", "--ros-args", "-p", f"bag:={bag}"]
    command += ["-p", "contract:=contracts/sim_arm.yaml", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stdout + result.stderr
    return result.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"leave_out": CAMERAS[1]}, "topic /camera/wrist/image_raw: found none; expected it, the contract sim_arm"),
        ({"leave_out": "/joint_states"}, "topic /joint_states: found none"),
        ({"leave_out": "/executed_action"}, "topic /executed_action: found none"),
        (
            {"types": {CAMERAS[0]: "std_msgs/msg/Empty"}},
            "topic /camera/overhead/image_raw: found type std_msgs/msg/Empty; expected sensor_msgs/msg/Image",
        ),
        ({"late_ns": 60 * 10**9}, "found a header stamp 60.0 s before its time of recording; expected one clock"),
    ],
)
def test_a_bag_that_does_not_fit_the_contract_is_refused(
    ros_domain: int, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    assert message in _refusing_replay(write_bag(tmp_path / "bag", **changes))


def test_a_report_that_is_none_cannot_be_compared_with(ros_domain: int, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"schema": "something else"}')
    bag = write_bag(tmp_path / "bag")
    assert "expected ('selfalign/replay', 5)" in _refusing_replay(bag, "-p", f"compare:={tmp_path}/other.json")


def test_a_report_that_cannot_be_written_is_refused_before_the_replay(ros_domain: int, tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "bag")
    output = _refusing_replay(bag, "-p", f"report:={tmp_path}/bag/metadata.yaml/replay.json")
    assert "parameter report: found" in output
    assert "Traceback" not in output


def test_unknown_types_are_refused_when_recording(tmp_path: Path) -> None:
    with (
        pytest.raises(BagError, match="topic /x: found unknown type my_msgs/msg/Thing"),
        BagWriter(tmp_path / "bag", {}) as writer,
    ):
        writer.add_topic("/x", "my_msgs/msg/Thing", [])


def test_a_bag_that_is_none_is_named_with_its_blanks_through_make(ros_domain: int, tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    # In the place of Python and tools/bootstrap.py.
    (tmp_path / "python").write_text(f'#!/bin/sh\nshift 3; exec {sys.executable} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "ARGS"))}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    for name in ("no such bag", "no; touch harm", "`touch harm`$(touch harm)"):
        words = ["make", "replay", f"BAG={name}", f"PYTHON={tmp_path / 'python'}"]
        refused = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert refused.returncode != 0 and f"{tmp_path / name}: found nothing" in refused.stderr, refused.stderr
        assert not (tmp_path / "harm").exists()
