"""Starts a graph's processes and keeps them running: for machines without ``ros2 launch``.

Each leads a process group of its own and is killed by the kernel if the supervisor dies, so nothing outlives it.
Log lines are prefixed ``[policy-1]`` and worded as ``launch`` words them. This module must not know what the nodes
do, nor import ``rclpy``: only processes, signals, pipes and exit codes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import re
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from selfalign_ros.graph.declaration import Graph, GraphError, NodeProcess
from selfalign_ros.graph.shared_memory import remove_orphaned_segments
from selfalign_ros.graph.terminal import Terminal
from selfalign_ros.life.exit_codes import CONFIGURATION

# A line ended by a carriage return alone is a status line: kept at the bottom of a terminal, dropped elsewhere.
STATUS_LINE_ENVIRONMENT = "SELFALIGN_STATUS_LINE"

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)  # loaded here because a forked child must not load libraries
_TERM_GRACE_S = 5.0
_DEADLINE_GRACE_S = 60.0
_READER_GRACE_S = 1.0
_LONGEST_LINE = 65536  # [bytes] as much as a pipe holds
_LOCAL_PARTICIPANTS = 32  # how many rmw_fastrtps looks for on one machine when it may not use multicast


@dataclass(frozen=True)
class RespawnPolicy:
    """When a node is started again and when it is given up.

    The wait doubles with every exit in a row, up to ``max_delay_s``; a node that ran for ``stable_s`` starts afresh.
    After ``max_attempts`` restarts in a row the node is given up, and the run fails.
    """

    max_delay_s: float = 8.0
    stable_s: float = 10.0
    max_attempts: int = 6

    def delay_s(self, node: NodeProcess, attempt: int) -> float:
        """Wait before restart number ``attempt`` (1 is the first)."""
        return min(node.respawn_delay_s * 2 ** (attempt - 1), max(self.max_delay_s, node.respawn_delay_s))


def default_command(node: NodeProcess) -> list[str]:
    """The node's module under this interpreter."""
    return [sys.executable, "-m", node.module, *node.arguments(), *node.ros_arguments()]


def node_environment(graph: Graph, *, is_tty: bool, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of every node of ``graph``.

    This interpreter already went through the start-up step of the ROS 2 wheels, so its variables are handed on and
    no node has to re-execute itself.
    """
    environment = dict(os.environ if base is None else base)
    source_root = str(Path(__file__).resolve().parents[2])
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    if source_root not in paths:
        environment["PYTHONPATH"] = os.pathsep.join([source_root, *paths])
    environment["PYTHONUNBUFFERED"] = "1"
    environment["RCUTILS_COLORIZED_OUTPUT"] = "1" if is_tty else "0"
    environment[STATUS_LINE_ENVIRONMENT] = "1" if is_tty else "0"
    return environment | dict(graph.environment)


def check_domain(environment: Mapping[str, str], participants: int) -> None:
    """Refuse a ROS domain in which ``participants`` nodes could not find each other.

    Raises ``GraphError`` when ROS_DOMAIN_ID is no domain, or other programs hold the ports it stands for.
    """
    text = environment.get("ROS_DOMAIN_ID") or "0"
    if not text.isdecimal() or int(text) > 232:
        raise GraphError(f"ROS_DOMAIN_ID: found {text!r}; expected an integer from 0 to 232")
    domain = int(text)
    if environment.get("ROS_AUTOMATIC_DISCOVERY_RANGE") == "LOCALHOST":
        free = sum(_is_free(port) for port in _unicast_ports(domain))
        if free < participants:
            raise GraphError(
                f"ROS_DOMAIN_ID {domain}: found {free} of its {_LOCAL_PARTICIPANTS} discovery ports free "
                f"(udp from {_unicast_ports(domain)[0]}); expected {participants}, other programs hold them: "
                "choose another domain"
            )
    elif not _is_free(_multicast_port(domain), shared=True):
        raise GraphError(
            f"ROS_DOMAIN_ID {domain}: found its discovery port {_multicast_port(domain)}/udp taken by another program; "
            "expected it free or shared: choose another domain"
        )


def claim_names(environment: Mapping[str, str], graph: Graph) -> list[socket.socket]:
    """Claim the names of ``graph``'s nodes in their ROS domain, on this machine, until the sockets are closed.

    Two policies of one name would both command the same robot. The kernel gives a claim back however its process
    ends. Raises ``GraphError`` when another supervisor holds one.
    """
    domain = int(environment.get("ROS_DOMAIN_ID") or "0")
    claims: list[socket.socket] = []
    for node in graph.nodes:
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        claims.append(claim)
        try:
            claim.bind(f"\0selfalign/{domain}{node.full_name}")
        except OSError as error:
            for held in claims:
                held.close()
            if error.errno != errno.EADDRINUSE:
                raise GraphError(f"ROS_DOMAIN_ID {domain}: cannot claim node {node.full_name}: {error}") from None
            raise GraphError(
                f"ROS_DOMAIN_ID {domain}: found node {node.full_name} running already, started by another bringup, "
                "record or replay; expected to be the only one: stop it, or choose another domain or namespace"
            ) from None
    return claims


def free_domain() -> int:
    """A ROS domain that nothing on this machine uses, from those whose ports are clear of the ephemeral ones.

    Raises ``GraphError`` when all of them are in use.
    """
    for domain in random.sample(range(1, 102), 101):
        if all(_is_free(port) for port in (_multicast_port(domain), *_unicast_ports(domain))):
            return domain
    raise GraphError("ROS_DOMAIN_ID: found all of 1 to 101 in use; expected a free one")


def _multicast_port(domain: int) -> int:
    return 7400 + 250 * domain  # RTPS specification, 9.6.1.1


def _unicast_ports(domain: int) -> list[int]:
    return [_multicast_port(domain) + 10 + 2 * participant for participant in range(_LOCAL_PARTICIPANTS)]


def _is_free(port: int, *, shared: bool = False) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        if shared:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


class Supervisor:
    """Runs one graph from the main thread: ``run()`` returns the graph's exit code when every process is gone.

    The exit code is the worst of: a node that was given up (its own code; 128 + signal if it was killed), the node
    that ended the graph, a node that had to be killed at the end. A node that died and was restarted costs nothing.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        command: Callable[[NodeProcess], list[str]] = default_command,
        respawn: RespawnPolicy | None = None,
    ) -> None:
        self._graph = graph
        self._respawn = respawn or RespawnPolicy()
        self._terminal = Terminal()
        self._environment = node_environment(graph, is_tty=self._terminal.is_tty)
        self._processes = [
            _Process(node, f"{node.name}-{number}", command(node)) for number, node in enumerate(graph.processes, 1)
        ]
        self._selector = selectors.DefaultSelector()
        self._exit_code = 0
        self._stopping = False
        self._signals_received = 0
        self._was_signalled = False

    def run(self) -> int:
        """Start everything, watch it, and return when it has ended or was told to end (SIGINT, SIGTERM, SIGHUP)."""
        check_domain(self._environment, len(self._processes))
        claims = claim_names(self._environment, self._graph)
        wakeup_read, wakeup_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(wakeup_read, selectors.EVENT_READ, None)
        previous_wakeup = signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)
        # Stopped by Ctrl-Z, it could neither read what the nodes write nor stop them: SIGTSTP has no effect.
        handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP)
        previous = {number: signal.signal(number, self._on_signal) for number in handled}
        try:
            self._loop(wakeup_read)
        finally:
            for process in self._processes:
                process.kill_group()
            for claim in claims:
                claim.close()
            # A node that was ended right after its start has made some a moment ago.
            remove_orphaned_segments(wait=True)
            self._terminal.end_status()
            # Told to end, it does not wait for whoever does not read; else nothing is lost on a slow reader.
            while not self._terminal.wait(_READER_GRACE_S) and not self._was_signalled:
                pass
            for number, handler in previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(previous_wakeup)
            self._selector.close()
            os.close(wakeup_read)
            os.close(wakeup_write)
        return self._exit_code

    # --- the loop ---

    def _loop(self, wakeup: int) -> None:
        start = time.monotonic()
        # A node that ends the graph keeps time itself; this is for the case that it hangs.
        grace = _DEADLINE_GRACE_S if any(node.ends_graph for node in self._graph.nodes) else 0.0
        deadline = start + self._graph.duration_s + grace if self._graph.duration_s else None
        for process in self._processes:
            self._start(process)
        while True:
            if deadline is not None and time.monotonic() >= deadline and not self._stopping:
                if grace:
                    self._fail(1, f"nothing ended the run {grace:g} s after its {self._graph.duration_s:g} s")
                self._stop("duration is over")
            self._handle_signals()
            for process in self._processes:
                self._advance(process)
            if all(process.is_finished for process in self._processes):
                return
            wake_times = [process.wake_at for process in self._processes if process.wake_at is not None]
            if deadline is not None and not self._stopping:
                wake_times.append(deadline)
            timeout = max(0.0, min(wake_times) - time.monotonic()) if wake_times else None
            for key, _ in self._selector.select(timeout):
                if key.fd == wakeup:
                    os.read(wakeup, 512)
                elif key.data is not None and key.fd == key.data.pipe:
                    self._read(key.data)

    def _start(self, process: _Process) -> None:
        if self._stopping:
            process.give_up()
            return
        try:
            process.start(self._environment)
        except OSError as error:
            process.give_up()
            self._fail(127, f"cannot start {shlex.join(process.command)}: {error}", process)
            return
        self._selector.register(process.pidfd, selectors.EVENT_READ, process)
        self._selector.register(process.pipe, selectors.EVENT_READ, process)
        self._say(process, f"process started with pid [{process.pid}]")

    def _read(self, process: _Process) -> None:
        for line, is_status in process.read_lines():
            self._terminal.write(process.label, line, is_status)
        if process.output_ended and process.pipe in self._selector.get_map():
            self._selector.unregister(process.pipe)

    def _advance(self, process: _Process) -> None:
        if process.is_running and process.poll() is not None:
            self._read(process)
            self._selector.unregister(process.pidfd)
            if process.pipe in self._selector.get_map():
                self._selector.unregister(process.pipe)
            process.collect()
            self._on_exit(process)
        elif process.is_running and process.escalate_at is not None and time.monotonic() >= process.escalate_at:
            number = process.escalate()
            self._say(process, f"still running; sending {number.name}", "WARN")
        elif process.restart_at is not None and (self._stopping or time.monotonic() >= process.restart_at):
            self._start(process)

    def _on_exit(self, process: _Process) -> None:
        code, node = process.exit_code, process.node
        if code < 0:
            remove_orphaned_segments()
        if code == 0:
            self._say(process, f"process has finished cleanly [pid {process.pid}]")
        elif not (self._stopping and code in (-signal.SIGINT, -signal.SIGTERM, 128 + signal.SIGINT)):
            what = f"process has died [pid {process.pid}, exit code {code}, cmd '{shlex.join(process.command)}']."
            self._say(process, what, "ERROR")
        if self._stopping:
            process.give_up()
            if code not in (0, -signal.SIGINT, -signal.SIGTERM, 128 + signal.SIGINT):
                self._fail(code)
        elif node.ends_graph and code >= 0:
            process.give_up()
            self._fail(code)
            self._stop(f"{node.name} has finished")
        elif code == CONFIGURATION:
            process.give_up()
            self._fail(code, "cannot work as configured (see its message above); stopping everything", process)
            self._stop("a node cannot work as configured")
        elif not node.respawn:
            process.give_up()
            self._fail(code)
            if node.ends_graph:
                self._stop(f"{node.name} has died")
        else:
            self._schedule_restart(process)

    def _schedule_restart(self, process: _Process) -> None:
        attempt = process.next_attempt(self._respawn.stable_s)
        if attempt > self._respawn.max_attempts:
            process.give_up()
            # A node that keeps ending without an error is no more use than one that crashes.
            self._fail(process.exit_code or 1, f"given up after {attempt - 1} restarts in a row", process)
            return
        delay = self._respawn.delay_s(process.node, attempt)
        process.restart_at = time.monotonic() + delay
        self._say(process, f"restarting in {delay:g} s (attempt {attempt} of {self._respawn.max_attempts})", "WARN")

    # --- stopping ---

    def _on_signal(self, number: int, frame: object) -> None:
        # select() is not interrupted by Python handlers but by the wake-up pipe; here is only the count.
        if number != signal.SIGTSTP:
            self._was_signalled = True
            self._signals_received += 1

    def _handle_signals(self) -> None:
        received, self._signals_received = self._signals_received, 0
        for _ in range(received):
            if not self._stopping:
                self._stop("interrupted")
            else:
                for process in self._processes:
                    process.escalate_now()

    def _stop(self, reason: str) -> None:
        self._stopping = True
        for process in self._processes:
            process.request_stop()
        self._terminal.write_plain("INFO", f"{reason}: stopping all nodes")

    def _fail(self, code: int, message: str = "", process: _Process | None = None) -> None:
        code = 128 - code if code < 0 else code
        self._exit_code = max(self._exit_code, code)
        if message and process is not None:
            self._say(process, message, "ERROR")
        elif message:
            self._terminal.write_plain("ERROR", message)

    def _say(self, process: _Process, message: str, level: str = "INFO") -> None:
        self._terminal.write_plain(level, message, process.label)


class _Process:
    """One node's process over its restarts, with its pipe and its appointments (``restart_at``, ``escalate_at``)."""

    def __init__(self, node: NodeProcess, label: str, command: list[str]) -> None:
        self.node, self.label, self.command = node, label, command
        self.restart_at: float | None = None
        self.escalate_at: float | None = None
        self.pid = 0
        self.pidfd = self.pipe = -1
        self.exit_code = 0
        self.is_finished = False
        self.output_ended = False
        self._popen: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._attempts = 0
        self._pending = b""
        self._escalation: list[signal.Signals] = []

    @property
    def is_running(self) -> bool:
        return self._popen is not None

    @property
    def wake_at(self) -> float | None:
        return self.escalate_at if self.is_running else self.restart_at

    def start(self, environment: Mapping[str, str]) -> None:
        self.restart_at = None
        self.output_ended = False
        self._popen = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            env=dict(environment),
            start_new_session=True,  # a group of its own: Ctrl-C reaches it through the supervisor only
            preexec_fn=_die_with(os.getpid()),
        )
        self.pid = self._popen.pid
        self.pidfd = os.pidfd_open(self.pid)
        assert self._popen.stdout is not None
        self.pipe = self._popen.stdout.fileno()
        os.set_blocking(self.pipe, False)
        self._started_at = time.monotonic()
        self._pending = b""

    def poll(self) -> int | None:
        return self._popen.poll() if self._popen else None

    def collect(self) -> None:
        """Take the exit code of a process that has ended, and whatever it left behind in its group."""
        assert self._popen is not None and self._popen.stdout is not None
        self.exit_code = self._popen.wait()
        self.kill_group()
        os.close(self.pidfd)
        self._popen.stdout.close()
        self._popen, self.escalate_at = None, None

    def read_lines(self) -> list[tuple[str, bool]]:
        """Complete lines written since, each with whether it is a status line."""
        has_ended = self.poll() is not None
        # A node that never stops writing must not keep the others waiting; the last words of one that has ended fit in.
        for _ in range(16 if has_ended else 1):
            try:
                data = os.read(self.pipe, 65536)
            except BlockingIOError:
                break
            if not data:
                self.output_ended = True
                break
            self._pending += data
        *parts, self._pending = re.split(rb"(\r?\n|\r)", self._pending)
        if self._pending and (has_ended or len(self._pending) >= _LONGEST_LINE):
            parts += [self._pending, b""]
            self._pending = b""
        return [
            (text.decode(errors="replace"), end == b"\r") for text, end in zip(parts[::2], parts[1::2], strict=True)
        ]

    def next_attempt(self, stable_s: float) -> int:
        if time.monotonic() - self._started_at >= stable_s:
            self._attempts = 0
        self._attempts += 1
        return self._attempts

    def give_up(self) -> None:
        self.is_finished, self.restart_at = True, None

    def request_stop(self) -> None:
        self._escalation = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]
        if self.is_running:
            self.escalate()
        else:
            self.give_up()

    def escalate(self) -> signal.Signals:
        """Send the next stronger signal and make the appointment for the one after."""
        number = self._escalation.pop(0) if len(self._escalation) > 1 else signal.SIGKILL
        self._signal_group(number)
        grace = self.node.stop_grace_s if number == signal.SIGINT else _TERM_GRACE_S
        self.escalate_at = time.monotonic() + grace
        return number

    def escalate_now(self) -> None:
        if self.is_running:
            self.escalate()

    def kill_group(self) -> None:
        if self.pid:
            self._signal_group(signal.SIGKILL)

    def _signal_group(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):
            return  # the group is gone


def _die_with(parent: int) -> Callable[[], None]:
    """For a child between fork and exec: SIGKILL it when the thread that forked it dies."""

    def prepare() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # died before the call above
            os._exit(1)

    return prepare
