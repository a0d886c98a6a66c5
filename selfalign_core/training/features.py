"""Image features of a frozen vision tower, computed once per frame, and the scale of those that are predicted."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selfalign_core.data.dataset import TransitionDataset
from selfalign_core.data.loader import Loader
from selfalign_core.errors import ConfigError, InputError
from selfalign_core.files import publish
from selfalign_core.model.pi0 import Pi0
from selfalign_core.policy.codec import pixels_to_model
from selfalign_core.training.state import expect_shared


def cache_features(
    path: Path,
    model: Pi0,
    dataset: TransitionDataset,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    gather: Callable[[Callable[[], Any]], list[Any]] = lambda work: [work()],
    report: Callable[[int, int], None] = lambda done, count: None,
    rows_per_pass: int = 64,
) -> np.ndarray:
    """Outputs of the frozen vision tower and projector for every frame: (N, cameras, patches, text width) float16.

    Computed once, each rank a share, into a memory-mapped file in directory ``path``, named after the weights and the
    dataset; it appears under its name when complete, and a later run with the same tower and dataset reuses it.
    ``gather``: ``Ranks.gather``; rank 0 decides what is to be done.

    Raises:
        InputError: a feature that float16 cannot hold.
        ConfigError: this rank does not see rank 0's file, or has another tower or dataset.
    """
    size = (len(dataset), len(dataset.meta.cameras), model.config.vision.num_patches, model.config.text.width)
    file = path / f"features-{_tower_digest(model, dataset)[:16]}.npy"

    def begin() -> tuple[str, str | None] | None:
        """Of rank 0: the name of the file, and that of the one to compute if it is not there."""
        if rank != 0:
            return None
        if file.is_file():
            return file.name, None
        path.mkdir(parents=True, exist_ok=True)
        for left in path.glob("*.partial"):  # of a killed run
            left.unlink()
        # A new name: what an earlier run may have left on a disk of another rank's is not taken for it.
        partial = file.with_suffix(f".{os.urandom(4).hex()}.partial")
        made = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=size)
        del made
        with open(partial, "rb+") as handle:  # a full disk is reported here
            os.posix_fallocate(handle.fileno(), 0, partial.stat().st_size)
        return file.name, partial.name

    name, partial_name = gather(begin)[0]

    def compute() -> None:
        if file.name != name:
            raise ConfigError(
                f"{file}: rank {rank} found these features to compute and rank 0 {name}, expected the same dataset, at "
                "the same path, and the same vision tower on every node (data.path, model.init)"
            )
        if partial_name is None:
            return
        expect_shared(path / partial_name, rank)
        out = np.lib.format.open_memmap(path / partial_name, mode="r+")
        first, last = (size[0] * r // world_size for r in (rank, rank + 1))
        with torch.no_grad():
            for row in range(first, last, rows_per_pass):
                images = torch.from_numpy(np.array(dataset.images[row : min(row + rows_per_pass, last)])).to(device)
                features = model.paligemma_with_expert.embed_image(pixels_to_model(images.flatten(0, 1))).half()
                if not features.isfinite().all():
                    raise InputError(f"features from row {row}: found values beyond float16, expected smaller ones")
                out[row : row + len(images)] = features.unflatten(0, images.shape[:2]).cpu().numpy()
                report(row - first + len(images), last - first)
        out.flush()

    def finish() -> None:
        if rank == 0 and partial_name is not None:
            publish(path / partial_name, file)

    for work in (compute, finish, lambda: expect_shared(file, rank)):
        gather(work)
    features = np.load(file, mmap_mode="r")
    if features.shape != size:
        raise InputError(f"{file}: found {features.shape}, expected {size}; delete it to compute it again")
    return features


def _tower_digest(model: Pi0, dataset: TransitionDataset) -> str:
    digest = hashlib.sha256(f"{dataset.path.resolve()} {len(dataset)}".encode())
    digest.update(np.ascontiguousarray(dataset.stamps).data)
    parts = model.paligemma_with_expert.paligemma.model
    for part in (parts.vision_tower, parts.multi_modal_projector):
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def measure_feature_scale(
    model: Pi0, loader: Loader, features: np.ndarray | None, *, device: torch.device, frames: int = 512
) -> None:
    """Set the model's mean and standard deviation of next-observation features from frames spread over the data.

    Dimensions that hardly vary keep a tenth of the median deviation, so that their noise is not blown up.
    """
    rows = np.unique(loader.rows[np.linspace(0, len(loader.rows) - 1, frames).astype(np.int64)])
    pooled = []
    for begin in range(0, len(rows), 64):
        block = rows[begin : begin + 64]
        if features is not None:
            tokens = list(torch.from_numpy(features[block]).to(device).float().unbind(1))
        else:
            images = torch.from_numpy(loader.dataset.images[block]).to(device)
            tokens = model.embed_images([pixels_to_model(image) for image in images.unbind(1)])
        pooled.append(model.pool_features(tokens).flatten(0, 1).double())
    values = torch.cat(pooled)
    std = values.std(0)
    model.next_obs_mean.copy_(values.mean(0))
    model.next_obs_std.copy_(std.clamp(min=max(float(std.median()) / 10, 1e-6)))
