"""What the process of every node does first and last: signals, ROS arguments, the reason it ends with.

The rest of a process's life is in ``selfalign_ros.life.node`` and ``selfalign_ros.life.tool_node``.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import rclpy
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

from selfalign_core.errors import ConfigError

_AUTOGROUP = Path("/proc/self/autogroup")


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


def give_way(niceness: int, *, session: bool) -> None:
    """Let this thread, and those it starts, run when others do not; ``session``: and say so for its own session.

    Raises ``OSError`` if the system refuses.
    """
    os.setpriority(os.PRIO_PROCESS, 0, niceness)
    if niceness == 19:  # the lowest: run only when nothing else wants the processor
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    # Where Linux groups processes by session (autogroup), niceness counts only within the session. A node in a session
    # of its own, as the supervisor starts them, has to say it for the whole session.
    if session and os.getsid(0) == os.getpid() and _AUTOGROUP.exists():
        _AUTOGROUP.write_text(str(niceness))
