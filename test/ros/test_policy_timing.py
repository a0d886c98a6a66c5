"""The policy node and time: what was seen too long ago, or in a time that is over, moves nothing.

The node lives in the test process and its clock, worker and publisher are played by the test, so every race is exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.ros

S = 1_000_000_000


class Stage:
    """A policy node on the simulated arm's contract, with a clock that is set and jobs that end when told to."""

    def __init__(self) -> None:
        from selfalign_ros.policy_node import PolicyNode

        self.now_ns = 100 * S
        self.commands: list[Any] = []
        self.jobs: list[Callable[[Any], None]] = []
        self.work: list[Callable[[], Any]] = []
        self.node = PolicyNode()
        self.node.open_topics()
        self.node.is_active = True
        self.node.now_ns = lambda: self.now_ns
        self.node.worker.submit = self._submit
        self.node._command_publisher = SimpleNamespace(publish=self.commands.append)

    def _submit(self, job: Callable[[], Any], done: Callable[[Any], None]) -> None:
        self.work.append(job)
        self.jobs.append(done)

    def close(self) -> None:
        self.node.close()
        self.node.destroy_node()

    def joints(self, stamp_ns: int, position: float = 0.0) -> None:
        from selfalign_ros.conversions import joint_state_message

        names = self.node.contract.joint_names
        message = joint_state_message(names, np.full(len(names), position), stamp_ns)
        self.node.inputs.joint_states._on_arrival(message)

    def images(self, stamp_ns: int, cameras: Any = None, brightness: int = 0) -> None:
        from selfalign_ros.conversions import image_message, to_stamp

        for camera in cameras or self.node.contract.cameras:
            rgb = np.full((camera.height, camera.width, 3), brightness, np.uint8)
            self.node.inputs.cameras[camera.name]._on_arrival(image_message(rgb, to_stamp(stamp_ns), camera.name))

    def end_inference(self, stamp_ns: int) -> None:
        """The running inference answers with a chunk for an observation of that stamp."""
        from selfalign_core.types import ActionChunk
        from selfalign_ros.policy_node import Inference
        from selfalign_ros.worker import Outcome

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
    stage.now_ns -= 50 * S  # a simulation was reset, and its robot reports at once
    stage.joints(stage.now_ns)
    stage.images(stage.now_ns)
    stage.end_inference(100 * S)
    assert stage.commands == []
    stage.joints(stage.now_ns)
    stage.images(stage.now_ns)
    stage.node._control()
    stage.end_inference(stage.now_ns)  # the first one of the new time is executed
    assert len(stage.commands) == 1


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
    from selfalign_core.contract import RobotContract
    from selfalign_core.errors import InputError
    from selfalign_ros import qos
    from selfalign_ros.inputs import SensorInputs
    from selfalign_ros.resources import config_file

    contract = RobotContract.from_yaml(config_file("contracts/sim_arm.yaml"))
    stage.node.contract = dataclasses.replace(contract, max_camera_skew_s=0.1)
    stage.node.inputs = SensorInputs(stage.node, stage.node.contract, qos.SENSOR, lambda topic: None)
    stage.joints(stage.now_ns)
    limit_ns = round(stage.node.contract.max_camera_skew_s * S)
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
    handovers = []
    stage.node._infer = lambda *arguments: handovers.append(arguments[-1])
    stage.node._rtc_max_delay = 0
    stage.node.parameters_changed({"chunk_handover"})
    dt_ns = stage.node.contract.dt_ns

    def infer() -> None:
        """Start an inference on what is seen now."""
        stage.joints(stage.now_ns)
        stage.images(stage.now_ns)
        stage.node._control()
        stage.work.pop()()

    infer()
    observed_ns = stage.now_ns
    stage.now_ns += 2 * dt_ns
    stage.end_inference(observed_ns)
    stage.now_ns = observed_ns + 8 * dt_ns + dt_ns // 2
    infer()
    stage.jobs.clear()
    first, second = handovers
    assert first is None
    assert (second.method, second.delay) == ("blend", 3)
    assert second.previous.shape == (7, len(stage.node.contract.joints))  # of 16, from the middle of the ninth on
    stage.node._hold("a test")
    stage.node._inferring = False
    infer()
    assert handovers[-1] is None


def test_a_hand_over_that_the_checkpoint_was_not_trained_for_is_refused_when_set(stage: Stage) -> None:
    from rclpy.parameter import Parameter

    stage.node._rtc_max_delay = 0
    results = [stage.node.set_parameters([Parameter("chunk_handover", value=v)])[0] for v in ("guidance", "prefix")]
    assert results[0].successful and not results[1].successful
    assert "chunk_handover: found prefix" in results[1].reason
    assert stage.node._handover_method == "guidance"
