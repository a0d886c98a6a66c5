"""rosbag2 bags (MCAP): writing one of a run, and reading one that can be trusted.

The serialized messages are kept byte for byte. Everything that can be wrong with a bag is found before the first
message is handed out: ``Bag.check`` reads it through once. This module must not know ``rclpy``, nor what the topics
mean.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from rosbags.interfaces import Connection, ConnectionExtRosbag2, Qos
from rosbags.rosbag2 import Reader, StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from selfalign_core.errors import SelfAlignError
from selfalign_ros.life.resources import config_folder

_CRC_KEY = "crc32 "  # in the bag's custom data: checksum of all messages of one topic
_METADATA_VERSION = 9  # that of ROS 2 Jazzy


class BagError(SelfAlignError):
    """A bag that cannot be used or written: names the file or topic, what was found and what was expected."""


@dataclass(frozen=True)
class BagMessage:
    """One recorded message: ``topic`` as in the bag, time of recording [ns], serialized (CDR) bytes."""

    topic: str
    time_ns: int
    data: bytes


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
        checksums = {f"{_CRC_KEY}{topic}": f"{value:08x}" for topic, value in self._checksums.items()}
        for key, value in (self._about | checksums).items():
            self._writer.set_custom_data(key, value)
        self._writer.close()

    def abort(self) -> None:
        """Leave the bag incomplete."""
        self._writer.abort()


class Bag:
    """A bag to read. Opening it raises ``BagError`` if it is no complete rosbag2; use as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise BagError(f"bag {path}: found {'a file' if path.exists() else 'nothing'}; expected a bag's folder")
        if not (path / "metadata.yaml").is_file():
            raise BagError(f"bag {path}: found no metadata.yaml; expected a bag whose recording was completed")
        try:
            self._reader = Reader(path)
            self._reader.open()
            metadata = yaml.safe_load((path / "metadata.yaml").read_text(encoding="utf-8"))
        except Exception as error:
            # The reader raises whatever the damage makes it stumble over.
            raise BagError(f"bag {path}: found it damaged or cut off ({error}); expected a complete bag") from error
        custom = metadata["rosbag2_bagfile_information"].get("custom_data")
        self.about: dict[str, str] = dict(custom or {})

    def __enter__(self) -> Bag:
        return self

    def __exit__(self, *error: object) -> None:
        self._reader.close()

    @property
    def types(self) -> dict[str, str]:
        """Type name of every topic."""
        return {connection.topic: connection.msgtype for connection in self._reader.connections}

    @property
    def counts(self) -> dict[str, int]:
        """Messages of every topic, as the bag's metadata states them."""
        return {topic: sum(c.msgcount for c in self._connections(topic)) for topic in self.types}

    @property
    def offered_qos(self) -> dict[str, list[Qos]]:
        """What the publishers of every topic offered."""
        return {
            c.topic: list(c.ext.offered_qos_profiles)
            for c in self._reader.connections
            if isinstance(c.ext, ConnectionExtRosbag2)
        }

    def messages(self, topics: Sequence[str]) -> Iterator[BagMessage]:
        """The messages of these topics in the order of their recording. Raises ``BagError`` where it is damaged."""
        connections = [connection for topic in topics for connection in self._connections(topic)]
        try:
            for connection, time_ns, data in self._reader.messages(connections):
                yield BagMessage(connection.topic, time_ns, bytes(data))
        except Exception as error:
            raise BagError(f"bag {self.path}: found it damaged ({error}); expected a complete bag") from error

    def check(self, topics: Sequence[str]) -> tuple[int, int]:
        """Read these topics through; the time of the first and of the last message [ns].

        Raises ``BagError`` naming the topic whose messages are fewer than the metadata says, or were altered.
        """
        counts = dict.fromkeys(topics, 0)
        checksums = dict.fromkeys(topics, 0)
        first = last = None
        for message in self.messages(topics):
            counts[message.topic] += 1
            checksums[message.topic] = zlib.crc32(message.data, checksums[message.topic])
            first = message.time_ns if first is None else first
            last = message.time_ns
        for topic in topics:
            if counts[topic] != self.counts[topic]:
                raise BagError(
                    f"bag {self.path}, topic {topic}: found {counts[topic]} messages; "
                    f"expected {self.counts[topic]} as its metadata says"
                )
            expected = self.about.get(f"{_CRC_KEY}{topic}")
            if expected is not None and expected != f"{checksums[topic]:08x}":
                raise BagError(
                    f"bag {self.path}, topic {topic}: found checksum {checksums[topic]:08x}; expected {expected} as "
                    "recorded: the bag was altered or damaged"
                )
        if first is None or last is None:
            raise BagError(f"bag {self.path}: found no message; expected some on {', '.join(topics)}")
        return first, last

    def _connections(self, topic: str) -> list[Connection]:
        return [connection for connection in self._reader.connections if connection.topic == topic]
