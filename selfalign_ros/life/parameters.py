"""ROS parameters of a node, declared as ``life.parameter_specs`` says.

Values are checked before they are set (the refusal names the parameter, what was found and what is allowed)
and applied after, through one callback. What a parameter means is the node's business, not this module's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rcl_interfaces.msg import (
    FloatingPointRange,
    IntegerRange,
    ParameterDescriptor,
    ParameterType,
    SetParametersResult,
)
from rclpy.exceptions import ParameterException
from rclpy.node import Node
from rclpy.parameter import Parameter

from selfalign_core.errors import ConfigError
from selfalign_ros.life.parameter_specs import ParameterSpec, is_known, load_specs

_TYPES = {
    "bool": ParameterType.PARAMETER_BOOL,
    "int": ParameterType.PARAMETER_INTEGER,
    "double": ParameterType.PARAMETER_DOUBLE,
    "string": ParameterType.PARAMETER_STRING,
}


def _descriptor(spec: ParameterSpec) -> ParameterDescriptor:
    """What ``ros2 param describe`` shows.

    The range is shown and left for tools to use, but rclpy refuses values outside it with a text of its
    own.
    """
    descriptor = ParameterDescriptor(
        name=spec.name,
        type=_TYPES[spec.type],
        description=spec.description + (f" [{spec.unit}]" if spec.unit else ""),
        additional_constraints=spec.allowed,
        read_only=spec.read_only,
    )
    if spec.range is not None and spec.type == "double":
        lowest, highest = (float(bound) for bound in spec.range)
        descriptor.floating_point_range = [FloatingPointRange(from_value=lowest, to_value=highest)]
    elif spec.range is not None:
        lowest, highest = (int(bound) for bound in spec.range)
        descriptor.integer_range = [IntegerRange(from_value=lowest, to_value=highest, step=1)]
    return descriptor


class Parameters:
    """The declared parameters of a node and their current values.

    ``values[name]`` may be read in the executor's thread only; hand copies to workers. ``check`` sees all
    values as they would become and returns a reason to refuse them, or None; ``apply`` sees the names that
    were set, after.
    """

    def __init__(self, node: Node, kind: str) -> None:
        self._specs = load_specs(kind)
        self._node = node
        self._apply: Callable[[set[str]], None] = lambda names: None
        self._check: Callable[[dict[str, Any]], str | None] = lambda values: None
        self._accept_integers_for_doubles(node)
        for name, spec in self._specs.items():
            if name in node._parameter_overrides and node._parameter_overrides[name].value is None:
                raise ConfigError(f"parameter {name}: found an empty list, which is no value; allowed: {spec.allowed}")
            try:
                node.declare_parameter(name, spec.default, _descriptor(spec))
            except ParameterException:
                found = node._parameter_overrides[name].value
                raise ConfigError(f"parameter {name}: found {found!r}; allowed: {spec.allowed}") from None
        if unknown := sorted(name for name in node._parameter_overrides if not is_known(name)):
            # Not refused: a file for all nodes (/**) may hold what only nodes of other packages know.
            node.get_logger().warning(f"parameters {', '.join(unknown)}: not known to {kind}; ignored")
        self.values: dict[str, Any] = {name: node.get_parameter(name).value for name in self._specs}
        for name, value in self.values.items():
            if (problem := self._specs[name].problem(value)) is not None:
                raise ConfigError(f"parameter {name}: {problem}")
        node.add_pre_set_parameters_callback(self._convert)
        node.add_on_set_parameters_callback(self._validate)
        node.add_post_set_parameters_callback(self._set)

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def on_change(
        self,
        apply: Callable[[set[str]], None],
        check: Callable[[dict[str, Any]], str | None] = lambda values: None,
    ) -> None:
        """Register what happens when parameters change."""
        self._apply, self._check = apply, check

    def _accept_integers_for_doubles(self, node: Node) -> None:
        # `-p align_frequency:=2` means 2.0; rclpy offers no public way to say so before declaring.
        for name, override in list(node._parameter_overrides.items()):
            (node._parameter_overrides[name],) = self._convert([override])

    def _convert(self, parameters: list[Parameter]) -> list[Parameter]:
        return [
            Parameter(p.name, Parameter.Type.DOUBLE, float(p.value))
            if p.type_ == Parameter.Type.INTEGER and p.name in self._specs and self._specs[p.name].type == "double"
            else p
            for p in parameters
        ]

    def _validate(self, parameters: list[Parameter]) -> SetParametersResult:
        values = dict(self.values)
        for parameter in parameters:
            if parameter.name in self._specs:
                if (problem := self._specs[parameter.name].problem(parameter.value)) is not None:
                    return SetParametersResult(successful=False, reason=f"{parameter.name}: {problem}")
                values[parameter.name] = parameter.value
        reason = self._check(values)
        return SetParametersResult(successful=reason is None, reason=reason or "")

    def _set(self, parameters: list[Parameter]) -> None:
        changed = {p.name: p.value for p in parameters if p.name in self._specs}
        self.values.update(changed)
        if changed:
            self._apply(set(changed))
