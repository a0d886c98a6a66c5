"""The run report node: listens to everything a run says, shows its progress, and writes a JSON and a PNG at its end.

It only listens, so it can be left out, killed or started late without the robot noticing. What the numbers mean is in
``selfalign_core.study.run_summary``. Exit code: 0 when chunks were made, 1 when none was.
"""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.clock import Clock, ClockType
from std_msgs.msg import Bool, Float64, String

from selfalign.msg import ActionChunk, AlignReport, EToken
from selfalign_core.errors import InputError
from selfalign_core.robot.types import token_norm
from selfalign_core.study import run_picture, run_summary
from selfalign_core.study.run_summary import AlignRecord, ChunkRecord, RunRecords, StatusRecord, TokenRecord
from selfalign_ros.bridge import qos
from selfalign_ros.bridge.conversions import NS_PER_S, e_token_from_message, to_ns
from selfalign_ros.bridge.topics import camera_topics, header_stamp_ns
from selfalign_ros.graph.supervisor import STATUS_LINE_ENVIRONMENT
from selfalign_ros.life.tool_node import ToolNode, check_report_path, run_tool, write_report, writing_report

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
        self._records = RunRecords(self.contract.name, start=0.0)
        for camera in camera_topics(self.contract):
            stamps = self._records.frames.setdefault(camera.name, [])
            # Serialized: of an image only the stamp is wanted.
            self.create_subscription(
                camera.type,
                camera.name,
                lambda data, stamps=stamps: stamps.append(header_stamp_ns(data) / NS_PER_S),
                camera.qos,
                raw=True,
            )
        self.create_subscription(ActionChunk, "action_chunk", self._on_chunk, qos.EVENTS)
        self.create_subscription(AlignReport, "align_report", self._on_align, qos.EVENTS)
        self.create_subscription(EToken, "e_token", self._on_token, qos.LATCHED)
        self.create_subscription(Float64, "distance_to_target", self._on_distance, qos.EVENTS)
        self.create_subscription(Bool, "target_reached", self._on_target_reached, qos.EVENTS)
        self.create_subscription(String, "body", self._on_body, qos.LATCHED)
        self.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 100)
        # The supervisor keeps a line that ends with a carriage return at the bottom of the terminal.
        self._has_status_line = os.environ.get(STATUS_LINE_ENVIRONMENT) == "1" or sys.stdout.isatty()
        self._last_line = self._started
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(_STATUS_PERIOD_S, self._show_progress, clock=steady)

    def finish(self) -> int:
        self._records.duration = time.monotonic() - self._started
        self._records.start = self._first_time()
        report = run_summary.summarise(self._records)
        self._print_line(self._progress(), end="\n")
        if self._path is not None:
            self._write(report, self._path)
        if report["ok"]:
            return 0
        self.get_logger().error(report["reason"])
        return 1

    def _first_time(self) -> float:
        """When this node started, on the clock of the stamps (simulated time may have begun only later)."""
        return self._now() - self._records.duration

    def _now(self) -> float:
        return self.get_clock().now().nanoseconds / NS_PER_S

    def _write(self, report: dict, path: Path) -> None:
        picture = path.with_suffix(".png")
        write_report(path, run_summary.finite(report))
        with writing_report(picture):
            run_picture.draw(report, picture)
        self.get_logger().info(f"report written to {path} and {picture.name}")

    # --- what is heard ---

    def _on_chunk(self, message: ActionChunk) -> None:
        self._records.chunks.append(
            ChunkRecord(
                stamp=to_ns(message.header.stamp) / NS_PER_S,
                observation_age=message.observation_age,
                latency=message.inference_duration,
                e_token_version=message.e_token_version,
                horizon=message.horizon,
                dim=message.dim,
            )
        )

    def _on_align(self, message: AlignReport) -> None:
        losses = {
            name: {loss: float(getattr(getattr(message, name), loss)) for loss in run_summary.LOSSES}
            for name in run_summary.SETS
        }
        judged = message.attempted or message.returned
        self._records.aligns.append(
            AlignRecord(
                end=to_ns(message.header.stamp) / NS_PER_S,
                duration_s=message.duration,
                state=message.state,
                text=message.text,
                version_before=message.version_before,
                version_after=message.version_after,
                e_token_norm=message.e_token_norm,
                transitions=message.transitions,
                drift=message.drift,
                drift_factor=message.drift_factor if message.drift_tested else math.nan,
                returned=message.returned,
                attempted=message.attempted,
                accepted=message.accepted,
                start=message.start,
                steps=message.steps,
                attempt_s=message.attempt_duration,
                difference_mean=message.difference_mean if judged else math.nan,
                difference_stderr=message.difference_stderr if judged else math.nan,
                losses=losses if message.attempted else None,
            )
        )

    def _on_token(self, message: EToken) -> None:
        try:
            norm = token_norm(e_token_from_message(message).data)
        except InputError:
            return  # the policy says what is wrong with it
        self._records.tokens.append(TokenRecord(to_ns(message.header.stamp) / NS_PER_S, message.version, norm))

    def _on_distance(self, message: Float64) -> None:
        self._records.distances.append((self._now(), message.data))

    def _on_target_reached(self, message: Bool) -> None:
        self._records.targets.append((self._now(), message.data))

    def _on_body(self, message: String) -> None:
        self._records.bodies.append((self._now(), message.data))

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            values = {item.key: item.value for item in status.values}
            self._records.statuses[status.name] = StatusRecord(status.level[0], status.message, values)

    # --- progress ---

    def _progress(self) -> str:
        elapsed, stop_at = time.monotonic() - self._started, self.parameters["stop_at"]
        total = stop_at - self._started if stop_at else 0.0
        return run_summary.progress_line(self._records, elapsed, total)

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
