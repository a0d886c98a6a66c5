"""Which known token fits: found among all, in spite of bad transitions, as far as the budget reaches."""

from __future__ import annotations

import dataclasses

import torch
from alignment_stages import CONFIG, find, ticking, token_of
from small_models import small_policy
from toy_bodies import BODIES, Trained, transitions_of

from selfalign_core.alignment.trusted import Trusted


def test_every_body_is_identified_among_all(toy: Trained) -> None:
    policy = toy.policy_with_bank()
    for row, body in enumerate(BODIES):
        found = find(policy, transitions_of(body, 20, 100 + row), token_of(toy, (row + 3) % 8))
        assert found.name == f"body {row}"
        assert torch.equal(found.token, token_of(toy, row))
        assert found.margin > 0
        assert list(found.scores.values()) == sorted(found.scores.values())


def test_the_right_token_in_use_is_found_to_be_the_best(toy: Trained) -> None:
    found = find(toy.policy_with_bank(), transitions_of(BODIES[2], 20, 5), token_of(toy, 2))
    assert (found.name, found.margin) == ("current", 0.0)


def test_a_swapped_sign_in_some_transitions_is_outvoted(toy: Trained) -> None:
    batch = transitions_of(BODIES[3], 20, 5)
    actions = batch.actions.copy()
    actions[::5] *= -1
    batch = dataclasses.replace(batch, actions=actions)
    assert find(toy.policy_with_bank(), batch, token_of(toy, 0)).name == "body 3"


def test_a_spent_budget_ends_identification_with_the_best_so_far(toy: Trained) -> None:
    policy, batch = toy.policy_with_bank(), transitions_of(BODIES[3], 20, 5)
    config = dataclasses.replace(CONFIG.identify, first_count=8)
    whole = find(policy, batch, token_of(toy, 0), config=config)
    early = find(policy, batch, token_of(toy, 0), config=config, budget=ticking(70))  # two passes, which are one part
    assert 0 < early.evaluations < whole.evaluations
    assert "budget of 70 ms spent" in early.note
    assert early.name == "body 3"
    nothing = find(policy, batch, token_of(toy, 0), budget=ticking(1))
    assert (nothing.name, nothing.margin, nothing.evaluations) == ("current", 0.0, 0)


def test_a_policy_without_a_bank_still_has_its_deployed_token(toy: Trained) -> None:
    policy = toy.policy_with_bank([4], deployed=4)
    assert Trusted.of(policy).names == ("body 4",)
    assert find(policy, transitions_of(BODIES[4], 20, 5), token_of(toy, 1)).name == "body 4"
    assert Trusted.of(small_policy()).names == ("deployed",)
