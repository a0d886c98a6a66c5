"""Policy, buffer and aligner, with a simulated robot unless told otherwise.

    ros2 launch selfalign bringup.launch.py --show-args
    ros2 launch selfalign bringup.launch.py duration:=30 report:=out.json

The graph itself is declared in ``selfalign_ros.graph.declaration``, for this file and
for ``python -m selfalign_ros.tools.bringup`` alike.
"""

from launch import LaunchDescription

from selfalign_ros.graph.declaration import BRINGUP
from selfalign_ros.graph.launch_description import launch_description


def generate_launch_description() -> LaunchDescription:
    return launch_description(BRINGUP)
