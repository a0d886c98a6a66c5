"""What the process of every node does first and last: signals, ROS arguments, the reason it ends with.

The rest of a process's life is in ``selfalign_ros.node`` and ``selfalign_ros.tool_node``.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

import rclpy
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

from selfalign_core.errors import ConfigError


def start_ros(args: list[str] | None) -> Callable[[], bool]:
    """Initialise ROS with ``args`` (None: the command line's); returns what tells whether the process was asked to end.

    SIGINT and SIGTERM are only noted: rclpy's own handlers would invalidate the context before the robot can be told
    to hold and before what was collected is written.

    Raises:
        ConfigError: an argument or a parameter file that ROS cannot read.
    """
    signalled = False

    def on_signal(number: int, frame: object) -> None:
        nonlocal signalled
        signalled = True

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    try:
        rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    except Exception as error:
        raise ConfigError(f"ROS arguments: {error}") from error
    return lambda: signalled


def say_fatal(text: str, node: Node | None = None) -> None:
    """Why the process ends: in the log of ``node``, or on stderr when there is no log yet (or no longer)."""
    if node is not None:
        node.get_logger().fatal(text)
    else:
        print(f"[FATAL] {text}", file=sys.stderr, flush=True)
