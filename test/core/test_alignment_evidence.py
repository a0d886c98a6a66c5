"""What transitions can tell: enough motion, nothing poisoned, and whether the body is still the same."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from alignment_stages import CONFIG, WEIGHTS, no_limit, token_of
from small_models import random_batch, small_policy
from torch import Tensor
from toy_bodies import BODIES, Trained, recording_of

from selfalign_core.alignment.config import Collect
from selfalign_core.alignment.excitation import measure_excitation
from selfalign_core.alignment.overlap import Estimate, spans
from selfalign_core.alignment.scoring import Scorer
from selfalign_core.alignment.screen import screen
from selfalign_core.alignment.trusted import Trusted
from selfalign_core.alignment.watch import RunningLoss, drift, references, running_loss
from selfalign_core.errors import InputError
from selfalign_core.policy import Policy


@pytest.mark.parametrize(("count", "expected"), [(6, 2.649), (11, 2.284), (21, 2.133), (10**6, 2.0)])
def test_few_values_take_more_standard_errors(count: int, expected: float) -> None:
    # Student's t with count - 1 degrees of freedom at the probability of two standard deviations, 0.97725.
    assert Estimate(1.0, 0.5, count).upper(2.0) == pytest.approx(1.0 + 0.5 * expected, rel=0.01)


def test_a_joint_that_was_not_moved_is_named() -> None:
    policy = small_policy()
    batch, names = random_batch(policy, 8), ("pan", "lift", "elbow")
    enough = measure_excitation(batch, names, Collect())
    assert enough.enough
    assert len(enough.command) == len(enough.motion) == 3
    actions = batch.actions.copy()
    actions[:, -1, 2] = batch.frame_states[batch.obs_index, 2] + 0.3  # a constant command moves nothing
    still = measure_excitation(dataclasses.replace(batch, actions=actions), names, Collect(min_command=0.05))
    assert not still.enough
    assert still.missing == ("elbow was commanded over 0.000, expected at least 0.050",)
    states = np.broadcast_to(batch.frame_states[:1], batch.frame_states.shape)
    frozen = measure_excitation(dataclasses.replace(batch, frame_states=states), names, Collect())
    assert any("no joint moved" in words for words in frozen.missing)


def test_poisoned_transitions_are_left_out_by_name() -> None:
    policy = small_policy()
    batch, names = random_batch(policy, 8), ("pan", "lift", "elbow")
    same, words = screen(policy, batch, names, Collect())
    assert (len(same), words) == (8, ())
    frames, states, actions = batch.frames.copy(), batch.frame_states.copy(), batch.actions.copy()
    frames[2, 1] = frames[1, 1]
    states[5, 2] = 1e6
    actions[7, 1, 0] = -80.0
    poisoned = dataclasses.replace(batch, frames=frames, frame_states=states, actions=actions)
    usable, words = screen(policy, poisoned, names, Collect())
    kept = [0, 2, 3, 6]  # 1 → 2 stands still; frame 5 ends transition 4 and begins 5; action of 7
    np.testing.assert_array_equal(usable.actions, actions[kept])
    assert len(words) == 3
    for part in ("camera 'wrist' stood still in 1 transitions", "state of elbow up to 1e+06", "action of pan up to 80"):
        assert any(part in w for w in words), (part, words)


@pytest.mark.parametrize("field", ["frame_states", "actions"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_batch_with_nan_is_refused_by_name(field: str, value: float) -> None:
    policy = small_policy()
    batch = random_batch(policy, 4)
    getattr(batch, field)[-1] = value
    with pytest.raises(InputError, match=rf"transitions\.{field}: found NaN or infinity"):
        Scorer(policy, WEIGHTS).check(batch)


def test_a_batch_of_the_wrong_shape_is_refused_by_name() -> None:
    policy = small_policy()
    good = random_batch(policy, 4)
    for change, message in (
        ({"frames": good.frames[:, :, :14]}, r"transitions\.frames: pixels: found \(14, 28\), expected \(28, 28\)"),
        ({"frame_states": good.frame_states[:, :2]}, r"frame_states: values: found \(2,\), expected \(3,\)"),
        ({"actions": good.actions[:, :, :2]}, r"actions: values: found \(3, 2\), expected \(3, 3\)"),
        ({"actions": good.actions[:, :2]}, r"actions: values: found \(2, 3\), expected \(3, 3\)"),
        ({"cameras": ("front", "left")}, r"found cameras \('front', 'left'\), expected \['wrist'\] too"),
    ):
        with pytest.raises(InputError, match=message):
            Scorer(policy, WEIGHTS).check(dataclasses.replace(good, **change))


# ---------------------------------------------------------------- drift


def running(policy: Policy, body: tuple[float, float], token: Tensor, seed: int, scale: float = 1.0):
    scorer, batch = Scorer(policy, WEIGHTS), recording_of(body, 6, seed, scale=scale)
    others = references(Trusted.of(policy), CONFIG.watch.references)
    data = scorer.prepare(batch)
    return running_loss(scorer, data, spans(batch), token, others, CONFIG.watch, seed=seed, budget=no_limit())


@pytest.mark.parametrize("rows", [list(range(8)), [0]], ids=["bank", "bank of one"])
def test_another_body_is_noticed(toy: Trained, rows: list[int]) -> None:
    policy, token = toy.policy_with_bank(rows), token_of(toy, 0)
    baseline = running(policy, BODIES[0], token, 1)
    for row in (1, 5, 6):
        assert drift(baseline, running(policy, BODIES[row], token, row), CONFIG.watch).fired, row


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.1])
def test_other_motion_of_the_same_body_is_no_drift(toy: Trained, scale: float) -> None:
    policy, fired = toy.policy_with_bank(), 0
    for row, body in enumerate(BODIES):
        baseline = running(policy, body, token_of(toy, row), 1)
        fired += drift(baseline, running(policy, body, token_of(toy, row), 20 + row, scale), CONFIG.watch).fired
        lively = running(policy, body, token_of(toy, row), 40 + row)
        fired += drift(running(policy, body, token_of(toy, row), 60 + row, scale), lively, CONFIG.watch).fired
    assert fired <= 1


@pytest.mark.parametrize("left", [2, 5])
def test_the_begin_of_a_change_is_found(toy: Trained, left: int) -> None:
    policy, token = toy.policy_with_bank(), token_of(toy, 0)
    baseline = running(policy, BODIES[0], token, 1)
    for row in (1, 5, 6):
        before, after = (running(policy, body, token, 7 + row).series for body in (BODIES[0], BODIES[row]))
        newest = RunningLoss(baseline.plain, baseline.relative, np.concatenate([before[:left], after[left:]]))
        changed = running(policy, BODIES[row], token, 7 + row)
        found, whole = (drift(baseline, one, CONFIG.watch) for one in (newest, changed))
        assert abs(found.begin - left) <= 3, row
        assert found.factor < found.factor_since  # what came before the change says nothing of its size
        assert found.factor_since == pytest.approx(whole.factor, rel=0.5)
