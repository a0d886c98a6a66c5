"""The bringup graph and a recorder that writes an MCAP bag of it.

    ros2 launch selfalign record.launch.py output:=my_bag duration:=20

The graph itself is declared in ``selfalign_ros.graph.declaration``, for this file and
for ``python -m selfalign_ros.tools.record`` alike.
"""

from launch import LaunchDescription

from selfalign_ros.graph.declaration import RECORD
from selfalign_ros.graph.launch_description import launch_description


def generate_launch_description() -> LaunchDescription:
    return launch_description(RECORD)
