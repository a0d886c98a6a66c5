"""The self-aligner: from recent transitions to a better E-Token, or to none.

::

                  enough transitions, enough motion     as many newer ones as it takes to judge
      COLLECT ───────────────────────▶ identify → refine ───────────────────────▶ guard
       ▲   ▲                                                                       │ │
       │   └──────────── accepted: the token is in use; or undecided ──────────────┘ │
       │                                                                             │ refused
       └──────── drift, or align_now() ─────────────── WATCH ◀───────────────────────┘
                                                         ▲
                                          rollback(), reset()

An attempt does not wait for what it is judged by: while its shadow is fitted, that is still happening. After an
acceptance it tries to improve further, and while an attempt is undecided it tries again, a few times: each attempt fits
on all evidence so far but is judged by transitions that none before has seen. After a refusal it rests and watches. A
refusal leaves a baseline for the drift test, which goes on beside further attempts; not while the token in use is one
that a drift has refuted, of which more of the same is no news. And a token that was jumped to is unproven until
identification prefers it over all others on as much evidence as is remembered: it may have fitted little motion by
chance, so that it fits worse elsewhere is no sign of a change, and no evidence is dropped. Any gain of the losses
together, by half as many standard errors, replaces it: of two that both are new the one that was fitted on more is the
better guess. For a proven one the guard asks for its margins, and for twice those where no other token of the bank fits
better: the body is most likely the one that it was, and what refinement gains there is mostly chance.
A robot often changes back. From a drift until the next attempt, a token that was in use before and explains what is
seen since is in use again at once (:mod:`earlier`), proven as it was; the attempt then looks for a better one.
Who orders an earlier token back wants it kept: then, too, it rests, and what it sees first is the baseline.
Evidence is never older than ``since_ns``: what came before the change that a drift betrays is not asked for again.
The caller hands in transitions and the time, and publishes what is accepted. Knows neither ROS nor files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from selfalign_core.alignment.attempt import Round, Shadow, Stages
from selfalign_core.alignment.budget import Clock, OutOfTimeError, RoundClock
from selfalign_core.alignment.config import AlignConfig, Guard
from selfalign_core.alignment.earlier import find_return
from selfalign_core.alignment.evidence import Evidence, split, to_judge_by
from selfalign_core.alignment.excitation import measure_excitation, with_newer
from selfalign_core.alignment.frame_cache import FrameCache
from selfalign_core.alignment.guard import judge
from selfalign_core.alignment.history import Accepted, History
from selfalign_core.alignment.identify import Identification
from selfalign_core.alignment.overlap import spans
from selfalign_core.alignment.refine import refine
from selfalign_core.alignment.reports import StageReport, State, fit_words
from selfalign_core.alignment.scoring import Prepared, Scorer
from selfalign_core.alignment.screen import screen
from selfalign_core.alignment.trusted import Trusted
from selfalign_core.alignment.watch import RunningLoss, drift, references, running_loss
from selfalign_core.errors import InputError
from selfalign_core.model.device_turns import HandBack
from selfalign_core.policy import Policy
from selfalign_core.robot.types import EToken, TransitionBatch


class SelfAligner:
    """Owned by one thread. Nothing of ``policy`` is changed, not even its token: :attr:`token` is the one in use here.

    Args:
        joints: names of the robot's joints, for reports.
        prompt: what the robot is told; read only with ``alignment_prefix="full"``.
        seed: every random number follows from it and the stamps handed in.
        clock: seconds, read for budgets and reported durations alone.
    """

    def __init__(
        self,
        policy: Policy,
        config: AlignConfig,
        *,
        joints: Sequence[str] = (),
        prompt: str = "",
        seed: int = 0,
        clock: Clock = time.monotonic,
    ):
        self.policy, self.config, self._prompt = policy, config, prompt
        self._joints = tuple(joints) or tuple(f"joint {i}" for i in range(policy.state_dim))
        self._hand_back = HandBack(policy.model, policy.turns, config.policy_wait_ms)
        self._frames = FrameCache(policy, *_frame_limits(config))
        self._scorer = Scorer(policy, config.weights, prompt=prompt, frames=self._frames)
        self._trusted = Trusted.of(policy)
        self._references = references(self._trusted, config.watch.references)
        self._seed, self._clock, self._now_ns = seed, clock, -(2**62)
        self.history = History(Accepted(policy.e_token, 0, math.nan), keep=config.keep)
        self._restart(-(2**62))

    # ---------------------------------------------------------------- what it is, what it wants

    @property
    def token(self) -> EToken:
        """The token in use."""
        return self.history.token

    @property
    def state(self) -> State:
        return self._state

    @property
    def _doing(self) -> str:
        return "collecting" if self._state is State.COLLECT else "watching"

    @property
    def since_ns(self) -> int:
        """Transitions that begin before it are of no use."""
        return self._since_ns

    @property
    def needed(self) -> int:
        """With fewer transitions :meth:`advance` does nothing but count them."""
        enough = self.config.collect.fit_count if self._state is State.COLLECT else self.config.watch.count
        return enough if self._lost is None else self.config.watch.count

    @property
    def wanted(self) -> int:
        """How many of the newest transitions to hand in, some spare ones included."""
        collect, watch = self.config.collect, self.config.watch
        if self._state is State.WATCH:
            return watch.count + watch.count // 4
        return max(collect.count + collect.count // 4, collect.memory)

    def stride(self, now_ns: int) -> int:
        """Control steps between the transitions to hand in.

        They spread over the time since :attr:`since_ns`, or since the oldest that was handed in when there were not as
        many as wanted: the sooner after a start or a change, the nearer together, so that a first attempt need not wait
        for the last one's spread. Those to judge a shadow by spread over the time since what it was fitted on.
        """
        config, shadow = self.config.collect, self._shadow
        if self._state is State.WATCH:
            return config.stride
        oldest_ns = max(self._since_ns, self._oldest_ns)
        count, since_ns = (config.count, oldest_ns) if shadow is None else (config.guard_count, shadow.end_ns)
        steps = round(self._steps(now_ns - since_ns)) - self.policy.transition_horizon
        return min(max(steps // count, config.min_stride), config.stride)

    # ---------------------------------------------------------------- orders from outside

    def configure(self, config: AlignConfig) -> None:
        """Go on with other settings. With other weights no loss compares with an earlier one: it collects anew."""
        old, self.config = self.config, config
        self._frames.limit_bytes, self._frames.limit_frames = _frame_limits(config)
        self._hand_back.limit_ms = config.policy_wait_ms
        if (old.weights, old.watch.references) != (config.weights, config.watch.references):
            self._scorer = Scorer(self.policy, config.weights, prompt=self._prompt, frames=self._frames)
            self._references = references(self._trusted, config.watch.references)
            self._shadow = None
            self.align_now()

    def align_now(self) -> None:
        """Leave the rest: collect and try, with the transitions at hand if they are enough."""
        self._state, self._undecided, self._baseline = State.COLLECT, 0, None

    def forget(self, before_ns: int) -> None:
        """Collect from ``before_ns`` on: motion begins that tells more than what has been seen."""
        self._since_ns, self._shadow = max(self._since_ns, before_ns), None

    def use(self, token: EToken, stamp_ns: int) -> None:
        """Go on from ``token``, for instance the one that the policy uses; its history begins here.

        Raises:
            InputError: the token does not fit the model; nothing is changed.
        """
        self.policy.check_e_token(token)
        self.history = History(Accepted(token, stamp_ns, math.nan), keep=self.config.keep)
        self._restart(stamp_ns)
        self._now_ns = stamp_ns

    def restore(self, history: History) -> None:
        """Go on from a history that was loaded from a file."""
        self.policy.check_e_token(history.token)
        self.history = history
        self._restart(-(2**62))

    def rollback(self, stamp_ns: int) -> EToken:
        """The accepted token before this one is in use again, under a new version, until drift or :meth:`align_now`.

        Raises:
            InputError: there is none.
        """
        token = self.history.rollback(stamp_ns)
        self._rest(stamp_ns)
        return token

    def reset(self, stamp_ns: int) -> EToken:
        """The policy's own token is in use again, under a new version, until drift or :meth:`align_now`.

        Can be rolled back.

        Raises:
            InputError: it is in use.
        """
        assert self.policy.e_token is not None
        own = self.policy.e_token.data
        if np.array_equal(own, self.token.data):
            raise InputError("reset: found the policy's own token in use, expected another")
        token = self.history.accept(own, stamp_ns, math.nan)
        self._rest(stamp_ns)
        return token

    # ---------------------------------------------------------------- one step

    def warm_up(self, pose: np.ndarray) -> None:
        """Go through the passes of an attempt with made-up transitions of a robot that rests in ``pose`` (state_dim,).

        What is initialised late is paid for, the frame cache is full, and if memory does not suffice it shows before
        the robot moves. Budgets hold as in any attempt; nothing that comes out is kept.
        """
        policy, config = self.policy, self.config
        cameras = tuple(camera for camera in policy.config.cameras if camera is not None)
        count = _frame_limits(config)[1]
        rest = pose.astype(np.float32)
        batch = TransitionBatch(
            cameras,
            np.random.default_rng(0).integers(0, 256, (count, len(cameras), *policy.image_size, 3), np.uint8),
            frame_states=np.tile(rest, (count, 1)),
            frame_stamps=np.arange(count),
            obs_index=np.arange(0, count, 2),
            next_index=np.arange(1, count, 2),
            actions=np.tile(rest[: policy.action_dim], (count // 2, policy.transition_horizon, 1)),
        )
        evidence, current = Evidence(batch, spans(batch)), self._tensor(self.token)
        one_step = dataclasses.replace(config, refine=dataclasses.replace(config.refine, steps=1))
        round_ = self._round(0)
        stages, clock = self._stages(round_), round_.clock
        with contextlib.suppress(OutOfTimeError):
            data, _ = stages.prepare(evidence)
            fit, guard = data.select(slice(config.collect.fit_count)), slice(config.collect.guard_count)
            budget = clock.stage(config.refine.budget_ms)
            shadow = refine(self._scorer, fit, current, self._trusted, one_step, seed=0, budget=budget).token
            guard_data, times, limits = data.select(guard), evidence.spans[guard], config.guard
            budget = clock.stage(limits.budget_ms)
            judge(self._scorer, guard_data, times, current, shadow, self._trusted, limits, seed=0, budget=budget)

    def short_of(self, found: int, now_ns: int) -> StageReport:
        """What :meth:`advance` says to ``found`` transitions, fewer than ``needed``, without a look at them."""
        self._look_at_the_clock(now_ns)
        steps = (found + 1) * self.stride(now_ns) + self.policy.transition_horizon
        self._oldest_ns = now_ns - round(steps * self.policy.dt * 1e9)
        return StageReport(self._state, f"{self._doing}: {found} of {self.needed} transitions", self.token, found)

    def advance(
        self, batch: TransitionBatch, now_ns: int, *, should_stop: Callable[[], bool] | None = None
    ) -> StageReport:
        """Do what the state and the newest transitions call for, and say what was done.

        Args:
            batch: the newest transitions since ``since_ns``, about ``wanted`` of them; fewer if there are not so many.
            now_ns: the robot's time.
            should_stop: asked before every pass of the model; True ends the stage as its budget does.

        Raises:
            InputError: the transitions do not fit the policy or hold NaN; nothing is changed.
        """
        self._scorer.check(batch)
        self._look_at_the_clock(now_ns)
        if 0 < len(batch) < self.wanted:
            self._oldest_ns = int(spans(batch)[:, 0].min())
        evidence, round_ = self._evidence(batch), self._round(now_ns, should_stop)
        try:
            if self._state is State.COLLECT:
                return self._collect(evidence, round_)
            return self._watch(evidence, round_)
        except OutOfTimeError as why:
            return self._report(evidence, f"{self._doing}: {why}")

    def _collect(self, evidence: Evidence, round_: Round) -> StageReport:
        config = self.config.collect
        found, newest = len(evidence.batch), evidence.newest(self.config.watch.count)
        if self._lost is not None and self._is_new(newest) and (back := self._return(newest, round_)):
            return back
        if found < config.fit_count:
            return self._report(evidence, f"collecting: {found} of {config.fit_count} transitions")
        if self._baseline is not None and self._is_new(newest):
            changed = self._compare(newest, round_)
            if changed.drift.fired:
                return changed
        if self._shadow is None:
            return self._fit(evidence, round_)
        return self._judge(self._shadow, evidence, round_)

    def _fit(self, evidence: Evidence, round_: Round) -> StageReport:
        """Make a shadow, and have it judged if there is already enough to judge it by."""
        fit, guard = split(evidence.spans, self.config.collect, self._judged_ns)
        fitted = evidence.select(fit)
        excitation = measure_excitation(fitted.batch, self._joints, self.config.collect)
        if len(guard):
            excitation = with_newer(excitation, evidence.batch.select(guard), self.config.collect)
        if not excitation.enough:
            return self._report(evidence, f"waiting for motion: {'; '.join(excitation.missing)}", excitation=excitation)
        shadow = self._shadow = self._stages(round_).fit(fitted, excitation, self._tensor(self.token))
        if len(guard):
            return self._judge(shadow, evidence, round_)
        text = f"fitted, to be judged by newer transitions: {fit_words(shadow.identification, shadow.refinement)}"
        return self._report(evidence, text, excitation=excitation)

    def _judge(self, shadow: Shadow, evidence: Evidence, round_: Round) -> StageReport:
        """Let the guard decide on ``shadow``, if there is enough to judge it by, and do what follows from it."""
        config = self.config.collect
        guard = to_judge_by(evidence.spans, config, max(shadow.end_ns, self._judged_ns))
        if len(guard) < config.guard_count:
            text = f"collecting: {len(guard)} of {config.guard_count} new transitions to judge by"
            return self._report(evidence, text)
        newer = evidence.select(guard)
        excitation = with_newer(shadow.excitation, newer.batch, config)
        if not excitation.enough:
            return self._report(evidence, f"waiting for motion: {'; '.join(excitation.missing)}", excitation=excitation)
        attempt, data = self._stages(round_).judge(
            shadow, newer, self._tensor(self.token), self._limits(shadow.identification), inverse=not self._unproven
        )
        accepted, jumps = attempt.verdict.accepted, attempt.identification.margin > 0
        if accepted:
            self.history.accept(shadow.token.cpu().numpy(), round_.now_ns, attempt.verdict.after)
        lasted = self._steps(int(newer.spans[-1, 0]) - shadow.begin_ns)
        if accepted and jumps:
            self._unproven = True
        elif not jumps and lasted >= 0.9 * config.stride * config.memory:
            self._unproven = False
        again = not accepted and (attempt.undecided or self._unproven)
        self._undecided = self._undecided + 1 if again else 0
        self._judged_ns = self._watched_ns = int(newer.spans[-1, 1])
        self._lost = self._shadow = None
        rests = not accepted and self._undecided in (0, config.attempts)
        self._baseline, self._refuted = None, self._refuted and not (accepted or rests)
        if rests or not (accepted or self._unproven or self._refuted):
            with contextlib.suppress(OutOfTimeError):  # then the first that is watched is the baseline
                self._baseline = self._running_loss(data, newer.spans, round_)
        if rests:
            self._state, self._undecided = State.WATCH, 0
        return self._report(evidence, attempt.text, excitation=shadow.excitation, attempt=attempt)

    def _watch(self, evidence: Evidence, round_: Round) -> StageReport:
        config = self.config.watch
        evidence = evidence.newest(config.count)
        found = len(evidence.batch)
        if found < config.count:
            return self._report(evidence, f"watching: {found} of {config.count} transitions")
        if not self._is_new(evidence):
            return self._report(evidence, "watching: nothing new")
        if self._baseline is None:
            self._baseline = self._newest_loss(evidence, round_)
            return self._report(evidence, f"watching: these {found} transitions are the baseline")
        return self._compare(evidence, round_)

    def _is_new(self, evidence: Evidence) -> bool:
        """Whether ``evidence`` holds something that was not tested for drift before; from now on it was."""
        newest_ns = int(evidence.spans[-1, 1])
        new, self._watched_ns = newest_ns > self._watched_ns, newest_ns
        return new

    def _compare(self, evidence: Evidence, round_: Round) -> StageReport:
        """Test ``evidence`` for drift against the baseline; with drift collect anew, from the change on.

        The baseline is the best that was seen: evidence that is surely better takes its place.
        """
        assert self._baseline is not None
        baseline, running = self._baseline, self._newest_loss(evidence, round_)
        result = drift(baseline, running, self.config.watch)
        if result.fired:
            self._restart(int(evidence.spans[result.begin, 0]))
            self._lost, self._refuted = baseline, True
            changed = evidence.select(np.flatnonzero(evidence.spans[:, 0] >= self._since_ns))
            if back := self._return(changed, round_):
                return dataclasses.replace(back, drift=result, text=f"drift ({result.words}): {back.text}")
        elif drift(running, baseline, self.config.watch).fired:
            self._baseline = running
        verdict = "drift: collecting anew" if result.fired else "watching: no drift"
        return self._report(evidence, f"{verdict} ({result.words})", drift=result)

    def _return(self, evidence: Evidence, round_: Round) -> StageReport | None:
        """Bring back a token that was in use before and explains the ``evidence`` since the change, if there is one."""
        assert self._lost is not None and self.policy.e_token is not None
        earlier = [self.policy.e_token, *(entry.token for entry in self.history.entries[:-1])]
        others = [self._tensor(token) for token in earlier if not np.array_equal(token.data, self.token.data)]
        if not others:
            return None
        try:
            data, _ = self._stages(round_).prepare(evidence)
            found = find_return(
                self._scorer, data, evidence.spans, self._tensor(self.token), others, self._lost,
                self._trusted, self._references, self.config, seed=round_.seed(5),
                budget=round_.clock.stage(self.config.guard.budget_ms),
            )  # fmt: skip
        except OutOfTimeError:
            return None
        if found is None:
            return None
        self.history.accept(found.token.cpu().numpy(), round_.now_ns, found.verdict.after)
        self._lost, self._shadow, self._refuted = None, None, False
        return self._report(evidence, f"back to an earlier token: {found.verdict.reason}", returned=found.verdict)

    # ---------------------------------------------------------------- what the stages need

    def _round(self, now_ns: int, should_stop: Callable[[], bool] | None = None) -> Round:
        return Round(now_ns, RoundClock(self._clock, should_stop), self._seed)

    def _stages(self, round_: Round) -> Stages:
        return Stages(self._scorer, self._trusted, self.config, round_)

    def _limits(self, found: Identification) -> Guard:
        """The guard's, its margins as the module says."""
        guard = self.config.guard
        if self._unproven:
            return dataclasses.replace(guard, sigmas=guard.sigmas / 2, margin=0.0, inverse_margin=0.0)
        same_body = found.margin == 0 and len(self._trusted.names) > 1
        factor = 2 if same_body else 1
        return dataclasses.replace(guard, margin=factor * guard.margin, inverse_margin=factor * guard.inverse_margin)

    def _newest_loss(self, evidence: Evidence, round_: Round) -> RunningLoss:
        prepared, _ = self._stages(round_).prepare(evidence)
        return self._running_loss(prepared, evidence.spans, round_)

    def _running_loss(self, data: Prepared, spans: np.ndarray, round_: Round) -> RunningLoss:
        """Of the token in use on ``data`` at ``spans`` (B, 2) ns.

        Raises:
            OutOfTimeError: it had to stop before it had any.
        """
        return running_loss(
            self._scorer, data, spans, self._tensor(self.token), self._references, self.config.watch,
            seed=round_.seed(4), budget=round_.clock.stage(self.config.watch.budget_ms),
        )  # fmt: skip

    # ---------------------------------------------------------------- small things

    def _look_at_the_clock(self, now_ns: int) -> None:
        """What the caller said before is what ``now_ns`` is compared with: transitions bear the stamps of the robot's
        own clock, which may be ahead.
        """
        if now_ns < self._now_ns:  # time jumped back: a new run or a replay from its start
            self._restart(now_ns)
        self._now_ns = now_ns

    def _rest(self, since_ns: int) -> None:
        """Watch from ``since_ns`` on, for a change from what is seen first."""
        self._restart(since_ns)
        self._state, self._now_ns = State.WATCH, since_ns

    def _restart(self, since_ns: int) -> None:
        """Collect from ``since_ns`` on."""
        self._state, self._since_ns, self._oldest_ns = State.COLLECT, since_ns, since_ns
        self._undecided, self._unproven, self._judged_ns = 0, False, since_ns
        self._baseline: RunningLoss | None = None
        self._lost: RunningLoss | None = None  # the baseline that a drift has left; until an attempt
        self._refuted = False  # the token in use, by a drift; until there is another one or it rests
        self._watched_ns = since_ns
        self._shadow: Shadow | None = None  # fitted, not judged yet

    def _evidence(self, batch: TransitionBatch) -> Evidence:
        """What is usable of ``batch``, by the time it begins."""
        times = spans(batch)
        rows = np.argsort(times[:, 0], kind="stable")
        rows = rows[times[rows, 0] >= self._since_ns]
        usable, left_out = screen(self.policy, batch.select(rows), self._joints, self.config.collect)
        return Evidence(usable, spans(usable), left_out)

    def _report(self, evidence: Evidence, text: str, **numbers: object) -> StageReport:
        text = "; ".join([text, *evidence.left_out])
        return StageReport(self._state, text, self.token, len(evidence.batch), evidence.left_out, **numbers)

    def _steps(self, duration_ns: int) -> float:
        """In control steps."""
        return duration_ns / 1e9 / self.policy.dt

    def _tensor(self, token: EToken) -> Tensor:
        return torch.from_numpy(np.array(token.data, np.float32)).to(self.policy.dim_mask.device)


def _frame_limits(config: AlignConfig) -> tuple[int, int]:
    """Bytes, and frames: the two of every transition that may be looked at again."""
    transitions = config.collect.memory + config.collect.guard_count + config.watch.count
    return config.frame_cache_mib * 2**20, 2 * transitions
