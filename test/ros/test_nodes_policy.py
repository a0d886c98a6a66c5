"""The policy node on a robot that misbehaves: it names the fault, it does not move, and it recovers.

The robot is played by this process, so every fault is exact: what it publishes is what the policy sees.
"""

from __future__ import annotations

import itertools
import math
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from node_testing import wait_for

pytestmark = pytest.mark.ros

INPUTS, CHUNKS, E_TOKEN = "policy: inputs", "policy: chunks", "policy: e_token"
COMMANDS = "forward_position_controller/commands"


@dataclass(frozen=True)
class Behaviour:
    """What the robot does; the defaults are a healthy robot."""

    silent: tuple[str, ...] = ()
    encoding: str = "rgb8"
    channels: int = 3
    size: int = 64
    names: tuple[str, ...] = ()
    position: tuple[float, ...] = (0.0,) * 7
    apart: bool = False  # the gripper's joint state in a message of its own
    wheels: bool = False  # a mobile base on the same topic, without stamps and positions
    false_position: tuple[float, ...] = ()  # what a second publisher says of the joints, half a cycle before
    image_age_s: float = 0.0
    joint_age_s: float = 0.0
    frozen: bool = False  # the same image, with the same stamp, again and again
    repeating: bool = False  # the same image with fresh stamps
    every: int = 1  # images come with every so many joint states


SILENT = Behaviour(silent=("overhead", "wrist", "joints"))


class FakeRobot:
    """Publishes images and joint states at 20 Hz; ``behaviour`` is replaced as a whole, so no cycle mixes two."""

    def __init__(self, probe, contract) -> None:
        from rclpy.qos import qos_profile_sensor_data
        from sensor_msgs.msg import Image, JointState

        self.behaviour = SILENT
        self._probe, self._contract = probe, contract
        self._cameras = {
            camera.name: probe.publisher(Image, camera.topic, qos_profile_sensor_data) for camera in contract.cameras
        }
        self._joints = probe.publisher(JointState, contract.joint_state_topic, qos_profile_sensor_data)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._publish, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _publish(self) -> None:
        from rclpy.duration import Duration
        from sensor_msgs.msg import Image, JointState

        for ticks in itertools.count():
            if self._stop.wait(0.05):
                return
            do = self.behaviour
            now = self._probe.node.get_clock().now()
            names = do.names or self._contract.joint_names
            joints = JointState(name=list(names), position=list(do.position))
            joints.header.stamp = (now - Duration(seconds=do.joint_age_s)).to_msg()
            if do.apart:
                gripper = JointState(header=joints.header, name=joints.name[-1:], position=joints.position[-1:])
                joints.name, joints.position = joints.name[:-1], joints.position[:-1]
                if "gripper" not in do.silent:
                    self._joints.publish(gripper)
            if "joints" not in do.silent:
                self._joints.publish(joints)
            if do.false_position:
                joints = JointState(name=joints.name, position=list(do.false_position))
                joints.header.stamp = (now - Duration(seconds=0.025)).to_msg()
                self._joints.publish(joints)
            if do.wheels:
                self._joints.publish(JointState(name=["wheel_left", "wheel_right"], velocity=[0.1, 0.2]))
            for name, publisher in self._cameras.items():
                image = Image(height=do.size, width=do.size, step=do.size * do.channels, encoding=do.encoding)
                brightness = 0 if do.repeating else 1 + ticks % 255
                image.data = bytes([brightness]) * (do.size * do.size * do.channels)
                if not do.frozen:
                    self._image_stamp = (now - Duration(seconds=do.image_age_s)).to_msg()
                image.header.stamp = self._image_stamp
                if name not in do.silent and ticks % do.every == 0:
                    publisher.publish(image)


@pytest.fixture(scope="module")
def contract_path(graph):
    return graph.contract("sim_arm_forward.yaml", max_age_s=0.5)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The folder for what survives a restart."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def policy(graph, probe, contract_path, kept):
    from sensor_msgs.msg import JointState
    from std_msgs.msg import Float64MultiArray

    from selfalign.msg import ActionChunk, EToken
    from selfalign_ros.bridge import qos

    probe.listen(Float64MultiArray, COMMANDS, qos.EVENTS)
    probe.listen(JointState, "executed_action", qos.EVENTS)
    probe.listen(ActionChunk, "action_chunk", qos.EVENTS)
    probe.listen(EToken, "policy/e_token_in_use", qos.LATCHED)
    node = graph.start("policy", contract=contract_path, token_folder=kept)
    wait_for_model(probe)
    return node


def wait_for_model(probe) -> None:
    probe.wait_for_status(INPUTS, "no message received on /camera/overhead/image_raw")
    probe.wait_for_status(CHUNKS, "no message received on /camera/overhead/image_raw")


@pytest.fixture(scope="module")
def robot(policy, probe, contract_path) -> Iterator[FakeRobot]:
    from selfalign_core.robot.contract import RobotContract

    robot = FakeRobot(probe, RobotContract.from_yaml(contract_path))
    yield robot
    robot.close()


def wait_until_moving(probe) -> None:
    probe.wait_for_status(CHUNKS, "moving")


def assert_holding(probe, policy, *parts: str) -> None:
    """The policy names the fault, and from then on publishes neither a command nor an executed action."""
    probe.wait_for_status(CHUNKS, "holding", *parts)
    commands, executed = len(probe.messages[COMMANDS]), len(probe.messages["executed_action"])
    probe.wait_for_diagnostics(CHUNKS, 1)  # many control steps
    assert len(probe.messages[COMMANDS]) == commands
    assert len(probe.messages["executed_action"]) == executed
    assert policy.running


# --- before the robot has ever moved ---


def test_without_a_robot_nothing_is_commanded_and_the_missing_topic_is_named(policy, probe) -> None:
    status = probe.status(INPUTS)
    assert "(0 publisher(s))" in status.message
    assert_holding(probe, policy, "camera overhead", "/camera/overhead/image_raw")
    assert probe.messages[COMMANDS] == []


def test_camera_of_another_type_is_named(policy, probe) -> None:
    from sensor_msgs.msg import CompressedImage

    publisher = probe.publisher(CompressedImage, "camera/overhead/image_raw")
    probe.wait_for_status(INPUTS, "found type sensor_msgs/msg/CompressedImage", "expected sensor_msgs/msg/Image")
    probe.node.destroy_publisher(publisher)
    probe.wait_for_status(INPUTS, "(0 publisher(s))")
    assert probe.messages[COMMANDS] == []


FAULTS = {
    "no_wrist_camera": (Behaviour(silent=("wrist",)), ["camera wrist"]),
    "no_joint_states": (Behaviour(silent=("joints",)), ["joint"]),
    "depth_image": (Behaviour(encoding="16UC1", channels=2), ["camera overhead", "encoding", "'16UC1'", "rgb8"]),
    "wrong_size": (Behaviour(size=32), ["camera overhead", "found 32x32", "expected 64x64"]),
    "nan_joint": (Behaviour(position=(0, 0, math.nan, 0, 0, 0, 0)), ["joint_states", "nan", "elbow_flex"]),
    "wrong_joint_names": (Behaviour(names=tuple("abcdefg")), ["joint_states", "'shoulder_pan'"]),
    "positions_without_names": (Behaviour(position=(0.0,) * 6), ["found 6 positions for 7 names"]),
    "frozen_images": (Behaviour(frozen=True), ["camera overhead", "found age", "at most 0.5 s"]),
    "old_images": (Behaviour(image_age_s=30.0), ["camera overhead", "found age 30", "at most 0.5 s"]),
    "images_from_the_future": (Behaviour(image_age_s=-30.0), ["camera overhead", "in the future"]),
}


def all_silent(probe) -> bool:
    """Nothing that has ever arrived is fresh any more, by the ages in diagnostics."""
    values = {v.key: v.value for v in probe.status(INPUTS).values}
    return all(not 0.0 <= float(value) <= 0.5 for key, value in values.items() if key.endswith("age [s]"))


@pytest.mark.parametrize(
    "fault", ["no_wrist_camera", "no_joint_states", "depth_image", "nan_joint", "wrong_joint_names"]
)
def test_fault_at_start_is_named_and_nothing_is_ever_commanded(policy, probe, robot, fault: str) -> None:
    if probe.messages[COMMANDS]:
        pytest.skip("the robot has moved already: this test needs the whole file, in order")
    behaviour, parts = FAULTS[fault]
    # Everything falls silent first, so that the robot is not healthy for a moment between two faults.
    robot.behaviour = SILENT
    wait_for(lambda: all_silent(probe), "the policy notices that everything is silent")
    robot.behaviour = behaviour
    assert_holding(probe, policy, *parts)
    assert probe.messages[COMMANDS] == []


# --- moving ---


def test_healthy_robot_is_moved_within_limits_from_where_it_is(policy, probe, robot, contract_path) -> None:
    from selfalign_core.robot.contract import RobotContract
    from selfalign_ros.bridge.conversions import to_ns

    contract = RobotContract.from_yaml(contract_path)
    start = np.array([0.3, -0.2, 0.1, 0.0, -0.1, 0.2, 0.5])
    # Joints in another order and one too many, as real drivers publish them.
    names = (*reversed(contract.joint_names), "battery_lid")
    robot.behaviour = Behaviour(names=names, position=(*start[::-1].tolist(), 0.0))
    wait_for(lambda: len(probe.messages["executed_action"]) >= 20, "twenty executed actions")
    step = contract.speed_limit * contract.dt + 1e-6
    assert (np.abs(np.array(probe.messages[COMMANDS][0].data) - start) <= step).all()
    executed = [(to_ns(m.header.stamp), np.array(m.position)) for m in list(probe.messages["executed_action"])]
    assert all(((contract.lower <= command) & (command <= contract.upper)).all() for _, command in executed)
    # Steps further apart have a hold between them, after which the measured position is where motion starts.
    consecutive = [(a, b) for (ta, a), (tb, b) in itertools.pairwise(executed) if tb - ta < 1.5 * contract.dt_ns]
    assert consecutive
    assert all((np.abs(after - before) <= step).all() for before, after in consecutive)


def test_executed_actions_are_what_was_commanded(policy, probe, robot) -> None:
    wait_until_moving(probe)
    wait_for(lambda: probe.messages["executed_action"], "an executed action")
    executed = {tuple(message.position) for message in list(probe.messages["executed_action"])[:-1]}
    commanded = {tuple(message.data) for message in probe.messages[COMMANDS]}
    assert executed
    assert executed <= commanded


def test_chunk_says_what_it_was_made_from(policy, probe, robot, contract_path) -> None:
    wait_until_moving(probe)
    wait_for(lambda: probe.messages["action_chunk"], "a chunk")
    chunk = probe.messages["action_chunk"][-1]
    assert chunk.horizon * chunk.dim == len(chunk.data)
    assert chunk.joint_names[0] == "shoulder_pan"
    assert chunk.dt == pytest.approx(0.05)
    assert chunk.inference_duration > 0
    assert chunk.observation_age >= 0


@pytest.mark.parametrize(
    "fault",
    [
        "no_wrist_camera",
        "wrong_size",
        "depth_image",
        "nan_joint",
        "positions_without_names",
        "frozen_images",
        "old_images",
        "images_from_the_future",
    ],
)
def test_fault_while_moving_stops_the_robot_and_it_recovers(policy, probe, robot, fault: str) -> None:
    robot.behaviour = Behaviour()
    wait_until_moving(probe)
    robot.behaviour, parts = FAULTS[fault]
    assert_holding(probe, policy, *parts)
    robot.behaviour = Behaviour()
    wait_until_moving(probe)


def test_half_the_camera_rate_and_another_encoding_are_no_reason_to_hold(policy, probe, robot) -> None:
    def holds() -> int:
        return int({v.key: v.value for v in probe.status(CHUNKS).values}["holds"])

    robot.behaviour = Behaviour()
    wait_until_moving(probe)
    before = holds()
    for behaviour in (Behaviour(every=2), Behaviour(encoding="bgr8")):
        robot.behaviour = behaviour
        count = len(probe.messages["action_chunk"])
        wait_for(lambda count=count: len(probe.messages["action_chunk"]) >= count + 4, "chunks go on")
    probe.wait_for_diagnostics(CHUNKS, 1)
    assert holds() == before


def test_other_joints_on_the_topic_and_joints_in_several_messages_are_no_reason_to_hold(policy, probe, robot) -> None:
    def values() -> dict[str, str]:
        return {v.key: v.value for name in (INPUTS, CHUNKS) for v in probe.status(name).values}

    robot.behaviour = Behaviour()
    wait_until_moving(probe)
    before = values()
    for behaviour in (Behaviour(wheels=True), Behaviour(wheels=True, apart=True)):
        robot.behaviour = behaviour
        count = len(probe.messages["action_chunk"])
        wait_for(lambda count=count: len(probe.messages["action_chunk"]) >= count + 4, "chunks go on")
    probe.wait_for_diagnostics(CHUNKS, 1)
    after = values()
    assert after["holds"] == before["holds"]
    assert int(after["foreign joint states"]) > int(before.get("foreign joint states", 0))
    robot.behaviour = Behaviour(wheels=True, apart=True, silent=("gripper",))
    assert_holding(probe, policy, "joint states of gripper", "found age")
    robot.behaviour = Behaviour(wheels=True, silent=("joints",))
    assert_holding(probe, policy, "found age", "is ignored: found joints ['wheel_left', 'wheel_right']")
    robot.behaviour = Behaviour()
    wait_until_moving(probe)


def test_joint_states_that_contradict_each_other_hold_the_robot_and_none_is_where_it_starts(
    policy, probe, robot
) -> None:
    robot.behaviour = Behaviour()
    wait_until_moving(probe)
    real = (0.8, -0.6, 0.4, 0.0, 0.0, 0.0, 0.0)
    robot.behaviour = Behaviour(position=real)  # as after homing: named, and believed after a moment
    probe.wait_for_status(CHUNKS, "holding", "joint states (joint_states): found shoulder_pan 0.800 rad further after")
    wait_until_moving(probe)
    robot.behaviour = Behaviour(position=real, false_position=(0.0,) * 7)
    assert_holding(probe, policy, "found shoulder_pan 0.800 rad further after", "expected at most")
    probe.wait_for_status(INPUTS, "found shoulder_pan 0.800 rad further after", level=b"\x02")
    commands = len(probe.messages[COMMANDS])
    for value in (False, True, False, True):  # each would start motion anew
        enable(probe, value)
        probe.wait_for_diagnostics(CHUNKS, 1)
    assert_holding(probe, policy, "found shoulder_pan 0.800 rad further after")
    assert len(probe.messages[COMMANDS]) == commands
    robot.behaviour = Behaviour(position=real)
    wait_until_moving(probe)
    wait_for(lambda: len(probe.messages[COMMANDS]) > commands, "a command")
    assert np.abs(np.array(probe.messages[COMMANDS][commands].data) - real).max() < 0.16
    assert int({v.key: v.value for v in probe.status(INPUTS).values}["implausible joint states"]) > 10


@pytest.fixture
def intruder(probe):
    """Another node of another name; ends with what it publishes."""
    import rclpy

    node = rclpy.create_node("intruder")
    yield node
    node.destroy_node()


@pytest.mark.parametrize("topic", ["camera/wrist/image_raw", COMMANDS])
def test_a_second_publisher_on_a_camera_or_the_command_topic_is_named_and_holds_the_robot(
    policy, probe, robot, intruder, topic: str
) -> None:
    from sensor_msgs.msg import Image
    from std_msgs.msg import Float64MultiArray

    robot.behaviour = Behaviour()
    wait_until_moving(probe)
    publisher = intruder.create_publisher(Float64MultiArray if topic == COMMANDS else Image, topic, 10)
    found = f"/{topic}: found 2 publishers, /intruder, /"
    assert_holding(probe, policy, found)
    probe.wait_for_status(INPUTS, found, level=b"\x02")
    refusal = probe.set_parameter("policy", "allow_several_publishers", "/joint_states")
    assert not refusal.successful and "found /joint_states; expected some of camera/overhead" in refusal.reason
    assert probe.set_parameter("policy", "allow_several_publishers", f"/clock {topic}").successful
    wait_until_moving(probe)
    assert probe.set_parameter("policy", "allow_several_publishers", "").successful
    assert_holding(probe, policy, found)
    intruder.destroy_publisher(publisher)
    wait_until_moving(probe)


def test_a_second_publisher_of_joint_states_is_named_if_it_contradicts_the_first(
    policy, probe, robot, intruder, contract_path
) -> None:
    from sensor_msgs.msg import JointState

    from selfalign_core.robot.contract import RobotContract

    robot.behaviour = Behaviour(position=(0.8,) * 7)
    probe.wait_for_status(CHUNKS, "further after")
    wait_until_moving(probe)
    publisher = intruder.create_publisher(JointState, "joint_states", 10)
    names, texts = list(RobotContract.from_yaml(contract_path).joint_names), set()

    def say(names: list[str], place: float) -> None:
        message = JointState(name=names, position=[place] * len(names))
        message.header.stamp = probe.node.get_clock().now().to_msg()
        publisher.publish(message)

    count = len(probe.messages["action_chunk"])
    while len(probe.messages["action_chunk"]) < count + 3:  # its own joints are no fault
        say(["wheel_left"], 1.0)
        texts.add(probe.status(CHUNKS).message)
        probe.wait_for_diagnostics(CHUNKS, 1)
    assert not any("further after" in text or "publishers" in text for text in texts)

    def is_named() -> bool:
        say(names, 0.0)
        return "further after" in (text := probe.status(CHUNKS).message) and "found 2 publishers, /intruder, /" in text

    wait_for(is_named, "the contradiction and its publishers are named")
    wait_until_moving(probe)


def test_with_a_second_publisher_of_executed_actions_the_buffer_stores_nothing_and_names_it(
    policy, probe, robot, intruder, graph, contract_path
) -> None:
    from sensor_msgs.msg import JointState

    def frames() -> int:
        return int({v.key: v.value for v in probe.status("buffer: transitions").values}.get("frames", 0))

    robot.behaviour = Behaviour()
    buffer = graph.start("buffer", contract=contract_path)
    wait_for(lambda: probe.status("buffer: transitions") and frames() > 5, "frames are stored")
    publisher = intruder.create_publisher(JointState, "executed_action", 10)
    probe.wait_for_status("buffer: transitions", "/executed_action: found 2 publishers, /intruder, /policy")
    probe.wait_for_status("buffer: inputs", "/executed_action: found 2 publishers", level=b"\x02")
    probe.wait_for_diagnostics("buffer: transitions", 1)
    count = frames()
    probe.wait_for_diagnostics("buffer: transitions", 2)
    assert frames() == count
    wait_until_moving(probe)  # the policy reads none
    intruder.destroy_publisher(publisher)
    wait_for(lambda: frames() > count, "frames are stored again")
    assert buffer.stop() == 0


def test_a_picture_that_repeats_under_fresh_stamps_stops_a_robot_that_moves_and_no_other(policy, probe, robot) -> None:
    def more_chunks() -> None:
        """That begin later than a picture may repeat."""
        start = len(probe.messages["action_chunk"])
        wait_for(lambda: len(probe.messages["action_chunk"]) >= start + 4, "chunks go on")

    robot.behaviour = Behaviour()
    wait_until_moving(probe)
    robot.behaviour = Behaviour(repeating=True)
    more_chunks()
    wait_until_moving(probe)
    elsewhere = (0.0, 0.3, 0.0, 0.0, 0.0, 0.0, 0.0)
    robot.behaviour = Behaviour(repeating=True, position=elsewhere)
    assert_holding(probe, policy, "camera overhead", "the same picture", "shoulder_lift has moved by 0.30 rad")
    probe.wait_for_status(INPUTS, "camera overhead", "the same picture")
    robot.behaviour = Behaviour(position=elsewhere)  # it stands where it was held, and the camera works again
    wait_until_moving(probe)
    robot.behaviour = Behaviour(repeating=True, position=elsewhere)
    more_chunks()
    robot.behaviour = Behaviour(repeating=True)
    assert_holding(probe, policy, "the same picture")
    assert probe.set_parameter("policy", "frozen_camera_after", 0.0).successful  # a person's word
    wait_until_moving(probe)
    assert probe.set_parameter("policy", "frozen_camera_after", 0.5).successful


def test_disabling_holds_and_enabling_moves_again(policy, probe, robot) -> None:
    robot.behaviour = Behaviour()
    wait_until_moving(probe)
    assert probe.set_parameter("policy", "enable", False).successful
    assert_holding(probe, policy, "disabled", "enable")
    assert probe.set_parameter("policy", "enable", True).successful
    wait_until_moving(probe)


def enable(probe, value: bool):
    from std_srvs.srv import SetBool

    return probe.call(SetBool, "policy/enable", SetBool.Request(data=value))


def trigger(probe, name: str):
    from std_srvs.srv import Trigger

    return probe.call(Trigger, f"policy/{name}", Trigger.Request())


def start_activity_anew(probe) -> None:
    from lifecycle_msgs.msg import Transition
    from lifecycle_msgs.srv import ChangeState

    for label in ("deactivate", "activate"):
        request = ChangeState.Request(transition=Transition(label=label))
        assert probe.call(ChangeState, "policy/change_state", request).success


def test_the_enable_service_sets_the_parameter(policy, probe, robot) -> None:
    from rcl_interfaces.srv import GetParameters

    robot.behaviour = Behaviour()
    wait_until_moving(probe)
    assert "disabled" in enable(probe, False).message
    assert_holding(probe, policy, "disabled")
    request = GetParameters.Request(names=["enable"])
    assert not probe.call(GetParameters, "policy/get_parameters", request).values[0].bool_value
    assert probe.set_parameter("policy", "enable", True).successful
    wait_until_moving(probe)
    assert enable(probe, True).message == "moving"


def test_a_stop_lasts_until_it_is_cleared(policy, probe, robot) -> None:
    robot.behaviour = Behaviour()
    wait_until_moving(probe)
    assert trigger(probe, "stop").success
    assert_holding(probe, policy, "stopped by ~/stop")
    assert "stopped by ~/stop" in enable(probe, True).message
    assert "stopped by ~/stop" in trigger(probe, "calibrate").message
    start_activity_anew(probe)
    assert_holding(probe, policy, "stopped by ~/stop")
    assert trigger(probe, "clear_stop").success
    wait_until_moving(probe)


def test_the_hand_over_is_chosen_when_the_checkpoint_is_loaded_and_can_be_changed(policy, probe, robot) -> None:
    def used() -> str:
        return {v.key: v.value for v in probe.status(CHUNKS).values}["hand-over"]

    robot.behaviour = Behaviour()
    wait_until_moving(probe)
    assert used() == "blend"  # the untrained model was not trained to be given actions
    refusal = probe.set_parameter("policy", "chunk_handover", "prefix")
    assert not refusal.successful and "chunk_handover: found prefix" in refusal.reason
    assert probe.set_parameter("policy", "chunk_handover", "guidance").successful
    wait_for(lambda: used() == "guidance", "the other hand-over is used")
    probe.wait_for_diagnostics(CHUNKS, 1)
    wait_until_moving(probe)
    assert probe.set_parameter("policy", "chunk_handover", "auto").successful


def test_diagnostics_tell_latencies_as_percentiles(policy, probe, robot) -> None:
    values = {v.key: v.value for v in probe.status(CHUNKS).values}
    for name in ("inference duration", "observation age"):
        p50, p95, p99 = (float(values[f"{name} p{p} [s]"]) for p in (50, 95, 99))
        assert 0 < p50 <= p95 <= p99


# --- E-Token ---


@pytest.fixture(scope="module")
def tokens(policy, probe, robot):
    from selfalign.msg import EToken
    from selfalign_ros.bridge import qos

    return probe.publisher(EToken, "e_token", qos.LATCHED)


def token_like(probe, version: int, **changes):
    from selfalign.msg import EToken

    own = probe.messages["policy/e_token_in_use"][0]
    token = EToken(embodiment="sim_arm", version=version, shape=own.shape, data=own.data, model_digest=own.model_digest)
    for name, value in changes.items():
        setattr(token, name, value)
    return token


def test_valid_token_is_used_from_the_next_chunk_on(policy, probe, robot, tokens) -> None:
    robot.behaviour = Behaviour()
    tokens.publish(token_like(probe, 5))
    probe.wait_for_status(E_TOKEN, "version 5 in use")
    wait_for_chunk_version(probe, 5)
    assert probe.messages["policy/e_token_in_use"][-1].version == 5


def wait_for_chunk_version(probe, version: int) -> None:
    count = len(probe.messages["action_chunk"])

    def made() -> bool:
        return any(chunk.e_token_version == version for chunk in probe.messages["action_chunk"][count:])

    wait_for(made, f"a chunk with E-Token version {version}")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_digest": "0123456789abcdef"}, ["digest", "0123456789ab"]),
        ({"shape": [2, 3]}, ["data", "expected 2 x 3"]),
        ({"shape": [1, 2], "data": [0.0, 0.0]}, ["shape", "(1, 2)"]),
        ({"nan": True}, ["NaN"]),
        ({"embodiment": "other_arm"}, ["embodiment", "'other_arm'", "'sim_arm'"]),
        ({"large": True}, ["norm", "root mean square", "at most"]),
        ({"version": 4}, ["version", "found 4", "above 5"]),
    ],
    ids=["digest", "length", "shape", "nan", "embodiment", "norm", "version"],
)
def test_a_bad_token_is_refused_by_name_and_the_robot_holds_until_a_good_one_comes(
    policy, probe, robot, tokens, changes, parts
) -> None:
    robot.behaviour = Behaviour()
    changes = dict(changes)
    token = token_like(probe, 6)
    if changes.pop("nan", False):
        token.data[0] = math.nan
    if changes.pop("large", False):
        token.data = [1000.0] * len(token.data)
    for name, value in changes.items():
        setattr(token, name, value)
    tokens.publish(token)
    probe.wait_for_status(E_TOKEN, "refused", *parts)
    assert_holding(probe, policy, f"E-Token version {token.version} refused", *parts)
    assert probe.messages["policy/e_token_in_use"][-1].version == 5
    tokens.publish(token_like(probe, 5))  # the one in use, said again
    wait_for_chunk_version(probe, 5)
    wait_until_moving(probe)


def test_a_person_may_go_on_with_the_token_in_use_after_a_bad_one(policy, probe, robot, tokens) -> None:
    robot.behaviour = Behaviour()
    wait_until_moving(probe)
    tokens.publish(token_like(probe, 6, model_digest="0123456789abcdef"))
    assert_holding(probe, policy, "E-Token version 6 refused", "digest")
    assert "refused" in enable(probe, True).message
    assert "refused" in trigger(probe, "calibrate").message
    assert trigger(probe, "clear_stop").message == "moving"
    wait_for_chunk_version(probe, 5)
    tokens.publish(token_like(probe, 5))  # the bad one would be the latched one


def test_with_a_second_publisher_no_token_is_taken_and_both_are_named(policy, probe, robot, tokens) -> None:
    import rclpy

    from selfalign.msg import EToken
    from selfalign_ros.bridge import qos

    robot.behaviour = Behaviour()
    probe.wait_for_status("policy: connections", "all compatible")
    intruder = rclpy.create_node("intruder")
    publisher = intruder.create_publisher(EToken, "e_token", qos.EVENTS)  # not latched, as it has to be
    probe.wait_for_status("policy: connections", "/e_token: publisher /intruder", "incompatible QoS")
    intruder.destroy_publisher(publisher)
    publisher = intruder.create_publisher(EToken, "e_token", qos.LATCHED)
    publisher.publish(token_like(probe, 6))
    probe.wait_for_status(E_TOKEN, "found 2 publishers, /intruder, /probe")
    tokens.publish(token_like(probe, 7))  # whose token is meant, nobody can tell
    wait_for_chunk_version(probe, 5)
    intruder.destroy_node()
    # With one publisher left its token, which is latched, is taken.
    probe.wait_for_status(E_TOKEN, "version 7 in use")
    start_activity_anew(probe)
    tokens.publish(token_like(probe, 8))
    wait_for_chunk_version(probe, 8)


# --- parameters ---


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("replan_steps", -1, ["replan_steps", "-1", "0", "1000"]),
        ("checkpoint", "elsewhere", ["read-only", "checkpoint"]),
        ("prompt", 3, ["type"]),
        ("nonsense", 1, ["undeclared"]),
    ],
)
def test_bad_parameter_is_refused_with_a_reason(policy, probe, name, value, parts) -> None:
    result = probe.set_parameter("policy", name, value)
    assert not result.successful
    for part in parts:
        assert part in result.reason


def test_prompt_follows_the_topic_and_the_parameter_whichever_came_last(policy, probe, robot) -> None:
    from std_msgs.msg import String

    from selfalign_ros.bridge import qos

    def prompt() -> str:
        return {v.key: v.value for v in probe.status(CHUNKS).values}["prompt"]

    probe.publisher(String, "prompt", qos.LATCHED).publish(String(data="reach the blue cube"))
    wait_for(lambda: prompt() == "reach the blue cube", "the prompt of the topic in diagnostics")
    assert probe.set_parameter("policy", "prompt", "reach the green cube").successful
    wait_for(lambda: prompt() == "reach the green cube", "the prompt of the parameter in diagnostics")


# --- the end ---


def test_a_killed_policy_comes_back_with_its_token_and_still_stopped(
    policy, probe, robot, graph, contract_path, kept
) -> None:
    robot.behaviour = Behaviour()
    wait_until_moving(probe)
    version = probe.messages["action_chunk"][-1].e_token_version
    assert trigger(probe, "stop").success
    policy.kill()
    for name in ("action_chunk", COMMANDS):
        probe.messages[name].clear()
    probe.statuses.pop(CHUNKS)
    node = graph.start("policy", contract=contract_path, token_folder=kept)
    assert_holding(probe, node, "stopped by ~/stop before this process began")
    assert not probe.messages[COMMANDS]
    wait_for(lambda: trigger(probe, "clear_stop").success, "the stop is cleared")
    wait_until_moving(probe)
    assert probe.messages["action_chunk"][0].e_token_version == version
    policy.process = node.process  # the next test ends it
    policy._path = node._path


def test_a_policy_whose_token_file_is_truncated_or_forged_names_it_and_moves_with_its_own_token(
    policy, probe, robot, graph, contract_path, kept, tokens
) -> None:
    probe.node.destroy_publisher(tokens)  # nobody hands it a better one
    path = kept / "sim_arm_in_use.safetensors"
    whole, nan = path.read_bytes(), b"\x00\x00\xc0\x7f"
    for content in (whole[: len(whole) // 2], whole[:-4] + nan):
        policy.kill()
        path.write_bytes(content)
        for name in ("action_chunk", COMMANDS):
            probe.messages[name].clear()
        for name in (CHUNKS, E_TOKEN):
            probe.statuses.pop(name)
        node = graph.start("policy", contract=contract_path, token_folder=kept)
        probe.wait_for_status(E_TOKEN, f"saved E-Token {path} not used: ")
        wait_until_moving(probe)
        wait_for(lambda: probe.messages["action_chunk"] and probe.messages[COMMANDS], "a chunk and commands")
        assert {chunk.e_token_version for chunk in probe.messages["action_chunk"]} == {0}
        assert path.read_bytes() == content
        policy.process, policy._path = node.process, node._path


def test_interrupt_ends_the_node_cleanly(policy, probe, robot) -> None:
    robot.behaviour = Behaviour()
    wait_until_moving(probe)
    assert policy.stop(signal.SIGINT) == 0, policy.log
    assert "Traceback" not in policy.log
