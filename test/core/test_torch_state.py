"""Two models in one process, each in its own thread: neither sees what the other does to torch's process-wide state."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from selfalign_core.errors import ConfigError
from selfalign_core.model.torch_state import check_device, seeded, use_stream, use_threads
from selfalign_core.policy import Policy
from selfalign_core.robot.contract import RobotContract

CONTRACT = Path(__file__).parents[2] / "config" / "contracts" / "sim_reach.yaml"


def side_by_side(*jobs: Callable[[], object]) -> list[object]:
    """What the jobs return that begin at the same time in threads of their own."""
    barrier = threading.Barrier(len(jobs))

    def begin(job: Callable[[], object]) -> object:
        barrier.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(begin, job) for job in jobs]]


def test_each_thread_keeps_its_number_of_threads() -> None:
    set_by_all = threading.Barrier(2)

    def work(count: int) -> int:
        use_threads(count)
        set_by_all.wait()
        torch.ones(4) @ torch.ones(4)
        return torch.get_num_threads()

    before = torch.get_num_threads()
    assert side_by_side(lambda: work(3), lambda: work(2)) == [3, 2]
    use_threads(before)


def test_models_built_at_the_same_time_have_the_weights_of_one_built_alone() -> None:
    contract = RobotContract.from_yaml(CONTRACT)
    alone = Policy.load("tiny", contract=contract).digest
    state = torch.get_rng_state()
    digests = side_by_side(*[lambda: Policy.load("tiny", contract=contract).digest] * 4)
    assert digests == [alone] * 4
    assert torch.equal(torch.get_rng_state(), state)  # and whoever draws afterwards draws what it would have


def test_seeds_do_not_mix() -> None:
    def draw() -> list[float]:
        with seeded(7):
            return [float(torch.rand(())) for _ in range(2000)]

    first, second = side_by_side(draw, draw)
    assert first == second == draw()


@pytest.mark.parametrize("name", ["gpu", f"cuda:{torch.cuda.device_count()}"])
def test_a_device_that_cannot_be_had_is_named(name: str) -> None:
    for refused in (check_device, lambda device: use_stream(device, urgent=True)):
        with pytest.raises(ConfigError, match=rf"device: found '{name}'.*expected cpu"):
            refused(name)
    check_device("cpu")
