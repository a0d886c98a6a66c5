"""Where the package's own files are, from a source checkout and from an installed package alike."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from selfalign_core.errors import ConfigError
from selfalign_core.policy.untrained import is_untrained


@cache
def package_folder() -> Path:
    """The folder that holds ``config`` and ``policies``: that of the source if there is one, else the package's share
    folder.

    Raises ``ConfigError`` if there is neither, as after ``pip install`` alone.
    """
    source = Path(__file__).resolve().parents[2]
    if (source / "config").is_dir():
        return source
    try:
        from ament_index_python.packages import get_package_share_directory

        return Path(get_package_share_directory("selfalign"))
    except (ImportError, LookupError, OSError) as error:
        raise ConfigError(
            f"found no ROS 2 package selfalign ({error}); expected one: colcon build --packages-select selfalign in a "
            "workspace, then source its setup file (pip install gives the library alone, without config and policies)"
        ) from error


def config_folder() -> Path:
    """The package's ``config`` folder."""
    return package_folder() / "config"


def config_file(name: str) -> Path:
    """A file by absolute path, relative to the working directory, or relative to the package's ``config``
    folder.

    Raises ``ConfigError`` naming both places when it is in neither.
    """
    candidates = [Path(name), config_folder() / name]
    for path in candidates:
        if path.is_file():
            return path
    places = " nor ".join(str(path) for path in candidates)
    raise ConfigError(f"file {name!r}: found neither {places}; expected one of them to exist")


def checkpoint_folder(name: str) -> str:
    """A checkpoint folder by absolute path, relative to the working directory, or relative to the package's folder;
    ``""`` and ``"tiny"``, the model with random weights, as they are.

    Raises ``ConfigError`` naming both places when it is in neither.
    """
    if is_untrained(name):
        return name
    candidates = [Path(name), package_folder() / name]
    for path in candidates:
        if path.is_dir():
            return str(path)
    places = " nor ".join(str(path) for path in dict.fromkeys(candidates))
    raise ConfigError(
        f"checkpoint {name!r}: found neither {places}; expected one of them to be a folder, or 'tiny' for the "
        "untrained model"
    )


STATE_FOLDER = "~/.ros/selfalign"
"""What ``token_folder`` is by default. A stop is kept there in any case."""


def state_folder(name: str) -> Path | None:
    """The folder of a parameter ``token_folder``, None for ``""``. A leading ``~/.ros`` is ``$ROS_HOME`` if set."""
    if not name:
        return None
    path = Path(name)
    ros_home = os.environ.get("ROS_HOME")
    if ros_home and path.parts[:2] == ("~", ".ros"):
        return Path(ros_home, *path.parts[2:])
    return path.expanduser()
