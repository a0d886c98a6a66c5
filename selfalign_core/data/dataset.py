"""The dataset on disk: frames at the control rate with the actions executed between them, memory-mapped.

A directory holds ``meta.json``, ``images.npy`` (N, cameras, H, W, 3) uint8 RGB, ``states.npy`` (N, S) float32,
``actions.npy`` (N, A) float32 (the action in force from frame i to i+1), ``stamps.npy`` (N,) int64 nanoseconds,
``norm_stats.json`` and, where an expert was asked at every frame, ``expert_chunks.npy`` (N, prompts, horizon, A)
float32, NaN where there is none. Rows of an episode are consecutive. A directory that exists is complete.

Opening, splitting, merging; ``dataset_writer`` makes one. Must not know ROS, the model or torch, nor where the frames
come from.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from selfalign_core.data.command_line import run_command
from selfalign_core.data.dataset_meta import PLAY, DatasetMeta
from selfalign_core.data.dataset_writer import DatasetWriter
from selfalign_core.data.partial import DatasetError
from selfalign_core.policy.transforms import NormStats, load_norm_stats
from selfalign_core.robot.types import TransitionBatch

_ROWS_PER_CHECK = 2048


class TransitionDataset:
    """A dataset directory, opened for reading; nothing is loaded until it is indexed.

    ``images``, ``states``, ``actions``, ``stamps`` and ``expert_chunks`` (or None) are read-only memory maps with the
    shapes of the module docstring; ``episode_of`` (N,) int64 is the episode of every frame.

    Raises:
        DatasetError: not a dataset, another format, shapes that do not agree, or numbers that are not finite.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file = self.path / "meta.json"
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise DatasetError(f"{file}: found no such file, expected a dataset directory") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DatasetError(f"{file}: found invalid JSON ({error})") from None
        try:
            self.meta = DatasetMeta.from_dict(values)
        except DatasetError as error:
            raise DatasetError(f"{file}: {error}") from None
        arrays = {name: self._array(name, *expected) for name, expected in self.meta.shapes().items()}
        self.images: np.ndarray = arrays["images"]
        self.states: np.ndarray = arrays["states"]
        self.actions: np.ndarray = arrays["actions"]
        self.stamps: np.ndarray = arrays["stamps"]
        self.expert_chunks: np.ndarray | None = arrays.get("expert_chunks")
        lengths = [episode.length for episode in self.meta.episodes]
        self.episode_of = np.repeat(np.arange(len(lengths)), lengths)
        for name in ("states", "actions"):
            self._check_finite(name, arrays[name])
        self.norm_stats: dict[str, NormStats] = load_norm_stats(self.path / "norm_stats.json")

    def __len__(self) -> int:
        """Frames."""
        return self.meta.num_frames

    @property
    def embodiment_of(self) -> np.ndarray:
        """Index into the embodiments of every episode, (episodes,) int64."""
        return np.array([episode.embodiment for episode in self.meta.episodes], np.int64)

    @property
    def prompt_of(self) -> np.ndarray:
        """Index into the prompts of every episode, -1 where there is none, (episodes,) int64."""
        return np.array([episode.prompt for episode in self.meta.episodes], np.int64)

    def starts(
        self, horizon: int, *, episodes: Sequence[int] | np.ndarray | None = None, tails: bool = False
    ) -> np.ndarray:
        """Rows i from which a transition of ``horizon`` actions fits into the episode (i + horizon < its end).

        ``tails`` adds the rows after them. Returns rising int64 rows of ``episodes`` (all unless given).
        """
        cut = 0 if tails else horizon
        chosen = range(len(self.meta.episodes)) if episodes is None else sorted(set(map(int, episodes)))
        rows = [
            np.arange(self.meta.episodes[i].start, max(self.meta.episodes[i].stop - cut, self.meta.episodes[i].start))
            for i in chosen
        ]
        return np.concatenate([np.zeros(0, np.int64), *rows])

    def transitions(self, starts: np.ndarray, horizon: int) -> TransitionBatch:
        """Those of ``horizon`` actions from the rows ``starts`` (B,) on, which :meth:`starts` has given."""
        rows, index = np.unique(np.concatenate([starts, starts + horizon]), return_inverse=True)
        return TransitionBatch(
            cameras=self.meta.cameras,
            frames=self.images[rows],
            frame_states=self.states[rows],
            frame_stamps=self.stamps[rows],
            obs_index=index[: len(starts)],
            next_index=index[len(starts) :],
            actions=self.actions[starts[:, None] + np.arange(horizon)],
        )

    def split(
        self, holdout: float, *, by: Literal["episode", "embodiment"], seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Episodes to train on and episodes held out, as sorted int64 arrays.

        ``holdout`` is the fraction of episodes, or of embodiments with all of their episodes, that is held out; at
        least one whenever it is above 0.
        """
        if not 0.0 <= holdout < 1.0:
            raise DatasetError(f"holdout: found {holdout}, expected a fraction in [0, 1)")
        group_of = self.embodiment_of if by == "embodiment" else np.arange(len(self.meta.episodes))
        groups = np.unique(group_of)
        count = max(1, round(holdout * len(groups))) if holdout > 0 else 0
        if count >= len(groups):
            raise DatasetError(f"{self.path}: found {len(groups)} {by}(s), expected more than the {count} held out")
        held = np.random.default_rng([seed, len(groups)]).permutation(groups)[:count]
        is_held = np.isin(group_of, held)
        return np.flatnonzero(~is_held), np.flatnonzero(is_held)

    def _array(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        file = self.path / f"{name}.npy"
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise DatasetError(f"{file}: found no such file, expected {shape} {dtype}") from None
        except (ValueError, OSError, EOFError) as error:
            raise DatasetError(f"{file}: found an unreadable array ({error}), expected {shape} {dtype}") from None
        if array.shape != shape or array.dtype != dtype:
            raise DatasetError(f"{file}: found {array.shape} {array.dtype}, expected {shape} {dtype} (meta.json)")
        return array

    def _check_finite(self, name: str, array: np.ndarray) -> None:
        for begin in range(0, len(array), _ROWS_PER_CHECK):
            bad = ~np.isfinite(array[begin : begin + _ROWS_PER_CHECK]).all(axis=1)
            if bad.any():
                row = begin + int(np.argmax(bad))
                episode = int(self.episode_of[row])
                frame = row - self.meta.episodes[episode].start
                raise DatasetError(
                    f"{self.path / name}.npy: episode {episode}, frame {frame}: found {array[row].tolist()}, "
                    "expected finite numbers"
                )


def merge(sources: Sequence[TransitionDataset], output: str | Path) -> None:
    """Copy several datasets into a new one. Cameras, sizes, rate and horizons have to agree; keys are united.

    Raises:
        DatasetError: naming the dataset and the field that differs.
    """
    first = sources[0].meta
    same = ("cameras", "image_size", "state_dim", "action_dim", "dt_ns", "delta_mask", "chunk_horizon", "joint_names")
    for source in sources[1:]:
        for name in same:
            found, expected = getattr(source.meta, name), getattr(first, name)
            if found != expected:
                raise DatasetError(
                    f"{source.path}: {name}: found {found}, expected {expected} ({sources[0].path}); "
                    "only datasets that agree can be merged"
                )
    prompts = list(dict.fromkeys(prompt for source in sources for prompt in source.meta.prompts))
    with DatasetWriter(
        output,
        cameras=first.cameras,
        image_size=first.image_size,
        state_dim=first.state_dim,
        action_dim=first.action_dim,
        dt_ns=first.dt_ns,
        prompts=prompts,
        chunk_horizon=first.chunk_horizon,
        delta_mask=first.delta_mask,
        statistics_horizon=first.statistics_horizon,
        joint_names=first.joint_names,
    ) as writer:
        for source in sources:
            for name, count in source.meta.counters.items():
                writer.counters[name] = writer.counters.get(name, 0) + count
            writer.sources += [dict(entry) for entry in source.meta.sources]
            column_of = [prompts.index(prompt) for prompt in source.meta.prompts]
            for episode in source.meta.episodes:
                rows = slice(episode.start, episode.stop)
                chunks = None
                if source.expert_chunks is not None:
                    shape = (episode.length, len(prompts), first.chunk_horizon, first.action_dim)
                    chunks = np.full(shape, np.nan, np.float32)
                    chunks[:, column_of] = source.expert_chunks[rows]
                writer.add_episode(
                    states=source.states[rows],
                    actions=source.actions[rows],
                    stamps=source.stamps[rows],
                    embodiment=source.meta.embodiments[episode.embodiment],
                    prompt=None if episode.prompt == PLAY else source.meta.prompts[episode.prompt],
                    images=source.images[rows],
                    expert_chunks=chunks,
                )


# --- command line ---


def describe(dataset: TransitionDataset) -> str:
    """A few lines on what a dataset holds."""
    meta = dataset.meta
    seconds = len(dataset) * meta.dt_ns / 1e9
    play = sum(episode.length for episode in meta.episodes if episode.prompt == PLAY)
    lines = [
        f"{dataset.path}: {len(dataset)} frames ({seconds:.1f} s at {1e9 / meta.dt_ns:g} Hz) in "
        f"{len(meta.episodes)} episodes, {play} of them play",
        f"  cameras {', '.join(meta.cameras)} at {meta.image_size[0]}x{meta.image_size[1]}; "
        f"state {meta.state_dim}, action {meta.action_dim}",
        f"  {len(meta.embodiments)} embodiment(s), {len(meta.prompts)} prompt(s), expert chunks: "
        f"{meta.chunk_horizon or 'none'}",
    ]
    lines += [f"  {name}: {count}" for name, count in sorted(meta.counters.items())]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    program = "python -m selfalign_core.data.dataset"
    parser = argparse.ArgumentParser(prog=program, description="Look at datasets or join them.")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="what a dataset holds")
    info.add_argument("datasets", nargs="+", type=Path)
    join = commands.add_parser("merge", help="copy several datasets into a new one")
    join.add_argument("datasets", nargs="+", type=Path)
    join.add_argument("--output", required=True, type=Path)
    options = parser.parse_args(arguments)

    def work() -> None:
        datasets = [TransitionDataset(path) for path in options.datasets]
        if options.command == "merge":
            merge(datasets, options.output)
            datasets = [TransitionDataset(options.output)]
        for dataset in datasets:
            print(describe(dataset))

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
