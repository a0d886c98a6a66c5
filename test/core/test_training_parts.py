"""The parts of training on their own: configuration, bank, parameter groups, schedule, average, inputs."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import config, trainer, values, write_dataset

from selfalign_core.data.loader import Loader
from selfalign_core.errors import ConfigError, InputError
from selfalign_core.policy.bank import MEAN_ROW, TokenBank, principal_directions
from selfalign_core.training.config import OptimSection, TrainConfig
from selfalign_core.training.optim import Ema, has_decay, lr_factor


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


# ------------------------------------------------------------------------------------------------ configuration

MINIMAL = "output: runs/x\ndata: {path: d}\n"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (MINIMAL + "stepz: 5\n", ["stepz", "5", "an unknown key", "steps"]),
        (MINIMAL + "optim: {lr: fast}\n", ["optim.lr", "'fast'", "a number"]),
        (MINIMAL + "steps: 1.5\n", ["steps", "1.5", "an integer"]),
        (MINIMAL + "steps: true\n", ["steps", "True", "an integer"]),
        (MINIMAL + "optim: {lr: -1}\n", ["optim.lr", "-1", "above 0"]),
        (MINIMAL + "optim: {betas: [0.9]}\n", ["optim.betas", "[0.9]", "a list of 2"]),
        (MINIMAL + "precision: half\n", ["precision", "'half'", "bfloat16"]),
        (MINIMAL + "ema_decay: 1\n", ["ema_decay", "found 1,", "[0, 1)"]),
        (MINIMAL + "batch_size: 7\naccumulation: 2\n", ["batch_size", "7", "a multiple of accumulation=2"]),
        (MINIMAL + "cache_features: true\n", ["cache_features", "vision_tower"]),
        (MINIMAL + "model: {changes: {peft_lr: 1}}\n", ["model.changes.peft_lr", "a field of ModelConfig"]),
        (MINIMAL + "lora: {targets: '('}\n", ["lora.targets", "a regular expression"]),
        (MINIMAL + "steps: 3\nsteps: 4\n", ["steps: found twice (line 4)"]),
        ("output: runs/x\n", ["data", "found nothing"]),
        ("[1, 2]\n", ["found [1, 2]", "a mapping with the keys output"]),
        ("{", ["invalid YAML"]),
    ],
)
def test_a_bad_configuration_is_refused_by_file_key_found_and_expected(
    tmp_path: Path, text: str, parts: list[str]
) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        TrainConfig.load(file)
    for part in [str(file), *parts]:
        assert part in str(error.value)


def test_overrides_are_read_like_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(MINIMAL)
    loaded = TrainConfig.load(file, ["optim.lr=1e-3", "freeze=[vlm]", "lora.rank=3", "model.changes.text.depth=7"])
    assert (loaded.optim.lr, loaded.freeze, loaded.lora.rank) == (1e-3, ("vlm",), 3)
    assert loaded.model.build().text.depth == 7
    assert TrainConfig.from_dict(loaded.to_dict()) == loaded
    for bad in ("optim.lr", "data.path.x=3", "=3"):
        with pytest.raises(ConfigError, match="override"):
            TrainConfig.load(file, [bad])


def test_the_token_learns_five_times_faster_unless_told() -> None:
    assert OptimSection(lr=1e-4).token_lr == pytest.approx(5e-4)
    assert OptimSection(lr=1e-4, peft_lr=1e-3).token_lr == 1e-3


# ------------------------------------------------------------------------------------------------ the bank


def test_the_bank_gives_each_key_its_row_and_strangers_the_mean() -> None:
    bank = TokenBank(["a", "b"], tokens=2, width=4, capacity=3)
    rows = torch.tensor([bank.row("b"), MEAN_ROW, bank.row("a")])
    tokens = bank(rows)
    assert torch.equal(tokens[0], bank.weight[1]) and torch.equal(tokens[2], bank.weight[0])
    assert torch.allclose(tokens[1], (bank.weight[0] + bank.weight[1]) / 2)
    tokens.sum().backward()
    assert torch.equal(bank.weight.grad.abs().sum((1, 2)) > 0, torch.tensor([True, True, False]))


def test_a_bank_knows_its_keys_each_once() -> None:
    bank = TokenBank(["a", "b"], tokens=1, width=4, capacity=3)
    assert bank.keys == ("a", "b")
    for act, message in (
        (lambda: bank.row("z"), "'z'"),
        (lambda: TokenBank(["a", "a"], tokens=1, width=4), "each once"),
    ):
        with pytest.raises(InputError, match=message):
            act()


def test_a_row_does_not_depend_on_the_capacity() -> None:
    small, large = (TokenBank(["a"], tokens=1, width=8, capacity=c, seed=5) for c in (1, 9))
    assert torch.equal(small.weight[0], large.weight[0])


def test_principal_directions_find_where_the_rows_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 2, generator=generator))[0].T
    coefficients = torch.randn(200, 2, generator=generator) * torch.tensor([3.0, 0.5])
    bank = (coefficients @ basis + 7).unflatten(1, (2, 6))
    directions, scales = principal_directions(bank, 5)
    assert directions.shape == (5, 12) and scales.shape == (5,)
    assert torch.allclose((directions[:2] @ basis.T).abs(), torch.eye(2), atol=0.05)
    assert torch.allclose(scales[:2], torch.tensor([3.0, 0.5]), rtol=0.15) and float(scales[2]) < 1e-5
    assert principal_directions(bank[:1], 4)[0].shape == (0, 12)


# ------------------------------------------------------------------------------------------------ optimiser


def test_the_rate_warms_up_and_falls_along_a_cosine() -> None:
    section = OptimSection(warmup_steps=4, final_lr_fraction=0.1)
    factors = [lr_factor(step, 21, section) for step in range(21)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[12] == pytest.approx(0.55) and factors[20] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(factors[4:]))


def test_tokens_norms_biases_and_embeddings_do_not_decay(tmp_path: Path, data: Path) -> None:
    made = trainer(tmp_path / "run", data, optim__peft_lr=0.5, optim__weight_decay=0.1)
    group_of = {id(p): g for g in made.optimizer.param_groups for p in g["params"]}
    decays = {name for name, p in made.trained.master.items() if group_of[id(p)]["weight_decay"] > 0}
    assert any("q_proj.weight" in name for name in decays)
    for name, parameter in made.trained.master.items():
        if any(part in name for part in ("norm", "bias", "embed", "peft_", "bank")):
            assert name not in decays, name
        assert (group_of[id(parameter)]["peak_lr"] == 0.5) == (name == "bank.weight")
    assert not has_decay("model.x.norm.dense.weight", torch.zeros(2, 2))
    fixed = {name for name, p in made.joint.named_parameters() if not p.requires_grad}
    assert "model.peft_prefix_token" in fixed  # the bank is in its place


def test_frozen_parts_stand_still_and_the_rest_moves(tmp_path: Path, data: Path) -> None:
    made = trainer(tmp_path / "run", data, steps=2, optim__warmup_steps=1, freeze=["vlm", "*alignment_expert*"])
    before = {name: p.detach().clone() for name, p in made.joint.named_parameters()}
    made.run()
    moved = {name for name, p in made.joint.named_parameters() if not torch.equal(p, before[name])}
    assert not [n for n in moved if ".paligemma." in n or "alignment_expert" in n]
    assert {"bank.weight", "model.action_in_proj.weight", "model.peft_type_action"} <= moved


def test_a_freeze_pattern_without_a_parameter_is_refused(tmp_path: Path, data: Path) -> None:
    with pytest.raises(ConfigError, match=r"'vison_tower'.*expected one of.*vision_tower"):
        trainer(tmp_path / "run", data, freeze=["vison_tower"])


def test_the_average_follows_the_weights_with_its_decay(tmp_path: Path, data: Path) -> None:
    made = trainer(tmp_path / "run", data, ema_decay=0.5)
    name, parameter = next(iter(made.trained.master.items()))
    ema, expected = Ema(made.trained, 0.5), parameter.detach().clone()
    for update, decay in ((1, 2 / 11), (2, 3 / 12), (100, 0.5)):
        with torch.no_grad():
            parameter.add_(1.0)
        ema.update(made.trained, update)
        expected = decay * expected + (1 - decay) * parameter.detach()
        assert torch.allclose(ema.values[name], expected, atol=1e-6)


# ------------------------------------------------------------------------------------------------ inputs


def test_a_sample_has_the_numbers_that_the_policy_uses(tmp_path: Path, data: Path) -> None:
    from selfalign_core.policy import Policy

    made = trainer(tmp_path / "run", data, steps=1, optim__warmup_steps=0)
    policy = Policy.from_checkpoint(made.run(), dt=0.05)
    batch = made.loader.batch(3)
    sample = made.encoder(batch, made.loader.positions(3))
    assert torch.equal(sample.inputs.state, policy.codec.state_to_model(batch.state))
    assert torch.equal(sample.actions, policy.codec.actions_to_model(batch.actions, batch.state))
    assert torch.equal(sample.executed, policy.codec.actions_to_model(batch.executed, batch.state))
    for i in np.flatnonzero(batch.prompt >= 0):
        tokens, mask = policy.codec.prompt_to_model(made.dataset.meta.prompts[batch.prompt[i]], batch.state[i])
        assert np.array_equal(sample.inputs.tokens[i], tokens) and np.array_equal(sample.inputs.token_masks[i], mask)
    play = torch.from_numpy(batch.prompt < 0)
    assert not sample.inputs.token_masks[play].any() and not sample.action_masks[play].any()
    assert torch.equal(sample.labelled, ~play)


def test_noise_belongs_to_the_sample_not_to_the_batch(tmp_path: Path, data: Path) -> None:
    made = trainer(tmp_path / "run", data)
    whole = made.encoder(made.loader.batch(5), made.loader.positions(5))
    model = made.policy_config.model
    for rank in range(2):
        half = Loader(
            made.dataset,
            batch_size=4,
            chunk=model.action_horizon,
            transition=model.transition_horizon,
            rank=rank,
            world_size=2,
            episodes=np.unique(made.dataset.episode_of[made.loader.rows]),
        )
        sample = made.encoder(half.batch(5), half.positions(5))
        rows = slice(4 * rank, 4 * rank + 4)
        assert torch.equal(sample.noise, whole.noise[rows]) and torch.equal(sample.time, whole.time[rows])
        assert torch.equal(sample.alignment_noise.next_obs, whole.alignment_noise.next_obs[rows])
    assert len(whole.time.unique()) == 8 and not torch.equal(whole.time, whole.alignment_noise.time)


def test_token_noise_is_for_training_alone(tmp_path: Path, data: Path) -> None:
    plain, noisy = trainer(tmp_path / "plain", data), trainer(tmp_path / "noisy", data, bank={"noise_std": 0.5})
    clean, sample = (t.encoder(t.loader.batch(0), t.loader.positions(0)) for t in (plain, noisy))
    assert clean.token_noise is None
    assert 0.3 < float(sample.token_noise.std()) < 0.7
    assert torch.equal(sample.noise, clean.noise)
    assert noisy.joint(sample).action.item() != plain.joint(clean).action.item()
    assert noisy.evaluate() == plain.evaluate()


def test_nan_in_the_data_is_named_by_row(tmp_path: Path, data: Path) -> None:
    made = trainer(tmp_path / "run", data)
    batch = made.loader.batch(0)
    batch.executed[2, 1, 0] = np.nan
    with pytest.raises(InputError, match=f"executed of dataset row {batch.index[2]}: found NaN"):
        made.encoder(batch, made.loader.positions(0))


@pytest.mark.parametrize("pi05", [False, True])
def test_with_training_time_rtc_given_actions_are_clean_and_not_learned(pi05: bool) -> None:
    from small_models import random_actions, random_inputs, small_model

    model = small_model(pi05)
    inputs, (actions, noise, time) = random_inputs(model.config), random_actions(model.config)
    per_action = time[:, None].repeat(1, 4)
    prefix = model.prefix(inputs)
    args = (prefix, inputs.state, actions)
    # One time for all actions, written out per action, is the plain pass.
    assert torch.allclose(model.action_loss(*args, noise, per_action), model.action_loss(*args, noise, time), atol=1e-5)
    per_action[:, :2] = 0.0
    other = noise.clone()
    other[:, :2] += 1.0  # at time 0 the noise of the given actions does not get in
    a, b = (model.action_loss(*args, n, per_action) for n in (noise, other))
    assert torch.allclose(a[:, 2:], b[:, 2:], atol=1e-6)
    out = model.sample_actions(inputs, noise, num_steps=3, committed=actions[:, :2])
    assert torch.equal(out[:, :2], actions[:, :2])
    moved = model.sample_actions(inputs, noise, num_steps=3, committed=actions[:, :2] + 1)
    assert not torch.allclose(out[:, 2:], moved[:, 2:])


def test_rtc_delays_cover_their_range_and_mask_the_given_actions(tmp_path: Path, data: Path) -> None:
    made = trainer(tmp_path / "run", data, rtc_max_delay=2)
    assert made.policy_config.rtc_max_delay == 2  # the checkpoint says what it was trained for
    seen = set()
    for step in range(6):
        batch = made.loader.batch(step)
        sample = made.encoder(batch, made.loader.positions(step))
        given = sample.time == 0
        seen |= set(given.sum(1).tolist())
        assert not (sample.action_masks & given).any()
        assert torch.equal(sample.action_masks | given, torch.from_numpy(batch.action_masks) | given)
        assert (given.int().diff(dim=1) <= 0).all()  # given actions come first
    assert seen == {0, 1, 2}
    with pytest.raises(ConfigError, match="rtc_max_delay: found 4"):
        trainer(tmp_path / "other", data, rtc_max_delay=4)


def test_cached_features_train_like_the_tower_itself(tmp_path: Path, data: Path) -> None:
    frozen = {"freeze": ["vision_tower", "projector"]}
    losses = []
    for cache in (False, True):
        made = trainer(tmp_path / f"{cache}", data, cache_features=cache, **frozen)
        sample = made.encoder(made.loader.batch(0), made.loader.positions(0))
        assert (sample.image_features is not None) == cache
        losses.append(made.joint(sample))
    for name in ("total", "action", "perception", "dynamics", "inverse_dynamics"):
        assert getattr(losses[0], name).item() == pytest.approx(getattr(losses[1], name).item(), rel=1e-2)
    files = list((tmp_path / "True" / "features").iterdir())
    assert [f.suffix for f in files] == [".npy"]
    stamp = files[0].stat().st_mtime_ns
    trainer(tmp_path / "True", data, cache_features=True, **frozen)
    assert files[0].stat().st_mtime_ns == stamp  # a second run reads it


def test_sizes_that_do_not_fit_are_named(tmp_path: Path, data: Path) -> None:
    small = {"model__changes": {"vocab_size": 8}}
    with pytest.raises(ConfigError, match=r"vocab_size: found 8, expected \d+"):
        trainer(tmp_path / "a", data, **small)
    vision = values(tmp_path, data)["model"]["changes"]["vision"] | {"image_size": 56}
    with pytest.raises(ConfigError, match=r"images of \(28, 28\), expected the model's \(56, 56\)"):
        trainer(tmp_path / "b", data, model__changes={"vision": vision})
    with pytest.raises(ConfigError, match=r"data\.tokenizer: found none.*π0\.5"):
        trainer(tmp_path / "c", data, model__changes={"pi05": True})
    assert config(tmp_path / "d", data).parallel == "ddp"


def test_the_example_configurations_are_valid() -> None:
    files = sorted((Path(__file__).parents[2] / "config/training").glob("*.yaml"))
    assert files
    for file in files:
        TrainConfig.load(file).model.build()
