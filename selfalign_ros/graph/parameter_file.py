"""A ROS parameter file, read as ROS reads it before any node is started.

ROS gives a node what stands under the keys that match its name, and says nothing of the others: ``policy`` is not heard
by ``/left/policy``. Here a key that matches none of the nodes, a parameter that its node has not, and a value that the
node would not take are refused, naming the file. Knows neither ``rclpy`` nor how nodes are started.

The rules are those of rcl's ``rcl_yaml_param_parser``, which differ from PyYAML's (``y`` is true, ``1_000`` a text).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from selfalign_core.errors import ConfigError
from selfalign_core.records import named, shown
from selfalign_ros.life.parameter_specs import ParameterSpec, is_known, load_specs

PARAMETERS = "ros__parameters"
_MOST_BYTES, _MOST_DEPTH = 1 << 20, 32
_ARGUMENTS = "/**"  # where rcl puts `-p name:=value`

_TEXT_TAG = "tag:yaml.org,2002:str"
_QUOTES = ("'", '"')
_TRUE = frozenset(("y", "Y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON"))
_FALSE = frozenset(("n", "N", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF"))
_INTEGER = re.compile(r"([-+]?)(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"([-+]?)\.?(inf|infinity|nan)", re.IGNORECASE)


@dataclass(frozen=True)
class Setting:
    """One parameter under one key. ``value`` is as ROS reads what is ``written``; a list is a tuple of texts."""

    key: str
    name: str
    value: Any
    written: str


@dataclass(frozen=True)
class ParameterFile:
    """The keys of a file in their order, written as ROS knows them (from ``/`` on), and what stands under them."""

    path: Path
    keys: tuple[str, ...]
    settings: tuple[Setting, ...]

    @classmethod
    def read(cls, path: str | Path) -> ParameterFile:
        """Raises ``ConfigError``: no file that ROS could read, or a name in it that is there twice."""
        path = Path(path)
        with named(path):
            keys: dict[str, None] = {}
            settings: dict[tuple[str, str], Setting] = {}
            for key, values in _nodes(_document(path), ""):
                if key in keys:
                    raise ConfigError(f"{key}: found twice, expected each key once")
                keys[key] = None
                for setting in _settings(key, values, ""):
                    settings[key, setting.name] = setting
            return cls(path, tuple(keys), tuple(settings.values()))

    def check(self, nodes: Mapping[str, str], given: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse what would not be heard.

        Args:
            nodes: the kind of every node that the graph can have, by full name.
            given: what is given to them beside the file, by full name, and shall be in force.

        Raises:
            ConfigError: naming file and key, what was found and what was expected.
        """
        with named(self.path):
            for key in self.keys:
                if not any(matches(key, node) for node in nodes):
                    raise ConfigError(
                        f"{key}: found no node of that name in this graph; expected one of {', '.join(nodes)}, or a "
                        "pattern such as /**/policy"
                    )
            for setting in self.settings:
                for node, kind in nodes.items():
                    if matches(setting.key, node):
                        _check_setting(setting, kind)
            for node, values in given.items():
                self._check_given(node, values)

    def _check_given(self, node: str, values: Mapping[str, Any]) -> None:
        """ROS looks at keys in the order in which they first appear, and at what is given by name where ``/**`` is (or,
        under ``ros2 launch``, the node's own name): what stands in the file further down would win.
        """
        for place in (_ARGUMENTS, node):
            if place not in self.keys:
                continue
            later = self.keys[self.keys.index(place) + 1 :]
            for setting in self.settings:
                name = setting.name
                wins = setting.key in later and matches(setting.key, node) and name in values
                if wins and setting.value != values[name]:
                    raise ConfigError(
                        f"{setting.key}.{name}: found {setting.written}, and {values[name]} given by name; "
                        f"expected one of the two (below the key {place} the file's would be in force)"
                    )


def matches(key: str, node: str) -> bool:
    """Whether ROS gives the node of that full name what stands under ``key``. ``*`` is one part of a name, ``**`` any
    number of them.
    """
    patterns = {"*": r"/\w+", "**": r"(/\w+)*"}
    parts = (patterns.get(part, f"/{re.escape(part)}") for part in key.lstrip("/").split("/"))
    return re.fullmatch("".join(parts), node) is not None


def value_of(text: str, *, quoted: bool = False) -> bool | int | float | str:
    """What ROS makes of a scalar of YAML."""
    if quoted:
        return text
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    if found := _INTEGER.fullmatch(text):
        sign, digits = found.groups()
        base = 16 if digits[:2] in ("0x", "0X") else 8 if digits[0] == "0" else 10
        if -(1 << 63) <= (integer := int(sign + digits, base)) < 1 << 63:
            return integer
    if _NUMBER.fullmatch(text):
        number = float(text)
        return number if abs(number) != float("inf") else text
    if found := _NOT_FINITE.fullmatch(text):
        return float("".join(found.groups()))
    return text


# --- what is refused ---


def _check_setting(setting: Setting, kind: str) -> None:
    where, meant = f"{setting.key}.{setting.name}", setting.key.rpartition("/")[2]
    spec = load_specs(kind).get(setting.name)
    if spec is None:
        # Under a pattern it may be meant for others: the node warns if nobody knows it.
        if "*" not in meant and not is_known(setting.name, kind):
            raise ConfigError(f"{where}: found a parameter that {kind} has not; see config/parameters.yaml")
    elif problem := _problem(spec, setting.value):
        raise ConfigError(f"{where}: found {_as_ros_reads(setting)}; expected {problem}")


def _problem(spec: ParameterSpec, value: Any) -> str:
    if spec.type == "double" and type(value) is int:
        value = float(value)
    return spec.allowed if spec.problem(value) else ""


def _as_ros_reads(setting: Setting) -> str:
    value = setting.value
    if isinstance(value, tuple):
        return f"{setting.written}, an empty list, which to ROS is no value" if not value else setting.written
    if isinstance(value, str):
        return f"{setting.written}, which ROS reads as a text"
    kind = {bool: "a bool", int: "an integer", float: "a double"}[type(value)]
    read = str(value).lower() if isinstance(value, bool) else str(value)
    return f"{setting.written}, which ROS reads as {kind}" + ("" if read == setting.written else f", {read}")


# --- the file ---

_Tree = Any  # a list of (name, tree) for a mapping, of (None, tree) for a list, or a scalar's event


def _document(path: Path) -> list[tuple[str, _Tree]]:
    """The mappings of all documents in the file, one after the other, as ROS takes them."""
    if not path.exists():
        raise ConfigError("found no such file, expected a ROS parameter file")
    if not path.is_file():
        raise ConfigError("found something else, expected a file")
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ConfigError(f"found more than {_MOST_BYTES} bytes, expected a ROS parameter file")
        events = yaml.parse(content, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        pairs: list[tuple[str, _Tree]] = []
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                tree = _tree(next(events), events, 0)
                if not (isinstance(tree, yaml.ScalarEvent) and not tree.value):  # nothing but comments
                    pairs += _mapping(tree, "the nodes' names")
        return pairs
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"found {' '.join(str(error).split())}, expected a ROS parameter file") from None


def _line(event: yaml.Event) -> int:
    assert event.start_mark is not None  # the parser knows where it read
    return event.start_mark.line + 1


def _tree(event: yaml.Event, events: Iterator[yaml.Event], depth: int) -> _Tree:
    if isinstance(event, yaml.AliasEvent):
        raise ConfigError(f"found an alias in line {_line(event)}, expected none: ROS does not read them")
    if isinstance(event, yaml.ScalarEvent):
        return event
    if depth == _MOST_DEPTH:
        raise ConfigError(f"found mappings in one another more than {_MOST_DEPTH} deep, expected a ROS parameter file")
    is_mapping = isinstance(event, yaml.MappingStartEvent)
    pairs: list[tuple[str | None, _Tree]] = []
    while not isinstance(event := next(events), yaml.MappingEndEvent | yaml.SequenceEndEvent):
        name = None
        if is_mapping:
            if not isinstance(event, yaml.ScalarEvent):
                raise ConfigError(f"found no name as key in line {_line(event)}, expected one")
            name, event = event.value, next(events)
            if any(name == other for other, _ in pairs):
                raise ConfigError(f"{name}: found twice (line {_line(event)}), expected each key once")
        pairs.append((name, _tree(event, events, depth + 1)))
    return pairs


def _mapping(tree: _Tree, of: str) -> list[tuple[str, _Tree]]:
    if not isinstance(tree, list) or any(name is None for name, _ in tree):
        raise ConfigError(f"found {_written(tree)}, expected a mapping with {of}")
    return tree


def _nodes(pairs: list[tuple[str, _Tree]], namespace: str) -> Iterator[tuple[str, list[tuple[str, _Tree]]]]:
    """Each node's key with its parameters; a name may be written in parts, ``left: {policy: ...}``."""
    for name, tree in pairs:
        key = f"{namespace}/{name.removeprefix('/')}"
        if name == PARAMETERS:
            raise ConfigError(f"found {PARAMETERS} without a node's name above it, expected one")
        with named(key):
            inner = _mapping(tree, PARAMETERS)
        parameters = [values for inner_name, values in inner if inner_name == PARAMETERS]
        for values in parameters:
            with named(f"{key}.{PARAMETERS}"):
                yield key, _mapping(values, "the parameters")
        yield from _nodes([pair for pair in inner if pair[0] != PARAMETERS], key)
        if not inner:
            raise ConfigError(f"{key}: found nothing, expected {PARAMETERS}")


def _settings(key: str, pairs: list[tuple[str, _Tree]], prefix: str) -> Iterator[Setting]:
    for name, tree in pairs:
        full_name = f"{prefix}{name}"
        if isinstance(tree, yaml.ScalarEvent):
            quoted = tree.style in _QUOTES or tree.tag == _TEXT_TAG
            yield Setting(key, full_name, value_of(tree.value, quoted=quoted), _written(tree))
        elif tree and tree[0][0] is not None:
            yield from _settings(key, tree, f"{full_name}.")
        else:
            yield Setting(key, full_name, tuple(_written(one) for _, one in tree), _written(tree))


def _written(tree: _Tree) -> str:
    """As it stands in the file, more or less, and short."""
    if isinstance(tree, yaml.ScalarEvent):
        text = shown(tree.value)
        return text if tree.style in _QUOTES else text[1:-1] or "nothing"
    if tree and tree[0][0] is not None:
        return f"a mapping ({', '.join(name for name, _ in tree[:3])}{', ...' if len(tree) > 3 else ''})"
    return f"[{', '.join(_written(one) for _, one in tree[:3])}{', ...' if len(tree) > 3 else ''}]"
