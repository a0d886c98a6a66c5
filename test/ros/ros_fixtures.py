"""The fixtures of test/ros and test/launch: a domain of their own, a listening probe, a graph of nodes, a bag."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from graph_assertions import record_bag, write_quick_parameters
from node_testing import NodeGraph, Probe, reserve_domain


@pytest.fixture(scope="session")
def ros_domain() -> Iterator[int]:
    """A ROS domain of this test process's own, limited to this machine."""
    lock = reserve_domain()
    yield int(os.environ["ROS_DOMAIN_ID"])
    lock.close()


@pytest.fixture(scope="module")
def probe(ros_domain: int) -> Iterator[Probe]:
    probe = Probe()
    yield probe
    probe.close()


@pytest.fixture(scope="module")
def graph(ros_domain: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeGraph]:
    graph = NodeGraph(tmp_path_factory.mktemp("nodes"))
    yield graph
    graph.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for one module's recording and its replays."""
    return tmp_path_factory.mktemp("graph")


@pytest.fixture(scope="module")
def parameters(folder: Path) -> Path:
    return write_quick_parameters(folder)


@pytest.fixture(scope="module")
def recording(probe: Probe, folder: Path, parameters: Path) -> Path:
    """A bag of a real run, long enough for attempts to align."""
    return record_bag(probe, folder, parameters)
