"""Nodes that end by themselves: the run report, the recorder and the replay player.

What they share is start, parameters, signals and exit code; a node that runs until it is told to stop is in
``selfalign_ros.life.node``.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node

from selfalign_core.errors import ConfigError, SelfAlignError
from selfalign_core.robot.contract import RobotContract
from selfalign_core.study.statistics import finite
from selfalign_ros.life.exit_codes import CONFIGURATION
from selfalign_ros.life.parameters import Parameters
from selfalign_ros.life.process import say_fatal, start_ros
from selfalign_ros.life.resources import config_file

_SPIN_TIMEOUT_S = 0.1


class ToolNode(Node):
    """A node with ``parameters`` and ``contract`` that works until it is due to end.

    Subclasses overwrite ``finish``; it runs once, after the last callback, and returns the exit code.
    """

    def __init__(self, kind: str, cli_args: list[str] | None = None) -> None:
        super().__init__(kind, cli_args=cli_args)
        self.parameters = Parameters(self, kind)
        self.contract = RobotContract.from_yaml(config_file(self.parameters["contract"]))
        self.is_interrupted: Callable[[], bool] = lambda: False
        self.executor_thread: SingleThreadedExecutor | None = None

    def work(self) -> None:
        """Everything between start and end; by default: callbacks, until ``stop_at`` or a signal."""
        stop_at = self.parameters["stop_at"]
        while not self.is_interrupted() and not 0.0 < stop_at <= time.monotonic():
            self.spin_once(_SPIN_TIMEOUT_S)

    def spin_once(self, timeout_s: float) -> None:
        """Run the callbacks that are due, for at most about ``timeout_s``."""
        assert self.executor_thread is not None
        self.executor_thread.spin_once(timeout_sec=timeout_s)

    def finish(self) -> int:
        """Write what there is to write; the exit code."""
        return 0

    def abort(self) -> None:
        """Give up what was begun: ``work`` raised."""


def check_report_path(path: Path) -> None:
    """Raise ``ConfigError`` if no report could be written to ``path``: at the start, not after a run for nothing."""
    with writing_report(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _partial(path).touch()
        _partial(path).unlink()


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write ``report`` as JSON: first beside ``path``, then in its place, so that a reader never sees half of it."""
    with writing_report(path):
        _partial(path).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        _partial(path).replace(path)


def write_pictured(path: Path, report: dict[str, Any], draw: Callable[[dict[str, Any], Path], None]) -> None:
    """Write ``report``, numbers that are not finite as null, and what ``draw`` makes of it, a PNG of the same name."""
    write_report(path, finite(report))
    with writing_report(path.with_suffix(".png")):
        draw(report, path.with_suffix(".png"))


@contextlib.contextmanager
def writing_report(path: Path) -> Iterator[None]:
    """Turn a file that cannot be written into a ``ConfigError`` that names the parameter."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        yield
    except OSError as error:
        raise ConfigError(f"parameter report: found {path}, {error}; expected a file that can be written") from error


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def run_tool(make_node: Callable[[], ToolNode], args: list[str] | None = None) -> int:
    """Run one such node in a process of its own. Returns its exit code; 2 when what it was given cannot be used."""
    try:
        is_interrupted = start_ros(args)
    except SelfAlignError as error:
        say_fatal(str(error))
        return CONFIGURATION
    try:
        return live(make_node, is_interrupted)
    finally:
        rclpy.try_shutdown()


def live(make_node: Callable[[], ToolNode], is_interrupted: Callable[[], bool]) -> int:
    """The life of one such node in this thread, with an executor of its own. Returns its exit code."""
    node: ToolNode | None = None
    executor = SingleThreadedExecutor()
    try:
        node = make_node()
        node.is_interrupted = is_interrupted
        node.executor_thread = executor
        executor.add_node(node)
        try:
            node.work()
        except BaseException:
            node.abort()
            raise
        return node.finish()
    except SelfAlignError as error:
        say_fatal(str(error))
        return CONFIGURATION
    finally:
        executor.shutdown(timeout_sec=1.0)
        if node is not None:
            node.destroy_node()
