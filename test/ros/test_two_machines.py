"""The aligner on another machine: two network namespaces joined by a veth pair stand for the machines.

This file makes the namespaces; what happens between them is asserted in two_machines.py, which runs in the robot's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from node_testing import ROOT


@dataclass(frozen=True)
class Machines:
    """Two namespaces and the workstation's end of the link between them."""

    robot: str
    workstation: str
    link: str

    @property
    def environment(self) -> dict[str, str]:
        """For two_machines.py."""
        return {"WORKSTATION": self.workstation, "WORKSTATION_LINK": self.link}


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def machines() -> Iterator[Machines]:
    """Two machines on one network. Skips where they cannot be made."""
    if shutil.which("ip") is None:
        pytest.skip("found no command ip (iproute2); needed to make network namespaces")
    number = os.getpid()
    robot, workstation = f"selfalign-robot-{number}", f"selfalign-workstation-{number}"
    links = f"sar{number}", f"saw{number}"
    try:
        for name in (robot, workstation):
            ip("netns", "add", name)
        ip("link", "add", links[0], "netns", robot, "type", "veth", "peer", "name", links[1], "netns", workstation)
        for host, (name, link) in enumerate(zip((robot, workstation), links, strict=True), 1):
            ip("-n", name, "address", "add", f"10.77.0.{host}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield Machines(robot, workstation, links[1])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted here (they take root): {error.stderr.strip()}")
    finally:
        for name in (robot, workstation):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.mark.long
def test_the_aligner_works_from_another_machine_and_survives_a_cut_link(machines: Machines, tmp_path: Path) -> None:
    # With a /dev/shm of its own: shared memory reaches no other machine.
    run = ["ip", "netns", "exec", machines.robot, "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh"]
    pytest_run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'robot'}"]
    done = subprocess.run(
        [*run, *pytest_run, str(Path(__file__).with_name("two_machines.py"))],
        cwd=ROOT,
        env=dict(os.environ) | machines.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
