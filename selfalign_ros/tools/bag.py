"""Writing a rosbag2 bag (MCAP) of a run, the serialized messages byte for byte. Must not know ``rclpy``, nor what the
topics mean. Reading bags is in ``selfalign_core.data.rosbag_file``.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from rosbags.interfaces import Connection, Qos
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from selfalign_core.data.rosbag_file import CHECKSUM_KEY, BagError
from selfalign_ros.life.resources import config_folder

_METADATA_VERSION: Literal[9] = 9  # that of ROS 2 Jazzy


def _typestore() -> Typestore:
    store = get_typestore(Stores.ROS2_JAZZY)
    for path in sorted((config_folder().parent / "msg").glob("*.msg")):
        store.register(get_types_from_msg(path.read_text(encoding="utf-8"), f"selfalign/msg/{path.stem}"))
    return store


class BagWriter:
    """Writes one new bag. Use as a context manager: leaving it on an error leaves a bag without metadata, which no
    reader takes for a whole one.
    """

    def __init__(self, path: Path, about: Mapping[str, str]) -> None:
        if path.exists():
            raise BagError(f"bag {path}: found something there already; expected a new folder")
        self._store = _typestore()
        self._writer = Writer(path, version=_METADATA_VERSION, storage_plugin=StoragePlugin.MCAP)
        self._about = dict(about)
        self._connections: dict[str, Connection] = {}
        self._checksums: dict[str, int] = {}

    def __enter__(self) -> BagWriter:
        self._writer.open()
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self.close()
        else:
            self.abort()

    def add_topic(self, topic: str, type_name: str, qos: Sequence[Qos]) -> None:
        """Declare a topic before its first message. ``qos``: what its publishers offer."""
        if type_name not in self._store.types:
            raise BagError(f"topic {topic}: found unknown type {type_name}; expected one of ROS 2 or of selfalign")
        self._connections[topic] = self._writer.add_connection(
            topic, type_name, typestore=self._store, offered_qos_profiles=qos
        )
        self._checksums[topic] = 0

    def __contains__(self, topic: object) -> bool:
        return topic in self._connections

    def write(self, topic: str, time_ns: int, data: bytes) -> None:
        """Append one message of a declared topic."""
        self._writer.write(self._connections[topic], time_ns, data)
        self._checksums[topic] = zlib.crc32(data, self._checksums[topic])

    def close(self) -> None:
        """Complete the bag."""
        checksums = {f"{CHECKSUM_KEY}{topic}": f"{value:08x}" for topic, value in self._checksums.items()}
        for key, value in (self._about | checksums).items():
            self._writer.set_custom_data(key, value)
        self._writer.close()

    def abort(self) -> None:
        """Leave the bag incomplete."""
        self._writer.abort()
