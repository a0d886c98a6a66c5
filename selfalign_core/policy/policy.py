"""A policy: observation in, action chunk out. Model, transforms, tokenizer and the E-Token in use, in one object.

Owned by one thread. Knows neither ROS nor the clock; ``stamp_ns`` is passed through and seeds the noise.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from selfalign_core.errors import CheckpointError, ConfigError, InputError
from selfalign_core.model.config import ModelConfig
from selfalign_core.model.device_turns import DeviceTurns
from selfalign_core.model.fast import FastSampler
from selfalign_core.model.pi0 import Guidance, ModelInputs, Pi0
from selfalign_core.model.torch_state import exclusive, seeded
from selfalign_core.policy.checkpoint import load_model, model_digest, read_bank, save_model, write_atomically
from selfalign_core.policy.config import PolicyConfig, is_foreign, is_untrained
from selfalign_core.policy.foreign import fit_to_robot, read_foreign
from selfalign_core.policy.tokenizer import PromptTokenizer, load_tokenizer, word_tokenizer
from selfalign_core.policy.transforms import (
    Normalizer,
    NormStats,
    load_norm_stats,
    pad_to_dim,
    save_norm_stats,
    to_absolute,
    to_delta,
)
from selfalign_core.robot.chunking import Handover
from selfalign_core.robot.contract import RobotContract
from selfalign_core.robot.images import resize_with_pad
from selfalign_core.robot.types import ActionChunk, EToken, Observation

TINY_WORDS = (
    "reach", "touch", "the", "red", "green", "blue", "yellow", "orange", "purple", "cube", "ball", "cylinder", "block"
)  # fmt: skip
UNTRAINED_SEED = 0


class Policy:
    """See :meth:`load` and :meth:`from_checkpoint`; then :meth:`infer`."""

    def __init__(
        self,
        model: Pi0,
        config: PolicyConfig,
        tokenizer: Any,
        stats: dict[str, NormStats],
        *,
        dt: float,
        trained: bool = True,
        bank: Tensor | None = None,
        digest: str | None = None,
    ):
        if not 0 < dt < math.inf:
            raise ConfigError(f"dt: found {dt}, expected seconds > 0")
        self.model = model.eval().requires_grad_(False)
        self.config = config
        self.tokenizer = tokenizer
        self.stats = stats
        self.dt = dt
        self.trained = trained
        self.bank = bank
        """(capacity, peft_num_tokens, width) E-Tokens of the bodies trained on; ``config.bank_keys`` names the rows."""
        self.fast = True
        """Whether :meth:`infer` samples on fused weights, or as the model itself does: same numbers within rounding.
        Guidance is always as the model does."""
        self._sampler = FastSampler(model)
        self.digest = model_digest(model) if digest is None else digest
        """Of the weights as they are in the checkpoint, whatever they were cast to: who may exchange E-Tokens."""
        self._prompt = PromptTokenizer(tokenizer, max_len=config.model.max_token_len, pi05=config.model.pi05)
        self._state_norm = Normalizer(stats.get("state"), config.state_norm, config.lerobot_epsilon)
        self._action_norm = Normalizer(stats.get("actions"), config.action_norm, config.lerobot_epsilon)
        for name, norm, dim in (
            ("state", self._state_norm, config.state_dim), ("actions", self._action_norm, config.action_dim)
        ):  # fmt: skip
            if norm.mode != "identity" and len(norm.stats.mean) != dim:
                raise ConfigError(f"statistics of {name}: found {len(norm.stats.mean)} values, expected {dim}")
        self._delta = np.array(config.delta_mask or (False,) * config.action_dim)
        self._device = next(model.parameters()).device
        self.turns = DeviceTurns.of(self._device)
        """Claimed by :meth:`infer` while it computes."""
        self.e_token: EToken | None = None
        if config.model.use_peft_prefix_token:
            token = model.peft_prefix_token.detach().float().cpu().numpy().copy()
            self.e_token = EToken(token, 0, config.embodiment, self.digest)
            known = token[None] if bank is None else np.concatenate([token[None], bank.float().cpu().numpy()])
            self._largest_known = float(_vector_sizes(known).max())

    # ---------------------------------------------------------------- making one

    @classmethod
    @exclusive()
    def load(cls, checkpoint: str, *, contract: RobotContract, device: str = "cpu", precision: str = "auto") -> Policy:
        """The policy behind a ``checkpoint`` parameter, for the robot of ``contract``.

        ``""`` or ``"tiny"`` is the tiny model with seeded random weights (``trained`` is False); anything else is a
        checkpoint directory. One of openpi's or LeRobot's runs as it is: without E-Token, its cameras matched to the
        contract's by name.

        Args:
            precision: ``float32`` or ``bfloat16``; with ``auto`` bfloat16 on a GPU, elsewhere as in the file.

        Raises:
            CheckpointError, ConfigError: what is wrong with the files, or how they do not fit the contract.
        """
        if precision not in ("auto", "float32", "bfloat16"):
            raise ConfigError(f"precision: found {precision!r}, expected auto, float32 or bfloat16")
        wanted = {"auto": "bfloat16" if torch.device(device).type == "cuda" else None}.get(precision, precision)
        if is_untrained(checkpoint):
            return cls.untrained(contract, device=device, precision=wanted)
        path = Path(checkpoint)
        if not path.is_dir():
            raise CheckpointError(f"checkpoint: found no directory {path}, expected one, or '' for the tiny model")
        if is_foreign(path):
            foreign = fit_to_robot(
                read_foreign(path, embodiment=contract.embodiment), len(contract.joints), contract.camera_names
            )
            return cls.from_checkpoint(
                path, dt=contract.dt, config=foreign.config, stats=foreign.stats, device=device, precision=wanted
            )
        policy = cls.from_checkpoint(path, device=device, dt=contract.dt, precision=wanted)
        policy.check_contract(contract)
        return policy

    @classmethod
    def untrained(cls, contract: RobotContract, *, device: str = "cpu", precision: str | None = None) -> Policy:
        """The tiny model with random weights: real code paths, meaningless small motions around the pose it is in."""
        joints = contract.joints
        lower, upper = contract.lower.astype(np.float32), contract.upper.astype(np.float32)
        state = NormStats((lower + upper) / 2, (upper - lower) / 2, lower, upper)
        step = 0.05 * (upper - lower)
        actions = NormStats(np.zeros_like(step), step, -step, step)
        with seeded(UNTRAINED_SEED):
            model = Pi0(ModelConfig.preset("tiny")).to(device)
        config = PolicyConfig(
            model=model.config,
            cameras=contract.camera_names,
            state_dim=len(joints),
            action_dim=len(joints),
            state_norm="quantile",
            action_norm="quantile",
            delta_mask=(True,) * len(joints),
            embodiment=contract.embodiment,
            joints=contract.joint_names,
        )
        stats, digest = {"state": state, "actions": actions}, model_digest(model)
        if precision is not None:
            model.to_precision(precision)
        return cls(model, config, word_tokenizer(TINY_WORDS), stats, dt=contract.dt, trained=False, digest=digest)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        dt: float,
        config: PolicyConfig | None = None,
        stats: dict[str, NormStats] | None = None,
        tokenizer: str | Path | None = None,
        device: str = "cpu",
        precision: str | None = None,
        initialise: Sequence[str] = (),
        **foreign: Any,
    ) -> Policy:
        """Load a checkpoint directory: SelfAlign's own, openpi's (PyTorch) or LeRobot's.

        A SelfAlign directory holds everything. For the others ``foreign`` goes to
        :func:`selfalign_core.policy.foreign.read_foreign` (cameras, joints, delta actions, model options), unless
        ``config`` and ``stats`` are given.

        Args:
            dt: seconds between two actions.
            tokenizer: ``tokenizer.json`` or its directory, where it is not in ``path``.
            precision: ``float32`` or ``bfloat16``; as in the file if None.
            initialise: parts to start fresh if the file lacks them: ``"e_token"``, ``"alignment"``.
        """
        path = Path(path)
        if foreign and (config is not None or not is_foreign(path)):
            raise ConfigError(
                f"{path}: found option(s) {sorted(foreign)}, expected none (they describe openpi's and LeRobot's "
                "directories; here the configuration says everything)"
            )
        if config is None:
            if is_foreign(path):
                read = read_foreign(path, **foreign)
                config, stats = read.config, read.stats
            else:
                config = PolicyConfig.load(path)
        if stats is None:
            normalised = {config.state_norm, config.action_norm} != {"identity"}
            stats = load_norm_stats(path / "norm_stats.json") if normalised else {}
        text = load_tokenizer(tokenizer or path)
        model = load_model(path, config.model, device=device, initialise=tuple(initialise))
        digest = model_digest(model)
        if precision is not None:
            model.to_precision(precision)
        bank = read_bank(path) if config.bank_keys else None
        return cls(model, config, text, stats, dt=dt, bank=bank, digest=digest)

    def save(self, path: str | Path) -> None:
        """Write a SelfAlign checkpoint directory: weights, config, statistics and tokenizer."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        save_model(self.model, path / "model.safetensors", bank=self.bank)
        if self.stats:
            save_norm_stats(path / "norm_stats.json", self.stats)
        self.tokenizer.save(str(path / "tokenizer.json"))
        text = json.dumps(self.config.to_dict(), indent=2)
        write_atomically(path / "config.json", lambda temporary: Path(temporary).write_text(text))

    def check_contract(self, contract: RobotContract) -> None:
        """Raise :class:`ConfigError` if the robot lacks what the checkpoint reads or commands."""
        names = contract.camera_names
        missing = [camera for camera in self.config.cameras if camera is not None and camera not in names]
        if missing:
            raise ConfigError(f"contract: found cameras {names}, expected {missing} too (the checkpoint reads them)")
        for name, dim in (("state_dim", self.config.state_dim), ("action_dim", self.config.action_dim)):
            if dim != len(contract.joints):
                raise ConfigError(
                    f"contract: found {len(contract.joints)} joints, expected the checkpoint's {name}={dim}"
                )
        if self.config.joints and self.config.joints != contract.joint_names:
            raise ConfigError(
                f"contract: found joints {', '.join(contract.joint_names)}; expected those that the checkpoint was "
                f"trained on, in their order: {', '.join(self.config.joints)} (joints in its config.json)"
            )

    # ---------------------------------------------------------------- properties

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.config.model.image_size

    @property
    def horizon(self) -> int:
        return self.config.model.action_horizon

    @property
    def transition_horizon(self) -> int:
        return self.config.model.transition_horizon

    @property
    def state_dim(self) -> int:
        return self.config.state_dim

    @property
    def action_dim(self) -> int:
        return self.config.action_dim

    @property
    def dim_mask(self) -> Tensor:
        """(model action_dim,) bool, True for the robot's own dimensions."""
        return torch.arange(self.config.model.action_dim, device=self._device) < self.config.action_dim

    # ---------------------------------------------------------------- E-Token

    def check_e_token(self, token: EToken, *, max_norm: float | None = None) -> None:
        """Raise :class:`InputError` if ``token`` is not one for this model.

        Args:
            max_norm: largest root mean square of a token vector; tokens known from training may be larger.
        """
        if self.e_token is None:
            raise InputError("E-Token: found one, expected none (this model has use_peft_prefix_token=False)")
        if token.model_digest != self.digest:
            raise InputError(f"E-Token: found model digest {token.model_digest[:12]!r}, expected {self.digest[:12]!r}")
        if token.data.shape != self.e_token.data.shape:
            raise InputError(f"E-Token: found shape {token.data.shape}, expected {self.e_token.data.shape}")
        if not np.isfinite(np.asarray(token.data, np.float32)).all():
            raise InputError("E-Token: found NaN or infinity, expected finite numbers")
        if max_norm is None:
            return
        norm, largest = float(_vector_sizes(token.data).max()), max(max_norm, self._largest_known)
        if norm > largest * (1 + 1e-4):
            raise InputError(f"E-Token: found norm {norm:.3g} (root mean square), expected at most {largest:.3g}")

    def set_e_token(self, token: EToken) -> None:
        """Use ``token`` from the next :meth:`infer` on; on an error the old one stays."""
        self.check_e_token(token)
        with torch.no_grad():
            self.model.peft_prefix_token.copy_(torch.from_numpy(np.ascontiguousarray(token.data, np.float32)))
        self.e_token = replace(token, data=np.array(token.data, np.float32))

    # ---------------------------------------------------------------- robot numbers ↔ model numbers

    def images_to_model(self, images: np.ndarray) -> Tensor:
        """(N, H, W, 3) uint8 RGB at the model's size → (N, 3, H, W) float in [-1, 1]."""
        tensor = torch.from_numpy(images).to(self._device).permute(0, 3, 1, 2)
        return tensor.float() / 255.0 * 2.0 - 1.0

    def state_to_model(self, state: np.ndarray) -> Tensor:
        """(..., state_dim) → (..., model action_dim) normalised and padded."""
        padded = pad_to_dim(self._state_norm.normalize(state), self.config.model.action_dim)
        return torch.from_numpy(padded).to(self._device)

    def actions_to_model(self, actions: np.ndarray, state: np.ndarray) -> Tensor:
        """(..., K, action_dim) and the state (..., state_dim) at their start → (..., K, model action_dim)."""
        relative = to_delta(actions, state, self._delta) if self._delta.any() else actions
        padded = pad_to_dim(self._action_norm.normalize(relative), self.config.model.action_dim)
        return torch.from_numpy(padded).to(self._device)

    def actions_from_model(self, actions: Tensor, state: np.ndarray) -> np.ndarray:
        """Inverse of :meth:`actions_to_model`."""
        values = self._action_norm.unnormalize(actions[..., : self.action_dim].float().cpu().numpy())
        return to_absolute(values, state, self._delta) if self._delta.any() else values

    def tokenize(self, prompt: str, state: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """Prompt ids and mask, each (1, max_token_len); ``state`` (state_dim,) in robot units."""
        normalised = None if state is None else self._state_norm.normalize(state)
        tokens, mask = self._prompt(prompt, normalised)
        if tokens.max() >= self.config.model.vocab_size:
            raise InputError(
                f"prompt: found token id {tokens.max()} in {prompt!r}, expected ids below the model's vocab_size="
                f"{self.config.model.vocab_size} (is this the checkpoint's tokenizer?)"
            )
        return torch.from_numpy(tokens)[None].to(self._device), torch.from_numpy(mask)[None].to(self._device)

    def inputs(self, observation: Observation) -> ModelInputs:
        """One observation as a batch of one.

        Raises:
            InputError: a missing camera, a wrong shape or dtype, NaN, or a prompt the tokenizer refuses.
        """
        try:
            state = np.asarray(observation.state, np.float32)
        except (TypeError, ValueError) as error:
            raise InputError(f"state: found {observation.state!r}, expected numbers") from error
        if state.shape != (self.state_dim,):
            raise InputError(f"state: found shape {state.shape}, expected ({self.state_dim},)")
        if not np.isfinite(state).all():
            raise InputError(f"state: found {state.tolist()}, expected finite numbers")
        images, masks = [], []
        for camera in self.config.cameras:
            if camera is None:
                image = np.zeros((*self.image_size, 3), np.uint8)
            elif camera not in observation.images:
                raise InputError(f"images: found cameras {sorted(observation.images)}, expected {camera!r} too")
            else:
                image = observation.images[camera]
                if not isinstance(image, np.ndarray):
                    raise InputError(f"images[{camera!r}]: found {type(image).__name__}, expected a numpy array")
                if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
                    raise InputError(f"images[{camera!r}]: found {image.shape} {image.dtype}, expected (H, W, 3) uint8")
                if image.shape[:2] != self.image_size:
                    image = resize_with_pad(image, *self.image_size)
            images.append(self.images_to_model(np.ascontiguousarray(image)[None]))
            masks.append(torch.tensor([camera is not None], device=self._device))
        tokens, token_mask = self.tokenize(observation.prompt, state)
        return ModelInputs(images, masks, tokens, token_mask, self.state_to_model(state)[None])

    # ---------------------------------------------------------------- inference

    def sampling_options(self, handover: Handover | None, state: np.ndarray) -> dict[str, Any]:
        """Options of ``Pi0.sample_actions``: steps, padding, and what ``handover`` asks of it.

        ``handover`` and ``state`` (B, state_dim) are of one batch.

        Raises:
            ConfigError: this checkpoint was not trained for the hand-over.
        """
        options: dict[str, Any] = {
            "num_steps": self.config.num_steps,
            "dim_mask": self.dim_mask if self.config.padding_masked else None,
        }
        if handover is None or handover.method not in ("prefix", "guidance"):
            return options
        previous = self.actions_to_model(handover.previous, state)
        if handover.method == "guidance":
            horizon = self.horizon
            weights = torch.from_numpy(handover.weights(horizon)).to(self._device)[:, None] * self.dim_mask
            target = F.pad(previous, (0, 0, 0, horizon - handover.overlap))
            return options | {"guidance": Guidance(target, weights)}
        if handover.delay > self.config.rtc_max_delay:
            raise ConfigError(
                f"chunk_handover: found prefix with {handover.delay} actions given, expected at most the checkpoint's "
                f"rtc_max_delay={self.config.rtc_max_delay}"
            )
        return options | {"committed": previous[:, : handover.delay]}

    def infer(self, observation: Observation, *, seed: int = 0, handover: Handover | None = None) -> ActionChunk:
        """Sample one chunk. The noise comes from ``seed`` and the observation's stamp, never from the clock.

        Args:
            handover: what the chunk is to continue; its ``previous`` begins at the observation's stamp.

        Raises:
            InputError: bad observation, or the model answered NaN.
        """
        begin = time.perf_counter()
        inputs = self.inputs(observation)
        generator = torch.Generator().manual_seed(_mix(seed, observation.stamp_ns))
        shape = (1, self.horizon, self.config.model.action_dim)
        noise = torch.randn(shape, generator=generator).to(self._device)
        state = np.asarray(observation.state, np.float32)
        batch = handover and replace(handover, previous=handover.previous[None])
        options = self.sampling_options(batch, state[None])
        sampler = self._sampler if self.fast and "guidance" not in options else self.model
        with self.turns.claimed():
            values = self.actions_from_model(sampler.sample_actions(inputs, noise, **options)[0], state)
        if handover is not None:
            values = handover.join(values)
        if not np.isfinite(values).all():
            raise InputError("sample_actions: found NaN or infinity in the actions, expected finite numbers")
        return ActionChunk(
            actions=values,
            dt=self.dt,
            stamp_ns=observation.stamp_ns,
            e_token_version=0 if self.e_token is None else self.e_token.version,
            inference_s=time.perf_counter() - begin,
        )


def _mix(seed: int, stamp_ns: int) -> int:
    return int(np.random.SeedSequence([seed, stamp_ns & (2**64 - 1)]).generate_state(1, np.uint64)[0] >> 1)


def _vector_sizes(tokens: np.ndarray) -> np.ndarray:
    """(..., T, W) → (..., T) root mean square of each token vector."""
    return np.sqrt(np.square(tokens, dtype=np.float64).mean(-1))
