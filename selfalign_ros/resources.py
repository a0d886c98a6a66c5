"""Where the package's own files are, from a source checkout and from an installed package alike."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from selfalign_core.errors import ConfigError


@cache
def config_folder() -> Path:
    """The package's ``config`` folder: beside the source if there is one, else in the package's share
    folder.
    """
    beside_source = Path(__file__).resolve().parents[1] / "config"
    if beside_source.is_dir():
        return beside_source
    from ament_index_python.packages import get_package_share_directory

    return Path(get_package_share_directory("selfalign")) / "config"


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
