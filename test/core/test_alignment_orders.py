"""What others order of the self-aligner: another token, an earlier one, or to forget what it has seen."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from test_alignment_machine import CONFIG, aligner_of, attempts, live, snapshot
from toy_bodies import BODIES, Robot, Trained

from selfalign_core.alignment import State
from selfalign_core.alignment.config import Guard
from selfalign_core.alignment.history import History
from selfalign_core.errors import InputError


def test_rollback_restores_the_token_before_and_keeps_it_until_drift_or_told(toy: Trained) -> None:
    aligner, robot = aligner_of(toy), Robot(BODIES[5])
    while not aligner.token.version:
        live(aligner, robot, 1)
    token = aligner.rollback(robot.now_ns)
    assert token.data.tobytes() == toy.bank[0].tobytes()
    assert (token.version, aligner.token.version) == (2, 2)
    assert (aligner.state, aligner.since_ns) == (State.WATCH, robot.now_ns)
    with pytest.raises(InputError, match="no earlier"):
        aligner.rollback(robot.now_ns)
    reports = live(aligner, robot, 25)  # though another token fits better
    assert not attempts(reports) and aligner.state is State.WATCH and aligner.token is token
    assert "transitions are the baseline" in next(r.text for r in reports if "of 12" not in r.text)
    assert reports[-1].text.startswith("watching: no drift")
    aligner.align_now()
    assert any(r.accepted for r in live(aligner, robot, 4))


def test_after_a_rollback_a_change_of_the_body_is_followed(toy: Trained) -> None:
    aligner, robot = aligner_of(toy), Robot(BODIES[5])
    while not aligner.token.version:
        live(aligner, robot, 1)
    robot.body = BODIES[0]
    aligner.rollback(robot.now_ns)  # to the token of this body
    live(aligner, robot, 10)
    robot.body = BODIES[7]
    reports = live(aligner, robot, 20)
    assert sum(r.drift is not None and r.drift.fired for r in reports) == 1
    assert any(r.accepted for r in reports)


def test_it_goes_on_from_the_token_in_use(toy: Trained) -> None:
    aligner = aligner_of(toy)
    ahead = dataclasses.replace(aligner.token, data=toy.bank[5].copy(), version=7)
    aligner.use(ahead, 123)
    assert (aligner.token.version, aligner.since_ns) == (7, 123)
    for change, message in (
        ({"model_digest": "0" * 64}, "digest"),
        ({"data": ahead.data * np.nan}, "NaN"),
        ({"data": ahead.data[:, :3]}, "shape"),
    ):
        before = snapshot(aligner)
        with pytest.raises(InputError, match=message):
            aligner.use(dataclasses.replace(ahead, **change), 456)
        assert snapshot(aligner) == before


def test_a_saved_history_is_gone_on_from(toy: Trained, tmp_path) -> None:
    aligner, robot = aligner_of(toy), Robot(BODIES[5])
    assert any(r.accepted for r in live(aligner, robot, 8))
    aligner.history.save(tmp_path / "toy.safetensors")
    other = aligner_of(toy)
    other.restore(History.load(tmp_path / "toy.safetensors", like=other.token, keep=CONFIG.keep))
    assert other.token.data.tobytes() == aligner.token.data.tobytes()
    assert other.token.version == aligner.token.version
    assert other.rollback(0).data.tobytes() == toy.bank[0].tobytes()


def test_told_to_forget_it_fits_on_what_begins_later_and_has_no_more_attempts_for_it(toy: Trained) -> None:
    undecided = dataclasses.replace(CONFIG, guard=Guard(draws=2, sigmas=1e9))
    aligner, robot, reports = aligner_of(toy, undecided), Robot(BODIES[5]), []
    while not attempts(reports):
        reports += live(aligner, robot, 1)
    aligner.forget(robot.now_ns)
    assert aligner.since_ns == robot.now_ns
    later = live(aligner, robot, 50)
    assert later[0].text == "collecting: 4 of 16 transitions"
    assert len(attempts(later)) == CONFIG.collect.attempts - 1 and aligner.state is State.WATCH
    aligner.forget(0)
    assert aligner.since_ns > 0  # what is forgotten stays so
