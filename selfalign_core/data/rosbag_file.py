"""A bag as files on the disk: where bags are, and their messages through ``rosbags``, damage told as ``BagError``.

Conversion, replay and reports read bags through it. Knows no robot contract and nothing of what the messages are for.
"""

from __future__ import annotations

import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from rosbags.rosbag2 import Reader
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from selfalign_core.errors import DatasetError

NS = 1_000_000_000
_STORAGE_SUFFIXES = (".mcap", ".db3")
# In the custom data of a bag, from SelfAlign's recorder: a checksum per topic, and what there is to know of the graph.
CHECKSUM_KEY = "crc32 "
ABOUT_CONTRACT, ABOUT_NAMESPACE = "selfalign contract", "selfalign namespace"


class BagError(DatasetError):
    """A bag that cannot be used: the message names file and topic, what was found and what was expected."""


def find_bags(paths: Sequence[str | Path]) -> list[Path]:
    """The bags among and below ``paths``: directories with a metadata.yaml, and storage files outside of those."""
    found: list[Path] = []

    def search(path: Path) -> None:
        if path.is_file():
            if path.suffix in _STORAGE_SUFFIXES:
                found.append(path)
        elif (path / "metadata.yaml").is_file():
            found.append(path)
        else:
            for child in sorted(path.iterdir()):
                if child.is_dir() or child.suffix in _STORAGE_SUFFIXES:
                    search(child)

    for path in map(Path, paths):
        if not path.exists():
            raise BagError(f"{path}: found no such file or directory, expected a bag")
        before = len(found)
        search(path)
        if len(found) == before:
            raise BagError(f"{path}: found no bag, expected metadata.yaml with .mcap or .db3 files in or below it")
    return list(dict.fromkeys(found))


class BagFile:
    """One bag through ``rosbags``, with every way it can be damaged turned into a ``BagError``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._store = get_typestore(Stores.ROS2_JAZZY)  # the types read here are the same in every distribution

    @classmethod
    def completed(cls, path: Path) -> BagFile:
        """The bag of a recording that was completed, its summary read."""
        if not path.is_dir():
            raise BagError(f"bag {path}: found {'a file' if path.exists() else 'nothing'}; expected a bag's folder")
        if not (path / "metadata.yaml").is_file():
            raise BagError(f"bag {path}: found no metadata.yaml; expected a bag whose recording was completed")
        bag = cls(path)
        bag.message_counts()
        return bag

    @cached_property
    def about(self) -> dict[str, str]:
        """The bag's custom data."""
        with self._open() as reader:
            return dict(reader.storage.metadata.custom or {})

    @cached_property
    def types(self) -> dict[str, str]:
        """Topic -> type of its messages."""
        with self._open() as reader:
            return {connection.topic: connection.msgtype for connection in reader.connections}

    def message_counts(self) -> dict[str, int]:
        """Topic -> messages, as the bag itself says."""
        counts: Counter[str] = Counter()
        with self._open() as reader:
            for connection in reader.connections:
                counts[connection.topic] += connection.msgcount
        return dict(counts)

    def messages(self, types: dict[str, str]) -> Iterator[tuple[str, int, bytes]]:
        """(topic, receive stamp [ns], CDR bytes) of every message on the topics, which must have these types."""
        with self._open() as reader:
            connections = [connection for connection in reader.connections if connection.topic in types]
            for connection in connections:
                if connection.msgtype != types[connection.topic]:
                    raise BagError(
                        f"{self.path}: topic {connection.topic}: found type {connection.msgtype}, "
                        f"expected {types[connection.topic]}"
                    )
            promised = Counter({c.topic: 0 for c in connections})
            for connection in connections:
                promised[connection.topic] += connection.msgcount
            found: Counter[str] = Counter()
            checksums = dict.fromkeys(types, 0)
            messages = reader.messages(connections) if connections else iter(())
            while (item := self._next(messages)) is not None:
                connection, received_ns, raw = item
                found[connection.topic] += 1
                checksums[connection.topic] = zlib.crc32(raw, checksums[connection.topic])
                yield connection.topic, received_ns, raw
            for topic, count in promised.items():
                if found[topic] != count:
                    raise BagError(
                        f"{self.path}: topic {topic}: found {found[topic]} messages, expected the {count} that the "
                        "bag's own index counts; the file is damaged or cut short"
                    )
                recorded = (reader.storage.metadata.custom or {}).get(f"{CHECKSUM_KEY}{topic}")
                if recorded is not None and recorded != f"{checksums[topic]:08x}":
                    raise BagError(
                        f"{self.path}: topic {topic}: found checksum {checksums[topic]:08x}, expected {recorded} as "
                        "recorded; the file was damaged or changed"
                    )

    def span(self, types: dict[str, str]) -> tuple[int, int]:
        """Receive stamps [ns] of the first and the last message on the topics, which are read through for damage."""
        first = last = None
        for _, last, _ in self.messages(types):
            first = last if first is None else first
        if first is None or last is None:
            raise BagError(f"bag {self.path}: found no message; expected some on {', '.join(types)}")
        return first, last

    def decode(self, topic: str, message_type: str, raw: bytes) -> Any:
        try:
            return self._store.deserialize_cdr(raw, message_type)
        except Exception as error:  # rosbags lets struct, index, assertion and unicode errors through
            raise BagError(
                f"{self.path}: topic {topic}: found {len(raw)} bytes that are no {message_type} ({_shown(error)}); "
                "the file is damaged"
            ) from error

    def header_stamp(self, topic: str, raw: bytes) -> int:
        """``header.stamp`` [ns] of a message that begins with its header, without decoding the rest."""
        if len(raw) < 12:
            raise BagError(f"{self.path}: topic {topic}: found a message of {len(raw)} bytes, expected a header")
        sec, nanosec = struct.unpack_from("<iI" if raw[1] & 1 else ">iI", raw, 4)
        if sec == 0 and nanosec == 0:
            raise BagError(f"{self.path}: topic {topic}: found header stamp 0, expected the time of the measurement")
        return sec * NS + nanosec

    @contextmanager
    def _open(self) -> Iterator[Reader]:
        reader = self._guarded(lambda: Reader(self.path))
        self._guarded(reader.open)
        try:
            for connection in reader.connections:
                if connection.msgtype not in self._store.types and connection.msgdef.data:
                    self._store.register(get_types_from_msg(connection.msgdef.data, connection.msgtype))
            yield reader
        finally:
            reader.close()

    def _files(self) -> str:
        if self.path.is_file():
            return str(self.path)
        return ", ".join(str(f) for f in sorted(self.path.iterdir()) if f.suffix in _STORAGE_SUFFIXES) or str(self.path)

    def _next(self, messages: Iterator[Any]) -> Any:
        return self._guarded(lambda: next(messages, None))

    def _guarded(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # rosbags lets errors of struct, zstd, sqlite, assertions and more through
            raise BagError(
                f"{self._files()}: found an unreadable bag ({_shown(error)}), expected a complete MCAP or sqlite3 "
                "recording; the file is damaged or cut short (was the recorder killed? try `ros2 bag reindex` or "
                "`mcap recover` on a copy)"
            ) from error


def _shown(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
