"""The simulated robot behind a forward command controller."""

from __future__ import annotations

import numpy as np
from node_testing import wait_for


def test_a_forward_command_is_followed_at_once_and_said_to_be(graph, probe) -> None:
    from sensor_msgs.msg import JointState
    from std_msgs.msg import Float64MultiArray
    from trajectory_msgs.msg import JointTrajectory

    from selfalign_ros.bridge import qos

    probe.listen(JointState, "joint_states", qos.SENSOR)
    probe.listen(JointTrajectory, "followed_command", qos.RECENT_EVENTS)
    publisher = probe.publisher(Float64MultiArray, "forward_position_controller/commands", qos.COMMAND)
    robot = graph.start("robot_sim", contract=graph.contract("sim_arm_forward.yaml"))
    wait_for(lambda: publisher.get_subscription_count() >= 1, "the robot listens to commands")
    state = wait_for(lambda: list(probe.messages["joint_states"]), "joint states")[-1]
    good = np.add(state.position, 0.1).tolist()
    publisher.publish(Float64MultiArray(data=good))
    wait_for(lambda: probe.messages["followed_command"], "the robot's word for it")
    wait_for(lambda: np.abs(np.subtract(probe.messages["joint_states"][-1].position, good)).max() < 0.03, "it is there")
    publisher.publish(Float64MultiArray(data=[*good[:-1], float("nan")]))
    wait_for(lambda: "command refused" in robot.log, "the refusal of another")
    (followed,) = probe.messages["followed_command"]
    assert followed.joint_names == list(state.name)
    assert [list(point.positions) for point in followed.points] == [good]
