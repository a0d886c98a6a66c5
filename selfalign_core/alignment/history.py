"""The last accepted tokens of one robot, in memory and in one file.

The file is an E-Token file (:func:`selfalign_core.policy.token_files.load_e_token` reads the newest token of it) with
the earlier tokens in its metadata, written atomically: after a crash it holds all of the old or all of the new.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selfalign_core.errors import CheckpointError, InputError
from selfalign_core.policy.token_files import load_e_token_and_metadata, save_e_token
from selfalign_core.robot.types import EToken

_KEY = "history"


@dataclass(frozen=True)
class Accepted:
    """A token, when it was accepted (ns, the robot's clock) and its weighted loss then (NaN if never judged)."""

    token: EToken
    stamp_ns: int
    score: float


class History:
    """Accepted tokens, oldest first, at least one and at most ``keep``; the last is in use. Versions only grow."""

    def __init__(self, first: Accepted, *, keep: int):
        self._keep = keep
        self._entries = [first]

    @property
    def entries(self) -> tuple[Accepted, ...]:
        return tuple(self._entries)

    @property
    def token(self) -> EToken:
        """The token in use."""
        return self._entries[-1].token

    def accept(self, data: np.ndarray, stamp_ns: int, score: float) -> EToken:
        """Put ``data`` (T, W) float32 in use, under the next version."""
        old = self.token
        token = EToken(np.array(data, np.float32), old.version + 1, old.embodiment, old.model_digest)
        self._entries = [*self._entries, Accepted(token, stamp_ns, score)][-self._keep :]
        return token

    def rollback(self, stamp_ns: int) -> EToken:
        """Put the token before the one in use back in use, under a new version; the one in use is forgotten.

        Raises:
            InputError: there is none before it.
        """
        if len(self._entries) < 2:
            raise InputError("rollback: found no earlier accepted token, expected at least one")
        *older, previous, last = self._entries
        token = EToken(previous.token.data, last.token.version + 1, last.token.embodiment, last.token.model_digest)
        self._entries = [*older, Accepted(token, stamp_ns, previous.score)]
        return token

    def save(self, path: str | Path) -> None:
        """Write the file, atomically."""
        earlier = json.dumps([_to_dict(entry) for entry in self._entries[:-1]])
        last = self._entries[-1]
        extra = {_KEY: earlier, "stamp_ns": str(last.stamp_ns)}
        save_e_token(path, last.token, losses=_losses(last.score), extra=extra)

    @classmethod
    def load(cls, path: str | Path, *, like: EToken, keep: int) -> History:
        """Read a file of :meth:`save`.

        Args:
            like: a token of the model and robot that the file has to belong to; its data is not read.

        Raises:
            CheckpointError: the file is damaged, or of another model, shape or embodiment.
        """
        shape = tuple(like.data.shape)
        token, metadata = load_e_token_and_metadata(path, model_digest=like.model_digest, shape=shape)
        if token.embodiment != like.embodiment:
            raise CheckpointError(f"{path}: found tokens of {token.embodiment!r}, expected {like.embodiment!r}")
        try:
            earlier = [_from_dict(entry, token, shape) for entry in json.loads(metadata[_KEY])]
            score = json.loads(metadata["losses"]).get("total", math.nan)
            last = Accepted(token, int(metadata["stamp_ns"]), float(score))
        except (ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
            raise CheckpointError(
                f"{path}: found a damaged history ({error!r}), expected one of History.save"
            ) from error
        history = cls(last, keep=keep)
        history._entries = [*earlier, last][-keep:]
        return history


def _losses(score: float) -> dict[str, float]:
    return {"total": score} if math.isfinite(score) else {}


def _to_dict(entry: Accepted) -> dict[str, Any]:
    data = base64.b64encode(np.ascontiguousarray(entry.token.data, "<f4").tobytes()).decode()
    return {
        "version": entry.token.version,
        "stamp_ns": entry.stamp_ns,
        "losses": _losses(entry.score),
        "data": data,
    }


def _from_dict(values: dict[str, Any], like: EToken, shape: tuple[int, ...]) -> Accepted:
    data = np.frombuffer(base64.b64decode(values["data"], validate=True), "<f4").astype(np.float32).reshape(shape)
    if not np.isfinite(data).all():
        raise ValueError("a token with NaN")
    token = EToken(data, int(values["version"]), like.embodiment, like.model_digest)
    return Accepted(token, int(values["stamp_ns"]), float(values["losses"].get("total", math.nan)))
