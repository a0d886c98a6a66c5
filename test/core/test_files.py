"""A file or directory is complete or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from selfalign_core.errors import DatasetError
from selfalign_core.files import PartialDirectory, publish, write_atomically, write_text


def test_a_file_appears_whole_and_a_failure_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.txt"
    write_text(file, "one π")
    assert file.read_text(encoding="utf-8") == "one π" and file.stat().st_mode & 0o777 == 0o644

    def half(temporary: str) -> None:
        Path(temporary).write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, half)
    assert file.read_text(encoding="utf-8") == "one π" and os.listdir(file.parent) == ["a.txt"]


def test_a_directory_takes_the_place_of_another_only_if_told_to(tmp_path: Path) -> None:
    for name in ("hidden", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(OSError, match="target"):
        publish(tmp_path / "hidden", tmp_path / "target")
    publish(tmp_path / "hidden", tmp_path / "target", instead=True)
    assert (tmp_path / "target" / "file").read_text() == "hidden" and os.listdir(tmp_path) == ["target"]


def test_a_partial_directory_is_one_writers_and_is_emptied_for_the_next(tmp_path: Path) -> None:
    target = tmp_path / "set"
    first, second = PartialDirectory(target), PartialDirectory(target)
    first.open()
    (first.path / "left").write_text("by a writer that is killed")
    with pytest.raises(DatasetError, match="found another process writing it"):
        second.open()
    first._release()  # as when its process ends
    second.open()
    (second.path / "file").write_text("whole")
    second.publish()
    second.remove()
    assert os.listdir(target) == ["file"] and os.listdir(tmp_path) == ["set"]
    with pytest.raises(DatasetError, match="found an existing path"):
        PartialDirectory(target).open()
