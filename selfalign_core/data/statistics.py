"""Normalisation statistics of a dataset, read block by block so that memory does not grow with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from selfalign_core.data.dataset_meta import Episode
from selfalign_core.data.timeline import Timeline
from selfalign_core.transforms import NormStats

_ROWS_PER_BLOCK = 2048
_QUANTILE_ROWS = 1_000_000  # above this many rows, quantiles are those of a random million


def norm_stats_of(
    states: np.ndarray,
    timeline: Timeline,
    expert_chunks: np.ndarray | None,
    episodes: Sequence[Episode],
    *,
    horizon: int,
    delta_mask: np.ndarray,
) -> dict[str, NormStats]:
    """Statistics of ``state`` and of ``actions`` over chunks of ``horizon``, delta dimensions relative to the state.

    Chunks are the executed actions from every frame on, to the end of its episode, and the expert's. ``delta_mask``
    (A,) bool. Exact, but for the quantiles of more than a million rows, which are those of a random million of them.
    """

    def chunks() -> Iterator[np.ndarray]:
        for episode in episodes:
            for begin in range(episode.start, episode.stop, _ROWS_PER_BLOCK):
                rows = np.arange(begin, min(begin + _ROWS_PER_BLOCK, episode.stop))
                actions, known = timeline.actions_from(rows, horizon)
                relative = actions - np.where(delta_mask, _of(states, rows), 0)[:, None]
                yield relative[known]
        if expert_chunks is not None:
            for begin in range(0, len(expert_chunks), _ROWS_PER_BLOCK):
                rows = np.arange(begin, min(begin + _ROWS_PER_BLOCK, len(expert_chunks)))
                block = expert_chunks[begin : begin + _ROWS_PER_BLOCK]
                block = block - np.where(delta_mask, _of(states, rows), 0)[:, None, None]
                yield block[np.isfinite(block[:, :, 0, 0])].reshape(-1, block.shape[-1])

    def blocks() -> Iterator[np.ndarray]:
        for begin in range(0, len(states), _ROWS_PER_BLOCK):
            yield states[begin : begin + _ROWS_PER_BLOCK]

    def _of(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
        # Without delta dimensions, states and actions may differ in length.
        return array[rows] if delta_mask.any() else np.zeros((len(rows), len(delta_mask)), np.float32)

    expected = len(states) * horizon
    if expert_chunks is not None:
        expected += int(np.prod(expert_chunks.shape[:3]))
    return {"state": _stats_of(blocks(), len(states)), "actions": _stats_of(chunks(), expected)}


def _stats_of(blocks: Iterator[np.ndarray], expected_rows: int) -> NormStats:
    """Statistics of rows that come in blocks of (n, dim)."""
    share = min(1.0, _QUANTILE_ROWS / max(expected_rows, 1))
    rng = np.random.default_rng(0)
    count, kept = 0, []
    for block in blocks:
        if not len(block):
            continue
        block = np.asarray(block, np.float64)
        if count == 0:
            origin = block[0]  # keeps the sum of squares small, hence exact
            total, squares = np.zeros_like(origin), np.zeros_like(origin)
            low, high = origin, origin
        centred = block - origin
        total, squares = total + centred.sum(0), squares + np.square(centred).sum(0)
        low, high = np.minimum(low, block.min(0)), np.maximum(high, block.max(0))
        count += len(block)
        kept.append((block if share == 1.0 else block[rng.random(len(block)) < share]).astype(np.float32))
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - np.square(mean), 0.0))
    sample = np.concatenate(kept)
    if not len(sample):
        sample = np.stack([low, high])
    q01, q99 = np.quantile(sample, [0.01, 0.99], axis=0)
    return NormStats(origin + mean, std, q01, q99, low, high)
