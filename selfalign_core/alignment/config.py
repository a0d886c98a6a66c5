"""Every number of the self-aligner, one section per stage; each section checks itself.

The one declaration of each: a setting is a parameter of the aligner node too, with this default, range and text.
Imports no torch.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

from selfalign_core.records import (
    Count,
    Natural,
    NotNegative,
    Positive,
    Range,
    Record,
    hints_of,
    read,
    setting,
)

AtLeastTwo = Annotated[int, Range(2)]


@dataclass(frozen=True)
class Collect(Record):
    """What has to be seen before a token is changed.

    ``fit_count`` transitions to identify and refine on, then ``guard_count`` newer ones to judge by. After an undecided
    refusal it goes on collecting, for ``attempts`` in a row, each judged by transitions that none before has seen and
    fitted on ``fit_count`` that are spread over the newest ``memory``: another way of moving is no reason to forget.
    ``max_value`` is the largest normalised state or action that is believed.
    """

    fit_count: AtLeastTwo = setting(20, (2, 4096), "Transitions to identify the body and to refine on.")
    guard_count: AtLeastTwo = setting(12, (2, 4096), "Newer transitions to judge the shadow token by.")
    stride: Count = setting(
        8,
        (1, 1000),
        "From the begin of one transition to the begin of the next; below the transition's length they overlap.",
        "control steps",
    )
    min_stride: Count = setting(
        4,
        (1, 1000),
        "The same soon after a start or a change, and for what a shadow token is judged by soon after what it was "
        "fitted on; later they spread over the time there is, up to collect_stride.",
        "control steps",
    )
    attempts: Count = setting(
        5,
        (1, 1000),
        "Attempts in a row, each judged by new transitions, while the paired test stays undecided; then it rests.",
    )
    memory: Count = setting(
        64,
        (1, 4096),
        "How many of the newest transitions those to fit on are spread over; not used below fit_count and guard_count "
        "together.",
    )
    min_command: NotNegative = setting(
        0.03,
        (0, 10),
        "How far the commanded changes of every joint must spread (standard deviation), in what is fitted, before an "
        "attempt.",
        "rad or m",
    )
    min_motion: NotNegative = setting(
        0.02,
        (0, 10),
        "How far the real changes of at least one joint must spread (standard deviation) before an attempt, in what is "
        "fitted and in what it is judged by.",
        "rad or m",
    )
    max_value: Positive = 10.0

    @property
    def count(self) -> int:
        """Transitions of one attempt."""
        return self.fit_count + self.guard_count


@dataclass(frozen=True)
class Identify(Record):
    """Successive elimination over the trusted tokens.

    All are scored on ``first_count`` transitions, the best quarter on twice as many others, and so on; ``finalists`` of
    them on all fit transitions with ``draws`` noise draws of each.
    """

    first_count: Count = 2
    finalists: Count = 6
    draws: Count = 4
    budget_ms: Positive | None = setting(
        10_000.0,
        (1, 600_000),
        "Wall-clock time after which identification goes on with the best token so far; as much again for preparing "
        "the transitions, without which a round ends (twice, where it both fits and judges). Off in lock-step.",
        "ms",
    )


@dataclass(frozen=True)
class Refine(Record):
    """Adam on the shadow token.

    ``max_deviation``: how far out, in standard deviations of the bank, a token may lie along each direction.
    """

    steps: Count = setting(30, (1, 10_000), "Optimiser steps on the shadow token.")
    learning_rate: Positive = setting(
        0.07,
        (1e-6, 10),
        "Size of an optimiser step, in the bank's standard deviations per direction (mode full, of the token itself).",
    )
    draws: Count = setting(2, (1, 1024), "Fresh draws of noise and time per transition and step.")
    directions: Count = setting(64, (1, 4096), "Principal directions of the bank that are free in mode subspace.")
    max_deviation: Positive = 2.5
    budget_ms: Positive | None = setting(
        10_000.0,
        (1, 600_000),
        "Wall-clock time after which refinement takes no further step. Off in lock-step.",
        "ms",
    )


@dataclass(frozen=True)
class Guard(Record):
    """A shadow passes if it is surely better on newer transitions, and explains their actions much better.

    The paired relative difference of the weighted losses, mean + ``sigmas`` stderr, is to be < -``margin``; that of
    inverse dynamics alone < -``inverse_margin`` in the mean, and < 0 at half as many ``sigmas``. Means are over what
    there is to explain, see :mod:`guard`. With few independent transitions it takes more than that, see
    :meth:`overlap.Estimate.upper`. The margins: a smaller gain is real, but the actions do not get better by it.
    ``trust_radius`` is a root mean square over the spread of the bank (1 for a bank of one).
    """

    draws: Count = setting(16, (1, 1024), "Draws of common noise and time per transition in the paired test.")
    sigmas: NotNegative = setting(
        2.0,
        (0, 10),
        "Standard errors by which the shadow token must beat the current one; half as many while the current one is "
        "new and unproven.",
    )
    margin: NotNegative = setting(
        0.1,
        (0, 2),
        "Relative gain in loss that it must have beyond that; a smaller one is not worth a new token. Not asked for "
        "while the current one is new and unproven; twice as much where no other token of the bank fits better than "
        "the current one.",
    )
    inverse_margin: NotNegative = setting(
        0.25,
        (0, 2),
        "Relative gain in the inverse dynamics loss alone, in the mean over what there is to explain, that the shadow "
        "token must have; a token that only sees better acts no better. Not asked for while the current one is new and "
        "unproven, nor of a token that was in use before, nor if lambda_inv is 0; twice as much where no other token "
        "of the bank fits better than the current one.",
    )
    trust_radius: Positive = setting(
        1.0,
        (1e-6, 1e3),
        "Farthest a token may lie from the nearest one known from training, in spreads of the bank.",
    )
    max_norm: Positive = setting(
        4.0,
        (1e-3, 1e3),
        "Largest size of an E-Token vector, as root mean square over its width; tokens known from training may be "
        "larger.",
    )
    budget_ms: Positive | None = setting(
        5_000.0,
        (1, 600_000),
        "Wall-clock time after which the paired test takes no further draw; as much again for the losses in the "
        "report. Off in lock-step.",
        "ms",
    )


@dataclass(frozen=True)
class Watch(Record):
    """Drift: the newest ``count`` transitions lose more than the baseline did, by ``sigmas`` standard errors.

    Losses count relative to those of ``references`` bank entries on the same transition, so that livelier motion
    alone, which is harder for every token, is no drift.
    """

    count: AtLeastTwo = setting(
        12, (2, 4096), "Newest transitions that are watched for drift after a refusal, a rollback or a reset."
    )
    sigmas: Positive = setting(
        3.0, (1e-4, 100), "Standard errors by which the newest losses must exceed the baseline's to count as drift."
    )
    draws: Count = 4
    references: Natural = 8
    budget_ms: Positive | None = setting(
        2_000.0,
        (1, 600_000),
        "Wall-clock time after which the drift test takes no further draw. Off in lock-step.",
        "ms",
    )


@dataclass(frozen=True)
class AlignConfig(Record):
    """The self-aligner's settings: ``mode``, the three losses' weights and a section per stage.

    ``keep``: accepted tokens remembered for rollback. ``frame_cache_mib``: of no more frames than the transitions
    remembered have. A stage's ``budget_ms`` is wall time, None for no limit; the clock is looked at before every pass
    of the model, and what a stage overran by is taken off the next one's. With a limit, results depend on the machine's
    speed.
    """

    mode: Literal["bank", "subspace", "full"] = setting(
        "subspace",
        None,
        "How the E-Token may change. bank jumps to a token known from training; subspace refines it along the bank's "
        "principal directions; full refines every element.",
    )
    lambda_perc: NotNegative = setting(2.0, (0, 100), "Weight of the perception loss.")
    lambda_dyn: NotNegative = setting(0.3, (0, 100), "Weight of the dynamics loss.")
    lambda_inv: NotNegative = setting(3.0, (0, 100), "Weight of the inverse dynamics loss.")
    keep: Count = 8
    frame_cache_mib: Natural = setting(
        64,
        (0, 65_536),
        "Memory for what the frozen model made of frames (features, keys and values) kept from round to round, if so "
        "much is needed for the transitions remembered; 0 keeps nothing.",
        "MiB",
    )
    policy_wait_ms: Positive = setting(
        1000.0,
        (1, 60_000),
        "On a GPU that a policy uses as well, alignment waits between any two layers while the policy computes; this "
        "is how long for one inference, so that a policy that was stopped meanwhile does not stop alignment too.",
        "ms",
    )
    collect: Collect = field(default_factory=Collect)
    identify: Identify = field(default_factory=Identify)
    refine: Refine = field(default_factory=Refine)
    guard: Guard = field(default_factory=Guard)
    watch: Watch = field(default_factory=Watch)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect(any(self.weights), "lambda_perc, lambda_dyn, lambda_inv", "at least one above 0", "all 0")

    @property
    def weights(self) -> tuple[float, float, float]:
        """λ_p, λ_d, λ_i."""
        return self.lambda_perc, self.lambda_dyn, self.lambda_inv

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> AlignConfig:
        """The settings in ``parameters``, by the names of :func:`declared`; others have their defaults."""
        values: dict[str, Any] = {}
        for one in declared():
            if one.name in parameters:
                section = values.setdefault(one.section, {}) if one.section else values
                section[one.field] = parameters[one.name]
        return read(cls, values)

    def without_budgets(self) -> AlignConfig:
        """The same settings with no limit on any stage's time: what lock-step replay and tests need."""
        stages = {
            f.name: dataclasses.replace(section, budget_ms=None)
            for f in dataclasses.fields(self)
            if hasattr(section := getattr(self, f.name), "budget_ms")
        }
        return dataclasses.replace(self, **stages)


class Declared(NamedTuple):
    """A setting as a parameter: ``guard_sigmas`` is the field ``sigmas`` of the section ``guard``.

    ``kind``: int, float or str. ``choices``: of a text.
    """

    section: str
    field: str
    kind: type
    default: Any
    choices: tuple[str, ...]
    range: tuple[float, float] | None
    text: str
    unit: str

    @property
    def name(self) -> str:
        return f"{self.section}_{self.field}" if self.section else self.field


def declared(record: Record | None = None, section: str = "") -> Iterator[Declared]:
    """Every setting in ``record``, by default in all of :class:`AlignConfig`."""
    record = AlignConfig() if record is None else record
    hints = hints_of(type(record))
    for one in dataclasses.fields(record):
        value = getattr(record, one.name)
        if isinstance(value, Record):
            yield from declared(value, one.name)
        elif one.metadata:
            choices = typing.get_args(hints[one.name]) if isinstance(value, str) else ()
            yield Declared(section, one.name, type(value), value, choices, **one.metadata)
