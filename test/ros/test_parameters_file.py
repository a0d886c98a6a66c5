"""The declaration of all parameters: read from the package alone, and in agreement with the core's settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from selfalign_core.alignment import AlignConfig
from selfalign_ros.aligner_node import align_config
from selfalign_ros.parameters import load_specs


def test_a_file_of_that_name_in_the_working_directory_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parameters.yaml").write_text("aligner: {ros__parameters: {steps: 3}}\n")
    monkeypatch.chdir(tmp_path)
    load_specs.cache_clear()
    assert "align_frequency" in load_specs("aligner")


def aligner_defaults() -> dict:
    return {name: spec.default for name, spec in load_specs("aligner").items()}


def test_the_aligners_defaults_are_the_cores() -> None:
    assert align_config(aligner_defaults()) == AlignConfig()


def test_in_lock_step_no_stage_has_a_limit_of_time() -> None:
    assert align_config(aligner_defaults() | {"lockstep": True}) == AlignConfig().without_budgets()


def test_every_stages_parameter_reaches_its_setting() -> None:
    """A parameter whose name matches no setting would be declared and change nothing."""
    stages = ("collect_", "identify_", "refine_", "guard_", "watch_", "lambda_", "mode")
    names = [name for name in load_specs("aligner") if name.startswith(stages)]
    assert len(names) >= 20
    for name in names:
        spec = load_specs("aligner")[name]
        others = spec.range or spec.one_of
        value = next(v for v in others if v != spec.default)
        changed = align_config(
            aligner_defaults() | {name: type(spec.default)(value)}
        )  # the ends of a range are allowed
        assert changed != AlignConfig(), name
