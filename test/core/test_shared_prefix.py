"""Several prompts per observation share the images' prefix: the same numbers as one prompt at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import random_inputs, random_transitions, small_model

from selfalign_core.data.dataset import DatasetError, TransitionDataset
from selfalign_core.data.loader import Loader
from selfalign_core.data.sim_demos import main as sim_demos
from selfalign_core.errors import InputError
from selfalign_core.training.config import TrainConfig
from selfalign_core.training.logging import read_log
from selfalign_core.training.parallel import start_ranks
from selfalign_core.training.trainer import Trainer

BATCH, PROMPTS = 3, 2


@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
def test_losses_and_gradients_equal_those_of_one_prompt_at_a_time(pi05: bool) -> None:
    model = small_model(pi05, restrict_image_to_language=True)
    config, generator = model.config, torch.Generator().manual_seed(4)
    inputs = random_inputs(config, batch=BATCH)
    tokens = torch.randint(0, config.vocab_size, (BATCH * PROMPTS, config.max_token_len), generator=generator)
    masks = torch.ones_like(tokens, dtype=torch.bool)
    masks[1, 3:] = masks[4, 2:] = False
    inputs.image_masks[1][2] = False
    actions, noise = torch.randn(2, BATCH * PROMPTS, config.action_horizon, config.action_dim, generator=generator)
    time = torch.rand(BATCH * PROMPTS, generator=generator)
    action_masks = torch.rand(BATCH * PROMPTS, config.action_horizon, generator=generator) < 0.8
    token = torch.randn(BATCH, config.peft_num_tokens, config.action_expert.width, generator=generator)
    transitions, alignment_noise = random_transitions(config, batch=BATCH)
    features = [f[:BATCH] for f in model.embed_images(inputs.images)]

    def losses(rows: slice | torch.Tensor) -> torch.Tensor:
        found = model(
            replace(inputs, tokens=tokens[rows], token_masks=masks[rows]),
            actions[rows],
            noise=noise[rows],
            time=time[rows],
            action_masks=action_masks[rows],
            executed=transitions.actions,
            next_image_features=features,
            alignment_noise=alignment_noise,
            token=token,
            reduction="none",
        )
        return torch.stack(list(vars(found).values()))

    together = losses(slice(None))
    apart = torch.stack([losses(torch.arange(p, BATCH * PROMPTS, PROMPTS)) for p in range(PROMPTS)]).mean(0)
    assert together.shape == (5, BATCH)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(
        torch.autograd.grad(together.sum(), parameters, allow_unused=True),
        torch.autograd.grad(apart.sum(), parameters, allow_unused=True),
        strict=True,
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_prefix_that_cannot_be_shared_is_refused() -> None:
    model = small_model()
    inputs = random_inputs(model.config, batch=2)
    inputs = replace(inputs, tokens=inputs.tokens.repeat(2, 1), token_masks=inputs.token_masks.repeat(2, 1))
    chunk = torch.zeros(4, model.config.action_horizon, model.config.action_dim)
    with pytest.raises(InputError, match=r"found 2 prompts per observation.*restrict_image_to_language"):
        model(inputs, chunk, noise=chunk, time=torch.zeros(4))


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "demos"
    assert sim_demos(["--output", str(path), "--bodies", "2", "--episodes", "2", "--frames", "24"]) == 0
    return path


def test_a_batch_of_all_prompts_has_every_label_of_its_frames(demos: Path) -> None:
    dataset = TransitionDataset(demos)
    loader = Loader(dataset, batch_size=5, chunk=16, transition=8, prompts="all")
    batch, one = loader.batch(3), Loader(dataset, batch_size=5, chunk=16, transition=8).batch(3)
    np.testing.assert_array_equal(batch.index, one.index)
    np.testing.assert_array_equal(batch.actions.reshape(5, 3, 16, 3), dataset.expert_chunks[batch.index])
    assert batch.prompt.tolist() == [0, 1, 2] * 5 and batch.action_masks.all() and len(batch) == 5


def test_a_dataset_without_labels_for_every_prompt_is_refused(demos: Path, tmp_path: Path) -> None:
    dataset = TransitionDataset(demos)
    dataset.expert_chunks = None
    with pytest.raises(DatasetError, match="found no expert chunks"):
        Loader(dataset, batch_size=5, chunk=16, transition=8, prompts="all")


def test_training_on_all_prompts_runs_and_accumulates(demos: Path, tmp_path: Path) -> None:
    def first_losses(name: str, accumulation: int) -> dict[str, float]:
        config = TrainConfig.from_dict(
            {
                "output": str(tmp_path / name),
                "data": {"path": str(demos), "prompts": "all", "holdout": 0.0},
                "steps": 1,
                "batch_size": 8,
                "accumulation": accumulation,
                "optim": {"warmup_steps": 0},
                "log": {"every": 1, "gap_every": None, "eval_every": None, "progress": False, "tensorboard": False},
            }
        )
        with start_ranks("cpu") as ranks:
            Trainer(config, ranks).run()
        return {k: v for k, v in read_log(tmp_path / name / "log.jsonl", "train")[0].items() if k.startswith("loss")}

    whole, halves = first_losses("whole", 1), first_losses("halves", 2)
    assert whole == pytest.approx(halves, rel=1e-4) and whole["loss_action"] > 0
