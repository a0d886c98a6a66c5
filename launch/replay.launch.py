"""A bag played through policy, buffer and aligner in lock-step: the same outputs every time, however slow the machine.

    ros2 launch selfalign replay.launch.py bag:=my_bag report:=replay.json

The graph itself is declared in ``selfalign_ros.graph.declaration``, for this file and
for ``python -m selfalign_ros.tools.replay`` alike.
"""

from launch import LaunchDescription

from selfalign_ros.graph.declaration import REPLAY
from selfalign_ros.graph.launch_description import launch_description
from selfalign_ros.graph.supervisor import free_domain


def generate_launch_description() -> LaunchDescription:
    return launch_description(REPLAY, defaults={"domain": str(free_domain())})
