"""Training as processes: killed with SIGKILL, out of disk, two ranks, a rank that dies, the command line."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_runs import ROOT, command, environment, train, trainer, write_config, write_dataset

from selfalign_core.policy import Policy
from selfalign_core.train import main
from selfalign_core.training.logging import read_log
from selfalign_core.training.state import list_checkpoints

TIMING = {"samples_per_s", "step_s", "wait_s", "memory_mib"}
LIMIT_S = 200.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


def losses_of(output: Path) -> list[dict[str, Any]]:
    lines = [line for line in read_log(output / "log.jsonl") if line["kind"] != "note"]
    return [{k: v for k, v in line.items() if k not in TIMING | {"kind"}} for line in lines]


@contextmanager
def started(*arguments: str, ranks: int = 0) -> Iterator[subprocess.Popen[str]]:
    """A training process in a process group of its own, none of which survives the block."""
    process = subprocess.Popen(
        command(*arguments, ranks=ranks),
        env=environment(),
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for pid in [process.pid, *descendants(process.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            children = [int(child) for child in (task / "children").read_text().split()]
        except OSError:  # ended meanwhile
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.005)


def steps_logged(output: Path) -> int:
    log = output / "log.jsonl"
    return len(read_log(log, "train")) if log.is_file() else 0


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, data: Path) -> None:
    options: dict[str, Any] = {"steps": 400, "checkpoint__every": 3, "batch_size": 4, "log__gap_samples": 4}
    file = write_config(tmp_path / "run.yaml", tmp_path / "killed", data, **options)
    with started("--config", str(file)) as process:
        wait_for(lambda: steps_logged(tmp_path / "killed") >= 8, process)
        process.kill()
    reached = list_checkpoints(tmp_path / "killed/checkpoints")[-1]
    at = int(reached.name.split("_")[1])
    # The end of the schedule is 400 for both; only the first steps are compared.
    resumed, whole = (
        trainer(tmp_path / name, data, resume=name == "killed", **options) for name in ("killed", "whole")
    )
    assert resumed.step == at
    for made in (resumed, whole):
        save = made.save
        made.save = lambda made=made, save=save, last=at + 6: (save(), made.step < last or 1 / 0)[0]
        with pytest.raises(ZeroDivisionError):
            made.run()
    assert losses_of(tmp_path / "killed") == losses_of(tmp_path / "whole")
    last = f"checkpoints/step_{at + 6:08d}/state-00000.safetensors"
    assert (tmp_path / "killed" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()


def test_a_disk_that_is_full_leaves_the_earlier_checkpoint(tmp_path: Path, data: Path) -> None:
    output = tmp_path / "run"
    file = write_config(tmp_path / "run.yaml", output, data, steps=4, checkpoint__every=2)
    made = trainer(output, data, steps=4, checkpoint__every=2)
    save = made.save
    made.save = lambda: (save(), 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.run()
    before = {p: p.read_bytes() for p in output.rglob("*.safetensors")}
    limit = 200_000  # no file may grow beyond these bytes: a write fails half-way, as on a full disk
    result = subprocess.run(
        command("--config", str(file), "--resume"),
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert result.returncode == 2
    assert "step_00000004: could not write the checkpoint" in result.stderr
    assert "newest complete one is" in result.stderr and "Traceback" not in result.stderr
    assert {p: p.read_bytes() for p in output.rglob("*.safetensors")} == before
    assert [p.name for p in (output / "checkpoints").iterdir()] == ["step_00000002"]
    train(output, data, steps=4, checkpoint__every=2, resume=True)
    train(tmp_path / "whole", data, steps=4, checkpoint__every=2)
    assert losses_of(output) == losses_of(tmp_path / "whole")


FULL_DISK = """
set -e
mount -t tmpfs -o size="$1" disk "$2"
if "$3" -m selfalign_core.train --config "$4"; then exit 99; fi
ls -A "$2/checkpoints"
mount -o remount,size=100m "$2"
"$3" -m selfalign_core.train --config "$4" --resume
cp -r "$2" "$5"
"""
"""A small disk in a namespace of its own, training until it is full, then room for more, and on from there."""


def test_a_small_disk_that_fills_up_and_is_given_room(tmp_path: Path, data: Path) -> None:
    options: dict[str, Any] = {"steps": 6, "checkpoint__every": 2}
    whole = train(tmp_path / "whole", data, **options)
    checkpoint = tmp_path / "whole/checkpoints" / f"step_{whole.step:08d}"
    size = sum(path.stat().st_size for path in checkpoint.rglob("*"))
    disk = tmp_path / "disk"
    disk.mkdir()
    file = write_config(tmp_path / "run.yaml", disk, data, **options)
    private = ["unshare", "--user", "--map-root-user", "--mount"]
    mount = f"mount -t tmpfs disk {disk}"
    if not shutil.which("unshare") or subprocess.run([*private, "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a disk")
    half = size * 3 // 2  # the first checkpoint fits, the second one half
    script = [*private, "sh", "-c", FULL_DISK, "sh", str(half), str(disk), sys.executable, str(file)]
    result = subprocess.run(
        [*script, str(tmp_path / "copy")],
        env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "step_00000004: could not write the checkpoint (disk full, " in result.stderr
    assert f"newest complete one is {disk}/checkpoints/step_00000002" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout.splitlines()[0] == "step_00000002"
    assert losses_of(tmp_path / "copy") == losses_of(tmp_path / "whole")
    last = Path("checkpoints", checkpoint.name, "state-00000.safetensors")
    assert (tmp_path / "copy" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()


def run_on_two_ranks(files: list[Path]) -> None:
    """Train with every configuration, or go on with it, in one job, for the time that it takes to start."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*launcher, str(Path(__file__).with_name("training_runs.py")), *map(str, files)],
        env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_two_ranks_train_as_one_process_and_resume_as_one(tmp_path: Path, data: Path) -> None:
    options: dict[str, Any] = {
        "steps": 5, "checkpoint__every": 3, "log__gap_every": 2, "log__eval_every": 2, "log__gap_samples": 8,
        "log__eval_samples": 8, "ema_decay": 0.9,
    }  # fmt: skip
    train(tmp_path / "one", data, **options)
    modes = ("ddp", "fsdp")
    # The global batch of 8 in two ranks and two passes each.
    files = [
        write_config(tmp_path / f"{m}.yaml", tmp_path / m, data, **options, parallel=m, accumulation=2) for m in modes
    ]
    run_on_two_ranks(files)
    one = losses_of(tmp_path / "one")
    for mode in modes:
        two = losses_of(tmp_path / mode)
        assert len(one) == len(two) == 9
        for a, b in zip(one, two, strict=True):
            assert b == pytest.approx(a, rel=1e-3, abs=1e-4), mode
        a, b = (Policy.from_checkpoint(tmp_path / n / "policy", dt=0.05) for n in ("one", mode))
        for (name, x), y in zip(a.model.state_dict().items(), b.model.state_dict().values(), strict=True):
            assert (x - y).abs().max() < 5e-3, (mode, name)
        # One process goes on from what two ranks wrote.
        made = trainer(tmp_path / mode, data, resume=tmp_path / mode / "checkpoints/step_00000003", **options)
        made.run()
        for a, b in zip(one, losses_of(tmp_path / mode), strict=True):
            assert b == pytest.approx(a, rel=1e-3, abs=1e-4), mode


def test_a_rank_that_dies_ends_the_job_and_resuming_repeats_an_uninterrupted_one(tmp_path: Path, data: Path) -> None:
    # A constant rate after the warm-up: the steps do not depend on how many there will be.
    options: dict[str, Any] = {"checkpoint__every": 2, "optim__final_lr_fraction": 1.0}
    output = tmp_path / "killed"
    file = write_config(tmp_path / "run.yaml", output, data, steps=100_000, **options)
    with started("--config", str(file), ranks=2) as process:
        wait_for(lambda: bool(list_checkpoints(output / "checkpoints")), process)
        (victim,) = [
            pid for pid in descendants(process.pid) if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()
        ]
        os.kill(victim, signal.SIGKILL)
        text, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode != 0
    assert "rank      : 1" in text and "Signal 9 (SIGKILL)" in text  # torchrun names the rank and the signal
    reached = int(list_checkpoints(output / "checkpoints")[-1].name.split("_")[1])
    runs = (output, tmp_path / "whole")
    run_on_two_ranks(
        [write_config(tmp_path / f"{run.name}.yaml", run, data, steps=reached + 3, **options) for run in runs]
    )
    killed, whole = map(losses_of, runs)
    assert len(whole) == reached + 3
    assert killed == whole


TRAIN_ON_A_NODE = """
import sys
from selfalign_core.train import main
from selfalign_core.training import parallel, state
state.SETTLE_S = float(sys.argv[1])
parallel.end_process(main(sys.argv[2:]))
"""


def train_on_two_nodes(file: Path, *folders: Path, settle_s: float = 0.0) -> list[tuple[int, str]]:
    """Resume ``file``'s run as a job of two ranks, each in a folder of its own; exit status and errors of each.

    Nobody ends one rank when the other has ended, as the launcher of one machine would.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    arguments = [sys.executable, "-c", TRAIN_ON_A_NODE, str(settle_s), "--config", str(file), "--resume"]
    with ExitStack() as stack:
        ranks = []
        for rank, folder in enumerate(folders):
            folder.mkdir(exist_ok=True)
            process = subprocess.Popen(
                arguments,
                env=environment() | place | {"RANK": str(rank)},
                cwd=folder,
                text=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            stack.callback(process.kill)
            ranks.append(process)
        ended = [(process.communicate(timeout=LIMIT_S)[1], process.returncode) for process in ranks]
    return [(status, errors) for errors, status in ended]


def test_ranks_that_do_not_see_the_same_checkpoint_do_not_train(tmp_path: Path, data: Path) -> None:
    first, second = tmp_path / "node0", tmp_path / "node1"
    train(first / "run", data, steps=3)
    log = (first / "run/log.jsonl").read_bytes()
    file = write_config(tmp_path / "run.yaml", Path("run"), data, steps=6)
    expected = "in a folder that all nodes share"
    checkpoint = second / "run/checkpoints/step_00000003"
    for found in ("nothing there", "another checkpoint"):
        if found == "another checkpoint":  # of the same step
            train(second / "run", data, steps=3, seed=1)
        (status_0, errors_0), (status_1, errors_1) = train_on_two_nodes(file, first, second)
        assert status_0 == status_1 == 2, errors_0 + errors_1
        assert f"error: {checkpoint}" in errors_1 and f"found {found}" in errors_1 and expected in errors_1
        assert "error: rank 0: rank 1 cannot go on" in errors_0 and str(checkpoint) in errors_0
        assert "Traceback" not in errors_0 + errors_1
    assert (first / "run/log.jsonl").read_bytes() == log


def test_ranks_that_do_not_share_the_cached_features_do_not_train(tmp_path: Path, data: Path) -> None:
    frozen: dict[str, Any] = {"steps": 2, "optim__warmup_steps": 1, "freeze": ["vision_tower", "projector"]}
    file = write_config(tmp_path / "run.yaml", Path("run"), data, cache_features=True, **frozen)
    nodes = tmp_path / "node0", tmp_path / "node1"
    (status_0, errors_0), (status_1, errors_1) = train_on_two_nodes(file, *nodes)
    assert status_0 == status_1 == 2, errors_0 + errors_1
    assert f"error: {nodes[1]}/run/features/features-" in errors_1 and "in a folder that all nodes share" in errors_1
    assert "error: rank 0: rank 1 cannot go on" in errors_0
    assert "Traceback" not in errors_0 + errors_1
    # What the first job left on the one disk is not taken by the next one for its own on the other.
    shutil.copytree(nodes[0] / "run", nodes[1] / "run")
    assert [status for status, _ in train_on_two_nodes(file, *nodes)] == [2, 2]
    # The same job in one folder computes what one process does.
    ended = train_on_two_nodes(file, nodes[0], nodes[0], settle_s=60.0)
    assert [status for status, _ in ended] == [0, 0], ended
    trainer(tmp_path / "alone", data, cache_features=True, **frozen)
    together, alone = (next(iter((run / "features").iterdir())) for run in (nodes[0] / "run", tmp_path / "alone"))
    assert together.name == alone.name and np.array_equal(np.load(together), np.load(alone))


def test_the_command_line_names_what_is_wrong(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(write_config(tmp_path / "run.yaml", tmp_path / "run", data, steps=3))
    for arguments, message in (
        ([], "--config"),
        (["--config", file, "steps=0"], "steps: found 0"),
        (["--config", file, "batch_size=7", "accumulation=2"], "batch_size: found 7"),
        (["--config", file, "data.path=/nowhere"], "/nowhere"),
        (["--config", file, "device=tpu"], "device: found 'tpu'"),
        (["--resume", str(tmp_path / "none")], "found no training checkpoint"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error
    assert not (tmp_path / "run").exists()
    assert main(["steps=2", "--config", file, "--resume", "optim.lr=1e-3", "optim.warmup_steps=1"]) == 0
    assert "policy: " in capsys.readouterr().out
    # Without --config a run goes on with the configuration it was started with.
    assert main(["--resume", str(tmp_path / "run"), "steps=4"]) == 0
    assert steps_logged(tmp_path / "run") == 4
