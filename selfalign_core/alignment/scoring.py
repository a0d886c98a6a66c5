"""The self-supervised losses of many tokens on the same transitions, under common noise.

What does not depend on the token (vision features, the prefix's keys and values, targets) is computed once, in
:meth:`Scorer.prepare`. Knows nothing of stages, thresholds or budgets: a ``look`` is called before every pass of the
model, and what it raises ends the work.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from selfalign_core.alignment.frame_cache import MAX_FRAMES, Encoded, FrameCache, Look, never
from selfalign_core.errors import ConfigError, InputError
from selfalign_core.model import flow_matching as flow
from selfalign_core.model.gemma import PrefixCache
from selfalign_core.model.pi0 import AlignmentLosses as SampleLosses
from selfalign_core.model.pi0 import AlignmentNoise, ModelInputs, Transitions
from selfalign_core.policy import Policy
from selfalign_core.robot.types import TransitionBatch

_MAX_ROWS = 64
"""Rows of one pass; more do not fit a core's cache. Bounds memory and time, not results."""


@dataclass(frozen=True)
class AlignLosses:
    """Mean losses of one token on one set of transitions; ``total`` is the weighted sum."""

    perception: float
    dynamics: float
    inverse_dynamics: float
    total: float


@dataclass(frozen=True)
class Prepared:
    """Transitions as the alignment expert reads them; nothing here depends on E."""

    prefix: PrefixCache
    transitions: Transitions

    def __len__(self) -> int:
        return len(self.transitions.state)

    def select(self, rows: Tensor | slice) -> Prepared:
        return Prepared(self.prefix.select(rows), self.transitions.select(rows))


class Scorer:
    """Losses λ_p·L_perc + λ_d·L_dyn + λ_i·L_inv of E-Tokens for ``policy``'s model. Owned by one thread.

    ``weights``: λ_p, λ_d, λ_i.
    ``prompt`` is read only with ``alignment_prefix="full"``. ``frames``: keeps what was made of frames; by default
    nothing is kept.

    Raises:
        ConfigError: the model has no E-Token or no alignment expert.
    """

    def __init__(
        self,
        policy: Policy,
        weights: tuple[float, float, float],
        *,
        prompt: str = "",
        frames: FrameCache | None = None,
    ):
        config = policy.config.model
        if not config.use_peft_prefix_token:
            raise ConfigError("alignment: found use_peft_prefix_token=False, expected a model with an E-Token")
        if config.alignment_expert is None:
            raise ConfigError("alignment: found alignment_expert=None, expected a model with an alignment expert")
        if config.alignment_prefix == "full" and not prompt:
            raise ConfigError("alignment: found no prompt, expected one (alignment_prefix is 'full')")
        self.policy = policy
        self.weights = weights
        self._prompt = prompt
        self._frames = frames or FrameCache(policy)

    # ---------------------------------------------------------------- what comes in

    def check(self, batch: TransitionBatch) -> None:
        """Raise :class:`InputError` if ``batch`` does not fit the policy or holds NaN."""
        policy = self.policy
        missing = [c for c in policy.config.cameras if c is not None and c not in batch.cameras]
        if missing:
            raise InputError(f"transitions: found cameras {batch.cameras}, expected {missing} too")
        for field, found, expected in (
            ("frames: pixels", batch.frames.shape[2:4], policy.image_size),
            ("frame_states: values", batch.frame_states.shape[1:], (policy.state_dim,)),
            ("actions: values", batch.actions.shape[1:], (policy.transition_horizon, policy.action_dim)),
        ):
            if found != expected:
                raise InputError(f"transitions.{field}: found {found}, expected {expected}")
        for field in ("frame_states", "actions"):
            if not np.isfinite(getattr(batch, field)).all():
                raise InputError(f"transitions.{field}: found NaN or infinity, expected finite numbers")

    @torch.no_grad()
    def prepare(self, batch: TransitionBatch, look: Look = never) -> Prepared:
        """Vision features of each frame once, and the prefix of each transition."""
        policy, model = self.policy, self.policy.model
        device = policy.dim_mask.device
        obs, nxt = (torch.from_numpy(index).to(device) for index in (batch.obs_index, batch.next_index))
        frames = self._frames.encode(batch.frames, batch.cameras, look)
        state = batch.frame_states[batch.obs_index]
        transitions = Transitions(
            state=policy.codec.state_to_model(state),
            actions=policy.codec.actions_to_model(batch.actions, state),
            next_obs=model.next_observation_features([f[nxt] for f in frames.features]),
            next_obs_masks=model.next_observation_masks([m[nxt] for m in frames.masks]),
        )
        seen = frames.select(obs)
        return Prepared(seen.prefix or self._full_prefix(seen, state, look), transitions)

    def _full_prefix(self, frames: Encoded, state: np.ndarray, look: Look) -> PrefixCache:
        policy, parts = self.policy, []
        for rows in torch.arange(len(state)).split(MAX_FRAMES):
            look()
            seen, states = frames.select(rows.to(policy.dim_mask.device)), state[rows]
            prompts = policy.codec.prompts_to_model([self._prompt] * len(states), states)
            inputs = ModelInputs([], list(seen.masks), *prompts, policy.codec.state_to_model(states))
            parts.append(policy.model.prefix(inputs, image_features=seen.features))
        return PrefixCache.joined(parts)

    # ---------------------------------------------------------------- what comes out

    def noise(self, data: Prepared, draws: int, seed: int) -> AlignmentNoise:
        """``draws`` noise draws of each transition; row ``d * len(data) + i`` is draw d of transition i.

        A function of ``seed`` alone. The times of a transition's draws are spread evenly over their distribution,
        which takes most of the luck out of a mean over draws.
        """
        count = len(data)
        generator = torch.Generator().manual_seed(seed)
        rows = torch.arange(count, device=data.transitions.state.device).repeat(draws)
        noise = self.policy.model.draw_alignment_noise(data.transitions.select(rows), generator)
        draw, transition = torch.arange(draws)[:, None], torch.arange(count)[None]
        stratum = (draw + transition) % draws
        uniform = (stratum + torch.rand(draws, count, generator=generator)) / draws
        return replace(noise, time=flow.time_from_uniform(uniform.flatten()).to(noise.time))

    def losses(
        self,
        data: Prepared,
        noise: AlignmentNoise,
        token: Tensor,
        rows: Tensor | None = None,
        *,
        dynamics: bool = True,
    ) -> SampleLosses:
        """Losses (R,) of ``token`` (T, W) or (R, T, W) at the given ``rows`` (R,) of ``noise``, all of them if None.

        Without ``dynamics`` that of dynamics is 0.
        """
        if rows is None:
            rows = torch.arange(len(noise.time), device=noise.time.device)
        chosen = data.select(rows % len(data))
        noise = AlignmentNoise(*(value[rows] for value in vars(noise).values()))
        return self.policy.model.alignment_losses(
            chosen.prefix, chosen.transitions, noise, token=token, dim_mask=self.policy.dim_mask, dynamics=dynamics
        )

    def weighted(self, losses: SampleLosses) -> Tensor:
        """(R,) the weighted sum that alignment minimises."""
        return losses.weighted(*self.weights)

    @torch.inference_mode()
    def each(
        self,
        data: Prepared,
        noise: AlignmentNoise,
        tokens: Tensor,
        rows: Tensor,
        look: Look = never,
        *,
        dynamics: bool = True,
    ) -> SampleLosses:
        """The three losses, (C, R), of ``tokens`` (C, T, W), each at the same ``rows`` (R,) of ``noise``."""
        count, parts = len(tokens), []
        row = rows.repeat_interleave(count)
        for part in torch.arange(count * len(rows), device=rows.device).split(_MAX_ROWS):
            look()
            parts.append(self.losses(data, noise, tokens[part % count], row[part], dynamics=dynamics))
        return SampleLosses(
            *(
                torch.cat(values).reshape(len(rows), count).T.clone()
                for values in zip(*(vars(p).values() for p in parts), strict=True)
            )
        )

    def score(self, data: Prepared, noise: AlignmentNoise, tokens: Tensor, rows: Tensor, look: Look = never) -> Tensor:
        """(C, R) their weighted sum."""
        return self.weighted(self.each(data, noise, tokens, rows, look))

    def rank(self, data: Prepared, noise: AlignmentNoise, tokens: Tensor, rows: Tensor, look: Look = never) -> Tensor:
        """The same without dynamics, which is half of the work; with it if no other loss has a weight."""
        alone = not (self.weights[0] or self.weights[2])
        return self.weighted(self.each(data, noise, tokens, rows, look, dynamics=alone))

    def samples(self, data: Prepared, token: Tensor, draws: int, seed: int, look: Look = never) -> SampleLosses:
        """Losses (draws * len(data),) of ``token`` (T, W), in the order of the rows of :meth:`noise`."""
        noise = self.noise(data, draws, seed)
        losses = self.each(data, noise, token[None], torch.arange(len(noise.time), device=token.device), look)
        return SampleLosses(*(values[0] for values in vars(losses).values()))

    def summary(self, data: Prepared, token: Tensor, draws: int, seed: int, look: Look = never) -> AlignLosses:
        """Mean losses of ``token`` (T, W) over ``draws`` draws."""
        losses = self.samples(data, token, draws, seed, look)
        values = (losses.perception, losses.dynamics, losses.inverse_dynamics, self.weighted(losses))
        return AlignLosses(*(float(value.mean()) for value in values))
