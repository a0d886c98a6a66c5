"""From a graph declaration to a launch description for genuine ``ros2 launch``; the only module that imports launch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction, SetEnvironmentVariable, Shutdown
from launch.events.process import ProcessExited
from launch_ros.actions import Node

from selfalign_ros.graph.declaration import PACKAGE, GraphDeclaration, NodeProcess
from selfalign_ros.graph.shared_memory import remove_orphaned_segments
from selfalign_ros.graph.supervisor import check_domain
from selfalign_ros.life.exit_codes import CONFIGURATION


def launch_description(declaration: GraphDeclaration, defaults: Mapping[str, str] | None = None) -> LaunchDescription:
    """The graph's launch arguments, and its nodes once these have values. ``defaults`` replace those declared."""
    defaults = defaults or {}
    arguments = [
        DeclareLaunchArgument(
            argument.name,
            default_value=defaults.get(argument.name, argument.default),
            description=argument.description,
            choices=list(argument.choices) or None,
        )
        for argument in declaration.arguments
    ]

    def assemble(context: LaunchContext) -> list:
        given = {argument.name: context.launch_configurations[argument.name] for argument in declaration.arguments}
        graph = declaration(given)
        check_domain({**context.environment, **graph.environment}, len(graph.processes))
        variables = [SetEnvironmentVariable(name, value) for name, value in graph.environment.items()]
        return variables + [_node(node) for node in graph.processes]

    return LaunchDescription([*arguments, OpaqueFunction(function=assemble)])


def _node(node: NodeProcess) -> Node:
    # `sigterm_timeout` and `sigkill_timeout` keep a report that is being written from being cut off.
    return Node(
        package=PACKAGE,
        executable=node.executable,
        exec_name=node.name,
        arguments=node.arguments(),
        ros_arguments=["--log-level", node.log_level, "--enclave", node.full_name],
        **_own(node),
        output="screen",
        respawn=node.respawn,
        respawn_delay=node.respawn_delay_s,
        sigterm_timeout=str(node.stop_grace_s),
        on_exit=_on_exit(node),
    )


def _own(node: NodeProcess) -> dict[str, Any]:
    """Name, parameters and remappings; the members of a composition have theirs in the arguments."""
    if node.members:
        return {}
    return {
        "name": node.name,
        "namespace": node.namespace,
        "parameters": [*node.parameter_files, dict(node.parameters)],
        "remappings": list(node.remappings),
    }


def _on_exit(node: NodeProcess) -> Callable[[ProcessExited, LaunchContext], list]:
    def handle(event: ProcessExited, context: LaunchContext) -> list:
        code = event.returncode
        if code < 0:
            remove_orphaned_segments()
        if context.is_shutdown:
            return []
        if code == CONFIGURATION:
            # An exception is how a launch file makes `ros2 launch` end with an error.
            raise RuntimeError(f"{node.name} cannot work as configured (see its message above)")
        if node.ends_graph and code > 0:
            raise RuntimeError(f"{node.name} ended with exit code {code} (see its message above)")
        if node.ends_graph and (code == 0 or not node.respawn):
            return [Shutdown(reason=f"{node.name} has finished")]
        return []

    return handle
