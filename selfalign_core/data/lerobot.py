"""LeRobotDataset v3 folders to our dataset, and back: the command line.

Reading is in ``lerobot_reader``, writing in ``lerobot_writer``, the folder's layout in ``lerobot_layout``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from selfalign_core.data.command_line import image_size_argument, run_command
from selfalign_core.data.dataset import TransitionDataset, describe
from selfalign_core.data.lerobot_reader import import_lerobot
from selfalign_core.data.lerobot_writer import export_lerobot


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m selfalign_core.data.lerobot", description="Convert from and to LeRobotDataset v3 folders."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    reading = commands.add_parser("import", help="make a dataset from a LeRobotDataset v3 folder")
    reading.add_argument("source", type=Path)
    reading.add_argument("--output", required=True, type=Path)
    reading.add_argument("--image-size", type=int, nargs="+", default=[64], metavar="PIXELS", help="default: 64")
    reading.add_argument("--cameras", nargs="+", help="names without observation.images. (default: all but depth)")
    reading.add_argument("--embodiment", help="key of the body in the token bank (default: the robot_type)")
    reading.add_argument(
        "--absolute-actions", action="store_true", help="actions are no positions of the state's joints"
    )
    reading.add_argument("--chunk", type=int, help="actions per chunk, for the statistics (default: 16)")
    writing = commands.add_parser("export", help="write a dataset as a LeRobotDataset v3 folder")
    writing.add_argument("source", type=Path)
    writing.add_argument("--output", required=True, type=Path)
    writing.add_argument("--videos", action="store_true", help="H.264 videos instead of exact PNG images")
    options = parser.parse_args(arguments)

    def work() -> None:
        if options.command == "import":
            import_lerobot(
                options.source,
                options.output,
                image_size=image_size_argument(options.image_size),
                cameras=options.cameras,
                embodiment=options.embodiment,
                absolute_actions=options.absolute_actions,
                statistics_horizon=options.chunk,
                progress=True,
            )
            print(describe(TransitionDataset(options.output)))
        else:
            dataset = TransitionDataset(options.source)
            frames, episodes = export_lerobot(dataset, options.output, videos=options.videos, progress=True)
            left_out = "" if dataset.expert_chunks is None else "; expert chunks have no place there and were left out"
            print(f"{options.output}: {frames} frames in {episodes} episodes{left_out}")

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
