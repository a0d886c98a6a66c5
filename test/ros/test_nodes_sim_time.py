"""The policy node in simulated time: it lives by /clock, names a /clock that stands still, holds when it jumps back.

The simulation is played by this process: it publishes the clock, the joint states and the images, all of one time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
from node_testing import wait_for

pytestmark = pytest.mark.ros

CHUNKS = "policy: chunks"
COMMANDS = "joint_trajectory_controller/joint_trajectory"
S = 1_000_000_000
TICK_S = 0.01


class Simulation:
    """Its time begins at 1,000 s and can be stopped and set. Joint states and images come at 20 Hz of that time."""

    def __init__(self, probe, contract) -> None:
        from rclpy.qos import qos_profile_sensor_data
        from rosgraph_msgs.msg import Clock
        from sensor_msgs.msg import Image, JointState

        self._contract = contract
        self._clock = probe.publisher(Clock, "/clock")
        self._joints = probe.publisher(JointState, contract.joint_state_topic, qos_profile_sensor_data)
        self._cameras = [
            (camera, probe.publisher(Image, camera.topic, qos_profile_sensor_data)) for camera in contract.cameras
        ]
        self._lock, self._stop = threading.Lock(), threading.Event()
        self.now_ns, self.running = 1000 * S, True
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def jump(self, seconds: int) -> None:
        with self._lock:
            self.now_ns += seconds * S

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        ticks = 0
        while not self._stop.wait(TICK_S):
            with self._lock:
                if self.running:
                    self._tick(ticks)
                    ticks += 1

    def _tick(self, ticks: int) -> None:
        from rosgraph_msgs.msg import Clock

        from selfalign_ros.bridge.conversions import image_message, joint_state_message, to_stamp

        self.now_ns += round(TICK_S * S)
        self._clock.publish(Clock(clock=to_stamp(self.now_ns)))
        if ticks % 5 == 0:
            names = self._contract.joint_names
            self._joints.publish(joint_state_message(names, np.zeros(len(names)), self.now_ns))
            for camera, publisher in self._cameras:
                rgb = np.full((camera.height, camera.width, 3), ticks // 5 % 256, np.uint8)
                publisher.publish(image_message(rgb, to_stamp(self.now_ns), camera.name))


@pytest.fixture(scope="module")
def simulation(graph, probe) -> Iterator[Simulation]:
    from sensor_msgs.msg import JointState
    from trajectory_msgs.msg import JointTrajectory

    from selfalign.msg import ActionChunk
    from selfalign_core.robot.contract import RobotContract
    from selfalign_ros.bridge import qos

    path = graph.contract(max_age_s=1.0)
    probe.listen(JointTrajectory, COMMANDS, qos.EVENTS)
    probe.listen(JointState, "executed_action", qos.EVENTS)
    probe.listen(ActionChunk, "action_chunk", qos.EVENTS)
    graph.start("policy", contract=path, use_sim_time=True)
    probe.wait_for_status("policy: lifecycle", "active")
    simulation = Simulation(probe, RobotContract.from_yaml(path))
    yield simulation
    simulation.close()


def test_the_policy_lives_by_simulated_time_and_holds_when_it_jumps_back(probe, simulation: Simulation) -> None:
    from selfalign_core.robot.contract import RobotContract
    from selfalign_ros.bridge.conversions import to_ns

    contract: RobotContract = simulation._contract
    chunks, commands, executed = (probe.messages[name] for name in ("action_chunk", COMMANDS, "executed_action"))
    wait_for(lambda: len(chunks) >= 4 and len(commands) >= 4 and len(executed) >= 20, "the robot moves")
    probe.wait_for_status(CHUNKS, "moving")
    assert all(1000 * S <= to_ns(chunk.header.stamp) <= simulation.now_ns for chunk in list(chunks))

    simulation.running = False  # paused
    probe.wait_for_status(CHUNKS, "no control step", "expected ROS time to go on")
    simulation.running = True
    probe.wait_for_status(CHUNKS, "moving")

    holds = sum(to_ns(command.header.stamp) == 0 for command in list(commands))
    simulation.jump(-500)  # reset, and run again from an earlier time
    wait_for(lambda: sum(to_ns(c.header.stamp) == 0 for c in list(commands)) > holds, "the robot is told to hold")
    hold = [command for command in list(commands) if to_ns(command.header.stamp) == 0][holds]
    before = [e for e in list(executed) if to_ns(e.header.stamp) >= 1000 * S][-1]
    assert len(hold.points) == 1
    gap = np.abs(np.subtract(hold.points[0].positions, before.position))
    # Where it was told to be; it had gone on for a few control steps at most since that was published.
    assert (gap <= contract.speed_limit * 4 * contract.dt).all(), gap
    wait_for(lambda: to_ns(chunks[-1].header.stamp) < 1000 * S, "chunks of the new time")
    later = wait_for(
        lambda: [c for c in list(commands) if 0 < to_ns(c.header.stamp) < 1000 * S], "commands of the new time"
    )
    assert commands.index(hold) < commands.index(later[0])
    probe.wait_for_status(CHUNKS, "moving")


def test_a_second_clock_is_named_and_holds_the_robot(probe, simulation: Simulation) -> None:
    import rclpy
    from rosgraph_msgs.msg import Clock

    probe.wait_for_status(CHUNKS, "moving")
    intruder = rclpy.create_node("intruder")
    intruder.create_publisher(Clock, "/clock", 10)
    probe.wait_for_status(CHUNKS, "holding", "/clock: found 2 publishers, /intruder, /probe")
    intruder.destroy_node()
    probe.wait_for_status(CHUNKS, "moving")
