"""Helpers for tests with real node processes: a ROS domain of their own, waiting for conditions, no leftovers.

Tests wait for what they assert and never for time to pass; the timeouts only bound a failure.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import pytest
import yaml

from selfalign_ros.graph.supervisor import free_domain

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120.0
RESEND_S = 30.0


def reserve_domain() -> TextIO:
    """An open, locked file whose name ends in a ROS domain that no other test process, and nothing else, uses."""
    while True:
        domain = free_domain()
        lock = (Path(tempfile.gettempdir()) / f"selfalign-test-domain-{domain}").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            continue
        os.environ["ROS_DOMAIN_ID"] = str(domain)
        os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
        return lock


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = TIMEOUT_S) -> Any:
    """The first true value of ``condition()``; fails saying what never happened."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"did not happen within {timeout_s:g} s: {what}")
        time.sleep(0.01)
    return value


class NodeProcess:
    """One node in a process of its own; its output is in ``log``."""

    def __init__(self, kind: str, folder: Path, parameters: dict[str, Any], remappings: dict[str, str]) -> None:
        self.kind = kind
        self._path = folder / f"{kind}-{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", f"selfalign_ros.nodes.{kind}_node", "--ros-args"]
        for name, value in parameters.items():
            text = str(value).lower() if isinstance(value, bool) else str(value)
            command += ["-p", f"{name}:={text or repr('')}"]
        for source, target in remappings.items():
            command += ["-r", f"{source}:={target}"]
        with self._path.open("w") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def log(self) -> str:
        return self._path.read_text()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stop(self, number: signal.Signals = signal.SIGINT, timeout_s: float = 20.0) -> int:
        """Send a signal and return the exit code."""
        if self.running:
            self.send(number)
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """Leave nothing behind, whatever state the process is in."""
        if self.running:
            self.process.kill()
        self.process.wait()


class Probe:
    """A node in the test process that records what it hears, spun in a thread of its own."""

    def __init__(self) -> None:
        import rclpy
        from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor

        rclpy.init()
        self.node = rclpy.create_node(f"probe_{os.getpid()}")
        self.messages: dict[str, list[Any]] = defaultdict(list)
        self.statuses: dict[str, Any] = {}
        self.status_counts: dict[str, int] = defaultdict(int)
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self.node)

        def spin() -> None:
            with contextlib.suppress(ExternalShutdownException):
                self._executor.spin()

        self._thread = threading.Thread(target=spin, daemon=True)
        from diagnostic_msgs.msg import DiagnosticArray

        self.node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 100)
        self._thread.start()

    def listen(self, message_type: type, topic: str, qos: Any = 100) -> None:
        """Record every message of a topic in ``messages[topic]``."""
        self.node.create_subscription(message_type, topic, self.messages[topic].append, qos)

    def publisher(self, message_type: type, topic: str, qos: Any = 100) -> Any:
        return self.node.create_publisher(message_type, topic, qos)

    def call(self, service_type: type, name: str, request: Any, timeout_s: float = TIMEOUT_S) -> Any:
        """Call a service and return its response."""
        client = self.node.create_client(service_type, name)
        try:
            wait_for(client.service_is_ready, f"service {name} is offered", timeout_s)
            futures = [client.call_async(request)]
            resend = time.monotonic() + RESEND_S

            def answered() -> bool:
                """Ask again if need be: DDS may lose an answer to a client that the server has only half discovered."""
                nonlocal resend
                if time.monotonic() > resend:
                    futures.append(client.call_async(request))
                    resend += RESEND_S
                return any(future.done() for future in futures)

            wait_for(answered, f"service {name} answers", timeout_s)
            return next(future for future in futures if future.done()).result()
        finally:
            self.node.destroy_client(client)

    def set_parameter(self, node: str, name: str, value: Any) -> Any:
        """Set one parameter of a node as ``ros2 param set`` does; returns the SetParametersResult."""
        from rcl_interfaces.srv import SetParameters
        from rclpy.parameter import Parameter

        request = SetParameters.Request(parameters=[Parameter(name, value=value).to_parameter_msg()])
        return self.call(SetParameters, f"{node}/set_parameters", request).results[0]

    def status(self, name: str) -> Any:
        """The newest diagnostics of that name, or None."""
        return self.statuses.get(name)

    def wait_for_status(self, name: str, *parts: str, level: bytes | None = None) -> Any:
        """Wait until the newest diagnostics of that name says all ``parts``, and return it."""

        def said() -> Any:
            status = self.statuses.get(name)
            fits = status is not None and all(part in status.message for part in parts)
            return status if fits and (level is None or status.level == level) else None

        deadline = time.monotonic() + TIMEOUT_S
        while (status := said()) is None:
            if time.monotonic() > deadline:
                last = self.statuses.get(name)
                pytest.fail(f"diagnostics {name!r} never said {parts}; last: {last.message if last else None!r}")
            time.sleep(0.01)
        return status

    def wait_for_diagnostics(self, name: str, times: int) -> None:
        """Let a node live through ``times`` more rounds of diagnostics, at least."""
        count = self.status_counts[name] + times
        wait_for(lambda: self.status_counts[name] >= count, f"{times} more diagnostics of {name!r}")

    def close(self) -> None:
        import rclpy

        self._executor.shutdown()
        self._thread.join(5.0)
        self.node.destroy_node()
        rclpy.try_shutdown()

    def _on_diagnostics(self, message: Any) -> None:
        for status in message.status:
            self.statuses[status.name] = status
            self.status_counts[status.name] += 1


class NodeGraph:
    """Starts node processes and ends every one of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.nodes: dict[str, NodeProcess] = {}

    def start(self, kind: str, remappings: dict[str, str] | None = None, **parameters: Any) -> NodeProcess:
        """Start ``policy``, ``buffer``, ``aligner`` or ``robot_sim``; the model is the untrained one, which fits every
        contract, unless ``checkpoint`` says otherwise, and nothing outlives the processes without a ``token_folder``.
        """
        if kind != "robot_sim":
            parameters = {"checkpoint": "tiny"} | parameters
        if kind in ("policy", "aligner"):
            parameters = {"token_folder": ""} | parameters
        self.nodes[kind] = node = NodeProcess(kind, self._folder, parameters, remappings or {})
        return node

    def contract(self, base: str = "sim_arm.yaml", *, max_age_s: float = 2.0, **changes: Any) -> Path:
        """A copy of a shipped contract with small cameras and with some top-level sections replaced.

        Test machines may be busy: what is tested is that age limits work, not how fast the machine is.
        """
        document = yaml.safe_load((ROOT / "config" / "contracts" / base).read_text())
        for camera in document["cameras"]:
            camera["height"] = camera["width"] = 64
        document["control"].update(max_image_age=max_age_s, max_joint_state_age=max_age_s)
        document |= changes
        path = self._folder / f"contract-{time.monotonic_ns()}.yaml"
        path.write_text(yaml.safe_dump(document))
        return path

    def close(self) -> None:
        for node in self.nodes.values():
            node.kill()
