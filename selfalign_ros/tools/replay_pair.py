"""Two replays of one bag, one after the other, and what differs between them: printed, and written as JSON and PNG.

Starts the graphs and reads their reports; the numbers are in ``selfalign_core.study.replay_comparison`` and
``selfalign_core.study.bag_losses``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from selfalign_core.data.rosbag_file import ABOUT_NAMESPACE, BagFile
from selfalign_core.errors import SelfAlignError
from selfalign_core.robot.contract import RobotContract
from selfalign_core.robot.types import EToken
from selfalign_ros.graph.declaration import REPLAY, Graph, GraphError
from selfalign_ros.graph.supervisor import Supervisor, free_domain
from selfalign_ros.life.resources import checkpoint_folder, config_file

RUNS = ("first", "second")


def run_pair(given: Mapping[str, str], different: Mapping[str, str], report: Path) -> int:
    """Replay with the launch arguments ``given``, then with those ``different`` in them, and compare.

    Returns 0; the exit code of a replay that failed. The reports of the two replays are left beside ``report``.

    Raises:
        GraphError: an argument that cannot be used, before anything starts.
        ConfigError: the comparison cannot be written.
    """
    if given.get("compare"):
        raise GraphError("argument compare: found it with another replay to compare with; expected one of the two")
    given = {name: value for name, value in given.items() if name != "report"}
    arguments = [{**given, "report": str(report.with_suffix(f".{run}.json"))} for run in RUNS]
    arguments[1] |= different
    graphs = [_graph(each) for each in arguments]
    for graph in graphs:
        if code := Supervisor(graph).run():
            return code
    _compare([Path(each["report"]) for each in arguments], _labels(given, different), report)
    return 0


def _graph(arguments: Mapping[str, str]) -> Graph:
    return REPLAY({"domain": str(free_domain())} | dict(arguments))


def _labels(given: Mapping[str, str], different: Mapping[str, str]) -> list[str]:
    """What tells the two apart: names of parameter files and checkpoints."""
    labels = []
    for arguments in (given, {**given, **different}):
        names = (Path(arguments[name]).name if arguments.get(name) else "defaults" for name in different)
        labels.append(", ".join(names))
    return labels if labels[0] != labels[1] else list(RUNS)


def _compare(paths: list[Path], labels: list[str], path: Path) -> None:
    # Late: torch takes seconds to import, and the replays need the processors before.
    from selfalign_core.study import replay_comparison, replay_picture
    from selfalign_core.study.replay_report import read_report
    from selfalign_ros.life.tool_node import write_pictured

    reports = [read_report(each) for each in paths]
    scores = [_scores(report) for report in reports]
    comparison = replay_comparison.compare(reports, scores, labels)
    write_pictured(path, comparison, replay_picture.draw)
    words = f"written to {path} and {path.with_suffix('.png').name}"
    print(f"\n{replay_comparison.table(comparison)}\n\n{words}", flush=True)


def _scores(report: Mapping[str, Any]) -> dict[str, Any]:
    """The losses on the bag of the first and the last token of a replay; a ``reason`` where there are none."""
    from selfalign_core.alignment.trusted import Trusted
    from selfalign_core.policy import Policy
    from selfalign_core.study.bag_losses import score_change, transitions_of_bag

    parameters, bag = report["parameters"]["aligner"], Path(report["bag"])
    contract = RobotContract.from_yaml(config_file(parameters["contract"]))
    policy = Policy.load(
        checkpoint_folder(parameters["checkpoint"]),
        contract=contract, device=parameters["device"], precision=parameters["precision"],
    )  # fmt: skip
    scores: dict[str, Any] = {"spread": Trusted.of(policy).spread}
    before, after = (_token(report["e_tokens"][index], contract.embodiment) for index in (0, -1))
    try:
        namespace = BagFile(bag).about.get(ABOUT_NAMESPACE, "/")
        batch = transitions_of_bag(bag, contract, policy, namespace=namespace)
        scores |= score_change(policy, batch, before, after, prompt=parameters["prompt"])
    except SelfAlignError as error:
        # A bag can be played that is too short, or too broken, for a single transition.
        scores["reason"] = str(error)
    return scores


def _token(recorded: Mapping[str, Any], embodiment: str) -> EToken:
    data = np.array(recorded["data"], np.float32).reshape(recorded["shape"])
    return EToken(data, recorded["version"], embodiment, recorded["model_digest"])
