"""openpi's and LeRobot's checkpoint directories load by their path and give the same actions."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from selfalign_core.errors import CheckpointError, ConfigError
from selfalign_core.model.config import GemmaSize, ModelConfig, VisionSize
from selfalign_core.model.pi0 import Pi0
from selfalign_core.policy import Policy
from selfalign_core.policy.checkpoint import model_state
from selfalign_core.policy.foreign import fit_to_robot
from selfalign_core.policy.source import Source, image_size_of, is_foreign
from selfalign_core.policy.tokenizer import word_tokenizer
from selfalign_core.robot.types import Observation

STATE_DIM, ACTION_DIM, HORIZON = 4, 3, 5
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
PREFIX = "paligemma_with_expert.paligemma."


def small_model(pi05: bool) -> Pi0:
    torch.manual_seed(0)
    expert = GemmaSize(width=16, depth=2, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=8)
    text = GemmaSize(width=24, depth=2, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=8)
    vision = VisionSize(width=72, depth=1, mlp_dim=32, num_heads=1, image_size=28, patch_size=14)
    return Pi0(
        ModelConfig(
            pi05=pi05, vision=vision, text=text, action_expert=expert, vocab_size=600, action_dim=8,
            action_horizon=HORIZON, use_peft_prefix_token=False, max_token_len=200 if pi05 else 48,
        )
    )  # fmt: skip


def statistics(dim: int, offset: float) -> dict[str, list[float]]:
    base = np.arange(dim) + offset
    return {
        "mean": base.tolist(), "std": (base + 1).tolist(), "q01": (-base - 1).tolist(), "q99": (base + 2).tolist()
    }  # fmt: skip


@pytest.fixture(params=[False, True], ids=["pi0", "pi05"])
def pi05(request) -> bool:
    return request.param


def tokenizer_into(path, pi05: bool) -> None:
    words = ["pick", "up", "Task:", "pick,", "State:", "Action:", ";\nAction:", "up,"]
    numbers = [str(n) for n in range(-1, 256)] + [f"{n};\nAction:" for n in range(-1, 256)]
    word_tokenizer(words + (numbers if pi05 else [])).save(str(path / "tokenizer.json"))


@pytest.fixture
def weights(pi05):
    torch.manual_seed(1)
    return model_state(small_model(pi05))


def openpi_directory(path, state, pi05):
    (path / "assets" / "robot").mkdir(parents=True)
    save_file(state, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"action_dim": 8, "action_horizon": HORIZON, "precision": "float32"}))
    stats = {"norm_stats": {"state": statistics(STATE_DIM, 0.5), "actions": statistics(ACTION_DIM, 1.0)}}
    (path / "assets" / "robot" / "norm_stats.json").write_text(json.dumps(stats))
    tokenizer_into(path, pi05)
    return path


def lerobot_directory(path, state, pi05):
    path.mkdir()
    both = {**state, PREFIX + "model.language_model.embed_tokens.weight": state[PREFIX + "lm_head.weight"].clone()}
    save_file({"model." + name: tensor for name, tensor in both.items()}, path / "model.safetensors")
    mode = "QUANTILES" if pi05 else "MEAN_STD"
    config = {
        "type": "pi05" if pi05 else "pi0",
        "chunk_size": HORIZON,
        "tokenizer_max_length": 200 if pi05 else 48,
        "input_features": {
            **{f"observation.images.{c}": {"type": "VISUAL", "shape": [3, 28, 28]} for c in CAMERAS},
            "observation.state": {"type": "STATE", "shape": [STATE_DIM]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [ACTION_DIM]}},
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode},
    }
    (path / "config.json").write_text(json.dumps(config))
    flat = {}
    for feature, stats in (("observation.state", statistics(STATE_DIM, 0.5)), ("action", statistics(ACTION_DIM, 1.0))):
        flat.update({f"{feature}.{k}": torch.tensor(v, dtype=torch.float32) for k, v in stats.items()})
    save_file(flat, path / "policy_preprocessor_step_5_normalizer_processor.safetensors")
    tokenizer_into(path, pi05)
    return path


def observation() -> Observation:
    rng = np.random.default_rng(0)
    images = {c: rng.integers(0, 256, (40, 60, 3)).astype(np.uint8) for c in CAMERAS}
    return Observation(images, rng.uniform(0, 1, STATE_DIM).astype(np.float32), "pick up", stamp_ns=7)


def preprocessor(directory, *, rename_map=None, eps=None):
    """LeRobot's policy_preprocessor.json, its steps cut down to those that are read."""
    rename = {"registry_name": "rename_observations_processor", "config": {"rename_map": rename_map or {}}}
    normalise = {"registry_name": "normalizer_processor", "config": {} if eps is None else {"eps": eps}}
    steps = [rename, {"registry_name": "to_batch_processor", "config": {}}, normalise]
    (directory / "policy_preprocessor.json").write_text(json.dumps({"name": "policy_preprocessor", "steps": steps}))


def test_both_layouts_load_by_path_alone_and_act_alike(tmp_path, weights, pi05):
    directories = [
        openpi_directory(tmp_path / "any_name", weights, pi05),
        lerobot_directory(tmp_path / "other_name", weights, pi05),
    ]
    chunks = []
    for directory in directories:
        assert is_foreign(directory)
        assert image_size_of(str(directory)) == (28, 28)
        policy = Policy.from_checkpoint(directory, dt=0.05)
        assert policy.config.model.pi05 is pi05
        assert policy.e_token is None
        chunks.append(policy.infer(observation()).actions)
        assert chunks[-1].shape == (HORIZON, ACTION_DIM)
    np.testing.assert_allclose(*chunks, rtol=1e-4, atol=1e-4)  # but for the epsilon of the normalisation


def test_e_token_and_alignment_start_fresh_only_when_asked(tmp_path, weights, pi05):
    directory = openpi_directory(tmp_path / "c", weights, pi05)
    expert = small_model(pi05).config.action_expert
    options = {"use_peft_prefix_token": True, "alignment_expert": expert}
    with pytest.raises(CheckpointError, match="missing peft_prefix_token"):
        Policy.from_checkpoint(directory, dt=0.05, **options)
    policy = Policy.from_checkpoint(directory, dt=0.05, initialise=("e_token", "alignment"), **options)
    assert all(torch.isfinite(p).all() for p in policy.model.parameters())
    again = Policy.from_checkpoint(directory, dt=0.05, initialise=("e_token", "alignment"), **options)
    assert policy.digest == again.digest


def test_saved_as_selfalign_checkpoint_it_acts_the_same(tmp_path, weights, pi05):
    policy = Policy.from_checkpoint(openpi_directory(tmp_path / "c", weights, pi05), dt=0.05)
    policy.save(tmp_path / "own")
    own = Policy.from_checkpoint(tmp_path / "own", dt=0.05)
    assert own.digest == policy.digest
    np.testing.assert_array_equal(own.infer(observation()).actions, policy.infer(observation()).actions)


def test_statistics_are_cut_to_the_robot_and_absent_cameras_are_masked(tmp_path, weights, pi05):
    foreign = Source.read(openpi_directory(tmp_path / "c", weights, pi05))
    config, stats = fit_to_robot(foreign.config, foreign.stats, 2, ["left_wrist_0_rgb", "chest"])
    assert config.cameras == (None, "left_wrist_0_rgb", None)
    assert (config.state_dim, config.action_dim) == (2, 2)
    assert len(stats["state"].mean) == 2
    with pytest.raises(ConfigError, match="expected at least one of the checkpoint's"):
        fit_to_robot(foreign.config, foreign.stats, 2, ["chest"])
    with pytest.raises(ConfigError, match="found 9 joints"):
        fit_to_robot(foreign.config, foreign.stats, 9, list(CAMERAS))


def test_missing_statistics_are_named(tmp_path, weights, pi05):
    directory = openpi_directory(tmp_path / "c", weights, pi05)
    (directory / "assets" / "robot" / "norm_stats.json").unlink()
    with pytest.raises(CheckpointError, match="found no norm_stats"):
        Source.read(directory)


def edit_config(directory, edit):
    values = json.loads((directory / "config.json").read_text())
    edit(values)
    (directory / "config.json").write_text(json.dumps(values))
    return directory


@pytest.mark.parametrize("missing", ["type", "normalization_mapping"])
def test_a_lerobot_config_without_a_field_reads_as_lerobot_would(tmp_path, weights, pi05, missing):
    directory = lerobot_directory(tmp_path / "c", weights, pi05)
    expected = Source.read(directory).config
    assert expected.state_norm == ("quantile" if pi05 else "z_score")
    assert Source.read(edit_config(directory, lambda v: v.pop(missing))).config == expected


def test_what_lerobot_trained_for_real_time_chunking_is_read(tmp_path, weights, pi05):
    directory = lerobot_directory(tmp_path / "c", weights, pi05)
    assert Source.read(directory).config.rtc_max_delay == 0
    assert Source.read(edit_config(directory, lambda v: v.update(rtc_training_max_delay=2))).config.rtc_max_delay == 2
    with pytest.raises(ConfigError, match="rtc_max_delay: found"):
        Source.read(edit_config(directory, lambda v: v.update(rtc_training_max_delay=HORIZON)))


def test_a_policy_of_another_type_is_refused(tmp_path, weights, pi05):
    directory = lerobot_directory(tmp_path / "c", weights, pi05)
    with pytest.raises(CheckpointError, match="found a policy of type 'pi0_fast', expected 'pi0' or 'pi05'"):
        Source.read(edit_config(directory, lambda v: v.update(type="pi0_fast")))


def test_every_visual_feature_of_lerobot_is_a_camera_in_its_order(tmp_path, weights, pi05):
    features = {
        "observation.images.wrist": {"type": "VISUAL", "shape": [3, 28, 28]},
        "observation.state": {"type": "STATE", "shape": [STATE_DIM]},
        "observation.image": {"type": "VISUAL", "shape": [3, 28, 28]},
        "observation.images.empty_camera_0": {"type": "VISUAL", "shape": [3, 28, 28]},
    }
    directory = lerobot_directory(tmp_path / "c", weights, pi05)
    edit_config(directory, lambda v: v.update(input_features=features))
    assert Source.read(directory).config.cameras == ("wrist", "image", None)


def test_cameras_have_the_names_that_lerobot_renames(tmp_path, weights, pi05):
    directory = lerobot_directory(tmp_path / "c", weights, pi05)
    a, b, c = (f"observation.images.{name}" for name in CAMERAS)
    preprocessor(directory, rename_map={"observation.images.top": a, a: b, "observation.foo": "observation.state"})
    assert Source.read(directory).config.cameras == ("top", CAMERAS[0], CAMERAS[2])
    preprocessor(directory, rename_map={a: b, b: a, c: "observation.images.unused"})
    assert Source.read(directory).config.cameras == (CAMERAS[1], CAMERAS[0], None)
    preprocessor(directory)
    assert Source.read(directory).config.cameras == CAMERAS


def test_lerobots_epsilon_is_read_and_kept(tmp_path, weights, pi05):
    directory = lerobot_directory(tmp_path / "c", weights, pi05)
    assert Source.read(directory).config.lerobot_epsilon == 1e-8
    preprocessor(directory, eps=0.5)
    policy = Policy.from_checkpoint(directory, dt=0.05)
    assert policy.config.lerobot_epsilon == 0.5
    policy.save(tmp_path / "own")
    own = Policy.from_checkpoint(tmp_path / "own", dt=0.05)
    np.testing.assert_array_equal(own.infer(observation()).actions, policy.infer(observation()).actions)
    stats, mean = policy.codec.stats["state"], policy.codec.stats["state"].mean
    if pi05:  # only in place of an empty range
        np.testing.assert_allclose(policy.codec.state_to_model(stats.q99[None])[0, :STATE_DIM], 1, atol=1e-6)
    else:
        scaled = policy.codec.state_to_model((mean + stats.std)[None])[0, :STATE_DIM]
        np.testing.assert_allclose(scaled, stats.std / (stats.std + 0.5), rtol=1e-6)
    (directory / "policy_preprocessor.json").write_text("{}")
    with pytest.raises(CheckpointError, match="steps: found nothing, expected a list"):
        Source.read(directory)


def test_statistics_padded_by_openpi_are_cut_to_the_robots_joints(tmp_path, weights, pi05):
    directory = openpi_directory(tmp_path / "c", weights, pi05)
    zeros = [0.0] * (8 - ACTION_DIM)
    padded = {k: v + zeros for k, v in statistics(ACTION_DIM, 1.0).items()}
    stats = {"norm_stats": {"state": padded, "actions": padded}}
    (directory / "assets" / "robot" / "norm_stats.json").write_text(json.dumps(stats))
    mask = (True, True, False)
    policy = Policy.from_checkpoint(directory, dt=0.05, joints=ACTION_DIM, delta_mask=mask)
    assert (policy.config.state_dim, policy.config.action_dim, policy.config.delta_mask) == (3, 3, mask)
    seen = observation()
    chunk = policy.infer(Observation(seen.images, seen.state[:ACTION_DIM], seen.prompt, stamp_ns=7))
    assert chunk.actions.shape == (HORIZON, ACTION_DIM)
    with pytest.raises(ConfigError, match="joints: found 9 joints, expected at most the checkpoint's state_dim=8"):
        Source.read(directory, joints=9)


@pytest.mark.parametrize(
    ("values", "mask"),
    [
        ({"action_feature_names": ["a", "Gripper.pos", "b"]}, (True, False, True)),  # LeRobot excludes grippers
        ({"action_feature_names": ["a", "Grip", "b"], "relative_exclude_joints": ["A", ""]}, (False, True, True)),
        ({"action_feature_names": ["gripper"], "relative_exclude_joints": ["gripper"]}, (False, True, True)),
        ({"action_feature_names": None}, (True, True, True)),
    ],
)
def test_relative_dimensions_follow_lerobots_rule(tmp_path, weights, pi05, values, mask):
    directory = lerobot_directory(tmp_path / "c", weights, pi05)
    edit_config(directory, lambda v: v.update(use_relative_actions=True, **values))
    assert Source.read(directory).config.delta_mask == mask


def test_an_unknown_model_option_is_named(tmp_path, weights, pi05):
    directory = openpi_directory(tmp_path / "c", weights, pi05)
    with pytest.raises(ConfigError, match=r"model options: peft_tokens: found an unknown key"):
        Policy.from_checkpoint(directory, dt=0.05, peft_tokens=3)


def test_statistics_may_be_named_by_their_path(tmp_path, weights, pi05):
    directory = openpi_directory(tmp_path / "c", weights, pi05)
    stats = str(directory / "assets" / "robot" / "norm_stats.json")
    np.testing.assert_array_equal(Source.read(directory, norm_stats=stats).stats["state"].std[0], np.float32(1.5))
