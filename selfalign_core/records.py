"""One strict reader for every record: YAML files, JSON files, configurations, parameters.

A record is a frozen dataclass whose annotations say all about its fields: the type and, with ``Annotated``, what else
holds (:class:`Range`, :class:`Only`). What does not fit is refused with the place, what was found there and what was
expected. Knows nothing of what the records are for.
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import re
import reprlib
import types
import typing
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
import yaml

from selfalign_core.errors import ConfigError, SelfAlignError

R = TypeVar("R", bound="Record")
Refusal = type[SelfAlignError]

# ------------------------------------------------------------------------------------------------ what a field may be


@dataclass(frozen=True)
class Range:
    """Of a number: ``least`` and ``most`` are allowed, ``above`` and ``below`` are not.

    ``unit`` may name fields beside this one, as in ``"{unit}/s"``.
    """

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    unit: str = ""

    def valid(self, value: float) -> bool:
        return self.least <= value <= self.most and self.above < value < self.below

    def words(self, noun: str) -> str:
        low, high = max(self.least, self.above), min(self.most, self.below)
        if math.isfinite(low) and math.isfinite(high):
            ends = "(" if low == self.above else "[", ")" if high == self.below else "]"
            return f"{noun} in {ends[0]}{low:g}, {high:g}{ends[1]} {self.unit}".rstrip()
        if math.isfinite(low):
            noun += f" {'above' if low == self.above else 'of at least'} {low:g}"
        return f"{noun} in {self.unit}" if self.unit else noun


@dataclass(frozen=True)
class Only:
    """Of any value: a condition, and in words what it asks for."""

    condition: Callable[[Any], object]
    expected: str

    def valid(self, value: Any) -> bool:
        return bool(self.condition(value))

    def words(self, noun: str) -> str:
        return self.expected


def setting(default: Any, range: tuple[float, float] | None, text: str, unit: str = "") -> Any:
    """A field that a person may choose: out of ``range`` (both ends included), with ``text`` to explain it."""
    return dataclasses.field(default=default, metadata={"range": range, "text": text, "unit": unit})


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, below=1)]


class Record:
    """Base of a frozen dataclass that checks itself. A list becomes a tuple, an integer where a number belongs a float.

    ``error``: what is raised, naming class and field, what was found and what was expected. ``foreign``: a record of
    somebody else's file, whose other keys are left alone.
    """

    error: ClassVar[Refusal] = ConfigError
    foreign: ClassVar[bool] = False
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]  # of the dataclass that a record is

    def __post_init__(self) -> None:
        values = dict(vars(self))
        for name, hint in hints_of(type(self)).items():
            try:
                object.__setattr__(self, name, _parse(hint, values[name], f"{type(self).__name__}.{name}", values))
            except _Misfit as misfit:
                raise self.error(str(misfit)) from None

    def expect(self, condition: object, name: str, expected: str, found: object = None) -> None:
        """Refuse the field ``name`` unless ``condition`` holds. ``found``: its value, unless given in words."""
        if not condition:
            found = shown(getattr(self, name)) if found is None else found
            raise self.error(f"{type(self).__name__}.{name}: found {found}, expected {expected}")


_HINTS: dict[type[Record], dict[str, Any]] = {}


def hints_of(kind: type[Record]) -> dict[str, Any]:
    """The annotations of a record's fields, by name."""
    if kind not in _HINTS:
        hints = typing.get_type_hints(kind, include_extras=True)
        _HINTS[kind] = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    return _HINTS[kind]


def plain(value: Any) -> Any:
    """Records and tuples as the dicts and lists that YAML and JSON have."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


# ------------------------------------------------------------------------------------------------ reading


def read(kind: type[R], values: Any, where: str = "", *, formats: tuple[str, ...] = ()) -> R:
    """The record ``kind`` out of what YAML or JSON say. Inverse of :func:`plain`.

    Args:
        where: the values are, for errors.
        formats: what the key ``format`` may say, where there is one.

    Raises:
        kind.error: naming the key by its path, what was found and what was expected.
    """
    try:
        if formats and isinstance(values, Mapping):
            if values.get("format") not in formats:
                raise _Misfit.at(_path(where, "format"), values.get("format"), " or ".join(map(repr, formats)))
            values = {key: value for key, value in values.items() if key != "format"}
        return _parse_record(kind, values, where)
    except _Misfit as misfit:
        raise kind.error(str(misfit)) from None


def load(
    kind: type[R], path: str | Path, expected: str, *, error: Refusal = ConfigError, formats: tuple[str, ...] = ()
) -> R:
    """The record ``kind`` in a YAML or JSON file, which holds ``expected``. See :func:`read`."""
    values = load_document(path, expected, error=error)
    with named(path, error):
        return read(kind, values, formats=formats)


def load_document(path: str | Path, expected: str, *, error: Refusal = ConfigError) -> Any:
    """What a YAML file, or by its name a JSON file, says. A key that is there twice is refused."""
    path = Path(path)
    with named(path, error):
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            raise _Misfit(f"found no such file, expected {expected}") from None
        except (OSError, UnicodeDecodeError) as failure:
            raise _Misfit(f"found an unreadable file ({failure}), expected {expected}") from None
        return parse_json(text, expected) if path.suffix == ".json" else parse_yaml(text, expected)


def parse_yaml(text: str, expected: str) -> Any:
    """Raises ``ConfigError``: invalid, or a key that is there twice."""
    return _parsed("YAML", lambda: yaml.load(text, _Loader), expected)


def parse_json(text: str, expected: str) -> Any:
    """Raises ``ConfigError``: invalid, or a key that is there twice."""
    return _parsed("JSON", lambda: json.loads(text, object_pairs_hook=_unique), expected)


@contextmanager
def named(where: object, error: Refusal = ConfigError) -> Iterator[None]:
    """Turns an error of the core into an ``error`` that says ``where``."""
    try:
        yield
    except SelfAlignError as found:
        raise error(f"{where}: {found}") from found.__cause__


def shown(value: object) -> str:
    """``value`` for an error: short, however long it is."""
    text = _SHORT.repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


# ------------------------------------------------------------------------------------------------ how

_SHOWN = 80
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, _SHOWN, _SHOWN
_NOUNS = {int: "an integer", float: "a number", bool: "true or false", str: "a string", tuple: "a list"}


class _Misfit(ConfigError):
    """A value that does not fit; the message has it all."""

    @classmethod
    def at(cls, where: str, value: object, expected: str) -> _Misfit:
        return cls(f"{where and f'{where}: '}found {shown(value)}, expected {expected}")


class _Loader(yaml.SafeLoader):
    """YAML where a key counts once and ``1e-3`` is a number (YAML 1.2), not a string."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                break  # refused below, with its line
            if key in seen:
                raise _Misfit(f"{key}: found twice (line {key_node.start_mark.line + 1}), expected each key once")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise _Misfit(f"{key}: found twice, expected each key once")
        values[key] = value
    return values


def _parsed(language: str, parse: Callable[[], Any], expected: str) -> Any:
    try:
        return parse()
    except SelfAlignError:
        raise
    # Besides its own errors PyYAML lets those of numbers, dates and depth through.
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as failure:
        reason = " ".join(str(failure).split())
        raise _Misfit(f"found invalid {language} ({reason}), expected {expected}") from None


def _path(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _parse_record(kind: type[R], values: Any, where: str) -> R:
    if isinstance(values, kind):
        return values
    if not isinstance(values, Mapping):
        raise _Misfit.at(where, values, _words(kind))
    hints = hints_of(kind)
    for key in values:
        if key not in hints and not kind.foreign:
            found = f"an unknown key ({shown(values[key])})"
            raise _Misfit(f"{_path(where, key)}: found {found}, expected one of {', '.join(hints)}")
    for field in dataclasses.fields(kind):
        has_default = not (field.default is field.default_factory is dataclasses.MISSING)
        if field.name not in values and not has_default:
            raise _Misfit(f"{_path(where, field.name)}: found nothing, expected {_words(hints[field.name], values)}")
    parsed = {n: _parse(hint, values[n], _path(where, n), values) for n, hint in hints.items() if n in values}
    try:
        return kind(**parsed)
    except SelfAlignError as error:  # a key's path says more than the name of its class
        raise _Misfit(_path(where, str(error).removeprefix(f"{kind.__name__}."))) from None


def _parse(hint: Any, value: Any, where: str, beside: Mapping[str, Any], whole: Any = None) -> Any:
    """``value`` as ``hint`` says, which is part of ``whole``; ``beside``: the fields of the same record."""
    if type(value) is hint and hint is not float:
        return value
    origin, of, rules = _parts(hint)
    whole = hint if whole is None else whole

    def misfit() -> _Misfit:
        expected = _words(whole, beside)
        if isinstance(value, float) and not math.isfinite(value):
            expected = expected.replace("a number", "a finite number")
        return _Misfit.at(where, value, expected)

    if origin is Annotated:
        parsed = _parse(of[0], value, where, beside, whole)
        if not all(rule.valid(parsed) for rule in rules):
            raise misfit()
        return parsed
    if origin in (typing.Union, types.UnionType):
        (kind,) = (kind for kind in of if kind is not types.NoneType)
        return None if value is None else _parse(kind, value, where, beside, whole)
    if origin is tuple:
        if not isinstance(value, list | tuple) or (of[-1] is not Ellipsis and len(value) != len(of)):
            raise misfit()
        kinds = [of[0]] * len(value) if of[-1] is Ellipsis else of
        return tuple(_parse(kinds[i], one, f"{where}[{i}]", beside) for i, one in enumerate(value))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise misfit()
        for key in value:
            if not _fits(of[0], key):
                raise _Misfit(f"{_path(where, key)}: found an unknown key, expected {_words(of[0])}")
        return {key: _parse(of[1], one, _path(where, key), beside) for key, one in value.items()}
    if isinstance(hint, type) and issubclass(hint, Record):
        return _parse_record(hint, value, where)
    if not _fits(hint, value):
        raise misfit()
    return {int: int, float: float, bool: bool}.get(hint, lambda same: same)(value)


def _fits(hint: Any, value: Any) -> bool:
    origin, of, _ = _parts(hint)
    if origin is Literal:
        return any(type(value) is type(allowed) and value == allowed for allowed in of)
    if isinstance(value, bool | np.bool_):
        return hint in (bool, Any)
    if hint is float:
        return isinstance(value, numbers.Real) and _is_finite(value)
    return hint is Any or isinstance(value, numbers.Integral if hint is int else hint)


def _is_finite(number: numbers.Real) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer that no float holds
        return False


@cache
def _parts(hint: Any) -> tuple[Any, tuple[Any, ...], tuple[Range | Only, ...]]:
    """What a hint is made of: its origin, its arguments, and what holds besides."""
    of = typing.get_args(hint)
    return typing.get_origin(hint), of, tuple(rule for rule in of if isinstance(rule, Range | Only))


class _Named(dict[str, Any]):
    """Values by name for ``str.format_map``; one that is missing stands for itself."""

    def __missing__(self, name: str) -> str:
        return name


def _words(hint: Any, beside: Mapping[str, Any] | None = None) -> str:
    """What ``hint`` allows, in words."""
    origin, of, rules = _parts(hint)
    if origin is Annotated:
        text = _words(of[0], beside)
        for rule in rules:
            text = rule.words(text)
        return text.format_map(_Named(beside or {}))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if kind is types.NoneType else _words(kind, beside) for kind in of)
    if origin is Literal:
        return f"one of {', '.join(map(str, of))}"
    if origin is tuple and of[-1] is not Ellipsis:
        return f"a list of {len(of)}, each {_words(of[0], beside)}"
    if isinstance(hint, type) and issubclass(hint, Record):
        return f"a mapping with the keys {', '.join(hints_of(hint))}"
    return _NOUNS.get(origin or hint, "a mapping" if origin in (dict, Mapping) else "a value")
