"""From robot numbers to model numbers and back: the one way, for the policy, training, alignment and benchmarks.

Images become floats, states are normalised and padded, actions are taken relative to their state, normalised and
padded, prompts become token ids; and the model's actions become the robot's. Batched: numpy comes in, torch goes out,
and the other way. Made from what a checkpoint says, without its weights; ``transforms`` has the arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfalign_core.errors import ConfigError, InputError
from selfalign_core.model.pi0 import ModelInputs
from selfalign_core.policy.config import PolicyConfig
from selfalign_core.policy.tokenizer import PromptTokenizer
from selfalign_core.policy.transforms import Normalizer, NormStats, pad_to_dim, to_absolute, to_delta
from selfalign_core.robot.images import resize_with_pad
from selfalign_core.robot.types import Observation


def pixels_to_model(images: Tensor) -> Tensor:
    """(..., H, W, 3) uint8 RGB → (..., 3, H, W) float in [-1, 1]."""
    return images.movedim(-1, -3).float() / 255.0 * 2.0 - 1.0


class Codec:
    """Of the policy that ``config``, ``stats`` and ``tokenizer`` describe; tensors are on ``device``.

    Raises:
        ConfigError: the statistics are of vectors of another length.
    """

    def __init__(
        self, config: PolicyConfig, stats: dict[str, NormStats], tokenizer: Any, *, device: str | torch.device = "cpu"
    ):
        self.config, self.stats, self.tokenizer = config, stats, tokenizer
        self.device = torch.device(device)
        self._state_norm = Normalizer(stats.get("state"), config.state_norm, config.lerobot_epsilon)
        self._action_norm = Normalizer(stats.get("actions"), config.action_norm, config.lerobot_epsilon)
        for name, norm, dim in (
            ("state", self._state_norm, config.state_dim), ("actions", self._action_norm, config.action_dim)
        ):  # fmt: skip
            if norm.stats is not None and norm.mode != "identity" and len(norm.stats.mean) != dim:
                raise ConfigError(f"statistics of {name}: found {len(norm.stats.mean)} values, expected {dim}")
        self._delta = np.array(config.delta_mask or (False,) * config.action_dim)
        self._prompt = PromptTokenizer(tokenizer, max_len=config.model.max_token_len, pi05=config.model.pi05)

    # ---------------------------------------------------------------- numbers

    def images_to_model(self, images: np.ndarray) -> Tensor:
        """(N, H, W, 3) uint8 RGB at the model's size → (N, 3, H, W) float in [-1, 1]."""
        return pixels_to_model(torch.from_numpy(np.ascontiguousarray(images)).to(self.device))

    def cameras_to_model(self, images: Mapping[str, np.ndarray], count: int) -> tuple[list[Tensor], list[Tensor]]:
        """What each of the model's image slots sees of ``count`` frames, images (N, H, W, 3) uint8 by camera.

        Returns:
            images (N, 3, H, W) and masks (N,) per slot; one without a camera is black and masked out.
        """
        black = np.zeros((count, *self.config.model.image_size, 3), np.uint8)
        cameras = self.config.cameras
        return (
            [self.images_to_model(black if camera is None else images[camera]) for camera in cameras],
            [torch.full((count,), camera is not None, device=self.device) for camera in cameras],
        )

    def state_to_model(self, state: np.ndarray) -> Tensor:
        """(..., state_dim) → (..., model action_dim) normalised and padded."""
        return self._padded(self._state_norm.normalize(state))

    def actions_to_model(self, actions: np.ndarray, state: np.ndarray) -> Tensor:
        """(..., K, action_dim) and the state (..., state_dim) at their start → (..., K, model action_dim)."""
        relative = to_delta(actions, state, self._delta) if self._delta.any() else actions
        return self._padded(self._action_norm.normalize(relative))

    def actions_from_model(self, actions: Tensor, state: np.ndarray) -> np.ndarray:
        """Inverse of :meth:`actions_to_model`."""
        values = self._action_norm.unnormalize(actions[..., : self.config.action_dim].float().cpu().numpy())
        return to_absolute(values, state, self._delta) if self._delta.any() else values

    def _padded(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(pad_to_dim(values, self.config.model.action_dim)).to(self.device)

    # ---------------------------------------------------------------- words

    def prompt_to_model(self, prompt: str, state: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask, each (max_token_len,), of ``prompt`` told in ``state`` (state_dim,), which π0.5 reads."""
        tokens, mask = self._prompt(prompt, None if state is None else self._state_norm.normalize(state))
        size = self.config.model.vocab_size
        if tokens.max() >= size:
            raise InputError(
                f"prompt: found token id {tokens.max()} in {prompt!r}, expected ids below the model's vocab_size="
                f"{size} (is this the checkpoint's tokenizer?)"
            )
        return tokens, mask

    def prompts_to_model(self, prompts: Sequence[str], states: np.ndarray) -> tuple[Tensor, Tensor]:
        """Ids and masks, each (N, max_token_len); ``states`` (N, state_dim)."""
        pairs = [self.prompt_to_model(prompt, state) for prompt, state in zip(prompts, states, strict=True)]
        ids, masks = (torch.from_numpy(np.stack(parts)).to(self.device) for parts in zip(*pairs, strict=True))
        return ids, masks

    # ---------------------------------------------------------------- all of it

    def inputs(self, images: Mapping[str, np.ndarray], states: np.ndarray, prompts: Sequence[str]) -> ModelInputs:
        """Checked frames as a batch: images (N, H, W, 3) uint8 by camera, at the model's size, and (N, state_dim)."""
        seen, masks = self.cameras_to_model(images, len(states))
        return ModelInputs(seen, masks, *self.prompts_to_model(prompts, states), self.state_to_model(states))

    def observations_to_model(self, observations: Sequence[Observation]) -> ModelInputs:
        """Observations, whatever they hold, as a batch.

        Raises:
            InputError: a missing camera, a wrong shape or dtype, NaN, or a prompt the tokenizer refuses.
        """
        states = np.stack([self._state(one) for one in observations])
        cameras = [camera for camera in self.config.cameras if camera is not None]
        images = {camera: np.stack([self._image(one, camera) for one in observations]) for camera in cameras}
        return self.inputs(images, states, [one.prompt for one in observations])

    def _state(self, observation: Observation) -> np.ndarray:
        try:
            state = np.asarray(observation.state, np.float32)
        except (TypeError, ValueError) as error:
            raise InputError(f"state: found {observation.state!r}, expected numbers") from error
        if state.shape != (self.config.state_dim,):
            raise InputError(f"state: found shape {state.shape}, expected ({self.config.state_dim},)")
        if not np.isfinite(state).all():
            raise InputError(f"state: found {state.tolist()}, expected finite numbers")
        return state

    def _image(self, observation: Observation, camera: str) -> np.ndarray:
        if camera not in observation.images:
            raise InputError(f"images: found cameras {sorted(observation.images)}, expected {camera!r} too")
        image, size = observation.images[camera], self.config.model.image_size
        if not isinstance(image, np.ndarray):
            raise InputError(f"images[{camera!r}]: found {type(image).__name__}, expected a numpy array")
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise InputError(f"images[{camera!r}]: found {image.shape} {image.dtype}, expected (H, W, 3) uint8")
        return image if image.shape[:2] == size else resize_with_pad(image, *size)
