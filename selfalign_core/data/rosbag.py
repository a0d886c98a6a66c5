"""From ROS 2 bags (MCAP or sqlite3) to a dataset, through the robot contract. No ROS installation is needed.

Every bag is read twice. The first pass (``rosbag_recording``) takes the joint states, the commands and the stamps of
the images, so that what is wrong with a bag is known before anything is written; how these become frames, by the rule
of the nodes, is in ``rosbag_frames``. The second pass, here, decodes each image that is used, once, into the
memory-mapped file. Memory does not grow with the size of the images.

Must not know the model, torch or rclpy.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tqdm import tqdm

from selfalign_core.command_line import More, command
from selfalign_core.data.command_line import ImageSize, both_sides
from selfalign_core.data.dataset import TransitionDataset, describe
from selfalign_core.data.dataset_writer import DatasetWriter
from selfalign_core.data.rosbag_file import NS, BagError, BagFile, find_bags
from selfalign_core.data.rosbag_frames import Player
from selfalign_core.data.rosbag_messages import IMAGE_TYPES
from selfalign_core.data.rosbag_options import Options
from selfalign_core.data.rosbag_recording import read_recording
from selfalign_core.errors import DatasetError, InputError
from selfalign_core.robot.contract import RobotContract
from selfalign_core.robot.images import picture


@dataclass
class BagReport:
    """What became of one bag."""

    bag: str
    frames: int = 0
    episodes: int = 0
    action_topic: str = ""
    counters: Counter[str] = field(default_factory=Counter)

    def line(self) -> str:
        causes = ", ".join(f"{name} {count}" for name, count in sorted(self.counters.items()) if name != "ticks")
        return (
            f"{self.bag}: {self.frames} frames of {self.counters['ticks']} ticks in {self.episodes} episode(s), "
            f"actions from {self.action_topic}" + (f" ({causes})" if causes else "")
        )

    def to_dict(self) -> dict[str, Any]:
        counters = dict(sorted(self.counters.items()))
        return {"bag": self.bag, "frames": self.frames, "episodes": self.episodes, "counters": counters}


def convert(
    bags: Sequence[str | Path],
    contract: RobotContract,
    output: str | Path,
    options: Options | None = None,
    *,
    progress: bool = False,
) -> list[BagReport]:
    """Write the dataset ``output`` from bags, or from folders that hold bags, and say what became of each bag.

    Raises:
        BagError: naming file and topic; nothing is left at ``output`` then.
        DatasetError: ``output`` exists, or there is not one usable frame.
    """
    options = options or Options()
    joints = len(contract.joints)
    if unknown := sorted(set(options.absolute) - set(contract.joint_names)):
        raise DatasetError(f"absolute: found joints {unknown}, expected some of {list(contract.joint_names)}")
    options.check_action_age(contract.dt)
    paths = find_bags(bags)
    reports = []
    with DatasetWriter(
        output,
        cameras=contract.camera_names,
        image_size=options.image_size,
        state_dim=joints,
        action_dim=joints,
        dt_ns=contract.dt_ns,
        joint_names=contract.joint_names,
        delta_mask=[name not in options.absolute for name in contract.joint_names],
        statistics_horizon=options.statistics_horizon,
    ) as writer:
        for path in paths:
            reports.append(_add_bag(path, contract, options, writer, progress=progress))
        total: Counter[str] = sum((report.counters for report in reports), Counter())
        writer.counters = dict(sorted(total.items()))
        writer.sources = [report.to_dict() for report in reports]
        if writer.num_frames == 0:
            details = "; ".join(report.line() for report in reports)
            raise BagError(f"found no usable frame, expected at least {options.min_frames} in a row: {details}")
    return reports


def _add_bag(
    path: Path, contract: RobotContract, options: Options, writer: DatasetWriter, *, progress: bool
) -> BagReport:
    bag = BagFile(path)
    recording = read_recording(bag, contract, options)
    report = BagReport(str(path.name), action_topic=recording.action_topic, counters=recording.counters)
    player = Player(contract, options, report.counters)
    wanted: dict[str, dict[int, list[int]]] = {camera.name: {} for camera in contract.cameras}
    for episode in (episode for run in recording.runs() for episode in player.episodes(run)):
        start = writer.add_episode(
            states=episode.states,
            track=episode.track,
            stamps=episode.stamps,
            embodiment=options.embodiment or contract.embodiment,
            prompt=(episode.prompt if options.prompt is None else options.prompt) or None,
        )
        for camera in contract.camera_names:
            for frame, ordinal in enumerate(episode.images[camera]):
                wanted[camera].setdefault(int(ordinal), []).append(start + frame)
        report.frames += len(episode.stamps)
        report.episodes += 1
    _write_images(bag, contract, options, wanted, writer, progress=progress)
    return report


def _write_images(
    bag: BagFile,
    contract: RobotContract,
    options: Options,
    wanted: dict[str, dict[int, list[int]]],
    writer: DatasetWriter,
    *,
    progress: bool,
) -> None:
    """Decode the images in ``wanted`` (camera -> ordinal -> rows) and write each to its rows."""
    cameras = {options.topic(camera.topic): (index, camera) for index, camera in enumerate(contract.cameras)}
    ordinals = dict.fromkeys(cameras, -1)
    total = sum(len(images) for images in wanted.values())
    types = {topic: IMAGE_TYPES[camera.encoding] for topic, (_, camera) in cameras.items()}
    # disable=None: no bar where the output is not a terminal
    with tqdm(total=total, desc=bag.path.name, unit="image", disable=None if progress else True) as bar:
        for topic, _, raw in bag.messages(types):
            index, camera = cameras[topic]
            ordinals[topic] += 1
            rows = wanted[camera.name].get(ordinals[topic])
            if rows is None:
                continue
            message = bag.decode(topic, types[topic], raw)
            try:
                image = picture(message, camera, options.image_size)
            except InputError as error:
                stamp = bag.header_stamp(topic, raw)
                raise BagError(f"{bag.path}: topic {topic}, image stamped {stamp / NS:.3f} s: {error}") from None
            for row in rows:
                writer.write_image(row, index, image)
            bar.update()


# --- command line ---


def run(
    *bags: Annotated[Path, "bags, or folders that hold bags"],
    contract: Annotated[Path, "robot contract (YAML)"],
    output: Annotated[Path, "dataset directory to make"],
    image_size: ImageSize = (64,),
    prompt: Annotated[
        str | None, "what the robot was told to do, '' for play (default: as recorded on the topic prompt; else play)"
    ] = None,
    embodiment: Annotated[str | None, "key of this body in the token bank (default: the contract's name)"] = None,
    namespace: Annotated[str, "namespace of the topics"] = "/",
    max_action_age: Annotated[
        float | None,
        "longest time an action stays in force when no newer one comes (default and least: 1.5 control steps)",
        More(metavar="SECONDS"),
    ] = None,
    absolute: Annotated[
        tuple[str, ...],
        "joints whose actions are not taken relative to the state, such as grippers",
        More(metavar="JOINT"),
    ] = (),
    min_frames: Annotated[int, "shortest episode to keep"] = 2,
    chunk: Annotated[int | None, "actions per chunk, for the statistics of relative actions (default: 16)"] = None,
    allow_early_end: Annotated[bool, "use what was recorded before a topic vanished"] = False,
) -> None:
    """Make a training dataset from ROS 2 bags (MCAP or sqlite3)."""
    options = Options(
        image_size=both_sides(image_size), prompt=prompt, embodiment=embodiment, namespace=namespace,
        max_action_age_s=max_action_age, min_frames=min_frames, absolute=absolute,
        allow_early_end=allow_early_end, statistics_horizon=chunk,
    )  # fmt: skip
    for report in convert(bags, RobotContract.from_yaml(contract), output, options, progress=True):
        print(report.line())
    print(describe(TransitionDataset(output)))


main = command("selfalign_core.data.rosbag", run)

if __name__ == "__main__":
    sys.exit(main())
