"""The self-aligner: from recent transitions to a better E-Token, or to none.

The caller hands in transitions and the time, and publishes what is accepted. What is done when, :mod:`phases` says;
this knows the policy, the tokens and what the next round begins with. Knows neither ROS nor files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from selfalign_core.alignment import phases
from selfalign_core.alignment.budget import Clock, OutOfTimeError, Round
from selfalign_core.alignment.config import AlignConfig
from selfalign_core.alignment.evidence import Evidence
from selfalign_core.alignment.frame_cache import FrameCache
from selfalign_core.alignment.guard import judge
from selfalign_core.alignment.history import Accepted, History
from selfalign_core.alignment.overlap import spans
from selfalign_core.alignment.phases import BEGINNING_NS, Collecting, Request, Rules, Situation, Watching
from selfalign_core.alignment.refine import refine
from selfalign_core.alignment.reports import StageReport, State
from selfalign_core.alignment.scoring import Scorer
from selfalign_core.alignment.screen import screen
from selfalign_core.alignment.stages import Stages
from selfalign_core.alignment.trusted import Trusted
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
        self._seed, self._clock = seed, clock
        assert policy.e_token is not None
        self._own: EToken = policy.e_token
        self.history = History(Accepted(self._own, 0, math.nan), keep=config.keep)
        self.situation = Situation.new(BEGINNING_NS, BEGINNING_NS)
        self._answered: Request | None = None  # the last request that was, and the newest stamp of what was handed in
        self._known_ns = BEGINNING_NS

    @property
    def token(self) -> EToken:
        """The token in use."""
        return self.history.token

    @property
    def state(self) -> State:
        return self.situation.state

    @property
    def since_ns(self) -> int:
        """Transitions that begin before it are of no use."""
        return self.situation.since_ns

    def request(self, now_ns: int) -> Request:
        """What to hand in to :meth:`advance`; what the same request has brought before is not asked for again."""
        wanted = phases.request(self.situation, now_ns, self._rules)
        if wanted == self._answered and self._known_ns <= now_ns:
            return dataclasses.replace(wanted, newer_than_ns=self._known_ns)
        return wanted

    # ---------------------------------------------------------------- orders from outside

    def configure(self, config: AlignConfig) -> None:
        """Go on with other settings. With other weights no loss compares with an earlier one: it collects anew."""
        old, self.config = self.config, config
        self._frames.limit_bytes, self._frames.limit_frames = _frame_limits(config)
        self._hand_back.limit_ms = config.policy_wait_ms
        if old != config:
            self._answered = None  # with other settings the same transitions may do
        if (old.weights, old.watch.references) != (config.weights, config.watch.references):
            self._scorer = Scorer(self.policy, config.weights, prompt=self._prompt, frames=self._frames)
            self.situation = dataclasses.replace(self.situation, phase=Collecting()).trying()

    def align_now(self) -> None:
        """Leave the rest: collect and try, with the transitions at hand if they are enough."""
        self.situation = self.situation.trying()

    def forget(self, before_ns: int) -> None:
        """Collect from ``before_ns`` on: motion begins that tells more than what has been seen."""
        self.situation = self.situation.forgetting(before_ns)

    def use(self, token: EToken, stamp_ns: int) -> None:
        """Go on from ``token``, for instance the one that the policy uses; its history begins here.

        Raises:
            InputError: the token does not fit the model; nothing is changed.
        """
        self.policy.check_e_token(token)
        self.history = History(Accepted(token, stamp_ns, math.nan), keep=self.config.keep)
        self.situation = Situation.new(stamp_ns, stamp_ns)

    def restore(self, history: History) -> None:
        """Go on from a history that was loaded from a file."""
        self.policy.check_e_token(history.token)
        self.history = history
        self.situation = Situation.new(BEGINNING_NS, self.situation.now_ns)

    def rollback(self, stamp_ns: int) -> EToken:
        """The accepted token before this one is in use again, under a new version, until drift or :meth:`align_now`.

        Raises:
            InputError: there is none.
        """
        return self._keep(self.history.rollback(stamp_ns), stamp_ns)

    def reset(self, stamp_ns: int) -> EToken:
        """The policy's own token is in use again, under a new version, until drift or :meth:`align_now`.

        Can be rolled back.

        Raises:
            InputError: it is in use.
        """
        if np.array_equal(self._own.data, self.token.data):
            raise InputError("reset: found the policy's own token in use, expected another")
        return self._keep(self.history.accept(self._own.data, stamp_ns, math.nan), stamp_ns)

    def _keep(self, token: EToken, since_ns: int) -> EToken:
        """Who orders a token wants it kept: it rests, and what it sees first is the baseline."""
        self.situation = dataclasses.replace(Situation.new(since_ns, since_ns), phase=Watching())
        return token

    # ---------------------------------------------------------------- one round

    def short_of(self, found: int, now_ns: int) -> StageReport:
        """What :meth:`advance` says to ``found`` transitions, fewer than are needed, without a look at them."""
        self.situation, rules = self.situation.at(now_ns), self._rules
        wanted = phases.request(self.situation, now_ns, rules)
        oldest_ns = now_ns - round(((found + 1) * wanted.stride + rules.horizon) * rules.dt * 1e9)
        self.situation = dataclasses.replace(self.situation, oldest_ns=oldest_ns)
        text = f"{self.situation.doing}: {found} of {wanted.least} transitions"
        return StageReport(self.state, text, self.token, found)

    def advance(
        self, batch: TransitionBatch, now_ns: int, *, should_stop: Callable[[], bool] | None = None
    ) -> StageReport:
        """Do what the state and the newest transitions call for, and say what was done.

        Args:
            batch: what was asked for, see :meth:`request`; fewer if there are not so many.
            now_ns: the robot's time.
            should_stop: asked before every pass of the model; True ends the stage as its budget does.

        Raises:
            InputError: the transitions do not fit the policy or hold NaN; nothing is changed.
        """
        self._scorer.check(batch)
        asked, self.situation = self.request(now_ns), self.situation.at(now_ns)
        if 0 < len(batch) < phases.request(self.situation, now_ns, self._rules).count:
            self.situation = dataclasses.replace(self.situation, oldest_ns=int(spans(batch)[:, 0].min()))
        stages = self._stages(now_ns, should_stop)
        self.situation, report = phases.advance(self.situation, self._evidence(batch), stages, self._rules)
        if (found := report.found) is not None:
            token = self.history.accept(found.token.cpu().numpy(), now_ns, found.verdict.after)
            report = dataclasses.replace(report, token=token)
        if len(batch):
            self._answered, self._known_ns = asked, int(batch.frame_stamps.max())
        return report

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
        evidence, stages = Evidence(batch, spans(batch)), self._stages(0)
        one_step = dataclasses.replace(config, refine=dataclasses.replace(config.refine, steps=1))
        with contextlib.suppress(OutOfTimeError):
            data, _ = stages.prepare(evidence)
            fit, guard = data.select(slice(config.collect.fit_count)), slice(config.collect.guard_count)
            budget = stages.round.stage(config.refine.budget_ms)
            shadow = refine(self._scorer, fit, stages.current, self._trusted, one_step, seed=0, budget=budget).token
            guard_data, times, limits = data.select(guard), evidence.spans[guard], config.guard
            budget = stages.round.stage(limits.budget_ms)
            judge(self._scorer, guard_data, times, stages.current, shadow, self._trusted, limits, seed=0, budget=budget)

    # ---------------------------------------------------------------- what a round needs

    @property
    def _rules(self) -> Rules:
        policy = self.policy
        choice = len(self._trusted.names) > 1
        return Rules(self.config, self._joints, policy.dt, policy.transition_horizon, choice)

    def _stages(self, now_ns: int, should_stop: Callable[[], bool] | None = None) -> Stages:
        round_ = Round(now_ns, self._seed, self._clock, should_stop)
        earlier = [self._own, *(entry.token for entry in self.history.entries[:-1])]
        return Stages(self._scorer, self._trusted, self.config, round_, self.token, earlier)

    def _evidence(self, batch: TransitionBatch) -> Evidence:
        """What is usable of ``batch``, by the time it begins."""
        times = spans(batch)
        rows = np.argsort(times[:, 0], kind="stable")
        rows = rows[times[rows, 0] >= self.situation.since_ns]
        usable, left_out = screen(self.policy, batch.select(rows), self._joints, self.config.collect)
        return Evidence(usable, spans(usable), left_out)


def _frame_limits(config: AlignConfig) -> tuple[int, int]:
    """Bytes, and frames: the two of every transition that may be looked at again."""
    transitions = config.collect.memory + config.collect.guard_count + config.watch.count
    return config.frame_cache_mib * 2**20, 2 * transitions
