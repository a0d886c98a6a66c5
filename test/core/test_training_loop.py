"""Training in one process: it learns, it resumes exactly, and what it writes is a policy."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_runs import train, trainer, write_dataset

from selfalign_core.errors import CheckpointError, ConfigError
from selfalign_core.policy import Policy
from selfalign_core.robot.types import Observation
from selfalign_core.training.logging import LogError, read_log
from selfalign_core.training.state import list_checkpoints
from selfalign_core.training.trainer import LOSSES, Gap, Trainer, TrainingError

FROZEN = {"freeze": ["vision_tower", "projector"], "cache_features": True}
TIMING = {"kind", "samples_per_s", "step_s", "wait_s", "memory_mib"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


def log_of(output: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    return [{k: v for k, v in line.items() if k not in TIMING} for line in read_log(output / "log.jsonl", kind)]


def observation(policy: Policy) -> Observation:
    image = np.full((*policy.image_size, 3), 90, np.uint8)
    return Observation({"front": image}, np.array([0.1, -0.1], np.float32), "reach the red cube", 7)


def test_every_loss_falls_on_held_out_episodes(tmp_path: Path, data: Path) -> None:
    made = trainer(tmp_path / "run", data, steps=80, batch_size=16, log__eval_samples=16, **FROZEN)
    before = made.evaluate()
    made.run()
    after = made.evaluate()
    for name in LOSSES:
        assert after[f"loss_{name}"] < before[f"loss_{name}"], name
    line = log_of(tmp_path / "run")[-1]
    weighted = 0.3 * line["loss_perception"] + line["loss_dynamics"] + 3 * line["loss_inverse_dynamics"]
    assert line["loss_total"] == pytest.approx(line["loss_action"] + weighted, rel=1e-4)
    assert {"e_norm", "e_spread", "e_grad_norm", "grad_norm", "lr_model", "lr_token"} <= set(line)


def test_a_resumed_run_repeats_an_uninterrupted_one(tmp_path: Path, data: Path) -> None:
    options: dict[str, Any] = {"checkpoint__every": 2, "log__gap_every": 3, "log__gap_samples": 8}
    train(tmp_path / "whole", data, **options)
    first = trainer(tmp_path / "parts", data, **options)
    save, first.save = first.save, lambda: (save(), 1 / 0)  # dies right after its first checkpoint
    with pytest.raises(ZeroDivisionError):
        first.run()
    again = trainer(tmp_path / "parts", data, resume=True, **options)
    assert again.step == 2
    again.run()
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    assert log_of(tmp_path / "parts", "gap") == log_of(tmp_path / "whole", "gap")
    last = "checkpoints/step_00000006"
    for file in ("state-00000.safetensors", "policy/model.safetensors"):
        assert (tmp_path / "parts" / last / file).read_bytes() == (tmp_path / "whole" / last / file).read_bytes()
    assert [p.name for p in list_checkpoints(tmp_path / "whole/checkpoints")] == ["step_00000004", "step_00000006"]


def test_a_finished_run_is_not_overwritten_and_resumes_to_nothing(tmp_path: Path, data: Path) -> None:
    train(tmp_path / "run", data, steps=3)
    with pytest.raises(ConfigError, match=r"found checkpoints up to .*step_00000003.*--resume"):
        trainer(tmp_path / "run", data, steps=3)
    again = trainer(tmp_path / "run", data, steps=3, resume=True)
    assert again.run() == tmp_path / "run/checkpoints/step_00000003/policy"
    # A longer run goes on from there.
    assert train(tmp_path / "run", data, steps=5, resume=True).step == 5


def test_a_run_taken_back_goes_on_from_there_and_sets_aside_what_came_later(tmp_path: Path, data: Path) -> None:
    output = tmp_path / "run"
    checkpoints, aside = output / "checkpoints", output / "checkpoints/rewound_1"
    train(output, data, checkpoint__every=2, checkpoint__keep=3)
    log = (output / "log.jsonl").read_bytes()
    options: dict[str, Any] = {"checkpoint__every": 3, "checkpoint__keep": 1}
    back = trainer(output, data, resume=checkpoints / "step_00000002", **options)
    assert [p.name for p in list_checkpoints(checkpoints)][1:] == ["step_00000004", "step_00000006"]  # nothing yet
    back.train_step = lambda batch: 1 / 0  # dies before its first checkpoint
    with pytest.raises(ZeroDivisionError):
        back.run()
    assert (output / "policy").resolve() == checkpoints / "step_00000002/policy"
    (note,) = [line["text"] for line in log_of(output, "note") if "taken back" in line["text"]]
    assert "step_00000002" in note and str(aside) in note
    again = trainer(output, data, resume=True, **options)
    assert again.step == 2
    save, again.save = again.save, lambda: (save(), 1 / 0)  # dies right after its first checkpoint
    with pytest.raises(ZeroDivisionError):
        again.run()
    assert [p.name for p in list_checkpoints(checkpoints)] == ["step_00000003"]
    assert (output / "policy").resolve() == checkpoints / "step_00000003/policy"
    assert trainer(output, data, resume=True, **options).step == 3
    # What was set aside is whole, and a run of its own can go on from it.
    assert (aside / "log.jsonl").read_bytes() == log
    assert [p.name for p in list_checkpoints(aside)] == ["step_00000004", "step_00000006"]
    assert trainer(tmp_path / "other", data, resume=aside, **options).step == 6


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, data: Path) -> None:
    train(tmp_path / "run", data, steps=3)
    checkpoint = tmp_path / "run/checkpoints/step_00000003"
    other = write_dataset(tmp_path / "other", bodies=2)
    with pytest.raises(CheckpointError, match=r"bank of \['arm a', 'arm b', 'arm c'\], expected \['arm a', 'arm b'\]"):
        trainer(tmp_path / "x", other, resume=checkpoint)
    with pytest.raises(CheckpointError, match=r"surplus ema/bank.weight"):
        trainer(tmp_path / "x", data, resume=checkpoint, ema_decay=None)
    with pytest.raises(CheckpointError, match="nowhere: found no training checkpoint"):
        trainer(tmp_path / "x", data, resume=tmp_path / "nowhere")
    file = checkpoint / "state-00000.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"state-00000\.safetensors"):
        trainer(tmp_path / "x", data, resume=checkpoint)


def test_the_policy_written_acts_with_the_averaged_weights_and_the_bank(tmp_path: Path, data: Path) -> None:
    made = train(tmp_path / "run", data, ema_decay=0.9, bank__capacity=5)
    policy = Policy.from_checkpoint(tmp_path / "run/policy", dt=0.05)
    assert policy.infer(observation(policy)).actions.shape == (4, 2)
    assert policy.config.bank_keys == ("arm a", "arm b", "arm c") and policy.bank.shape == (5, 1, 16)
    assert np.allclose(policy.e_token.data, policy.bank[:3].mean(0))
    assert torch.equal(policy.bank, made.ema.values["bank.weight"])
    name = "action_in_proj.weight"
    assert torch.equal(policy.model.state_dict()[name], made.ema.values[f"model.{name}"])
    assert not torch.equal(policy.model.state_dict()[name], made.joint.model.state_dict()[name])
    # Without the average the policy has the weights themselves.
    plain = train(tmp_path / "plain", data, ema_decay=None)
    written = load_file(tmp_path / "plain/policy/model.safetensors")
    assert torch.equal(written[name], plain.joint.model.state_dict()[name])


def test_the_policy_can_be_written_for_one_of_the_bodies(tmp_path: Path, data: Path) -> None:
    train(tmp_path / "run", data, steps=3, bank__deploy="arm b")
    policy = Policy.from_checkpoint(tmp_path / "run/policy", dt=0.05)
    assert np.array_equal(policy.e_token.data, policy.bank[1]) and policy.e_token.embodiment == "arm b"
    with pytest.raises(ConfigError, match=r"bank\.deploy: found 'arm z'.*arm a"):
        trainer(tmp_path / "refused", data, bank__deploy="arm z")


def test_training_goes_on_from_a_policy_with_tokens_for_the_bodies_it_knows(tmp_path: Path, data: Path) -> None:
    two = write_dataset(tmp_path / "two", bodies=2)
    train(tmp_path / "first", two, ema_decay=None)
    known = Policy.from_checkpoint(tmp_path / "first/policy", dt=0.05)
    made = trainer(tmp_path / "second", data, model={"init": str(tmp_path / "first/policy"), "changes": {}})
    bank = made.joint.bank.weight.detach()
    assert torch.equal(bank[:2], known.bank) and torch.allclose(bank[2], known.bank.mean(0))
    assert torch.equal(made.joint.model.next_obs_mean, known.model.next_obs_mean)
    made.run()


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"bank__mode": "shared"}, ("shared",)),
        ({"model__changes": {"use_peft_prefix_token": False}}, ()),
        ({"losses": "action"}, ("arm a", "arm b", "arm c")),
        ({"model__changes": {"alignment_expert": None}}, ("arm a", "arm b", "arm c")),
        ({"model__changes": {"peft_num_tokens": 2}, "accumulation": 2}, ("arm a", "arm b", "arm c")),
        ({"rtc_max_delay": 2, "model__changes": {"restrict_image_to_language": False}}, ("arm a", "arm b", "arm c")),
    ],
)
def test_variants_train_and_load(tmp_path: Path, data: Path, changes: dict[str, Any], keys: tuple[str, ...]) -> None:
    made = train(tmp_path / "run", data, steps=3, log__gap_every=1, log__gap_samples=8, **changes)
    policy = Policy.from_checkpoint(tmp_path / "run/policy", dt=0.05)
    assert policy.config.bank_keys == keys and (policy.bank is None) == (not keys)
    assert np.isfinite(policy.infer(observation(policy)).actions).all()
    line = log_of(tmp_path / "run")[-1]
    assert ("e_norm" in line) == bool(keys)
    assert (line["loss_inverse_dynamics"] > 0) == made.alignment
    assert bool(log_of(tmp_path / "run", "gap")) == (len(keys) > 1)


def test_accumulation_and_recomputed_layers_change_no_loss(tmp_path: Path, data: Path) -> None:
    train(tmp_path / "plain", data)
    train(tmp_path / "less", data, accumulation=4, checkpoint_layers=True)
    for a, b in zip(log_of(tmp_path / "plain"), log_of(tmp_path / "less"), strict=True):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-5)


def test_bfloat16_keeps_float32_masters(tmp_path: Path, data: Path) -> None:
    made = train(tmp_path / "run", data, precision="bfloat16", optim__lr=1e-5, ema_decay=None)
    name = next(n for n in made.trained.forward if "language_model" in n and n.endswith("v_proj.weight"))
    forward, master = made.trained.forward[name], made.trained.master[name]
    assert forward.dtype == torch.bfloat16 and master.dtype == torch.float32
    assert torch.equal(forward, master.bfloat16()) and not torch.equal(forward.float(), master)
    written = load_file(tmp_path / "run/policy/model.safetensors")[name.removeprefix("model.")]
    assert torch.equal(written, master)
    again = trainer(tmp_path / "run", data, precision="bfloat16", optim__lr=1e-5, ema_decay=None, resume=True)
    assert torch.equal(again.trained.master[name], master) and torch.equal(again.trained.forward[name], forward)


def test_lora_trains_adapters_and_writes_plain_weights(tmp_path: Path, data: Path) -> None:
    pytest.importorskip("peft")
    made = train(tmp_path / "run", data, lora={"rank": 2}, ema_decay=None)
    names = set(made.trained.master)
    assert any("lora_A" in n for n in names) and not any("base_layer" in n for n in names)
    assert "bank.weight" in names and not any("lora" in n and "vision" in n for n in names)
    policy = Policy.from_checkpoint(tmp_path / "run/policy", dt=0.05)
    sample = made.encoder(made.loader.batch(0), made.loader.positions(0))
    adapted = made.joint(sample)
    made.joint.model = policy.model
    assert made.joint(sample).total.item() == pytest.approx(adapted.total.item(), rel=1e-4)
    with pytest.raises(ConfigError, match=r"lora.targets"):
        trainer(tmp_path / "x", data, lora={"targets": "nothing"})


def test_a_gap_appears_where_bodies_differ_and_a_warning_where_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"log__gap_samples": 64, "batch_size": 16, "steps": 150, "optim__peft_lr": 0.03, **FROZEN}
    data = write_dataset(tmp_path / "set", action_offset=0.6)
    made = trainer(tmp_path / "run", data, log__gap_every=150, **options)
    made.run()
    gap = made.measure_gap()["inverse_dynamics"]
    assert gap.mean > 0.05 and gap.shown
    assert log_of(tmp_path / "run", "gap")[-1]["inverse_dynamics_gap"] == pytest.approx(gap.mean)
    assert not [line for line in log_of(tmp_path / "run", "note") if "WARNING" in line["text"]]
    with torch.no_grad():  # tokens that say nothing
        made.joint.bank.weight.copy_(made.joint.bank.mean())
    assert made.measure_gap()["inverse_dynamics"].mean == 0.0
    monkeypatch.setattr(
        Trainer, "measure_gap", lambda self: {"inverse_dynamics": Gap(own=1.0, other=1.01, stderr=0.02)}
    )
    trainer(tmp_path / "new", data, **{**options, "steps": 3, "log__gap_every": 3}).run()
    (warning,) = [line["text"] for line in log_of(tmp_path / "new", "note") if "WARNING" in line["text"]]
    assert "inverse dynamics does not use the token" in warning


def test_held_out_bodies_are_scored_with_the_mean_token(tmp_path: Path, data: Path) -> None:
    made = trainer(tmp_path / "run", data, data__holdout_by="embodiment", data__holdout=0.3)
    assert len(made.joint.bank.keys) == 2
    before = made.evaluate()
    with torch.no_grad():  # only the mean counts
        made.joint.bank.weight[0] += 1.0
        made.joint.bank.weight[1] -= 1.0
    assert made.evaluate() == pytest.approx(before, rel=1e-5)


def test_a_loss_that_is_not_finite_ends_the_run_with_its_weights_unharmed(tmp_path: Path, data: Path) -> None:
    made = trainer(tmp_path / "run", data, checkpoint__every=2)
    step = itertools.count()
    forward = made.joint.model.action_in_proj.forward
    made.joint.model.action_in_proj.forward = lambda x: forward(x) * (float("nan") if next(step) == 3 else 1.0)
    with pytest.raises(TrainingError, match=r"step 4: found gradient norm nan .* action nan"):
        made.run()
    assert all(p.isfinite().all() for p in made.trained.master.values())
    assert list_checkpoints(tmp_path / "run/checkpoints")[-1].name == "step_00000002"


def test_what_a_killed_writer_left_is_not_a_checkpoint(tmp_path: Path, data: Path) -> None:
    train(tmp_path / "run", data, steps=4, checkpoint__every=2)
    folder = tmp_path / "run/checkpoints"
    for step in ("5", "6"):
        shutil.copytree(folder / "step_00000004", folder / f".step_0000000{step}.partial")
        (folder / f".step_0000000{step}.partial/training.json").unlink()
    with (tmp_path / "run/log.jsonl").open("a") as log:  # steps after the checkpoint, the last line cut off
        log.write(json.dumps({"step": 5, "kind": "train", "loss_total": 1.0}) + '\n{"step": 6, "ki')
    made = trainer(tmp_path / "run", data, steps=6, resume=True)
    assert made.step == 4
    made.run()
    assert [line["step"] for line in log_of(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert not list(folder.glob(".*"))


def test_a_log_that_cannot_be_written_is_named_and_the_run_goes_on_from_its_checkpoint(
    tmp_path: Path, data: Path
) -> None:
    output, log = tmp_path / "run", tmp_path / "run/log.jsonl"
    train(output, data, steps=2, optim__warmup_steps=1)
    kept = log.rename(tmp_path / "kept")
    log.symlink_to("/dev/full")
    with pytest.raises(LogError, match=r"log.jsonl: could not write the log \(.*No space left on device"):
        train(output, data, steps=4, resume=True)
    assert [path.name for path in list_checkpoints(output / "checkpoints")] == ["step_00000002"]
    kept.rename(log)
    train(output, data, steps=4, resume=True)
    assert [line["step"] for line in log_of(output)] == [1, 2, 3, 4]


def test_tensorboard_has_the_numbers_of_the_log(tmp_path: Path, data: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path / "run", data, steps=3, log__tensorboard=True)
    board = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    shown = [event.value for event in board.Scalars("train/loss_total")]
    assert shown == pytest.approx([line["loss_total"] for line in log_of(tmp_path / "run")])
