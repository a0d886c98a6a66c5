"""From a loader's batch to what the joint pass reads: normalised tensors, prompts, noise, cached image features.

All randomness of a sample follows from the seed and the sample's position in the stream of samples, so it does not
depend on how a batch is spread over ranks and passes, nor on where a run was resumed. Knows nothing of optimisers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfalign_core.data.dataset import TransitionDataset
from selfalign_core.data.loader import Batch
from selfalign_core.errors import ConfigError, InputError
from selfalign_core.model import flow_matching as flow
from selfalign_core.model.pi0 import AlignmentNoise, ModelInputs
from selfalign_core.policy.codec import Codec
from selfalign_core.policy.config import PolicyConfig
from selfalign_core.training.joint import Sample


class Encoder:
    """Turns batches of one dataset into :class:`Sample`.

    Args:
        row_of: row of the bank for each of the dataset's embodiments.
        alignment: whether the three self-supervised losses are computed.
        features: cached image features, read in place of images.
        token_noise: standard deviation of the samples' ``token_noise``; 0 for none.
    """

    def __init__(
        self,
        codec: Codec,
        dataset: TransitionDataset,
        *,
        row_of: list[int],
        seed: int,
        alignment: bool,
        rtc_max_delay: int = 0,
        features: np.ndarray | None = None,
        token_noise: float = 0.0,
    ):
        self.codec, self.config, self.model = codec, codec.config, codec.config.model
        self._prompts = dataset.meta.prompts
        # π0's prompts do not hold the state, so each is tokenised once. π0.5's are tokenised here to be checked early.
        sample_state = np.zeros(self.config.state_dim, np.float32)
        self._table = [codec.prompt_to_model(text, sample_state) for text in self._prompts]
        self._row_of = np.array(row_of, np.int64)
        self._seed, self._alignment, self._rtc_max_delay = seed, alignment, rtc_max_delay
        self._features, self._token_noise = features, token_noise

    def __call__(self, batch: Batch, positions: np.ndarray) -> Sample:
        """``positions`` (B,) in the stream of samples, see :meth:`selfalign_core.data.loader.Loader.positions`."""
        for name in ("state", "actions", "executed"):
            self._check_finite(name, batch)
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
                "executed": self.codec.actions_to_model(batch.executed, batch.state),
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
        tokens, token_masks = self._tokens(batch.prompt, batch.state)
        present = torch.ones(len(batch), dtype=torch.bool)
        return Sample(
            inputs=ModelInputs(
                images or [],
                [present for _ in self.config.cameras],
                tokens,
                token_masks,
                self.codec.state_to_model(batch.state),
            ),
            actions=self.codec.actions_to_model(batch.actions, batch.state),
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

    def _tokens(self, prompts: np.ndarray, state: np.ndarray) -> tuple[Tensor, Tensor]:
        """Ids and masks (B, L); a sample of play (prompt -1) has an empty prompt."""
        tokens = np.zeros((len(prompts), self.model.max_token_len), np.int64)
        masks = np.zeros(tokens.shape, bool)
        for i, prompt in enumerate(prompts):
            if prompt < 0:
                continue
            if self.model.pi05:
                tokens[i], masks[i] = self.codec.prompt_to_model(self._prompts[prompt], state[i])
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
