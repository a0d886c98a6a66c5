"""Tokens found by alignment for bodies that a policy does not know, and the action expert that is trained on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_runs import config, train, trainer, write_dataset

from selfalign_core.alignment.config import AlignConfig, Refine
from selfalign_core.alignment.trusted import Trusted
from selfalign_core.data.dataset import TransitionDataset
from selfalign_core.errors import CheckpointError, ConfigError, DatasetError
from selfalign_core.policy import Policy
from selfalign_core.policy.token_files import load_tokens, save_tokens
from selfalign_core.training.aligned_tokens import aligned_token, main, unknown_bodies

ALIGN = AlignConfig(refine=Refine(steps=2)).without_budgets()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``policy`` of a run on two bodies, ``data`` of three, ``tokens`` of the third."""
    folder = tmp_path_factory.mktemp("aligned")
    two = write_dataset(folder / "two", bodies=2)
    (folder / "policy").symlink_to(train(folder / "run", two, bank__deploy="arm a").output / "policy")
    write_dataset(folder / "data", action_offset=0.1)
    policy, data = opened(folder)
    token = aligned_token(policy, data, "arm c", ALIGN)
    save_tokens(folder / "tokens", {"arm c": token.numpy()}, policy.digest)
    return folder


def opened(folder: Path) -> tuple[Policy, TransitionDataset]:
    return Policy.from_checkpoint(folder / "policy", dt=0.05), TransitionDataset(folder / "data")


def second_stage(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": {"init": str(folder / "policy")},
        "bank__tokens": str(folder / "tokens"),
        "data__statistics": "init",
        "losses": "action",
        "freeze": ["vision_tower", "projector", "vlm", "alignment_expert"],
        "optim": {"lr": 1e-2, "warmup_steps": 2, "peft_lr": 1.0},
        "steps": 12,
        **changes,
    }


def test_a_token_is_the_same_each_time_and_within_reach_of_the_bank(folder: Path) -> None:
    policy, data = opened(folder)
    assert unknown_bodies(policy, data) == ["arm c"]
    token = aligned_token(policy, data, "arm c", ALIGN)
    assert np.array_equal(token, load_tokens(folder / "tokens", model_digest=policy.digest)["arm c"])
    trusted = Trusted.of(policy)
    assert not any(torch.equal(token, known) for known in trusted.tokens)  # it was refined
    assert trusted.complaint(token, ALIGN.guard) == ""


def test_the_command_writes_a_token_of_each_unknown_body(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "found.safetensors"
    assert main([str(folder / "policy"), str(folder / "data"), "--output", str(output)]) == 0
    policy, data = opened(folder)
    (token,) = load_tokens(output, model_digest=policy.digest).values()
    assert np.array_equal(token, aligned_token(policy, data, "arm c", AlignConfig().without_budgets()))
    assert main([str(folder / "policy"), str(folder / "two"), "--output", str(tmp_path / "none")]) == 2
    assert "found only bodies that" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_only_the_action_expert_learns_from_them(folder: Path, tmp_path: Path) -> None:
    """What alignment finds must not change: the same bank, token, statistics and alignment expert."""
    before, data = opened(folder)
    made = train(tmp_path / "run", folder / "data", **second_stage(folder))
    after = Policy.from_checkpoint(made.output / "policy", dt=0.05)
    assert after.config.bank_keys == before.config.bank_keys == ("arm a", "arm b")
    assert torch.equal(after.bank, before.bank)
    assert after.e_token.embodiment == "arm a" and (after.e_token.data == before.e_token.data).all()
    for name, stats in before.codec.stats.items():
        assert all((getattr(after.codec.stats[name], key) == value).all() for key, value in vars(stats).items())
    old = before.model.state_dict()
    changed = {name for name, value in after.model.state_dict().items() if not torch.equal(value, old[name])}
    parts = ("paligemma_with_expert.gemma_expert.", "action_", "time_mlp_", "state_proj", "peft_type_action")
    assert changed and all(name.startswith(parts) for name in changed), changed
    assert torch.equal(aligned_token(after, data, "arm c", ALIGN), aligned_token(before, data, "arm c", ALIGN))


def test_held_out_bodies_are_scored_with_their_own_token(folder: Path, tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", folder / "data", data__holdout_by="embodiment", **second_stage(folder))
    assert made.joint.bank.keys == ("arm a", "arm b", "arm c")
    token = load_tokens(folder / "tokens", model_digest=opened(folder)[0].digest)["arm c"]
    assert np.array_equal(made.joint.bank.weight[2].detach(), token)
    assert made.evaluate()["loss_action"] > 0


def test_tokens_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    policy, _ = opened(folder)
    token = torch.zeros_like(torch.from_numpy(policy.e_token.data))

    def refused(text: str, error: type[Exception] = ConfigError, **changes) -> None:
        with pytest.raises(error, match=text):
            trainer(tmp_path / "run", folder / "data", **second_stage(folder, **changes))

    save_tokens(tmp_path / "others", {"arm d": token.numpy()}, policy.digest)
    refused(r"found no token of arm c \(1 of 3 bodies\)", bank__tokens=str(tmp_path / "others"))
    save_tokens(tmp_path / "foreign", {"arm c": token.numpy()}, "0" * 64)
    refused("found tokens of model '000000000000'", CheckpointError, bank__tokens=str(tmp_path / "foreign"))
    (tmp_path / "damaged").write_bytes(b"no tokens")
    refused("expected a file of tokens by embodiment", CheckpointError, bank__tokens=str(tmp_path / "damaged"))
    model = folder / "policy" / "model.safetensors"
    refused("found format None", CheckpointError, bank__tokens=str(model))
    short = TransitionDataset(write_dataset(tmp_path / "short", length=2))
    with pytest.raises(DatasetError, match="found no 3 frames in a row of 'arm c'"):
        aligned_token(policy, short, "arm c", ALIGN)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model": {"preset": "tiny"}}, "model.init: found None, expected a checkpoint, for bank.tokens"),
        ({"bank__mode": "shared"}, "bank.mode: found 'shared', expected 'embodiment' beside tokens"),
        ({"bank__deploy": "arm b"}, "bank.deploy: found 'arm b', expected None beside tokens"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        config(tmp_path / "run", folder / "data", **{**second_stage(folder), **changes})
