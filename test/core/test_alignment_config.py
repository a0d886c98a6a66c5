"""Bad settings are named."""

from __future__ import annotations

import math

import pytest

from selfalign_core.alignment.config import AlignConfig, Collect, Guard, Identify, Refine, Watch
from selfalign_core.errors import ConfigError


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AlignConfig(mode="clever"), "AlignConfig.mode: found 'clever'"),
        (lambda: AlignConfig(lambda_dyn=-0.1), "AlignConfig.lambda_dyn: found -0.1"),
        (lambda: AlignConfig(lambda_perc=0, lambda_dyn=0, lambda_inv=0), "found all 0"),
        (lambda: AlignConfig(keep=0), "AlignConfig.keep: found 0"),
        (lambda: Collect(fit_count=1), "Collect.fit_count: found 1"),
        (lambda: Collect(stride=0), "Collect.stride: found 0"),
        (lambda: Collect(min_command=math.nan), "Collect.min_command: found nan"),
        (lambda: Identify(draws=0), "Identify.draws: found 0"),
        (lambda: Identify(budget_ms=0.0), "Identify.budget_ms: found 0.0"),
        (lambda: Refine(steps=True), "Refine.steps: found True"),
        (lambda: Refine(learning_rate=math.inf), "Refine.learning_rate: found inf"),
        (lambda: Guard(sigmas=math.nan), "Guard.sigmas: found nan"),
        (lambda: Guard(trust_radius=-1.0), "Guard.trust_radius: found -1.0"),
        (lambda: Watch(count=1), "Watch.count: found 1"),
    ],
)
def test_a_bad_setting_is_named(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
