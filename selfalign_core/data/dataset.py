"""The dataset on disk: frames with the actions executed from them on, memory-mapped.

A directory holds ``meta.json``, ``images.npy`` (N, cameras, H, W, 3) uint8 RGB, ``states.npy`` (N, S) float32,
``actions.npy`` (N, A) float32 (the action in force in the control step that begins at frame i), ``stamps.npy`` (N,)
int64 nanoseconds, ``norm_stats.json`` and, where an expert was asked at every frame, ``expert_chunks.npy`` (N, prompts,
horizon, A) float32, NaN where there is none. Rows of an episode are consecutive. A directory that exists is complete.

The frames of an episode are one control step apart, and action i+1 follows action i. Those of a recorded robot are not.
Such a dataset (format 2) has the *track* of what was executed, ``track.npy`` (M, A) float32 and ``track_stamps.npy``
(M,) int64 nanoseconds, of which every episode has a slice. Frames and actions are paired by stamps, as the nodes pair
them (``selfalign_core.data.timeline``); a row of ``actions.npy`` is NaN where no action was in force.

Opening, splitting, merging; ``dataset_writer`` makes one. Must not know ROS, the model or torch, nor where the frames
come from.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from selfalign_core.command_line import command
from selfalign_core.data.dataset_meta import PLAY, DatasetMeta
from selfalign_core.data.dataset_writer import DatasetWriter
from selfalign_core.data.timeline import Timeline, Track
from selfalign_core.errors import DatasetError
from selfalign_core.policy.statistics_files import load_norm_stats
from selfalign_core.policy.transforms import NormStats
from selfalign_core.records import load_document, named
from selfalign_core.robot.types import TransitionBatch

_ROWS_PER_CHECK = 2048


class TransitionDataset:
    """A dataset directory, opened for reading; nothing is loaded until it is indexed.

    ``images``, ``states``, ``actions``, ``stamps``, ``track`` (or None) and ``expert_chunks`` (or None) are read-only
    memory maps with the shapes of the module docstring; ``episode_of`` (N,) int64 is the episode of every frame;
    ``timeline`` pairs frames and actions.

    Raises:
        DatasetError: not a dataset, another format, shapes that do not agree, numbers that are not finite, or stamps of
            a track or its frames that do not rise.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file = self.path / "meta.json"
        values = load_document(file, "a dataset directory", error=DatasetError)
        with named(file, DatasetError):
            self.meta = DatasetMeta.from_dict(values)
        arrays = {name: self._array(name, *expected) for name, expected in self.meta.shapes().items()}
        self.images: np.ndarray = arrays["images"]
        self.states: np.ndarray = arrays["states"]
        self.actions: np.ndarray = arrays["actions"]
        self.stamps: np.ndarray = arrays["stamps"]
        self.expert_chunks: np.ndarray | None = arrays.get("expert_chunks")
        self.track = Track(arrays["track_stamps"], arrays["track"]) if self.meta.has_track else None
        self.timeline = Timeline(
            self.meta.episodes, self.meta.dt_ns, stamps=self.stamps, actions=self.actions, track=self.track
        )
        self.episode_of = self.timeline.episode_of
        self._check_numbers()
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

    def starts(self, horizon: int, *, episodes: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Rows from which a transition of ``horizon`` actions fits into the episode: with all its actions and its end.

        Returns rising int64 rows of ``episodes`` (all unless given).
        """
        chosen = range(len(self.meta.episodes)) if episodes is None else sorted(set(map(int, episodes)))
        parts = [np.arange(self.meta.episodes[i].start, self.meta.episodes[i].stop) for i in chosen]
        rows = np.concatenate([np.zeros(0, np.int64), *parts])
        return self.timeline.complete(rows, horizon)

    def transitions(self, starts: np.ndarray, horizon: int) -> TransitionBatch:
        """Those of ``horizon`` actions from the rows ``starts`` (B,) on, which :meth:`starts` has given."""
        pairs = self.timeline.pair(starts, horizon)
        rows, index = np.unique(np.concatenate([starts, pairs.next]), return_inverse=True)
        return TransitionBatch(
            cameras=self.meta.cameras,
            frames=self.images[rows],
            frame_states=self.states[rows],
            frame_stamps=self.stamps[rows],
            obs_index=index[: len(starts)],
            next_index=index[len(starts) :],
            actions=self.timeline.executed(pairs.actions),
        )

    def recorded(self, episode: int, *, track: bool) -> dict[str, Any]:
        """What :meth:`DatasetWriter.add_episode` takes of an episode's states, actions and stamps.

        ``track``: actions as a track, also of a dataset without one; its rows get the stamps that they have by
        definition.
        """
        rows = slice(self.meta.episodes[episode].start, self.meta.episodes[episode].stop)
        states, stamps = self.states[rows], self.stamps[rows]
        if not track:
            return {"states": states, "stamps": stamps, "actions": self.actions[rows]}
        recorded = self.timeline.track_of(episode)
        if self.track is None:
            stamps = stamps[0] + self.timeline.times[rows]
            recorded = Track(stamps, recorded.actions)
        return {"states": states, "stamps": stamps, "track": recorded}

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

    def _check_numbers(self) -> None:
        frames = self.meta.episodes
        self._check_finite("states", self.states, "frame", [episode.start for episode in frames])
        if self.track is None:
            self._check_finite("actions", self.actions, "frame", [episode.start for episode in frames])
            return
        begins = [episode.track_start for episode in frames]
        self._check_finite("track", self.track.actions, "action", begins)
        self._check_rising("track_stamps", self.track.stamps, "action", begins)
        self._check_rising("stamps", self.stamps, "frame", [episode.start for episode in frames])

    def _check_finite(self, name: str, array: np.ndarray, kind: str, begins: Sequence[int]) -> None:
        for begin in range(0, len(array), _ROWS_PER_CHECK):
            bad = ~np.isfinite(array[begin : begin + _ROWS_PER_CHECK]).all(axis=1)
            if bad.any():
                row = begin + int(np.argmax(bad))
                where = self._place(name, row, kind, begins)
                raise DatasetError(f"{where}: found {array[row].tolist()}, expected finite numbers")

    def _check_rising(self, name: str, stamps: np.ndarray, kind: str, begins: Sequence[int]) -> None:
        falls = np.diff(stamps) <= 0
        falls[np.array(begins[1:], np.int64) - 1] = False  # from one episode to the next
        if falls.any():
            row = int(np.argmax(falls)) + 1
            where = self._place(name, row, kind, begins)
            raise DatasetError(f"{where}: found {stamps[row]} after {stamps[row - 1]}, expected later ones")

    def _place(self, name: str, row: int, kind: str, begins: Sequence[int]) -> str:
        episode = int(np.searchsorted(begins, row, side="right")) - 1
        return f"{self.path / name}.npy: episode {episode}, {kind} {row - begins[episode]}"


def merge(sources: Sequence[TransitionDataset], output: str | Path) -> None:
    """Copy several datasets into a new one. Cameras, sizes, rate and horizons have to agree; keys are united.

    Raises:
        DatasetError: naming the dataset and the field that differs.
    """
    if not sources:
        raise DatasetError("sources: found no dataset, expected at least one")
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
    has_track = any(source.meta.has_track for source in sources)
    with DatasetWriter.like(output, first, prompts) as writer:
        for source in sources:
            for name, count in source.meta.counters.items():
                writer.counters[name] = writer.counters.get(name, 0) + count
            writer.sources += [dict(entry) for entry in source.meta.sources]
            column_of = [prompts.index(prompt) for prompt in source.meta.prompts]
            for index, episode in enumerate(source.meta.episodes):
                rows = slice(episode.start, episode.stop)
                chunks = None
                if source.expert_chunks is not None:
                    shape = (episode.length, len(prompts), *source.expert_chunks.shape[2:])
                    chunks = np.full(shape, np.nan, np.float32)
                    chunks[:, column_of] = source.expert_chunks[rows]
                writer.add_episode(
                    **source.recorded(index, track=has_track),
                    embodiment=source.meta.embodiments[episode.embodiment],
                    prompt=None if episode.prompt == PLAY else source.meta.prompts[episode.prompt],
                    images=source.images[rows],
                    expert_chunks=chunks,
                )


# --- command line ---


def describe(dataset: TransitionDataset) -> str:
    """A few lines on what a dataset holds."""
    meta = dataset.meta
    times = dataset.timeline.times
    seconds = sum(int(times[e.stop - 1] - times[e.start]) + meta.dt_ns for e in meta.episodes) / 1e9
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


def info(*datasets: Path) -> None:
    """What a dataset holds."""
    for path in datasets:
        print(describe(TransitionDataset(path)))


def join(*datasets: Path, output: Path) -> None:
    """Copy several datasets into a new one."""
    merge([TransitionDataset(path) for path in datasets], output)
    info(output)


main = command("selfalign_core.data.dataset", {"info": info, "merge": join}, about="Look at datasets or join them.")

if __name__ == "__main__":
    sys.exit(main())
