"""A policy: equal observations give equal chunks, numbers come and go in the robot's units, errors name things."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from small_models import WORDS, random_observation, small_policy

from selfalign_core.errors import CheckpointError, ConfigError, InputError
from selfalign_core.model.config import GemmaSize, ModelConfig, VisionSize
from selfalign_core.policy import Policy
from selfalign_core.policy.config import PolicyConfig
from selfalign_core.policy.source import image_size_of, model_config_of, transition_horizon_of
from selfalign_core.policy.transforms import NormStats
from selfalign_core.robot.contract import RobotContract
from selfalign_core.robot.types import EToken, Observation

CONTRACTS = Path(__file__).resolve().parents[2] / "config" / "contracts"
POLICIES = Path(__file__).resolve().parents[2] / "policies"


@pytest.fixture(params=[False, True], ids=["pi0", "pi05"])
def pi05(request) -> bool:
    return request.param


@pytest.fixture
def policy(pi05: bool) -> Policy:
    return small_policy(pi05)


def with_units(policy: Policy, **changes) -> Policy:
    """The same model for a robot whose numbers are far from the model's: normalised, relative in two of three."""
    state = NormStats(np.array([5.0, -3.0, 0.1]), np.array([2.0, 0.5, 0.01]), np.array([0, -5, 0.0]),
                      np.array([9, -1, 0.2]))  # fmt: skip
    actions = NormStats(np.array([0.1, 0.0, 0.5]), np.array([0.3, 0.2, 0.1]), np.array([-1, -1, 0.0]),
                        np.array([1, 1, 1.0]))  # fmt: skip
    values = {"state_norm": "quantile", "action_norm": "quantile", "delta_mask": (True, True, False), **changes}
    config = dataclasses.replace(policy.config, **values)
    return Policy(policy.model, config, policy.codec.tokenizer, {"state": state, "actions": actions}, dt=0.05)


# ---------------------------------------------------------------- infer


def test_the_same_observation_and_seed_give_the_same_chunk(policy: Policy) -> None:
    observation = random_observation(policy)
    first = policy.infer(observation, seed=4)
    torch.manual_seed(99)  # neither global state nor earlier calls play a part
    policy.infer(random_observation(policy, seed=3))
    again = policy.infer(observation, seed=4)
    np.testing.assert_array_equal(first.actions, again.actions)
    assert first.actions.shape == (policy.horizon, policy.action_dim)
    assert first.actions.dtype == np.float32
    assert (first.dt, first.stamp_ns, first.e_token_version) == (0.05, observation.stamp_ns, 0)
    assert first.inference_s > 0
    for other in (
        policy.infer(observation, seed=5),
        policy.infer(dataclasses.replace(observation, stamp_ns=observation.stamp_ns + 1), seed=4),
    ):
        assert not np.array_equal(first.actions, other.actions)


def test_everything_in_the_observation_matters(policy: Policy) -> None:
    observation = random_observation(policy)
    first = policy.infer(observation).actions
    dark = {"wrist": np.zeros_like(observation.images["wrist"])}
    for change in (
        {"prompt": "red cube"},
        {"state": observation.state * np.float32(-1)},
        {"images": {**observation.images, **dark}},
    ):
        assert not np.allclose(first, policy.infer(dataclasses.replace(observation, **change)).actions), change


def test_pixels_go_to_minus_one_and_one(policy: Policy) -> None:
    images = np.zeros((1, 2, 2, 3), np.uint8)
    images[0, 0, 1, 2] = 255
    tensor = policy.codec.images_to_model(images)
    assert tensor.shape == (1, 3, 2, 2)
    assert float(tensor[0, 2, 0, 1]) == 1.0
    assert float(tensor.min()) == -1.0
    assert int((tensor == 1).sum()) == 1


def test_other_image_sizes_are_resized_with_padding(policy: Policy) -> None:
    observation = random_observation(policy)
    height, width = policy.image_size
    wide = np.random.default_rng(1).integers(0, 256, (height, 2 * width, 3)).astype(np.uint8)
    by_hand = np.zeros((height, width, 3), np.uint8)
    shrunk = cv2.resize(wide, (width, height // 2), interpolation=cv2.INTER_AREA)
    by_hand[height // 4 : height // 4 + height // 2] = shrunk
    chunks = [
        policy.infer(dataclasses.replace(observation, images={**observation.images, "front": image})).actions
        for image in (wide, by_hand)
    ]
    np.testing.assert_array_equal(*chunks)


def test_an_empty_camera_slot_is_masked_not_seen(pi05: bool) -> None:
    policy = small_policy(pi05)
    config = dataclasses.replace(policy.config, cameras=("front", None))
    one = Policy(policy.model, config, policy.codec.tokenizer, {}, dt=0.05)
    observation = random_observation(policy)
    inputs = one.codec.observations_to_model([observation])
    assert [bool(mask) for mask in inputs.image_masks] == [True, False]
    only = dataclasses.replace(observation, images={"front": observation.images["front"]})
    np.testing.assert_array_equal(one.infer(observation).actions, one.infer(only).actions)


# ---------------------------------------------------------------- robot units


def test_actions_come_back_in_robot_units(pi05: bool) -> None:
    policy = with_units(small_policy(pi05))
    rng = np.random.default_rng(0)
    state = rng.uniform(-5, 5, (4, 3)).astype(np.float32)
    actions = rng.uniform(-5, 5, (4, 2, 3)).astype(np.float32)
    there = policy.codec.actions_to_model(actions, state)
    assert there.shape == (4, 2, policy.config.model.action_dim)
    assert not there[..., 3:].any()  # padding
    np.testing.assert_allclose(policy.codec.actions_from_model(there, state), actions, atol=1e-4)
    relative = actions[..., :2] - state[:, None, :2]  # quantiles -1 and 1 leave them as they are
    np.testing.assert_allclose(there[..., :2], relative, atol=1e-4)
    np.testing.assert_allclose(there[..., 2], actions[..., 2] * 2 - 1, atol=1e-4)


def test_a_relative_chunk_moves_with_the_state() -> None:
    """Where the model cannot see the state (π0.5 would, in its prompt) the relative part shifts with it exactly."""
    policy = with_units(small_policy(), state_norm="identity", action_norm="identity")
    with torch.no_grad():
        policy.model.state_proj.weight.zero_()
    observation = random_observation(policy)
    moved = dataclasses.replace(observation, state=observation.state + np.float32(0.5))
    difference = policy.infer(moved).actions - policy.infer(observation).actions
    np.testing.assert_allclose(difference, np.tile([0.5, 0.5, 0.0], (policy.horizon, 1)), atol=1e-5)


def test_pi05_writes_the_normalised_state_without_padding() -> None:
    policy = with_units(small_policy(True))
    tokens, mask = policy.codec.prompt_to_model("red cube", np.array([0.0, -0.9, 0.12], np.float32))
    text = [policy.codec.tokenizer.id_to_token(int(i)) for i in tokens[mask]]
    assert text == ["<bos>", "task:", "red", "cube,", "state:", "0", "255", "153;\naction:"]


# ---------------------------------------------------------------- the E-Token


def token_for(policy: Policy, **changes) -> EToken:
    data = policy.e_token.data + np.float32(1)
    return dataclasses.replace(EToken(data, 3, "test arm", policy.digest), **changes)


def test_a_new_token_acts_from_the_next_chunk_on_and_can_be_taken_back(policy: Policy) -> None:
    observation, old = random_observation(policy), policy.e_token
    first = policy.infer(observation)
    policy.set_e_token(token_for(policy))
    second = policy.infer(observation)
    assert (first.e_token_version, second.e_token_version) == (0, 3)
    assert not np.allclose(first.actions, second.actions)
    policy.set_e_token(old)
    np.testing.assert_array_equal(policy.infer(observation).actions, first.actions)
    assert policy.digest == small_policy(policy.config.model.pi05).digest  # the token is no part of it


def test_the_token_is_copied(policy: Policy) -> None:
    token = token_for(policy)
    policy.set_e_token(token)
    before = policy.infer(random_observation(policy)).actions
    token.data[:] = 0
    np.testing.assert_array_equal(policy.infer(random_observation(policy)).actions, before)
    assert policy.e_token.data.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"model_digest": "0" * 64}, "E-Token: found model digest '000000000000', expected"),
        (lambda t: {"data": t.data[:, :-1]}, r"E-Token: found shape \(1, 15\), expected \(1, 16\)"),
        (lambda t: {"data": np.concatenate([t.data, t.data])}, r"E-Token: found shape \(2, 16\)"),
        (lambda t: {"data": np.where(np.arange(16) == 3, np.nan, t.data)}, "E-Token: found NaN or infinity"),
        (lambda t: {"data": np.where(np.arange(16) == 3, np.inf, t.data)}, "E-Token: found NaN or infinity"),
        pytest.param(
            lambda t: {"data": t.data.astype(np.float64) + 1e300}, "E-Token: found NaN or infinity",
            marks=pytest.mark.filterwarnings("ignore:overflow"),
        ),
    ],
    ids=["digest", "narrow", "two tokens", "nan", "inf", "beyond float32"],
)  # fmt: skip
def test_a_bad_token_is_refused_and_changes_nothing(policy: Policy, change, message: str) -> None:
    observation = random_observation(policy)
    before, held = policy.infer(observation).actions, policy.e_token
    weights = policy.model.peft_prefix_token.clone()
    token = token_for(policy)
    with pytest.raises(InputError, match=message):
        policy.set_e_token(dataclasses.replace(token, **change(token)))
    assert policy.e_token is held
    assert torch.equal(policy.model.peft_prefix_token, weights)
    np.testing.assert_array_equal(policy.infer(observation).actions, before)


def test_a_norm_limit_is_checked_on_request(policy: Policy) -> None:
    token = token_for(policy, data=np.full((1, 16), 8.0, np.float32))
    policy.check_e_token(token, max_norm=8.1)
    with pytest.raises(InputError, match=r"E-Token: found norm 8 \(root mean square\), expected at most 7\.9"):
        policy.check_e_token(token, max_norm=7.9)
    own = token_for(policy, data=policy.e_token.data)
    policy.check_e_token(own, max_norm=1e-3)  # what training knows is never too large


def test_a_model_without_token_refuses_one(pi05: bool) -> None:
    plain = small_policy(pi05, use_peft_prefix_token=False)
    assert plain.e_token is None
    assert plain.infer(random_observation(plain)).e_token_version == 0
    with pytest.raises(InputError, match="expected none"):
        plain.set_e_token(EToken(np.zeros((1, 16), np.float32), 1, "", plain.digest))


# ---------------------------------------------------------------- bad observations


def changed(observation: Observation, **changes) -> Observation:
    return dataclasses.replace(observation, **changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: {"images": {"front": o.images["front"]}}, r"found cameras \['front'\], expected 'wrist' too"),
        (lambda o: {"images": {**o.images, "wrist": o.images["wrist"].astype(np.float32)}},
         r"images\['wrist'\]: found \(28, 28, 3\) float32, expected \(H, W, 3\) uint8"),
        (lambda o: {"images": {**o.images, "front": o.images["front"][..., 0]}}, r"'front'\]: found \(28, 28\)"),
        (lambda o: {"images": {**o.images, "front": np.zeros((28, 28, 4), np.uint8)}}, r"found \(28, 28, 4\)"),
        (lambda o: {"images": {**o.images, "front": None}}, r"images\['front'\]: found NoneType"),
        (lambda o: {"images": {**o.images, "front": np.zeros((0, 28, 3), np.uint8)}}, r"found \(0, 28, 3\)"),
        (lambda o: {"state": np.array(["a", "b", "c"])}, "state: found array.* expected numbers"),
        (lambda o: {"state": np.array([0, np.nan, 0])}, r"state: found \[0.0, nan, 0.0\], expected finite"),
        (lambda o: {"state": np.array([0, np.inf, 0])}, "state: found .*expected finite"),
        (lambda o: {"state": np.zeros(4)}, r"state: found shape \(4,\), expected \(3,\)"),
        (lambda o: {"prompt": ""}, "prompt: found '', expected a task in words"),
        (lambda o: {"prompt": None}, "prompt: found NoneType None, expected a string"),
        (lambda o: {"prompt": "pick up the banana"}, "prompt: found 'pick up the banana', expected only words"),
        (lambda o: {"prompt": "pick up the red cube " * 9}, "prompt: found .* tokens in"),
    ],
    ids=["missing camera", "float image", "grey image", "four channels", "no image", "empty image", "text", "nan",
         "inf", "state size", "empty prompt", "no prompt", "unknown word", "too long"],
)  # fmt: skip
def test_a_bad_observation_is_refused_by_name(change, message: str) -> None:
    for pi05 in (False, True):
        policy = small_policy(pi05, words=(*WORDS, "cube"))
        observation = random_observation(policy)
        with pytest.raises(InputError, match=message):
            policy.infer(changed(observation, **change(observation)))


def test_nan_in_the_weights_never_becomes_an_action(policy: Policy) -> None:
    with torch.no_grad():
        policy.model.action_out_proj.bias[0] = float("nan")
    with pytest.raises(InputError, match="sample_actions: found NaN or infinity"):
        policy.infer(random_observation(policy))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: {"images": []}, "images: found no camera"),
        (lambda i: {"images": i.images[:1]}, r"image_masks: found 2, expected one per camera \(1\)"),
        (lambda i: {"images": [i.images[0][:, :2], i.images[1]]}, r"images\[0\]: found shape \(1, 2, 28, 28\)"),
        (lambda i: {"images": [i.images[0].int(), i.images[1]]}, r"images\[0\]: found dtype torch.int32"),
        (lambda i: {"image_masks": [m.float() for m in i.image_masks]}, r"image_masks\[0\]: found dtype torch.float32"),
        (lambda i: {"state": i.state[:, :2]}, r"state: found shape \(1, 2\), expected \(1, 5\)"),
        (lambda i: {"state": i.state.long()}, "state: found dtype torch.int64"),
        (lambda i: {"tokens": i.tokens.float()}, "tokens: found dtype torch.float32, expected an integer type"),
        (lambda i: {"tokens": i.tokens[0]}, "tokens: found shape"),
        (lambda i: {"token_masks": i.token_masks[:, :2]}, "token_masks: found shape"),
        (lambda i: {"token_masks": i.token_masks.long()}, "token_masks: found dtype torch.int64, expected torch.bool"),
        (lambda i: {"tokens": torch.zeros(1, 99, dtype=torch.long)}, "tokens: found a prompt of 99 tokens"),
    ],
)
def test_bad_model_inputs_are_refused_by_name(policy: Policy, change, message: str) -> None:
    inputs = policy.codec.observations_to_model([random_observation(policy)])
    noise = torch.zeros(1, policy.horizon, policy.config.model.action_dim)
    with pytest.raises(InputError, match=message):
        policy.model.sample_actions(dataclasses.replace(inputs, **change(inputs)), noise)


def test_a_tokenizer_of_another_model_is_refused_by_its_ids() -> None:
    policy = small_policy(vocab_size=8)
    with pytest.raises(InputError, match=r"found token id \d+ in 'red cube', .* vocab_size=8"):
        policy.infer(changed(random_observation(policy), prompt="red cube"))


def test_noise_of_the_wrong_shape_is_refused(policy: Policy) -> None:
    inputs = policy.codec.observations_to_model([random_observation(policy)])
    with pytest.raises(InputError, match="num_steps: found 0, expected >= 1"):
        policy.model.sample_actions(inputs, torch.zeros(1, 4, 5), num_steps=0)
    with pytest.raises(InputError, match=r"noise: found shape \(1, 9, 5\), expected \(1, 4, 5\)"):
        policy.model.sample_actions(inputs, torch.zeros(1, 9, 5))


def test_committed_actions_stay_and_the_rest_follows_them(policy: Policy) -> None:
    model, inputs = policy.model, policy.codec.observations_to_model([random_observation(policy)])
    noise = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(0))
    committed = torch.randn(1, 2, 5, generator=torch.Generator().manual_seed(1))
    plain, chunk = model.sample_actions(inputs, noise), model.sample_actions(inputs, noise, committed=committed)
    assert torch.equal(chunk[:, :2], committed)
    other = model.sample_actions(inputs, noise, committed=committed + 1)
    assert not torch.allclose(chunk[:, 2:], other[:, 2:])
    torch.testing.assert_close(model.sample_actions(inputs, noise, committed=committed[:, :0]), plain)
    for wrong in (torch.zeros(1, 5, 5), torch.zeros(2, 2, 5), torch.zeros(1, 2, 4)):
        with pytest.raises(InputError, match="committed: found shape"):
            model.sample_actions(inputs, noise, committed=wrong)


# ---------------------------------------------------------------- save and load


def test_padding_that_was_left_out_of_training_follows_the_noise_it_was_trained_with(policy: Policy) -> None:
    """An untrained read-out of the padding must not reach the robot's own dimensions."""
    assert policy.config.model.action_dim > policy.action_dim
    masked = Policy(
        policy.model, dataclasses.replace(policy.config, padding_masked=True), policy.codec.tokenizer, {}, dt=0.05
    )
    observation = random_observation(policy)
    before = masked.infer(observation).actions
    with torch.no_grad():
        policy.model.action_out_proj.weight[policy.action_dim :] += 3.0
        policy.model.action_out_proj.bias[policy.action_dim :] -= 2.0
    np.testing.assert_array_equal(masked.infer(observation).actions, before)
    inputs, noise = (
        masked.codec.observations_to_model([observation]),
        torch.randn(1, policy.horizon, policy.config.model.action_dim),
    )
    sampled = policy.model.sample_actions(inputs, noise, dim_mask=masked.dim_mask)
    torch.testing.assert_close(
        sampled[..., policy.action_dim :],
        torch.zeros(1, policy.horizon, 1).expand_as(sampled[..., policy.action_dim :]),
        atol=1e-5,
        rtol=0,
    )


@pytest.mark.parametrize("variant", ["plain", "normalised", "three tokens", "no token"])
def test_a_saved_policy_comes_back_the_same(tmp_path: Path, pi05: bool, variant: str) -> None:
    changes = {"three tokens": {"peft_num_tokens": 3}, "no token": {"use_peft_prefix_token": False}}
    policy = small_policy(pi05, **changes.get(variant, {}))
    if variant == "normalised":
        policy = with_units(policy)
    policy.save(tmp_path / "checkpoint")
    again = Policy.from_checkpoint(tmp_path / "checkpoint", dt=0.05)
    assert again.digest == policy.digest
    assert again.config == policy.config
    observation = random_observation(policy)
    np.testing.assert_array_equal(again.infer(observation).actions, policy.infer(observation).actions)
    if policy.e_token is not None:
        assert again.e_token.data.tobytes() == policy.e_token.data.tobytes()
        again.set_e_token(dataclasses.replace(policy.e_token, version=2))
    path = str(tmp_path / "checkpoint")
    assert image_size_of(path) == policy.image_size
    assert transition_horizon_of(path) == policy.transition_horizon
    assert model_config_of(path) == policy.config.model


def test_a_bank_is_saved_with_the_policy(tmp_path: Path) -> None:
    policy, bank = small_policy(), torch.randn(3, 1, 16)
    config = dataclasses.replace(policy.config, bank_keys=("a", "b"))
    Policy(policy.model, config, policy.codec.tokenizer, {}, dt=0.05, bank=bank).save(tmp_path)
    again = Policy.from_checkpoint(tmp_path, dt=0.05)
    assert torch.equal(again.bank, bank)
    assert again.config.bank_keys == ("a", "b")
    assert again.digest == policy.digest


def test_bfloat16_runs_and_its_actions_are_close(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path)
    half = Policy.from_checkpoint(tmp_path, dt=0.05, precision="bfloat16")
    observation = random_observation(policy)
    found, expected = half.infer(observation).actions, policy.infer(observation).actions
    assert not np.array_equal(found, expected)
    assert np.abs(found - expected).max() < 0.2 * np.abs(expected).max()
    with pytest.raises(InputError, match="precision: found 'float8'"):
        Policy.from_checkpoint(tmp_path, dt=0.05, precision="float8")


def test_a_policy_is_loaded_in_the_precision_asked_for_and_e_tokens_fit_either() -> None:
    contract = RobotContract.from_yaml(CONTRACTS / "sim_reach.yaml")
    for name in ("tiny", str(POLICIES / "tiny_reach")):
        whole, half = (Policy.load(name, contract=contract, precision=p) for p in ("auto", "bfloat16"))
        layers = [p.model.paligemma_with_expert.gemma_expert.model.layers[0] for p in (whole, half)]
        assert [layer.mlp.up_proj.weight.dtype for layer in layers] == [torch.float32, torch.bfloat16]
        half.check_e_token(whole.e_token)  # an aligner on a CPU, a policy on a GPU
    with pytest.raises(ConfigError, match="precision: found 'float8', expected auto, float32 or bfloat16"):
        Policy.load("tiny", contract=contract, precision="float8")


def edit_config(path: Path, edit) -> None:
    values = json.loads((path / "config.json").read_text())
    edit(values)
    (path / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda v: v.update(speed=1), "speed: found an unknown key"),
        (lambda v: v["model"].update(lambda_ttt=0.1), r"model\.lambda_ttt: found an unknown key"),
        (lambda v: v["model"]["text"].update(heads=1), r"model\.text\.heads: found an unknown key"),
        (
            lambda v: v["model"].pop("vision"),
            r"model\.vision: found nothing, expected a mapping with the keys width",
        ),
        (lambda v: v.pop("cameras"), "cameras: found nothing, expected at least one camera"),
        (lambda v: v["model"].update(alignment_prefix="images"), "alignment_prefix: found 'images'"),
        (lambda v: v["model"].update(action_horizon=0), "action_horizon: found 0"),
        (lambda v: v["model"]["text"].update(num_kv_heads=3), "num_heads: found 2, expected a multiple"),
        (lambda v: v.update(state_dim=99), r"state_dim: found 99, expected 1\.\.5"),
        (lambda v: v.update(cameras=[None]), "cameras: found .* expected at least one camera"),
        (lambda v: v.update(delta_mask=[True]), "delta_mask: found 1 values, expected action_dim=3"),
        (lambda v: v.update(num_steps=0), "num_steps: found 0"),
    ],
)
def test_a_bad_config_file_is_named_with_its_key(tmp_path: Path, edit, message: str) -> None:
    small_policy().save(tmp_path)
    edit_config(tmp_path, edit)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        Policy.from_checkpoint(tmp_path, dt=0.05)


def test_options_that_would_not_be_read_are_refused(tmp_path: Path) -> None:
    small_policy().save(tmp_path)
    with pytest.raises(ConfigError, match=r"found option\(s\) \['cameras', 'peft_num_tokens'\], expected none"):
        Policy.from_checkpoint(tmp_path, dt=0.05, cameras=("front",), peft_num_tokens=3)


def test_relative_dimensions_are_dimensions_of_the_state() -> None:
    config = small_policy().config
    libero = dataclasses.replace(config, state_dim=5, delta_mask=(True, True, False))
    assert libero.delta_mask == (True, True, False)
    with pytest.raises(ConfigError, match=r"delta_mask: found .* expected True only below state_dim=1"):
        dataclasses.replace(config, state_dim=1, delta_mask=(True, True, False))


def test_a_missing_or_broken_config_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: found no such file"):
        PolicyConfig.load(tmp_path)
    for text in ("{", "[1]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json: found"):
            PolicyConfig.load(tmp_path)
    with pytest.raises(CheckpointError, match="found no directory"):
        model_config_of(str(tmp_path / "nowhere"))


def test_statistics_of_the_wrong_size_are_named(policy: Policy) -> None:
    stats = {"state": NormStats(np.zeros(2), np.ones(2)), "actions": NormStats(np.zeros(3), np.ones(3))}
    config = dataclasses.replace(policy.config, state_norm="z_score")
    with pytest.raises(ConfigError, match="statistics of state: found 2 values, expected 3"):
        Policy(policy.model, config, policy.codec.tokenizer, stats, dt=0.05)


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize("dt", [0.0, -0.1, float("nan"), float("inf")])
def test_a_bad_time_step_is_named(policy: Policy, dt: float) -> None:
    with pytest.raises(ConfigError, match=r"dt: found .* expected seconds > 0"):
        Policy(policy.model, policy.config, policy.codec.tokenizer, {}, dt=dt)


def test_a_configuration_survives_its_dict() -> None:
    for name in ("pi0", "pi05", "tiny"):
        config = ModelConfig.preset(name)
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match=r"model preset: found 'pi1', expected one of \['pi0', 'pi05', 'tiny'\]"):
        ModelConfig.preset("pi1")
    with pytest.raises(ConfigError, match="model preset tiny: lambda_ttt: found an unknown key"):
        ModelConfig.preset("tiny", lambda_ttt=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action_expert": GemmaSize(16, 2, 24, 4, 1, 8)}, r"action_expert\.num_heads: found 4, expected the VLM's 2"),
        ({"alignment_expert": GemmaSize(16, 3, 24, 2, 1, 8)}, r"alignment_expert\.depth: found 3 .* 2 layers"),
        ({"expert_layer_offset": 1}, r"action_expert\.depth: found 2 from VLM layer 1 on"),
        ({"expert_layer_offset": -1}, "expert_layer_offset: found -1"),
        ({"action_expert": GemmaSize(15, 2, 24, 2, 1, 8)}, r"action_expert\.width: found 15, expected an even number"),
        ({"vocab_size": True}, "vocab_size: found True"),
        ({"peft_lr": -1.0}, r"peft_lr: found -1\.0"),
        ({"lambda_inv": float("nan")}, "lambda_inv: found nan"),
        ({"lambda_inv": "3"}, "lambda_inv: found '3'"),
        ({"restrict_image_to_language": "no"}, "restrict_image_to_language: found 'no', expected true or false"),
    ],
)
def test_a_bad_model_size_is_named(change: dict, message: str) -> None:
    config = small_policy().config.model
    with pytest.raises(ConfigError, match=message):
        config.replace(**change)


def test_bad_stack_sizes_are_named() -> None:
    with pytest.raises(ConfigError, match=r"GemmaSize\.head_dim: found 7, expected an even number"):
        GemmaSize(16, 2, 24, 2, 1, 7)
    with pytest.raises(ConfigError, match=r"VisionSize\.width: found 15, expected a multiple of num_heads=2"):
        VisionSize(15, 1, 24, 2, 28, 14)
    with pytest.raises(ConfigError, match=r"VisionSize\.image_size: found 7"):
        VisionSize(16, 1, 24, 2, 7, 14)
    with pytest.raises(ConfigError, match=r"GemmaSize\.depth: found 0"):
        GemmaSize(16, 0, 24, 2, 1, 8)


def test_a_checkpoint_is_refused_by_a_robot_with_other_joints(tmp_path: Path) -> None:
    contract = RobotContract.from_yaml(CONTRACTS / "sim_reach.yaml")
    Policy.untrained(contract).save(tmp_path / "policy")
    assert Policy.load(str(tmp_path / "policy"), contract=contract).config.joints == contract.joint_names
    first, *others = contract.joints
    turned = dataclasses.replace(contract, joints=(*others, first))
    with pytest.raises(ConfigError, match=r"found joints shoulder_lift.*trained on, in their order: shoulder_pan"):
        Policy.load(str(tmp_path / "policy"), contract=turned)


def test_loading_and_running_a_policy_imports_only_what_it_needs() -> None:
    """Seconds between a robot's start and its first motion."""
    heavy = ["transformers", "peft", "matplotlib", "mujoco", "gymnasium", "tensorboard", "torch._dynamo", "sympy"]
    script = f"""
import sys
import numpy as np
from selfalign_core.policy import Policy
from selfalign_core.robot.types import Observation
policy = Policy.from_checkpoint({str(POLICIES / "tiny_reach")!r}, dt=0.05)
images = {{camera: np.zeros((8, 8, 3), np.uint8) for camera in policy.config.cameras}}
policy.infer(Observation(images, np.zeros(policy.state_dim, np.float32), "reach the red cube"))
print([name for name in {heavy} if name in sys.modules])
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
