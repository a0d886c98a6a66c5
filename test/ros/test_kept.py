"""What outlives the processes: a file that is damaged or forged is named and never used, a full disk stops nobody."""

from __future__ import annotations

import dataclasses
import gc
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from selfalign_core.alignment import AlignConfig, SelfAligner
from selfalign_core.policy import Policy
from selfalign_core.policy.token_files import save_e_token
from selfalign_core.robot.contract import RobotContract
from selfalign_core.robot.types import EToken
from selfalign_ros.life.kept import KeptFile, StopLatch
from selfalign_ros.life.resources import config_file, state_folder


@pytest.fixture(scope="module")
def contract() -> RobotContract:
    return RobotContract.from_yaml(config_file("contracts/sim_arm.yaml"))


@pytest.fixture(scope="module")
def policy(contract: RobotContract) -> Policy:
    return Policy.untrained(contract)


@pytest.fixture(scope="module")
def nodes(probe) -> Iterator[dict]:
    from selfalign_ros.nodes.aligner_node import AlignerNode
    from selfalign_ros.nodes.policy_node import PolicyNode

    nodes = {"policy": PolicyNode(), "aligner": AlignerNode()}
    yield nodes
    for name in list(nodes):
        node = nodes.pop(name)
        node.close()
        node.destroy_node()
    del node
    gc.collect()  # what they offer as managed nodes goes with the objects: no later test may see it


def save(path: Path, token: EToken) -> None:
    """A file that both nodes can read: the aligner's has the earlier tokens in its metadata."""
    save_e_token(path, token, extra={"history": "[]", "stamp_ns": "0"})


def changed(**changes) -> Callable[[Path, EToken], None]:
    def write(path: Path, token: EToken) -> None:
        save(path, dataclasses.replace(token, **changes))

    return write


def truncated(path: Path, token: EToken) -> None:
    save(path, token)
    path.write_bytes(path.read_bytes()[:-7])


def with_nan(path: Path, token: EToken) -> None:
    data = token.data.copy()
    data.flat[3] = np.nan
    save(path, dataclasses.replace(token, data=data))


def too_large(path: Path, token: EToken) -> None:
    save(path, dataclasses.replace(token, data=np.full_like(token.data, 1e4)))


FORGED = {
    "truncated": (truncated, "expected an E-Token file"),
    "no token": (lambda path, token: path.write_bytes(b"\x80\x04not a token"), "expected an E-Token file"),
    "another model's": (changed(model_digest="0" * 64), "found a token of model '000000000000'"),
    "another robot's": (changed(embodiment="other_arm"), "'other_arm'"),
    "NaN": (with_nan, "NaN"),
    "another shape": (changed(data=np.zeros((2, 3), np.float32)), "shape (2, 3)"),
    "too large": (too_large, "norm"),
}


@pytest.mark.parametrize("fault", FORGED)
@pytest.mark.parametrize("reader", ["policy", "aligner"])
def test_a_forged_file_is_named_never_used_and_left_in_place(
    nodes, policy: Policy, contract: RobotContract, tmp_path: Path, reader: str, fault: str
) -> None:
    write, words = FORGED[fault]
    path = tmp_path / "token.safetensors"
    token = EToken(policy.e_token.data + 0.25, 7, contract.embodiment, policy.digest)
    write(path, token)
    content = path.read_bytes()
    kept, node = KeptFile(path), nodes[reader]
    node.contract = contract
    if reader == "policy":
        assert kept.read(lambda path: node.token.read(path, policy, 4.0)) is None
    else:
        node._kept, aligner = kept, SelfAligner(policy, AlignConfig(), joints=contract.joint_names)
        own = aligner.token
        aligner.use(EToken(own.data, 0, contract.embodiment, own.model_digest), 0)
        node._restore(aligner, 4.0)
        assert aligner.token.version == 0
        np.testing.assert_array_equal(aligner.token.data, own.data)
    assert str(path) in kept.problem and words in kept.problem
    assert path.read_bytes() == content
    kept.write(lambda path: save(path, token))  # the next commit keeps the evidence
    assert path.with_name("token.safetensors.refused").read_bytes() == content and not kept.problem


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_a_problem_in_words_and_leaves_the_last_good_file(policy: Policy, small_disk: Path) -> None:
    kept = KeptFile(small_disk / "token.safetensors")
    kept.write(lambda path: save_e_token(path, policy.e_token))
    good = kept.path.read_bytes()
    (small_disk / "filler").write_bytes(bytes(16384 - 4096))
    large = dataclasses.replace(policy.e_token, data=np.zeros((64, 256), np.float32))
    kept.write(lambda path: save_e_token(path, large))
    assert "not saved" in kept.problem and "No space left" in kept.problem
    assert kept.path.read_bytes() == good and len(list(small_disk.iterdir())) == 2
    (small_disk / "filler").unlink()
    kept.write(lambda path: save_e_token(path, policy.e_token))
    assert not kept.problem


def test_a_stop_is_kept_over_a_restart_and_a_disk_that_cannot_keep_it_stops_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "arm" / "arm.stopped"
    latch = StopLatch(path)
    assert not latch.reason
    latch.set()
    assert "stopped by ~/stop" in latch.reason and str(path) in StopLatch(path).reason
    latch.clear()
    assert not latch.reason and not StopLatch(path).reason
    nowhere = StopLatch(Path("/dev/null/arm.stopped"))
    with pytest.raises(OSError, match="/dev/null"):
        nowhere.set()
    assert nowhere.reason


def test_the_folder_follows_ros_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROS_HOME", "/somewhere")
    assert state_folder("~/.ros/selfalign") == Path("/somewhere/selfalign")
    assert state_folder("~/mine") == Path.home() / "mine"
    assert state_folder("") is None
    monkeypatch.delenv("ROS_HOME")
    assert state_folder("~/.ros/selfalign") == Path.home() / ".ros" / "selfalign"
