"""Files of normalisation statistics: openpi's norm_stats.json, which SelfAlign writes too, and LeRobot's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from selfalign_core.errors import CheckpointError
from selfalign_core.policy.transforms import STATISTICS, NormStats
from selfalign_core.records import load_document, named


def load_norm_stats(path: Path) -> dict[str, NormStats]:
    """``state`` and ``actions`` statistics from openpi's norm_stats.json or LeRobot's stats JSON or safetensors.

    Raises:
        CheckpointError: naming the file and what it lacks.
    """
    raw: Any = {}
    if path.suffix == ".safetensors":
        try:
            for key, value in load_file(path).items():
                feature, _, statistic = key.rpartition(".")
                raw.setdefault(feature, {})[statistic] = value
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: found {error}, expected normalisation statistics") from error
    else:
        raw = load_document(path, "normalisation statistics", error=CheckpointError)
    raw = raw.get("norm_stats", raw) if isinstance(raw, dict) else raw
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: found no table of statistics, expected state and actions with mean and std")
    stats = {}
    for name, keys in (("state", ("state", "observation.state")), ("actions", ("actions", "action"))):
        found = next((raw[key] for key in keys if key in raw), None)
        if found is None:
            raise CheckpointError(f"{path}: found statistics of {sorted(raw)}, expected one of {keys}")
        missing = [k for k in ("mean", "std") if not isinstance(found, dict) or k not in found]
        if missing:
            raise CheckpointError(f"{path}: statistics of {name}: missing {missing}")
        with named(f"{path}: statistics of {name}", CheckpointError):
            stats[name] = NormStats(**{k: np.ravel(found[k]) for k in STATISTICS if found.get(k) is not None})
    return stats


def save_norm_stats(path: Path, stats: dict[str, NormStats]) -> None:
    """Write openpi's norm_stats.json."""
    path.write_text(json.dumps({"norm_stats": {k: v.to_dict() for k, v in stats.items()}}, indent=2))
