"""π0 and π0.5 with E-Token and alignment expert: embeddings, the four losses, and sampling.

Reads top to bottom: inputs → prefix → suffixes → losses → ``sample_actions``. It knows nothing of robots,
normalisation, optimisers or ROS. Numbers equal openpi's PyTorch model (checked by golden vectors).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfalign_core.errors import InputError
from selfalign_core.model import flow_matching as flow
from selfalign_core.model.config import GemmaSize, ModelConfig
from selfalign_core.model.gemma import PrefixCache
from selfalign_core.model.layout import AlignmentLayout
from selfalign_core.model.masks import (
    block_starts,
    make_att_2d_masks,
    make_position_ids,
    suffix_over_prefix_mask,
)
from selfalign_core.model.paligemma import ExpertName, PaliGemmaWithExperts


@dataclass(frozen=True)
class ModelInputs:
    """One batch of observations as the model reads them.

    ``images``: per camera (B, 3, H, W) float in [-1, 1]; ``image_masks``: per camera (B,) bool, False = absent;
    ``tokens``, ``token_masks``: (B, L) prompt ids and mask; ``state``: (B, state_dim) normalised, padded.
    """

    images: Sequence[Tensor]
    image_masks: Sequence[Tensor]
    tokens: Tensor
    token_masks: Tensor
    state: Tensor


@dataclass(frozen=True)
class Transitions:
    """What the three self-supervised losses read, besides the prefix.

    ``state``: (B, action_dim) normalised state at t. ``actions``: (B, K, action_dim) normalised executed actions
    from t to t+k. ``next_obs``: (B, N, text width) from :meth:`Pi0.next_observation_features`.
    ``next_obs_masks``: (B, N) bool, False for an absent camera. ``action_masks``: (B, K) bool, False for padding.
    """

    state: Tensor
    actions: Tensor
    next_obs: Tensor
    next_obs_masks: Tensor | None = None
    action_masks: Tensor | None = None

    def select(self, rows: Tensor | slice) -> Transitions:
        """The given batch rows (int64, or a slice)."""
        return Transitions(
            state=self.state[rows],
            actions=self.actions[rows],
            next_obs=self.next_obs[rows],
            next_obs_masks=None if self.next_obs_masks is None else self.next_obs_masks[rows],
            action_masks=None if self.action_masks is None else self.action_masks[rows],
        )


@dataclass(frozen=True)
class Guidance:
    """Actions that sampling is drawn to (inference-time real-time chunking, arXiv 2506.07339).

    ``target``: (B, horizon, action_dim). ``weights``: broadcastable to it, in 0..1, how much each action is drawn.
    """

    target: Tensor
    weights: Tensor


@dataclass(frozen=True)
class AlignmentNoise:
    """Noise and times of one alignment pass: ``state``, ``next_obs``, ``actions`` like their targets, ``time`` (B,)."""

    state: Tensor
    next_obs: Tensor
    actions: Tensor
    time: Tensor


@dataclass(frozen=True)
class AlignmentLosses:
    """Mean squared velocity errors per sample, each (B,)."""

    perception: Tensor
    dynamics: Tensor
    inverse_dynamics: Tensor

    def weighted(self, lambda_perc: float, lambda_dyn: float, lambda_inv: float) -> Tensor:
        """(B,) λ_p·L_perc + λ_d·L_dyn + λ_i·L_inv."""
        return lambda_perc * self.perception + lambda_dyn * self.dynamics + lambda_inv * self.inverse_dynamics


@dataclass(frozen=True)
class Losses:
    """Losses of one training pass, scalars or (B,): ``total`` = action + weighted alignment losses."""

    total: Tensor
    action: Tensor
    perception: Tensor
    dynamics: Tensor
    inverse_dynamics: Tensor


def masked_mean(values: Tensor, *masks: Tensor | None) -> Tensor:
    """(B,) mean of ``values`` (B, S, D) over S and D where every given mask, broadcastable to values, is True."""
    weight = torch.ones_like(values)
    for mask in masks:
        if mask is not None:
            weight = weight * mask
    return (values * weight).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp(min=1)


class Pi0(nn.Module):
    """π0 (``config.pi05`` False: state is a suffix token) or π0.5 (state in the prompt, time through adaRMS)."""

    next_obs_mean: Tensor
    next_obs_std: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        width = config.action_expert.width
        self.paligemma_with_expert = PaliGemmaWithExperts(config)
        self.action_in_proj = nn.Linear(config.action_dim, width)
        self.action_out_proj = nn.Linear(width, config.action_dim)
        if config.pi05:
            self.time_mlp_in = nn.Linear(width, width)
            self.time_mlp_out = nn.Linear(width, width)
        else:
            self.state_proj = nn.Linear(config.action_dim, width)
            self.action_time_mlp_in = nn.Linear(2 * width, width)
            self.action_time_mlp_out = nn.Linear(width, width)
        if config.use_peft_prefix_token:
            self._init_e_token()
        if config.alignment_expert is not None:
            self._init_alignment(config.alignment_expert)

    # ---------------------------------------------------------------- E-Token

    def _init_e_token(self) -> None:
        config = self.config
        shape = (config.peft_num_tokens, config.action_expert.width)
        self.peft_prefix_token = nn.Parameter(torch.empty(shape))
        # RMSNorm of an all-zero token has a gradient hundreds of times larger than at unit scale; the learned type
        # embedding, one per expert, keeps a zero E-Token at unit scale.
        self.peft_type_action = nn.Parameter(torch.empty(shape))
        if config.alignment_expert is not None:
            align_width = config.alignment_expert.width
            self.peft_type_alignment = nn.Parameter(torch.empty(config.peft_num_tokens, align_width))
            if align_width != shape[1]:
                self.peft_alignment_proj = nn.Linear(shape[1], align_width, bias=False)
        self.reset_e_token()

    def reset_e_token(self, *, only: Collection[str] | None = None, device: str | torch.device | None = None) -> None:
        """Start E-Token and type embeddings afresh (``only`` those named), on ``device`` if given."""
        for name in ("peft_prefix_token", "peft_type_action", "peft_type_alignment"):
            if not hasattr(self, name) or (only is not None and name not in only):
                continue
            old = getattr(self, name)
            zero = name == "peft_prefix_token" and self.config.peft_init == "zeros"
            value = torch.zeros(old.shape) if zero else torch.randn(old.shape)
            setattr(self, name, nn.Parameter(value.to(device or old.device)))

    @property
    def num_e_tokens(self) -> int:
        """Tokens that E adds to each suffix."""
        return self.config.peft_num_tokens if self.config.use_peft_prefix_token else 0

    def make_peft_token(self, batch: int, *, expert: ExpertName = "action", token: Tensor | None = None) -> Tensor:
        """The E-Token as an expert's suffix reads it, (batch, peft_num_tokens, expert width).

        ``token`` replaces the shared parameter: (peft_num_tokens, width) for all samples or (batch,
        peft_num_tokens, width), one per sample, as in training over a bank of bodies.
        """
        if not self.config.use_peft_prefix_token:
            raise InputError("make_peft_token: this model has no E-Token (use_peft_prefix_token is False)")
        if token is None:
            token = self.peft_prefix_token
        expected = tuple(self.peft_prefix_token.shape)
        if tuple(token.shape) not in (expected, (batch, *expected)):
            raise InputError(f"E-Token: found shape {tuple(token.shape)}, expected {expected} or {(batch, *expected)}")
        if expert == "alignment":
            if hasattr(self, "peft_alignment_proj"):
                token = self.peft_alignment_proj(token)
            token = token + self.peft_type_alignment
        else:
            token = token + self.peft_type_action
        return token if token.ndim == 3 else token[None].expand(batch, -1, -1)

    # ---------------------------------------------------------------- prefix

    def embed_images(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Projected image tokens per camera, each (B, patches, text width)."""
        return [self.paligemma_with_expert.embed_image(image) for image in images]

    def embed_prefix(self, inputs: ModelInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Prefix embeddings (B, P, width), pad masks (B, P) and block-start flags (B, P), all False."""
        embs, pad_masks, _ = self.paligemma_with_expert.embed_prefix(
            self.embed_images(inputs.images), inputs.image_masks, inputs.tokens, inputs.token_masks
        )
        return embs, pad_masks, torch.zeros_like(pad_masks)

    def prefix(self, inputs: ModelInputs, *, image_features: Sequence[Tensor] | None = None) -> PrefixCache:
        """Keys and values of the full prefix. ``image_features`` skips the vision tower if already computed."""
        self.check_inputs(inputs, image_features)
        features = self.embed_images(inputs.images) if image_features is None else image_features
        embedded = self.paligemma_with_expert.embed_prefix(
            features, inputs.image_masks, inputs.tokens, inputs.token_masks
        )
        return self.paligemma_with_expert.run_prefix(*embedded)[0]

    def images_only_prefix(self, image_features: Sequence[Tensor], image_masks: Sequence[Tensor]) -> PrefixCache:
        """Keys and values of a prefix of images alone, which cannot know the prompt or a state written into it."""
        embedded = self.paligemma_with_expert.embed_prefix(image_features, image_masks, None, None)
        return self.paligemma_with_expert.run_prefix(*embedded)[0]

    def alignment_prefix(
        self, prefix: PrefixCache, image_features: Sequence[Tensor], image_masks: Sequence[Tensor]
    ) -> PrefixCache:
        """The prefix that the alignment path may read, as ``config.alignment_prefix`` says."""
        if self.config.alignment_prefix == "full":
            return prefix
        if self.config.restrict_image_to_language:
            return prefix.images_only()
        return self.images_only_prefix(image_features, image_masks)

    # ---------------------------------------------------------------- suffixes

    def embed_suffix(
        self, state: Tensor, noisy_actions: Tensor, time: Tensor, *, token: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Action suffix: ``[E] [state] [noisy actions]`` for π0, ``[E] [noisy actions]`` for π0.5.

        Args:
            state: (B, action_dim), unused by π0.5. noisy_actions: (B, horizon, action_dim).
            time: (B,), or (B, horizon): one flow time per action, for chunks whose first actions are already clean.
            token: E-Token in place of the parameter, see :meth:`make_peft_token`.

        Returns:
            embeddings (B, S, width), pad masks (B, S), block-start flags (B, S) and the conditioning of the adaptive
            norms, (B, width) or per token (B, S, width), None for π0.
        """
        batch, horizon = noisy_actions.shape[:2]
        if tuple(time.shape) not in ((batch,), (batch, horizon)):
            raise InputError(f"time: found shape {tuple(time.shape)}, expected ({batch},) or ({batch}, {horizon})")
        actions = self.action_in_proj(noisy_actions)
        if self.config.pi05 and time.ndim == 2:  # E has the time of the chunk's noisy end
            time = torch.cat([time[:, -1:].expand(-1, self.num_e_tokens), time], dim=1)
        time_emb = flow.time_embedding(time, actions.shape[-1])
        embs, blocks = [], []
        if self.config.use_peft_prefix_token:
            embs.append(self.make_peft_token(batch, token=token))
            blocks.append(self.config.peft_num_tokens)
        if self.config.pi05:
            cond = F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(time_emb))))
        else:
            cond = None
            embs.append(self.state_proj(state)[:, None])
            blocks.append(1)
            time_emb = time_emb if time.ndim == 2 else time_emb[:, None].expand_as(actions)
            actions = torch.cat([actions, time_emb], dim=2)
            actions = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(actions)))
        embs.append(actions)
        blocks.append(horizon)
        suffix = torch.cat(embs, dim=1)
        pad_masks = torch.ones(suffix.shape[:2], dtype=torch.bool, device=suffix.device)
        att_masks = block_starts(*blocks, device=suffix.device)[None].expand(batch, -1)
        return suffix, pad_masks, att_masks, cond

    def predict_velocity(
        self,
        prefix: PrefixCache,
        state: Tensor,
        noisy_actions: Tensor,
        time: Tensor,
        *,
        token: Tensor | None = None,
    ) -> Tensor:
        """One pass of the action expert: velocity (B, horizon, action_dim) of the actions, float32."""
        return self.action_out_proj(self.run_suffix(prefix, state, noisy_actions, time, token=token))

    def run_suffix(
        self,
        prefix: PrefixCache,
        state: Tensor,
        noisy_actions: Tensor,
        time: Tensor,
        *,
        token: Tensor | None = None,
    ) -> Tensor:
        """Final-normed hidden states of the action tokens, (B, horizon, width) float32."""
        embs, pad_masks, att_masks, cond = self.embed_suffix(state, noisy_actions, time, token=token)
        offset = prefix.pad_masks.sum(dim=1, keepdim=True)
        hidden = self.paligemma_with_expert.run_expert(
            "action",
            embs,
            offset + make_position_ids(pad_masks),
            suffix_over_prefix_mask(prefix.pad_masks, pad_masks, make_att_2d_masks(pad_masks, att_masks)),
            prefix,
            cond,
        )
        return hidden[:, -noisy_actions.shape[1] :].float()

    # ---------------------------------------------------------------- alignment

    def _init_alignment(self, expert: GemmaSize) -> None:
        config, width, features = self.config, expert.width, self.config.text.width
        self.alignment_in_proj = nn.ModuleDict(
            {
                "perception": nn.Linear(config.action_dim, width),
                "dynamics_actions": nn.Linear(config.action_dim, width),
                "dynamics_next_obs": nn.Linear(features, width),
                "inverse_next_obs": nn.Linear(features, width),
                "inverse_actions": nn.Linear(config.action_dim, width),
            }
        )
        self.alignment_out_proj = nn.ModuleDict(
            {
                "perception": nn.Linear(width, config.action_dim),
                "dynamics": nn.Linear(width, features),
                "inverse": nn.Linear(width, config.action_dim),
            }
        )
        self.alignment_time_mlp_in = nn.Linear(width if config.pi05 else 2 * width, width)
        self.alignment_time_mlp_out = nn.Linear(width, width)
        # Scale of the next-observation features, set by training; flow matching wants targets of about unit scale.
        self.register_buffer("next_obs_mean", torch.zeros(features))
        self.register_buffer("next_obs_std", torch.ones(features))

    def pool_features(self, image_features: Sequence[Tensor]) -> Tensor:
        """Average-pool each camera's (B, patches, width) tokens: (B, cameras * feature_tokens, width), no gradient.

        The grid of pooled tokens is the most square one with ``feature_tokens_per_camera`` cells.
        """
        count = self.config.feature_tokens_per_camera
        rows = max(r for r in range(1, int(count**0.5) + 1) if count % r == 0)
        pooled = []
        for tokens in image_features:
            side = round(tokens.shape[1] ** 0.5)
            grid = tokens.detach().float().transpose(1, 2).unflatten(2, (side, side))
            pooled.append(F.adaptive_avg_pool2d(grid, (rows, count // rows)).flatten(2).transpose(1, 2))
        return torch.cat(pooled, dim=1)

    def next_observation_features(self, image_features: Sequence[Tensor]) -> Tensor:
        """Targets of the dynamics task: pooled, standardised features of the next images, always detached."""
        return (self.pool_features(image_features) - self.next_obs_mean) / self.next_obs_std

    def next_observation_masks(self, image_masks: Sequence[Tensor]) -> Tensor:
        """(B, cameras * feature_tokens) bool from per-camera masks (B,)."""
        count = self.config.feature_tokens_per_camera
        return torch.cat([mask[:, None].expand(-1, count) for mask in image_masks], dim=1)

    def alignment_layout(self, transitions: Transitions) -> AlignmentLayout:
        """Where each segment of the alignment suffix lies, inferred from the inputs."""
        return AlignmentLayout(self.num_e_tokens, transitions.actions.shape[1], transitions.next_obs.shape[1])

    def embed_alignment_suffix(
        self, transitions: Transitions, noise: AlignmentNoise, *, token: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Alignment suffix ``[E] [perception] [dynamics] [inverse dynamics]``.

        Perception sees noise in place of the state; dynamics reads clean actions and noisy next-observation
        features; inverse dynamics reads clean features and noisy actions. One time per sample for all tasks.

        Returns:
            embeddings (B, S, width), pad masks (B, S), the block mask (S, S) and the conditioning (B, width) of the
            adaptive norms, None for π0.
        """
        batch = self._check_transitions(transitions, noise)
        layout, project = self.alignment_layout(transitions), self.alignment_in_proj
        time_emb = flow.time_embedding(noise.time, self.alignment_time_mlp_out.out_features)
        cond = None
        if self.config.pi05:
            hidden = F.silu(self.alignment_time_mlp_in(time_emb))
            cond = F.silu(self.alignment_time_mlp_out(hidden))

        def noisy(emb: Tensor) -> Tensor:
            if self.config.pi05:
                return emb
            fused = torch.cat([emb, time_emb[:, None].expand_as(emb)], dim=2)
            return self.alignment_time_mlp_out(F.silu(self.alignment_time_mlp_in(fused)))

        def at_time(clean: Tensor, noise_: Tensor) -> Tensor:
            return flow.add_noise(clean, noise_, noise.time)

        suffix = layout.assemble(
            e=self.make_peft_token(batch, expert="alignment", token=token) if layout.e_tokens else None,
            perception=noisy(project["perception"](at_time(transitions.state, noise.state)[:, None])),
            dynamics_actions=project["dynamics_actions"](transitions.actions),
            dynamics_next_obs=noisy(project["dynamics_next_obs"](at_time(transitions.next_obs, noise.next_obs))),
            inverse_next_obs=project["inverse_next_obs"](transitions.next_obs),
            inverse_actions=noisy(project["inverse_actions"](at_time(transitions.actions, noise.actions))),
        )
        pad_masks = torch.ones(batch, layout.length, dtype=torch.bool, device=suffix.device)
        if transitions.action_masks is not None:
            pad_masks[:, layout.dynamics_actions] = transitions.action_masks
            pad_masks[:, layout.inverse_actions] = transitions.action_masks
        if transitions.next_obs_masks is not None:
            pad_masks[:, layout.dynamics_next_obs] = transitions.next_obs_masks
            pad_masks[:, layout.inverse_next_obs] = transitions.next_obs_masks
        return suffix, pad_masks, layout.attention_mask(suffix.device), cond

    def predict_alignment(
        self,
        prefix: PrefixCache,
        transitions: Transitions,
        noise: AlignmentNoise,
        *,
        token: Tensor | None = None,
        dynamics: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """One pass of the alignment expert over a prefix that it may read.

        Without ``dynamics`` its block, half of the suffix, is left out: no other token sees it.

        Returns:
            velocities of the state (B, 1, action_dim), of the next-observation features (B, N, text width; None without
            ``dynamics``) and of the executed actions (B, K, action_dim), float32.
        """
        embs, pad_masks, block_mask, cond = self.embed_alignment_suffix(transitions, noise, token=token)
        layout = self.alignment_layout(transitions)
        slots = layout.slots(dynamics=dynamics, device=embs.device)
        if not dynamics:
            embs, pad_masks, block_mask = embs[:, slots], pad_masks[:, slots], block_mask[slots][:, slots]
        offset = prefix.pad_masks.sum(dim=1, keepdim=True)
        real = pad_masks[:, None, :] & pad_masks[:, :, None]
        read = [torch.arange(s.start, s.stop, device=embs.device) for s in layout.read_out(dynamics=dynamics)]
        hidden = self.paligemma_with_expert.run_expert(
            "alignment",
            embs,
            # Positions are slots, so a token that is padded or left out moves nothing.
            offset + slots,
            suffix_over_prefix_mask(prefix.pad_masks, pad_masks, block_mask & real),
            prefix,
            cond,
            torch.searchsorted(slots, torch.cat(read)),
        ).float()
        state, *next_obs, actions = hidden.split([len(rows) for rows in read], dim=1)
        out = self.alignment_out_proj
        return out["perception"](state), out["dynamics"](next_obs[0]) if next_obs else None, out["inverse"](actions)

    def alignment_losses(
        self,
        prefix: PrefixCache,
        transitions: Transitions,
        noise: AlignmentNoise,
        *,
        token: Tensor | None = None,
        dim_mask: Tensor | None = None,
        dynamics: bool = True,
    ) -> AlignmentLosses:
        """The three self-supervised losses per sample. ``dim_mask`` (action_dim,) bool leaves padded dimensions out.

        Without ``dynamics`` that of dynamics is 0, not computed.
        """
        state, next_obs, actions = self.predict_alignment(prefix, transitions, noise, token=token, dynamics=dynamics)
        per_action = None if transitions.action_masks is None else transitions.action_masks[..., None]
        per_feature = None if transitions.next_obs_masks is None else transitions.next_obs_masks[..., None]
        return AlignmentLosses(
            perception=masked_mean(
                (state - flow.target_velocity(transitions.state, noise.state)[:, None]).square(), dim_mask
            ),
            dynamics=masked_mean(
                (next_obs - flow.target_velocity(transitions.next_obs, noise.next_obs)).square(), per_feature
            )
            if next_obs is not None
            else torch.zeros_like(noise.time),
            inverse_dynamics=masked_mean(
                (actions - flow.target_velocity(transitions.actions, noise.actions)).square(),
                per_action,
                dim_mask,
            ),
        )

    def draw_alignment_noise(self, transitions: Transitions, generator: torch.Generator) -> AlignmentNoise:
        """Independent noise per task and one time per sample, from ``generator`` (on its own device)."""
        device = transitions.state.device

        def normal(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator, device=generator.device).to(device)

        return AlignmentNoise(
            state=normal(transitions.state),
            next_obs=normal(transitions.next_obs),
            actions=normal(transitions.actions),
            time=flow.sample_time(len(transitions.state), generator=generator, device=generator.device).to(device),
        )

    # ---------------------------------------------------------------- training

    def action_loss(
        self,
        prefix: PrefixCache,
        state: Tensor,
        actions: Tensor,
        noise: Tensor,
        time: Tensor,
        *,
        token: Tensor | None = None,
    ) -> Tensor:
        """Squared velocity error per element, (B, horizon, action_dim), no reduction (openpi's training loss)."""
        x_t = flow.add_noise(actions, noise, time)
        velocity = self.predict_velocity(prefix, state, x_t, time, token=token)
        return (flow.target_velocity(actions, noise) - velocity).square()

    def forward(
        self,
        inputs: ModelInputs,
        actions: Tensor,
        *,
        noise: Tensor,
        time: Tensor,
        action_masks: Tensor | None = None,
        dim_mask: Tensor | None = None,
        executed: Tensor | None = None,
        executed_masks: Tensor | None = None,
        next_images: Sequence[Tensor] | None = None,
        next_image_masks: Sequence[Tensor] | None = None,
        alignment_noise: AlignmentNoise | torch.Generator | None = None,
        token: Tensor | None = None,
        image_features: Sequence[Tensor] | None = None,
        next_image_features: Sequence[Tensor] | None = None,
        reduction: Literal["mean", "none"] = "mean",
    ) -> Losses:
        """One joint pass of the three experts.

        Args:
            inputs: observation at t. actions: (B, horizon, action_dim) clean chunk for the action expert.
            noise, time: like ``actions``, and (B,) or (B, horizon), see :meth:`embed_suffix`.
            action_masks: (B, horizon) bool, False for padded steps. dim_mask: (action_dim,) bool, False for padding.
            executed: (B, K, action_dim) actions really executed from t to t+k; with ``next_images`` (per camera,
                at t+k) it turns the alignment losses on, otherwise they are zero.
            alignment_noise: the noise, or a generator to draw it from.
            token: E-Token per sample, see :meth:`make_peft_token`.
            image_features, next_image_features: outputs of :meth:`embed_images` computed earlier (frozen tower) in
                place of ``inputs.images`` and ``next_images``, which are not read then.
            reduction: ``none`` keeps the losses per sample.

        Returns:
            ``L_total = L_action + λ_p·L_perc + λ_d·L_dyn + λ_i·L_inv`` and each part, scalars or (B,).
        """
        batch, config = len(inputs.state), self.config
        _check_shape("actions", actions, (batch, *actions.shape[1:2], config.action_dim))
        _check_shape("noise", noise, tuple(actions.shape))
        if action_masks is not None:
            _check_shape("action_masks", action_masks, tuple(actions.shape[:2]))
        if dim_mask is not None:
            _check_shape("dim_mask", dim_mask, (config.action_dim,))
        if image_features is None:
            self.check_inputs(inputs)
        features = self.embed_images(inputs.images) if image_features is None else image_features
        prefix = self.prefix(inputs, image_features=features)
        per_step = None if action_masks is None else action_masks[..., None]
        action = masked_mean(
            self.action_loss(prefix, inputs.state, actions, noise, time, token=token), per_step, dim_mask
        )
        if executed is None:
            zero = torch.zeros_like(action)
            return _reduced(Losses(action, action, zero, zero, zero), reduction)
        with torch.no_grad():
            if next_image_features is None and next_images is not None:
                next_image_features = self.embed_images(next_images)
            if next_image_features is None or alignment_noise is None:
                raise InputError("forward: found executed actions, expected next_images and alignment_noise with them")
            for index, tokens in enumerate(next_image_features):
                _check_shape(
                    f"next_images[{index}] as tokens", tokens, (batch, config.vision.num_patches, config.text.width)
                )
            next_obs = self.next_observation_features(next_image_features)
        transitions = Transitions(
            state=inputs.state,
            actions=executed,
            next_obs=next_obs,
            next_obs_masks=None if next_image_masks is None else self.next_observation_masks(next_image_masks),
            action_masks=executed_masks,
        )
        if isinstance(alignment_noise, torch.Generator):
            alignment_noise = self.draw_alignment_noise(transitions, alignment_noise)
        losses = self.alignment_losses(
            self.alignment_prefix(prefix, features, inputs.image_masks),
            transitions,
            alignment_noise,
            token=token,
            dim_mask=dim_mask,
        )
        weighted = losses.weighted(config.lambda_perc, config.lambda_dyn, config.lambda_inv)
        return _reduced(
            Losses(action + weighted, action, losses.perception, losses.dynamics, losses.inverse_dynamics), reduction
        )

    # ---------------------------------------------------------------- inference

    @torch.no_grad()
    def sample_actions(
        self,
        inputs: ModelInputs,
        noise: Tensor,
        *,
        num_steps: int = 10,
        token: Tensor | None = None,
        committed: Tensor | None = None,
        guidance: Guidance | None = None,
        dim_mask: Tensor | None = None,
    ) -> Tensor:
        """Clean actions (B, horizon, action_dim) by ``num_steps`` Euler steps from ``noise`` of that shape.

        The prefix runs once; each step reads its keys and values. ``committed`` (B, d, action_dim): the chunk's first
        d actions, already decided; the rest is denoised around them. It wants a model trained for it (training-time
        real-time chunking, arXiv 2512.05964). ``guidance`` draws the actions towards others, with any model, by a
        backward pass through the action expert in each step. ``dim_mask`` (action_dim,) bool: False for padded
        dimensions that were left out of the training loss; they are known to be 0, so their velocity is the noise, as
        it was in training.
        """
        expected = (len(inputs.state), self.config.action_horizon, self.config.action_dim)
        if tuple(noise.shape) != expected:
            raise InputError(f"noise: found shape {tuple(noise.shape)}, expected {expected}")
        if committed is not None and tuple(committed.shape) != tuple(noise[:, : committed.shape[1]].shape):
            raise InputError(
                f"committed: found shape {tuple(committed.shape)}, expected at most the first actions of {expected}"
            )
        if guidance is not None:
            _check_shape("guidance.target", guidance.target, expected)
        if num_steps < 1:
            raise InputError(f"num_steps: found {num_steps}, expected >= 1")
        prefix = self.prefix(inputs)

        def velocity_at(x_t: Tensor, times: Tensor) -> Tensor:
            velocity = self.predict_velocity(prefix, inputs.state, x_t, times, token=token)
            return velocity if dim_mask is None else torch.where(dim_mask, velocity, noise)

        dt = torch.tensor(-1.0 / num_steps, dtype=torch.float32, device=noise.device)
        x_t = noise
        for time in flow.sampling_times(num_steps):
            times = torch.full((len(noise),), time, dtype=torch.float32, device=noise.device)
            if committed is not None:
                x_t = torch.cat([committed, x_t[:, committed.shape[1] :]], dim=1)
                times = times[:, None].repeat(1, x_t.shape[1])
                times[:, : committed.shape[1]] = 0.0
            if guidance is None:
                velocity = velocity_at(x_t, times)
            else:
                velocity = _guided(velocity_at, x_t, times, flow.guidance_weight(time, num_steps), guidance)
            x_t = x_t + dt * velocity
        return x_t if committed is None else torch.cat([committed, x_t[:, committed.shape[1] :]], dim=1)

    # ---------------------------------------------------------------- housekeeping

    def to_precision(self, precision: Literal["float32", "bfloat16"]) -> Pi0:
        """Cast the transformer stacks; projections in and out, and the E-Token, are float32 (as openpi)."""
        self.paligemma_with_expert.to_precision(precision)
        return self.keep_float32_parts()

    def keep_float32_parts(self) -> Pi0:
        """Cast to float32 what openpi keeps so; a file may hold everything in bfloat16."""
        self.paligemma_with_expert.keep_float32_parts()
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            if not name.startswith("paligemma_with_expert."):
                tensor.data = tensor.data.float()
        return self

    def _check_transitions(self, transitions: Transitions, noise: AlignmentNoise) -> int:
        """The batch size, or :class:`InputError` naming what has the wrong shape."""
        config, batch = self.config, len(transitions.state)
        actions, tokens = transitions.actions.shape[1:2], transitions.next_obs.shape[1:2]
        expected = {
            "state": (batch, config.action_dim),
            "actions": (batch, *actions, config.action_dim),
            "next_obs": (batch, *tokens, config.text.width),
        }
        for name, shape in expected.items():
            _check_shape(f"transitions.{name}", getattr(transitions, name), shape)
            _check_shape(f"alignment noise of {name}", getattr(noise, name), shape)
        _check_shape("alignment noise's time", noise.time, (batch,))
        for name, shape in (("action_masks", (batch, *actions)), ("next_obs_masks", (batch, *tokens))):
            if (mask := getattr(transitions, name)) is not None:
                _check_shape(f"transitions.{name}", mask, shape)
                _check_bool(f"transitions.{name}", mask)
        return batch

    def check_inputs(self, inputs: ModelInputs, image_features: Sequence[Tensor] | None = None) -> None:
        """Raise :class:`InputError` naming the input, what was found and what was expected.

        With ``image_features`` those are checked and ``inputs.images`` is not read.
        """
        config, batch = self.config, inputs.state.shape[0]
        images, name = inputs.images, "images"
        shape: tuple[int, ...] = (batch, 3, *config.image_size)
        if image_features is not None:
            images, name = image_features, "image_features"
            shape = (batch, config.vision.num_patches, config.text.width)
        if not images:
            raise InputError(f"{name}: found no camera, expected at least one")
        if len(images) != len(inputs.image_masks):
            raise InputError(f"image_masks: found {len(inputs.image_masks)}, expected one per camera ({len(images)})")
        for index, (image, mask) in enumerate(zip(images, inputs.image_masks, strict=True)):
            if not image.is_floating_point():
                raise InputError(f"{name}[{index}]: found dtype {image.dtype}, expected a float type")
            _check_shape(f"{name}[{index}]", image, shape)
            _check_shape(f"image_masks[{index}]", mask, (batch,))
            _check_bool(f"image_masks[{index}]", mask)
        _check_shape("state", inputs.state, (batch, config.action_dim))
        if not inputs.state.is_floating_point():
            raise InputError(f"state: found dtype {inputs.state.dtype}, expected float")
        _check_bool("token_masks", inputs.token_masks)
        if inputs.tokens.ndim != 2 or inputs.tokens.shape[0] != batch:
            raise InputError(f"tokens: found shape {tuple(inputs.tokens.shape)}, expected ({batch}, prompt length)")
        if inputs.tokens.shape[1] > config.max_token_len:
            raise InputError(
                f"tokens: found a prompt of {inputs.tokens.shape[1]} tokens, expected at most {config.max_token_len}"
            )
        _check_shape("token_masks", inputs.token_masks, tuple(inputs.tokens.shape))
        if inputs.tokens.is_floating_point():
            raise InputError(f"tokens: found dtype {inputs.tokens.dtype}, expected an integer type")


def _guided(
    velocity_at: Callable[[Tensor, Tensor], Tensor], x_t: Tensor, times: Tensor, weight: float, guidance: Guidance
) -> Tensor:
    """Velocity at ``x_t`` corrected so that the actions it leads to come nearer to the guide: pseudo-inverse guidance
    (ΠGDM), eq. 2 and 3 of arXiv 2506.07339, where velocity and time have the opposite sign.
    """
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_()
        velocity = velocity_at(x_t, times)
        denoised = x_t - times.reshape(len(x_t), -1, 1) * velocity
        error = guidance.weights * (guidance.target - denoised.detach())
        (correction,) = torch.autograd.grad(denoised, x_t, error)
    return velocity.detach() - weight * correction


def _reduced(losses: Losses, reduction: Literal["mean", "none"]) -> Losses:
    return losses if reduction == "none" else Losses(*(value.mean() for value in vars(losses).values()))


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise InputError(f"{name}: found shape {tuple(tensor.shape)}, expected {expected}")


def _check_bool(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.bool:
        raise InputError(f"{name}: found dtype {tensor.dtype}, expected torch.bool")
