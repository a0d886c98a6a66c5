"""Whose turn it is on a GPU that a policy and an aligner share: the policy's, whenever it computes.

Two processes on one GPU know nothing of each other's priority: what one has queued, the other waits for. So a policy
claims its device while it infers, and alignment hands the device back between any two layers: it waits until its own
work is done, and then for as long as a policy claims the device. A policy never waits for anybody here. What can be
ahead of it is one layer of alignment's.

A claim is a lock on a file that belongs to the GPU; it ends with the process that holds it, however that ends. Nothing
here changes a number. On a CPU there is nothing to do: the scheduler sees to it (``niceness``).
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn

from selfalign_core.errors import ConfigError
from selfalign_core.model.gemma import GemmaLayer
from selfalign_core.model.siglip import EncoderLayer

_POLL_S = 0.0005
_ATTEMPTS = 3


class DeviceTurns:
    """The claims on one device, seen from one model. ``path``: the device's file; None: nobody else can be there."""

    def __init__(self, path: Path | None):
        self.shared = path is not None
        if path is None:
            return
        try:
            self._file = open(path, opener=_open)  # noqa: SIM115 - for as long as this object
        except OSError as error:
            raise ConfigError(f"file {path}: found {error.strerror}, expected to open it for locks") from error

    @classmethod
    def of(cls, device: torch.device) -> DeviceTurns:
        """Those on a GPU are shared by all processes of this user that see the same folder for temporary files."""
        if device.type != "cuda":
            return cls(None)
        gpu = torch.cuda.get_device_properties(device).uuid
        return cls(Path(tempfile.gettempdir()) / f"selfalign-{os.getuid()}-{gpu}.lock")

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """While a policy computes. Several may at a time; never waits."""
        if not self.shared:
            yield
            return
        # Refused only in the instant in which an aligner looks; without a claim this turn is merely a slower one.
        any(_locked(self._file, fcntl.LOCK_SH) for _ in range(_ATTEMPTS))
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def is_claimed(self) -> bool:
        """Whether a policy computes. Not to be asked by one that claims."""
        if not self.shared:
            return False
        free = _locked(self._file, fcntl.LOCK_EX)
        fcntl.flock(self._file, fcntl.LOCK_UN)
        return not free


class HandBack:
    """Hands the device back between the layers of ``model``, on the way forward and on the way back.

    Args:
        limit_ms: how long to wait for one claim to end; a policy that was stopped while it infers shall not stop
            alignment for ever. When it is over claims are not looked at until there is none.
        clock: seconds.
    """

    def __init__(
        self, model: nn.Module, turns: DeviceTurns, limit_ms: float, *, clock: Callable[[], float] = time.monotonic
    ):
        self.limit_ms = limit_ms
        self._turns, self._clock = turns, clock
        self._given_up = False
        if turns.shared:
            for layer in model.modules():
                if isinstance(layer, GemmaLayer | EncoderLayer):
                    layer.register_forward_hook(self._between)

    def _between(self, layer: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        x = output[0] if isinstance(output, tuple) else output
        # The way back runs on the stream of the way forward, but in another thread.
        stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
        self._hand_back(stream)
        if x.requires_grad:
            x.register_hook(lambda _: self._hand_back(stream))

    def _hand_back(self, stream: torch.cuda.Stream | None) -> None:
        if stream is not None:
            stream.synchronize()
        end = self._clock() + 1e-3 * self.limit_ms
        while self._turns.is_claimed():
            if self._given_up or self._clock() > end:
                self._given_up = True
                return
            time.sleep(_POLL_S)
        self._given_up = False


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def _locked(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
