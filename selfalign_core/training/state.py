"""Training checkpoints: everything a run needs to go on exactly where it was, and the policy it has become.

A checkpoint is a directory ``step_<n>`` with the tensors in safetensors files, ``training.json`` and a ``policy``
directory. It is written under a hidden name, synced and renamed, so one that exists is complete, and one that could
not be written leaves the earlier ones alone. Nothing is pickled. Knows nothing of optimisers or losses: tensors come
with names.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from selfalign_core.errors import CheckpointError, ConfigError
from selfalign_core.files import publish, sync
from selfalign_core.records import load_document
from selfalign_core.training.parallel import Ranks

FORMAT = "selfalign-training-1"
INFO_NAME = "training.json"

_SHARD_BYTES = 2 << 30
"""Tensors are collected up to this size and then written, so a writer never holds the whole state."""

SETTLE_S = 60.0
"""A network file system may take so long to show what another node has made (NFS keeps a folder's names for that)."""

_STEP = re.compile(r"step_(\d+)")


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step_{step:08d}"


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return [path for _, path in _steps(directory)]


def _steps(directory: Path) -> list[tuple[int, Path]]:
    """The same with the step of each."""
    if not directory.is_dir():
        return []
    named = [(_STEP.fullmatch(path.name), path) for path in directory.iterdir()]
    found = [(int(name[1]), path) for name, path in named if name and (path / INFO_NAME).is_file()]
    return sorted(found, key=lambda one: one[0])


def find_checkpoint(path: str | Path) -> Path | None:
    """The checkpoint that ``path`` is, or the newest in a run directory or its ``checkpoints``; None if none."""
    path = Path(path)
    if (path / INFO_NAME).is_file():
        return path
    found = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
    return found[-1] if found else None


def checkpoint_to_resume(run: Path, resume: bool | str | Path, ranks: Ranks) -> Path | None:
    """The newest checkpoint of ``run`` with ``resume`` True, that of ``resume`` if it is a path; None to begin anew.

    The first rank looks for it, and every rank has to see the same.

    Raises:
        ConfigError: ``resume`` is False, and ``run`` has checkpoints.
        CheckpointError: ``resume`` is a path without one.
        RankError: another rank raised one of these, or does not see the checkpoint.
    """
    base = run if isinstance(resume, bool) else Path(resume)
    found = ranks.gather(lambda: _first_finds(base, resume) if ranks.first else None)[0]
    if found is None:
        return None
    name, info = found
    path = base / name

    def check() -> None:
        expect_shared(path / INFO_NAME, ranks.rank)
        if read_info(path) != info:
            raise not_shared(path, ranks.rank, "another checkpoint")

    ranks.gather(check)
    return path


def _first_finds(base: Path, resume: bool | str | Path) -> tuple[str, dict[str, Any]] | None:
    """Its path below ``base``, and what it says of itself."""
    if isinstance(resume, bool):
        existing = list_checkpoints(base / "checkpoints")
        if existing and not resume:
            raise ConfigError(
                f"output: found checkpoints up to {existing[-1]}, expected a new directory, or --resume to go on"
            )
        if not existing:
            return None
        found = existing[-1]
    else:
        newest = find_checkpoint(resume)
        if newest is None:
            raise CheckpointError(f"{resume}: found no training checkpoint, expected one to resume from")
        found = newest
    return os.path.relpath(found, base), read_info(found)


def write_checkpoint(
    directory: Path,
    step: int,
    tensors: Iterable[tuple[str, Tensor]],
    info: dict[str, Any],
    write_policy: Callable[[Path], None],
    *,
    keep: int,
    shard_bytes: int = _SHARD_BYTES,
) -> Path:
    """Write ``step``'s checkpoint, then remove all but the newest ``keep``.

    Args:
        tensors: name and CPU tensor, read one by one.
        info: what goes into ``training.json`` besides.
        write_policy: writes the policy into the directory it is given.

    Raises:
        CheckpointError: it could not be written (a full disk, no permission); the earlier ones are intact.
    """
    target = checkpoint_path(directory, step)
    partial = directory / f".{target.name}.partial"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob(".step_*.partial"):  # of a killed writer
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir()
        files: dict[str, str] = {}
        shard: dict[str, Tensor] = {}

        def flush() -> None:
            if shard:
                name = f"state-{len(set(files.values())):05d}.safetensors"
                save_file(shard, partial / name)
                (partial / name).chmod(0o644)
                files.update(dict.fromkeys(shard, name))
                shard.clear()

        for name, tensor in tensors:
            shard[name] = tensor.contiguous()
            if sum(t.nbytes for t in shard.values()) >= shard_bytes:
                flush()
        flush()
        write_policy(partial / "policy")
        text = json.dumps({"format": FORMAT, "step": step, **info, "files": files}, indent=1)
        (partial / INFO_NAME).write_text(text)
        publish(partial, target, instead=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        complete = list_checkpoints(directory)
        last = f"the newest complete one is {complete[-1]}" if complete else "there is no earlier one"
        reason = _reason(error, directory)
        raise CheckpointError(f"{target}: could not write the checkpoint ({reason}); {last}") from error
    point_to(directory.parent / "policy", target / "policy")
    for old in list_checkpoints(directory)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def set_aside_later(directory: Path, step: int, log: Path) -> Path | None:
    """Move the checkpoints later than ``step`` to where they do not count, with a copy of ``log`` as it is now.

    Returns:
        The new folder ``rewound_<n>`` in ``directory`` that has them, to be resumed from like any other; None if there
        are none.

    Raises:
        CheckpointError: they could not be moved.
    """
    later = [path for of, path in _steps(directory) if of > step]
    if not later:
        return None
    number = 1
    while (aside := directory / f"rewound_{number}").exists():
        number += 1
    try:
        aside.mkdir()
        if log.is_file():
            shutil.copyfile(log, aside / log.name)
        for path in reversed(later):
            path.rename(aside / path.name)
        sync(aside)
        sync(directory)
    except OSError as error:
        raise CheckpointError(
            f"{later[-1]}: could not set aside the checkpoints later than step {step} ({error})"
        ) from error
    return aside


def expect_shared(path: Path, rank: int) -> None:
    """Wait until this rank sees ``path``, which rank 0 has found or made.

    Raises:
        ConfigError: it does not in ``SETTLE_S`` seconds, so the nodes do not share the folder.
    """
    end = time.monotonic() + SETTLE_S
    while not path.exists():
        if time.monotonic() >= end:
            raise not_shared(path, rank, "nothing there")
        time.sleep(0.5)


def not_shared(path: Path, rank: int, found: str) -> ConfigError:
    """The error of a rank that does not see at ``path`` what rank 0 does."""
    return ConfigError(
        f"{path.absolute()}: rank {rank} on {platform.node()} found {found}, expected what rank 0 sees: output, and a "
        "directory to resume from, must be in a folder that all nodes share"
    )


def point_to(link: Path, target: Path) -> None:
    """Make ``link`` a relative symbolic link to ``target``, in one step."""
    temporary = link.with_name(f".{link.name}.link")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, link.parent))
    os.replace(temporary, link)


def read_info(path: Path) -> dict[str, Any]:
    """``training.json`` of a checkpoint; :class:`CheckpointError` names what is wrong with it."""
    file = path / INFO_NAME
    info = load_document(file, "a training checkpoint", error=CheckpointError)
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise CheckpointError(f"{file}: found another format, expected {FORMAT!r}")
    return info


def read_tensors(path: Path, targets: dict[str, tuple[int, ...]], copy: Callable[[str, Tensor], None]) -> None:
    """Hand every tensor of ``targets`` (name → shape) to ``copy``, one by one.

    Raises:
        CheckpointError: missing, surplus or misshapen tensors, listed before anything is copied, or a damaged file.
    """
    files: dict[str, str] = read_info(path)["files"]
    with ExitStack() as stack:
        handles = {}
        try:
            for name in sorted(set(files.values())):
                handles[name] = stack.enter_context(safe_open(path / name, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path / name}: found {error}, expected a safetensors file") from error
        shapes = {name: tuple(handles[file].get_slice(name).get_shape()) for name, file in files.items()}
        problems = [f"missing {name}" for name in targets if name not in shapes]
        problems += [f"surplus {name}" for name in shapes if name not in targets]
        problems += [
            f"misshapen {name}: found {shapes[name]}, expected {shape}"
            for name, shape in targets.items()
            if name in shapes and shapes[name] != shape
        ]
        if problems:
            shown = "\n  ".join(sorted(problems)[:20])
            raise CheckpointError(f"{path}: {len(problems)} tensor(s) do not fit this configuration:\n  {shown}")
        for name in targets:
            copy(name, handles[files[name]].get_tensor(name))


def _reason(error: Exception, directory: Path) -> str:
    text = str(error)
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left" in text:
        return f"disk full, {shutil.disk_usage(directory).free / 2**20:.0f} MiB free: {text}"
    return text
