"""Camera streams between two processes: ``python image_stream.py send|receive FRAMES [BACKLOG]``.

The sender publishes one image of every size per tick of a 30 Hz timer, with a sensor's quality of service. With a
BACKLOG it never runs more images than that ahead of what the receiver says it has: a busy machine makes the streams
slower, it does not make them lose anything. The receiver prints the sequence numbers it got, as JSON, the sender its
rate.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import rclpy
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image
from std_msgs.msg import UInt32

from selfalign_ros.bridge import qos
from selfalign_ros.bridge.conversions import image_message, to_stamp

SIZES = ((480, 640), (720, 1280))
RATE_HZ = 30.0
RECEIVED = QoSProfile(depth=100, reliability=ReliabilityPolicy.BEST_EFFORT)


def topic(size: tuple[int, int]) -> str:
    return f"camera_{size[1]}x{size[0]}"


class Sender(Node):
    """Publishes ``frames`` images of each size; the stamp's nanoseconds are the sequence number."""

    def __init__(self, frames: int, backlog: int | None = None) -> None:
        super().__init__("sender")
        self._frames, self._backlog = frames, frames if backlog is None else backlog
        self._sent, self._got, self._begin_s, self.rate_hz = 0, dict.fromkeys(SIZES, -1), 0.0, 0.0
        self._images = {size: np.full((*size, 3), 7, np.uint8) for size in SIZES}
        self._cameras = {size: self.create_publisher(Image, topic(size), qos.SENSOR) for size in SIZES}
        for size in SIZES:
            self.create_subscription(UInt32, f"{topic(size)}/got", lambda m, s=size: self._on_got(s, m), qos.LATCHED)
        self.create_timer(1.0 / RATE_HZ, self._send)

    @property
    def is_done(self) -> bool:
        return min(self._got.values()) == self._frames - 1

    def _on_got(self, size: tuple[int, int], message: UInt32) -> None:
        self._got[size] = message.data

    def _send(self) -> None:
        if self._sent == 1 and min(self._got.values()) < 0:
            self._sent, self._begin_s = 0, time.monotonic()  # nobody listens yet
        if self._sent == self._frames or self._sent - min(self._got.values()) > self._backlog:
            return
        for size, camera in self._cameras.items():
            camera.publish(image_message(self._images[size], to_stamp(self._sent), ""))
        self._sent += 1
        self.rate_hz = (self._sent - 1) / (time.monotonic() - self._begin_s)


class Receiver(Node):
    """Notes what arrives and says so."""

    def __init__(self, frames: int) -> None:
        super().__init__("receiver")
        self._frames = frames
        self.sequences: dict[str, list[int]] = {topic(size): [] for size in SIZES}
        self._got = {}
        for size in SIZES:
            name = topic(size)
            self._got[name] = self.create_publisher(UInt32, f"{name}/got", qos.LATCHED)
            self.create_subscription(Image, name, lambda m, n=name, s=size: self._on_image(n, s, m), RECEIVED)

    @property
    def is_done(self) -> bool:
        return all(sequence and sequence[-1] == self._frames - 1 for sequence in self.sequences.values())

    def _on_image(self, name: str, size: tuple[int, int], message: Image) -> None:
        assert len(message.data) == size[0] * size[1] * 3 and message.data[-1] == 7, "a damaged image"
        number = message.header.stamp.nanosec
        if number or not self.sequences[name]:
            self.sequences[name].append(number)
        self._got[name].publish(UInt32(data=number))


def main(role: str, *numbers: int) -> None:
    rclpy.init()
    node = {"send": Sender, "receive": Receiver}[role](*numbers)
    while not node.is_done:
        rclpy.spin_once(node, timeout_sec=0.2)
    if isinstance(node, Receiver):
        print(json.dumps(node.sequences), flush=True)
        sys.stdin.read()  # until the sender has heard of the last one as well
    else:
        print(node.rate_hz)
    node.destroy_node()
    rclpy.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
