"""What the self-aligner does, how the token in use stands, and the one function from evidence to the next of both.

::

                  enough transitions, enough motion             as many newer ones as it takes to judge
      Collecting ───────────────────────────────────▶ Fitted ─────────────────────────────────────────▶ guard
       ▲   ▲                                                                                             │ │
       │   └───────────────────── accepted: the token is in use; or undecided ───────────────────────────┘ │
       │                                                                                                   │ refused
       └─────────── drift, or told to try ─────────── Watching ◀───────────────────────────────────────────┘
                                                         ▲
                                             an earlier token is ordered back

Nothing here changes anything: a :class:`Situation` and evidence go in, the next one and what was found come out. What
the model says of the evidence comes from ``stages``. Knows neither ROS nor files nor tokens' numbers.
"""

from __future__ import annotations

import contextlib
import enum
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from selfalign_core.alignment.budget import OutOfTimeError
from selfalign_core.alignment.config import AlignConfig, Guard
from selfalign_core.alignment.evidence import Evidence, split, to_judge_by
from selfalign_core.alignment.excitation import Excitation, measure_excitation, with_newer
from selfalign_core.alignment.reports import Attempt, StageReport, State, fit_words
from selfalign_core.alignment.watch import RunningLoss, drift

if TYPE_CHECKING:
    from selfalign_core.alignment.identify import Identification
    from selfalign_core.alignment.stages import Shadow, Stages

BEGINNING_NS = -(2**62)
"""Before every stamp."""


@dataclass(frozen=True)
class Collecting:
    """Gathers evidence for an attempt, after ``undecided`` of them in a row: each fits on all evidence so far but is
    judged by transitions that none before has seen.
    """

    undecided: int = 0


@dataclass(frozen=True)
class Fitted:
    """An attempt does not wait for what it is judged by: while its ``shadow`` was fitted, that was still happening."""

    undecided: int
    shadow: Shadow


@dataclass(frozen=True)
class Watching:
    """At rest, after a refusal or because somebody wants the token in use kept, until the robot changes."""


Phase = Collecting | Fitted | Watching


class Standing(enum.Enum):
    """How the token in use stands."""

    PROVEN = "proven"
    """For another one the guard asks for its margins, and for twice those where no other known token fits better: the
    body is most likely the one that it was, and what refinement gains there is mostly chance."""

    UNPROVEN = "unproven"
    """It was jumped to, and identification has not yet preferred it over all others on as much evidence as is
    remembered: it may have fitted little motion by chance. That it fits worse elsewhere is no sign of a change, and any
    gain of the losses together, by half as many standard errors, replaces it: of two that both are new the one that was
    fitted on more is the better guess."""

    REFUTED = "refuted"
    """By a drift, of which more of the same is no news. Until the next attempt a token that was in use before and
    explains what is seen since is in use again at once, proven as it was."""


@dataclass(frozen=True)
class Situation:
    """All that one round leaves to the next, but for the tokens.

    ``baseline``: running loss of the token in use when it was judged or, at rest, first looked at; of a refuted one the
    baseline that the drift has left, until the next attempt. Without it there is no test for drift.

    Stamps of the robot's clock: ``now_ns`` when it was last looked at; ``since_ns`` before which no evidence counts,
    as of the change that a drift betrays; ``oldest_ns`` of the oldest transition when there were not as many as wanted;
    ``judged_ns`` up to which an attempt was judged; ``tested_ns`` up to which drift was tested for.
    """

    now_ns: int
    since_ns: int
    oldest_ns: int
    judged_ns: int
    tested_ns: int
    phase: Phase = field(default_factory=Collecting)
    standing: Standing = Standing.PROVEN
    baseline: RunningLoss | None = None

    @classmethod
    def new(cls, since_ns: int, now_ns: int) -> Situation:
        """With nothing seen since ``since_ns``."""
        return cls(now_ns, since_ns, since_ns, since_ns, since_ns)

    @property
    def state(self) -> State:
        return State.WATCH if isinstance(self.phase, Watching) else State.COLLECT

    @property
    def doing(self) -> str:
        return "watching" if self.state is State.WATCH else "collecting"

    @property
    def may_return(self) -> bool:
        """Whether the robot may be what it was before."""
        return self.standing is Standing.REFUTED and self.baseline is not None

    def at(self, now_ns: int) -> Situation:
        """Anew if time jumped back: a new run, or a replay from its start."""
        return replace(self, now_ns=now_ns) if now_ns >= self.now_ns else Situation.new(now_ns, now_ns)

    def trying(self) -> Situation:
        """Rest is left: it collects and tries, with the transitions at hand if they are enough."""
        phase = replace(self.phase, undecided=0) if isinstance(self.phase, Fitted) else Collecting()
        return replace(self, phase=phase, baseline=self.baseline if self.may_return else None)

    def forgetting(self, before_ns: int) -> Situation:
        """Of evidence from ``before_ns`` on alone."""
        phase = Collecting(self.phase.undecided) if isinstance(self.phase, Fitted) else self.phase
        return replace(self, phase=phase, since_ns=max(self.since_ns, before_ns))

    def looked_at(self, evidence: Evidence) -> tuple[bool, Situation]:
        """Whether ``evidence`` holds something that was not tested for drift before; after this it was."""
        newest_ns = int(evidence.spans[-1, 1])
        return newest_ns > self.tested_ns, replace(self, tested_ns=newest_ns)


@dataclass(frozen=True)
class Rules:
    """What does not change from round to round. ``dt``: seconds of a control step, ``horizon``: those of a transition.
    ``choice``: there is more than one known token.
    """

    config: AlignConfig
    joints: tuple[str, ...]
    dt: float
    horizon: int
    choice: bool

    def steps(self, duration_ns: int) -> float:
        """In control steps."""
        return duration_ns / 1e9 / self.dt


@dataclass(frozen=True)
class Request:
    """Transitions to hand in: the newest ``count`` that begin at ``since_ns`` or later, one every ``stride`` control
    steps. Nothing is done with fewer than ``least`` but to count them, nor if none ends after ``newer_than_ns``.
    """

    count: int
    since_ns: int
    stride: int
    least: int = field(compare=False)
    newer_than_ns: int = field(default=BEGINNING_NS, compare=False)


def request(now: Situation, now_ns: int, rules: Rules) -> Request:
    """What to ask for next, some spare ones included.

    They spread over the time since ``since_ns``, or since the oldest that was handed in when there were not as many as
    wanted: the sooner after a start or a change, the nearer together, so that a first attempt need not wait for the
    last one's spread. Those to judge a shadow by spread over the time since what it was fitted on.
    """
    collect, watch = rules.config.collect, rules.config.watch
    match now.phase:
        case Watching():
            return Request(watch.count + watch.count // 4, now.since_ns, collect.stride, watch.count)
        case Fitted(shadow=shadow):
            count, begin_ns = collect.guard_count, shadow.end_ns
        case Collecting():
            count, begin_ns = collect.count, max(now.since_ns, now.oldest_ns)
    steps = round(rules.steps(now_ns - begin_ns)) - rules.horizon
    stride = min(max(steps // count, collect.min_stride), collect.stride)
    wanted = max(collect.count + collect.count // 4, collect.memory)
    return Request(wanted, now.since_ns, stride, watch.count if now.may_return else collect.fit_count)


Step = tuple[Situation, StageReport]
"""The next situation, and how it came to it."""


def advance(now: Situation, evidence: Evidence, stages: Stages, rules: Rules) -> Step:
    """What follows from ``evidence``, of which nothing is older than ``now.since_ns``.

    The report's token is the one that is in use now: one that was accepted is the caller's to put in its place.
    """
    if isinstance(phase := now.phase, Watching):
        return _watch(now, evidence, stages, rules)
    return _collect(now, phase, evidence, stages, rules)


def _watch(now: Situation, evidence: Evidence, stages: Stages, rules: Rules) -> Step:
    count, newest = rules.config.watch.count, evidence.newest(rules.config.watch.count)
    if len(newest) < count:
        return _step(now, newest, stages, f"watching: {len(newest)} of {count} transitions")
    new, now = now.looked_at(newest)
    if not new:
        return _step(now, newest, stages, "watching: nothing new")
    return _test_for_drift(now, evidence, stages, rules)


def _collect(now: Situation, phase: Collecting | Fitted, evidence: Evidence, stages: Stages, rules: Rules) -> Step:
    newest, least = evidence.newest(rules.config.watch.count), rules.config.collect.fit_count
    if now.may_return:
        new, now = now.looked_at(newest)
        if new and (back := _return(now, newest, stages)):
            return back
    if len(evidence) < least:
        return _step(now, evidence, stages, f"collecting: {len(evidence)} of {least} transitions")
    if now.baseline is not None and not now.may_return:
        new, now = now.looked_at(newest)
        if new:
            now, report = _test_for_drift(now, evidence, stages, rules)
            if report.drift is None or report.drifted:
                return now, report
    if isinstance(phase, Fitted):
        return _judge(now, phase, evidence, stages, rules)
    return _fit(now, phase.undecided, evidence, stages, rules)


def _test_for_drift(now: Situation, evidence: Evidence, stages: Stages, rules: Rules) -> Step:
    """The newest of ``evidence`` against the baseline; with drift it collects anew, from the change on.

    The baseline is the best that was seen: evidence that is surely better takes its place, and at rest the first.
    """
    config, newest, baseline = rules.config.watch, evidence.newest(rules.config.watch.count), now.baseline
    try:
        running = stages.running_loss(newest)
    except OutOfTimeError as why:
        return _step(now, evidence, stages, f"{now.doing}: {why}")
    if baseline is None:
        text = f"watching: these {len(newest)} transitions are the baseline"
        return _step(replace(now, baseline=running), newest, stages, text)
    found = drift(baseline, running, config)
    if found.fired:
        begin_ns = int(newest.spans[found.begin, 0])
        now = replace(Situation.new(begin_ns, now.now_ns), standing=Standing.REFUTED, baseline=baseline)
        if back := _return(now, newest.select(np.flatnonzero(newest.spans[:, 0] >= begin_ns)), stages):
            now, report = back
            return now, replace(report, drift=found, text=f"drift ({found.words}): {report.text}")
    elif drift(running, baseline, config).fired:
        now = replace(now, baseline=running)
    verdict = "drift: collecting anew" if found.fired else "watching: no drift"
    return _step(now, newest, stages, f"{verdict} ({found.words})", drift=found)


def _return(now: Situation, evidence: Evidence, stages: Stages) -> Step | None:
    """To a token that was in use before and explains the ``evidence`` since the change, if there is one."""
    assert now.baseline is not None
    if (back := stages.find_return(evidence, now.baseline)) is None:
        return None
    now = replace(now, phase=Collecting(), standing=Standing.PROVEN, baseline=None)
    return _step(now, evidence, stages, f"back to an earlier token: {back.verdict.reason}", returned=back)


def _fit(now: Situation, undecided: int, evidence: Evidence, stages: Stages, rules: Rules) -> Step:
    """Make a shadow, and have it judged if there is already enough to judge it by."""
    collect = rules.config.collect
    fit, guard = split(evidence.spans, collect, now.judged_ns)
    fitted = evidence.select(fit)
    excitation = measure_excitation(fitted.batch, rules.joints, collect)
    if len(guard):
        excitation = with_newer(excitation, evidence.batch.select(guard), collect)
    if not excitation.enough:
        return _waiting(now, evidence, stages, excitation)
    try:
        shadow = stages.fit(fitted, excitation)
    except OutOfTimeError as why:
        return _step(now, evidence, stages, f"{now.doing}: {why}")
    phase = Fitted(undecided, shadow)
    now = replace(now, phase=phase)
    if len(guard):
        return _judge(now, phase, evidence, stages, rules)
    text = f"fitted, to be judged by newer transitions: {fit_words(shadow.identification, shadow.refinement)}"
    return _step(now, evidence, stages, text, excitation=excitation)


def _judge(now: Situation, phase: Fitted, evidence: Evidence, stages: Stages, rules: Rules) -> Step:
    """Let the guard decide on the shadow, if there is enough to judge it by, and do what follows from it."""
    collect, shadow = rules.config.collect, phase.shadow
    guard = to_judge_by(evidence.spans, collect, max(shadow.end_ns, now.judged_ns))
    if len(guard) < collect.guard_count:
        text = f"collecting: {len(guard)} of {collect.guard_count} new transitions to judge by"
        return _step(now, evidence, stages, text)
    newer = evidence.select(guard)
    excitation = with_newer(shadow.excitation, newer.batch, collect)
    if not excitation.enough:
        return _waiting(now, evidence, stages, excitation)
    limits = _limits(now.standing, shadow.identification, rules)
    try:
        attempt = stages.judge(shadow, newer, limits, inverse=now.standing is not Standing.UNPROVEN)
    except OutOfTimeError as why:
        return _step(now, evidence, stages, f"{now.doing}: {why}")
    lasted = rules.steps(int(newer.spans[-1, 0]) - shadow.begin_ns)
    standing = _standing_after(now.standing, attempt, lasted >= 0.9 * collect.stride * collect.memory)
    accepted = attempt.verdict.accepted
    again = not accepted and (attempt.undecided or standing is Standing.UNPROVEN)
    undecided = phase.undecided + 1 if again else 0
    rests = not accepted and undecided in (0, collect.attempts)
    if rests and standing is Standing.REFUTED:
        standing = Standing.PROVEN
    baseline = None
    if rests or (not accepted and standing is Standing.PROVEN):
        with contextlib.suppress(OutOfTimeError):  # then the first that is watched is the baseline
            baseline = stages.running_loss(newer)
    end_ns, then = int(newer.spans[-1, 1]), Watching() if rests else Collecting(undecided)
    now = replace(now, phase=then, standing=standing, baseline=baseline, judged_ns=end_ns, tested_ns=end_ns)
    return _step(now, evidence, stages, attempt.text, excitation=shadow.excitation, attempt=attempt)


def _standing_after(standing: Standing, attempt: Attempt, on_all_evidence: bool) -> Standing:
    """Of the token in use after ``attempt``, which looked at ``on_all_evidence`` that is remembered, or at less."""
    jumps, accepted = attempt.identification.margin > 0, attempt.verdict.accepted
    if accepted and jumps:
        return Standing.UNPROVEN
    if standing is Standing.UNPROVEN:
        return Standing.UNPROVEN if jumps or not on_all_evidence else Standing.PROVEN
    return Standing.PROVEN if accepted else standing


def _limits(standing: Standing, found: Identification, rules: Rules) -> Guard:
    """The guard's, its margins as :class:`Standing` says."""
    guard = rules.config.guard
    if standing is Standing.UNPROVEN:
        return replace(guard, sigmas=guard.sigmas / 2, margin=0.0, inverse_margin=0.0)
    factor = 2 if found.margin == 0 and rules.choice else 1
    return replace(guard, margin=factor * guard.margin, inverse_margin=factor * guard.inverse_margin)


def _waiting(now: Situation, evidence: Evidence, stages: Stages, excitation: Excitation) -> Step:
    text = f"waiting for motion: {'; '.join(excitation.missing)}"
    return _step(now, evidence, stages, text, excitation=excitation)


def _step(now: Situation, evidence: Evidence, stages: Stages, text: str, **numbers: Any) -> Step:
    text = "; ".join([text, *evidence.left_out])
    return now, StageReport(now.state, text, stages.token, len(evidence), evidence.left_out, **numbers)
