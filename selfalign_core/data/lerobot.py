"""LeRobotDataset v3 folders to our dataset, and back: the command line.

Reading is in ``lerobot_reader``, writing in ``lerobot_writer``, the folder's layout in ``lerobot_layout``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from selfalign_core.command_line import command
from selfalign_core.data.command_line import ImageSize, both_sides
from selfalign_core.data.dataset import TransitionDataset, describe
from selfalign_core.data.lerobot_reader import import_lerobot
from selfalign_core.data.lerobot_writer import export_lerobot


def read(
    source: Path,
    *,
    output: Path,
    image_size: ImageSize = (64,),
    cameras: Annotated[tuple[str, ...] | None, "names without observation.images. (default: all but depth)"] = None,
    embodiment: Annotated[str | None, "key of the body in the token bank (default: the robot_type)"] = None,
    absolute_actions: Annotated[bool, "actions are no positions of the state's joints"] = False,
    chunk: Annotated[int | None, "actions per chunk, for the statistics (default: 16)"] = None,
) -> None:
    """Make a dataset from a LeRobotDataset v3 folder."""
    import_lerobot(
        source, output, image_size=both_sides(image_size), cameras=cameras, embodiment=embodiment,
        absolute_actions=absolute_actions, statistics_horizon=chunk, progress=True,
    )  # fmt: skip
    print(describe(TransitionDataset(output)))


def write(
    source: Path,
    *,
    output: Path,
    videos: Annotated[bool, "H.264 videos instead of exact PNG images"] = False,
) -> None:
    """Write a dataset as a LeRobotDataset v3 folder."""
    dataset = TransitionDataset(source)
    frames, episodes = export_lerobot(dataset, output, videos=videos, progress=True)
    left_out = "" if dataset.expert_chunks is None else "; expert chunks have no place there and were left out"
    print(f"{output}: {frames} frames in {episodes} episodes{left_out}")


main = command(
    "selfalign_core.data.lerobot",
    {"import": read, "export": write},
    about="Convert from and to LeRobotDataset v3 folders.",
)

if __name__ == "__main__":
    sys.exit(main())
