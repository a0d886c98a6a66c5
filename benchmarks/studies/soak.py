"""Simulated operation at real rates for a long time: memory of each process flat, no chunk missed, no node restarted.

Starts the bringup graph as a user does, reads the memory of every process once per second and listens to /diagnostics.
The first minute is warm-up: models are loaded, the buffer fills, allocators grow. After it, nothing may.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.node import Node

from benchmarks.graph import Graph, ros
from benchmarks.harness import MIB, print_table, save, verdict
from selfalign_core.command_line import More, command
from selfalign_core.errors import ConfigError

WARM_UP_S = 60.0
SHORTEST_S = 150.0
"""Warm-up, and long enough after it to tell growth from noise."""
GROWTH_LIMIT_MIB = 10.0
"""Of one process's memory between the warm-up and the end, however long that is. The software renderer's heap settles 6
MiB higher after some 20,000 images (12 minutes); 100 bytes lost per image would be 11 MiB in an hour."""
EDGE_S = 20.0
"""How long memory is averaged (median) for the figure after the warm-up and for that at the end."""
COUNTED = ("late chunks", "holds")


class Listener(Node):
    """The values of the policy's diagnostics over time."""

    def __init__(self) -> None:
        super().__init__("soak")
        self.values: list[tuple[float, dict[str, str]]] = []
        self.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 100)

    def count(self, name: str, since: float = 0.0) -> int:
        """How much the counter ``name`` rose after the monotonic time ``since``."""
        counts = [(at, int(values[name])) for at, values in self.values]
        before = [count for at, count in counts if at <= since]
        return counts[-1][1] - (before[-1] if before else 0) if counts else 0

    def last_holds(self, since: float) -> list[dict[str, Any]]:
        """Whenever ``holds`` had risen after ``since``: seconds after it, how many, and the last one's reason."""
        rows, before = [], self.count("holds") - self.count("holds", since)
        for at, values in self.values:
            if at > since and (holds := int(values["holds"])) > before:
                rows.append({"second": round(at - since, 1), "holds": holds - before, "last": values["last hold"]})
                before = holds
        return rows

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            if status.name.endswith("policy: chunks"):
                self.values.append((time.monotonic(), {item.key: item.value for item in status.values}))


@dataclass
class Soak:
    """One run of the graph and what was measured of it. Times are monotonic seconds, memory in bytes."""

    graph: Graph
    memory: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    pids: dict[str, list[int]] = field(default_factory=dict)

    def run(self, listener: Listener, duration_s: float) -> tuple[float, float]:
        """Listen for ``duration_s``; when it began and when it ended. ``ConfigError`` if the graph ends before."""
        begin = due = time.monotonic()
        while time.monotonic() < begin + duration_s:
            rclpy.spin_once(listener, timeout_sec=0.1)
            if self.graph.has_ended:
                raise ConfigError(f"the graph ended after {time.monotonic() - begin:.0f} s; see {self.graph.log}")
            if time.monotonic() >= due:
                self._read_memory()
                due += 1.0
        return begin, time.monotonic()

    def _read_memory(self) -> None:
        self.pids = {"supervisor": [self.graph.pid], **self.graph.pids()}
        now = time.monotonic()
        for name, pids in self.pids.items():
            if (size := resident(pids[-1])) is not None:
                self.memory.setdefault(name, []).append((now, size))


def resident(pid: int) -> int | None:
    """Resident memory of a process in bytes, without what it shares through /dev/shm; None if it is gone.

    The segments that messages travel through have a size of their own, taken from the start; a process counts the pages
    of its neighbours' segments that it has read so far, up to all of them.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        sizes = dict(line.split(":", 1) for line in lines)
        return 1024 * sum(int(sizes[name].split()[0]) for name in ("RssAnon", "RssFile"))
    except (OSError, KeyError):
        return None


def series(samples: Sequence[tuple[float, int]], begin: float) -> list[list[float]]:
    """Seconds since ``begin`` and MiB, one row (median) for every ten samples."""
    tens = [samples[i : i + 10] for i in range(0, len(samples), 10)]
    return [
        [statistics.median(at for at, _ in ten) - begin, statistics.median(s for _, s in ten) / MIB] for ten in tens
    ]


def growth(samples: Sequence[tuple[float, int]], begin: float, end: float) -> dict[str, Any]:
    """Memory after the warm-up and at the end, and the slope between, of one process."""
    steady = np.array([(at, size / MIB) for at, size in samples if begin + WARM_UP_S <= at <= end])
    first = steady[steady[:, 0] <= steady[0, 0] + EDGE_S, 1]
    last = steady[steady[:, 0] >= steady[-1, 0] - EDGE_S, 1]
    grown = statistics.median(last) - statistics.median(first)
    slope = np.polyfit(steady[:, 0] / 3600, steady[:, 1], 1)[0]
    return {
        "after_warm_up_mib": statistics.median(first),
        "end_mib": statistics.median(last),
        "growth_mib": grown,
        "slope_mib_per_hour": float(slope),
        "flat": bool(grown <= GROWTH_LIMIT_MIB),
    }


def run(
    *arguments: Annotated[str, "launch arguments of bringup", More(metavar="name:=value", nargs="*")],
    duration: Annotated[float, "seconds, the warm-up included"] = 3600.0,
    output: Annotated[Path, "folder for soak.json and the log of the graph"] = Path("runs/soak"),
) -> int:
    """Simulated operation at real rates: memory flat after the first minute, no chunk missed."""
    if duration < SHORTEST_S:
        raise ConfigError(f"--duration: found {duration:g}, expected >= {SHORTEST_S:g} s")
    with ros(output / "ros_home"), Graph(output / "graph.log", arguments) as graph:
        listener, soak = Listener(), Soak(graph)
        begin, end = soak.run(listener, duration)
        exit_code = graph.stop()
    counts = {name: listener.count(name, begin + WARM_UP_S) for name in (*COUNTED, "chunks")}
    holds = listener.last_holds(begin + WARM_UP_S)
    memory = {
        name: {**growth(samples, begin, end), "series": series(samples, begin)} for name, samples in soak.memory.items()
    }
    restarts = {name: len(pids) - 1 for name, pids in soak.pids.items()}
    checks = {
        "memory of each process flat": all(figures["flat"] for figures in memory.values()),
        "no chunk missed": counts["chunks"] > 0 and not any(counts[name] for name in COUNTED),
        "no node restarted": not any(restarts.values()),
        "stopped cleanly": exit_code == 0,
    }
    figures = {"duration_s": end - begin, "warm_up_s": WARM_UP_S, "growth_limit_mib": GROWTH_LIMIT_MIB}
    measured = {"after_warm_up": counts, "holds": holds, "memory": memory, "restarts": restarts, "checks": checks}
    save(output / "soak.json", "soak", **figures, **measured)
    keys = ("after_warm_up_mib", "end_mib", "growth_mib", "slope_mib_per_hour")
    rows = [
        [name, *(f"{values[key]:.1f}" for key in keys), "yes" if values["flat"] else "NO"]
        for name, values in memory.items()
    ]
    print_table(["memory, MiB", "after 1 minute", "at the end", "growth", "slope per hour", "flat"], rows)
    print(f"after the first minute: {', '.join(f'{count} {name}' for name, count in counts.items())}")
    for row in holds:
        print(f"{row['second']:.0f} s later: {row['holds']} holds, the last one: {row['last']}")
    return verdict(checks)


main = command("benchmarks.studies.soak", run)

if __name__ == "__main__":
    sys.exit(main())
