"""What holds for every test: those that start ROS 2 nodes run one after the other.

With `pytest -n 2 --dist loadgroup` one worker takes all of them while the other runs the rest, so that no two
graphs share the cores. Knows nothing of any single test.
"""

from __future__ import annotations

from pathlib import Path

import pytest

GRAPH_DIRECTORIES = ("ros", "launch")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests in test/ros and test/launch, and puts them into one xdist group."""
    here = Path(__file__).parent
    for item in items:
        if item.path.relative_to(here).parts[0] in GRAPH_DIRECTORIES:
            item.add_marker(pytest.mark.ros)
            item.add_marker(pytest.mark.xdist_group("ros_graph"))
