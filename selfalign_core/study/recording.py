"""The report of a recorded run, as the run report node would have written it: from the bag alone.

    python -m selfalign_core.study.recording BAG --contract FILE --report FILE

Must not know ROS.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

from selfalign_core.command_line import command
from selfalign_core.data.rosbag_file import ABOUT_NAMESPACE, BagFile
from selfalign_core.files import write_text
from selfalign_core.robot.contract import RobotContract
from selfalign_core.study import run_picture, run_summary
from selfalign_core.study.run_record import HEARD, RunRecord
from selfalign_core.study.statistics import finite


def record_of_bag(path: Path, contract: RobotContract) -> RunRecord:
    """What was said while the bag was recorded. Raises ``BagError`` naming file and topic."""
    bag, record = BagFile(path), RunRecord(contract.name)
    namespace = bag.about.get(ABOUT_NAMESPACE, "/").rstrip("/")
    cameras = [camera.topic for camera in contract.cameras]
    names = {name if name.startswith("/") else f"{namespace}/{name}": name for name in (*cameras, *HEARD)}
    types = {topic: kind for topic, kind in bag.types.items() if topic in names}
    record.start_ns, record.end_ns = bag.span(types)
    record.frames = {name: [] for name in cameras}
    for topic, received_ns, raw in bag.messages(types):
        if names[topic] in record.frames:
            record.frames[names[topic]].append(bag.header_stamp(topic, raw))
        else:
            record.hear(names[topic], bag.decode(topic, types[topic], raw), received_ns)
    return record


def report_of_bag(
    bag: Annotated[Path, "recording of a run"],
    *,
    contract: Annotated[Path, "robot contract (YAML)"],
    report: Annotated[Path, "JSON file to write; a PNG is written beside it"],
) -> int:
    """Write the run report of a recording."""
    found = run_summary.summarise(record_of_bag(bag, RobotContract.from_yaml(contract)))
    text = json.dumps(finite(found), indent=1) + "\n"
    write_text(report, text)
    run_picture.draw(found, report.with_suffix(".png"))
    print(found["reason"] or f"report written to {report} and {report.with_suffix('.png').name}")
    return 0 if found["ok"] else 1


main = command("selfalign_core.study.recording", report_of_bag)

if __name__ == "__main__":
    sys.exit(main())
