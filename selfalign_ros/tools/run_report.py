"""The run report node: listens to everything a run says, shows its progress, and writes a JSON and a PNG at its end.

It only listens, so it can be left out, killed or started late without the robot noticing. What the numbers mean is in
``selfalign_core.study.run_summary``. Exit code: 0 when chunks were made, 1 when none was.
"""

from __future__ import annotations

import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from rclpy.clock import Clock, ClockType

from selfalign_core.study import run_picture, run_summary
from selfalign_core.study.run_record import HEARD, RunRecord
from selfalign_ros.bridge.conversions import NS_PER_S
from selfalign_ros.bridge.topics import camera_topics, graph_topics, header_stamp_ns
from selfalign_ros.graph.supervisor import STATUS_LINE_ENVIRONMENT
from selfalign_ros.life.tool_node import ToolNode, check_report_path, run_tool, write_pictured

_LINE_PERIOD_S = 5.0  # where there is no status line
_STATUS_PERIOD_S = 0.5


class RunReport(ToolNode):
    """See the module."""

    def __init__(self) -> None:
        super().__init__("run_report")
        self._started = time.monotonic()
        self._path = Path(self.parameters["report"]) if self.parameters["report"] else None
        if self._path is not None:
            check_report_path(self._path)
        self._record = RunRecord(self.contract.name)
        for camera in camera_topics(self.contract):
            stamps = self._record.frames.setdefault(camera.name, [])
            # Serialized: of an image only the stamp is wanted.
            self.create_subscription(
                camera.type,
                camera.name,
                partial(self._on_picture, stamps),
                camera.qos,
                raw=True,
            )
        for topic in graph_topics(self.contract):
            if topic.name in HEARD:
                self.create_subscription(topic.type, topic.name, partial(self._on_message, topic.name), topic.qos)
        # The supervisor keeps a line that ends with a carriage return at the bottom of the terminal.
        self._has_status_line = os.environ.get(STATUS_LINE_ENVIRONMENT) == "1" or sys.stdout.isatty()
        self._last_line = self._started
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(_STATUS_PERIOD_S, self._show_progress, clock=steady)

    def _on_picture(self, stamps: list[int], data: bytes) -> None:
        stamps.append(header_stamp_ns(data))

    def _on_message(self, topic: str, message: Any) -> None:
        self._record.hear(topic, message, self.get_clock().now().nanoseconds)

    def finish(self) -> int:
        record = self._record
        # When this node started, on the clock of the stamps (simulated time may have begun only later).
        record.end_ns = self.get_clock().now().nanoseconds
        record.start_ns = record.end_ns - round((time.monotonic() - self._started) * NS_PER_S)
        report = run_summary.summarise(record)
        self._print_line(self._progress(), end="\n")
        if self._path is not None:
            write_pictured(self._path, report, run_picture.draw)
            self.get_logger().info(f"report written to {self._path} and {self._path.with_suffix('.png').name}")
        if report["ok"]:
            return 0
        self.get_logger().error(report["reason"])
        return 1

    def _progress(self) -> str:
        elapsed, stop_at = time.monotonic() - self._started, self.parameters["stop_at"]
        total = stop_at - self._started if stop_at else 0.0
        return run_summary.progress_line(self._record, elapsed, total)

    def _show_progress(self) -> None:
        if self._has_status_line:
            self._print_line(self._progress(), end="\r")
        elif time.monotonic() - self._last_line >= _LINE_PERIOD_S:
            # For logs and for `ros2 launch`, which know no status line.
            self._last_line = time.monotonic()
            self._print_line(self._progress(), end="\n")

    def _print_line(self, text: str, end: str) -> None:
        start = "\r\x1b[K" if sys.stdout.isatty() else ""
        print(f"{start}{text}", end=end, flush=True)


def main(args: list[str] | None = None) -> int:
    return run_tool(RunReport, args)


if __name__ == "__main__":
    sys.exit(main())
