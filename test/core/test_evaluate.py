"""Closed-loop evaluation: an expert that should succeed does, and numbers depend on nothing they should not."""

from __future__ import annotations

import dataclasses
import json

import cv2
import numpy as np
import pytest
import torch
from small_models import small_model

from selfalign_core.data.sim_demos import main as record_demos
from selfalign_core.errors import CheckpointError, ConfigError, InputError
from selfalign_core.evaluate import main
from selfalign_core.policy import Policy
from selfalign_core.policy.config import PolicyConfig
from selfalign_core.policy.tokenizer import word_tokenizer
from selfalign_core.policy.transforms import NormStats
from selfalign_core.sim import JOINTS, TARGET_NAMES, BodyConfig, ReachEnv, prompt_for
from selfalign_core.study.rollout import EpisodeSpec, PolicyPlanner, RolloutConfig, rollout
from selfalign_core.study.statistics import mean_interval, share_interval
from selfalign_core.study.table import WRONG_PROMPT, find_bodies, plan_row, unseen_bodies

KEYS = ("nominal", "left", "right")
REACH = [0, 1, 2]


def reach_policy(cameras=("overhead",), keys=KEYS, seed=0) -> Policy:
    """Random weights; three joints that wander about a radian around zero."""
    tokenizer = word_tokenizer(sorted({word for name in TARGET_NAMES for word in prompt_for(name).split()}))
    model = small_model(seed=seed, action_horizon=16, vocab_size=tokenizer.get_vocab_size())
    norm = NormStats(np.zeros(3, np.float32), np.full(3, 0.3, np.float32), np.full(3, -1.0), np.full(3, 1.0))
    config = PolicyConfig(
        model=model.config, cameras=cameras, state_dim=3, action_dim=3, state_norm="z_score", action_norm="z_score",
        num_steps=2, bank_keys=keys,
    )  # fmt: skip
    shape = (len(keys), *model.peft_prefix_token.shape)
    bank = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) if keys else None
    return Policy(model, config, tokenizer, {"state": norm, "actions": norm}, dt=0.05, bank=bank)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("policy")
    reach_policy().save(directory)
    return str(directory)


@pytest.fixture(scope="module")
def arms():
    """Simulated arms that the tests of one configuration share."""
    environments: list[ReachEnv] = []
    yield environments
    for env in environments:
        env.close()


def expert(running):
    """Goes to what the prompt names; knows the body."""
    return np.stack([one.expert.chunk(16, target=one.episode.told)[:, one.columns] for one in running])


def followed(planner, episodes, steps, **options):
    """The result of each episode, and the set-points (steps, joints) that its arm followed."""
    ways = {id(episode): [] for episode in episodes}

    def note(one):
        ways[id(one.episode)].append(one.env.sim.setpoint())

    results = rollout(planner, episodes, RolloutConfig(max_steps=steps), before_step=note, **options)
    return [(result, np.array(ways[id(episode)])) for result, episode in zip(results, episodes, strict=True)]


def sampled_body(seed: int) -> BodyConfig:
    return BodyConfig.sample(np.random.default_rng(seed), active_joints=JOINTS[:3])


# --------------------------------------------------------------------------------------------------------- episodes


def test_the_expert_reaches_the_target_on_any_body(arms):
    bodies = [BodyConfig(), *map(sampled_body, range(5))]
    episodes = [EpisodeSpec(body, seed, TARGET_NAMES[seed % 3]) for seed, body in enumerate(bodies)]
    for episode, result in zip(episodes, rollout(expert, episodes, environments=arms), strict=True):
        assert result.success and result.reached[episode.target]
        assert result.steps < 120 and result.min_distance <= result.final_distance < 0.03
        assert result.final_distances[episode.target] == result.final_distance
        assert result.action_error == 0.0


def test_with_a_wrong_prompt_the_expert_reaches_what_it_was_told(arms):
    episodes = [
        EpisodeSpec(BodyConfig(), seed, TARGET_NAMES[seed % 3], TARGET_NAMES[(seed + 1) % 3]) for seed in range(6)
    ]
    for episode, result in zip(episodes, rollout(expert, episodes, environments=arms), strict=True):
        assert not result.success and not result.reached[episode.target]
        assert result.reached[episode.told] and result.final_distances[episode.told] < 0.03
        assert result.final_distance > 0.03 and result.steps == 120
        assert result.action_error == 0.0, "the expert compared with goes where the prompt says"


def test_a_target_passed_on_the_way_counts_as_reached(arms):
    def first_one_then_the_other(running):
        target = "red cube" if running[0].step < 56 else "blue cube"
        return np.stack([one.expert.chunk(16, target=target)[:, one.columns] for one in running])

    [result] = rollout(first_one_then_the_other, [EpisodeSpec(BodyConfig(), 1, "green cube", "blue cube")])
    assert result.reached == {"red cube": True, "green cube": False, "blue cube": True}
    assert result.final_distances["red cube"] > 0.03, "it is elsewhere in the end"


def test_joints_that_are_not_commanded_hold_still(arms):
    moved, start = np.zeros(7), {}

    def watch(one):
        position = one.env.sim.setpoint()
        moved[:] = np.maximum(moved, np.abs(position - start.setdefault(one.episode.seed, position)))

    episodes = [EpisodeSpec(sampled_body(seed), seed, "red cube") for seed in range(3)]
    rollout(expert, episodes, RolloutConfig(max_steps=40), before_step=watch)
    assert (moved[:3] > 0.1).all()
    assert (moved[3:] < 1e-9).all()


def test_an_episode_does_not_depend_on_those_beside_it(checkpoint, arms):
    policy = Policy.from_checkpoint(checkpoint, dt=0.05)
    tokens = [None, *policy.bank.numpy()]
    episodes = [
        EpisodeSpec(sampled_body(i), i, TARGET_NAMES[i % 3], TARGET_NAMES[i // 3], token)
        for i, token in enumerate(tokens)
    ]
    planner = PolicyPlanner(policy)
    together = followed(planner, episodes, 32)
    for episode, (result, way) in zip(episodes, together, strict=True):
        # An arm that has been used before is as good as a new one.
        [(alone, same_way)] = followed(planner, [episode], 32, environments=arms)
        np.testing.assert_allclose(same_way, way, atol=1e-3)
        assert alone.action_error == pytest.approx(result.action_error, abs=1e-3)
    assert np.abs(together[0][1] - together[1][1]).max() > 0.01


def test_a_token_given_to_an_episode_acts_as_if_it_were_deployed(checkpoint):
    policy = Policy.from_checkpoint(checkpoint, dt=0.05)
    token = policy.bank[1].numpy()
    [(_, given)] = followed(PolicyPlanner(policy), [EpisodeSpec(BodyConfig(), 1, "red cube", token=token)], 10)
    policy.set_e_token(dataclasses.replace(policy.e_token, data=token))
    [(_, deployed)] = followed(PolicyPlanner(policy), [EpisodeSpec(BodyConfig(), 1, "red cube")], 10)
    np.testing.assert_allclose(given, deployed, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"replan_steps": 17}, "chunks: found 16 actions, expected replan_steps = 17"),
        ({"joints": ("shoulder_pan",)}, r"chunks: found shape \(1, 16, 3\), expected \(1, horizon, 1\)"),
    ],
)
def test_chunks_that_do_not_fit_are_refused(change, message):
    episode, config = EpisodeSpec(BodyConfig(), 0, "red cube"), RolloutConfig(**change)
    with pytest.raises((ConfigError, InputError), match=message):
        rollout(lambda _: np.zeros((1, 16, 3), np.float32), [episode], config)


def test_tokens_that_do_not_fit_are_refused(checkpoint):
    planner = PolicyPlanner(Policy.from_checkpoint(checkpoint, dt=0.05))
    with pytest.raises(InputError, match=r"EpisodeSpec.token: found shape \(2,\), expected \(1, 16\)"):
        rollout(planner, [EpisodeSpec(BodyConfig(), 0, "red cube", token=np.zeros(2))])


# ------------------------------------------------------------------------------------------------------ the command


def test_one_command_prints_the_rows_and_the_number_of_processes_changes_nothing(checkpoint, tmp_path, capsys):
    documents = []
    for jobs in ("1", "2"):
        file = tmp_path / f"{jobs}.json"
        assert main([checkpoint, "--episodes", "6", "--jobs", jobs, "--json", str(file)]) == 0
        documents.append(file.read_text())
    assert documents[0] == documents[1]
    table = capsys.readouterr().out
    for text in ("own token", "another body's token", "mean of the bank", "wrong prompt: target", "95 % interval"):
        assert text in table
    document = json.loads(documents[0])
    assert [row["row"] for row in document["rows"]] == ["own", "other", "mean", "wrong-prompt"]
    own, other, mean, wrong = (document["episodes"][i : i + 6] for i in range(0, 24, 6))
    assert {e["token"] for e in own} == {e["token"] for e in wrong} == {"nominal"}
    assert {e["token"] for e in other} == {"left", "right"} and {e["token"] for e in mean} == {"mean"}
    assert all(e["prompt"] == e["target"] for e in own + other + mean)
    assert len({(e["target"], e["prompt"]) for e in wrong}) == 6 and all(e["prompt"] != e["target"] for e in wrong)
    assert [e["seed"] for e in own] == [e["seed"] for e in other] == [e["seed"] for e in wrong], "paired"
    assert len({e["seed"] for e in own}) == 6
    for row, episodes in zip(document["rows"], (own, other, mean, wrong), strict=True):
        assert row["n"] == 6 and row["success"] == np.mean([e["success"] for e in episodes])
        assert row["success_interval"][0] <= row["success"] <= row["success_interval"][1]
        assert row["final_distance_median"] == pytest.approx(np.median([e["final_distance"] for e in episodes]))


def test_the_animation_is_a_small_gif(checkpoint, tmp_path):
    file = tmp_path / "episode.gif"
    assert main([checkpoint, "--rows", "own", "--episodes", "1", "--jobs", "1", "--gif", str(file)]) == 0
    assert file.stat().st_size < 1.5e6
    read, animation = cv2.imreadanimation(str(file))
    assert read and len(animation.frames) == 60 and animation.frames[0].shape[:2] == (240, 320)
    assert np.abs(animation.frames[0].astype(int) - animation.frames[-1]).max() > 50, "the arm moves"
    assert set(np.ravel(animation.durations)[:-1]) == {100}


def test_bodies_of_a_dataset_are_evaluated_with_their_own_tokens(checkpoint, tmp_path):
    demos = str(tmp_path / "demos")
    recording = ["--bodies", "3", "--episodes", "1", "--frames", "20", "--image-size", "16", "--seed", "3"]
    assert record_demos(["--output", demos, *recording]) == 0
    bodies = find_bodies(f"dataset:{demos}")
    assert [body.key for body in bodies] == ["nominal", "body_3_0001", "body_3_0002"]
    [one] = find_bodies(f"dataset:{demos}:body_3_0002")
    assert one == bodies[2] and one.body != BodyConfig()
    planned = plan_row("own", reach_policy(keys=("nominal", "body_3_0002")), bodies, 9, seed=0)
    assert [p.token for p in planned[:3]] == ["nominal", "deployed", "body_3_0002"]
    assert {(p.episode.body.name, p.episode.target) for p in planned} == {
        (body.body.name, target) for body in bodies for target in TARGET_NAMES
    }, "each body is asked for each target"
    with pytest.raises(ConfigError, match="found no body 'nobody', expected one of its 3: nominal"):
        find_bodies(f"dataset:{demos}:nobody")


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_every_body_is_asked_for_every_target_and_told_every_wrong_one(count):
    bodies = unseen_bodies(count, 0, JOINTS[:3], ())
    planned = plan_row(WRONG_PROMPT, reach_policy(), bodies, 6 * count, seed=0)
    asked = {(p.episode.body.name, p.episode.target) for p in planned}
    assert len(asked) == 3 * count
    assert all(p.episode.told != p.episode.target for p in planned)


def test_a_body_without_a_token_gets_the_deployed_one_and_another_body_never_its_own():
    policy = reach_policy()
    [unseen] = unseen_bodies(1, 0, JOINTS[:3], KEYS)
    assert {(p.token, p.episode.token) for p in plan_row("own", policy, [unseen], 3, seed=0)} == {("deployed", None)}
    [nominal] = find_bodies("nominal")
    for seed in range(5):
        assert {p.token for p in plan_row("other", policy, [nominal], 9, seed=seed)} == {"left", "right"}
    mean = plan_row("mean", policy, [nominal], 1, seed=0)[0].episode.token
    np.testing.assert_allclose(mean, policy.bank.numpy().mean(0), atol=1e-6)
    left = plan_row("left", policy, [nominal], 1, seed=0)[0]
    assert left.token == "left" and np.array_equal(left.episode.token, policy.bank[1].numpy())


def test_a_bank_that_lost_its_tokens_is_refused():
    policy = reach_policy()
    policy.bank = None
    with pytest.raises(CheckpointError, match="bank: found 0 tokens, expected one for each of 3 keys"):
        plan_row("own", policy, find_bodies("nominal"), 1, seed=0)


def test_a_checkpoint_without_a_bank_is_evaluated_with_its_own_token(tmp_path, capsys):
    reach_policy(keys=()).save(tmp_path / "policy")
    assert main([str(tmp_path / "policy"), "--episodes", "1", "--jobs", "1", "--json", str(tmp_path / "f.json")]) == 0
    document = json.loads((tmp_path / "f.json").read_text())
    assert [(e["row"], e["token"]) for e in document["episodes"]] == [("own", "deployed"), ("wrong-prompt", "deployed")]
    assert main([str(tmp_path / "policy"), "--rows", "mean"]) == 2
    assert "row mean: found a bank of 0 token(s), expected 2 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--body", "no.yaml"], "body: found no file 'no.yaml', expected nominal, a body file or dataset:DIR"),
        (["--body", "dataset:nowhere"], "nowhere/meta.json: found no such file, expected a dataset directory"),
        (["--rows", "up"], "row 'up': found no such token, expected own, other, mean, wrong-prompt or one of"),
        (["--episodes", "0"], "episodes: found 0, expected >= 1"),
        (["--bodies", "0"], "bodies: found 0, expected >= 1"),
        (["--jobs", "0"], "jobs: found 0, expected >= 1"),
        (["--seed", "-1"], "seed: found -1, expected >= 0"),
        (["--joints", "shoulder_pan"], "joints: found 1 (shoulder_pan), expected as many as the checkpoint's"),
        (["--joints", "a", "b", "c"], "joints: found ['a', 'b', 'c'], expected some of shoulder_pan"),
        (["--gif", "film.mp4"], "gif: found 'film.mp4', expected a name that ends in .gif"),
    ],
)
def test_refusals_say_what_was_wrong(checkpoint, arguments, message, capsys):
    assert main([checkpoint, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_checkpoints_that_cannot_be_evaluated_are_refused(tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 2
    assert f"checkpoint: found no directory {tmp_path}/none" in capsys.readouterr().err
    reach_policy(cameras=("front",)).save(tmp_path / "policy")
    assert main([str(tmp_path / "policy")]) == 2
    assert "checkpoint: found camera 'front', expected only overhead, wrist" in capsys.readouterr().err


def test_bodies_that_were_trained_on_are_not_called_unseen():
    with pytest.raises(ConfigError, match="found body_7_0002 of seed 7 in the checkpoint's bank"):
        unseen_bodies(2, 7, JOINTS[:3], ("nominal", "body_7_0002"))


# -------------------------------------------------------------------------------------------------------- intervals


def test_share_intervals_are_wilsons():
    # Newcombe (1998), table I: 81 of 263 and 15 of 148.
    np.testing.assert_allclose(share_interval(81, 263), (0.2553, 0.3662), atol=5e-5)
    np.testing.assert_allclose(share_interval(15, 148), (0.0624, 0.1605), atol=5e-5)
    assert share_interval(0, 20)[0] == 0.0 < share_interval(0, 20)[1]
    assert share_interval(20, 20)[1] == 1.0 > share_interval(20, 20)[0]
    with pytest.raises(InputError, match="share: found 3 of 2"):
        share_interval(3, 2)


def test_mean_intervals_agree_with_students_for_many_values():
    values = np.random.default_rng(1).normal(2.0, 1.0, 400)
    half = 1.966 * values.std(ddof=1) / 20
    np.testing.assert_allclose(mean_interval(values), (values.mean() - half, values.mean() + half), atol=0.01)
    assert mean_interval(values) == mean_interval(values)
    with pytest.raises(InputError, match="finite numbers"):
        mean_interval([])
