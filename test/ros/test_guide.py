"""The guide docs/train_your_robot.md, followed to the letter: its commands are taken from the page and run in order.

Only how long the robot runs is decided here: until there is enough, instead of a number of seconds.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from node_testing import ROOT, Probe, wait_for

GUIDE = ROOT / "docs" / "train_your_robot.md"
TIMEOUT_S = 300.0  # of one wait; on an idle machine all of it takes one to two minutes
COPIED = ("Makefile", "config", "policies", "tools")
"""What the commands read of the repository; what they write stays in a folder of the test."""

pytestmark = pytest.mark.timeout(1200)


def script() -> str:
    """The shell blocks of the guide, with no end to how long the robot runs."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", GUIDE.read_text(), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"DURATION=\d+", "DURATION=3600", "".join(blocks))
    return f"set -euo pipefail\nset -v\n{text}"


class Follower:
    """Runs the guide's commands in ``folder``; their output is in ``output.txt`` there."""

    def __init__(self, folder: Path) -> None:
        self._output = folder / "output.txt"
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                ["bash", "-c", script()],
                cwd=folder,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def interrupt_once(self, name: str, enough: Callable[[], bool]) -> None:
        """Press Ctrl-C in the graph ``name`` as soon as there is enough."""
        pid = self._wait(lambda: self._graph(name), f"{name} starts")
        self._wait(enough, f"{name} has done enough")
        os.kill(pid, signal.SIGINT)
        self._wait(lambda: not Path(f"/proc/{pid}").exists(), f"{name} ends")

    def finish(self) -> None:
        """Wait for the end, which has to be a good one."""
        code = self.process.wait(TIMEOUT_S)
        assert code == 0, self._output.read_text()[-6000:]

    def close(self) -> None:
        """Leave nothing behind: nodes end with their supervisor."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _wait(self, condition: Callable[[], object], what: str) -> object:
        value = wait_for(lambda: condition() or self.process.poll(), what, TIMEOUT_S)
        assert self.process.poll() in (None, 0), self._output.read_text()[-6000:]
        return value

    def _graph(self, name: str) -> int | None:
        """The process that runs the graph, under the supervisor or `ros2 launch`."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_text().split("\0")
                ours = os.getsid(int(folder.name)) == self.process.pid
            except OSError:  # it has just ended
                continue
            if ours and (words[1:3] == ["-m", f"selfalign_ros.tools.{name}"] or f"{name}.launch.py" in words):
                return int(folder.name)
        return None


@pytest.fixture(scope="module")
def folder(probe: Probe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the guide has been followed."""
    from sensor_msgs.msg import JointState
    from std_msgs.msg import String

    from selfalign.msg import ActionChunk
    from selfalign_ros.bridge import qos

    folder = tmp_path_factory.mktemp("guide")
    for name in COPIED:
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)
    prompts = probe.messages["prompt"]
    actions_per_prompt: Counter[int] = Counter()
    probe.listen(String, "prompt", qos.LATCHED)
    probe.listen(ActionChunk, "action_chunk", qos.EVENTS)
    probe.node.create_subscription(
        JointState, "executed_action", lambda message: actions_per_prompt.update([len(prompts)]), qos.EVENTS
    )
    follower = Follower(folder)
    try:
        # Two prompts make two episodes: one to train on, one held out.
        follower.interrupt_once("record", lambda: sum(n >= 40 for n in actions_per_prompt.values()) >= 2)
        probe.messages["action_chunk"].clear()
        follower.interrupt_once("bringup", lambda: len(probe.messages["action_chunk"]) >= 3)
        follower.finish()
    finally:
        follower.close()
    return folder


def log_lines(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "runs/guide/training/log.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


def test_the_bag_becomes_a_dataset_with_counters(folder: Path) -> None:
    meta = json.loads((folder / "runs/guide/dataset/meta.json").read_text())
    assert meta["embodiments"] == ["my_robot"]
    assert meta["joint_names"] == ["shoulder_pan", "shoulder_lift", "elbow_flex"]
    assert meta["prompts"] and set(meta["prompts"]) <= {f"reach the {c} cube" for c in ("red", "green", "blue")}
    (source,) = meta["sources"]
    assert f"monday: {source['frames']} frames of {source['counters']['ticks']} ticks" in output(folder)


def test_counters_that_are_explained_are_those_that_are_counted(folder: Path) -> None:
    """Every cause that the converter printed is in the guide's table."""
    explained = set(re.findall(r"`([a-z_ ]+)`", GUIDE.read_text()))
    meta = json.loads((folder / "runs/guide/dataset/meta.json").read_text())
    assert set(meta["counters"]) - {"ticks"} <= explained


def test_two_robots_have_two_tokens(folder: Path) -> None:
    config = json.loads((folder / "runs/guide/training/policy/config.json").read_text())
    assert config["bank_keys"] == ["my_robot", "other_robot"]


def test_the_log_shows_what_the_guide_says_to_look_for(folder: Path) -> None:
    assert [line["step"] for line in log_lines(folder, "train")] == [5, 10, 15]  # resumed without a seam
    assert {line["step"] for line in log_lines(folder, "eval")} >= {5, 10, 15}
    assert all(name in log_lines(folder, "eval")[0] for name in ("loss_total", "loss_action", "loss_inverse_dynamics"))
    gap = log_lines(folder, "gap")[0]
    assert "inverse_dynamics_gap" in gap and "inverse_dynamics_stderr" in gap
    # Ten steps are too few for a gap beyond chance; where there is none, there is the warning, word for word.
    shown = gap["inverse_dynamics_gap"] > 2 * gap["inverse_dynamics_stderr"]
    notes = [line["text"] for line in log_lines(folder, "note") if line["step"] == gap["step"]]
    assert shown != any("WARNING: inverse dynamics does not use the token yet" in text for text in notes)


def test_every_way_to_train_wrote_a_policy(folder: Path) -> None:
    for run in ("training", "ranks", "options"):
        assert (folder / "runs/guide" / run / "policy" / "model.safetensors").is_file(), run


def test_the_policy_is_evaluated(folder: Path) -> None:
    assert re.search(r"^own token +[\d.]+ %", output(folder), flags=re.MULTILINE)


def test_the_checkpoint_runs_in_bringup(folder: Path) -> None:
    report = json.loads((folder / "runs/guide/run.json").read_text())
    assert report["ok"] and report["contract"] == "my_robot"
    assert report["chunks"]["count"] >= 3 and report["chunks"]["dim"] == 3
    assert (folder / "runs/guide/run.png").is_file()
    started = output(folder).rpartition("make bringup")[2]
    assert "ready in" in started and "untrained" not in started


def test_every_file_the_guide_names_exists() -> None:
    for link in re.findall(r"\]\(([^)#]+)", GUIDE.read_text()):
        assert (GUIDE.parent / link).is_file(), link


def output(folder: Path) -> str:
    return (folder / "output.txt").read_text()
