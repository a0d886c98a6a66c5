"""Losses of a training run on recordings and bodies it has not seen, before training and along it.

    python -m benchmarks.studies.held_out runs/tiny_policy/joint --bodies runs/tiny_policy/unseen --json held_out.json

(a) Held-out episodes of the training bodies, each with its body's own token: those the run held out, or ``--bags``.
(b) Bodies never trained on, with the token that a robot would pick: the entry of the bank with the lowest weighted
self-supervised loss on one half of the body's episodes; losses are those of the other half. The bank's mean stands
beside it for comparison. Bodies come from ``--bodies`` (those trained on are passed over), or are those the run held
out. Samples, noise and times are the same at every checkpoint. Standard errors are over episodes, or over bodies.
The targets of dynamics are features of the run's own vision tower: with a tower that is trained, not frozen, they
change along the run, and so does what the loss of dynamics means.

Exit status: 0 if every loss falls from the start of training to the last checkpoint, by more than two standard
errors, on (a) and on (b); 1 if not; 2 on bad arguments.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from benchmarks.harness import interval, print_table, save
from benchmarks.studies.scores import RecordedLosses, draw
from selfalign_core.command_line import File, command
from selfalign_core.data.dataset import TransitionDataset
from selfalign_core.errors import CheckpointError, ConfigError
from selfalign_core.policy import Policy
from selfalign_core.training.config import TrainConfig
from selfalign_core.training.parallel import Ranks
from selfalign_core.training.state import list_checkpoints, read_info
from selfalign_core.training.trainer import LOSSES, Trainer

OWN, IDENTIFIED, MEAN = (
    "held-out episodes, own token",
    "unseen bodies, token picked",
    "unseen bodies, bank's mean",
)
JUDGED = (OWN, IDENTIFIED)
SIGMAS = 2.0
SAMPLES = 64
"""Per episode, or per half of a body's episodes."""


@dataclass(frozen=True)
class HeldOut:
    """Episodes (number and body) of bodies that were trained on, or unknown ``bodies``, of one dataset."""

    dataset: TransitionDataset
    episodes: Sequence[tuple[int, str]] = ()
    bodies: Sequence[str] = ()

    def score(self, policy: Policy) -> dict[str, list[dict[str, float]]]:
        """Section → losses of each episode or body."""
        losses, model = RecordedLosses(policy, self.dataset), policy.config.model
        if self.episodes:
            draws = [(draw(self.dataset, model, [e], SAMPLES, seed=0, place=e), body) for e, body in self.episodes]
            return {OWN: [losses.losses(drawn, losses.row(body)) for drawn, body in draws]}
        found = [losses.unseen(body, place, pick=SAMPLES, scored=SAMPLES) for place, body in enumerate(self.bodies)]
        return {IDENTIFIED: [one.picked for one in found], MEAN: [one.mean for one in found]}


def held_out(config: TrainConfig, bags: str | None, bodies: str | None) -> list[HeldOut]:
    """What a run has not seen: (a), then (b), where there are any.

    Raises:
        ConfigError: there is nothing, or a dataset given has none of what it is to hold.
    """
    data = TransitionDataset(config.data.path)
    trained, held = data.split(config.data.holdout, by=config.data.holdout_by, seed=config.seed)
    known = {data.meta.embodiments[i] for i in data.embodiment_of[trained]}
    sets = []
    for option, path, inside in (("bags", bags, True), ("bodies", bodies, False)):
        dataset = data if path is None else TransitionDataset(path)
        episodes = held if path is None else np.arange(len(dataset.meta.episodes))
        names = [dataset.meta.embodiments[i] for i in dataset.embodiment_of[episodes]]
        chosen = [(int(e), name) for e, name in zip(episodes, names, strict=True) if (name in known) == inside]
        if chosen:
            unknown = () if inside else list(dict.fromkeys(name for _, name in chosen))
            sets.append(HeldOut(dataset, chosen if inside else (), unknown))
        elif path is not None:
            kind = "trained on" if inside else "not trained on"
            raise ConfigError(f"--{option} {path}: found bodies {sorted(set(names))[:5]}, expected some {kind}")
    if not sets:
        raise ConfigError(f"{config.data.path}: found nothing held out (data.holdout), expected --bags or --bodies")
    return sets


def policies(run: Path, config: TrainConfig, scratch: Path) -> dict[str, tuple[int, Path]]:
    """Step and policy directory of the start, of the first checkpoint kept and of the last.

    The start is made anew from the configuration.
    """
    kept = list_checkpoints(run / "checkpoints")
    if not kept:
        raise CheckpointError(f"{run}: found no checkpoint, expected a run of selfalign_core.train")
    quiet = replace(config.log, progress=False, tensorboard=False)
    start = replace(config, output=str(scratch), device="cpu", cache_features=False, log=quiet)
    path = Trainer(start, Ranks(0, 1, torch.device("cpu"), False)).save()
    return {
        "start": (0, path / "policy"),
        "first": (read_info(kept[0])["step"], kept[0] / "policy"),
        "last": (read_info(kept[-1])["step"], kept[-1] / "policy"),
    }


def summary(scores: dict[str, dict[str, list[dict[str, float]]]]) -> dict[str, dict[str, Any]]:
    """``scores`` (checkpoint → section → losses per unit) as section → loss → means, change and whether it falls."""
    sections: dict[str, dict[str, Any]] = {}
    for section in scores["last"]:
        sections[section] = {"units": len(scores["last"][section])}
        for name in LOSSES:
            values = {at: np.array([unit[name] for unit in scores[at][section]]) for at in scores}
            figures = {at: _figures(found) for at, found in values.items()}
            change = _figures(values["last"] - values["start"])
            stderr = 0.0 if np.isnan(change["stderr"]) else change["stderr"]
            falls = change["mean"] + SIGMAS * stderr < 0
            sections[section][name] = {**figures, "change": change, "falls": bool(falls)}
    return sections


def _figures(values: np.ndarray) -> dict[str, float]:
    found = interval(values)
    return {name: found[name] for name in ("mean", "stderr")}


def measure(run: str | Path, *, bags: str | None = None, bodies: str | None = None) -> dict[str, Any]:
    """The figures of a run directory; see the module docstring."""
    run = Path(run)
    config = TrainConfig.load(run / "config.yaml")
    if config.losses != "all":
        raise ConfigError(f"{run}: found losses: {config.losses}, expected a run with all losses")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        found = policies(run, config, Path(scratch))
        dt = TransitionDataset(config.data.path).meta.dt_ns / 1e9
        scores: dict[str, dict[str, list[dict[str, float]]]] = {}
        sets: list[HeldOut] = []
        for at, (_, path) in found.items():
            policy = Policy.from_checkpoint(path, dt=dt, device=device)
            sets = sets or held_out(config, bags, bodies)
            scores[at] = {}
            for held in sets:
                scores[at] |= held.score(policy)
    sections = summary(scores)
    met = all(sections[section][name]["falls"] for section in sections if section in JUDGED for name in LOSSES)
    steps = {at: step for at, (step, _) in found.items()}
    return {"run": str(run), "steps": steps, "sections": sections, "met": met}


def report(
    run: Annotated[str, "directory of a training run"],
    *,
    bags: Annotated[str | None, "dataset of bodies trained on, in place of the run's held-out episodes"] = None,
    bodies: Annotated[str | None, "dataset with bodies not trained on, in place of those the run held out"] = None,
    json: File = None,
) -> int:
    """Losses of a training run on held-out episodes and on bodies never trained on."""
    figures = measure(run, bags=bags, bodies=bodies)
    save(json, "held_out", **figures)
    steps = figures["steps"]
    for section, parts in figures["sections"].items():
        print(f"\n{section} ({parts['units']})\n")
        print_table(
            ["loss", "before", f"step {steps['first']}", f"step {steps['last']}", "change", "falls"],
            [_row(name, parts[name]) for name in LOSSES],
        )
    print(f"\nevery loss falls: {'yes' if figures['met'] else 'NO'}")
    return 0 if figures["met"] else 1


def _row(name: str, part: dict[str, Any]) -> list[str]:
    cells = [f"{part[at]['mean']:.3f} ± {part[at]['stderr']:.3f}" for at in ("start", "first", "last")]
    change = f"{part['change']['mean']:+.3f} ± {part['change']['stderr']:.3f}"
    return [name.replace("_", " "), *cells, change, "yes" if part["falls"] else "no"]


main = command("benchmarks.studies.held_out", report)

if __name__ == "__main__":
    sys.exit(main())
