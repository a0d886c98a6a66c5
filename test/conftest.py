"""What holds for every test: those that start ROS 2 nodes are marked, so that they can run one after the other.

`make test` runs the others side by side first. What nodes keep over a restart stays out of the user's home. Knows
nothing of any single test.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

GRAPH_DIRECTORIES = ("ros", "launch")


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests in test/ros and test/launch."""
    here = Path(__file__).parent
    for item in items:
        if item.path.relative_to(here).parts[0] in GRAPH_DIRECTORIES:
            item.add_marker(pytest.mark.ros)


@pytest.fixture(scope="session", autouse=True)
def ros_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where nodes keep what survives a restart."""
    os.environ["ROS_HOME"] = str(tmp_path_factory.mktemp("ros_home"))
