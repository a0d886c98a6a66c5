"""The buffer node and time: what was received in a time that is over becomes no frame.

The node lives in the test process and its worker and messages are played by the test.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.ros

S = 1_000_000_000


class Stage:
    """A buffer node on the simulated arm's contract, whose jobs are done at once."""

    def __init__(self) -> None:
        from selfalign_ros.buffer_node import BufferNode

        self.node = BufferNode(["--ros-args", "-p", "contract:=contracts/sim_arm.yaml", "-p", "checkpoint:=tiny"])
        self.node.worker.submit = lambda job, done: job()
        with pytest.raises(StopIteration):
            self.node.configure().send(None)

    def close(self) -> None:
        self.node.close()
        self.node.destroy_node()
        self.node = None
        gc.collect()  # the lifecycle interfaces go with the state machine

    def see(self, stamp_ns: int) -> None:
        """Images and a joint state of that stamp."""
        from selfalign_ros.conversions import image_message, joint_state_message, to_stamp

        names = self.node.contract.joint_names
        self.node.inputs.joint_states._on_arrival(joint_state_message(names, np.zeros(len(names)), stamp_ns))
        for camera in self.node.contract.cameras:
            rgb = np.zeros((camera.height, camera.width, 3), np.uint8)
            self.node.inputs.cameras[camera.name]._on_arrival(image_message(rgb, to_stamp(stamp_ns), camera.name))

    @property
    def stamps(self) -> list[int]:
        return self.node._buffer._stamps


@pytest.fixture
def stage(probe: Any) -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.close()


def test_a_frame_is_stored_once_per_picture(stage: Stage) -> None:
    for step in range(3):
        stage.see(100 * S + step * S // 20)
        for _ in range(2):
            stage.node._ingest(100 * S + step * S // 20)
    assert stage.stamps == [100 * S, 100 * S + S // 20, 100 * S + S // 10]


@pytest.mark.parametrize("back_ns", [S // 50, S // 5, 50 * S])
def test_after_time_jumped_back_a_frame_is_made_of_what_came_since(stage: Stage, back_ns: int) -> None:
    stage.see(100 * S)
    stage.node._ingest(100 * S)
    now_ns = 100 * S - back_ns
    stage.node._ingest(now_ns)  # the last picture is from the future, though perhaps not by much
    assert "no message received" in stage.node._problem
    assert stage.stamps == [100 * S]
    now_ns += S // 20
    stage.see(now_ns)
    stage.node._ingest(now_ns)
    assert stage.node._problem == ""
    assert stage.stamps == ([100 * S, now_ns] if now_ns > 100 * S else [now_ns])
