"""A user's own file called parameters.yaml is not mistaken for the declaration of all parameters."""

from __future__ import annotations

from pathlib import Path

import pytest

from selfalign_ros.parameters import load_specs


def test_a_file_of_that_name_in_the_working_directory_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parameters.yaml").write_text("aligner: {ros__parameters: {steps: 3}}\n")
    monkeypatch.chdir(tmp_path)
    load_specs.cache_clear()
    assert "align_frequency" in load_specs("aligner")
