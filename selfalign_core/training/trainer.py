"""The training loop: one joint pass of the three experts per step, over every body with its own token.

``L_total = L_action + λ_p·L_perc + λ_d·L_dyn + λ_i·L_inv``. A step is a function of the configuration, its number and
the state before it, so a run that was killed and resumed repeats an uninterrupted one. Knows neither ROS nor robots.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from selfalign_core.data.dataset import TransitionDataset
from selfalign_core.data.loader import Batch, Loader
from selfalign_core.errors import CheckpointError, ConfigError, SelfAlignError
from selfalign_core.files import write_text
from selfalign_core.model.gemma import GemmaStack
from selfalign_core.model.pi0 import Losses, Pi0
from selfalign_core.policy import Policy
from selfalign_core.policy.bank import MEAN_ROW, TokenBank, bank_mean, bank_spread
from selfalign_core.training import lora
from selfalign_core.training.config import TrainConfig
from selfalign_core.training.features import cache_features, measure_feature_scale
from selfalign_core.training.joint import JointModel, Sample, unreached_parameters
from selfalign_core.training.logging import LOG_NAME, RunLog
from selfalign_core.training.optim import (
    TOKEN_PARAMETERS,
    Ema,
    Trained,
    clip_gradients,
    freeze,
    full,
    lr_factor,
    make_optimizer,
    set_lr,
)
from selfalign_core.training.parallel import Ranks, accumulating, copy_into, lost_rank, parallelise, peak_memory
from selfalign_core.training.samples import Encoder, check_fits
from selfalign_core.training.start import Start
from selfalign_core.training.state import (
    checkpoint_to_resume,
    point_to,
    read_info,
    read_tensors,
    set_aside_later,
    write_checkpoint,
)

LOSSES = ("total", "action", "perception", "dynamics", "inverse_dynamics")
GAP_SIGMAS = 2.0
"""A gap counts if it exceeds this many standard errors."""


class TrainingError(SelfAlignError):
    """Training cannot go on: a loss or gradient is not finite. The weights are those of the step before."""


@dataclass(frozen=True)
class Gap:
    """Loss with another body's token minus loss with the own one, on the same samples and noise."""

    own: float
    other: float
    stderr: float

    @property
    def mean(self) -> float:
        return self.other - self.own

    @property
    def shown(self) -> bool:
        """True if the token matters to this loss beyond chance."""
        return self.mean > GAP_SIGMAS * self.stderr


class Trainer:
    """A run of ``config`` on this process's share of the ranks; see :meth:`run`.

    Args:
        resume: go on from the newest checkpoint of ``config.output``, or of the directory given; from the start if
            ``config.output`` has none yet. All ranks go on from the one that the first rank finds. What
            ``config.output`` has of later steps is set aside when training begins.

    Raises:
        ConfigError, CheckpointError, DatasetError: before anything is trained or written.
        RankError: another rank raised one of these, or does not see the checkpoint.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks, *, resume: bool | str | Path = False):
        self.config, self.ranks = config, ranks
        self.output = Path(config.output)
        self._checkpoint = checkpoint_to_resume(self.output, resume, ranks)
        share = ranks.world_size * config.accumulation
        if config.batch_size % share:
            raise ConfigError(
                f"batch_size: found {config.batch_size}, expected a multiple of {ranks.world_size} rank(s) × "
                f"accumulation={config.accumulation}"
            )
        self.dataset = TransitionDataset(config.data.path)
        train, held = self.dataset.split(config.data.holdout, by=config.data.holdout_by, seed=config.seed)
        start = Start.of(config, self.dataset)
        model, self.codec, self.policy_config = start.model, start.codec, start.codec.config
        self._kept = None if config.bank.tokens is None else start  # has the bank that the policy is written with
        self.alignment = config.losses == "all" and model.config.alignment_expert is not None
        check_fits(self.policy_config, self.dataset)
        bank = start.new_bank(config, self.dataset, train)
        dims = torch.arange(model.config.action_dim) < self.policy_config.action_dim
        self.joint = JointModel(model.train(), bank, dims).to(ranks.device)
        self._freeze()
        features = self._features()
        self.loader = self._loader(train, config.seed, config.batch_size)
        if self.alignment and not model.next_obs_mean.any():
            measure_feature_scale(model, self.loader, features, device=ranks.device)
        self._gap_loader = self._loader(train, config.seed + 1, config.log.gap_samples)
        self._eval_loader = self._loader(held, config.seed + 2, config.log.eval_samples) if len(held) else None
        self.encoder = Encoder(
            self.codec,
            self.dataset,
            row_of=self._row_of(bank),
            seed=config.seed,
            alignment=self.alignment,
            rtc_max_delay=config.rtc_max_delay,
            features=features,
            token_noise=config.bank.noise_std if bank is not None else 0.0,
        )
        self._compose()
        self.step = 0
        checkpoint = self._checkpoint
        if checkpoint is not None:
            self.ranks.gather(lambda: self._restore(checkpoint))

    # ---------------------------------------------------------------- setting up

    def _row_of(self, bank: TokenBank | None) -> list[int]:
        names = self.dataset.meta.embodiments
        if bank is None or self.config.bank.mode == "shared":
            return [0] * len(names)
        return [bank.row(name) if name in bank.keys else MEAN_ROW for name in names]

    def _freeze(self) -> None:
        config, model = self.config, self.joint.model
        freeze(self.joint, config.freeze if self._kept is None else (*config.freeze, *TOKEN_PARAMETERS))
        unreached = unreached_parameters(
            model.config, alignment=self.alignment, cached=config.cache_features, cameras=len(self.dataset.meta.cameras)
        )
        for name, parameter in model.named_parameters():
            if name in unreached:
                parameter.requires_grad_(False)
        if config.lora is not None:
            lora.inject(model, config.lora, unreached=unreached, seed=config.seed)
        for module in model.modules():
            if isinstance(module, GemmaStack):
                module.checkpoint_layers = config.checkpoint_layers

    def _features(self) -> np.ndarray | None:
        if not self.config.cache_features:
            return None
        hidden = not (self.ranks.first and self.config.log.progress)
        with tqdm(desc="image features", unit="frame", disable=hidden, leave=False, mininterval=1.0) as bar:

            def report(done: int, count: int) -> None:
                bar.total = count
                bar.update(done - bar.n)

            return cache_features(
                self.output / "features",
                self.joint.model,
                self.dataset,
                device=self.ranks.device,
                rank=self.ranks.rank,
                world_size=self.ranks.world_size,
                gather=self.ranks.gather,
                report=report,
            )

    def _loader(self, episodes: np.ndarray, seed: int, samples: int) -> Loader:
        """Batches of at most ``samples`` over all ranks, no larger than a training pass."""
        model, ranks = self.policy_config.model, self.ranks
        return Loader(
            self.dataset,
            batch_size=max(1, min(samples, self.config.batch_size) // ranks.world_size),
            chunk=model.action_horizon,
            transition=model.transition_horizon,
            seed=seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
            episodes=episodes,
            with_images=not self.config.cache_features,
        )

    def _compose(self) -> None:
        """Precision, parallel wrapper, masters, optimiser and average, in this order."""
        config = self.config
        originals = None
        sharded = self.ranks.distributed and config.parallel == "fsdp"
        if config.precision == "bfloat16" and not sharded:
            originals = {n: p.detach().float().clone() for n, p in self.joint.named_parameters() if p.requires_grad}
            self.joint.model.to_precision("bfloat16")
        persistent = self.joint.state_dict().keys()
        self.buffers = {name: b for name, b in self.joint.named_buffers() if name in persistent}
        self.module = parallelise(self.joint, self.ranks, config.parallel, config.precision)
        self.trained = Trained.of(self.joint, originals)
        # Kept from now on: between passes FSDP may leave gathered copies in the modules' places.
        self.parameters = {**dict(self.joint.named_parameters()), **self.trained.master}
        self.optimizer = make_optimizer(self.trained, config.optim)
        for parameter in self.trained.master.values():  # from the start, so that a checkpoint has them at any step
            self.optimizer.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self.ema = None if config.ema_decay is None else Ema(self.trained, config.ema_decay)

    # ---------------------------------------------------------------- the loop

    def run(self) -> Path:
        """Train to the last step; returns the last checkpoint's policy directory.

        Raises:
            TrainingError: a loss or gradient is not finite. CheckpointError: a checkpoint could not be written.
            RankError: another rank died.
        """
        config = self.config
        batches = self.loader.batches(self.step)
        log = self._open_log() if self.ranks.first else None
        self._clock, self._clock_step, self._waited = time.perf_counter(), self.step, 0.0
        checkpoint = self._checkpoint
        try:
            while self.step < config.steps:
                asked = time.perf_counter()
                batch = next(batches)
                self._waited += time.perf_counter() - asked
                figures = self.train_step(batch)
                self.step += 1
                shown = self._report(log, figures)
                if self._due(config.log.gap_every):
                    self._report_gap(log)
                if self._due(config.log.eval_every):
                    self._report_eval(log)
                if self._due(config.checkpoint.every) or self.step == config.steps:
                    checkpoint = self.save()
                if log is not None:
                    log.advance(shown)
        finally:
            batches.close()
            if log is not None:
                log.close()
        assert checkpoint is not None  # of the last step, now or before
        return checkpoint / "policy"

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _open_log(self) -> RunLog:
        self.output.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(self.config.to_dict(), sort_keys=False, allow_unicode=True)
        write_text(self.output / "config.yaml", text)
        aside = set_aside_later(self.output / "checkpoints", self.step, self.output / LOG_NAME)
        if aside is not None:
            assert self._checkpoint is not None  # without one there was none to set aside
            point_to(self.output / "policy", self._checkpoint / "policy")
        options = self.config.log
        log = RunLog(
            self.output,
            steps=self.config.steps,
            start=self.step,
            tensorboard=options.tensorboard,
            progress=options.progress,
        )
        if self.step == 0:
            log.note(0, self.describe())
        if aside is not None:
            log.note(
                self.step,
                f"taken back to {self._checkpoint}: the later checkpoints and the log so far are now in {aside} "
                f"(to go on from those after all: --resume {aside} output=NEW_DIRECTORY)",
            )
        return log

    def describe(self) -> str:
        """What is trained on what, in a line."""
        count = sum(p.numel() for p in self.joint.model.parameters())
        trained = sum(p.numel() for p in self.trained.forward.values())
        keys = 0 if self.joint.bank is None else len(self.joint.bank.keys)
        return (
            f"{count / 1e6:.2f} M parameters, {trained / 1e6:.2f} M of them trained; {self.loader.num_samples} samples "
            f"({self.loader.steps_per_epoch:.1f} steps per epoch), {keys} token(s); {self.ranks.world_size} rank(s) on "
            f"{self.ranks.device.type}"
        )

    def train_step(self, batch: Batch) -> dict[str, Any]:
        """One optimiser step (:meth:`run` counts them); returns what it measured, as tensors of this rank."""
        config = self.config
        torch.manual_seed(_mix(config.seed, self.step, self.ranks.rank))
        rates = set_lr(self.optimizer, lr_factor(self.step, config.steps, config.optim))
        sample = self.encoder(batch, self.loader.positions(self.step)).to(self.ranks.device)
        losses = torch.zeros(len(LOSSES), device=self.ranks.device)
        parts = sample.split(config.accumulation)
        with lost_rank(self.ranks):
            for i, part in enumerate(parts):
                with accumulating(self.module, last=i == len(parts) - 1):
                    found: Losses = self.module(part)
                    (found.total / len(parts)).backward()
                losses += torch.stack([getattr(found, name).detach() for name in LOSSES]) / len(parts)
            self.trained.collect()
            grad_norm = clip_gradients(self.trained.named(tokens=False).values(), config.optim.grad_clip)
            e_grad_norm = clip_gradients(self.trained.named(tokens=True).values(), config.optim.bank_grad_clip)
        if not math.isfinite(float(grad_norm + e_grad_norm)):
            parts_text = ", ".join(f"{n} {float(v):.4g}" for n, v in zip(LOSSES, losses, strict=True))
            raise TrainingError(
                f"step {self.step + 1}: found gradient norm {float(grad_norm):.4g} (token: {float(e_grad_norm):.4g}) "
                f"with losses {parts_text} on rank {self.ranks.rank}, expected finite numbers; a lower optim.lr or "
                "float32 may help"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.trained.publish()
        if self.ema is not None:
            self.ema.update(self.trained, self.step + 1)
        labelled = sample.labelled.float().mean()
        return {
            "losses": torch.cat([losses, labelled[None]]),
            "grad_norm": grad_norm,
            "e_grad_norm": e_grad_norm,
            "rates": rates,
        }

    # ---------------------------------------------------------------- what is logged

    def _report(self, log: RunLog | None, figures: dict[str, Any]) -> dict[str, str] | None:
        if not (self._due(self.config.log.every) or self.step == self.config.steps):
            return None
        *losses, labelled = self.ranks.mean(figures["losses"]).tolist()
        values: dict[str, Any] = {f"loss_{name}": value for name, value in zip(LOSSES, losses, strict=True)}
        values |= {"labelled": labelled, "grad_norm": float(figures["grad_norm"])}
        if self.joint.bank is not None:
            used = full(self.parameters["bank.weight"].detach())[: len(self.joint.bank.keys)]
            values |= {
                "e_norm": float(used.flatten(1).norm(dim=1).mean()),
                "e_spread": bank_spread(used),
                "e_grad_norm": float(figures["e_grad_norm"]),
            }
        now = time.perf_counter()
        values |= {f"lr_{name}": rate for name, rate in figures["rates"].items()}
        values |= {
            "samples_per_s": (self.step - self._clock_step) * self.config.batch_size / (now - self._clock),
            "step_s": (now - self._clock) / (self.step - self._clock_step),
            "wait_s": self._waited / (self.step - self._clock_step),  # of a step, for data
            **peak_memory(self.ranks.device),
        }
        self._clock, self._clock_step, self._waited = now, self.step, 0.0
        if log is None:
            return None
        log.write("train", self.step, values)
        return {name: f"{value:.3f}" for name, value in zip(("loss", *LOSSES[1:]), losses, strict=True)}

    def evaluate(self) -> dict[str, float]:
        """Mean losses on the held-out episodes with common noise; a body without a token gets the bank's mean.

        Raises:
            ConfigError: no episode is held out.
        """
        if self._eval_loader is None:
            raise ConfigError(f"data.holdout: found {self.config.data.holdout}, expected episodes to evaluate on")
        sums = torch.zeros(len(LOSSES) + 1, dtype=torch.float64)
        for sample, _ in self._samples(self._eval_loader, self.config.log.eval_samples):
            losses = self._per_sample(sample)
            sums[:-1] += torch.stack([losses[name].double().sum() for name in LOSSES])
            sums[-1] += len(sample)
        sums = self.ranks.sum(sums)
        return {f"loss_{name}": float(value / sums[-1]) for name, value in zip(LOSSES, sums[:-1], strict=True)}

    def measure_gap(self) -> dict[str, Gap]:
        """Per loss, what it costs a training body to use another body's token. Empty with fewer than two tokens.

        The action loss counts only samples with actions to imitate.
        """
        bank = self.joint.bank
        if bank is None or len(bank.keys) < 2:
            return {}
        names = LOSSES if self.alignment else LOSSES[:2]
        sums = torch.zeros(len(names), 4, dtype=torch.float64)  # samples, own, other, squared difference
        for sample, positions in self._samples(self._gap_loader, self.config.log.gap_samples):
            shift = 1 + torch.from_numpy(positions).to(sample.rows.device) % (len(bank.keys) - 1)
            other = replace(sample, rows=(sample.rows + shift) % len(bank.keys))
            own_losses, other_losses = self._per_sample(sample), self._per_sample(other)
            for i, name in enumerate(names):
                counted = sample.labelled.cpu() if name == "action" else torch.ones(len(sample), dtype=torch.bool)
                a, b = own_losses[name].double()[counted], other_losses[name].double()[counted]
                sums[i] += torch.stack([counted.sum().double(), a.sum(), b.sum(), (b - a).square().sum()])
        gaps = {}
        for name, (count, own, other, squares) in zip(names, self.ranks.sum(sums).tolist(), strict=True):
            count = max(count, 1.0)
            variance = max(squares / count - ((other - own) / count) ** 2, 0.0)
            gaps[name] = Gap(own / count, other / count, math.sqrt(variance / max(count - 1, 1.0)))
        return gaps

    def _report_eval(self, log: RunLog | None) -> None:
        if self._eval_loader is None:
            return
        values = self.evaluate()
        if log is not None:
            log.write("eval", self.step, values)

    def _report_gap(self, log: RunLog | None) -> None:
        gaps = self.measure_gap()
        if log is None or not gaps:
            return
        values: dict[str, float] = {}
        for name, gap in gaps.items():
            values |= {f"{name}_own": gap.own, f"{name}_other": gap.other, f"{name}_gap": gap.mean}
            values[f"{name}_stderr"] = gap.stderr
        log.write("gap", self.step, values)
        inverse = gaps.get("inverse_dynamics")
        if inverse is not None and not inverse.shown:
            log.note(
                self.step,
                f"WARNING: inverse dynamics does not use the token yet: with another body's token its loss changes by "
                f"{inverse.mean:+.4f} ± {inverse.stderr:.4f}. Alignment on a robot will not help the actions of this "
                "checkpoint. It takes a thousand steps and more to show, and data with moving bodies that differ.",
            )

    def _samples(self, loader: Loader, count: int) -> Iterator[tuple[Sample, np.ndarray]]:
        """The same samples and noise every time, about ``count`` over all ranks."""
        for step in range(max(1, count // (loader.batch_size * self.ranks.world_size))):
            positions = loader.positions(step)
            sample = replace(self.encoder(loader.batch(step), positions), token_noise=None)
            yield sample.to(self.ranks.device), positions

    @torch.no_grad()
    def _per_sample(self, sample: Sample) -> dict[str, Tensor]:
        with lost_rank(self.ranks):
            losses = self.module(sample, reduction="none")
        return {name: getattr(losses, name).float().cpu() for name in LOSSES}

    # ---------------------------------------------------------------- checkpoints

    def _state(self) -> dict[str, Tensor]:
        """Every tensor that the run's future depends on, by name; sharded ones as they are."""
        state: dict[str, Tensor] = {f"model/{name}": parameter for name, parameter in self.parameters.items()}
        state |= {f"model/{name}": buffer for name, buffer in self.buffers.items()}
        for name, parameter in self.trained.master.items():
            moments = self.optimizer.state[parameter]
            state |= {f"exp_avg/{name}": moments["exp_avg"], f"exp_avg_sq/{name}": moments["exp_avg_sq"]}
        if self.ema is not None:
            state |= {f"ema/{name}": value for name, value in self.ema.values.items()}
        return state

    def save(self) -> Path:
        """Write a checkpoint with the policy it has become; all ranks take part.

        Returns:
            Its path on the first rank, ``output`` on the others.
        """
        policy: dict[str, Tensor] = {}

        def gathered() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in self._state().items():
                whole = full(tensor.detach())
                whole = whole.cpu() if self.ranks.first else whole
                kind, _, parameter = name.partition("/")
                # The averaged weights take the place of the trained ones; they come later.
                if self.ranks.first and kind in ("model", "ema"):
                    policy[parameter] = whole
                yield name, whole

        if not self.ranks.first:
            with lost_rank(self.ranks):
                for _ in gathered():
                    pass
                self.ranks.barrier()
            return self.output
        path = write_checkpoint(
            self.output / "checkpoints",
            self.step,
            gathered(),
            {
                "config": self.config.to_dict(),
                "bank_keys": [] if self.joint.bank is None else list(self.joint.bank.keys),
                "seed": self.config.seed,
            },
            lambda directory: self._write_policy(policy, directory),
            keep=self.config.checkpoint.keep,
        )
        self.ranks.barrier()
        return path

    def _write_policy(self, values: dict[str, Tensor], directory: Path) -> None:
        values = {name: value.float() if value.is_floating_point() else value for name, value in values.items()}
        weight, deploy = values.pop("bank.weight", None), self.config.bank.deploy
        keys: tuple[str, ...] = ()
        state = {name.removeprefix("model."): value for name, value in values.items()}
        if self._kept is not None:
            assert self._kept.known is not None  # Start refuses bank.tokens without a bank
            keys, weight = self._kept.known
            deploy = self._kept.embodiment
        elif weight is not None and self.joint.bank is not None:
            keys = self.joint.bank.keys
            deployed = bank_mean(weight[: len(keys)]) if deploy is None else weight[keys.index(deploy)].clone()
            state["peft_prefix_token"] = deployed
        if self.config.lora is not None:
            state = lora.merge(state, self.config.lora)
        embedding = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
        state["paligemma_with_expert.paligemma.lm_head.weight"] = state[embedding]
        with torch.device("meta"):
            model = Pi0(self.policy_config.model)
        model.load_state_dict(state, assign=True)
        config = replace(self.policy_config, bank_keys=keys, embodiment=deploy or (keys[0] if len(keys) == 1 else ""))
        dt = self.dataset.meta.dt_ns / 1e9
        Policy(model, config, self.codec.tokenizer, self.codec.stats, dt=dt, bank=weight).save(directory)

    def _restore(self, path: Path) -> None:
        info = read_info(path)
        keys = [] if self.joint.bank is None else list(self.joint.bank.keys)
        if info["bank_keys"] != keys:
            raise CheckpointError(f"{path}: found a bank of {info['bank_keys']}, expected {keys} (this dataset)")
        state = self._state()
        read_tensors(path, {n: tuple(t.shape) for n, t in state.items()}, lambda n, t: copy_into(state[n], t))
        self.trained.publish()
        self.step = info["step"]
        for moments in self.optimizer.state.values():
            moments["step"].fill_(float(self.step))


def _mix(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
