"""Whether recent motion can tell one body from another. Transitions in which nothing moves teach nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from selfalign_core.alignment.config import Collect
from selfalign_core.robot.types import TransitionBatch


@dataclass(frozen=True)
class Excitation:
    """Standard deviations over transitions, per joint in the robot's units: of the commanded and the real change.

    Of the transitions that are fitted. ``missing``: in words, what is below the requirement; empty if all suffices.
    """

    joints: tuple[str, ...]
    command: tuple[float, ...]
    motion: tuple[float, ...]
    missing: tuple[str, ...]

    @property
    def enough(self) -> bool:
        return not self.missing


def with_newer(found: Excitation, newer: TransitionBatch, config: Collect) -> Excitation:
    """``found`` in what is fitted; of the ``newer`` it is judged by, which shall only tell two tokens apart, is
    required that a joint moves.
    """
    missing = _stillness(measure_excitation(newer, found.joints, config).motion, config)
    return dataclasses.replace(found, missing=(*found.missing, *(f"of late {words}" for words in missing)))


def measure_excitation(batch: TransitionBatch, joints: Sequence[str], config: Collect) -> Excitation:
    """Spread of what was commanded (last action minus state at t) and of what happened (state at t+k minus at t).

    Every joint has to be commanded; one that does not obey still tells something, but if no joint obeys at all, the
    states are not this robot's. State and action need equal sizes, one value per joint; otherwise each action and
    each state is measured by itself.
    """
    state, then = batch.frame_states[batch.obs_index], batch.frame_states[batch.next_index]
    last = batch.actions[:, -1]
    commanded = last - state if last.shape == state.shape else last
    command = commanded.std(0, dtype=np.float64) if len(batch) else np.zeros(commanded.shape[1])
    motion = (then - state).std(0, dtype=np.float64) if len(batch) else np.zeros(state.shape[1])
    names = tuple(joints) if len(joints) == len(command) else tuple(f"action {i}" for i in range(len(command)))
    missing = [
        f"{name} was commanded over {spread:.3f}, expected at least {config.min_command:.3f}"
        for name, spread in zip(names, command, strict=True)
        if spread < config.min_command
    ]
    missing += _stillness(motion.tolist(), config)
    return Excitation(names, tuple(command.tolist()), tuple(motion.tolist()), tuple(missing))


def _stillness(motion: Sequence[float], config: Collect) -> list[str]:
    """In words that no joint moved, if so."""
    most = max(motion, default=0.0)
    return [f"no joint moved by more than {most:.3f}, expected {config.min_motion:.3f}"] * (most < config.min_motion)
