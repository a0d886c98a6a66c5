"""The Fast DDS profile of the graph: camera streams arrive whole, and killed processes leave no shared memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from image_stream import SIZES, topic
from node_testing import ROOT, TIMEOUT_S, wait_for

from selfalign_ros.graph.declaration import BRINGUP
from selfalign_ros.graph.shared_memory import remove_orphaned_segments

BACKLOG = 4


def environment() -> dict[str, str]:
    """That of every node of the graph."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return dict(os.environ) | dict(BRINGUP({}).environment) | {"PYTHONPATH": paths}


@pytest.mark.parametrize(
    ("frames", "backlog"), [(60, (BACKLOG,)), pytest.param(300, (), marks=pytest.mark.long, id="ten-seconds-at-30-Hz")]
)
def test_camera_streams_arrive_without_loss(ros_domain: int, frames: int, backlog: tuple[int, ...]) -> None:
    """A busy machine may hold up the sender, but not in ``make test-long``."""
    script = str(Path(__file__).parent / "image_stream.py")
    receiver, sender = (
        subprocess.Popen(
            [sys.executable, script, *map(str, numbers)],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for numbers in (("receive", frames), ("send", frames, *backlog))
    )
    try:
        # One that is lost at the end keeps the sender waiting; one that is lost before that is missing in the list.
        rate_hz = float(sender.communicate(timeout=TIMEOUT_S)[0])
        assert sender.returncode == 0
        output, _ = receiver.communicate(timeout=TIMEOUT_S)
    finally:
        for process in (receiver, sender):
            process.kill()
            process.wait()
    assert json.loads(output) == {topic(size): list(range(frames)) for size in SIZES}
    print(f"{rate_hz:.1f} images of each size per second")


def test_a_segment_that_was_just_made_goes_once_it_is_sure_that_nobody_owns_it(tmp_path: Path) -> None:
    """Its owner was ended before it had locked it."""
    segment, lock = tmp_path / "fastrtps_0123456789abcdef", tmp_path / "fastrtps_0123456789abcdef_el"
    for path in (segment, lock):
        path.touch()
    assert remove_orphaned_segments(tmp_path) == []  # it may be about to
    assert lock.exists()
    assert remove_orphaned_segments(tmp_path, wait=True) == [segment.name]
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="found no /dev/shm on this machine")
def test_a_killed_process_leaves_no_shared_memory(ros_domain: int) -> None:
    def segments(process: subprocess.Popen) -> set[Path]:
        """The locks of those it holds."""
        held = {os.readlink(path) for path in Path(f"/proc/{process.pid}/fd").iterdir()}
        return {Path(path) for path in held if path.startswith("/dev/shm/fastrtps_") and "port" not in path}

    wait = "import rclpy, signal; rclpy.init(); node = rclpy.create_node('node'); print(flush=True); signal.pause()"
    living, doomed = (
        subprocess.Popen([sys.executable, "-c", wait], env=environment(), stdout=subprocess.PIPE) for _ in range(2)
    )
    try:
        for process in (living, doomed):
            assert process.stdout is not None and process.stdout.readline()
        kept, orphaned = segments(living), segments(doomed)
        assert kept and orphaned, "no segments: the profile is not in force"
        doomed.send_signal(signal.SIGKILL)
        doomed.wait()

        def is_clean() -> bool:
            remove_orphaned_segments()
            return not any(path.exists() for path in orphaned)

        wait_for(is_clean, "the segments of the killed process are removed")
        assert all(path.exists() for path in kept)
    finally:
        for process in (living, doomed):
            process.kill()
            process.wait()
