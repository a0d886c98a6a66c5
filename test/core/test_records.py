"""The one strict reader: what fits arrives typed, what does not is named by its path, whatever the file holds."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from selfalign_core.errors import CheckpointError, ConfigError, SelfAlignError
from selfalign_core.records import (
    Count,
    Fraction,
    Only,
    Positive,
    Range,
    Record,
    load,
    parse_json,
    parse_yaml,
    plain,
    read,
    shown,
)


class OfJoint(SelfAlignError):
    pass


@dataclass(frozen=True)
class Joint(Record):
    error = OfJoint
    name: Annotated[str, Only(str.isidentifier, "a name")]
    unit: Literal["rad", "m"]
    speed: Annotated[float, Range(above=0, unit="{unit}/s")]
    limits: tuple[float, float] = (-1.0, 1.0)
    gain: Annotated[float, Range(0.5, 2)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect(self.limits[0] < self.limits[1], "limits", "the lower one first")


@dataclass(frozen=True)
class Robot(Record):
    joints: Annotated[tuple[Joint, ...], Only(len, "a non-empty list")]
    rates: dict[Literal["fast", "slow"], Positive] = field(default_factory=dict)
    count: Count = 1
    share: Fraction = 0.5
    moving: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Theirs(Record):
    foreign = True
    rate: Positive


GOOD: dict[str, Any] = {"joints": [{"name": "pan", "unit": "rad", "speed": 2}], "rates": {"fast": 3}}


def changed(path: str, value: Any) -> dict[str, Any]:
    values = json.loads(json.dumps(GOOD))
    target: Any = values
    *keys, last = path.split(".")
    for key in keys:
        target = target[int(key) if key.isdigit() else key]
    target[last] = value
    return values


def test_what_fits_arrives_typed_and_survives_as_plain_data() -> None:
    robot = read(Robot, GOOD)
    assert robot.joints == (Joint("pan", "rad", 2.0),) and robot.rates == {"fast": 3.0}
    assert isinstance(robot.joints[0].speed, float) and isinstance(robot.rates["fast"], float)
    assert read(Robot, json.loads(json.dumps(plain(robot)))) == robot
    assert read(Robot, yaml.safe_load(yaml.safe_dump(plain(robot)))) == robot
    assert Joint("pan", "m", np.float32(0.5), [0, np.int64(3)]) == Joint("pan", "m", 0.5, (0.0, 3.0))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("joints.0.name", "a b", "joints[0].name: found 'a b', expected a name"),
        ("joints.0.unit", "deg", "joints[0].unit: found 'deg', expected one of rad, m"),
        ("joints.0.speed", 0, "joints[0].speed: found 0, expected a number above 0 in rad/s"),
        ("joints.0.speed", True, "joints[0].speed: found True, expected a number above 0 in rad/s"),
        ("joints.0.speed", float("nan"), "joints[0].speed: found nan, expected a finite number above 0 in rad/s"),
        ("joints.0.speed", 10**400, "expected a number above 0 in rad/s"),
        ("joints.0.limits", [1], "joints[0].limits: found [1], expected a list of 2, each a number"),
        ("joints.0.limits", [0, "x"], "joints[0].limits[1]: found 'x', expected a number"),
        ("joints.0.limits", [2, 1], "joints[0].limits: found (2.0, 1.0), expected the lower one first"),
        ("joints.0.gain", 3, "joints[0].gain: found 3, expected a number in [0.5, 2] or null"),
        ("joints.0.sped", 3, "joints[0].sped: found an unknown key (3), expected one of name, unit, speed, limits"),
        ("joints", [], "joints: found [], expected a non-empty list"),
        ("joints", None, "joints: found None, expected a non-empty list"),
        ("joints", [3], "joints[0]: found 3, expected a mapping with the keys name, unit"),
        ("joints", [{}], "joints[0].name: found nothing, expected a name"),
        ("rates.medium", 3, "rates.medium: found an unknown key, expected one of fast, slow"),
        ("rates.fast", -3, "rates.fast: found -3, expected a number above 0"),
        ("count", 1.0, "count: found 1.0, expected an integer of at least 1"),
        ("share", 1, "share: found 1, expected a number in [0, 1)"),
        ("moving", "yes", "moving: found 'yes', expected true or false"),
    ],
)
def test_what_does_not_fit_is_named_by_its_path(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(Robot, changed(path, value))
    assert message in str(caught.value)


def test_a_record_made_by_hand_names_its_class_and_raises_its_own_error() -> None:
    with pytest.raises(OfJoint, match=r"^Joint\.speed: found -1, expected a number above 0 in m/s$"):
        Joint("slide", "m", -1)
    with pytest.raises(OfJoint, match=r"^Joint\.limits: found \(1\.0, 0\.0\), expected the lower one first$"):
        Joint("slide", "m", 1, (1, 0))


def test_a_format_is_asked_for_by_name() -> None:
    assert read(Robot, {**GOOD, "format": "robot-2"}, formats=("robot-1", "robot-2")) == read(Robot, GOOD)
    for values in (GOOD, {**GOOD, "format": "robot-3"}):
        with pytest.raises(ConfigError, match=r"format: found (None|'robot-3'), expected 'robot-1' or 'robot-2'"):
            read(Robot, values, formats=("robot-1", "robot-2"))


def test_other_peoples_keys_are_left_alone_and_ours_are_checked() -> None:
    assert read(Theirs, {"rate": 3, "what": ["ever"]}) == Theirs(3.0)
    with pytest.raises(ConfigError, match="rate: found nothing, expected a number above 0"):
        read(Theirs, {"what": 1})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "count: 1\ncount: 2\n", "count: found twice (line 2), expected each key once"),
        ("a.yaml", "joints: [{name: a, name: b}]", "name: found twice (line 1)"),
        ("a.json", '{"count": 1, "count": 2}', "count: found twice, expected each key once"),
        ("a.yaml", "{", "found invalid YAML ("),
        ("a.yaml", "at: 2026-99-99", "found invalid YAML (month must be in 1..12), expected a robot"),
        ("a.yaml", "[1]: 2\n", "unhashable key"),
        ("a.yaml", "!!python/object/apply:os.system ['true']", "found invalid YAML ("),
        ("a.yaml", "[" * 5000, "found invalid YAML ("),
        ("a.json", "[" * 100_000, "found invalid JSON ("),
        ("a.json", "{", "found invalid JSON ("),
        ("a.yaml", "", "found None, expected a mapping with the keys joints"),
        ("a.yaml", "about: &a [*a]\n", "joints: found nothing"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(CheckpointError) as caught:
        load(Robot, file, "a robot", error=CheckpointError)
    assert str(caught.value).startswith(f"{file}: ") and message in str(caught.value)


def test_a_file_that_is_not_there_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: found no such file, expected a robot"):
        load(Robot, tmp_path / "nothing.yaml", "a robot")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"bytes\.yaml: found an unreadable file \(.*\), expected a robot"):
        load(Robot, tmp_path / "bytes.yaml", "a robot")


def test_numbers_are_those_of_yaml_1_2_and_words_stay_words() -> None:
    assert parse_yaml("[1e-3, 2E5, .5e1, 1e, e3]", "") == [1e-3, 2e5, 5.0, "1e", "e3"]


def test_what_is_shown_is_short_however_much_there_is() -> None:
    doubled: list[Any] = []
    for _ in range(200):
        doubled = [doubled, doubled]
    for value in ("x" * 10**6, list(range(10**5)), doubled, dict.fromkeys(range(1000), "y" * 1000)):
        assert len(shown(value)) <= 80


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(("joints", "name", "unit", "speed", "limits", "rates", "fast", "count", "x")), inner
        )
    ),
    max_leaves=8,
)


@given(anything)
def test_whatever_the_values_are_it_is_a_record_or_a_refusal(values: Any) -> None:
    refused = None
    try:
        robot = read(Robot, values)
    except ConfigError as error:
        refused = error
    if refused is not None:
        assert len(str(refused)) < 400
    else:
        assert read(Robot, plain(robot)) == robot


@given(st.text(alphabet="{}[]:,- \n&*!|>'\"#?%@a1.e", max_size=40))
def test_whatever_the_text_is_it_is_a_document_or_a_refusal(text: str) -> None:
    for parse in (parse_yaml, parse_json):
        with contextlib.suppress(ConfigError):
            parse(text, "a robot")
