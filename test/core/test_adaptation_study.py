"""The adaptation study: bodies, recordings, arms, what is kept, figures. The policy is untrained."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import yaml
from small_models import small_model

from benchmarks.harness import Cache, share_over_bodies
from benchmarks.studies.adaptation import long_run, own_policy, right, seeds, shifts, study, summary
from benchmarks.studies.adaptation.__main__ import main
from benchmarks.studies.adaptation.arms import ARMS, EXPERT, FULL, MEAN, NEAREST, OURS, UNALIGNED, Found, find_token
from benchmarks.studies.adaptation.expert_fit import ExpertFit, fit_token
from benchmarks.studies.adaptation.lab import DT_NS, Lab, transitions
from benchmarks.studies.adaptation.long_run import LongRun
from benchmarks.studies.adaptation.measure import Measure
from benchmarks.studies.adaptation.settings import FAMILIES, Settings, contract_for, draw_body
from selfalign_core.alignment import SelfAligner, StageReport
from selfalign_core.alignment.config import AlignConfig, Collect, Guard, Identify, Refine
from selfalign_core.alignment.motion_wanted import Belief, MotionWanted
from selfalign_core.errors import ConfigError
from selfalign_core.policy import Policy
from selfalign_core.policy.config import PolicyConfig
from selfalign_core.policy.tokenizer import word_tokenizer
from selfalign_core.policy.transforms import NormStats
from selfalign_core.robot.calibration import CalibrationConfig
from selfalign_core.sim import JOINTS, TARGET_NAMES, BodyConfig, BodyRanges, prompt_for
from selfalign_core.study.processes import close_environments, policy_of, run_tasks

QUICK = AlignConfig(
    collect=Collect(fit_count=4, guard_count=4, min_command=0.0, min_motion=0.0),
    identify=Identify(first_count=2, finalists=2, draws=1),
    refine=Refine(steps=2, draws=1, directions=2),
    guard=Guard(draws=2),
).without_budgets()
SETTINGS = Settings(bodies=1, episodes=1, motion_s=6.0, frames=6, align=QUICK, expert_fit=ExpertFit(2, 4))


def untrained(keys=("nominal", "left", "right")) -> Policy:
    """Three joints that wander about a radian around zero."""
    words = word_tokenizer(sorted({word for name in TARGET_NAMES for word in prompt_for(name).split()}))
    model = small_model(action_horizon=16, vocab_size=words.get_vocab_size())
    norm = NormStats(np.zeros(3, np.float32), np.full(3, 0.3, np.float32), np.full(3, -1.0), np.full(3, 1.0))
    config = PolicyConfig(
        model=model.config, cameras=("overhead",), state_dim=3, action_dim=3, state_norm="z_score",
        action_norm="z_score", num_steps=2, bank_keys=keys,
    )  # fmt: skip
    shape = (len(keys), *model.peft_prefix_token.shape)
    bank = torch.randn(shape, generator=torch.Generator().manual_seed(0)) if keys else None
    return Policy(model, config, words, {"state": norm, "actions": norm}, dt=0.05, bank=bank)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("policy")
    untrained().save(directory)
    return str(directory)


@pytest.fixture(scope="module")
def lab() -> Lab:
    return Lab(untrained(), SETTINGS.unseen("all", "inside")[0].config, 0, SETTINGS)


@pytest.fixture(scope="module", autouse=True)
def _contexts():
    yield
    close_environments()
    policy_of.cache_clear()


# ---------------------------------------------------------------------------------------------------------- bodies


def test_a_family_strays_in_what_it_is_about_and_in_nothing_else() -> None:
    body, whole = (draw_body(1000, family, "inside", 3) for family in ("link", "all"))
    assert body.links == whole.links != BodyConfig().links
    assert dataclasses.replace(body, links=BodyConfig().links, name="nominal") == BodyConfig()
    assert set().union(*FAMILIES.values()) == set(FAMILIES["all"])


def test_ranges_say_how_far_a_body_strays() -> None:
    inside, beyond = (
        [draw_body(1000, "offset", range_, index).joint("elbow_flex").offset for index in range(50)]
        for range_ in ("inside", "beyond")
    )
    limit = BodyRanges().offset
    assert max(map(abs, inside)) <= limit < max(map(abs, beyond)) <= 1.5 * limit
    assert draw_body(1000, "all", "beyond", 0).joint("gripper") == BodyConfig().joint("gripper")


# ------------------------------------------------------------------------------------------------------- recordings


def test_the_calibration_recording_pairs_what_was_commanded_with_what_was_seen(lab) -> None:
    recording = lab.calibration
    assert recording.images.shape == (120, 1, *lab.policy.image_size, 3)
    contract = contract_for(JOINTS[:3])
    assert (recording.actions >= contract.lower).all()
    assert (recording.actions <= contract.upper).all()
    late = np.abs(recording.states[1:] - recording.actions[:-1]).mean()
    assert late < np.abs(recording.states - recording.states[0]).mean()  # the arm follows
    again = Lab(lab.policy, lab.body, 0, SETTINGS).calibration
    np.testing.assert_array_equal(again.images, recording.images)


def test_transitions_are_spread_over_the_motion(lab) -> None:
    batch = transitions(lab.policy, lab.calibration, 4)
    begins = batch.frame_stamps[batch.obs_index] / DT_NS
    assert len(batch) == 4
    assert np.ptp(begins) > 0.7 * len(lab.calibration.states)
    row = int(begins[0])
    np.testing.assert_array_equal(batch.actions[0, 0], lab.calibration.actions[row])


# ------------------------------------------------------------------------------------------------------------- arms


@pytest.mark.parametrize("arm", [*ARMS, f"{NEAREST}@2", f"{OURS}@2"])
def test_every_arm_finds_a_token_and_says_what_it_took(lab, arm) -> None:
    found = find_token(arm, lab)
    assert found.token.shape == lab.policy.e_token.data.shape
    assert np.isfinite(found.token).all()
    assert Found.from_dict(json.loads(json.dumps(found.to_dict()))).text == found.text
    bank, own = lab.policy.bank.numpy(), lab.policy.e_token.data
    if arm == UNALIGNED:
        np.testing.assert_array_equal(found.token, own)
    if arm == MEAN:
        np.testing.assert_allclose(found.token, bank.mean(0), atol=1e-6)
    if arm.startswith(NEAREST):
        known = [*bank, bank.mean(0), own]
        assert min(np.abs(found.token - one).max() for one in known) < 1e-6
    if arm in (FULL, OURS):
        assert found.accepted or np.array_equal(found.token, own)
    if arm not in (UNALIGNED, MEAN, EXPERT):
        assert 0 < found.transitions <= 8
        assert 0 < found.robot_s <= SETTINGS.motion_s


def test_a_token_fitted_on_the_experts_actions_imitates_them_better(lab) -> None:
    fit, validation = lab.labelled
    start = torch.from_numpy(lab.policy.e_token.data)[None]
    _, [before] = fit_token(lab.policy, fit, validation, start, ExpertFit(0, 8), seed=0)
    token, [after] = fit_token(lab.policy, fit, validation, start, ExpertFit(40, 8, 0.1), seed=0)
    assert after < before
    assert not torch.equal(token, start[0])


def test_equal_tokens_measure_equal_and_others_do_not(lab) -> None:
    measure, own = Measure(lab), lab.policy.e_token.data
    first, again, other = measure(own), measure(own.copy()), measure(own + 1.0)
    assert first == again
    assert first["action_error"] != other["action_error"]
    assert first["losses"] != other["losses"]


def test_a_policy_of_a_bodys_own_is_trained_once_and_measured_as_it_is(checkpoint, lab, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(own_policy, "EPISODES", 2)
    config = tmp_path / "config.yaml"
    sections = {
        "model": {"init": checkpoint}, "data": {"path": "elsewhere"}, "output": "elsewhere", "batch_size": 4,
        "steps": 1000, "bank": {"deploy": "nominal"},
    }  # fmt: skip
    config.write_text(yaml.safe_dump(sections))
    body = SETTINGS.unseen("all", "inside")[0]
    task = own_policy.OwnTask(str(config), str(tmp_path / "own"), body, 10, 5, lab.policy.image_size)
    [(name, path)] = own_policy.train_all([task], 1)
    written = (tmp_path / "own" / name / "run" / "log.jsonl").read_text()
    assert list(own_policy.train_all([task], 1)) == [(name, path)]
    assert (tmp_path / "own" / name / "run" / "log.jsonl").read_text() == written
    [with_own] = study.with_trained(
        [study.BodyTask(checkpoint, str(tmp_path), SETTINGS, body, (UNALIGNED,))], (), {name: path}
    )
    arms = study.run_body(with_own)["arms"]
    assert arms["own_policy"]["action_error"] != arms[UNALIGNED]["action_error"]
    with pytest.raises(ConfigError, match="found a run with another configuration"):
        list(own_policy.train_all([dataclasses.replace(task, steps=20)], 1))


# ------------------------------------------------------------------------------------------------------------- kept


def test_an_interrupted_study_goes_on_where_it_was(checkpoint, tmp_path, monkeypatch) -> None:
    body = SETTINGS.unseen("all", "inside")[0]
    task = study.BodyTask(checkpoint, str(tmp_path), SETTINGS, body, (UNALIGNED, MEAN))
    first, asked = study.run_body(task), []

    def counted(arm, lab):
        asked.append(arm)
        return find_token(arm, lab)

    monkeypatch.setattr(study, "find_token", counted)
    more = study.run_body(dataclasses.replace(task, arms=(UNALIGNED, MEAN, NEAREST)))
    assert asked == [NEAREST]
    assert {arm: more["arms"][arm] for arm in (UNALIGNED, MEAN)} == first["arms"]


def test_what_was_kept_of_other_settings_does_not_count(tmp_path) -> None:
    cache = Cache(tmp_path)
    assert cache.get("a", {"seed": 1}, lambda: {"x": 1}) == {"x": 1}
    assert cache.get("a", {"seed": 1}, lambda: {"x": 2}) == {"x": 1}
    assert cache.get("a", {"seed": 2}, lambda: {"x": 3}) == {"x": 3}


# --------------------------------------------------------------------------------------------------------- long runs


def test_a_long_run_follows_its_targets_and_leaves_the_policy_as_it_was(lab) -> None:
    policy, own = lab.policy, lab.policy.e_token
    other = BodyConfig().replace_joint("shoulder_pan", offset=0.5)
    steady = LongRun(policy, BodyConfig(), 3).run(9.0).to_dict()
    changed = LongRun(policy, BodyConfig(), 3, changes=[(2.0, other)]).run(9.0).to_dict()
    assert steady["targets"] == [{"begin": 0.0, "end": 8.0, "reached": False}]
    assert steady["distance"][:8] == changed["distance"][:8]
    assert steady["distance"][9:] != changed["distance"][9:]
    np.testing.assert_array_equal(policy.e_token.data, own.data)


def test_a_long_run_makes_the_calibration_motion_that_the_aligner_asks_for(lab, monkeypatch) -> None:
    monkeypatch.setattr(long_run, "PATIENCE_NS", 10**9)
    collect = dataclasses.replace(QUICK.collect, min_motion=9.0)  # no motion ever suffices
    logs = []
    for calibration in (None, CalibrationConfig(duration_s=5.0, amplitude=0.5)):
        aligner = SelfAligner(lab.policy, dataclasses.replace(QUICK, collect=collect))
        logs.append(LongRun(lab.policy, BodyConfig(), 3, aligner=aligner, calibration=calibration).run(6.0))
    assert not logs[0].events
    [asked] = logs[1].events
    assert asked["kind"] == "calibration"
    begin = int(asked["time"] * 4) + 1  # the distance is written down four times a second
    assert logs[0].distance[:begin] == logs[1].distance[:begin]
    assert logs[0].distance[begin:] != logs[1].distance[begin:]


@pytest.mark.parametrize("anew", [False, True])
def test_a_long_run_forgets_what_a_lost_policy_did_before_the_motion(lab, monkeypatch, anew: bool) -> None:
    class Asking(MotionWanted):
        def after(self, report: StageReport, now_ns: int, patience_ns: int) -> MotionWanted:
            belief = Belief.NEVER_ITS_OWN if anew else Belief.OTHER
            return dataclasses.replace(self, belief=belief, asks=now_ns // 10**9 == 2)

    monkeypatch.setattr(long_run, "MotionWanted", Asking)
    aligner = SelfAligner(lab.policy, QUICK)
    run = LongRun(lab.policy, BodyConfig(), 3, aligner=aligner, calibration=CalibrationConfig(duration_s=5.0))
    [asked] = [event for event in run.run(3.0).events if event["kind"] == "calibration"]
    assert (aligner.since_ns == round(asked["time"] * 1e9)) is anew


def test_a_robot_that_is_right_meets_every_opportunity(checkpoint, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(right, "EPISODES", 2)
    [run] = run_tasks(right.run_right, right.plan(checkpoint, str(tmp_path), SETTINGS, 1, 2), 1)
    assert len(run["attempts"]) == 2
    figures = summary.right_figures([run])
    assert figures["opportunities"] == 2
    if not run["accepted"]:
        assert run["before"] == run["after"]


# ----------------------------------------------------------------------------------------------------------- figures


def test_recovery_is_three_targets_in_a_row() -> None:
    ends = [2, 4, 6, 8, 10, 12]
    reached = [True, True, False, True, True, True]
    targets = [{"begin": end - 2, "end": end, "reached": r} for end, r in zip(ends, reached, strict=True)]
    assert shifts.recovery_s(targets, 0.0, 20.0) == 12.0
    assert shifts.recovery_s(targets, 5.0, 20.0) == 7.0
    assert shifts.recovery_s(targets, 0.0, 11.0) == math.inf
    assert shifts.reached_share(targets, 4.0, 8.0) == 0.5
    assert math.isnan(shifts.reached_share(targets, 30.0, 40.0))


def test_worse_means_by_more_than_a_standard_error() -> None:
    assert not summary.is_worse([0, 0, 0, 0], [1, 0, 0, 0])
    assert summary.is_worse([0, 0, 0, 0], [1, 1, 0, 0])
    assert summary.is_worse([0.0, 0.1], [0.2, 0.3])
    assert not summary.is_worse([0.5, 0.5], [0.5, 0.5])


def test_bodies_that_all_succeed_still_leave_doubt() -> None:
    found = share_over_bodies([[True, True]] * 8)
    assert found["mean"] == found["high"] == 1.0
    assert 0.7 < found["low"] < 0.9


def measured(body: int, **arms: tuple[list[bool], float]) -> dict:
    return {
        "family": "all", "range": "inside", "body": str(body),
        "arms": {
            name: {
                "success": success, "final_distance": [0.1], "action_error": [error, error + 0.01],
                "transitions": 32, "robot_s": 12.0, "compute_s": 3.0, "accepted": True,
            }
            for name, (success, error) in arms.items()
        },
    }  # fmt: skip


def test_targets_are_judged_on_the_figures() -> None:
    bodies = [
        measured(
            index,
            unaligned=([False, False], 0.3 + 0.01 * index), nearest=([True, False], 0.2 + 0.001 * index),
            ours=([True, True], 0.1 + 0.001 * index), expert_fit=([True, True], 0.09),
        )
        for index in range(8)
    ]  # fmt: skip
    rows = summary.arms_table(bodies)
    found = {one["target"].split(": ")[1]: one["met"] for one in summary.targets({"arms": rows})}
    assert len(found) == 5
    assert all(found.values())
    [over] = [row["over_nearest"] for row in rows if row["arm"] == "ours"]
    assert over["action_error_gain"]["low"] == pytest.approx(-0.1)  # the same on every body, however these differ
    assert over["action_error_gain"]["high"] == pytest.approx(-0.1)
    assert over["success_gain"]["mean"] == 0.5
    for body in bodies:
        body["arms"]["ours"] = {**body["arms"]["unaligned"]}
    found = {one["target"].split(": ")[1]: one["met"] for one in summary.targets({"arms": summary.arms_table(bodies)})}
    assert [name for name, met in found.items() if not met] == [
        "success, 0.9 of the upper bound",
        "action error's upper end, below the nearest entry's lower end",
        "success gained on unaligned",
    ]


# ----------------------------------------------------------------------------------------------------------- command


def test_one_command_measures_everything(checkpoint, tmp_path, monkeypatch, capsys) -> None:
    for module, name, value in (
        (shifts, "BEFORE_S", 1.0), (shifts, "SHIFTED_S", 1.0), (shifts, "BACK_S", 1.0), (right, "EPISODES", 1),
        (right, "_LIMIT_S", 3.0), (study, "COUNTS", (2,)), (summary, "COUNTS", (2,)),
        (study, "ARMS", (UNALIGNED, NEAREST, OURS)),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(Settings, "__init__", _quick)
    arguments = [
        checkpoint, "--output", str(tmp_path), "--families", "all", "--ranges", "inside", "--curve-bodies", "1",
        "--shift-runs", "1", "--right-runs", "1", "--right-opportunities", "1", "--jobs", "1", "--no-token", checkpoint,
    ]  # fmt: skip
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for words in (
        "nearest bank entry",
        "trained without a token",
        "Over transitions",
        "payload, self-aligner",
        "Already right",
        "Targets",
    ):
        assert words in printed
    document = json.loads((tmp_path / "adaptation.json").read_text())
    assert {row["family"] for row in document["arms"]} == {"all"}
    assert {path.name for path in tmp_path.glob("*.png")} == {"arms.png", "curves.png", "shifts.png"}
    assert main(arguments) == 0  # from what was kept
    again = json.loads((tmp_path / "adaptation.json").read_text())
    assert again["measured"] == document["measured"]


def test_the_grid_over_training_seeds_is_trained_and_measured_once(checkpoint, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(own_policy, "EPISODES", 2)
    monkeypatch.setattr(study, "ARMS", (UNALIGNED, OURS))
    monkeypatch.setattr(seeds, "Settings", lambda **_: dataclasses.replace(SETTINGS, bodies=2))
    sections = {
        "model": {"init": "elsewhere"}, "data": {"path": "elsewhere"}, "output": "elsewhere", "batch_size": 4,
        "steps": 2, "optim": {"warmup_steps": 0, "lr": 0.01}, "bank": {"deploy": "nominal"},
        "log": {"progress": False, "tensorboard": False},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(sections))
    arguments = [
        "--output", str(tmp_path / "out"), "--config", str(tmp_path / "config.yaml"), "--vlm", checkpoint,
        "--seeds", "0", "1", "--train-bodies", "2", "--train-episodes", "2", "--train-frames", "12",
        "--own-bodies", "1", "--own-steps", "2",
    ]  # fmt: skip
    assert seeds.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "trained with one token" in printed and "minus another arm" in printed
    document = json.loads((tmp_path / "out/adaptation_seeds.json").read_text())
    rows = {row["arm"]: row for row in document["arms"]}
    assert {arm: row["bodies"] for arm, row in rows.items()} == {
        "unaligned": 2, "ours": 2, "shared_token": 2, "no_token": 2, "own_policy": 2,
    }  # fmt: skip
    for row in rows.values():  # each seed's training is another one, and counts alike
        errors = [one["action_error"]["mean"] for one in row["seeds"].values()]
        assert errors[0] != errors[1]
        assert row["action_error"]["mean"] == pytest.approx(np.mean(errors))
    assert [one["bodies"] for one in document["differences"]["own_policy"].values()] == [2, 1, 1]
    logs = {path: path.read_bytes() for path in (tmp_path / "out").rglob("log.jsonl")}
    assert len(logs) == 8
    assert seeds.main(arguments) == 0
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("log.jsonl")} == logs
    assert json.loads((tmp_path / "out/adaptation_seeds.json").read_text())["measured"] == document["measured"]


def _quick(self, **changes) -> None:
    for field in dataclasses.fields(Settings):
        object.__setattr__(self, field.name, getattr(SETTINGS, field.name))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bodies", "0"], "--bodies: found 0"),
        (["--jobs", "0"], "--jobs: found 0"),
        (["--own-bodies", "1"], "--own-config: found none"),
        (["--shared-token", "nowhere"], "found no directory nowhere"),
    ],
)
def test_refusals_say_what_was_wrong(checkpoint, tmp_path, arguments, words, capsys) -> None:
    assert main([checkpoint, "--output", str(tmp_path), *arguments]) == 2
    assert words in capsys.readouterr().err
