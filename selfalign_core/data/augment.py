"""Variants of recorded robots, as embodiments of their own: other cameras and other transmissions, the same motion.

    python -m selfalign_core.data.augment DATASET --output DIR --variants 7

One robot teaches nothing about how robots differ. A variant is what the same recording would be on a robot whose camera
is mirrored or turned and whose joints count the other way or in other units: images, states, actions and the expert's
chunks change together, so a policy has to read from its E-Token which variant it drives. The recordings as they are
come first, under their own keys; variant i of ``robot`` is ``robot~i``, kept under ``sources`` in ``meta.json``.

Deterministic. Must not know ROS, the model or torch.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from selfalign_core.data.command_line import run_command
from selfalign_core.data.dataset import TransitionDataset
from selfalign_core.data.dataset_meta import PLAY
from selfalign_core.data.dataset_writer import DatasetWriter
from selfalign_core.errors import ConfigError


@dataclass(frozen=True)
class Variant:
    """One other robot.

    ``mirror``: images flipped left to right. ``rotation``: of images about their centre [rad], counter-clockwise, what
    comes into view is black. ``scale``: per joint, new reading over old one, negative where the joint counts the other
    way; of states and actions alike.
    """

    mirror: bool = False
    rotation: float = 0.0
    scale: tuple[float, ...] = ()

    def images(self, images: np.ndarray) -> np.ndarray:
        """(n, cameras, H, W, 3) uint8 → the same."""
        height, width = images.shape[2:4]
        turned = np.empty_like(images)
        matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), math.degrees(self.rotation), 1.0)
        for source, target in zip(
            images.reshape(-1, *images.shape[2:]), turned.reshape(-1, *images.shape[2:]), strict=True
        ):
            target[:] = cv2.warpAffine(source, matrix, (width, height)) if self.rotation else source
        return np.ascontiguousarray(turned[:, :, :, ::-1]) if self.mirror else turned

    def joints(self, values: np.ndarray) -> np.ndarray:
        """(..., joints) float32 states, actions or chunks → the same."""
        return (values * np.array(self.scale)).astype(np.float32)


def sample_variant(rng: np.random.Generator, joints: int, *, rotation: float = 0.2, gain: float = 0.25) -> Variant:
    """Mirror and each joint's sign by a coin, ``rotation`` [rad] and the logarithm of ``gain`` uniform up to ±."""
    sign = np.where(rng.random(joints) < 0.5, -1.0, 1.0)
    scale = sign * np.exp(rng.uniform(-gain, gain, joints))
    return Variant(bool(rng.random() < 0.5), float(rng.uniform(-rotation, rotation)), tuple(scale.tolist()))


def augment(source: TransitionDataset, output: str | Path, *, variants: int, seed: int) -> None:
    """Write ``source`` and ``variants`` variants of each of its embodiments as the dataset ``output``.

    Raises:
        ConfigError: fewer than one variant, or states and actions that are not of the same joints.
        DatasetError: ``output`` exists.
    """
    meta = source.meta
    if variants < 1:
        raise ConfigError(f"variants: found {variants}, expected >= 1")
    if meta.state_dim != meta.action_dim:
        raise ConfigError(
            f"{source.path}: found state_dim={meta.state_dim} and action_dim={meta.action_dim}, expected the same "
            "joints in both (a variant changes a joint's state and action together)"
        )
    with DatasetWriter(
        output,
        cameras=meta.cameras,
        image_size=meta.image_size,
        state_dim=meta.state_dim,
        action_dim=meta.action_dim,
        dt_ns=meta.dt_ns,
        prompts=meta.prompts,
        chunk_horizon=meta.chunk_horizon,
        delta_mask=meta.delta_mask,
        statistics_horizon=meta.statistics_horizon,
        joint_names=meta.joint_names,
    ) as writer:
        writer.counters.update(meta.counters)
        writer.sources += [dict(entry) for entry in meta.sources]
        same = Variant(scale=(1.0,) * meta.state_dim)
        for number in range(variants + 1):
            for index, name in enumerate(meta.embodiments):
                variant = (
                    sample_variant(np.random.default_rng([seed, number, index]), meta.state_dim) if number else same
                )
                key = f"{name}~{number}" if number else name
                if number:
                    writer.sources.append({"embodiment": key, "variant_of": name, "variant": asdict(variant)})
                _copy(source, writer, index, key, variant)


def _copy(source: TransitionDataset, writer: DatasetWriter, embodiment: int, key: str, variant: Variant) -> None:
    """The episodes of one embodiment as ``variant`` would have recorded them."""
    for number, episode in enumerate(source.meta.episodes):
        if episode.embodiment != embodiment:
            continue
        rows = slice(episode.start, episode.stop)
        chunks = source.expert_chunks
        recorded = source.recorded(number, track=source.meta.has_track)
        recorded["states"] = variant.joints(recorded["states"])
        if source.meta.has_track:
            recorded["track"] = replace(recorded["track"], actions=variant.joints(recorded["track"].actions))
        else:
            recorded["actions"] = variant.joints(recorded["actions"])
        writer.add_episode(
            **recorded,
            embodiment=key,
            prompt=None if episode.prompt == PLAY else source.meta.prompts[episode.prompt],
            images=variant.images(np.asarray(source.images[rows])),
            expert_chunks=None if chunks is None else variant.joints(chunks[rows]),
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Add variants of the recorded robots to a dataset.")
    parser.add_argument("dataset", help="dataset directory")
    parser.add_argument("--output", required=True, help="dataset directory to make")
    parser.add_argument("--variants", type=int, default=7, help="of each robot, besides the robot itself")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    return run_command(
        lambda: augment(
            TransitionDataset(options.dataset), options.output, variants=options.variants, seed=options.seed
        )
    )


if __name__ == "__main__":
    sys.exit(main())
