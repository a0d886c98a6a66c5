"""What holds for every test of the core: one thread, and property tests that are the same in every run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    import toy_bodies

torch.set_num_threads(1)  # sums do not depend on the number of cores, and tests share them

settings.register_profile(
    "selfalign", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)  # no verdict depends on how fast the machine is
settings.load_profile("selfalign")


@pytest.fixture(scope="session")
def toy() -> toy_bodies.Trained:
    """A small policy trained for some seconds on eight bodies."""
    import toy_bodies  # imports the model, which most test files do without

    return toy_bodies.train()
