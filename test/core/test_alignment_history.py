"""What was accepted is remembered, can be taken back, and survives a crash; other robots' files are refused."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from selfalign_core.alignment.history import Accepted, History
from selfalign_core.errors import CheckpointError, InputError
from selfalign_core.policy.token_files import E_TOKEN_PARAMETER, load_e_token, save_e_token
from selfalign_core.robot.types import EToken

FIRST = EToken(np.full((2, 4), 0.5, np.float32), 3, "arm", "a" * 64)


def data(value: float) -> np.ndarray:
    return np.full((2, 4), value, np.float32)


def history(*values: float, keep: int = 4) -> History:
    """``FIRST``, then these."""
    made = History(Accepted(FIRST, 10, math.nan), keep=keep)
    for index, value in enumerate(values):
        made.accept(data(value), 1_700_000_000_123_456_789 + index, 2.5 - index)
    return made


def same(a: History, b: History) -> bool:
    def plain(h: History) -> list:
        return [(e.token.data.tobytes(), e.token.version, e.token.embodiment, e.stamp_ns, repr(e.score))
                for e in h.entries]  # fmt: skip

    return plain(a) == plain(b)


def test_versions_grow_and_the_oldest_are_forgotten() -> None:
    made = history(1, 2, 3, 4, 5)
    assert made.token.version == 8
    assert (made.token.data == 5).all()
    assert [e.token.version for e in made.entries] == [5, 6, 7, 8]


def test_an_accepted_array_is_copied() -> None:
    made, array = history(), data(1)
    made.accept(array, 1, 0.0)
    array[:] = 9
    assert (made.token.data == 1).all()


def test_rollback_brings_the_last_token_back_under_a_new_version() -> None:
    made = history(1, 2)
    token = made.rollback(99)
    assert (token.data == 1).all()
    assert token.version == 6  # one that no policy has seen
    assert [e.token.version for e in made.entries] == [3, 6]
    assert made.entries[-1].stamp_ns == 99
    assert (made.rollback(100).data == FIRST.data).all()
    with pytest.raises(InputError, match="no earlier accepted token"):
        made.rollback(101)
    assert made.token.version == 7


@pytest.mark.parametrize("values", [(), (1,), (1, 2, 3, 4, 5, 6)])
def test_a_file_gives_everything_back(tmp_path: Path, values: tuple[float, ...]) -> None:
    made, path = history(*values), tmp_path / "arm.safetensors"
    made.save(path)
    assert same(History.load(path, like=FIRST, keep=4), made)
    assert len(History.load(path, like=FIRST, keep=2).entries) == min(2, len(made.entries))


def test_the_file_is_an_e_token_file(tmp_path: Path) -> None:
    made, path = history(1, 2), tmp_path / "arm.safetensors"
    made.save(path)
    token = load_e_token(path, model_digest=FIRST.model_digest, shape=(2, 4))
    assert (token.version, token.embodiment) == (5, "arm")
    assert token.data.tobytes() == made.token.data.tobytes()
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["losses"]) == {"total": 1.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_digest": "b" * 64}, "found a token of model 'aaaaaaaaaaaa', expected model 'bbbbbbbbbbbb'"),
        ({"data": np.zeros((1, 4), np.float32)}, r"found a token of shape \(2, 4\), expected \(1, 4\)"),
        ({"embodiment": "leg"}, "found tokens of 'arm', expected 'leg'"),
    ],
)
def test_another_robots_file_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "arm.safetensors"
    history(1).save(path)
    with pytest.raises(CheckpointError, match=message):
        History.load(path, like=dataclasses.replace(FIRST, **change), keep=4)


@pytest.mark.parametrize(
    "earlier",
    ["", "{}", "[1]", "[{}]", json.dumps([{"version": 1, "stamp_ns": 1, "losses": {}, "data": "AAAA"}]),
     json.dumps([{"version": 1, "stamp_ns": 1, "losses": {}, "data": "AADAfwAAwH8AAMB/AADAfwAAwH8AAMB/AADAfwAAwH8="}])],
)  # fmt: skip
def test_a_damaged_history_is_refused(tmp_path: Path, earlier: str) -> None:
    path = tmp_path / "arm.safetensors"
    save_e_token(path, FIRST, extra={"history": earlier, "stamp_ns": "1"})
    if earlier == "{}":  # nothing before: an empty list in other words
        assert len(History.load(path, like=FIRST, keep=4).entries) == 1
        return
    with pytest.raises(CheckpointError, match="found a damaged history"):
        History.load(path, like=FIRST, keep=4)


def test_a_plain_token_file_is_no_history(tmp_path: Path) -> None:
    path = tmp_path / "arm.safetensors"
    save_e_token(path, FIRST)
    with pytest.raises(CheckpointError, match="found a damaged history"):
        History.load(path, like=FIRST, keep=4)


def test_a_torn_file_is_refused_at_every_length(tmp_path: Path) -> None:
    path = tmp_path / "arm.safetensors"
    history(1, 2).save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            History.load(path, like=FIRST, keep=4)


def test_a_crash_while_saving_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, old = tmp_path / "arm.safetensors", history(1)
    old.save(path)

    def crash(*_args: object) -> None:
        raise KeyboardInterrupt

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, step, crash)
            with pytest.raises(KeyboardInterrupt):
                history(1, 2).save(path)
        assert same(History.load(path, like=FIRST, keep=4), old)
    history(1, 2).save(path)
    assert same(History.load(path, like=FIRST, keep=4), history(1, 2))
    assert [p.name for p in tmp_path.iterdir()] == ["arm.safetensors"]


def test_a_killed_process_leaves_a_whole_file(tmp_path: Path) -> None:
    """Killed without warning at some point of saving again and again: old or new, never in between."""
    path = tmp_path / "arm.safetensors"
    history(1).save(path)
    child = os.fork()
    if child == 0:
        try:
            made = history(1)
            for number in range(10**6):
                made.accept(data(number), number, 0.0)
                made.save(path)
        finally:
            os._exit(1)
    first = path.stat().st_ino
    while path.stat().st_ino == first:
        if os.waitpid(child, os.WNOHANG)[0]:
            pytest.fail("the writer ended by itself")
        time.sleep(0.001)
    os.kill(child, 9)
    os.waitpid(child, 0)
    entries = History.load(path, like=FIRST, keep=4).entries
    assert 2 <= len(entries) <= 4
    assert [e.token.version for e in entries] == sorted({e.token.version for e in entries})


def test_the_parameters_name_is_the_checkpoints(tmp_path: Path) -> None:
    from safetensors import safe_open

    path = tmp_path / "arm.safetensors"
    history(1).save(path)
    with safe_open(path, framework="np") as file:
        assert list(file.keys()) == [E_TOKEN_PARAMETER]
