"""What openpi's and LeRobot's checkpoint directories say about the policy around their weights.

LeRobot's ``config.json`` names cameras, dimensions and normalisation, its ``policy_preprocessor.json`` what the cameras
are called on the robot and the epsilon of the normalisation; openpi keeps most of that in its training
configuration, so the robot's cameras (and delta actions) come from the caller. Reads files, loads no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from selfalign_core.errors import CheckpointError, ConfigError
from selfalign_core.model.config import ModelConfig
from selfalign_core.policy.config import PolicyConfig
from selfalign_core.policy.statistics_files import load_norm_stats
from selfalign_core.policy.tensors import infer_model_config, open_tensors
from selfalign_core.policy.transforms import NormMode, NormStats
from selfalign_core.records import Count, Natural, Only, Record, load, load_document, named, read

OPENPI_CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
_IMAGES = "observation.images."
_OBSERVATION = "observation."
_EMPTY = _IMAGES + "empty_camera_"
_PREPROCESSOR = "policy_preprocessor.json"
_MODES: dict[str, NormMode] = {
    "IDENTITY": "identity", "MEAN_STD": "z_score", "QUANTILES": "quantile", "MIN_MAX": "quantile"
}  # fmt: skip

Said = tuple[PolicyConfig, dict[str, NormStats]]
"""Configuration and statistics."""


@dataclass(frozen=True)
class _Feature(Record):
    foreign = True
    shape: Annotated[tuple[int, ...], Only(len, "a list of sizes")]
    type: str = ""


@dataclass(frozen=True)
class _LeRobot(Record):
    """What is read of LeRobot's ``config.json``."""

    foreign = True
    input_features: dict[str, _Feature] | None = None
    output_features: dict[str, _Feature] | None = None
    chunk_size: Count | None = None
    tokenizer_max_length: Count | None = None
    normalization_mapping: dict[str, str] | None = None
    num_inference_steps: Count = 10
    rtc_training_max_delay: Natural = 0
    use_relative_actions: bool | None = None
    relative_exclude_joints: tuple[str | None, ...] = ("gripper",)
    action_feature_names: tuple[str, ...] | None = None

    def dim(self, name: str) -> int:
        """Length of the vector ``name``."""
        features = (self.output_features if name == "action" else self.input_features) or {}
        if name not in features:
            raise CheckpointError(f"found features {sorted(features)}, expected {name!r}")
        return features[name].shape[0]

    @property
    def relative_mask(self) -> tuple[bool, ...] | None:
        """LeRobot's rule: every dimension is relative but those whose name contains an excluded one, in any case."""
        if not self.use_relative_actions:
            return None
        dim = self.dim("action")
        names = [name.lower() for name in self.action_feature_names or ()][:dim]
        excluded = [part.lower() for part in self.relative_exclude_joints if part]
        mask = [not any(part in name for part in excluded) for name in names]
        return tuple(mask + [True] * (dim - len(mask)))


@dataclass(frozen=True)
class _StepConfig(Record):
    foreign = True
    rename_map: dict[str, str] | None = None
    eps: float = 1e-8  # LeRobot's


@dataclass(frozen=True)
class _Step(Record):
    foreign = True
    registry_name: str = ""
    config: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Preprocessor(Record):
    """The steps that LeRobot prepares an observation with."""

    foreign = True
    steps: tuple[_Step, ...]

    def step(self, name: str) -> _StepConfig:
        """Configuration of the step of that name, what LeRobot takes for granted without one."""
        return read(_StepConfig, {step.registry_name: step.config or {} for step in self.steps}.get(name, {}), name)


def read_foreign(
    path: Path,
    *,
    cameras: Sequence[str | None] | None = None,
    joints: int | None = None,
    delta_mask: Sequence[bool] | None = None,
    norm_stats: str | Path | None = None,
    embodiment: str = "",
    **model_overrides: Any,
) -> Said:
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
    file = path / "config.json"
    values = load_document(file, "a configuration", error=CheckpointError) if file.is_file() else {}
    lerobot = None
    if _is_lerobot(file, values):
        with named(file, CheckpointError):
            lerobot = read(_LeRobot, values)
    horizon = values.get("action_horizon") if lerobot is None else lerobot.chunk_size
    if horizon is not None:
        model_overrides.setdefault("action_horizon", horizon)
    if lerobot is not None and lerobot.tokenizer_max_length is not None:
        model_overrides.setdefault("max_token_len", lerobot.tokenizer_max_length)
    with open_tensors(path) as tensors:
        model = infer_model_config(tensors, **model_overrides)
    stats_file = _find_stats(path) if norm_stats is None else Path(norm_stats)
    stats = {} if stats_file is None else load_norm_stats(stats_file)
    if lerobot is None:
        config, stats = _openpi(path, model, stats)
    else:
        config, stats = _lerobot(path, lerobot, model, stats)
    config = replace(config, embodiment=embodiment, cameras=tuple(cameras or config.cameras))
    if joints is not None:
        config, stats = _cut(config, stats, joints, "joints")
    return (config if delta_mask is None else replace(config, delta_mask=tuple(delta_mask))), stats


def _openpi(path: Path, model: ModelConfig, stats: dict[str, NormStats]) -> Said:
    if not stats:
        raise CheckpointError(f"{path}: found no norm_stats.json (looked in it and in assets/), expected openpi's")
    mode: NormMode = "quantile" if model.pi05 else "z_score"  # openpi: use_quantile_norm = model_type != PI0
    config = PolicyConfig(
        model=model,
        cameras=OPENPI_CAMERAS,
        state_dim=len(stats["state"].mean),
        action_dim=len(stats["actions"].mean),
        state_norm=mode,
        action_norm=mode,
    )
    return config, stats


def fit_to_robot(config: PolicyConfig, stats: dict[str, NormStats], joints: int, camera_names: Sequence[str]) -> Said:
    """Cut statistics to the robot's ``joints`` (openpi pads some to 32) and empty the slots of cameras it lacks.

    Raises:
        ConfigError: the robot has none of the checkpoint's cameras, or more joints than the statistics cover.
    """
    cameras = tuple(name if name in camera_names else None for name in config.cameras)
    if not any(cameras):
        raise ConfigError(
            f"contract: found cameras {list(camera_names)}, expected at least one of the checkpoint's "
            f"{[c for c in config.cameras if c]} (cameras are matched by name)"
        )
    return _cut(replace(config, cameras=cameras), stats, joints, "contract")


def _cut(config: PolicyConfig, stats: dict[str, NormStats], joints: int, where: str) -> Said:
    """The first ``joints`` dimensions of states and actions."""
    for name in ("state_dim", "action_dim"):
        if not 1 <= joints <= getattr(config, name):
            raise ConfigError(
                f"{where}: found {joints} joints, expected at most the checkpoint's {name}={getattr(config, name)}"
            )
    cut = {
        name: NormStats(**{k: v[:joints] for k, v in vars(found).items() if v is not None})
        for name, found in stats.items()
    }
    mask = None if config.delta_mask is None else config.delta_mask[:joints]
    return replace(config, state_dim=joints, action_dim=joints, delta_mask=mask), cut


def _lerobot(path: Path, said: _LeRobot, model: ModelConfig, stats: dict[str, NormStats]) -> Said:
    file, preprocessor = path / "config.json", _Preprocessor(())
    if (path / _PREPROCESSOR).is_file():
        expected = "LeRobot's processor steps"
        preprocessor = load(_Preprocessor, path / _PREPROCESSOR, expected, error=CheckpointError)
    with named(path / _PREPROCESSOR, CheckpointError):
        rename_map = preprocessor.step("rename_observations_processor").rename_map or {}
        epsilon = preprocessor.step("normalizer_processor").eps
    with named(file, CheckpointError):
        dims = said.dim("observation.state"), said.dim("action")
    modes, converted = {}, {}
    default = dict.fromkeys(("STATE", "ACTION"), "QUANTILES" if model.pi05 else "MEAN_STD")  # LeRobot's
    for name, kind in (("state", "STATE"), ("actions", "ACTION")):
        mapping = (said.normalization_mapping or default).get(kind, "IDENTITY")
        if mapping not in _MODES:
            raise CheckpointError(
                f"{file}: found normalization_mapping.{kind}={mapping!r}, "
                "expected IDENTITY, MEAN_STD, QUANTILES or MIN_MAX"
            )
        if mapping != "IDENTITY" and name not in stats:
            raise CheckpointError(f"{path}: found no statistics of {name}, expected them (normalisation {mapping})")
        modes[name] = _MODES[mapping]
        if name in stats:
            converted[name] = stats[name].over_range(file) if mapping == "MIN_MAX" else stats[name]
    inputs = said.input_features or {}
    seen = [key for key, feature in inputs.items() if key.startswith(_IMAGES) or feature.type == "VISUAL"]
    config = PolicyConfig(
        model=model,
        cameras=tuple(_camera_of(key, rename_map) for key in seen),
        state_dim=dims[0],
        action_dim=dims[1],
        state_norm=modes["state"],
        action_norm=modes["actions"],
        lerobot_epsilon=epsilon,
        delta_mask=said.relative_mask,
        num_steps=said.num_inference_steps,
        rtc_max_delay=said.rtc_training_max_delay,
    )
    return config, converted


def _is_lerobot(file: Path, values: dict[str, Any]) -> bool:
    """True for LeRobot's configuration, which names its features; openpi's does neither that nor name a type."""
    kind = values.get("type")
    if kind not in (None, "pi0", "pi05"):
        raise CheckpointError(f"{file}: found a policy of type {kind!r}, expected 'pi0' or 'pi05'")
    return kind is not None or "input_features" in values


def _camera_of(key: str, rename_map: dict[str, str]) -> str | None:
    """What the robot calls the camera of the policy's feature ``key``; None: it has none."""
    sources = [old for old, new in rename_map.items() if new == key]
    if not sources and (key.startswith(_EMPTY) or key in rename_map):
        return None
    return (sources or [key])[0].removeprefix(_IMAGES).removeprefix(_OBSERVATION)


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
