"""Which transitions are fit to learn from: a camera that stands still or a number out of this world teaches wrongly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from selfalign_core.alignment.config import Collect
from selfalign_core.policy import Policy
from selfalign_core.robot.types import TransitionBatch


def screen(
    policy: Policy, batch: TransitionBatch, joints: Sequence[str], config: Collect
) -> tuple[TransitionBatch, tuple[str, ...]]:
    """The usable transitions of ``batch``, and in words which were left out.

    Left out are those with a camera whose two images are equal bit for bit although the state changed by
    ``min_motion``, and those with a normalised state or action beyond ``max_value``.
    """
    if not len(batch):
        return batch, ()
    obs, nxt = batch.obs_index, batch.next_index
    states = batch.frame_states
    moved = np.abs(states[nxt] - states[obs]).max(1) >= config.min_motion
    good, words = np.ones(len(batch), bool), []
    for index, camera in enumerate(batch.cameras):
        images = batch.frames[:, index]
        frozen = moved & np.array([np.array_equal(images[i], images[j]) for i, j in zip(obs, nxt, strict=True)])
        if frozen.any():
            words.append(f"camera {camera!r} stood still in {frozen.sum()} transitions while the robot moved")
        good &= ~frozen
    for what, values in (
        ("state", np.maximum(*(np.abs(policy.codec.state_to_model(states[i]).cpu().numpy()) for i in (obs, nxt)))),
        ("action", np.abs(policy.codec.actions_to_model(batch.actions, states[obs]).cpu().numpy()).max(1)),
    ):
        values = values[:, : len(joints)]
        bad = ~(values.max(1) <= config.max_value)
        if bad.any():
            joint = joints[int(values[bad].max(0).argmax())]
            words.append(
                f"{what} of {joint} up to {values[bad].max():.3g} times its training scale in {bad.sum()} transitions, "
                f"expected at most {config.max_value:g}"
            )
        good &= ~bad
    return (batch if good.all() else batch.select(np.flatnonzero(good))), tuple(words)
