"""The policy node and time: what was seen too long ago, or in a time that is over, moves nothing.

The node lives in the test process and its clock, worker and publisher are played by the test, so every race is exact.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.ros

S = 1_000_000_000


class Stage:
    """A policy node on the simulated arm's contract, with clocks that are set and jobs that end when told to.

    ``now_ns`` is ROS time; steady time goes on with it, but for jumps.
    """

    def __init__(self) -> None:
        from selfalign_ros.nodes.policy_node import PolicyNode

        self.now_ns, self.jumped_ns = 100 * S, 0
        self.commands: list[Any] = []
        self.jobs: list[Callable[[Any], None]] = []
        self.work: list[Callable[[], Any]] = []
        self.node = PolicyNode()
        self.node.open_topics()
        self.node.now_ns = lambda: self.now_ns
        self.node.now = self.now
        self.node.worker.submit = self._submit
        self.node._command_publisher = SimpleNamespace(
            publish=self.commands.append, get_subscription_count=lambda: 1, topic_name="commands"
        )
        self.node._policy = SimpleNamespace(trained=True, config=SimpleNamespace(rtc_max_delay=0))
        self.node._tell_settings()
        self.node.activate()
        self.node.is_active = True

    def now(self) -> Any:
        from selfalign_core.robot.clocks import Now

        return Now(self.now_ns, self.now_ns - self.jumped_ns)

    def jump(self, ns: int) -> None:
        """ROS time jumps."""
        self.now_ns += ns
        self.jumped_ns += ns

    def _submit(self, job: Callable[[], Any], done: Callable[[Any], None]) -> None:
        self.work.append(job)
        self.jobs.append(done)

    def close(self) -> None:
        self.node._word.stop.clear()
        self.node.close()
        self.node.destroy_node()
        # Its lifecycle interfaces are the state machine's, which goes with the object: no later test may see them.
        self.node = None
        gc.collect()

    def joints(self, stamp_ns: int, position: float = 0.0) -> None:
        from selfalign_ros.bridge.conversions import joint_state_message

        names = self.node.contract.joint_names
        message = joint_state_message(names, np.full(len(names), position), stamp_ns)
        self.node.inputs.joint_states._on_arrival(message)

    def images(self, stamp_ns: int, cameras: Any = None, brightness: int = 0) -> None:
        from selfalign_ros.bridge.conversions import image_message, to_stamp

        for camera in cameras or self.node.contract.cameras:
            rgb = np.full((camera.height, camera.width, 3), brightness, np.uint8)
            self.node.inputs.cameras[camera.name]._on_arrival(image_message(rgb, to_stamp(stamp_ns), camera.name))

    def look(self) -> None:
        """New images and joint states, then a control step."""
        self.joints(self.now_ns)
        self.images(self.now_ns)
        self.node._control()

    def start_moving(self, steps: int) -> None:
        """A first chunk is followed for so many control steps."""
        self.look()
        self.end_inference(self.now_ns)
        for _ in range(steps):
            self.now_ns += self.node.contract.dt_ns
            self.look()

    def end_inference(self, stamp_ns: int) -> None:
        """The running inference answers with a chunk for an observation of that stamp."""
        from selfalign_core.robot.types import ActionChunk
        from selfalign_ros.life.worker import Outcome
        from selfalign_ros.nodes.inference import Inference

        contract = self.node.contract
        actions = np.full((16, len(contract.joints)), 0.1, np.float32)
        chunk = ActionChunk(actions, contract.dt, stamp_ns, 0, 0.01)
        self.jobs.pop(0)(Outcome(Inference(chunk, 0.0, 0.01)))


@pytest.fixture
def stage(probe) -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.close()


def test_a_chunk_from_before_time_jumped_back_moves_nothing(stage: Stage) -> None:
    stage.joints(stage.now_ns)
    stage.images(stage.now_ns)
    stage.node._control()
    assert len(stage.jobs) == 1
    stage.jump(-50 * S)  # a simulation was reset, and its robot reports at once
    stage.joints(stage.now_ns)
    stage.images(stage.now_ns)
    stage.end_inference(100 * S)
    assert stage.commands == []
    stage.joints(stage.now_ns)
    stage.images(stage.now_ns)
    stage.node._control()
    stage.end_inference(stage.now_ns)  # the first one of the new time is executed
    assert len(stage.commands) == 1


def is_hold(command: Any) -> bool:
    """Whether a controller stops at once, whenever and with whatever clock it reads the command."""
    return (command.header.stamp.sec, command.header.stamp.nanosec) == (0, 0) and len(command.points) == 1


@pytest.mark.parametrize("jump_ns", [-50 * S, -S // 5, 3600 * S, S // 2])
@pytest.mark.parametrize("first", ["control", "stop", "deactivate"])
def test_time_that_jumps_in_mid_motion_stops_the_robot_where_it_is(stage: Stage, jump_ns: int, first: str) -> None:
    """Whoever notices first; the path's beginning is behind the robot, its end ahead, and neither a place to hold."""
    from std_srvs.srv import Trigger

    stage.start_moving(steps=8)
    path = stage.node.motion.state.course.path
    here = path.at(stage.now_ns)
    assert (np.abs(here - path.positions[0]) > 0.05).all()
    stage.jump(jump_ns)
    if first == "stop":
        stage.node._word.on_stop(Trigger.Request(), Trigger.Response())
    elif first == "deactivate":
        stage.node.stop()
    else:
        stage.look()
    assert is_hold(stage.commands[-1])
    np.testing.assert_allclose(stage.commands[-1].points[0].positions, here)


def test_an_inference_begun_before_a_stop_moves_nothing_after_it_was_cleared(stage: Stage) -> None:
    from std_srvs.srv import SetBool, Trigger

    def stop_and_clear() -> None:
        stage.node._word.on_stop(Trigger.Request(), Trigger.Response())
        stage.node._word.on_clear_stop(Trigger.Request(), Trigger.Response())

    def disable_and_enable() -> None:
        for value in (False, True):
            stage.node._word.on_enable(SetBool.Request(data=value), SetBool.Response())

    for interrupt in (stop_and_clear, disable_and_enable):
        stage.start_moving(steps=0)
        while not stage.jobs:
            stage.now_ns += stage.node.contract.dt_ns
            stage.look()
        observed_ns, given = stage.now_ns, len(stage.commands)
        interrupt()
        assert is_hold(stage.commands[-1]) and len(stage.commands) == given + 1
        stage.end_inference(observed_ns)
        assert len(stage.commands) == given + 1


def test_a_stop_is_kept_whatever_becomes_of_the_tokens(stage: Stage, tmp_path: Path) -> None:
    from std_srvs.srv import Trigger

    from selfalign_ros.nodes.policy_node import PolicyNode

    assert stage.node._word.on_stop(Trigger.Request(), Trigger.Response()).success
    for folder in ("''", str(tmp_path)):
        started_anew = PolicyNode(["--ros-args", "-p", f"token_folder:={folder}"])
        assert "stopped by ~/stop before this process began" in started_anew._word.against
        started_anew.close()
        started_anew.destroy_node()


def test_a_camera_clock_ahead_by_less_than_a_step_is_followed_and_by_more_is_named(stage: Stage) -> None:
    ahead_ns = stage.node.contract.dt_ns
    stage.joints(stage.now_ns)
    stage.images(stage.now_ns + ahead_ns)
    stage.node._control()
    stage.end_inference(stage.now_ns + ahead_ns)
    stage.node._control()
    assert stage.node.motion.reason == "" and stage.node.motion.tally.late_chunks == 0
    stage.images(stage.now_ns + ahead_ns + 1)
    camera = stage.node.contract.cameras[0]
    fault = stage.node.inputs.fault(stage.now_ns)
    assert f"({camera.topic}): found a stamp 0.050 s in the future; expected synchronised clocks" in fault


def test_an_image_older_than_every_joint_state_is_no_observation(stage: Stage) -> None:
    from selfalign_core.errors import InputError

    stage.images(stage.now_ns - S // 50)
    stage.joints(stage.now_ns)
    with pytest.raises(InputError, match=r"joint states at the oldest image .*found the first 0.020 s after it"):
        stage.node.inputs.select(stage.now_ns)


def test_diagnostics_say_so_when_ros_time_stands_still(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    def chunks() -> Any:
        return next(status for status in stage.node.statuses() if status.name == "chunks")

    stage.start_moving(steps=1)
    assert chunks().message == "moving"
    later = time.monotonic() + 5.0
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert "found no control step for 5 s; expected ROS time to go on" in chunks().message


def test_two_token_publishers_of_one_name_are_two_once_neither_can_be_a_killed_one(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    def publisher(number: int) -> Any:
        return SimpleNamespace(
            node_namespace="/", node_name="aligner", endpoint_gid=[number] * 16, topic_type="selfalign/msg/EToken"
        )

    found = [publisher(1)]
    stage.node.get_publishers_info_by_topic = lambda topic: found
    began = time.monotonic()
    now = [began]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert stage.node.token.publishers.names() == ["/aligner"]
    now[0] += 100.0
    found = [publisher(1), publisher(2)]  # killed and started again
    assert stage.node.token.publishers.names() == ["/aligner"]
    now[0] += 30.0
    assert stage.node.token.publishers.names() == ["/aligner"]
    now[0] += 30.0  # a killed one is forgotten by now
    assert stage.node.token.publishers.names() == ["/aligner", "/aligner"]
    stage.node.token.look_at_publishers()
    assert "found 2 publishers, /aligner, /aligner; expected one" in stage.node.token.dispute


def test_a_joint_state_from_before_a_gap_is_not_taken_for_where_the_robot_is(stage: Stage) -> None:
    from selfalign_core.errors import InputError

    stage.joints(90 * S, position=0.5)  # then the driver stalls for ten seconds, and the arm is moved by hand
    stage.images(100 * S - S // 50)
    stage.joints(100 * S, position=-0.5)
    with pytest.raises(InputError, match=r"joint states at the oldest image .*found age 9.980 s"):
        stage.node.inputs.select(stage.now_ns)
    stage.images(100 * S)
    np.testing.assert_allclose(stage.node.inputs.select(stage.now_ns).state, -0.5)


@pytest.mark.parametrize("joints_first", [True, False])
def test_a_picture_that_stays_the_same_while_the_robot_moves_ends_the_motion(stage: Stage, joints_first: bool) -> None:
    """Whichever topic arrives first, and until the picture differs."""
    found, began_ns = [], stage.now_ns
    for tick in range(40):
        stage.now_ns = began_ns + tick * S // 20
        if not joints_first:
            stage.images(stage.now_ns)
        stage.joints(stage.now_ns, 0.01 * min(tick, 20))
        if joints_first:
            stage.images(stage.now_ns)
        found.append(stage.node.inputs.fault(stage.now_ns))
    first = next(tick for tick, fault in enumerate(found) if fault)
    assert first == 15  # 0.05 rad are reached after 5 ticks, half a second is 10
    assert all(found[first:])
    camera = stage.node.contract.cameras[0]
    assert f"camera {camera.name} ({camera.topic}): found the same picture, bit for bit, for 0.8 s" in found[first]
    stage.images(stage.now_ns, brightness=1)
    assert stage.node.inputs.fault(stage.now_ns) == ""


def test_images_taken_too_far_apart_are_no_observation(stage: Stage) -> None:
    from selfalign_core.errors import InputError
    from selfalign_core.robot.contract import RobotContract
    from selfalign_ros.bridge import qos
    from selfalign_ros.life.resources import config_file
    from selfalign_ros.nodes.inputs import SensorInputs

    contract = RobotContract.from_yaml(config_file("contracts/sim_arm.yaml"))
    stage.node.contract = dataclasses.replace(contract, max_camera_skew_s=0.1)
    stage.node.inputs = SensorInputs(stage.node, stage.node.contract, qos.SENSOR, lambda topic: None)
    limit_ns = round(stage.node.contract.max_camera_skew_s * S)
    stage.joints(stage.now_ns - limit_ns)
    stage.joints(stage.now_ns)
    stage.images(stage.now_ns - limit_ns)
    stage.images(stage.now_ns, cameras=stage.node.contract.cameras[:1])
    assert stage.node.inputs.select(stage.now_ns).stamp_ns == stage.now_ns - limit_ns
    stage.now_ns += 1_000_000
    stage.images(stage.now_ns, cameras=stage.node.contract.cameras[:1])
    with pytest.raises(InputError, match=r"cameras wrist and overhead: found images .* apart; expected at most"):
        stage.node.inputs.select(stage.now_ns)


def test_first_commands_go_from_the_measured_position_however_far_the_chunk_is(stage: Stage) -> None:
    stage.joints(stage.now_ns, position=-1.0)  # the chunk will ask for 0.1
    stage.images(stage.now_ns)
    stage.node._control()
    stage.now_ns += S // 10
    stage.end_inference(100 * S)
    contract = stage.node.contract
    previous, previous_ns = np.full(len(contract.joints), -1.0), stage.now_ns
    message = stage.commands[0]
    for point in message.points:
        due_ns = 100 * S + point.time_from_start.sec * S + point.time_from_start.nanosec
        reach = contract.speed_limit * (due_ns - previous_ns) / S + 1e-9
        position = np.array(point.positions)
        assert (np.abs(position - previous) <= reach).all()
        previous, previous_ns = position, due_ns


def test_the_next_chunk_continues_the_one_that_is_executed(stage: Stage) -> None:
    """By its time stamps, over as many actions as chunks have been late; not after a hold."""
    handovers, dt_ns = [], stage.node.contract.dt_ns
    stage.node._inference = lambda selection, now, ticket: lambda: handovers.append(ticket.handover)

    def infer() -> None:
        """Start an inference on what is seen now."""
        stage.look()
        stage.work.pop()()

    infer()
    observed_ns = stage.now_ns
    stage.now_ns += 2 * dt_ns
    stage.end_inference(observed_ns)
    stage.now_ns = observed_ns + 8 * dt_ns + dt_ns // 2
    infer()
    first, second = handovers
    assert first is None
    assert (second.method, second.delay) == ("blend", 3)
    assert second.previous.shape == (7, len(stage.node.contract.joints))  # of 16, from the middle of the ninth on
    stage.end_inference(stage.now_ns - S)  # late, and the robot holds
    assert "late chunk" in stage.node.motion.reason
    infer()
    assert handovers[-1] is None


def test_a_hand_over_that_the_checkpoint_was_not_trained_for_is_refused_when_set(stage: Stage) -> None:
    from rclpy.parameter import Parameter

    results = [stage.node.set_parameters([Parameter("chunk_handover", value=v)])[0] for v in ("guidance", "prefix")]
    assert results[0].successful and not results[1].successful
    assert "chunk_handover: found prefix" in results[1].reason
    assert stage.node.motion.settings.handover == "guidance"
