"""From a loader's batch to what the joint pass reads: normalised tensors, prompts, noise, cached image features.

All randomness of a sample follows from the seed and the sample's position in the stream of samples, so it does not
depend on how a batch is spread over ranks and passes, nor on where a run was resumed. Knows nothing of optimisers.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from selfalign_core.data.dataset import TransitionDataset
from selfalign_core.data.loader import Batch, Loader
from selfalign_core.errors import ConfigError, InputError
from selfalign_core.model import flow_matching as flow
from selfalign_core.model.config import ModelConfig
from selfalign_core.model.pi0 import AlignmentNoise, Losses, ModelInputs, Pi0
from selfalign_core.policy.bank import TokenBank
from selfalign_core.policy.config import PolicyConfig
from selfalign_core.policy.tokenizer import PromptTokenizer
from selfalign_core.policy.transforms import Normalizer, NormStats, pad_to_dim, to_delta
from selfalign_core.training.state import expect_shared


@dataclass(frozen=True)
class Sample:
    """B samples for :class:`JointModel`; ``rows`` (B,) int64 are rows of the bank. See ``Pi0.forward``.

    Images are still (B, H, W, 3) uint8: they travel to the device as such. ``token_noise`` (B, tokens, width) is added
    to the bodies' tokens.
    """

    inputs: ModelInputs
    actions: Tensor
    action_masks: Tensor
    noise: Tensor
    time: Tensor
    rows: Tensor
    executed: Tensor | None = None
    executed_masks: Tensor | None = None
    next_images: list[Tensor] | None = None
    alignment_noise: AlignmentNoise | None = None
    image_features: list[Tensor] | None = None
    next_image_features: list[Tensor] | None = None
    token_noise: Tensor | None = None

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def labelled(self) -> Tensor:
        """(B,) bool: samples with actions to imitate; play has none."""
        return self.action_masks.any(1)

    def to(self, device: torch.device) -> Sample:
        return _map(self, lambda tensor: tensor.to(device, non_blocking=True))

    def split(self, parts: int) -> list[Sample]:
        """``parts`` samples of equal size in the same order."""
        size = len(self) // parts
        return [_map(self, lambda tensor, i=i: tensor[i * size : (i + 1) * size]) for i in range(parts)]


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list):
        return [_map(v, change) for v in value]
    if isinstance(value, Sample | ModelInputs | AlignmentNoise):
        return type(value)(**{f.name: _map(getattr(value, f.name), change) for f in fields(value)})
    return value


def pixels(images: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 RGB → (B, 3, H, W) float in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 255.0 * 2.0 - 1.0


class JointModel(nn.Module):
    """Model and bank as one module: what parallel wrappers wrap, and what a training step calls."""

    def __init__(self, model: Pi0, bank: TokenBank | None, dim_mask: Tensor):
        super().__init__()
        self.model = model
        self.bank = bank
        self.register_buffer("dim_mask", dim_mask, persistent=False)

    def forward(self, sample: Sample, *, reduction: str = "mean") -> Losses:
        """One joint pass of the three experts, each sample with its body's token."""
        inputs = replace(sample.inputs, images=[pixels(image) for image in sample.inputs.images])
        token = None if self.bank is None else self.bank(sample.rows)
        if token is not None and sample.token_noise is not None:
            token = token + sample.token_noise
        return self.model(
            inputs,
            sample.actions,
            noise=sample.noise,
            time=sample.time,
            action_masks=sample.action_masks,
            dim_mask=self.dim_mask,
            executed=sample.executed,
            executed_masks=sample.executed_masks,
            next_images=None if sample.next_images is None else [pixels(image) for image in sample.next_images],
            alignment_noise=sample.alignment_noise,
            image_features=sample.image_features,
            next_image_features=sample.next_image_features,
            token=token,
            reduction=reduction,
        )


class Encoder:
    """Turns batches of one dataset into :class:`Sample`, with the numbers :class:`~selfalign_core.policy.Policy` uses.

    Args:
        row_of: row of the bank for each of the dataset's embodiments.
        alignment: whether the three self-supervised losses are computed.
        features: cached image features, read in place of images.
        token_noise: standard deviation of the samples' ``token_noise``; 0 for none.
    """

    def __init__(
        self,
        config: PolicyConfig,
        stats: dict[str, NormStats],
        tokenizer: Any,
        dataset: TransitionDataset,
        *,
        row_of: list[int],
        seed: int,
        alignment: bool,
        rtc_max_delay: int = 0,
        features: np.ndarray | None = None,
        token_noise: float = 0.0,
    ):
        self.config, self.model = config, config.model
        self._state_norm = Normalizer(stats.get("state"), config.state_norm, config.lerobot_epsilon)
        self._action_norm = Normalizer(stats.get("actions"), config.action_norm, config.lerobot_epsilon)
        self._delta = np.array(config.delta_mask)
        self._prompts = dataset.meta.prompts
        self._prompt = PromptTokenizer(tokenizer, max_len=self.model.max_token_len, pi05=self.model.pi05)
        # π0's prompts do not hold the state, so each is tokenised once. π0.5's are tokenised here to be checked early.
        sample_state = np.zeros(config.state_dim, np.float32)
        self._table = [self._prompt(text, sample_state) for text in self._prompts]
        self._row_of = np.array(row_of, np.int64)
        self._seed, self._alignment, self._rtc_max_delay = seed, alignment, rtc_max_delay
        self._features, self._token_noise = features, token_noise

    def __call__(self, batch: Batch, positions: np.ndarray) -> Sample:
        """``positions`` (B,) in the stream of samples, see :meth:`selfalign_core.data.loader.Loader.positions`."""
        for name in ("state", "actions", "executed"):
            self._check_finite(name, batch)
        state = self._state_norm.normalize(batch.state)
        noise = self._noise(positions, cameras=len(self.config.cameras))
        action_masks = np.asarray(batch.action_masks)
        time = flow.time_from_uniform(torch.from_numpy(noise["action_time"]))
        if self._rtc_max_delay:
            time, action_masks = self._delayed(time, action_masks, noise["delay"])
        images, features = self._see(batch.images, batch.index)
        sample: dict[str, Any] = {}
        if self._token_noise:
            sample["token_noise"] = self._token_noise * torch.from_numpy(noise["token"])
        if self._alignment:
            next_images, next_features = self._see(batch.next_images, batch.next_index)
            sample |= {
                "executed": self._actions(batch.executed, batch.state),
                "executed_masks": torch.from_numpy(batch.executed_masks),
                "next_images": next_images,
                "next_image_features": next_features,
                "alignment_noise": AlignmentNoise(
                    state=torch.from_numpy(noise["state"]),
                    next_obs=torch.from_numpy(noise["next_obs"]),
                    actions=torch.from_numpy(noise["executed"]),
                    time=flow.time_from_uniform(torch.from_numpy(noise["alignment_time"])),
                ),
            }
        tokens, token_masks = self._tokens(batch.prompt, state)
        present = torch.ones(len(batch), dtype=torch.bool)
        return Sample(
            inputs=ModelInputs(
                images or [],
                [present for _ in self.config.cameras],
                tokens,
                token_masks,
                torch.from_numpy(pad_to_dim(state, self.model.action_dim)),
            ),
            actions=self._actions(batch.actions, batch.state),
            action_masks=torch.from_numpy(action_masks),
            noise=torch.from_numpy(noise["actions"]),
            time=time,
            rows=torch.from_numpy(self._row_of[batch.embodiment]),
            image_features=features,
            **sample,
        )

    def _check_finite(self, name: str, batch: Batch) -> None:
        values = getattr(batch, name)
        bad = ~np.isfinite(values.reshape(len(values), -1)).all(1)
        if bad.any():
            row = int(batch.index[np.flatnonzero(bad)[0]])
            raise InputError(f"{name} of dataset row {row}: found NaN or infinity, expected finite numbers")

    def _see(self, images: np.ndarray | None, index: np.ndarray) -> tuple[list[Tensor] | None, list[Tensor] | None]:
        """Per camera, images (B, H, W, 3) uint8, or their cached features (B, patches, width)."""
        if self._features is not None:
            stored = torch.from_numpy(self._features[index]).float()
            return None, list(stored.unbind(1))
        return list(torch.from_numpy(images).unbind(1)), None

    def _actions(self, actions: np.ndarray, state: np.ndarray) -> Tensor:
        relative = to_delta(actions, state, self._delta) if self._delta.any() else actions
        return torch.from_numpy(pad_to_dim(self._action_norm.normalize(relative), self.model.action_dim))

    def _tokens(self, prompts: np.ndarray, state: np.ndarray) -> tuple[Tensor, Tensor]:
        """Ids and masks (B, L); a sample of play (prompt -1) has an empty prompt."""
        tokens = np.zeros((len(prompts), self.model.max_token_len), np.int64)
        masks = np.zeros(tokens.shape, bool)
        for i, prompt in enumerate(prompts):
            if prompt < 0:
                continue
            if self.model.pi05:
                tokens[i], masks[i] = self._prompt(self._prompts[prompt], state[i])
            else:
                tokens[i], masks[i] = self._table[prompt]
        return torch.from_numpy(tokens), torch.from_numpy(masks)

    def _noise(self, positions: np.ndarray, *, cameras: int) -> dict[str, np.ndarray]:
        """Normal noise and uniform numbers of every sample, from its own counter-based generator."""
        model = self.model
        shapes = {
            "actions": (model.action_horizon, model.action_dim),
            "state": (model.action_dim,),
            "next_obs": (cameras * model.feature_tokens_per_camera, model.text.width),
            "executed": (model.transition_horizon, model.action_dim),
        }
        if self._token_noise:
            shapes["token"] = (model.peft_num_tokens, model.action_expert.width)
        sizes = [int(np.prod(shape)) for shape in shapes.values()]
        normal = np.empty((len(positions), sum(sizes)), np.float32)
        uniform = np.empty((len(positions), 3), np.float32)
        for i, position in enumerate(positions):
            rng = np.random.Generator(np.random.Philox(key=[self._seed, 0x5E1F], counter=[0, 0, 0, int(position)]))
            rng.random(out=uniform[i], dtype=np.float32)
            rng.standard_normal(out=normal[i], dtype=np.float32)
        parts = np.split(normal, np.cumsum(sizes)[:-1], axis=1)
        arrays = {n: p.reshape(-1, *s) for (n, s), p in zip(shapes.items(), parts, strict=True)}
        names = ("action_time", "alignment_time", "delay")
        return arrays | {name: uniform[:, i].copy() for i, name in enumerate(names)}

    def _delayed(self, time: Tensor, action_masks: np.ndarray, delay: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Flow time per action (B, horizon): 0 for the first d actions, which are given and not learned."""
        d = np.floor(delay * (self._rtc_max_delay + 1)).astype(np.int64)
        given = np.arange(self.model.action_horizon)[None] < d[:, None]
        return torch.where(torch.from_numpy(given), 0.0, time[:, None]), action_masks & ~given


# ------------------------------------------------------------------------------------------------ frozen features


def cache_features(
    path: Path,
    model: Pi0,
    dataset: TransitionDataset,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    gather: Callable[[Callable[[], Any]], list[Any]] = lambda work: [work()],
    report: Callable[[int, int], None] = lambda done, count: None,
    rows_per_pass: int = 64,
) -> np.ndarray:
    """Outputs of the frozen vision tower and projector for every frame: (N, cameras, patches, text width) float16.

    Computed once, each rank a share, into a memory-mapped file in directory ``path``, named after the weights and the
    dataset; it appears under its name when complete, and a later run with the same tower and dataset reuses it.
    ``gather``: ``Ranks.gather``; rank 0 decides what is to be done.

    Raises:
        InputError: a feature that float16 cannot hold.
        ConfigError: this rank does not see rank 0's file, or has another tower or dataset.
    """
    size = (len(dataset), len(dataset.meta.cameras), model.config.vision.num_patches, model.config.text.width)
    file = path / f"features-{_tower_digest(model, dataset)[:16]}.npy"

    def begin() -> tuple[str, str | None] | None:
        """Of rank 0: the name of the file, and that of the one to compute if it is not there."""
        if rank != 0:
            return None
        if file.is_file():
            return file.name, None
        path.mkdir(parents=True, exist_ok=True)
        for left in path.glob("*.partial"):  # of a killed run
            left.unlink()
        # A new name: what an earlier run may have left on a disk of another rank's is not taken for it.
        partial = file.with_suffix(f".{os.urandom(4).hex()}.partial")
        made = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=size)
        del made
        with open(partial, "rb+") as handle:  # a full disk is reported here
            os.posix_fallocate(handle.fileno(), 0, partial.stat().st_size)
        return file.name, partial.name

    name, partial_name = gather(begin)[0]

    def compute() -> None:
        if file.name != name:
            raise ConfigError(
                f"{file}: rank {rank} found these features to compute and rank 0 {name}, expected the same dataset, at "
                "the same path, and the same vision tower on every node (data.path, model.init)"
            )
        if partial_name is None:
            return
        expect_shared(path / partial_name, rank)
        out = np.lib.format.open_memmap(path / partial_name, mode="r+")
        first, last = (size[0] * r // world_size for r in (rank, rank + 1))
        with torch.no_grad():
            for row in range(first, last, rows_per_pass):
                images = torch.from_numpy(np.array(dataset.images[row : min(row + rows_per_pass, last)])).to(device)
                features = model.paligemma_with_expert.embed_image(pixels(images.flatten(0, 1))).half()
                if not features.isfinite().all():
                    raise InputError(f"features from row {row}: found values beyond float16, expected smaller ones")
                out[row : row + len(images)] = features.unflatten(0, images.shape[:2]).cpu().numpy()
                report(row - first + len(images), last - first)
        out.flush()

    def finish() -> None:
        if rank == 0 and partial_name is not None:
            with open(path / partial_name, "rb+") as handle:
                os.fsync(handle.fileno())
            os.replace(path / partial_name, file)

    for work in (compute, finish, lambda: expect_shared(file, rank)):
        gather(work)
    features = np.load(file, mmap_mode="r")
    if features.shape != size:
        raise InputError(f"{file}: found {features.shape}, expected {size}; delete it to compute it again")
    return features


def _tower_digest(model: Pi0, dataset: TransitionDataset) -> str:
    digest = hashlib.sha256(f"{dataset.path.resolve()} {len(dataset)}".encode())
    digest.update(np.ascontiguousarray(dataset.stamps).data)
    parts = model.paligemma_with_expert.paligemma.model
    for part in (parts.vision_tower, parts.multi_modal_projector):
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def measure_feature_scale(
    model: Pi0, loader: Loader, features: np.ndarray | None, *, device: torch.device, frames: int = 512
) -> None:
    """Set the model's mean and standard deviation of next-observation features from frames spread over the data.

    Dimensions that hardly vary keep a tenth of the median deviation, so that their noise is not blown up.
    """
    rows = np.unique(loader.rows[np.linspace(0, len(loader.rows) - 1, frames).astype(np.int64)])
    pooled = []
    for begin in range(0, len(rows), 64):
        block = rows[begin : begin + 64]
        if features is not None:
            tokens = torch.from_numpy(features[block]).to(device).float().unbind(1)
        else:
            images = torch.from_numpy(loader.dataset.images[block]).to(device)
            tokens = model.embed_images([pixels(image) for image in images.unbind(1)])
        pooled.append(model.pool_features(list(tokens)).flatten(0, 1).double())
    values = torch.cat(pooled)
    std = values.std(0)
    model.next_obs_mean.copy_(values.mean(0))
    model.next_obs_std.copy_(std.clamp(min=max(float(std.median()) / 10, 1e-6)))


def unreached_parameters(config: ModelConfig, *, alignment: bool, cached: bool, cameras: int) -> set[str]:
    """Names of the model's parameters that no loss depends on, found by a pass without numbers (meta device).

    Among them: what only the hidden output of the VLM's last layer would need, and ``peft_prefix_token``, whose place
    the bank takes.
    """
    with torch.device("meta"):
        model = Pi0(config)
        image = [torch.zeros(1, 3, *config.image_size) for _ in range(cameras)]
        feature = [torch.zeros(1, config.vision.num_patches, config.text.width) for _ in range(cameras)]
        present = [torch.ones(1, dtype=torch.bool) for _ in range(cameras)]
        prompt = torch.zeros(1, config.max_token_len, dtype=torch.int64)
        state, time = torch.zeros(1, config.action_dim), torch.zeros(1)
        actions = torch.zeros(1, config.action_horizon, config.action_dim)
        executed = torch.zeros(1, config.transition_horizon, config.action_dim)
        targets = torch.zeros(1, cameras * config.feature_tokens_per_camera, config.text.width)
        token = torch.zeros(1, config.peft_num_tokens, config.action_expert.width)
        losses = model(
            ModelInputs(image, present, prompt, prompt.bool(), state),
            actions,
            noise=actions,
            time=time,
            token=token if config.use_peft_prefix_token else None,
            image_features=feature if cached else None,
            **(
                {
                    "executed": executed,
                    "next_images": image,
                    "next_image_features": feature if cached else None,
                    "alignment_noise": AlignmentNoise(state, targets, executed, time),
                }
                if alignment
                else {}
            ),
        )
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(losses.total, list(named.values()), allow_unused=True)
    fixed = {name for name, p in model.named_parameters() if not p.requires_grad}
    return fixed | {name for name, gradient in zip(named, gradients, strict=True) if gradient is None}


def check_fits(config: PolicyConfig, dataset: TransitionDataset) -> None:
    """Raise :class:`ConfigError` if the model cannot read or answer what the dataset holds."""
    meta, model = dataset.meta, config.model
    if tuple(meta.image_size) != model.image_size:
        raise ConfigError(f"{dataset.path}: found images of {meta.image_size}, expected the model's {model.image_size}")
    if meta.chunk_horizon is not None and meta.chunk_horizon < model.action_horizon:
        raise ConfigError(
            f"{dataset.path}: found expert chunks of {meta.chunk_horizon} actions, expected the model's "
            f"action_horizon={model.action_horizon} or more"
        )
