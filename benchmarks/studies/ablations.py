"""What each part of training is worth: the same training without it, measured on bodies never trained on.

    python -m benchmarks.studies.ablations --config config/training/tiny_policy.yaml --output runs/ablations

Variants: the bank (reference), one token shared by all bodies, no token, without each self-supervised loss, without
play. All start from the configuration's ``model.init``, see as many frames of the same bodies and make the same steps.
Each is then measured on unseen bodies, with the bank's mean and with the entry picked by the self-supervised losses on
32 transitions of the body, and in closed loop on the nominal body and on the unseen ones. Without play the loss of
dynamics has another unit: the spread of image features over that training set.

Data, training and evaluation of each variant are kept under ``--output``: what is there is not made again, and
training that was killed goes on. On one core of a laptop the defaults take about 15 minutes per variant.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from benchmarks.harness import Cache, interval, print_table, save, say, share, share_over_bodies
from benchmarks.studies.scores import RecordedLosses
from benchmarks.studies.training import configured, trained
from selfalign_core.command_line import More, command, expect_at_least
from selfalign_core.data import sim_demos
from selfalign_core.data.dataset import TransitionDataset
from selfalign_core.model.config import ModelConfig
from selfalign_core.policy import Policy
from selfalign_core.policy.config import PolicyConfig
from selfalign_core.sim import TARGET_NAMES, BodyConfig
from selfalign_core.study.processes import in_batches, run_tasks
from selfalign_core.study.rollout import EpisodeSpec, PolicyPlanner
from selfalign_core.training.config import TrainConfig
from selfalign_core.training.trainer import LOSSES

NOMINAL = "nominal"
PARTS = LOSSES[1:]
PICK_SAMPLES = 32
SCORED_SAMPLES = 64
TRAINING_SEED, UNSEEN_SEED, EPISODE_SEED = 1, 77, 1000


@dataclass(frozen=True)
class Variant:
    """One training. ``overrides`` of the configuration; ``untrained``: the loss that has no part in it."""

    label: str
    overrides: tuple[str, ...] = ()
    play: bool = True
    token: str = "picked"
    untrained: str | None = None


VARIANTS = {
    "bank": Variant("bank (reference)"),
    "shared_token": Variant(
        "one shared token", ("bank.mode=shared", "bank.deploy=null", "bank.capacity=null"), token="one token for all"
    ),
    "no_token": Variant("no token", ("model.changes.use_peft_prefix_token=false",), token="no token"),
    "no_perception": Variant("without perception", ("model.changes.lambda_perc=0.0",), untrained="perception"),
    "no_dynamics": Variant("without dynamics", ("model.changes.lambda_dyn=0.0",), untrained="dynamics"),
    "no_inverse_dynamics": Variant(
        "without inverse dynamics", ("model.changes.lambda_inv=0.0",), untrained="inverse_dynamics"
    ),
    "no_play": Variant("without play", play=False),
}


@dataclass(frozen=True)
class Settings:
    """``bodies`` trained on with ``episodes`` of ``frames`` each, ``unseen`` ones measured on.

    ``rollouts``: closed-loop episodes per unseen body; of the nominal body, ten times as many.
    """

    config: str
    output: str
    steps: int
    bodies: int
    episodes: int
    frames: int
    unseen: int
    rollouts: int

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("steps", "bodies", "episodes", "frames", "unseen")}
        expect_at_least(2, **sizes)
        expect_at_least(0, rollouts=self.rollouts)

    @property
    def data(self) -> Path:
        return Path(self.output) / "data"

    def demos(self, *, play: bool) -> Path:
        size = f"{self.bodies}x{self.episodes}x{self.frames}"
        return self.data / (f"demos_{size}" if play else f"demos_{size}_without_play")

    @property
    def unseen_path(self) -> Path:
        return self.data / f"unseen_{self.unseen}x{self.frames}"

    def unseen_bodies(self) -> dict[str, BodyConfig]:
        bodies = sim_demos.sample_bodies(self.unseen + 1, UNSEEN_SEED, sim_demos.DemoConfig())
        return {name: body for name, body in bodies.items() if name != NOMINAL}

    def run(self, name: str) -> Path:
        return Path(self.output) / name

    def train_config(self, name: str) -> TrainConfig:
        """The configuration of variant ``name``."""
        variant = VARIANTS[name]
        data = self.demos(play=variant.play)
        return configured(self.config, self.run(name), data, variant.overrides, steps=self.steps)


def make_data(settings: Settings, *, jobs: int = 1) -> None:
    """Record what is not there yet. Both training sets have one normalisation, so that their losses compare."""
    size = _model_config(TrainConfig.load(settings.config)).image_size
    demos = sim_demos.DemoConfig(image_size=size, episodes=settings.episodes, frames=settings.frames)
    bodies = sim_demos.sample_bodies(settings.bodies, TRAINING_SEED, demos)
    without_play = dataclasses.replace(demos, play=0.0)
    unseen = dataclasses.replace(demos, episodes=4)
    settings.data.mkdir(parents=True, exist_ok=True)
    for path, chosen, seed, config in (
        (settings.demos(play=True), bodies, TRAINING_SEED, demos),
        (settings.demos(play=False), bodies, TRAINING_SEED, without_play),
        (settings.unseen_path, settings.unseen_bodies(), UNSEEN_SEED, unseen),
    ):
        if not path.is_dir():
            say(f"recording {len(chosen)} bodies: {path}")
            sim_demos.record(str(path), chosen, seed, config, jobs=jobs)
    shutil.copyfile(settings.demos(play=True) / "norm_stats.json", settings.demos(play=False) / "norm_stats.json")


def _model_config(config: TrainConfig) -> ModelConfig:
    return config.model.build() if config.model.init is None else PolicyConfig.load(config.model.init).model


def train(settings: Settings, name: str) -> Path:
    """The trained policy's directory of variant ``name``; trains what is left to train.

    Raises:
        ConfigError: what is there was trained with another configuration.
    """
    say(f"{name}: training")
    return trained(settings.train_config(name))


def evaluate(settings: Settings, name: str, path: Path) -> dict[str, Any]:
    """What variant ``name`` achieves: losses on unseen bodies per kind of token, and closed-loop success."""
    dataset = TransitionDataset(settings.unseen_path)
    policy = Policy.from_checkpoint(path, dt=dataset.meta.dt_ns / 1e9)
    scorer = RecordedLosses(policy, dataset)
    bodies = dataset.meta.embodiments
    found = {
        body: scorer.unseen(body, place, pick=PICK_SAMPLES, scored=SCORED_SAMPLES) for place, body in enumerate(bodies)
    }
    keys = ("",) if scorer.bank is None else scorer.bank.keys
    figures: dict[str, Any] = {
        "picked": {body: keys[one.row] for body, one in found.items()},
        "losses": {
            kind: {part: [getattr(one, kind)[part] for one in found.values()] for part in PARTS}
            for kind in ("mean", "picked")
        },
    }
    if settings.rollouts:
        say(f"{name}: closed loop")
        own = scorer.row(NOMINAL)
        figures["nominal"] = success(scorer, BodyConfig(), own, 10 * settings.rollouts)
        figures["unseen"] = {
            body: success(scorer, config, found[body].row, settings.rollouts)
            for body, config in settings.unseen_bodies().items()
        }
    return figures


def success(scorer: RecordedLosses, body: BodyConfig, row: int, count: int) -> list[bool]:
    """Whether each of ``count`` closed-loop episodes on ``body``, with the token of ``row``, reached its target."""
    token = None if scorer.bank is None else scorer.bank.weight[row].detach().cpu().numpy()
    episodes = [
        EpisodeSpec(body, EPISODE_SEED + index, TARGET_NAMES[index % len(TARGET_NAMES)], token=token)
        for index in range(count)
    ]
    return [result.success for result in in_batches(PolicyPlanner(scorer.policy), episodes)]


def run_variant(settings: Settings, name: str) -> dict[str, Any]:
    """Train and evaluate variant ``name``, or read what an earlier call found."""
    path = train(settings, name)
    kept, asked = Cache(settings.run(name)), dataclasses.asdict(settings)
    return kept.get("evaluation", asked, lambda: evaluate(settings, name, path))


def summary(name: str, figures: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Figures with 95 % intervals, over bodies; of the nominal body's success over episodes.

    ``action_difference``: action loss with the picked token minus the reference's, body by body.
    """
    variant = VARIANTS[name]
    losses = {kind: {part: interval(v) for part, v in parts.items()} for kind, parts in figures["losses"].items()}
    ours, theirs = (np.array(f["losses"]["picked"]["action"]) for f in (figures, reference))
    result = {
        "label": variant.label,
        "token": variant.token,
        "untrained": variant.untrained,
        "losses": losses,
        "action_difference": interval(ours - theirs),
        "picked": figures["picked"],
    }
    if "nominal" in figures:
        result["success_nominal"] = share(figures["nominal"])
        result["success_unseen"] = share_over_bodies(list(figures["unseen"].values()))
    return result


def run(
    *,
    config: Annotated[str, "training configuration of the reference"],
    output: Annotated[str, "directory for data, runs and figures (ablations.json)"],
    steps: Annotated[int, "training steps of each variant"] = 2000,
    bodies: Annotated[int, "bodies to train on"] = 96,
    episodes: Annotated[int, "recordings per body, half of them play"] = 6,
    frames: Annotated[int, "frames per recording"] = 36,
    unseen: Annotated[int, "bodies to measure on"] = 16,
    rollouts: Annotated[int, "closed-loop episodes per unseen body; 0 for none"] = 5,
    only: Annotated[tuple[str, ...], "variants besides the bank", More(choices=VARIANTS)] = tuple(VARIANTS),
    jobs: Annotated[int, "variants at a time, each on one core"] = 1,
) -> None:
    """Train and compare variants of the training."""
    settings = Settings(config, output, steps, bodies, episodes, frames, unseen, rollouts)
    names = ["bank", *(name for name in VARIANTS if name in only and name != "bank")]
    for name in names:
        settings.train_config(name)  # what is wrong with the configuration is said at once
    make_data(settings, jobs=jobs)
    measured = run_tasks(run_variant, [(settings, name) for name in names], jobs)
    found = dict(zip(names, measured, strict=True))
    results = {name: summary(name, figures, found["bank"]) for name, figures in found.items()}
    path = Path(output) / "ablations.json"
    save(path, "ablations", settings=dataclasses.asdict(settings), variants=results)
    print_table(_HEADER, [_row(result) for result in results.values()])
    print(
        f"\nLosses on {unseen} unseen bodies, mean ± half of the 95 % interval over bodies; with the token "
        f"picked by {PICK_SAMPLES} transitions except in the first column. Success of closed-loop episodes with 95 % "
        f"interval. – : not trained. Written to {path}."
    )


_HEADER = (
    "variant", "action, bank's mean", "action", "perception", "dynamics", "inverse dynamics", "nominal", "unseen",
)  # fmt: skip


def _row(result: dict[str, Any]) -> list[str]:
    def loss(kind: str, part: str) -> str:
        if part == result["untrained"]:
            return "–"
        found = result["losses"][kind][part]
        return f"{found['mean']:.3f} ± {found['high'] - found['mean']:.3f}"

    def rate(key: str) -> str:
        found = result.get(key)
        return (
            "–" if found is None else f"{found['mean']:.2f} [{max(found['low'], 0):.2f}, {min(found['high'], 1):.2f}]"
        )

    mean = loss("mean", "action") if result["token"] == "picked" else f"({result['token']})"
    parts = [loss("picked", part) for part in PARTS]
    return [result["label"], mean, *parts, rate("success_nominal"), rate("success_unseen")]


main = command("benchmarks.studies.ablations", run, interrupted="what is done is kept")

if __name__ == "__main__":
    sys.exit(main())
