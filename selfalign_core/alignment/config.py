"""Every number of the self-aligner, one section per stage. Each section checks itself."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from selfalign_core.errors import ConfigError

Mode = Literal["bank", "subspace", "full"]
"""How a token may change.

``bank``: jump to a trusted token, no refinement. ``subspace``: from there along the bank's principal directions (as
``full`` where the bank has fewer than two entries, and so no directions). ``full``: every element of E is free.
"""


@dataclass(frozen=True)
class Collect:
    """What has to be seen before a token is changed.

    ``fit_count`` transitions to identify and refine on, then ``guard_count`` newer ones to judge by, one every
    ``stride`` control steps; soon after a start or a change, and after what was fitted on, they may lie as near as
    ``min_stride``. After an undecided refusal it goes on collecting, for ``attempts`` in a row, each judged by
    transitions that none before has seen and fitted on ``fit_count`` that are spread over the newest ``memory``:
    another way of moving is no reason to forget. Each joint's commanded change must spread by ``min_command`` and at
    least one joint must really move by ``min_motion`` (standard deviations, rad or m) in what is fitted; in what it is
    judged by a joint must move, too. ``max_value`` is the largest normalised state or action that is believed.
    """

    fit_count: int = 20
    guard_count: int = 12
    stride: int = 8
    min_stride: int = 4
    attempts: int = 5
    memory: int = 64
    min_command: float = 0.03
    min_motion: float = 0.02
    max_value: float = 10.0

    def __post_init__(self) -> None:
        _at_least(self, 2, "fit_count", "guard_count")
        _at_least(self, 1, "stride", "min_stride", "attempts", "memory")
        _not_negative(self, "min_command", "min_motion")
        _positive(self, "max_value")

    @property
    def count(self) -> int:
        """Transitions of one attempt."""
        return self.fit_count + self.guard_count


@dataclass(frozen=True)
class Identify:
    """Successive elimination over the trusted tokens.

    All are scored on ``first_count`` transitions, the best quarter on twice as many others, and so on; ``finalists`` of
    them on all fit transitions with ``draws`` noise draws of each. ``budget_ms`` is for that, and as much again for
    preparing transitions: for what the frozen model makes of them, before an attempt and before a test for drift.
    """

    first_count: int = 2
    finalists: int = 6
    draws: int = 4
    budget_ms: float | None = 10_000.0

    def __post_init__(self) -> None:
        _at_least(self, 1, "first_count", "finalists", "draws")
        _budget(self)


@dataclass(frozen=True)
class Refine:
    """``steps`` of Adam with ``draws`` fresh noise draws of every fit transition.

    ``learning_rate`` is per step in units of the bank's standard deviation per direction (mode ``full``: of E itself).
    ``directions``: how many principal directions of the bank are free. ``max_deviation``: how far out, in standard
    deviations of the bank, a token may lie along each.
    """

    steps: int = 30
    learning_rate: float = 0.07
    draws: int = 2
    directions: int = 64
    max_deviation: float = 2.5
    budget_ms: float | None = 10_000.0

    def __post_init__(self) -> None:
        _at_least(self, 1, "steps", "draws", "directions")
        _positive(self, "learning_rate", "max_deviation")
        _budget(self)


@dataclass(frozen=True)
class Guard:
    """A shadow passes if it is surely better on newer transitions, and explains their actions much better.

    The paired relative difference of the weighted losses, mean + ``sigmas`` stderr, is to be < -``margin``; that of
    inverse dynamics alone < -``inverse_margin`` in the mean, and < 0 at half as many ``sigmas``. Means are over what
    there is to explain, see :mod:`guard`. With few independent transitions it takes more than that, see
    :meth:`overlap.Estimate.upper`. The margins: a smaller gain is not worth a new token: it is real, but the actions do
    not get better by it. While the current token is unproven none is asked for, nor is inverse dynamics, and half the
    ``sigmas`` do; twice as much where no other known token fits better (see :mod:`phases`). ``draws``: common noise
    draws per transition. ``trust_radius``: farthest from the nearest trusted token, in spreads of the bank (root mean
    squares; 1 for a bank of one). ``max_norm``: largest root mean square of a token vector; trusted tokens may be
    larger. ``budget_ms`` is for the test, and as much again for the losses that the report gives.
    """

    draws: int = 16
    sigmas: float = 2.0
    margin: float = 0.1
    inverse_margin: float = 0.25
    trust_radius: float = 1.0
    max_norm: float = 4.0
    budget_ms: float | None = 5_000.0

    def __post_init__(self) -> None:
        _at_least(self, 1, "draws")
        _not_negative(self, "sigmas", "margin", "inverse_margin")
        _positive(self, "trust_radius", "max_norm")
        _budget(self)


@dataclass(frozen=True)
class Watch:
    """Drift: the newest ``count`` transitions lose more than the baseline did, by ``sigmas`` standard errors.

    Losses count relative to those of ``references`` bank entries on the same transition, so that livelier motion
    alone, which is harder for every token, is no drift.
    """

    count: int = 12
    sigmas: float = 3.0
    draws: int = 4
    references: int = 8
    budget_ms: float | None = 2_000.0

    def __post_init__(self) -> None:
        _at_least(self, 2, "count")
        _at_least(self, 1, "draws")
        _at_least(self, 0, "references")
        _positive(self, "sigmas")
        _budget(self)


@dataclass(frozen=True)
class AlignConfig:
    """The self-aligner's settings: ``mode``, the three losses' weights and a section per stage.

    ``keep``: accepted tokens remembered for rollback. ``frame_cache_mib``: memory for what the frozen model made of
    frames, kept from round to round, of no more frames than the transitions remembered have; 0 keeps nothing.
    ``policy_wait_ms``: how long alignment on a shared GPU waits for one inference. A stage's ``budget_ms`` is wall
    time, None for no limit; the clock is looked at before every pass of the model, and what a stage overran by is taken
    off the next one's. With a limit, results depend on the machine's speed.
    """

    mode: Mode = "subspace"
    lambda_perc: float = 2.0
    lambda_dyn: float = 0.3
    lambda_inv: float = 3.0
    keep: int = 8
    frame_cache_mib: int = 64
    policy_wait_ms: float = 1000.0
    collect: Collect = field(default_factory=Collect)
    identify: Identify = field(default_factory=Identify)
    refine: Refine = field(default_factory=Refine)
    guard: Guard = field(default_factory=Guard)
    watch: Watch = field(default_factory=Watch)

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ConfigError(f"AlignConfig.mode: found {self.mode!r}, expected one of {get_args(Mode)}")
        _not_negative(self, "lambda_perc", "lambda_dyn", "lambda_inv")
        if self.lambda_perc == self.lambda_dyn == self.lambda_inv == 0:
            raise ConfigError("AlignConfig.lambda_perc, lambda_dyn, lambda_inv: found all 0, expected one > 0")
        _at_least(self, 1, "keep")
        _at_least(self, 0, "frame_cache_mib")
        _positive(self, "policy_wait_ms")

    @property
    def weights(self) -> tuple[float, float, float]:
        """λ_p, λ_d, λ_i."""
        return self.lambda_perc, self.lambda_dyn, self.lambda_inv

    def without_budgets(self) -> AlignConfig:
        """The same settings with no limit on any stage's time: what lock-step replay and tests need."""
        stages = {
            f.name: dataclasses.replace(section, budget_ms=None)
            for f in dataclasses.fields(self)
            if hasattr(section := getattr(self, f.name), "budget_ms")
        }
        return dataclasses.replace(self, **stages)


def _at_least(section: Any, least: int, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{type(section).__name__}.{name}: found {value!r}, expected an integer >= {least}")


def _positive(section: Any, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{type(section).__name__}.{name}: found {value}, expected a number > 0")


def _not_negative(section: Any, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{type(section).__name__}.{name}: found {value}, expected a number >= 0")


def _budget(section: Any) -> None:
    if section.budget_ms is not None:
        _positive(section, "budget_ms")
