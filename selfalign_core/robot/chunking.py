"""Handing over from one action chunk to the next without a jerk: which method, from which action on, towards what.

The next chunk is computed while the current one runs, so its first ``delay`` actions are past when it takes over, and
it does not quite agree with the chunk that it takes over from. Four methods:

- ``prefix``: the actions that will be past are given to the model, clean, and the rest is denoised around them
  (training-time real-time chunking, arXiv 2512.05964); for models trained with ``rtc_max_delay`` above 0.
- ``guidance``: the denoising of any model is drawn towards the current chunk, the less the later the action
  (inference-time real-time chunking, arXiv 2506.07339), and what difference remains is faded out; costs a backward
  pass per denoising step.
- ``blend``: sampled freely, and the difference faded out.
- ``none``: sampled freely.

Numpy only. Knows nothing of models or ROS; :meth:`selfalign_core.policy.Policy.infer` does what is said here.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from selfalign_core.errors import ConfigError, InputError
from selfalign_core.robot.types import ActionChunk

METHODS = ("prefix", "guidance", "blend", "none")
AUTO = "auto"
FADE_S = 0.25
"""How long a difference between two chunks is faded out: longer is smoother, and later to act on what is new."""


def choose_method(wanted: str, rtc_max_delay: int) -> str:
    """The method for a checkpoint; ``auto``: ``prefix`` where it was trained for that, else ``blend``.

    Raises:
        ConfigError: no such method, or ``prefix`` for a checkpoint that was not trained for it.
    """
    if wanted == AUTO:
        return "prefix" if rtc_max_delay else "blend"
    if wanted not in METHODS:
        raise ConfigError(f"chunk_handover: found {wanted!r}, expected one of {', '.join((AUTO, *METHODS))}")
    if wanted == "prefix" and not rtc_max_delay:
        raise ConfigError(
            "chunk_handover: found prefix, expected another method: the checkpoint was not trained to be given a "
            "chunk's first actions (rtc_max_delay is 0 in its config)"
        )
    return wanted


@dataclass(frozen=True)
class Handover:
    """What the next chunk takes over from.

    ``method``: one of ``METHODS``. ``previous``: (..., n, action_dim) actions of the current chunk at the times of the
    next one's first n, contract units; 1 <= n <= horizon. ``delay``: how many of them will be due by the time the next
    chunk is ready. ``fade``: over how many actions after those a difference is faded out.
    """

    method: str
    previous: np.ndarray
    delay: int
    fade: int

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"Handover.method: found {self.method!r}, expected one of {', '.join(METHODS)}")
        if self.previous.ndim < 2 or not 0 <= self.delay <= self.overlap or not self.overlap:
            raise InputError(
                f"Handover: found previous actions of shape {self.previous.shape} and a delay of {self.delay}, "
                "expected (..., n, action_dim) with n >= 1, and a delay in 0..n"
            )

    @property
    def overlap(self) -> int:
        """Actions that both chunks have."""
        return self.previous.shape[-2]

    @classmethod
    def plan(
        cls, method: str, current: ActionChunk | None, *, stamp_ns: int, dt_ns: int, delay: int, rtc_max_delay: int = 0
    ) -> Handover | None:
        """For a chunk whose first action is due at ``stamp_ns``; None where there is nothing to take over from.

        A ``delay`` [control steps] beyond what the model was trained for (``rtc_max_delay``) is left to ``blend``.
        """
        previous = None if current is None else actions_at(current, stamp_ns, dt_ns)
        if method == "none" or previous is None:
            return None
        if method == "prefix" and delay > rtc_max_delay:
            method = "blend"
        return cls(method, previous, min(delay, len(previous)), fade=round(FADE_S * 1e9 / dt_ns))

    @classmethod
    def rehearsal(cls, method: str, pose: np.ndarray, horizon: int, rtc_max_delay: int) -> list[Handover]:
        """Hand-overs from resting in ``pose`` (action_dim,), one of each kind that the model will meet, to warm it up:
        the number of given actions counts.
        """
        delays = range(1, rtc_max_delay + 1) if method == "prefix" else range(1, 2)
        return [cls(method, np.tile(pose, (horizon, 1)), delay, fade=0) for delay in delays]

    def weights(self, horizon: int) -> np.ndarray:
        """(horizon,) float32 in 0..1: how much each action is drawn to ``previous``, eq. 5 of arXiv 2506.07339.

        1 for those that will be past, falling exponentially to 0 over those that both chunks have.
        """
        index = np.arange(horizon)
        falling = np.clip((self.overlap - index) / (self.overlap - self.delay + 1), 0.0, 1.0)
        soft = falling * np.expm1(falling) / np.expm1(1.0)
        return np.where(index < self.delay, 1.0, soft).astype(np.float32)

    def join(self, actions: np.ndarray) -> np.ndarray:
        """``actions`` (..., horizon, action_dim) as sampled, made to begin with the current chunk's.

        The first ``delay`` are the current chunk's, exactly; after them its difference to ``actions`` is faded out
        (``prefix`` leaves none). Past the current chunk's end the difference is that at its end.
        """
        if self.method == "none":
            return actions
        joined = actions.copy()
        joined[..., : self.delay, :] = self.previous[..., : self.delay, :]
        if self.method == "prefix":
            return joined
        steps = min(self.fade, actions.shape[-2] - self.delay)
        done = np.arange(1, steps + 1, dtype=actions.dtype) / (steps + 1)  # 0 and 1 are the actions before and after
        left = 1 - done * done * (3 - 2 * done)  # smooth step: no kink at either end
        after = np.arange(self.delay, self.delay + steps)
        compared = np.minimum(after, self.overlap - 1)
        difference = self.previous[..., compared, :] - actions[..., compared, :]
        joined[..., after, :] += left[:, None] * difference
        return joined


def actions_at(chunk: ActionChunk, stamp_ns: int, dt_ns: int) -> np.ndarray | None:
    """(n, action_dim) of ``chunk`` at ``stamp_ns``, ``stamp_ns + dt`` and so on to its end, linearly interpolated.

    None if the chunk is over, or has not begun, by then.
    """
    steps = len(chunk.actions)
    begin, rest_ns = divmod(stamp_ns - chunk.stamp_ns, dt_ns)
    if not 0 <= begin < steps:
        return None
    here = chunk.actions[begin:]
    if not rest_ns:
        return here
    share = np.float32(rest_ns / dt_ns)
    return (1 - share) * here[:-1] + share * here[1:] if len(here) > 1 else None


class DelayEstimate:
    """How late chunks are, from their observation until they can be executed: the longest of the last ``count``.

    A chunk that comes earlier continues the current one up to where it was expected; one that comes later jumps. Hence
    the recent maximum, as in arXiv 2506.07339.
    """

    def __init__(self, count: int = 10) -> None:
        self._delays_ns: deque[int] = deque(maxlen=count)

    def add(self, delay_ns: int) -> None:
        self._delays_ns.append(max(0, delay_ns))

    def steps(self, dt_ns: int) -> int:
        """How many of a chunk's actions will be due by the time it is ready; the first is due at its observation."""
        return max(self._delays_ns, default=0) // dt_ns + 1
