"""A bag as files on the disk: where bags are, and their messages through ``rosbags``, damage told as ``BagError``.

Knows no robot contract and nothing of what the messages are for.
"""

from __future__ import annotations

import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rosbags.rosbag2 import Reader
from rosbags.typesys import Stores, get_typestore

from selfalign_core.errors import DatasetError

NS = 1_000_000_000
_STORAGE_SUFFIXES = (".mcap", ".db3")
_CHECKSUM_KEY = "crc32 "  # SelfAlign's recorder keeps one checksum per topic in the bag's custom data


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
                recorded = (reader.storage.metadata.custom or {}).get(f"{_CHECKSUM_KEY}{topic}")
                if recorded is not None and recorded != f"{checksums[topic]:08x}":
                    raise BagError(
                        f"{self.path}: topic {topic}: found checksum {checksums[topic]:08x}, expected {recorded} as "
                        "recorded; the file was damaged or changed"
                    )

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
