"""Messages of a bag as numbers: commands in the contract's order.

Every function takes a decoded message and raises ``InputError`` saying what was found and what was expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from selfalign_core.data.rosbag_file import NS
from selfalign_core.data.rosbag_frames import Command
from selfalign_core.errors import InputError

IMAGE_TYPES = {"raw": "sensor_msgs/msg/Image", "compressed": "sensor_msgs/msg/CompressedImage"}
JOINT_STATE_TYPE = "sensor_msgs/msg/JointState"
PROMPT_TYPE = "std_msgs/msg/String"
COMMAND_TYPES = {
    "joint_trajectory": "trajectory_msgs/msg/JointTrajectory",
    "forward_command": "std_msgs/msg/Float64MultiArray",
}


def command_of(message: Any, names: Sequence[str], received_ns: int) -> Command:
    """A joint trajectory or a forward command that was received at ``received_ns``."""
    command = _trajectory(message, names, received_ns) if hasattr(message, "points") else None
    command = command or _forward_command(message, names, received_ns)
    if not np.isfinite(command.positions).all():
        joint = names[int(np.argmax(~np.isfinite(command.positions).all(axis=0)))]
        raise InputError(f"joint {joint}: found NaN or an infinite position, expected finite positions")
    if (np.diff(command.times_ns) < 0).any():
        raise InputError("found points in falling order of time, expected rising")
    return command


def _forward_command(message: Any, names: Sequence[str], received_ns: int) -> Command:
    positions = np.asarray(message.data, np.float64)[None]
    if positions.shape[1] != len(names):
        raise InputError(f"found {positions.shape[1]} values, expected {len(names)} ({', '.join(names)})")
    return Command(received_ns, np.array([received_ns], np.int64), positions)


def _trajectory(message: Any, names: Sequence[str], received_ns: int) -> Command:
    columns = {name: column for column, name in enumerate(message.joint_names)}
    if missing := [name for name in names if name not in columns]:
        raise InputError(f"found joints {list(message.joint_names)}, expected also {missing}")
    if not message.points or any(len(p.positions) != len(message.joint_names) for p in message.points):
        raise InputError("found points without a position per joint, expected at least one with all")
    order = [columns[name] for name in names]
    positions = np.array([point.positions for point in message.points], np.float64)[:, order]
    # A command has no stamp of its own, or one that says when it starts; it counts from when it was received.
    start_ns = _nanoseconds(message.header.stamp) or received_ns
    times = np.array([start_ns + _nanoseconds(point.time_from_start) for point in message.points], np.int64)
    return Command(received_ns, times, positions)


def _nanoseconds(time: Any) -> int:
    return time.sec * NS + time.nanosec
