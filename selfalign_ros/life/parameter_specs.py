"""Which parameters each kind of node has, as ``config/parameters.yaml`` and, of the aligner, its settings in the core
(``alignment.config``) declare them: between them the one place that knows type, default, range and text.

Knows no ``rclpy``, so that whoever starts nodes can read it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from selfalign_core.alignment.config import declared
from selfalign_core.errors import ConfigError
from selfalign_core.records import Record, load_document, named, read
from selfalign_ros.life.resources import config_folder

TypeName = Literal["bool", "int", "double", "string"]

PYTHON_TYPES: dict[TypeName, type] = {"bool": bool, "int": int, "double": float, "string": str}
_NAMES = {python_type: name for name, python_type in PYTHON_TYPES.items()}
_OF_EVERY_NODE = ("use_sim_time", "start_type_description_service")  # what rclpy declares


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
        python_type = PYTHON_TYPES[self.type]
        valid = type(value) is python_type
        if valid and python_type is float:
            valid = math.isfinite(value)
        if valid and self.range is not None:
            valid = self.range[0] <= value <= self.range[1]
        if valid and self.one_of:
            valid = value in self.one_of
        return None if valid else f"found {value!r}; allowed: {self.allowed}"


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


def kinds() -> tuple[str, ...]:
    """The kinds of node: ``policy``, ``buffer``, ``aligner``, ``robot_sim`` and the tools."""
    return tuple(_document())


def is_known(name: str, kind: str = "") -> bool:
    """Whether nodes of that kind, by default of any, have a parameter of that name."""
    if name in _OF_EVERY_NODE or name.startswith("qos_overrides."):
        return True
    return any(name in load_specs(one) for one in ([kind] if kind else kinds()))


@cache
def load_specs(kind: str) -> dict[str, ParameterSpec]:
    """The parameters of one kind of node (``policy``, ``buffer``, ``aligner``, ``robot_sim``), by name."""
    specs = dict(_settings()) if kind == "aligner" else {}
    with named(config_folder() / "parameters.yaml"):
        for name, values in _document()[kind].items():
            same = values == "aligner"
            specs[name] = _settings()[name] if same else read(ParameterSpec, {**values, "name": name}, f"{kind}.{name}")
    return specs
