"""Whatever the self-aligner is fed and told, in any order: what its phases promise. The model's word is made up."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from toy_bodies import STEP_NS, untrained_policy

from selfalign_core.alignment import AlignConfig, SelfAligner, StageReport, State, phases
from selfalign_core.alignment.budget import OutOfTimeError
from selfalign_core.alignment.config import Collect, Guard, Watch
from selfalign_core.alignment.evidence import Evidence
from selfalign_core.alignment.excitation import Excitation
from selfalign_core.alignment.guard import Verdict
from selfalign_core.alignment.identify import Identification
from selfalign_core.alignment.overlap import Estimate
from selfalign_core.alignment.phases import Fitted, Standing
from selfalign_core.alignment.refine import Refinement
from selfalign_core.alignment.reports import Attempt, Found
from selfalign_core.alignment.scoring import AlignLosses
from selfalign_core.alignment.stages import Shadow, Stages
from selfalign_core.alignment.watch import RunningLoss
from selfalign_core.errors import InputError
from selfalign_core.policy import Policy
from selfalign_core.robot.types import TransitionBatch

CONFIG = AlignConfig(
    collect=Collect(fit_count=6, guard_count=4, stride=3, min_stride=1, attempts=3, memory=12),
    watch=Watch(count=5),
    keep=3,
)
LOSSES = AlignLosses(1.0, 1.0, 1.0, 1.0)
HORIZON_NS = 2 * STEP_NS


@dataclass(frozen=True)
class Word:
    """What the model says in one round, and for which stages the time does not suffice."""

    loss: float = 0.0  # of the token in use
    changed_rows: int = 1  # since when it has been so, of the newest transitions
    jumps: bool = False  # another token fits better than the one in use
    accepted: bool = False
    promising: bool = False
    returns: bool = False
    slow: frozenset[str] = frozenset()


words = st.builds(
    Word,
    loss=st.sampled_from([0.0, 0.0, 0.0, 5.0, -5.0]),
    changed_rows=st.integers(1, 5),
    jumps=st.booleans(),
    accepted=st.booleans(),
    promising=st.booleans(),
    returns=st.booleans(),
    slow=st.sampled_from([frozenset(), frozenset(), frozenset(), {"fit"}, {"judge"}, {"loss"}]).map(frozenset),
)


class Spoken(Stages):
    """Stages that repeat a word, and look at what they are given."""

    def __init__(self, real: Stages, word: Word, since_ns: int, judged_ns: int):
        self.token, self.round, self._earlier = real.token, real.round, real._earlier
        self._word, self._since_ns, self._judged_ns = word, since_ns, judged_ns
        self.judged: np.ndarray | None = None
        self.known = [token.data.tobytes() for token in (real.token, *real._earlier)]

    def fit(self, evidence: Evidence, excitation: Excitation) -> Shadow:
        self._take("fit", evidence)
        found = Identification(self._new(1), "body", {}, float(self._word.jumps), 1, "")
        begin_ns, end_ns = int(evidence.spans[:, 0].min()), int(evidence.spans[:, 1].max())
        refined = Refinement(self._new(2), 1, 1.0, "")
        return Shadow(
            found, refined, excitation, len(evidence), begin_ns, end_ns, self.round.now_ns, LOSSES, LOSSES, {}
        )

    def judge(self, shadow: Shadow, evidence: Evidence, limits: Guard, *, inverse: bool) -> Attempt:
        self._take("judge", evidence)
        assert evidence.spans[:, 0].min() >= shadow.end_ns and shadow.begin_ns >= self._since_ns
        assert evidence.spans[:, 0].min() >= self._judged_ns
        self.judged, word = evidence.spans, self._word
        verdict = Verdict(word.accepted, "by word", after=0.5, promising=word.promising)
        count, found, refined = len(evidence), shadow.identification, shadow.refinement
        return Attempt(found, refined, verdict, shadow.count, count, LOSSES, LOSSES, LOSSES, LOSSES, {})

    def running_loss(self, evidence: Evidence) -> RunningLoss:
        self._take("loss", evidence)
        series = np.full(len(evidence), 0.0 if self._word.loss > 0 else self._word.loss)
        series[-self._word.changed_rows :] = self._word.loss
        level = Estimate(self._word.loss, 0.1, len(evidence))
        return RunningLoss(level, level, series)

    def find_return(self, evidence: Evidence, lost: RunningLoss) -> Found | None:
        self._take("return", evidence)
        return Found(self._new(3), Verdict(True, "by word", after=0.5)) if self._word.returns else None

    def _take(self, stage: str, evidence: Evidence) -> None:
        assert len(evidence) and evidence.spans[:, 0].min() >= self._since_ns
        if stage in self._word.slow:
            raise OutOfTimeError("asked to stop")

    def _new(self, number: int) -> torch.Tensor:
        return torch.full(self.token.data.shape, float(number + 4 * self.token.version))


class Aligner(SelfAligner):
    """With the model's word in place of the model."""

    word, judged_ns = Word(), phases.BEGINNING_NS
    spoken: Spoken

    def _stages(self, now_ns, should_stop=None) -> Spoken:
        self.spoken = Spoken(super()._stages(now_ns), self.word, self.since_ns, self.judged_ns)
        return self.spoken


class Orders(RuleBasedStateMachine):
    """A robot that moves or does not, a model that says anything, a clock that jumps, and people who order."""

    policy: Policy

    @initialize(now_ns=st.integers(10**13, 10**14))
    def begin(self, now_ns: int) -> None:
        self.aligner, self.now_ns = Aligner(self.policy, CONFIG, joints=("slider",)), now_ns
        self.own = self.aligner.token.data.tobytes()
        self.recorded: list[tuple[int, float, float]] = []  # when it begins, the state then and the state after it
        self.version = self.in_a_row = 0
        self.refuted, self.floor_ns = False, phases.BEGINNING_NS
        self.advance = phases.advance
        self.patch = patch.object(phases, "advance", self.advance_twice)
        self.patch.start()

    def teardown(self) -> None:
        if hasattr(self, "patch"):
            self.patch.stop()

    def advance_twice(self, now, evidence, stages, rules):
        """Same inputs, same outputs, and nothing of the inputs is changed."""
        before, rows = repr(now), repr(evidence)
        first, second = (self.advance(now, evidence, stages, rules) for _ in range(2))
        assert repr(first) == repr(second) and (repr(now), repr(evidence)) == (before, rows)
        return first

    # ---------------------------------------------------------------- what happens

    @rule(words=st.lists(words, min_size=1, max_size=12), count=st.integers(3, 10), gap=st.integers(1, 3))
    def live(self, words: list[Word], count: int, gap: int) -> None:
        """Move a little and advance, again and again."""
        for word in words:
            self.move(count, True, gap, False)
            self.look(word, 99)

    @rule(count=st.integers(1, 15), lively=st.booleans(), gap=st.integers(1, 4), odd=st.booleans())
    def move(self, count: int, lively: bool, gap: int, odd: bool) -> None:
        rng = np.random.default_rng(self.now_ns)
        for _ in range(count):
            state, then = rng.uniform(-1, 1, 2) if lively else (0.1, 0.1)
            self.recorded.append((self.now_ns, 1e4 if odd and rng.random() < 0.5 else state, then))
            self.now_ns += gap * STEP_NS
        self.now_ns += HORIZON_NS

    @rule(word=words, count=st.integers(0, 20), stale=st.booleans())
    def look(self, word: Word, count: int, stale: bool = False) -> None:
        """``stale``: what is handed in was asked for before the last order."""
        aligner, wanted = self.aligner, self.aligner.request(self.now_ns)
        aligner.word = word
        rows = [
            row for row in self.recorded if (stale or row[0] >= wanted.since_ns) and row[0] + HORIZON_NS <= self.now_ns
        ]
        rows = rows[-wanted.count :][-count - 1 :]
        if len(rows) < wanted.least:
            self.check(aligner.short_of(len(rows), self.now_ns))
            return
        report = aligner.advance(batch_of(rows), self.now_ns)
        spoken = aligner.spoken
        assert self.own in spoken.known
        if report.attempt is not None:
            assert spoken.judged is not None
            aligner.judged_ns = int(spoken.judged[:, 1].max())
        self.check(report)

    def check(self, report: StageReport) -> None:
        aligner, situation = self.aligner, self.aligner.situation
        assert (report.token, report.state) == (aligner.token, situation.state)
        self.version += report.accepted
        if report.drifted:
            self.refuted, self.in_a_row = not report.accepted, 0
            assert self.floor_ns <= aligner.since_ns <= self.now_ns
            self.floor_ns = aligner.judged_ns = aligner.since_ns
        if report.returned is not None:
            self.refuted, self.in_a_row = False, 0
            assert situation.standing is Standing.PROVEN
        if (attempt := report.attempt) is None:
            return
        assert not isinstance(situation.phase, Fitted)
        if attempt.verdict.accepted:
            self.in_a_row, self.refuted = 0, False
            assert report.state is State.COLLECT  # it tries to improve further
        elif not (attempt.undecided or situation.standing is Standing.UNPROVEN):
            assert report.state is State.WATCH  # refused
        else:
            self.in_a_row += 1
            assert (report.state is State.WATCH) == (self.in_a_row == aligner.config.collect.attempts)
        if report.state is State.WATCH:
            self.in_a_row, self.refuted = 0, False
            assert (situation.baseline is None) == ("loss" in aligner.word.slow)

    @rule(seconds=st.integers(1, 100))
    def jump_back(self, seconds: int) -> None:
        self.now_ns -= seconds * 10**9
        jumped = self.now_ns < self.aligner.situation.now_ns  # since it looked at the clock
        self.check(self.aligner.short_of(0, self.now_ns))
        if jumped:
            self.anew(self.now_ns)

    # ---------------------------------------------------------------- what is ordered

    def anew(self, since_ns: int) -> None:
        self.refuted, self.in_a_row, self.floor_ns, self.aligner.judged_ns = False, 0, since_ns, since_ns
        assert self.aligner.since_ns == since_ns

    @rule(order=st.sampled_from(["align_now", "use", "restore", "rollback", "reset"]))
    def order(self, order: str) -> None:
        getattr(self, order)()

    def align_now(self) -> None:
        self.aligner.align_now()
        self.in_a_row = 0
        assert self.aligner.state is State.COLLECT

    @rule(back_s=st.integers(0, 5))
    def forget(self, back_s: int) -> None:
        self.floor_ns = max(self.floor_ns, self.now_ns - back_s * 10**9)
        self.aligner.forget(self.now_ns - back_s * 10**9)
        assert not isinstance(self.aligner.situation.phase, Fitted)

    @rule(weight=st.sampled_from([1.0, 3.0]), sigmas=st.sampled_from([2.0, 3.0]))
    def configure(self, weight: float, sigmas: float) -> None:
        anew = weight != self.aligner.config.lambda_inv
        guard = dataclasses.replace(CONFIG.guard, sigmas=sigmas)
        self.aligner.configure(dataclasses.replace(CONFIG, lambda_inv=weight, guard=guard))
        if anew:  # no loss compares with an earlier one
            self.in_a_row = 0
            assert self.aligner.state is State.COLLECT and not isinstance(self.aligner.situation.phase, Fitted)

    def use(self) -> None:
        token = self.aligner.token
        self.version += 2
        data = np.full_like(token.data, self.version)
        self.aligner.use(dataclasses.replace(token, data=data, version=self.version), self.now_ns)
        self.anew(self.now_ns)

    def restore(self) -> None:
        self.aligner.restore(self.aligner.history)
        self.anew(phases.BEGINNING_NS)

    def rollback(self) -> None:
        entries = self.aligner.history.entries
        if len(entries) < 2:
            with pytest.raises(InputError, match="no earlier"):
                self.aligner.rollback(self.now_ns)
            return
        assert self.aligner.rollback(self.now_ns).data is entries[-2].token.data
        self.kept()

    def reset(self) -> None:
        if self.aligner.token.data.tobytes() == self.own:
            with pytest.raises(InputError, match="own token in use"):
                self.aligner.reset(self.now_ns)
            return
        assert self.aligner.reset(self.now_ns).data.tobytes() == self.own
        self.kept()

    def kept(self) -> None:
        """An earlier token is in use again because somebody wants it."""
        self.version += 1
        self.anew(self.now_ns)
        assert (self.aligner.state, self.aligner.situation.baseline) == (State.WATCH, None)

    # ---------------------------------------------------------------- what always holds

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "aligner"):
            return
        aligner, situation = self.aligner, self.aligner.situation
        assert aligner.token.version == self.version
        assert (situation.standing is Standing.REFUTED) == self.refuted
        assert aligner.since_ns == self.floor_ns
        assert 1 <= len(aligner.history.entries) <= CONFIG.keep
        wanted = aligner.request(self.now_ns)
        collect = aligner.config.collect
        assert collect.min_stride <= wanted.stride <= collect.stride and wanted.least <= wanted.count
        if aligner.state is State.WATCH:
            assert situation.standing is not Standing.REFUTED


def batch_of(rows: list[tuple[int, float, float]]) -> TransitionBatch:
    """Two frames for every transition, none like another."""
    count = len(rows)
    begin = np.array([row[0] for row in rows], np.int64).reshape(count)
    states = np.array([row[1:] for row in rows], np.float32).reshape(count, 2)
    frames = np.arange(2 * count, dtype=np.uint8)[:, None, None, None, None]
    actions = np.repeat(states[:, 1, None, None], 2, axis=1)
    return TransitionBatch(
        cameras=("front",),
        frames=np.broadcast_to(frames, (2 * count, 1, 28, 28, 3)),
        frame_states=np.concatenate([states[:, 0], states[:, 1]])[:, None],
        frame_stamps=np.concatenate([begin, begin + HORIZON_NS]),
        obs_index=np.arange(count),
        next_index=np.arange(count, 2 * count),
        actions=actions,
    )


def test_whatever_is_seen_and_ordered_the_phases_keep_their_promises() -> None:
    class Ordered(Orders):
        policy = untrained_policy()

    run_state_machine_as_test(Ordered, settings=settings(max_examples=60, stateful_step_count=25))
