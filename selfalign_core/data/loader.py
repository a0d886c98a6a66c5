"""Batches for training: a fixed function of seed and step, sharded over ranks, prepared ahead in threads.

The samples of step s are positions s·G .. (s+1)·G−1 of one endless stream, G = batch size × ranks: a new permutation
of all samples per epoch, one epoch behind the other. A rank takes its slice of the G. So nothing but the step has to
be saved to resume, and two ranks of 4 see together what one rank of 8 sees. What is drawn per sample (the prompt of
a relabelled frame) depends on the seed and the position in the stream alone.

Knows neither the model, torch nor ROS; nothing here is distributed by itself.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from selfalign_core.command_line import command
from selfalign_core.data.dataset import TransitionDataset
from selfalign_core.errors import DatasetError


@dataclass(frozen=True)
class Batch:
    """B training samples; numpy arrays. Units are the robot's.

    With C cameras, S states, A actions, ``chunk`` actions per chunk and K per transition:

    - ``images`` (B, C, H, W, 3) uint8 at row ``index`` of the dataset, ``next_images`` the same at row ``next_index``,
      K control steps later; both None without images
    - ``state`` (B, S) float32
    - ``actions`` (B, chunk, A) float32 with ``action_masks`` (B, chunk) bool: the expert's chunk for ``prompt``, or the
      recorded actions, repeating the last one where the mask is False: where there was none, past the end of the
      episode and, throughout, in play, which no prompt explains
    - ``executed`` (B, K, A) float32 with ``executed_masks`` (B, K) bool: the recorded actions
    - ``prompt`` (B,) int64 index into the prompts, -1 in play; ``embodiment`` (B,) int64 index into the embodiments
    """

    images: np.ndarray | None
    state: np.ndarray
    actions: np.ndarray
    action_masks: np.ndarray
    executed: np.ndarray
    executed_masks: np.ndarray
    next_images: np.ndarray | None
    prompt: np.ndarray
    embodiment: np.ndarray
    index: np.ndarray
    next_index: np.ndarray

    def __len__(self) -> int:
        return len(self.state)


class Loader:
    """Batches of one rank. :meth:`batch` makes any step's; :meth:`batches` prepares the next ones ahead.

    Args:
        dataset: what to read.
        batch_size: samples per step on this rank.
        chunk: actions per chunk. transition: executed actions per transition (K).
        seed: of order and prompts. rank, world_size: which share of every step.
        episodes: only these (a training or a held-out split); None: all.
        with_images: False leaves images out, for features cached by ``index``.

    Raises:
        DatasetError: a chunk longer than the expert's, or no sample at all.
    """

    def __init__(
        self,
        dataset: TransitionDataset,
        *,
        batch_size: int,
        chunk: int,
        transition: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        episodes: Sequence[int] | np.ndarray | None = None,
        with_images: bool = True,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("chunk", chunk), ("transition", transition)):
            if value < 1:
                raise DatasetError(f"{name}: found {value}, expected >= 1")
        if not 0 <= rank < world_size:
            raise DatasetError(f"rank: found {rank}, expected 0..{world_size - 1}")
        horizon = dataset.meta.chunk_horizon
        if horizon is not None and chunk > horizon:
            raise DatasetError(f"{dataset.path}: expert chunks of {horizon} actions, expected at least chunk={chunk}")
        self.dataset = dataset
        self.batch_size, self.chunk, self.transition = batch_size, chunk, transition
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.with_images = with_images
        self.rows = dataset.starts(transition, episodes=episodes)
        if not len(self.rows):
            raise DatasetError(
                f"{dataset.path}: found no frame with {transition} more behind it in the same episode, expected some "
                f"({len(dataset)} frames in {len(dataset.meta.episodes)} episodes)"
            )
        self._embodiment, self._prompt = dataset.embodiment_of, dataset.prompt_of
        self._orders: dict[int, np.ndarray] = {}  # epoch -> permutation

    @property
    def num_samples(self) -> int:
        """Samples of an epoch, over all ranks."""
        return len(self.rows)

    @property
    def steps_per_epoch(self) -> float:
        return len(self.rows) / (self.batch_size * self.world_size)

    def positions(self, step: int) -> np.ndarray:
        """This rank's positions in the stream of samples at ``step``, (batch_size,) int64."""
        first = (step * self.world_size + self.rank) * self.batch_size
        return np.arange(first, first + self.batch_size, dtype=np.int64)

    def batch(self, step: int) -> Batch:
        """The batch of ``step`` (from 0), as numpy arrays."""
        positions = self.positions(step)
        index = self.rows[self._order_at(positions)]
        dataset = self.dataset
        episode = dataset.episode_of[index]
        executed, executed_masks = dataset.timeline.actions_from(index, self.transition)
        actions, action_masks = dataset.timeline.actions_from(index, self.chunk)
        prompt = self._prompt[episode]
        action_masks &= (prompt >= 0)[:, None]
        if dataset.expert_chunks is not None:
            chunks = np.asarray(dataset.expert_chunks[index, :, : self.chunk])  # (B, P, chunk, A)
            self._relabel(chunks, positions, actions, action_masks, prompt)
        next_index = dataset.timeline.nearest(index, self.transition)
        images = next_images = None
        if self.with_images:
            images, next_images = np.asarray(dataset.images[index]), np.asarray(dataset.images[next_index])
        return Batch(
            images=images,
            state=np.asarray(dataset.states[index]),
            actions=actions,
            action_masks=action_masks,
            executed=executed,
            executed_masks=executed_masks,
            next_images=next_images,
            prompt=prompt,
            embodiment=self._embodiment[episode],
            index=index,
            next_index=next_index,
        )

    def batches(
        self,
        start: int = 0,
        *,
        prefetch: int = 4,
        threads: int = 1,
    ) -> Generator[Batch]:
        """The batches of ``start``, ``start + 1``, … without end, ``prefetch`` of them prepared ahead by ``threads``.

        Reading happens outside the interpreter lock, so it overlaps with the training step. An error in a thread is
        raised here, at its step. Closing the generator ends the threads.
        """
        with ThreadPoolExecutor(threads, thread_name_prefix="loader") as pool:
            ahead: deque[Future[Batch]] = deque(pool.submit(self.batch, start + i) for i in range(prefetch))
            try:
                while True:
                    ahead.append(pool.submit(self.batch, start + prefetch))
                    start += 1
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()

    def _order_at(self, positions: np.ndarray) -> np.ndarray:
        epochs, within = np.divmod(positions, len(self.rows))
        chosen = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen[epochs == epoch] = self._order(int(epoch))[within[epochs == epoch]]
        return chosen

    def _order(self, epoch: int) -> np.ndarray:
        order = self._orders.get(epoch)
        if order is None:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
            # Threads work on neighbouring steps, which touch two epochs at most unless an epoch is tiny.
            recent = {key: value for key, value in self._orders.copy().items() if key >= epoch - 2}
            self._orders = recent | {epoch: order}
        return order

    def _relabel(
        self,
        chunks: np.ndarray,
        positions: np.ndarray,
        actions: np.ndarray,
        action_masks: np.ndarray,
        prompt: np.ndarray,
    ) -> None:
        """In place: the expert's chunk for a random one of the prompts it has one for, where it has any."""
        known = np.isfinite(chunks[:, :, 0, 0])  # (B, P)
        count = known.sum(1)
        pick = _hash(self.seed, positions) % np.maximum(count, 1).astype(np.uint64)
        # The pick-th known prompt: the first place where the running count of known ones exceeds pick.
        chosen = np.argmax(np.cumsum(known, axis=1) > pick[:, None].astype(np.int64), axis=1)
        rows = np.flatnonzero(count)
        actions[rows] = chunks[rows, chosen[rows]]
        action_masks[rows] = True
        prompt[rows] = chosen[rows]


def _hash(seed: int, positions: np.ndarray) -> np.ndarray:
    """A random uint64 per position (splitmix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        key = np.random.default_rng([seed, 1]).integers(0, 2**63, dtype=np.uint64)
        x = positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


# --- command line ---


def measure(loader: Loader, *, steps: int, step_s: float, prefetch: int, threads: int) -> dict[str, Any]:
    """Samples per second of ``steps`` batches, and the time a training step of ``step_s`` seconds waits for one.

    The training step is a sleep, so on a machine that computes with the same cores the wait is a lower bound.
    """
    batches = loader.batches(prefetch=prefetch, threads=threads)
    next(batches)
    waited = 0.0
    begin = time.perf_counter()
    for _ in range(steps):
        time.sleep(step_s)
        asked = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - asked
    total = time.perf_counter() - begin
    batches.close()
    return {
        "samples_per_s": steps * loader.batch_size / total,
        "step_ms": 1e3 * total / steps,
        "wait_ms": 1e3 * waited / steps,
    }


def report(
    dataset: Annotated[Path, "dataset directory"],
    *,
    batch_size: int = 64,
    chunk: Annotated[int, "actions per chunk"] = 8,
    transition: Annotated[int, "executed actions per transition"] = 8,
    steps: int = 200,
    step_ms: Annotated[float, "length of the training step to compare with"] = 100.0,
    prefetch: Annotated[int, "batches prepared ahead"] = 4,
    threads: int = 1,
) -> None:
    """Measure how fast a dataset can be read, alone and beside a training step of a given length."""
    loader = Loader(TransitionDataset(dataset), batch_size=batch_size, chunk=chunk, transition=transition)
    alone = measure(loader, steps=steps, step_s=0.0, prefetch=prefetch, threads=threads)
    few = max(1, min(steps, int(5e3 / max(step_ms, 1.0))))  # at most about five seconds
    beside = measure(loader, steps=few, step_s=step_ms / 1e3, prefetch=prefetch, threads=threads)
    epoch = f"{loader.steps_per_epoch:.1f} steps per epoch"
    print(f"{loader.num_samples} samples, batches of {batch_size}, {epoch}")
    print(f"alone: {alone['samples_per_s']:.0f} samples/s, {alone['step_ms']:.2f} ms per batch")
    print(f"beside a step of {step_ms:g} ms: the step waits {beside['wait_ms']:.3f} ms for its batch")


main = command("selfalign_core.data.loader", report)

if __name__ == "__main__":
    sys.exit(main())
