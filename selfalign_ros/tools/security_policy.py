"""``python -m selfalign_ros.tools.security_policy``: the SROS 2 policy of the graph, read from the running nodes.

Starts the bringup graph with the launch arguments given (another contract, namespace or set of nodes has other topics),
asks the middleware which topics and services each node has, and writes the policy file that ``ros2 security
generate_artifacts`` takes. Nothing is allowed that a node does not use. See docs/sros2.md.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.node import Node, NodeNameNonExistentError

from selfalign_ros.graph.declaration import BRINGUP, Graph, GraphError, NodeProcess
from selfalign_ros.graph.supervisor import free_domain
from selfalign_ros.tools.bringup import given_arguments, graph_parser

VERSION = "0.2.0"  # of the policy format
_SETTLED_S = 5.0  # without a change: every node has made its topics and services
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class NodeInterface:
    """The absolute names of what one node publishes, subscribes to, offers and calls."""

    publishes: tuple[str, ...] = ()
    subscribes: tuple[str, ...] = ()
    replies: tuple[str, ...] = ()
    requests: tuple[str, ...] = ()


def interface_of(observer: Node, full_name: str) -> NodeInterface:
    """What ``observer`` knows of the node ``/namespace/name``; nothing while it has not discovered it."""
    namespace, _, name = full_name.rpartition("/")

    def names(ask: Callable[[str, str], Iterable[tuple[str, list[str]]]]) -> tuple[str, ...]:
        try:
            return tuple(sorted(found for found, _ in ask(name, namespace or "/")))
        except NodeNameNonExistentError:
            return ()

    return NodeInterface(
        names(observer.get_publisher_names_and_types_by_node),
        names(observer.get_subscriber_names_and_types_by_node),
        names(observer.get_service_names_and_types_by_node),
        names(observer.get_client_names_and_types_by_node),
    )


def to_xml(interfaces: dict[str, NodeInterface], processes: Iterable[NodeProcess]) -> str:
    """A policy with one enclave per process, of the process's full name; nodes composed in one process share it."""
    policy = ET.Element("policy", version=VERSION)
    enclaves = ET.SubElement(policy, "enclaves")
    for process in processes:
        profiles = ET.SubElement(ET.SubElement(enclaves, "enclave", path=process.full_name), "profiles")
        for node in process.members or (process,):
            _add_profile(profiles, node, interfaces[node.full_name])
    ET.indent(policy)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(policy, encoding="unicode")}\n'


def _add_profile(profiles: ET.Element, node: NodeProcess, interface: NodeInterface) -> None:
    profile = ET.SubElement(profiles, "profile", ns=node.namespace, node=node.name)
    for names, group, access in (
        (interface.publishes, "topics", "publish"),
        (interface.subscribes, "topics", "subscribe"),
        (interface.replies, "services", "reply"),
        (interface.requests, "services", "request"),
    ):
        if names:
            allowed = ET.SubElement(profile, group, {access: "ALLOW"})
            for entry in names:
                ET.SubElement(allowed, group.removesuffix("s")).text = entry


class Observer(Node):
    """Sees what nodes there are, and which of them are active."""

    def __init__(self) -> None:
        super().__init__("security_policy")
        self._states: dict[str, str] = {}
        self.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 100)

    def is_whole(self, full_name: str, interface: NodeInterface) -> bool:
        """Whether a node has made everything it makes: a managed one is active then."""
        is_managed = f"{full_name}/get_state" in interface.replies
        return interface != NodeInterface() and (not is_managed or self._states.get(full_name) == "active")

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            name, _, kind = status.name.partition(": ")
            if kind == "lifecycle":
                self._states[f"/{name}"] = {item.key: item.value for item in status.values}["state"]


def read_graph(graph: Graph, is_alive: Callable[[], bool]) -> dict[str, NodeInterface]:
    """The interfaces of a running graph, once all its nodes are active and nothing has changed for a while.

    Raises ``GraphError`` if the graph ends, or a node does not become active.
    """
    rclpy.init(args=[])
    try:
        observer = Observer()
        found: dict[str, NodeInterface] = {}
        deadline = time.monotonic() + _TIMEOUT_S
        settled_at = deadline
        while time.monotonic() < settled_at:
            rclpy.spin_once(observer, timeout_sec=0.2)
            seen = {node.full_name: interface_of(observer, node.full_name) for node in graph.nodes}
            partial = [name for name, interface in seen.items() if not observer.is_whole(name, interface)]
            if not is_alive() or time.monotonic() > deadline:
                raise GraphError(
                    f"nodes: found {', '.join(partial) or 'the graph'} ended or inactive; expected all active"
                )
            if seen != found or partial:
                found, settled_at = seen, time.monotonic() + _SETTLED_S
        return found
    finally:
        rclpy.try_shutdown()


def main(argv: Sequence[str] | None = None) -> int:
    parser = graph_parser(BRINGUP, "selfalign_ros.tools.security_policy")
    parser.add_argument("--output", help="file to write (default: standard output)")
    options = parser.parse_intermixed_args(argv)
    try:
        given = given_arguments(options, BRINGUP)
        graph = BRINGUP(given)
        os.environ["ROS_DOMAIN_ID"] = str(free_domain())
        os.environ.update(graph.environment)
        arguments = [f"{name}:={value}" for name, value in given.items()]
        command = [sys.executable, "-m", "selfalign_ros.tools.bringup", *arguments]
        process = subprocess.Popen(command, stdout=sys.stderr)
        try:
            text = to_xml(read_graph(graph, lambda: process.poll() is None), graph.processes)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()
    except GraphError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.output:
        path = Path(options.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
