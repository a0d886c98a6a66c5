"""What the frozen model makes of frames, kept from one round of alignment to the next.

Rounds share most of their frames, and what is read of a frame does not depend on E: its vision features and, where the
alignment path reads images alone, the prefix's keys and values. A frame is known by its pixels, not by its stamp, so
that time that jumps back, or another recording, cannot bring back another frame's. Knows neither transitions nor
losses.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from selfalign_core.model.gemma import PrefixCache
from selfalign_core.policy import Policy

MAX_FRAMES = 4
"""Frames, or transitions with their prompts, of one pass: bounds the memory of a pass and the work of its layers."""

Look = Callable[[], object]
"""Called before every pass of the model; what it raises ends the work there."""


def never() -> None:
    """The :data:`Look` of work that nothing ends."""


@dataclass(frozen=True)
class Encoded:
    """Of N frames: ``features`` per camera (N, patches, width); ``masks`` per camera (N,) bool, False where absent;
    ``prefix`` of the images alone, None where the alignment path reads the prompt as well.
    """

    features: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]
    prefix: PrefixCache | None

    def select(self, rows: Tensor) -> Encoded:
        """Copies of the given rows (int64)."""
        return Encoded(
            tuple(f[rows] for f in self.features),
            tuple(m[rows] for m in self.masks),
            None if self.prefix is None else self.prefix.select(rows),
        )

    @property
    def nbytes(self) -> int:
        layers = () if self.prefix is None else self.prefix.layers
        return sum(f.nbytes for f in self.features) + sum(kv.keys.nbytes + kv.values.nbytes for kv in layers)


def joined(parts: list[Encoded]) -> Encoded:
    """All frames of ``parts``, in their order; all with a prefix or none."""
    prefixes = [part.prefix for part in parts if part.prefix is not None]
    return Encoded(
        tuple(torch.cat(f) for f in zip(*(part.features for part in parts), strict=True)),
        tuple(torch.cat(m) for m in zip(*(part.masks for part in parts), strict=True)),
        PrefixCache.joined(prefixes) if prefixes else None,
    )


class FrameCache:
    """Encodes frames for ``policy``'s frozen model and keeps at most ``limit_bytes`` and ``limit_frames``; the least
    recently used leave first. Owned by one thread.
    """

    def __init__(self, policy: Policy, limit_bytes: int = 0, limit_frames: int | None = None):
        self.limit_bytes, self.limit_frames = limit_bytes, limit_frames
        self._policy = policy
        self._kept: OrderedDict[bytes, Encoded] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return sum(encoded.nbytes for encoded in self._kept.values())

    @torch.no_grad()
    def encode(self, frames: np.ndarray, cameras: tuple[str, ...], look: Look = never) -> Encoded:
        """``frames`` (N, cameras, H, W, 3) uint8 RGB, at least one. What was made before ``look`` raised is kept."""
        if self.limit_bytes <= 0:
            self._kept.clear()
            return joined([self._encode(frames[rows], cameras, look) for rows in _passes(range(len(frames)))])
        keys = [self._key(frame, cameras) for frame in frames]
        new = {key: row for row, key in enumerate(keys) if key not in self._kept}
        try:
            for part in _passes(list(new)):
                encoded = self._encode(frames[[new[key] for key in part]], cameras, look)
                for row, key in enumerate(part):
                    self._kept[key] = encoded.select(torch.tensor([row], device=self._policy.dim_mask.device))
            found = joined([self._kept[key] for key in keys])
            for key in keys:
                self._kept.move_to_end(key)
        finally:
            excess = self.nbytes - self.limit_bytes
            while excess > 0 or (self.limit_frames is not None and len(self._kept) > self.limit_frames):
                excess -= self._kept.popitem(last=False)[1].nbytes
        return found

    @staticmethod
    def _key(frame: np.ndarray, cameras: tuple[str, ...]) -> bytes:
        key = hashlib.blake2b("\n".join(cameras).encode(), digest_size=16)
        key.update(np.ascontiguousarray(frame).data)
        return key.digest()

    def _encode(self, frames: np.ndarray, cameras: tuple[str, ...], look: Look) -> Encoded:
        look()
        policy, model = self._policy, self._policy.model
        by_camera = {camera: frames[:, i] for i, camera in enumerate(cameras)}
        images, masks = policy.codec.cameras_to_model(by_camera, len(frames))
        features = [model.paligemma_with_expert.embed_image(image) for image in images]
        images_only = policy.config.model.alignment_prefix == "images_only"
        return Encoded(
            tuple(features), tuple(masks), model.images_only_prefix(features, masks) if images_only else None
        )


def _passes(items: Sequence) -> list:
    """``items`` in parts that go through the model together."""
    return [items[i : i + MAX_FRAMES] for i in range(0, len(items), MAX_FRAMES)]
