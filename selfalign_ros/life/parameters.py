"""ROS parameters, declared from ``config/parameters.yaml`` and, of the aligner, from its settings in the core
(``alignment.config``): between them the one place that knows type, default, range and text.

Values are checked before they are set (the refusal names the parameter, what was found and what is allowed)
and applied after, through one callback. What a parameter means is the node's business, not this module's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

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

from selfalign_core.alignment.config import declared
from selfalign_core.errors import ConfigError
from selfalign_core.records import Record, load_document, named, read
from selfalign_ros.life.resources import config_folder

TypeName = Literal["bool", "int", "double", "string"]

_TYPES: dict[TypeName, tuple[type, int]] = {
    "bool": (bool, ParameterType.PARAMETER_BOOL),
    "int": (int, ParameterType.PARAMETER_INTEGER),
    "double": (float, ParameterType.PARAMETER_DOUBLE),
    "string": (str, ParameterType.PARAMETER_STRING),
}
_NAMES = {python_type: name for name, (python_type, _) in _TYPES.items()}


@dataclass(frozen=True)
class ParameterSpec(Record):
    """One parameter as it is declared. ``range`` is (lowest, highest), both allowed."""

    name: str
    type: TypeName
    default: Any
    description: str
    unit: str = ""
    range: tuple[float, float] | None = None
    one_of: tuple[str, ...] = ()
    read_only: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.range is not None and self.type == "int":
            object.__setattr__(self, "range", tuple(map(int, self.range)))
        if (problem := self.problem(self.default)) is not None:
            raise ConfigError(f"ParameterSpec.default: {problem}")

    @property
    def allowed(self) -> str:
        """What the parameter may be, in words."""
        unit = f" {self.unit}" if self.unit else ""
        if self.range is not None:
            return f"{self.type} from {self.range[0]} to {self.range[1]}{unit}"
        return f"one of {', '.join(self.one_of)}" if self.one_of else f"{self.type}{unit}"

    def problem(self, value: Any) -> str | None:
        """None if ``value`` is allowed, otherwise what was found and what is allowed."""
        python_type = _TYPES[self.type][0]
        valid = type(value) is python_type
        if valid and python_type is float:
            valid = math.isfinite(value)
        if valid and self.range is not None:
            valid = self.range[0] <= value <= self.range[1]
        if valid and self.one_of:
            valid = value in self.one_of
        return None if valid else f"found {value!r}; allowed: {self.allowed}"

    def descriptor(self) -> ParameterDescriptor:
        """What ``ros2 param describe`` shows.

        The range is shown and left for tools to use, but rclpy refuses values outside it with a text of its
        own.
        """
        descriptor = ParameterDescriptor(
            name=self.name,
            type=_TYPES[self.type][1],
            description=self.description + (f" [{self.unit}]" if self.unit else ""),
            additional_constraints=self.allowed,
            read_only=self.read_only,
        )
        if self.range is not None and self.type == "double":
            lowest, highest = (float(bound) for bound in self.range)
            descriptor.floating_point_range = [FloatingPointRange(from_value=lowest, to_value=highest)]
        elif self.range is not None:
            lowest, highest = (int(bound) for bound in self.range)
            descriptor.integer_range = [IntegerRange(from_value=lowest, to_value=highest, step=1)]
        return descriptor


@cache
def _document() -> dict[str, dict[str, Any]]:
    return load_document(config_folder() / "parameters.yaml", "the parameters of each kind of node")


@cache
def _settings() -> dict[str, ParameterSpec]:
    """The parameters of the aligner that the core declares."""
    return {
        one.name: ParameterSpec(
            name=one.name,
            type=_NAMES[one.kind],
            default=one.default,
            description=one.text,
            unit=one.unit,
            range=one.range,
            one_of=one.choices,
        )
        for one in declared()
    }


@cache
def _known_names() -> frozenset[str]:
    """Every name a parameter file may hold: those of all our nodes, and those rclpy declares."""
    return frozenset({"use_sim_time", "start_type_description_service"}.union(_settings(), *_document().values()))


@cache
def load_specs(kind: str) -> dict[str, ParameterSpec]:
    """The parameters of one kind of node (``policy``, ``buffer``, ``aligner``, ``robot_sim``), by name."""
    specs = dict(_settings()) if kind == "aligner" else {}
    with named(config_folder() / "parameters.yaml"):
        for name, values in _document()[kind].items():
            same = values == "aligner"
            specs[name] = _settings()[name] if same else read(ParameterSpec, {**values, "name": name}, f"{kind}.{name}")
    return specs


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
            try:
                node.declare_parameter(name, spec.default, spec.descriptor())
            except ParameterException:
                found = node._parameter_overrides[name].value
                raise ConfigError(f"parameter {name}: found {found!r}; allowed: {spec.allowed}") from None
        given = {name for name in node._parameter_overrides if not name.startswith("qos_overrides.")}
        if unknown := sorted(given - _known_names()):
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
