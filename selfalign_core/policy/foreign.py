"""What openpi's and LeRobot's checkpoint directories say about the policy around their weights.

LeRobot's ``config.json`` names cameras, dimensions and normalisation, its ``policy_preprocessor.json`` what the cameras
are called on the robot and the epsilon of the normalisation; openpi keeps most of that in its training
configuration, so the robot's cameras (and delta actions) come from the caller. Reads files, loads no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from selfalign_core.errors import CheckpointError, ConfigError
from selfalign_core.model.config import ModelConfig
from selfalign_core.policy.checkpoint import infer_model_config, open_tensors
from selfalign_core.policy.config import PolicyConfig, read_json
from selfalign_core.policy.transforms import NormStats, load_norm_stats

OPENPI_CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
_IMAGES = "observation.images."
_OBSERVATION = "observation."
_EMPTY = _IMAGES + "empty_camera_"
_PREPROCESSOR = "policy_preprocessor.json"
_EPSILON = 1e-8  # LeRobot's, where its files do not say


@dataclass(frozen=True)
class ForeignCheckpoint:
    """Configuration and statistics read from a directory that SelfAlign did not write."""

    config: PolicyConfig
    stats: dict[str, NormStats]


def read_foreign(
    path: Path,
    *,
    cameras: Sequence[str | None] | None = None,
    joints: int | None = None,
    delta_mask: Sequence[bool] | None = None,
    norm_stats: str | Path | None = None,
    embodiment: str = "",
    **model_overrides: Any,
) -> ForeignCheckpoint:
    """Read an openpi (PyTorch) or LeRobot π0 / π0.5 directory.

    Args:
        cameras: camera name per image slot, None for an empty slot; by default the checkpoint's own names.
        joints: of the robot, where the statistics have more (openpi pads some to 32, and its files do not say how
            many are meant); by default all that the checkpoint has.
        delta_mask: per action dimension, True if the checkpoint predicts it relative to the state; by default what
            LeRobot's config says, absolute for openpi (whose files do not say).
        norm_stats: statistics file; by default searched for in the directory.
        model_overrides: fields of :class:`ModelConfig` in place of what the tensors imply.

    Raises:
        CheckpointError: naming the file and what it lacks.
    """
    values = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    lerobot = _is_lerobot(path / "config.json", values)
    horizon = values.get("chunk_size" if lerobot else "action_horizon")
    if horizon is not None:
        model_overrides.setdefault("action_horizon", horizon)
    if lerobot and "tokenizer_max_length" in values:
        model_overrides.setdefault("max_token_len", values["tokenizer_max_length"])
    with open_tensors(path) as tensors:
        model = infer_model_config(tensors, **model_overrides)
    stats_file = _find_stats(path) if norm_stats is None else Path(norm_stats)
    stats = {} if stats_file is None else load_norm_stats(stats_file)
    if lerobot:
        foreign = _lerobot(path, values, model, stats, cameras, embodiment)
    else:
        foreign = _openpi(path, model, stats, cameras, embodiment)
    if joints is not None:
        foreign = _cut(foreign, joints, "joints")
    if delta_mask is None:
        return foreign
    return replace(foreign, config=replace(foreign.config, delta_mask=tuple(delta_mask)))


def _openpi(
    path: Path, model: ModelConfig, stats: dict[str, NormStats], cameras: Sequence[str | None] | None, embodiment: str
) -> ForeignCheckpoint:
    if not stats:
        raise CheckpointError(f"{path}: found no norm_stats.json (looked in it and in assets/), expected openpi's")
    mode = "quantile" if model.pi05 else "z_score"  # openpi: use_quantile_norm = model_type != PI0
    config = PolicyConfig(
        model=model,
        cameras=tuple(cameras or OPENPI_CAMERAS),
        state_dim=len(stats["state"].mean),
        action_dim=len(stats["actions"].mean),
        state_norm=mode,
        action_norm=mode,
        embodiment=embodiment,
    )
    return ForeignCheckpoint(config, stats)


def fit_to_robot(foreign: ForeignCheckpoint, joints: int, camera_names: Sequence[str]) -> ForeignCheckpoint:
    """Cut statistics to the robot's ``joints`` (openpi pads some to 32) and empty the slots of cameras it lacks.

    Raises:
        ConfigError: the robot has none of the checkpoint's cameras, or more joints than the statistics cover.
    """
    config = foreign.config
    cameras = tuple(name if name in camera_names else None for name in config.cameras)
    if not any(cameras):
        raise ConfigError(
            f"contract: found cameras {list(camera_names)}, expected at least one of the checkpoint's "
            f"{[c for c in config.cameras if c]} (cameras are matched by name)"
        )
    return _cut(replace(foreign, config=replace(config, cameras=cameras)), joints, "contract")


def _cut(foreign: ForeignCheckpoint, joints: int, where: str) -> ForeignCheckpoint:
    """The first ``joints`` dimensions of states and actions."""
    config = foreign.config
    for field in ("state_dim", "action_dim"):
        if not 1 <= joints <= getattr(config, field):
            raise ConfigError(
                f"{where}: found {joints} joints, expected at most the checkpoint's {field}={getattr(config, field)}"
            )
    stats = {
        name: NormStats(**{k: v[:joints] for k, v in vars(found).items() if v is not None})
        for name, found in foreign.stats.items()
    }
    mask = None if config.delta_mask is None else config.delta_mask[:joints]
    return ForeignCheckpoint(replace(config, state_dim=joints, action_dim=joints, delta_mask=mask), stats)


def _lerobot(
    path: Path,
    values: dict[str, Any],
    model: ModelConfig,
    stats: dict[str, NormStats],
    cameras: Sequence[str | None] | None,
    embodiment: str,
) -> ForeignCheckpoint:
    file = path / "config.json"
    inputs, outputs = values.get("input_features") or {}, values.get("output_features") or {}
    for name, features in (("observation.state", inputs), ("action", outputs)):
        if name not in features:
            raise CheckpointError(f"{file}: found features {sorted(features)}, expected {name!r}")
    state_dim, action_dim = inputs["observation.state"]["shape"][0], outputs["action"]["shape"][0]
    steps = _preprocessor_steps(path / _PREPROCESSOR)
    if cameras is None:
        keys = [key for key, feature in inputs.items() if key.startswith(_IMAGES) or feature.get("type") == "VISUAL"]
        rename_map = steps.get("rename_observations_processor", {}).get("rename_map") or {}
        cameras = [_camera_of(key, rename_map) for key in keys]
    modes, converted = {}, {}
    default = dict.fromkeys(("STATE", "ACTION"), "QUANTILES" if model.pi05 else "MEAN_STD")  # LeRobot's
    for name, kind in (("state", "STATE"), ("actions", "ACTION")):
        mapping = values.get("normalization_mapping", default).get(kind, "IDENTITY")
        if mapping not in ("IDENTITY", "MEAN_STD", "QUANTILES", "MIN_MAX"):
            raise CheckpointError(
                f"{file}: found normalization_mapping.{kind}={mapping!r}, "
                "expected IDENTITY, MEAN_STD, QUANTILES or MIN_MAX"
            )
        if mapping != "IDENTITY" and name not in stats:
            raise CheckpointError(f"{path}: found no statistics of {name}, expected them (normalisation {mapping})")
        modes[name] = {"IDENTITY": "identity", "MEAN_STD": "z_score"}.get(mapping, "quantile")
        if mapping == "MIN_MAX":
            converted[name] = stats[name].over_range(file)
        elif name in stats:
            converted[name] = stats[name]
    config = PolicyConfig(
        model=model,
        cameras=tuple(cameras),
        state_dim=state_dim,
        action_dim=action_dim,
        state_norm=modes["state"],
        action_norm=modes["actions"],
        lerobot_epsilon=steps.get("normalizer_processor", {}).get("eps", _EPSILON),
        delta_mask=_relative_mask(values, action_dim) if values.get("use_relative_actions") else None,
        num_steps=values.get("num_inference_steps", 10),
        rtc_max_delay=values.get("rtc_training_max_delay", 0),
        embodiment=embodiment,
    )
    return ForeignCheckpoint(config, converted)


def _is_lerobot(file: Path, values: dict[str, Any]) -> bool:
    """True for LeRobot's configuration, which names its features; openpi's does neither that nor name a type."""
    kind = values.get("type")
    if kind not in (None, "pi0", "pi05"):
        raise CheckpointError(f"{file}: found a policy of type {kind!r}, expected 'pi0' or 'pi05'")
    return kind is not None or "input_features" in values


def _preprocessor_steps(file: Path) -> dict[str, dict[str, Any]]:
    """Configuration of each step that LeRobot prepares an observation with, by the step's name; {} without the file."""
    if not file.is_file():
        return {}
    steps = read_json(file).get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise CheckpointError(f"{file}: steps: found {steps!r}, expected a list of LeRobot's processor steps")
    return {step.get("registry_name", ""): step.get("config") or {} for step in steps}


def _camera_of(key: str, rename_map: dict[str, str]) -> str | None:
    """What the robot calls the camera of the policy's feature ``key``; None: it has none."""
    sources = [old for old, new in rename_map.items() if new == key]
    if not sources and (key.startswith(_EMPTY) or key in rename_map):
        return None
    return (sources or [key])[0].removeprefix(_IMAGES).removeprefix(_OBSERVATION)


def _relative_mask(values: dict[str, Any], action_dim: int) -> tuple[bool, ...]:
    """LeRobot's rule: every dimension is relative but those whose name contains one of the excluded, in any case."""
    names = [str(name).lower() for name in values.get("action_feature_names") or []][:action_dim]
    excluded = [str(part).lower() for part in values.get("relative_exclude_joints", ["gripper"]) if part]
    mask = [not any(part in name for part in excluded) for name in names]
    return tuple(mask + [True] * (action_dim - len(mask)))


def _find_stats(path: Path) -> Path | None:
    patterns = (
        "norm_stats.json",
        "assets/**/norm_stats.json",
        "policy_preprocessor*normalizer*.safetensors",
        "stats.json",
    )
    for pattern in patterns:
        found = sorted(path.glob(pattern))
        if len(found) > 1:
            raise CheckpointError(f"{path}: found {len(found)} statistics files ({found}), expected one; name it")
        if found:
            return found[0]
    return None
