"""What a token is worth on a body: closed-loop success, error of its actions, self-supervised losses. Knows no arms."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch

from benchmarks.studies.adaptation.expert_fit import model_inputs
from benchmarks.studies.adaptation.lab import Lab
from selfalign_core.alignment.scoring import Scorer
from selfalign_core.policy import Policy
from selfalign_core.sim import TARGET_NAMES
from selfalign_core.study.processes import in_batches
from selfalign_core.study.rollout import EpisodeSpec, PolicyPlanner, RolloutConfig

_LOSS_DRAWS = 4


class Measure:
    """Common to all tokens on the body of ``lab``: frames, transitions, objects, poses and noise."""

    def __init__(self, lab: Lab):
        self.lab = lab

    def __call__(self, token: np.ndarray | None, policy: Policy | None = None) -> dict[str, Any]:
        """The figures of ``token`` (T, W), None for ``policy``'s own; losses are of the lab's own policy only.

        Returns:
            ``success`` and ``final_distance`` [m] per episode, ``action_error`` [rad] per frame, ``losses`` by name.
        """
        figures = self.rollouts(token, policy, self.lab.settings.episodes)
        figures["action_error"] = self.action_error(token, policy or self.lab.policy)
        if policy is None and token is not None:
            figures["losses"] = self.losses(token)
        return figures

    def rollouts(self, token: np.ndarray | None, policy: Policy | None, count: int) -> dict[str, Any]:
        """``count`` episodes; targets take turns."""
        lab, policy = self.lab, policy or self.lab.policy
        first = (lab.settings.seed * 1000 + lab.index) * 1000
        episodes = [
            EpisodeSpec(lab.body, first + i, TARGET_NAMES[(lab.index + i) % len(TARGET_NAMES)], token=token)
            for i in range(count)
        ]
        results = in_batches(PolicyPlanner(policy), episodes, RolloutConfig(joints=lab.joints))
        return {
            "success": [result.success for result in results],
            "final_distance": [round(result.final_distance, 5) for result in results],
        }

    @torch.inference_mode()
    def action_error(self, token: np.ndarray | None, policy: Policy) -> list[float]:
        """Mean of abs(chunk - expert's chunk) [rad] per held-out frame; frames take turns in their prompts."""
        frames = self.lab.held_out
        targets = np.arange(len(frames)) % len(TARGET_NAMES)
        generator = torch.Generator().manual_seed(self.lab.index)
        noise = torch.randn(len(frames), policy.horizon, policy.config.model.action_dim, generator=generator)
        chunks = policy.model.sample_actions(
            model_inputs(policy, frames, targets),
            noise,
            num_steps=policy.config.num_steps,
            token=None if token is None else torch.from_numpy(token),
            dim_mask=policy.dim_mask if policy.config.padding_masked else None,
        )
        actions = policy.codec.actions_from_model(chunks, frames.states)
        wanted = frames.chunks[np.arange(len(frames)), targets, : policy.horizon]
        return np.abs(actions - wanted).mean((1, 2)).round(6).tolist()

    def losses(self, token: np.ndarray) -> dict[str, float]:
        """Mean losses on the held-out transitions."""
        return vars(self._scorer.summary(self._prepared, torch.from_numpy(token), _LOSS_DRAWS, self.lab.index)).copy()

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self.lab.policy, self.lab.settings.align.weights)

    @cached_property
    def _prepared(self) -> Any:
        return self._scorer.prepare(self.lab.held_out_transitions)
