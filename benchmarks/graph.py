"""The bringup graph as a user starts it, in processes of its own, and this process's place in its ROS domain."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import rclpy

from selfalign_core.errors import ConfigError
from selfalign_ros.graph.declaration import BRINGUP
from selfalign_ros.graph.supervisor import free_domain

STOP_TIMEOUT_S = 60.0
_STARTED = re.compile(r"\[([\w-]+)-\d+\]: process started with pid \[(\d+)\]")


@contextlib.contextmanager
def ros(home: Path | None = None) -> Iterator[None]:
    """Take part in a domain that nobody else uses, as the graph will. ``home``: for what is kept, made empty."""
    os.environ.setdefault("ROS_DOMAIN_ID", str(free_domain()))
    os.environ.update(BRINGUP({}).environment)
    if home is not None:
        shutil.rmtree(home, ignore_errors=True)  # no E-Token of an earlier run
        os.environ["ROS_HOME"] = str(home.resolve())
    rclpy.init(args=[])
    try:
        yield
    finally:
        rclpy.try_shutdown()


class Process:
    """A command whose output goes to the file ``log``; killed on leaving the context."""

    def __init__(self, log: Path, command: Sequence[str]) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            self._process = subprocess.Popen([sys.executable, "-m", *command], stdout=output, stderr=subprocess.STDOUT)
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def check(self) -> None:
        """Raise ``ConfigError`` if it has ended by itself."""
        if self.has_ended:
            raise ConfigError(f"the graph ended with exit code {self._process.returncode}; see {self.log}")

    def stop(self) -> int:
        """Ask it to end, and wait; its exit code."""
        self._process.send_signal(signal.SIGINT)
        return self._process.wait(STOP_TIMEOUT_S)


class Graph(Process):
    """The bringup graph with these launch arguments."""

    def __init__(self, log: Path, arguments: Sequence[str]) -> None:
        super().__init__(log, ["selfalign_ros.tools.bringup", *arguments])

    def pids(self) -> dict[str, list[int]]:
        """Process ids of every node, in the order of its starts."""
        found = defaultdict(list)
        for name, pid in _STARTED.findall(self.log.read_text(errors="replace")):
            found[name].append(int(pid))
        return found

    def living(self) -> dict[str, int]:
        """Nodes that run now."""
        return {name: pids[-1] for name, pids in self.pids().items() if is_alive(pids[-1])}

    def leftovers(self) -> list[int]:
        """Nodes of any start that are still there."""
        return [pid for pids in self.pids().values() for pid in pids if is_alive(pid)]


def is_alive(pid: int) -> bool:
    """Whether there is such a process that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
