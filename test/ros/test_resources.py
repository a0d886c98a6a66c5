"""Where the nodes look for a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from selfalign_core.errors import ConfigError
from selfalign_ros.life import resources
from selfalign_ros.life.resources import checkpoint_folder, package_folder


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A working directory and a package's folder."""
    here, package = tmp_path / "here", tmp_path / "package"
    here.mkdir()
    (package / "policies" / "shipped").mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setattr(resources, "package_folder", lambda: package)
    return here, package


@pytest.mark.parametrize("name", ["", "tiny"])
def test_the_untrained_model_is_no_folder(name: str) -> None:
    assert checkpoint_folder(name) == name


def test_a_shipped_policy_is_found_from_anywhere(places: tuple[Path, Path]) -> None:
    assert checkpoint_folder("policies/shipped") == str(places[1] / "policies" / "shipped")


def test_the_working_directory_comes_first(places: tuple[Path, Path]) -> None:
    own = places[0] / "policies" / "shipped"
    own.mkdir(parents=True)
    assert Path(checkpoint_folder("policies/shipped")).resolve() == own
    assert checkpoint_folder(str(own)) == str(own)


def test_both_places_are_named_when_it_is_in_neither(places: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError) as raised:
        checkpoint_folder("policies/other")
    for part in ("checkpoint 'policies/other'", f"nor {places[1] / 'policies/other'}", "'tiny'"):
        assert part in str(raised.value)


def test_a_library_without_its_ros_package_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "__file__", str(tmp_path / "site" / "selfalign_ros" / "life" / "resources.py"))
    monkeypatch.setenv("AMENT_PREFIX_PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"found no ROS 2 package selfalign .*; expected one: colcon build"):
        package_folder.__wrapped__()
