"""Time and memory of a training step with the alignment expert against action-only training, in one run.

    python -m benchmarks.speed.train_step --json step.json
    python -m benchmarks.speed.train_step --preset pi0 --device cuda --batch-size 8 --json step.json

Steps of both kinds alternate on one model and one optimiser, over random data that is in memory beforehand, so what
else the machine does meets both. With action-only training, the alignment expert is not run, gets no gradient and is
left out of what rests in memory. At the tiny size with a vision tower that is trained, with one that is frozen, its
features cached, and as the shipped policy is trained. At full size the layers are recomputed in the backward pass and
the model is bfloat16.

Beside it, how long a step with all losses waits for its batch when the loader reads the dataset ahead, as in training.
The dataset is small and in memory; for another one: ``python -m selfalign_core.data.loader DATASET --step-ms MS``.

Exit status: 0 if the limits are kept, 1 if not, 2 on bad arguments.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import (
    MIB,
    Device,
    peak_bytes,
    print_table,
    quartiles_of_ratio,
    save,
    synchronise,
    take_turns,
)
from selfalign_core.command_line import File, command, expect_at_least
from selfalign_core.data.dataset_writer import DatasetWriter
from selfalign_core.model.config import ModelConfig
from selfalign_core.model.torch_state import check_device
from selfalign_core.training.config import TrainConfig
from selfalign_core.training.features import cache_features
from selfalign_core.training.joint import unreached_parameters
from selfalign_core.training.parallel import Ranks
from selfalign_core.training.samples import Encoder
from selfalign_core.training.trainer import Trainer

TIME_LIMIT = 1.6
MEMORY_LIMIT = 1.4
"""Of a step with the alignment expert, relative to one without."""

KINDS = ("action", "all")
PREFETCH = 4  # batches, as in training
JOINTS = 7


@dataclass(frozen=True)
class Setting:
    """What is measured.

    ``cached``: the vision tower is frozen and its features are read from a file. ``full_size``: three cameras, bfloat16
    with float32 master weights, layers recomputed in the backward pass. ``limited``: the limits are for the preset as
    it is; a setting with more target tokens is shown beside it.
    """

    name: str
    preset: str
    device: str
    batch_size: int
    cached: bool = False
    feature_tokens: int = 4
    full_size: bool = False
    limited: bool = True

    @property
    def changes(self) -> dict[str, Any]:
        """What differs from the preset; the joint pass serves all three experts."""
        return {"restrict_image_to_language": True, "feature_tokens_per_camera": self.feature_tokens}

    def config(self, directory: Path) -> TrainConfig:
        return TrainConfig.from_dict(
            {
                "output": str(directory / "run"),
                "data": {"path": str(directory / "data"), "holdout": 0.0},
                "steps": 1_000_000,
                "batch_size": self.batch_size,
                "device": self.device,
                "precision": "bfloat16" if self.full_size else "float32",
                "checkpoint_layers": self.full_size,
                "ema_decay": None,
                "freeze": ["vision_tower", "projector"] if self.cached else [],
                "cache_features": self.cached,
                "model": {"preset": self.preset, "changes": self.changes},
                "log": {"progress": False, "tensorboard": False},
            }
        )


def settings(preset: str, device: str, batch_size: int | None) -> list[Setting]:
    """What is measured of ``preset``."""
    if preset != "tiny":
        return [Setting(f"{preset}, all trained", preset, device, batch_size or 8, full_size=True)]
    batch_size = batch_size or 64
    return [
        Setting("tiny, all trained", preset, device, batch_size),
        Setting("tiny, vision frozen and cached", preset, device, batch_size, cached=True),
        Setting(
            "tiny_policy.yaml (cached, 16 targets)", preset, device, batch_size, True, feature_tokens=16, limited=False
        ),
    ]


class Bench:
    """A trainer whose next step is of either kind."""

    def __init__(self, setting: Setting, directory: Path):
        self.device = torch.device(setting.device)
        model = ModelConfig.preset(setting.preset, **setting.changes)
        write_random_dataset(directory / "data", model, cameras=3 if setting.full_size else 1)
        trainer = self.trainer = Trainer(setting.config(directory), Ranks(0, 1, self.device, False))
        self._batch = trainer.loader.batch(0)
        features = None
        if setting.cached:  # computed already
            features = cache_features(
                trainer.output / "features", trainer.joint.model, trainer.dataset, device=self.device
            )
        action = Encoder(
            trainer.codec,
            trainer.dataset,
            row_of=[0] * len(trainer.dataset.meta.embodiments),
            seed=0,
            alignment=False,
            features=features,
        )
        self._encoders = {"action": action, "all": trainer.encoder}
        self._cached = setting.cached

    def step(self, kind: str) -> None:
        """One training step, finished when this returns."""
        self.trainer.encoder = self._encoders[kind]
        self.trainer.train_step(self._batch)
        synchronise(self.device)

    def waits(self, steps: int) -> dict[str, float]:
        """Mean and longest seconds that ``steps`` steps wait for their batch, after those that were read ahead."""
        trainer = self.trainer
        trainer.encoder = self._encoders["all"]
        waited = []
        with closing(trainer.loader.batches(prefetch=PREFETCH)) as batches:
            for _ in range(PREFETCH + steps):
                begin = time.perf_counter()
                batch = next(batches)
                waited.append(time.perf_counter() - begin)
                trainer.train_step(batch)
        return {"wait_s": statistics.mean(waited[PREFETCH:]), "longest_wait_s": max(waited[PREFETCH:])}

    def step_bytes(self, kind: str) -> int:
        """Peak of what a step holds beyond what rests between steps: activations, gradients, temporaries."""
        return peak_bytes(lambda: self.step(kind), self.device)

    def resting_bytes(self, kind: str) -> int:
        """Weights, master weights and the optimiser's moments; without the alignment expert's for ``action``."""
        trainer = self.trainer
        apart = self._alignment_only() if kind == "action" else set()
        tensors = {id(t): t for name, t in self._named_tensors() if name not in apart}
        for name, master in trainer.trained.master.items():
            if name not in apart:
                kept = [master, *(v for v in trainer.optimizer.state[master].values() if isinstance(v, Tensor))]
                tensors |= {id(t): t for t in kept}
        return sum(tensor.nbytes for tensor in tensors.values())

    def _named_tensors(self) -> list[tuple[str, Tensor]]:
        return [*self.trainer.joint.named_parameters(), *self.trainer.joint.named_buffers()]

    def _alignment_only(self) -> set[str]:
        """Names of the parameters that action-only training has no use for."""
        trainer = self.trainer
        cameras = len(trainer.dataset.meta.cameras)
        unreached = {
            alignment: unreached_parameters(
                trainer.policy_config.model, alignment=alignment, cached=self._cached, cameras=cameras
            )
            for alignment in (False, True)
        }
        return {f"model.{name}" for name in unreached[False] - unreached[True]}


def write_random_dataset(path: Path, model: ModelConfig, *, cameras: int) -> None:
    """Noise in the shape of recordings, of four bodies."""
    rng = np.random.default_rng(0)
    length = model.action_horizon + 32
    with DatasetWriter(
        path,
        cameras=[f"camera_{i}" for i in range(cameras)],
        image_size=model.image_size,
        state_dim=JOINTS,
        action_dim=JOINTS,
        dt_ns=50_000_000,
        prompts=["reach the red cube"],
    ) as writer:
        for body in range(4):
            writer.add_episode(
                states=rng.normal(size=(length, JOINTS)).astype(np.float32),
                actions=rng.normal(size=(length, JOINTS)).astype(np.float32),
                stamps=np.arange(length, dtype=np.int64) * 50_000_000,
                embodiment=f"body {body}",
                prompt="reach the red cube",
                images=rng.integers(0, 256, (length, cameras, *model.image_size, 3), dtype=np.uint8),
            )


def measure(setting: Setting, *, steps: int) -> dict[str, Any]:
    """Figures of one setting: per kind, and the ratios of ``all`` to ``action``."""
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(setting, Path(directory))
        calls = {kind: partial(bench.step, kind) for kind in KINDS}
        times = {kind: ms / 1e3 for kind, ms in take_turns(calls, repeats=steps, warm_up=2).items()}
        figures: dict[str, Any] = {"setting": asdict(setting), "steps": steps, "loader": bench.waits(steps)}
        for kind in KINDS:
            step, resting = bench.step_bytes(kind), bench.resting_bytes(kind)
            figures[kind] = {
                "step_s": float(np.median(times[kind])),
                "step_mib": step / MIB,
                "resting_mib": resting / MIB,
                "memory_mib": (step + resting) / MIB,
            }
    ratios = {key: figures["all"][key] / figures["action"][key] for key in ("step_s", "step_mib", "memory_mib")}
    quartiles = quartiles_of_ratio(times["all"], times["action"])
    met = ratios["step_s"] <= TIME_LIMIT and ratios["memory_mib"] <= MEMORY_LIMIT
    return {**figures, "ratio": ratios, "time_ratio_quartiles": quartiles, "met": met}


def run(
    *,
    preset: Literal["tiny", "pi0"] = "tiny",
    device: Device = "cpu",
    batch_size: Annotated[int | None, "samples per step; 64 for tiny, else 8"] = None,
    steps: Annotated[int, "timed steps of each kind"] = 40,
    json: File = None,
) -> int:
    """Time and memory of a training step with the alignment expert against action-only training."""
    check_device(device)
    expect_at_least(1, steps=steps, batch_size=batch_size)
    results = [measure(setting, steps=steps) for setting in settings(preset, device, batch_size)]
    met = all(result["met"] for result in results if result["setting"]["limited"])
    save(json, "train_step", limits={"time": TIME_LIMIT, "memory": MEMORY_LIMIT}, met=met, results=results)
    print_table(
        ["training step", "action only", "all losses", "time", "memory", "of it the step's own", "kept", "data wait"],
        [_row(result) for result in results],
    )
    print(f"limits: {TIME_LIMIT} × the time, {MEMORY_LIMIT} × the memory: {'kept' if met else 'NOT kept'}")
    return 0 if met else 1


def _row(result: dict[str, Any]) -> list[str]:
    kinds = [f"{1e3 * result[k]['step_s']:.0f} ms, {result[k]['memory_mib']:.0f} MiB" for k in KINDS]
    ratios = [f"{result['ratio'][key]:.2f} ×" for key in ("step_s", "memory_mib", "step_mib")]
    kept = ("yes" if result["met"] else "NO") if result["setting"]["limited"] else "no limit"
    return [result["setting"]["name"], *kinds, *ratios, kept, f"{1e3 * result['loader']['wait_s']:.2f} ms"]


main = command("benchmarks.speed.train_step", run)

if __name__ == "__main__":
    sys.exit(main())
