"""Benchmarks of training: what they compare is comparable, what they find is what there is, and they can be resumed."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from training_runs import SMALL_MODEL, train, trainer, values, write_dataset

from benchmarks.harness import interval, print_table, share_over_bodies, write_json
from benchmarks.speed import train_step
from benchmarks.studies import ablations, handover, held_out
from benchmarks.studies.scores import RecordedLosses, draw, halves
from selfalign_core.data.dataset import TransitionDataset
from selfalign_core.data.loader import Batch, Loader
from selfalign_core.errors import ConfigError, InputError
from selfalign_core.policy import Policy
from selfalign_core.policy.bank import MEAN_ROW
from selfalign_core.training.trainer import LOSSES, Trainer

MODEL = {**SMALL_MODEL, "action_horizon": 8}
FROZEN = {"freeze": ["vision_tower", "projector"], "cache_features": True}


# ---------------------------------------------------------------- figures


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    for count in (4, 8, 30):
        found = [interval(rng.normal(size=count)) for _ in range(2000)]
        assert 0.93 < np.mean([f["low"] < 0 < f["high"] for f in found]) < 0.97
    one = interval([1.0])
    assert one["mean"] == 1.0 and math.isnan(one["low"])
    assert interval([1.0, float("nan"), 3.0])["count"] == 2


def test_figures_that_are_no_numbers_are_null_and_columns_line_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "a.json", {"a": [math.nan, 1.5], "b": {"c": math.inf}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [None, 1.5], "b": {"c": None}}
    print_table(["name", "value"], [["long name", "1"], ["x", "100"]])
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[2] == "| long name |     1 |"


# ---------------------------------------------------------------- training step


def test_a_training_step_is_compared_in_time_and_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_step, "TIME_LIMIT", 100.0)  # no verdict on a machine's speed
    monkeypatch.setattr(train_step, "MEMORY_LIMIT", 2.0)
    file = tmp_path / "step.json"
    assert train_step.main(["--steps", "1", "--batch-size", "4", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["met"] and found["limits"] == {"time": 100.0, "memory": 2.0}
    assert found["date"] and found["machine"]["cores"] >= 1
    for result in found["results"]:
        assert result["all"]["step_mib"] > result["action"]["step_mib"] > 1
        assert result["all"]["resting_mib"] > result["action"]["resting_mib"] > 1
    table = capsys.readouterr().out
    assert all(result["setting"]["name"] in table for result in found["results"])
    trained, frozen, shipped = (result["all"]["step_mib"] for result in found["results"])
    assert frozen < trained and frozen < shipped


def test_a_step_above_a_limit_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"step_s": 1.0, "step_mib": 1.0, "resting_mib": 1.0, "memory_mib": 1.0}
    limited = True

    def measure(setting: train_step.Setting, steps: int) -> dict[str, Any]:
        chosen = {"setting": {"name": "x", "limited": limited}, "loader": {"wait_s": 0.0}}
        return {**chosen, "action": figures, "all": figures, "ratio": dict(figures), "met": False}

    monkeypatch.setattr(train_step, "measure", measure)
    assert train_step.main([]) == 1
    limited = False
    assert train_step.main([]) == 0
    assert train_step.main(["--steps", "0"]) == 2


def test_a_loader_that_keeps_training_waiting_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Loader.batches

    def late(self: Loader, start: int = 0, **options: Any) -> Iterator[Batch]:
        for batch in read(self, start, **options):
            time.sleep(0.2)
            yield batch

    bench = train_step.Bench(train_step.Setting("tiny", "tiny", "cpu", 2), tmp_path)
    fed = bench.waits(2)
    assert 0 < fed["wait_s"] <= fed["longest_wait_s"]
    monkeypatch.setattr(Loader, "batches", late)
    assert bench.waits(2)["wait_s"] >= 0.2


def test_the_full_size_path_runs() -> None:
    """bfloat16, recomputed layers and three cameras, on the tiny model."""
    setting = train_step.Setting("tiny", "tiny", "cpu", 2, full_size=True)
    found = train_step.measure(setting, steps=1)
    assert found["all"]["step_mib"] > found["action"]["step_mib"] > 0


# ---------------------------------------------------------------- losses and the token picked


@pytest.fixture(scope="module")
def told_apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on three bodies whose tokens have come to mean something."""
    folder = tmp_path_factory.mktemp("told_apart")
    data = write_dataset(folder / "set", action_offset=0.6)
    options: dict[str, Any] = {"batch_size": 16, "steps": 150, "optim__peft_lr": 0.03, **FROZEN}
    train(folder / "run", data, checkpoint__every=50, checkpoint__keep=9, data__holdout=0.2, **options)
    return folder


def test_the_token_picked_for_a_known_body_is_its_own(told_apart: Path) -> None:
    dataset = TransitionDataset(told_apart / "set")
    policy = Policy.from_checkpoint(told_apart / "run/policy", dt=0.05)
    scorer = RecordedLosses(policy, dataset)
    for place, body in enumerate(dataset.meta.embodiments):
        pick, scored = halves(dataset, body)
        assert not set(pick) & set(scored)
        drawn = draw(dataset, policy.config.model, pick, 32, seed=0, place=place)
        assert {dataset.meta.embodiments[i] for i in drawn.batch.embodiment} == {body}
        assert scorer.identify(drawn) == scorer.row(body)
        own, mean = (scorer.losses(drawn, row) for row in (scorer.row(body), MEAN_ROW))
        assert own["inverse_dynamics"] < mean["inverse_dynamics"]
        assert own == scorer.losses(drawn, scorer.row(body))  # the same noise every time


def test_a_policy_that_does_not_fit_the_recordings_is_refused(told_apart: Path, unseen: Path) -> None:
    policy = Policy.from_checkpoint(told_apart / "run/policy", dt=0.05)
    with pytest.raises(ConfigError, match="expected the policy's"):
        RecordedLosses(policy, TransitionDataset(unseen))
    with pytest.raises(InputError, match="expected at least two"):
        halves(TransitionDataset(write_dataset(told_apart / "short", episodes=1)), "arm a")


def test_losses_of_held_out_episodes_are_compared_with_those_before_training(
    told_apart: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "held_out.json"
    status = held_out.main([str(told_apart / "run"), "--json", str(file)])
    found = json.loads(file.read_text())
    assert status == (0 if found["met"] else 1)
    assert found["steps"] == {"start": 0, "first": 50, "last": 150}
    section = found["sections"][held_out.OWN]
    assert list(found["sections"]) == [held_out.OWN] and section["units"] == 2  # a fifth of twelve episodes
    assert section["inverse_dynamics"]["falls"] and section["total"]["falls"]
    for name in LOSSES:
        part = section[name]
        assert part["change"]["mean"] == pytest.approx(part["last"]["mean"] - part["start"]["mean"])
    assert "before" in capsys.readouterr().out


def test_bodies_never_trained_on_get_the_token_picked_and_the_mean(told_apart: Path, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "set", bodies=3, action_offset=0.6)
    train(tmp_path / "run", data, steps=3, checkpoint__every=1, data__holdout=0.4, data__holdout_by="embodiment")
    found = held_out.measure(tmp_path / "run")
    assert list(found["sections"]) == [held_out.IDENTIFIED, held_out.MEAN]
    assert found["sections"][held_out.MEAN]["units"] == 1
    both = held_out.measure(tmp_path / "run", bags=str(told_apart / "set"))
    assert both["sections"][held_out.OWN]["units"] == 8  # two bodies trained on, four episodes each
    assert both["sections"][held_out.MEAN] == found["sections"][held_out.MEAN]


def test_what_cannot_be_measured_is_said(told_apart: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert held_out.main([str(tmp_path / "none")]) == 2
    assert held_out.main([str(told_apart / "run"), "--bodies", str(told_apart / "set")]) == 2
    assert "expected some not trained on" in capsys.readouterr().err
    train(tmp_path / "run", told_apart / "set", steps=3, losses="action")
    assert held_out.main([str(tmp_path / "run")]) == 2
    assert "expected a run with all losses" in capsys.readouterr().err


def test_a_loss_falls_only_beyond_chance() -> None:
    def scores(start: Sequence[float], last: Sequence[float]) -> dict[str, Any]:
        units = {"start": start, "first": start, "last": last}
        return {at: {held_out.OWN: [dict.fromkeys(LOSSES, v) for v in found]} for at, found in units.items()}

    def falls(start: Sequence[float], last: Sequence[float]) -> bool:
        return held_out.summary(scores(start, last))[held_out.OWN]["action"]["falls"]

    assert falls([3.0, 2.0, 1.0], [2.5, 1.4, 0.5])
    assert not falls([3.0, 2.0, 1.0], [2.0, 2.4, 0.5])
    assert not falls([1.0], [1.1]) and falls([1.0], [0.9])


# ---------------------------------------------------------------- ablations


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Every variant trained for some steps from a policy, without closed loop; folder and arguments."""
    folder = tmp_path_factory.mktemp("study")
    start = trainer(folder / "start", write_sim_dataset(folder / "sim"), model__changes=MODEL).save() / "policy"
    made = values(
        folder / "unused",
        folder / "unused",
        steps=4,
        checkpoint__every=2,
        data__holdout=0.2,
        data__state_norm="z_score",
        bank={"deploy": "nominal"},
        **FROZEN,
    )
    made["model"] = {"init": str(start), "changes": {"lambda_perc": 0.1}}
    (folder / "config.yaml").write_text(yaml.safe_dump(made))
    sizes = {"steps": 4, "bodies": 2, "episodes": 2, "frames": 12, "unseen": 2, "rollouts": 0}
    arguments = ["--config", str(folder / "config.yaml"), "--output", str(folder / "out")]
    arguments += [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    assert ablations.main(arguments) == 0
    return folder, arguments


@pytest.fixture(scope="module")
def unseen(study: tuple[Path, list[str]]) -> Path:
    return next((study[0] / "out/data").glob("unseen_*"))


def write_sim_dataset(path: Path) -> Path:
    from selfalign_core.data.sim_demos import DemoConfig, record, sample_bodies

    config = DemoConfig(camera_size=(28, 28), image_size=(28, 28), episodes=2, frames=12)
    record(str(path), sample_bodies(2, 1, config), 1, config)
    return path


def test_every_variant_is_trained_and_measured_on_unseen_bodies(study: tuple[Path, list[str]]) -> None:
    out = study[0] / "out"
    found = json.loads((out / "ablations.json").read_text())["variants"]
    assert list(found) == list(ablations.VARIANTS)
    for name, result in found.items():
        assert len(result["picked"]) == 2
        for kind in ("mean", "picked"):
            assert all(math.isfinite(result["losses"][kind][part]["mean"]) for part in ablations.PARTS), name
    assert found["bank"]["action_difference"]["mean"] == 0.0
    assert set(found["bank"]["picked"].values()) <= {"nominal", "body_1_0001"}
    for name, token in (("shared_token", "one token for all"), ("no_token", "no token")):
        assert found[name]["token"] == token  # nothing to pick
        assert found[name]["losses"]["mean"] == found[name]["losses"]["picked"]
    policies = {name: Policy.from_checkpoint(out / name / "policy", dt=0.05) for name in found}
    assert policies["no_token"].e_token is None
    assert policies["shared_token"].config.bank_keys == ("shared",)
    assert policies["no_dynamics"].config.model.lambda_dyn == 0.0
    # One normalisation, whatever a variant trains on.
    stats = [policies[name].codec.stats["actions"].mean for name in ("bank", "no_play")]
    assert np.array_equal(*stats)
    plays = [TransitionDataset(out / "data" / f"demos_2x2x12{end}") for end in ("", "_without_play")]
    assert not np.array_equal(plays[0].actions, plays[1].actions)


def test_what_is_done_is_not_done_again(
    study: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, arguments = study
    before = json.loads((folder / "out/ablations.json").read_text())["variants"]
    monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail("trained again"))
    monkeypatch.setattr(ablations, "evaluate", lambda *_: pytest.fail("measured again"))
    assert ablations.main([*arguments, "--only", "no_token"]) == 0
    after = json.loads((folder / "out/ablations.json").read_text())["variants"]
    assert after == {name: before[name] for name in ("bank", "no_token")}
    assert "(no token)" in capsys.readouterr().out
    assert ablations.main([*arguments, "--steps", "6"]) == 2  # would mix runs of different length
    assert "another configuration" in capsys.readouterr().err


def test_training_that_was_killed_goes_on(
    study: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = study
    sizes = {"steps": 4, "bodies": 2, "episodes": 2, "frames": 12, "unseen": 2, "rollouts": 0}
    settings = ablations.Settings(config=str(folder / "config.yaml"), output=str(tmp_path), **sizes)
    settings.data.parent.mkdir(exist_ok=True)
    settings.data.symlink_to(folder / "out/data")
    steps: list[int] = []
    original = Trainer.train_step

    def step(self: Trainer, batch: Any) -> dict[str, Any]:
        if len(steps) == 3:
            steps.append(-1)
            raise KeyboardInterrupt
        steps.append(self.step)
        return original(self, batch)

    monkeypatch.setattr(Trainer, "train_step", step)
    with pytest.raises(KeyboardInterrupt):
        ablations.train(settings, "bank")
    policy = ablations.train(settings, "bank")
    assert steps == [0, 1, 2, -1, 2, 3]  # from the checkpoint at step 2 on
    whole = Policy.from_checkpoint(folder / "out/bank/policy", dt=0.05)
    assert Policy.from_checkpoint(policy, dt=0.05).digest == whole.digest


def test_success_is_counted_in_closed_loop_with_the_token_given(study: tuple[Path, list[str]], unseen: Path) -> None:
    policy = Policy.from_checkpoint(study[0] / "out/bank/policy", dt=0.05)
    scorer = RecordedLosses(policy, TransitionDataset(unseen))
    found = ablations.success(scorer, ablations.BodyConfig(), scorer.row("nominal"), 2)
    assert found == [False, False]  # four steps of training do not reach anything


def test_shares_of_bodies_that_are_all_alike_keep_an_interval() -> None:
    found = share_over_bodies([[False] * 5] * 4)
    assert found["mean"] == 0.0 and found["low"] == 0.0 and 0.05 < found["high"] < 0.3
    spread = share_over_bodies([[True] * 5, [False] * 5, [True] * 5, [False] * 5])
    assert spread["low"] == 0.0 and spread["high"] == 1.0  # four bodies, not twenty episodes


# ---------------------------------------------------------------- hand-over between chunks


def test_hand_overs_are_compared_on_the_same_episodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "handover.json"
    checkpoint = str(Path(__file__).parents[2] / "policies/tiny_reach")
    options = ["--episodes", "3", "--latencies", "150", "--methods", "wait", "none", "blend", "--json", str(file)]
    assert handover.main([checkpoint, *options]) == 0
    found = json.loads(file.read_text())
    wait, none, blend = found["rows"]
    assert [row["method"] for row in found["rows"]] == ["wait", "none", "blend"]
    assert wait["stall"]["mean"] > 0.1 and none["stall"]["mean"] == blend["stall"]["mean"] == 0
    for figure in ("jump", "commanded_jerk", "commanded_jerk_max", "measured_jerk"):
        assert 0 < blend[figure]["mean"] < 0.7 * none[figure]["mean"], figure
    assert "150 ms, blend" in capsys.readouterr().out
    assert handover.main([checkpoint, "--latencies", "-1"]) == 2
    assert "latencies: found -1 ms, expected >= 0" in capsys.readouterr().err
