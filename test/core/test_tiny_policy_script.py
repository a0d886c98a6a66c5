"""`make tiny-policy`: stages in order, each only if what it makes is missing. What they do is tested elsewhere."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from selfalign_core.data import sim_demos
from selfalign_core.sim import BodyConfig

SCRIPT = Path(__file__).parents[2] / "tools" / "tiny_policy.sh"
# Stands in for python3: notes module and arguments, makes what --output and --json name (a file if it has a suffix),
# fails in the module of FAIL.
PYTHON = """#!/bin/bash
module=$2
echo "$module" >> calls.txt
echo "$*" >> arguments.txt
[ "$module" = "${FAIL:-}" ] && exit 3
while [ $# -gt 0 ]; do
  [ "$1" = --output ] && case "$2" in *.safetensors) touch "$2" ;; *) mkdir -p "$2" ;; esac
  [ "$1" = --json ] && mkdir -p "$(dirname "$2")" && touch "$2"
  shift
done
exit 0
"""
DEMOS, PRETRAIN, TRAIN, TOKENS, EVALUATE = (
    f"selfalign_core.{name}"
    for name in ("data.sim_demos", "training.pretrain", "train", "training.aligned_tokens", "evaluate")
)
STAGES = [DEMOS, PRETRAIN, TRAIN, DEMOS, TRAIN, DEMOS, TOKENS, TRAIN, EVALUATE]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python3"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path


def run(folder: Path, fail: str = "") -> tuple[int, list[str], str]:
    """Exit code, the modules that were run, and what was printed."""
    (folder / "calls.txt").unlink(missing_ok=True)
    environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "FAIL": fail}
    result = subprocess.run([str(SCRIPT)], cwd=folder, env=environment, capture_output=True, text=True)
    return result.returncode, (folder / "calls.txt").read_text().split(), result.stdout


def test_a_first_run_goes_through_all_stages_and_says_where_the_policy_is(folder: Path) -> None:
    code, calls, output = run(folder)
    assert (code, calls) == (0, STAGES)
    assert "runs/tiny_policy/aligned/policy" in output and "policies/tiny_reach" in output


def test_the_joint_stages_have_the_same_bodies_and_the_last_one_others_and_no_recording_is_in_two(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[tuple[dict[str, BodyConfig], int]] = []
    monkeypatch.setattr(sim_demos, "record", lambda _, bodies, seed, *__, **___: recorded.append((bodies, seed)))
    run(folder)
    for line in (folder / "arguments.txt").read_text().splitlines():
        if DEMOS in line:
            assert sim_demos.main(line.split()[2:]) == 0
    (first, first_seed), (second, second_seed), (last, last_seed) = recorded
    assert first.items() < second.items()
    assert last.keys() & second.keys() == {"nominal"}
    assert len({first_seed, second_seed, last_seed}) == 3


def test_what_is_there_is_not_made_again(folder: Path) -> None:
    run(folder)
    assert run(folder)[:2] == (0, [TRAIN, TRAIN, TRAIN])  # each finds its last checkpoint, and is done


def test_it_goes_on_with_the_stage_that_failed(folder: Path) -> None:
    assert run(folder, fail=PRETRAIN)[:2] == (3, [DEMOS, PRETRAIN])
    assert run(folder)[:2] == (0, STAGES[1:])
    (folder / "runs/tiny_policy/aligned_tokens.safetensors").unlink()
    assert run(folder, fail=TOKENS)[:2] == (3, [TRAIN, TRAIN, TOKENS])
