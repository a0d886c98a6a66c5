"""A policy: observation in, action chunk out. Model, codec and the E-Token in use, in one object.

Owned by one thread. Knows neither ROS nor the clock; ``stamp_ns`` is passed through and seeds the noise.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from selfalign_core.errors import ConfigError, InputError
from selfalign_core.files import write_text
from selfalign_core.model.config import ModelConfig
from selfalign_core.model.device_turns import DeviceTurns
from selfalign_core.model.fast import FastSampler
from selfalign_core.model.pi0 import Guidance, Pi0
from selfalign_core.model.torch_state import exclusive, seeded
from selfalign_core.policy.checkpoint import load_model, model_digest, read_bank, save_model
from selfalign_core.policy.codec import Codec
from selfalign_core.policy.config import PolicyConfig
from selfalign_core.policy.source import Source, directory_of
from selfalign_core.policy.statistics_files import save_norm_stats
from selfalign_core.policy.tokenizer import load_tokenizer, word_tokenizer
from selfalign_core.policy.transforms import NormStats
from selfalign_core.policy.untrained import TINY_WORDS, UNTRAINED_SEED, is_untrained
from selfalign_core.robot.chunking import Handover
from selfalign_core.robot.contract import RobotContract
from selfalign_core.robot.types import ActionChunk, EToken, Observation, token_norm

Precision = Literal["float32", "bfloat16"]


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
        self._device = next(model.parameters()).device
        self.codec = Codec(config, stats, tokenizer, device=self._device)
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
        self.turns = DeviceTurns.of(self._device)
        """Claimed by :meth:`infer` while it computes."""
        self.e_token: EToken | None = None
        if config.model.use_peft_prefix_token:
            token = model.peft_prefix_token.detach().float().cpu().numpy().copy()
            self.e_token = EToken(token, 0, config.embodiment, self.digest)
            known = token[None] if bank is None else np.concatenate([token[None], bank.float().cpu().numpy()])
            self._largest_known = max(map(token_norm, known))

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
        choices: dict[str, Precision | None] = {
            "auto": "bfloat16" if torch.device(device).type == "cuda" else None,
            "float32": "float32",
            "bfloat16": "bfloat16",
        }
        if precision not in choices:
            raise ConfigError(f"precision: found {precision!r}, expected auto, float32 or bfloat16")
        wanted = choices[precision]
        if is_untrained(checkpoint):
            return cls.untrained(contract, device=device, precision=wanted)
        source = Source.read(directory_of(checkpoint)).fit(contract)
        return cls._of(source, dt=contract.dt, device=device, precision=wanted)

    @classmethod
    def untrained(cls, contract: RobotContract, *, device: str = "cpu", precision: Precision | None = None) -> Policy:
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
        tokenizer: str | Path | None = None,
        device: str = "cpu",
        precision: Precision | None = None,
        initialise: Sequence[str] = (),
        **foreign: Any,
    ) -> Policy:
        """Load a checkpoint directory: SelfAlign's own, openpi's (PyTorch) or LeRobot's.

        A SelfAlign directory holds everything. For the others ``foreign`` goes to
        :func:`selfalign_core.policy.foreign.read_foreign` (cameras, joints, delta actions, model options).

        Args:
            dt: seconds between two actions.
            tokenizer: ``tokenizer.json`` or its directory, where it is not in ``path``.
            precision: ``float32`` or ``bfloat16``; as in the file if None.
            initialise: parts to start fresh if the file lacks them: ``"e_token"``, ``"alignment"``.
        """
        source = Source.read(path, **foreign)
        return cls._of(
            source, dt=dt, tokenizer=tokenizer, device=device, precision=precision, initialise=tuple(initialise)
        )

    @classmethod
    def _of(
        cls,
        source: Source,
        *,
        dt: float,
        tokenizer: str | Path | None = None,
        device: str,
        precision: Precision | None,
        initialise: tuple[str, ...] = (),
    ) -> Policy:
        text = load_tokenizer(tokenizer or source.path)
        model = load_model(source.path, source.config.model, device=device, initialise=initialise)
        digest = model_digest(model)
        if precision is not None:
            model.to_precision(precision)
        bank = read_bank(source.path) if source.config.bank_keys else None
        return cls(model, source.config, text, source.stats, dt=dt, bank=bank, digest=digest)

    def save(self, path: str | Path) -> None:
        """Write a SelfAlign checkpoint directory: weights, config, statistics and tokenizer."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        save_model(self.model, path / "model.safetensors", bank=self.bank)
        if self.codec.stats:
            save_norm_stats(path / "norm_stats.json", self.codec.stats)
        self.codec.tokenizer.save(str(path / "tokenizer.json"))
        write_text(path / "config.json", json.dumps(self.config.to_dict(), indent=2))

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
        norm, largest = token_norm(token.data), max(max_norm, self._largest_known)
        if norm > largest * (1 + 1e-4):
            raise InputError(f"E-Token: found norm {norm:.3g} (root mean square), expected at most {largest:.3g}")

    def set_e_token(self, token: EToken) -> None:
        """Use ``token`` from the next :meth:`infer` on; on an error the old one stays."""
        self.check_e_token(token)
        with torch.no_grad():
            self.model.peft_prefix_token.copy_(torch.from_numpy(np.ascontiguousarray(token.data, np.float32)))
        self.e_token = replace(token, data=np.array(token.data, np.float32))

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
        previous = self.codec.actions_to_model(handover.previous, state)
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
        inputs = self.codec.observations_to_model([observation])
        generator = torch.Generator().manual_seed(_mix(seed, observation.stamp_ns))
        shape = (1, self.horizon, self.config.model.action_dim)
        noise = torch.randn(shape, generator=generator).to(self._device)
        state = np.asarray(observation.state, np.float32)
        batch = handover and replace(handover, previous=handover.previous[None])
        options = self.sampling_options(batch, state[None])
        sampler = self._sampler if self.fast and "guidance" not in options else self.model
        with self.turns.claimed():
            values = self.codec.actions_from_model(sampler.sample_actions(inputs, noise, **options)[0], state)
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
