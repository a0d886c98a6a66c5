"""Single frames of simulated bodies in random poses, with where things are in the picture: labels for the vision tower.

Deterministic: the same arguments give the same bytes, whatever the number of processes. Must not know ROS, the model or
torch.
"""

from __future__ import annotations

import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from selfalign_core.robot.images import resize_with_pad
from selfalign_core.sim import FAMILIES, JOINTS, TARGET_NAMES, ArmSim, BodyConfig, BodyRanges

ARM_POINTS = ("upper_arm_body", "elbow_body", "wrist_body", "gripper_body")
POINTS = (*TARGET_NAMES, *ARM_POINTS, "tip")
"""What is located: the targets, in their order, then points of the arm from the base to the tip."""

_FRAMES_PER_BODY = 16
_RANGES = BodyRanges().scaled(1.25)  # the tower has to see a little further than the policy is trained to act
_POSE_CENTRE = np.array([0.0, 0.2, 0.2, 0.0, 0.0, 0.0, 0.3])  # rad, kinematic
_POSE_WIDTH = np.array([1.2, 1.2, 1.2, 0.24, 0.36, 0.36, 0.0])


@dataclass(frozen=True)
class Frames:
    """``images`` (n, H, W, 3) uint8 RGB of one camera, ``points`` (n, len(POINTS), 2) float32.

    A point is (x, y) as a fraction of the picture from its top left corner, outside 0..1 where it is out of view.
    """

    images: np.ndarray
    points: np.ndarray


def random_frames(
    count: int,
    seed: int,
    *,
    camera: str = "overhead",
    camera_size: tuple[int, int] = (224, 224),
    image_size: tuple[int, int] = (64, 64),
    jobs: int = 1,
    progress: bool = False,
) -> Frames:
    """``count`` frames, a few per random body (the nominal one among them), drawn and then shrunk, (H, W) in pixels."""
    groups = math.ceil(count / _FRAMES_PER_BODY)
    seeds = [[seed, group] for group in range(groups)]
    arguments = seeds, [camera] * groups, [camera_size] * groups, [image_size] * groups
    bar = tqdm(total=groups, unit="body", disable=not progress)
    found: list[Frames] = []
    if jobs == 1:
        for frames in map(_frames_of_a_body, *arguments):
            found.append(frames)
            bar.update()
    else:
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            for frames in pool.map(_frames_of_a_body, *arguments, chunksize=8):
                found.append(frames)
                bar.update()
    bar.close()
    return Frames(
        np.concatenate([frames.images for frames in found])[:count],
        np.concatenate([frames.points for frames in found])[:count],
    )


def _frames_of_a_body(
    seed: list[int], camera: str, camera_size: tuple[int, int], image_size: tuple[int, int]
) -> Frames:
    rng = np.random.default_rng(seed)
    body = BodyConfig() if rng.random() < 0.05 else BodyConfig.sample(rng, families=FAMILIES, ranges=_RANGES)
    sim = ArmSim(body)
    images = np.empty((_FRAMES_PER_BODY, *image_size, 3), np.uint8)
    points = np.empty((_FRAMES_PER_BODY, len(POINTS), 2), np.float32)
    for image, places in zip(images, points, strict=True):
        sim.reset_targets(rng)
        sim.place(_POSE_CENTRE + rng.uniform(-1.0, 1.0, len(JOINTS)) * _POSE_WIDTH)
        image[:] = resize_with_pad(sim.render(camera, *camera_size), *image_size)
        where = [sim.data.body(name).xpos for name in (*TARGET_NAMES, *ARM_POINTS)]
        places[:] = sim.project(camera, np.stack([*where, sim.tip()]), aspect=camera_size[1] / camera_size[0])
    sim.close()
    return Frames(images, points)
