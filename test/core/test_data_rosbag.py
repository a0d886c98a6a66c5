"""Bags to dataset: what is synchronised with what, what is counted, and what is refused, on real bags on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from bag_scripts import (
    BEGIN,
    JOINTS,
    NS,
    STORE,
    TYPES,
    Script,
    T,
    compressed,
    forward_command,
    image,
    joint_state,
    make_contract,
    trajectory,
)
from rosbags.rosbag2 import StoragePlugin, Writer

from selfalign_core.data.dataset import TransitionDataset
from selfalign_core.data.rosbag import convert, main
from selfalign_core.data.rosbag_file import BagError, find_bags
from selfalign_core.data.rosbag_options import Options
from selfalign_core.errors import DatasetError
from selfalign_core.robot.contract import RobotContract


@pytest.fixture
def contract(tmp_path: Path) -> RobotContract:
    return make_contract(tmp_path)


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


def newest_not_after(times: np.ndarray, rate_hz: float) -> np.ndarray:
    """Of a topic at ``rate_hz`` from second 0 on: when the newest one up to each time was stamped [s]."""
    return np.floor(times * rate_hz + 1e-6) / rate_hz


def test_a_clean_bag_becomes_one_episode(tmp_path: Path, contract: RobotContract) -> None:
    dataset = run([whole().write(tmp_path / "bag")], contract, tmp_path / "set", prompt="reach")
    assert len(dataset.meta.episodes) == 1
    assert 58 <= len(dataset) <= 60
    times = (dataset.stamps - BEGIN) / NS
    np.testing.assert_array_equal(dataset.images[:, 0, 0, 0, 0], np.round(times * 30))
    np.testing.assert_allclose(dataset.states[:, 0], times, atol=1 / 60 + 1e-6)
    np.testing.assert_allclose(dataset.actions[:, 0], newest_not_after(times + 0.025, 20.0), atol=1e-6)
    assert dataset.meta.prompts == ("reach",)
    assert dataset.meta.embodiments == ("two_joints",)
    assert dataset.meta.joint_names == JOINTS
    assert dataset.meta.counters == {"ticks": len(dataset)}
    assert dataset.norm_stats["state"].min[1] == -1.0


def test_state_and_actions_are_of_the_picture_not_of_the_tick(tmp_path: Path, contract: RobotContract) -> None:
    """However old the picture was when it was seen: what the policy gets is of one moment."""
    script = executed(joint_states(cameras(Script(), delay=0.06)))
    dataset = run([script.write(tmp_path / "bag")], contract, tmp_path / "set")
    times = (dataset.stamps - BEGIN) / NS
    np.testing.assert_array_equal(dataset.images[:, 0, 0, 0, 0], np.round(times * 30))
    lead = dataset.states[:, 0] - times
    assert lead.min() >= -1 / 60 - 1e-6 and lead.max() <= 1e-6
    np.testing.assert_allclose(dataset.actions[:, 0], newest_not_after(times + 0.025, 20.0), atol=1e-6)
    # What a nodes' tick sees has arrived by then: the last picture that is used was stamped 60 ms before the last tick.
    assert times.max() <= 3.05 - 0.06


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
    # The first tick is at 0.05 s, that at 1 s the 20th; the same prompt again ends nothing.
    assert [episode.start for episode in meta.episodes] == [0, 19, 39]
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


def test_what_the_nodes_would_have_refused_is_no_frame(tmp_path: Path, contract: RobotContract) -> None:
    script = executed(joint_states(cameras(Script(), delay=0.3)))
    with pytest.raises(BagError, match=r"found no usable frame.*stale front 6\d"):
        run([script.write(tmp_path / "bag")], contract, tmp_path / "set", allow_early_end=True)


@pytest.mark.parametrize("offset_s", [0.4, 1000.0, -1000.0])
def test_receive_stamps_of_another_clock_say_nothing(tmp_path: Path, contract: RobotContract, offset_s: float) -> None:
    """Then a message has arrived when the newest one before it was stamped."""
    script = executed(joint_states(cameras(Script())))
    script.messages.sort(key=lambda item: item[0])
    expected = run([script.write(tmp_path / "bag")], contract, tmp_path / "expected")
    script.messages = [(at + offset_s, topic, message) for at, topic, message in script.messages]
    found = run([script.write(tmp_path / "other_bag")], contract, tmp_path / "set")
    for name in ("stamps", "states", "actions", "images"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_on_another_clock_a_late_picture_is_late_all_the_same(tmp_path: Path, contract: RobotContract) -> None:
    script = executed(joint_states(cameras(Script(), delay=1000.06), delay=1000.0), delay=1000.0)
    dataset = run([script.write(tmp_path / "bag")], contract, tmp_path / "set")
    ticks = BEGIN + np.arange(1, 61) * contract.dt_ns
    ages = ticks - dataset.stamps[np.searchsorted(dataset.stamps, ticks - NS // 30, side="right") - 1]
    assert ages[5:-1].min() >= 0.04 * NS  # 60 ms, less what lies between two joint states
    times = (dataset.stamps - BEGIN) / NS
    np.testing.assert_allclose(dataset.states[:, 0], times, atol=1 / 60 + 1e-6)


def test_joints_are_found_by_name(tmp_path: Path, contract: RobotContract) -> None:
    def reordered(ns: int, n: int):
        return joint_state(ns, {"wheel": 9.0, "lift": 0.25, "pan": 0.75})

    script = cameras(Script()).every("/joint_states", 60.0, reordered).every("/executed_action", 20.0, reordered)
    dataset = run([script.write(tmp_path / "bag")], contract, tmp_path / "set")
    assert (dataset.states == [0.75, 0.25]).all()
    assert (dataset.actions == [0.75, 0.25]).all()


def test_joint_states_of_others_are_counted_and_ignored(tmp_path: Path, contract: RobotContract) -> None:
    """A mobile base on the same topic, with a clock and faults of its own, which talks longer than the arm."""
    plain = run([whole().write(tmp_path / "plain")], contract, tmp_path / "without")
    script = whole().every("/joint_states", 10.0, lambda ns, n: joint_state(ns - 1, {"wheel": np.nan}), start=0.1)
    script.every("/joint_states", 10.0, lambda ns, n: joint_state(n, {"wheel": 1.0}), start=2.0)
    dataset = run([script.write(tmp_path / "bag")], contract, tmp_path / "set")
    counters = dataset.meta.counters
    assert counters == plain.meta.counters | {"foreign joint states": 29 + 10}
    np.testing.assert_array_equal(dataset.states, plain.states)


def test_joints_that_come_in_several_messages_are_put_together(tmp_path: Path, contract: RobotContract) -> None:
    script = executed(cameras(Script()))
    script.every("/joint_states", 50.0, lambda ns, n: joint_state(ns, {"pan": 0.01 * n}))
    script.every("/joint_states", 50.0, lambda ns, n: joint_state(ns, {"lift": -0.01 * n}), start=0.004)
    dataset = run([script.write(tmp_path / "bag")], contract, tmp_path / "set")
    times = (dataset.stamps - BEGIN) / NS
    assert 57 <= len(dataset) <= 60
    np.testing.assert_allclose(dataset.states[:, 0], 0.01 * np.floor(times * 50 + 1e-6), atol=1e-6)
    np.testing.assert_allclose(dataset.states[:, 1], -0.01 * np.floor((times - 0.004) * 50 + 1e-6), atol=1e-6)
    assert not {"dropped", "out of order", "duplicate stamp"} & dataset.meta.counters.keys()


def test_joint_states_that_contradict_each_other_are_left_out_and_counted(
    tmp_path: Path, contract: RobotContract
) -> None:
    """A second publisher of zeros for a second of six; its last message counts, and the arm's next one."""
    script = executed(cameras(Script(), end=6.0), end=6.0)
    script.every("/joint_states", 50.0, lambda ns, n: joint_state(ns, {"pan": np.sin(n / 50), "lift": 1.0}), end=6.0)
    script.every("/joint_states", 50.0, lambda ns, n: joint_state(ns, {"pan": 0.0, "lift": 0.0}), start=2.01, end=3.0)
    (report,) = convert([script.write(tmp_path / "bag")], contract, tmp_path / "set", Options(image_size=(8, 8)))
    dataset, counters = TransitionDataset(tmp_path / "set"), report.counters
    times = (dataset.stamps - BEGIN) / NS
    assert (dataset.states[:, 1] == 1.0).all()
    assert not ((times > 2.01) & (times < 3.4)).any() and (times < 2.0).any() and (times > 3.6).any()
    assert 98 <= counters["implausible joint states"] <= 100
    assert 29 <= counters["implausible joint_states"] <= 31
    assert "implausible joint states" in report.line()


def test_a_bag_of_two_publishers_that_contradict_each_other_throughout_is_refused(
    tmp_path: Path, contract: RobotContract
) -> None:
    def all_zero(ns: int, n: int):
        return joint_state(ns, {"pan": 0.0, "lift": 0.0})

    for name, start, delay in (("alternating", 0.013, 0.0), ("one_stamp", 0.0, 0.001)):
        script = executed(cameras(Script()))
        script.every("/joint_states", 50.0, lambda ns, n: joint_state(ns, {"pan": np.sin(n / 20) + 0.5, "lift": 1.0}))
        script.every("/joint_states", 50.0, all_zero, start=start, delay=delay)
        bag = script.write(tmp_path / name)
        with pytest.raises(BagError, match=r"found no usable frame, .* implausible joint states 29"):
            run([bag], contract, tmp_path / "set")


@pytest.mark.parametrize(
    ("lift", "match"),
    [
        ({}, r"topic /joint_states: found no joints \['lift'\]"),
        ({"end": 1.5}, r"topic /joint_states, joint lift: found its last message 1\.\d+ s into .* vanished"),
    ],
)
def test_a_joint_that_is_missing_or_vanishes_is_named(
    tmp_path: Path, contract: RobotContract, lift: dict[str, float], match: str
) -> None:
    script = executed(cameras(Script())).every("/joint_states", 50.0, lambda ns, n: joint_state(ns, {"pan": 0.0}))
    if lift:
        script.every("/joint_states", 50.0, lambda ns, n: joint_state(ns, {"lift": 0.0}), **lift)
    assert_refused(match, script.write(tmp_path / "bag"), contract)


def test_a_bag_of_others_joint_states_alone_is_refused(tmp_path: Path, contract: RobotContract) -> None:
    script = executed(cameras(Script())).every("/joint_states", 50.0, lambda ns, n: joint_state(ns, {"wheel": 0.0}))
    match = r"topic /joint_states: found joints \['wheel'\]; expected some of \['pan', 'lift'\], in every message"
    assert_refused(match, script.write(tmp_path / "bag"), contract)


def test_executed_actions_without_our_joints_are_counted_and_skipped(tmp_path: Path, contract: RobotContract) -> None:
    script = whole().every("/executed_action", 10.0, lambda ns, n: joint_state(ns + 1, {"wheel": 1.0}))
    dataset = run([script.write(tmp_path / "bag")], contract, tmp_path / "set")
    assert dataset.meta.counters == {"ticks": len(dataset), "incomplete executed actions": 30}


def test_compressed_images_are_decoded(tmp_path: Path) -> None:
    contract = make_contract(tmp_path, encoding="compressed")
    script = executed(joint_states(Script())).every("/camera/front/image_raw", 30.0, compressed)
    types = {"/camera/front/image_raw": "sensor_msgs/msg/CompressedImage"}
    dataset = run([script.write(tmp_path / "bag", types=types)], contract, tmp_path / "set")
    np.testing.assert_array_equal(dataset.images[:, 0, 3, 3, 1], np.round((dataset.stamps - BEGIN) / NS * 30))


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
    times = (dataset.stamps - BEGIN) / NS
    np.testing.assert_allclose(dataset.actions[:, 0], newest_not_after(times + 0.025 - 0.01, 20.0), atol=1e-6)
    np.testing.assert_array_equal(np.diff(dataset.track.stamps), contract.dt_ns)


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
    # Once per control step, as the policy node says what it executes.
    np.testing.assert_array_equal(np.diff(dataset.track.stamps), contract.dt_ns)
    np.testing.assert_allclose(dataset.track.actions[:, 0], (dataset.track.stamps - BEGIN) / NS, atol=1e-6)
    np.testing.assert_allclose(dataset.actions[:, 0], (dataset.stamps - BEGIN) / NS, atol=0.025 + 1e-6)


def test_the_end_of_a_trajectory_is_held_as_long_as_an_action(tmp_path: Path) -> None:
    contract = make_contract(tmp_path, interface="joint_trajectory")
    script = joint_states(cameras(Script()))
    path = [(0.0, {"pan": 0.0, "lift": 0.0}), (0.52, {"pan": 0.52, "lift": 0.0})]
    script.messages.append((1.0, "/commands", trajectory(BEGIN + NS, path)))
    bag = script.write(tmp_path / "bag", types={"/commands": "trajectory_msgs/msg/JointTrajectory"})
    dataset = run([bag], contract, tmp_path / "set", allow_early_end=True)
    assert (dataset.track.stamps[0], dataset.track.stamps[-1]) == (BEGIN + NS, BEGIN + NS + 520_000_000)
    np.testing.assert_allclose(dataset.track.actions[-2:, 0], [0.5, 0.52], atol=1e-6)
    has_action = np.isfinite(dataset.actions[:, 0])
    held = dataset.stamps <= BEGIN + NS + 520_000_000 + 1.5 * contract.dt_ns
    np.testing.assert_array_equal(has_action, held)
    # A frame after that can only be the end of a transition, and two steps later not even that.
    assert 1 <= (~has_action).sum() <= 3


def test_commands_may_stay_in_force_longer_than_in_the_nodes(tmp_path: Path, contract: RobotContract) -> None:
    """For a robot that is told where to go five times a second."""
    script = joint_states(cameras(Script())).every(
        "/commands", 5.0, lambda ns, n: forward_command([seconds(ns), 0.0]), end=2.0
    )
    bag = script.write(tmp_path / "bag", types={"/commands": "std_msgs/msg/Float64MultiArray"})
    dataset = run([bag], contract, tmp_path / "set", max_action_age_s=0.3, allow_early_end=True)
    times = (dataset.stamps - BEGIN) / NS
    has_action = np.isfinite(dataset.actions[:, 0])
    np.testing.assert_array_equal(has_action, times <= 1.8 + 0.3 + 1e-6)
    held = np.minimum(newest_not_after(times + 0.025, 5.0), 1.8)
    np.testing.assert_allclose(dataset.actions[has_action, 0], held[has_action], atol=1e-6)
    with pytest.raises(DatasetError, match=r"max_action_age: found 0.05 s, expected at least .*0.075 s"):
        run([bag], contract, tmp_path / "short", max_action_age_s=0.05)


def test_commands_on_another_clock_are_refused(tmp_path: Path, contract: RobotContract) -> None:
    script = joint_states(cameras(Script(), delay=500.0), delay=500.0).every(
        "/commands", 20.0, lambda ns, n: forward_command([0.0, 0.0]), delay=500.0
    )
    bag = script.write(tmp_path / "bag", types={"/commands": "std_msgs/msg/Float64MultiArray"})
    with pytest.raises(BagError, match=r"topic /commands: found messages received 500.000 s after the header stamps"):
        run([bag], contract, tmp_path / "set")


# --- what is left out, and counted ---


def test_stale_ticks_are_dropped_and_counted_and_the_episode_goes_on(tmp_path: Path, contract: RobotContract) -> None:
    script = cameras(cameras(Script(), end=1.0), start=1.5)
    executed(joint_states(script))
    dataset = run([script.write(tmp_path / "bag")], contract, tmp_path / "set")
    counters = dataset.meta.counters
    # The last image before the gap is from 0.967 s and good for 0.1 s: ticks 1.10 … 1.45 s have none, and that at
    # 1.05 s no newer one than that before it.
    assert counters["stale front"] == counters["dropped"] == 8
    assert counters["ticks"] == len(dataset) + 8 + counters["repeated front"]
    json.dumps(dict(counters))
    assert len(dataset.meta.episodes) == 1
    gap = int(np.argmax(np.diff(dataset.stamps)))
    starts = dataset.starts(4)
    assert gap not in starts and gap + 1 in starts
    assert len(dataset) - 10 <= len(starts) <= len(dataset) - 8


def test_a_hole_of_more_than_a_second_ends_the_episode(tmp_path: Path, contract: RobotContract) -> None:
    script = executed(joint_states(cameras(cameras(Script(), end=1.0), start=2.2)))
    dataset = run([script.write(tmp_path / "bag")], contract, tmp_path / "set")
    assert len(dataset.meta.episodes) == 2


def test_a_camera_slower_than_the_control_rate_gives_no_frame_twice(tmp_path: Path, contract: RobotContract) -> None:
    script = executed(joint_states(Script())).every("/camera/front/image_raw", 12.0, image)
    dataset = run([script.write(tmp_path / "bag")], contract, tmp_path / "set")
    assert len(np.unique(dataset.stamps)) == len(dataset) == 36
    assert dataset.meta.counters["repeated front"] == dataset.meta.counters["ticks"] - 36
    assert "dropped" not in dataset.meta.counters


def test_frames_without_an_action_are_dropped(tmp_path: Path, contract: RobotContract) -> None:
    script = executed(executed(joint_states(cameras(Script())), start=0.3, end=1.0), start=2.3)
    dataset = run([script.write(tmp_path / "bag")], contract, tmp_path / "set")
    assert len(dataset.meta.episodes) == 2
    times = (dataset.stamps - BEGIN) / NS
    first, second = (times[e.start : e.stop] for e in dataset.meta.episodes)
    assert first[0] >= 0.3 - 0.025 and second[0] >= 2.3 - 0.025
    # The last action is from 0.95 s: in force until 1.025 s, and a transition of it ends until 1.1 s.
    assert 1.025 < first[-1] <= 1.1 + 1e-6
    assert np.isnan(dataset.actions[times > 1.026][: (first > 1.026).sum()]).all()
    assert dataset.starts(1)[-1] == len(dataset) - 2
    assert 27 <= dataset.meta.counters["no action"] <= 31


@pytest.mark.parametrize("back_s", [3.0, 0.5])
def test_time_that_jumps_back_starts_another_episode(tmp_path: Path, contract: RobotContract, back_s: float) -> None:
    """A simulation that is reset, recorded on the wall's clock."""
    script, again = whole(), Script()
    for stream in (cameras, joint_states, executed):
        stream(again, start=3.0 - back_s, end=6.0 - back_s)
    script.messages += [(at + back_s, topic, message) for at, topic, message in again.messages]
    script.messages = [(at + 1000.0, topic, message) for at, topic, message in script.messages]
    dataset = run([script.write(tmp_path / "bag")], contract, tmp_path / "set")
    first, second = dataset.meta.episodes
    assert first.length == second.length
    assert dataset.meta.counters["time jumps"] == 1
    for episode in (first, second):
        assert (np.diff(dataset.states[episode.start : episode.stop, 0]) > 0.01).all()


def test_a_topic_that_begins_a_new_time_ends_nothing_else(tmp_path: Path, contract: RobotContract) -> None:
    """One joint state from long before: those before it are forgotten, and one picture has none that is old enough."""
    script = executed(joint_states(cameras(Script(), delay=0.02)))
    script.messages.append((1.49, "/joint_states", joint_state(BEGIN + NS, {"pan": 1.0, "lift": 0.0})))
    dataset = run([script.write(tmp_path / "bag")], contract, tmp_path / "set")
    assert dataset.meta.counters == {
        "ticks": len(dataset) + 1, "time jumps": 1, "stale joint_states": 1, "dropped": 1
    }  # fmt: skip
    assert len(dataset.meta.episodes) == 1


def test_a_pause_of_hours_does_not_make_hours_of_ticks(tmp_path: Path, contract: RobotContract) -> None:
    script = whole()
    for stream in (cameras, joint_states, executed):
        stream(script, start=10_000.0, end=10_002.0)
    dataset = run([script.write(tmp_path / "bag")], contract, tmp_path / "set")
    assert len(dataset.meta.episodes) == 2
    assert dataset.meta.counters["ticks"] < 130


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
    assert_refused("size: found 6x6; expected 8x8", script.write(tmp_path / "bag"), contract)


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
