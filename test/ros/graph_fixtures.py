"""Helpers for tests of whole graphs: a command whose output is read while it runs, and no process left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from node_testing import TIMEOUT_S, wait_for

_STARTED = re.compile(r"\[([\w-]+)-\d+\]: process started with pid \[(\d+)\]")


class GraphRun:
    """A supervisor (or ``ros2 launch``) in a process of its own, and the nodes it says it started."""

    def __init__(self, command: Sequence[str], cwd: Path, environment: dict[str, str] | None = None) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            list(command),
            cwd=cwd,
            env=dict(os.environ) | {"ROS_HOME": str(cwd / "ros_home")} | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @classmethod
    def module(cls, module: str, *arguments: str, cwd: Path) -> GraphRun:
        """``python -m module arguments``."""
        return cls([sys.executable, "-m", module, *arguments], cwd)

    @property
    def output(self) -> str:
        return "".join(self.lines)

    @property
    def pids(self) -> dict[str, list[int]]:
        """Process ids of every node, in the order of its starts."""
        pids: dict[str, list[int]] = {}
        for name, pid in _STARTED.findall(self.output):
            pids.setdefault(name, []).append(int(pid))
        return pids

    def wait_for_line(self, text: str, count: int = 1) -> None:
        """Wait until ``count`` lines contain ``text``; fails with the output if the run ends before."""

        def said() -> bool:
            return sum(text in line for line in list(self.lines)) >= count

        deadline = time.monotonic() + TIMEOUT_S
        while not said():
            ended = self.process.poll() is not None and not self._reader.is_alive()
            if (ended and not said()) or time.monotonic() > deadline:
                pytest.fail(f"{text!r} was not said {count} times; the output is:\n{self.output}")
            time.sleep(0.01)

    def wait_for_pid(self, name: str, starts: int = 1) -> int:
        """The process id of a node's start number ``starts``."""
        wait_for(lambda: len(self.pids.get(name, [])) >= starts, f"start {starts} of {name}:\n{self.output}")
        return self.pids[name][starts - 1]

    def kill_node(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Signal the running process of a node."""
        os.kill(self.pids[name][-1], number)

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """The exit code, once it has ended; no node may be left by then."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {timeout_s:g} s; the output is:\n{self.output}")
        self._reader.join(TIMEOUT_S)
        assert self.living_nodes() == {}, "nodes outlived the run"
        return code

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.wait()

    def living_nodes(self) -> dict[str, int]:
        """Nodes that run now."""
        return {name: pid for name, pids in self.pids.items() for pid in pids if is_alive(pid)}

    def close(self) -> None:
        """Leave nothing behind, whatever happened."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pid in self.living_nodes().values():
            os.kill(pid, signal.SIGKILL)
        self._reader.join(TIMEOUT_S)
        print(self.output)  # shown by pytest if the test fails

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
