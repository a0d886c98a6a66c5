"""The aligner on another machine: network namespaces joined by veth pairs stand for the machines.

This file makes the namespaces; what happens between them is asserted in two_machines.py, which runs in the robot's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from node_testing import ROOT

LINK = f"sa{os.getpid()}"
"""How the names of the links begin."""


@dataclass(frozen=True)
class Machines:
    """Two namespaces, their addresses, and the workstation's end of the link towards the robot."""

    robot: str
    robot_address: str
    workstation: str
    workstation_address: str
    workstation_link: str

    @property
    def environment(self) -> dict[str, str]:
        """For two_machines.py."""
        return {
            "ROBOT_ADDRESS": self.robot_address,
            "WORKSTATION": self.workstation,
            "WORKSTATION_ADDRESS": self.workstation_address,
            "WORKSTATION_LINK": self.workstation_link,
        }


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def namespaces(*roles: str) -> Iterator[list[str]]:
    """One for each role, not joined yet. Skips where they cannot be made."""
    if shutil.which("ip") is None:
        pytest.skip("found no command ip (iproute2); needed to make network namespaces")
    names = [f"selfalign-{role}-{os.getpid()}" for role in roles]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted here (they take root): {error.stderr.strip()}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def join(one: tuple[str, str, str], other: tuple[str, str, str]) -> None:
    """Two namespaces by one link; each end is (namespace, name of the link there, address)."""
    (name, link, _), (peer, peer_link, _) = one, other
    ip("link", "add", link, "netns", name, "type", "veth", "peer", "name", peer_link, "netns", peer)
    for namespace, end, address in (one, other):
        ip("-n", namespace, "address", "add", f"{address}/24", "dev", end)
        ip("-n", namespace, "link", "set", end, "up")


@pytest.fixture
def machines() -> Iterator[Machines]:
    """On one network."""
    with namespaces("robot", "workstation") as (robot, workstation):
        found = Machines(robot, "10.77.0.1", workstation, "10.77.0.2", f"{LINK}w")
        join((robot, f"{LINK}r", found.robot_address), (workstation, f"{LINK}w", found.workstation_address))
        yield found


@pytest.fixture
def routed_machines() -> Iterator[Machines]:
    """On two networks, with a router between them, over which no multicast goes."""
    with namespaces("robot", "workstation", "router") as (robot, workstation, router):
        found = Machines(robot, "10.77.0.1", workstation, "10.78.0.1", f"{LINK}w")
        forward = "echo 1 > /proc/sys/net/ipv4/ip_forward"
        ip("netns", "exec", router, "sh", "-c", forward)
        for name, letter, address in ((robot, "r", found.robot_address), (workstation, "w", found.workstation_address)):
            gateway = address.removesuffix("1") + "254"
            join((name, f"{LINK}{letter}", address), (router, f"{LINK}{letter}x", gateway))
            ip("-n", name, "route", "add", "default", "via", gateway)
        yield found


def run_on_robot(machines: Machines, test: str, folder: Path) -> None:
    """A test of two_machines.py."""
    # With a /dev/shm of its own: shared memory reaches no other machine.
    run = ["ip", "netns", "exec", machines.robot, "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh"]
    pytest_run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={folder / 'robot'}"]
    done = subprocess.run(
        [*run, *pytest_run, f"{Path(__file__).with_name('two_machines.py')}::{test}"],
        cwd=ROOT,
        env=dict(os.environ) | machines.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
def test_the_aligner_works_from_another_machine_and_survives_a_cut_link(machines: Machines, tmp_path: Path) -> None:
    run_on_robot(machines, "test_tokens_cross_the_link_and_the_policy_outlives_it", tmp_path)


@pytest.mark.long
def test_the_aligner_is_found_where_no_multicast_reaches_it(routed_machines: Machines, tmp_path: Path) -> None:
    run_on_robot(routed_machines, "test_static_peers_find_each_other_over_a_router", tmp_path)
