"""What ``pip install .`` promises agrees with what the tests run with; its commands start where there is no ROS."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
NEEDS = [*PROJECT["dependencies"], *(need for needs in EXTRAS.values() for need in needs)]

WITHOUT_ROS = """
import importlib, importlib.abc, json, sys

class NoRos(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("rclpy", "selfalign", "ament_index_python", "launch"):
            raise ModuleNotFoundError(f"{name}: there is no ROS here")

sys.meta_path.insert(0, NoRos())
for command, target in json.loads(sys.argv[1]).items():
    module, _, function = target.partition(":")
    assert callable(getattr(importlib.import_module(module), function)), command
"""


def pins() -> dict[str, str]:
    """Name -> version of every package that is pinned."""
    lines = [line for path in ROOT.glob("requirements*.txt") for line in path.read_text(encoding="utf-8").splitlines()]
    pinned = [Requirement(line) for line in lines if re.match(r"[\w.-]+(\[[\w,]+\])?==", line)]
    return {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in pinned}


@pytest.mark.parametrize("need", NEEDS)
def test_what_the_tests_run_with_is_allowed(need: str) -> None:
    wanted, pinned = Requirement(need), pins()
    assert canonicalize_name(wanted.name) in pinned
    assert wanted.specifier.contains(pinned[canonicalize_name(wanted.name)])


def test_every_command_starts_without_ros() -> None:
    commands = json.dumps(PROJECT["scripts"])
    done = subprocess.run([sys.executable, "-c", WITHOUT_ROS, commands], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_versions_of_library_package_and_changelog_are_one() -> None:
    version = PROJECT["version"]
    assert f"<version>{version}</version>" in (ROOT / "package.xml").read_text(encoding="utf-8")
    assert re.search(rf"^{re.escape(version)} \(", (ROOT / "CHANGELOG.rst").read_text(encoding="utf-8"), re.M)
