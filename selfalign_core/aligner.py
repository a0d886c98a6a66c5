"""align(): a few optimiser steps on a shadow E-Token, and a paired test that decides whether it is committed.

Nothing but the E-Token changes, and it changes only on the shadow; the model's weights take no gradient at all.
Knows neither ROS nor where transitions come from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from selfalign_core.errors import ConfigError, InputError
from selfalign_core.model.gemma import PrefixCache
from selfalign_core.model.pi0 import AlignmentLosses as SampleLosses
from selfalign_core.model.pi0 import ModelInputs, Transitions
from selfalign_core.policy import Policy
from selfalign_core.types import TransitionBatch

REPORT_DRAWS = 4
"""Noise draws behind each reported loss."""

_MAX_ROWS = 128
"""Largest batch of one scoring pass; bounds memory, not results."""


@dataclass(frozen=True)
class AlignConfig:
    """How one :meth:`Aligner.align` call optimises and judges.

    ``steps`` optimiser steps of Adam at ``learning_rate`` on λ_p·L_perc + λ_d·L_dyn + λ_i·L_inv. ``trust_radius``
    bounds the distance from the current token, ``max_norm`` the norm, both per E-Token vector (root mean square over
    its width, so a limit means the same at every width). The shadow is committed only if, over ``guard_draws``
    common noise draws on the hold-out, mean difference + ``guard_sigmas`` standard errors < 0.
    ``time_budget_s`` stops the optimiser early (the guard still runs); None for no limit.
    """

    steps: int = 10
    learning_rate: float = 1e-2
    lambda_perc: float = 0.3
    lambda_dyn: float = 1.0
    lambda_inv: float = 3.0
    guard_draws: int = 16
    guard_sigmas: float = 2.0
    max_norm: float = 4.0
    trust_radius: float = 1.0
    time_budget_s: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("guard_draws", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"AlignConfig.{name}: found {value!r}, expected an integer >= {least}")
        for name in ("learning_rate", "max_norm", "trust_radius"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ConfigError(f"AlignConfig.{name}: found {getattr(self, name)}, expected a number > 0")
        for name in ("lambda_perc", "lambda_dyn", "lambda_inv", "guard_sigmas"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ConfigError(f"AlignConfig.{name}: found {getattr(self, name)}, expected a number >= 0")
        if self.lambda_perc == self.lambda_dyn == self.lambda_inv == 0:
            raise ConfigError("AlignConfig.lambda_perc, lambda_dyn, lambda_inv: found all 0, expected one > 0")
        if self.time_budget_s is not None and not self.time_budget_s > 0:
            raise ConfigError(f"AlignConfig.time_budget_s: found {self.time_budget_s}, expected > 0 or None")

    def weighted(self, losses: SampleLosses) -> Tensor:
        """(B,) weighted sum of per-sample losses."""
        return losses.weighted(self.lambda_perc, self.lambda_dyn, self.lambda_inv)


@dataclass(frozen=True)
class AlignLosses:
    """Mean losses of one token on one set of transitions; ``total`` is the weighted sum."""

    perception: float
    dynamics: float
    inverse_dynamics: float
    total: float


@dataclass(frozen=True)
class AlignResult:
    """What one call did. ``token`` (peft_num_tokens, width) float32 is the current token if not ``accepted``.

    ``difference_mean`` and ``difference_stderr``: paired hold-out difference (shadow - current) of the weighted
    loss. ``e_token_norm``: Euclidean norm of ``token``. ``gradient_norm``: of the last step. ``duration_s``: wall time.
    """

    accepted: bool
    reason: str
    token: np.ndarray
    steps: int
    fit_before: AlignLosses
    fit_after: AlignLosses
    holdout_before: AlignLosses
    holdout_after: AlignLosses
    difference_mean: float
    difference_stderr: float
    e_token_norm: float
    gradient_norm: float
    learning_rate: float
    duration_s: float


@dataclass(frozen=True)
class _Prepared:
    """Transitions as the alignment expert reads them, one prefix row per transition; nothing here depends on E."""

    prefix: PrefixCache
    transitions: Transitions

    def __len__(self) -> int:
        return len(self.transitions.state)

    def select(self, rows: Tensor) -> _Prepared:
        return _Prepared(self.prefix.select(rows), self.transitions.select(rows))


class Aligner:
    """Optimises the E-Token of ``policy``'s model on batches of transitions. Owned by one thread.

    ``prompt`` is read only with ``alignment_prefix="full"``.
    """

    def __init__(self, policy: Policy, *, prompt: str = ""):
        config = policy.config.model
        if not config.use_peft_prefix_token:
            raise ConfigError("Aligner: found use_peft_prefix_token=False, expected a model with an E-Token")
        if config.alignment_expert is None:
            raise ConfigError("Aligner: found alignment_expert=None, expected a model with an alignment expert")
        if config.alignment_prefix == "full" and not prompt:
            raise ConfigError("Aligner: found no prompt, expected one (alignment_prefix is 'full')")
        self.policy = policy
        self._prompt = prompt

    def align(
        self,
        token: np.ndarray,
        fit: TransitionBatch,
        holdout: TransitionBatch,
        config: AlignConfig,
        *,
        seed: int,
        should_stop: Callable[[], bool] | None = None,
    ) -> AlignResult:
        """Optimise a shadow of ``token`` on ``fit`` and judge it on the newer ``holdout``.

        Args:
            token: (peft_num_tokens, width) float32, the token in use; not modified.
            seed: every random number of the call follows from it.
            should_stop: asked before each step; True ends the optimiser as the time budget does.

        Raises:
            InputError: a batch is empty, of the wrong shape, or holds NaN.
        """
        begin = time.monotonic()
        current = self._checked_token(token)
        for name, batch in (("fit", fit), ("holdout", holdout)):
            self._check_batch(name, batch)
        generator = torch.Generator().manual_seed(seed)
        fit_data, holdout_data = self._prepare(fit), self._prepare(holdout)
        report_seed, guard_seed = (int(s) for s in torch.randint(2**62, (2,), generator=generator))

        shadow, steps, gradient_norm = current, 0, 0.0
        parameter = current.clone().requires_grad_(True)
        optimiser = torch.optim.Adam([parameter], lr=config.learning_rate)
        stopped = ""
        while steps < config.steps:
            if config.time_budget_s is not None and time.monotonic() - begin > config.time_budget_s:
                stopped = f"time budget of {config.time_budget_s * 1e3:.0f} ms spent after {steps} steps"
                break
            if should_stop is not None and should_stop():
                stopped = f"stopped after {steps} steps"
                break
            loss = config.weighted(self._losses(fit_data, parameter, generator)).mean()
            (parameter.grad,) = torch.autograd.grad(loss, [parameter])
            gradient_norm = float(parameter.grad.norm())
            if not math.isfinite(gradient_norm):
                stopped = f"gradient became {gradient_norm} after {steps} steps"
                break
            optimiser.step()
            with torch.no_grad():
                parameter.copy_(bounded(parameter, current, config))
            shadow, steps = parameter.detach().clone(), steps + 1

        fit_losses = [self._score(fit_data, t, REPORT_DRAWS, report_seed, config)[0] for t in (current, shadow)]
        before, per_before = self._score(holdout_data, current, config.guard_draws, guard_seed, config)
        after, per_after = self._score(holdout_data, shadow, config.guard_draws, guard_seed, config)
        difference = per_after - per_before
        mean = float(difference.mean())
        stderr = float(difference.std() / math.sqrt(len(difference))) if len(difference) > 1 else math.inf
        accepted, reason = _judge(mean, stderr, steps, config, stopped)
        result = shadow if accepted else current
        return AlignResult(
            accepted=accepted,
            reason=reason,
            token=result.cpu().numpy().copy(),
            steps=steps,
            fit_before=fit_losses[0],
            fit_after=fit_losses[1],
            holdout_before=before,
            holdout_after=after,
            difference_mean=mean,
            difference_stderr=stderr,
            e_token_norm=float(result.norm()),
            gradient_norm=gradient_norm,
            learning_rate=config.learning_rate,
            duration_s=time.monotonic() - begin,
        )

    # ---------------------------------------------------------------- internals

    def _checked_token(self, token: np.ndarray) -> Tensor:
        expected = tuple(self.policy.model.peft_prefix_token.shape)
        token = np.asarray(token, np.float32)
        if token.shape != expected:
            raise InputError(f"token: found shape {token.shape}, expected {expected}")
        if not np.isfinite(token).all():
            raise InputError("token: found NaN or infinity, expected finite numbers")
        return torch.from_numpy(token.copy()).to(self.policy.dim_mask.device)

    def _check_batch(self, name: str, batch: TransitionBatch) -> None:
        policy = self.policy
        if not len(batch):
            raise InputError(f"{name}: found no transitions, expected at least one")
        missing = [c for c in policy.config.cameras if c is not None and c not in batch.cameras]
        if missing:
            raise InputError(f"{name}: found cameras {batch.cameras}, expected {missing} too")
        if batch.frames.shape[2:4] != policy.image_size:
            raise InputError(f"{name}.frames: found {batch.frames.shape[2:4]} pixels, expected {policy.image_size}")
        if batch.frame_states.shape[1] != policy.state_dim:
            raise InputError(
                f"{name}.frame_states: found {batch.frame_states.shape[1]} values, expected {policy.state_dim}"
            )
        if batch.actions.shape[2] != policy.action_dim:
            raise InputError(f"{name}.actions: found {batch.actions.shape[2]} values, expected {policy.action_dim}")
        for field in ("frame_states", "actions"):
            if not np.isfinite(getattr(batch, field)).all():
                raise InputError(f"{name}.{field}: found NaN or infinity, expected finite numbers")

    @torch.no_grad()
    def _prepare(self, batch: TransitionBatch) -> _Prepared:
        """Vision features of each frame once, and the prefix of each transition; no gradient is ever needed here."""
        policy, model = self.policy, self.policy.model
        obs, nxt = torch.from_numpy(batch.obs_index), torch.from_numpy(batch.next_index)
        features, masks = [], []
        for camera in policy.config.cameras:
            if camera is None:
                frames = np.zeros((len(batch.frames), *policy.image_size, 3), np.uint8)
            else:
                frames = np.ascontiguousarray(batch.frames[:, batch.cameras.index(camera)])
            pixels = policy.images_to_model(frames)
            features.append(model.paligemma_with_expert.embed_image(pixels))
            masks.append(torch.full((len(batch),), camera is not None, device=pixels.device))
        obs, nxt = obs.to(pixels.device), nxt.to(pixels.device)
        state = batch.frame_states[batch.obs_index]
        obs_features = [f[obs] for f in features]
        if policy.config.model.alignment_prefix == "full":
            prompts = [policy.tokenize(self._prompt, s) for s in state]
            inputs = ModelInputs(
                [],
                masks,
                torch.cat([tokens for tokens, _ in prompts]),
                torch.cat([mask for _, mask in prompts]),
                policy.state_to_model(state),
            )
            prefix = model.prefix(inputs, image_features=obs_features)
        else:
            prefix = model.images_only_prefix(obs_features, masks)
        transitions = Transitions(
            state=policy.state_to_model(state),
            actions=policy.actions_to_model(batch.actions, state),
            next_obs=model.next_observation_features([f[nxt] for f in features]),
            next_obs_masks=model.next_observation_masks(masks),
        )
        return _Prepared(prefix, transitions)

    def _losses(self, data: _Prepared, token: Tensor, generator: torch.Generator) -> SampleLosses:
        noise = self.policy.model.draw_alignment_noise(data.transitions, generator)
        return self.policy.model.alignment_losses(
            data.prefix, data.transitions, noise, token=token, dim_mask=self.policy.dim_mask
        )

    @torch.no_grad()
    def _score(
        self, data: _Prepared, token: Tensor, draws: int, seed: int, config: AlignConfig
    ) -> tuple[AlignLosses, Tensor]:
        """Mean losses, and the weighted loss per transition (B,), over ``draws`` noise draws that ``seed`` fixes."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.arange(len(data), device=token.device).repeat(draws)
        parts = [self._losses(data.select(chunk), token, generator) for chunk in rows.split(_MAX_ROWS)]
        losses = SampleLosses(*(torch.cat(values) for values in zip(*(vars(p).values() for p in parts), strict=True)))
        total = config.weighted(losses)
        summary = AlignLosses(
            *(float(v.mean()) for v in (losses.perception, losses.dynamics, losses.inverse_dynamics, total))
        )
        return summary, total.reshape(draws, len(data)).mean(0)


def bounded(token: Tensor, current: Tensor, config: AlignConfig) -> Tensor:
    """``token`` pulled back into the trust region around ``current``, then under the norm limit.

    Both limits are root mean squares per token vector.
    """

    def clip(x: Tensor, limit: float) -> Tensor:
        rms = x.square().mean(-1, keepdim=True).sqrt()
        return x * (limit / rms.clamp(min=limit))

    return clip(current + clip(token - current, config.trust_radius), config.max_norm)


def _judge(mean: float, stderr: float, steps: int, config: AlignConfig, stopped: str) -> tuple[bool, str]:
    note = f" ({stopped})" if stopped else ""
    if steps == 0:
        return False, f"refused: no optimiser step was made{note}"
    upper = mean + config.guard_sigmas * stderr
    verdict = f"hold-out difference {mean:+.3g} ± {stderr:.2g} (standard error)"
    if math.isfinite(upper) and upper < 0:
        return True, f"accepted: {verdict}, upper bound {upper:+.3g} < 0{note}"
    return False, f"refused: {verdict}, upper bound {upper:+.3g}, expected < 0{note}"
