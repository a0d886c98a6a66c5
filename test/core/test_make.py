"""The variables of ``make`` are text: one word each for the command that gets them, whatever is in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXTS = (
    "my bag",
    "a;touch harm",
    "$(touch harm)",
    "$(shell touch harm)",
    "${shell touch harm}",
    "$$(touch harm)",
    "`touch harm`",
    'it\'s, "so" & so | < > * ? ~ ! \\ # %',
    "' ; touch harm ; '",
    "a)b(c",
)
SEEN_BY = {
    "BAG": ("record", "replay"),
    "DURATION": ("bringup", "record", "soak"),
    "REPORT": ("bringup", "replay"),
    "PARAMS": ("bringup", "record", "replay"),
    "AGAINST": ("replay",),
    "AGAINST_CHECKPOINT": ("replay",),
    "CONFIG": ("train",),
    "CHECKPOINT": (
        *("replay", "evaluate", "adaptation", "latency", "align-speed", "interference", "pipeline", "handover"),
    ),
}
# In the place of Python and tools/bootstrap.py: shows what it was called with, or runs the command in this environment.
SHOW = f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[2:]))\n"
RUN = f"#!{sys.executable}\nimport os, sys\nos.execv(sys.executable, [sys.executable, *sys.argv[4:]])\n"

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with nothing but the Makefile, where harm would show."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    return tmp_path


def make(folder: Path, *words: str, script: str = SHOW, **variables: str) -> subprocess.CompletedProcess[str]:
    (folder / "python").write_text(script)
    (folder / "python").chmod(0o755)
    inherited = ("ARGS", *SEEN_BY)  # where make runs the tests
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", *inherited))}
    paths = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        ["make", *words, f"PYTHON={folder / 'python'}"],
        cwd=folder, env=environment | {"PYTHONPATH": paths} | variables, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def assert_unharmed(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} <= {"Makefile", "python"}


@pytest.mark.parametrize("name", SEEN_BY)
def test_a_variable_reaches_its_command_as_one_word(folder: Path, name: str) -> None:
    for target in SEEN_BY[name]:
        for text in TEXTS:
            bag = [] if name == "BAG" else ["BAG=bag"]
            for given, variables in (([f"{name}={text.replace('$$', '$')}"], {}), ([], {name: text})):
                # On the command line and in the environment alike.
                shown = make(folder, target, *bag, *given, **variables)
                assert shown.returncode == 0, shown.stderr
                words = json.loads(shown.stdout)
                meant = given[0].partition("=")[2] if given else text
                assert meant in words or any(word.endswith(f"={meant}") for word in words), (target, words)
    assert_unharmed(folder)


def test_what_make_would_run_is_shown_in_quotes(folder: Path) -> None:
    shown = make(folder, "-n", "record", "BAG=my bag", "PARAMS=$(shell touch harm);x")
    assert "--output='my bag'" in shown.stdout and "--params='$(shell touch harm);x'" in shown.stdout
    assert_unharmed(folder)


def test_several_lines_are_refused(folder: Path) -> None:
    refused = make(folder, "replay", "BAG=a\ntouch harm")
    assert refused.returncode != 0 and "BAG: found several lines, expected one" in refused.stderr
    assert_unharmed(folder)


def test_help_shows_the_defaults_as_they_are(folder: Path) -> None:
    shown = make(folder, "help", "CONFIG=`touch harm`$(touch harm)")
    assert "(default: `touch harm`$(touch harm))" in shown.stdout and "(default: policies/tiny_reach)" in shown.stdout
    assert_unharmed(folder)


def test_a_checkpoint_is_replayed_only_if_it_was_given(folder: Path) -> None:
    assert "--checkpoint" not in make(folder, "replay", "BAG=bag").stdout
    assert "--checkpoint=my policy" in json.loads(make(folder, "replay", "BAG=bag", "CHECKPOINT=my policy").stdout)
    assert "--checkpoint=p" in json.loads(make(folder, "replay", "BAG=bag", CHECKPOINT="p").stdout)


def test_arguments_are_words_for_the_shell(folder: Path) -> None:
    words = json.loads(make(folder, "bringup", "ARGS=checkpoint:=tiny 'report:=my report.json'").stdout)
    assert words[-2:] == ["checkpoint:=tiny", "report:=my report.json"]


def test_a_configuration_that_is_none_is_named_with_its_blanks(folder: Path) -> None:
    for name in ("no such file", "no; touch harm", "$(touch harm) `touch harm`"):
        refused = make(folder, "train", f"CONFIG={name}", script=RUN)
        assert refused.returncode != 0 and name in refused.stderr, refused.stderr
    assert_unharmed(folder)
