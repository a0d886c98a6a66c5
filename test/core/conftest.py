"""What holds for every test of the core: one thread, and property tests that are the same in every run."""

from __future__ import annotations

import pytest
import torch
import toy_bodies
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # sums do not depend on the number of cores, and tests share them

settings.register_profile(
    "selfalign", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)  # no verdict depends on how fast the machine is
settings.load_profile("selfalign")


@pytest.fixture(scope="session")
def toy() -> toy_bodies.Trained:
    """A small policy trained for some seconds on eight bodies; tests that use it carry ``toy_bodies.TESTS``."""
    return toy_bodies.train()
