"""What was said in the graph during one run: heard live, read from a recording, made by a replay. From this one record
come summary, picture and comparison.

Messages are anything with the fields of ROS 2's and selfalign's messages: those of rclpy, those that ``rosbags`` reads.
Must not know either. All stamps are nanoseconds on one clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from selfalign_core.robot.types import token_norm

TASKS = ("perception", "dynamics", "inverse_dynamics")
LOSSES = (*TASKS, "total")
SETS = ("fit_before", "fit_after", "guard_before", "guard_after")
Losses = Mapping[str, Mapping[str, float]]
"""By set, then by loss."""


@dataclass(frozen=True)
class Chunk:
    """One action chunk, (horizon, dim) float32; ``stamp_ns`` is that of its observation."""

    stamp_ns: int
    e_token_version: int
    actions: np.ndarray
    inference_s: float = math.nan
    observation_age_s: float = math.nan

    @property
    def inference(self) -> tuple[float, float]:
        """Start and end of the inference [ns]."""
        start = self.stamp_ns + 1e9 * self.observation_age_s
        return start, start + 1e9 * self.inference_s


@dataclass(frozen=True)
class Token:
    """One E-Token, (peft_num_tokens, width) float32, as it was published."""

    stamp_ns: int
    version: int
    model_digest: str
    data: np.ndarray

    @property
    def norm(self) -> float:
        return token_norm(self.data)


@dataclass(frozen=True)
class AlignRound:
    """One round of the aligner that ended at ``stamp_ns``: the fields of ``AlignReport.msg`` that reports tell of.

    ``losses[set][loss]`` for the names in ``SETS`` and ``LOSSES``. As in the message, what was not measured is 0.
    """

    stamp_ns: int
    state: str = ""
    text: str = ""
    version_before: int = 0
    version_after: int = 0
    e_token_norm: float = 0.0
    transitions: int = 0
    duration: float = 0.0
    drift_tested: bool = False
    drift: bool = False
    drift_factor: float = 0.0
    returned: bool = False
    attempted: bool = False
    accepted: bool = False
    start: str = ""
    steps: int = 0
    attempt_duration: float = 0.0
    difference_mean: float = 0.0
    difference_stderr: float = 0.0
    losses: Losses = field(default_factory=lambda: dict.fromkeys(SETS, dict.fromkeys(LOSSES, 0.0)))

    @property
    def compute_s(self) -> float:
        """Of the attempt, its earlier rounds included, or of the round where there was none."""
        return self.attempt_duration if self.attempted else self.duration


_PLAIN = [one.name for one in fields(AlignRound) if one.name not in ("stamp_ns", "losses")]


@dataclass(frozen=True)
class Status:
    """The last diagnostic status of one name."""

    level: int
    message: str
    values: Mapping[str, str]


@dataclass
class RunRecord:
    """Everything heard in one run, in the order of arrival. Pairs begin with when something was heard."""

    contract: str
    start_ns: int = 0
    end_ns: int = 0
    chunks: list[Chunk] = field(default_factory=list)
    rounds: list[AlignRound] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    frames: dict[str, list[int]] = field(default_factory=dict)  # camera topic -> header stamps
    distances: list[tuple[int, float]] = field(default_factory=list)  # metres
    targets: list[tuple[int, bool]] = field(default_factory=list)  # over, and whether it was reached
    bodies: list[tuple[int, str]] = field(default_factory=list)  # name of the one in force
    statuses: dict[str, Status] = field(default_factory=dict)

    def seconds(self, stamp_ns: float) -> float:
        """Since the run began."""
        return (stamp_ns - self.start_ns) / 1e9

    @property
    def duration_s(self) -> float:
        return self.seconds(self.end_ns)

    @property
    def attempts(self) -> list[AlignRound]:
        """The rounds with an attempt."""
        return [one for one in self.rounds if one.attempted]

    def hear(self, topic: str, message: Any, now_ns: int) -> None:
        """Take in a message on one of ``HEARD`` that arrived at ``now_ns``."""
        _HEARS[topic](self, message, now_ns)

    def _hear_chunk(self, message: Any, _: int) -> None:
        actions = np.array(message.data, np.float32).reshape(message.horizon, message.dim)
        times = message.inference_duration, message.observation_age
        self.chunks.append(Chunk(_stamp_ns(message), message.e_token_version, actions, *times))

    def _hear_token(self, message: Any, _: int) -> None:
        data = np.array(message.data, np.float32).reshape(tuple(map(int, message.shape)))
        self.tokens.append(Token(_stamp_ns(message), message.version, message.model_digest, data))

    def _hear_round(self, message: Any, _: int) -> None:
        losses = {name: {loss: float(getattr(getattr(message, name), loss)) for loss in LOSSES} for name in SETS}
        plain = {name: getattr(message, name) for name in _PLAIN}
        self.rounds.append(AlignRound(_stamp_ns(message), losses=losses, **plain))

    def _hear_distance(self, message: Any, now_ns: int) -> None:
        self.distances.append((now_ns, message.data))

    def _hear_target(self, message: Any, now_ns: int) -> None:
        self.targets.append((now_ns, message.data))

    def _hear_body(self, message: Any, now_ns: int) -> None:
        self.bodies.append((now_ns, message.data))

    def _hear_statuses(self, message: Any, _: int) -> None:
        for status in message.status:
            level = status.level if isinstance(status.level, int) else status.level[0]
            values = {item.key: item.value for item in status.values}
            self.statuses[status.name] = Status(level, status.message, values)


_HEARS = {
    "action_chunk": RunRecord._hear_chunk,
    "e_token": RunRecord._hear_token,
    "align_report": RunRecord._hear_round,
    "distance_to_target": RunRecord._hear_distance,
    "target_reached": RunRecord._hear_target,
    "body": RunRecord._hear_body,
    "/diagnostics": RunRecord._hear_statuses,
}
HEARD: Sequence[str] = tuple(_HEARS)
"""Topics that a record is made of, besides the stamps of the cameras' pictures."""


def _stamp_ns(message: Any) -> int:
    stamp = message.header.stamp
    return stamp.sec * 1_000_000_000 + stamp.nanosec
