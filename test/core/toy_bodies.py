"""A robot with one joint, a hidden sag and a hidden encoder offset, and a small policy trained on eight of them.

The image shows where the joint is, the encoder reads position plus offset, and every move sags by the same amount. So
perception needs the offset, and dynamics, inverse dynamics and right actions need the sag: an E-Token that knows the
body lowers every loss, and nothing else in the input tells which body it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from small_models import small_config
from torch import Tensor, nn

from selfalign_core.model.config import GemmaSize
from selfalign_core.model.flow_matching import sample_time
from selfalign_core.model.pi0 import Losses, ModelInputs, Pi0
from selfalign_core.policy import Policy
from selfalign_core.policy.config import PolicyConfig
from selfalign_core.policy.tokenizer import word_tokenizer
from selfalign_core.robot.buffer import TransitionBuffer
from selfalign_core.robot.types import TransitionBatch

BODIES = [(sag, offset) for offset in (-0.9, -0.3, 0.3, 0.9) for sag in (0.8, -0.8)]
STEPS, BATCH = 300, 32
STEP_NS = 100_000_000  # of one command; a transition takes two


def pictures(position: np.ndarray) -> np.ndarray:
    """(N,) → (N, 28, 28, 3) uint8: brightness and colour follow the position."""
    colour = 0.35 * np.stack([position, -position, 0.5 * position], axis=1)
    pixels = np.round((colour + 1) * 127.5).astype(np.uint8)
    return np.broadcast_to(pixels[:, None, None], (len(position), 28, 28, 3)).copy()


@dataclass(frozen=True)
class Moves:
    """N independent moves of one joint, all (N, ...) float32; sag and offset are hidden from the policy."""

    position: np.ndarray
    next_position: np.ndarray
    state: np.ndarray  # (N, 1) what the encoder reads
    commands: np.ndarray  # (N, 2, 1) executed
    expert: np.ndarray  # (N, 2, 1) towards the goal
    goal: np.ndarray  # (N,) 0 left, 1 right


def moves(sag: np.ndarray, offset: np.ndarray, rng: np.random.Generator) -> Moves:
    position = rng.uniform(-1, 1, len(sag)).astype(np.float32)
    commands = rng.uniform(-1, 1, (len(sag), 2)).astype(np.float32)
    goal = rng.integers(0, 2, len(sag))
    to_goal = np.where(goal == 1, 0.5, -0.5) - position - sag
    return Moves(
        position=position,
        next_position=(position + 0.5 * commands.sum(1) + sag).astype(np.float32),
        state=(position + offset)[:, None].astype(np.float32),
        commands=commands[..., None],
        expert=(to_goal[:, None] * np.array([0.5, 1.0]))[..., None].astype(np.float32),
        goal=goal,
    )


def transitions_of(body: tuple[float, float], count: int, seed: int) -> TransitionBatch:
    """Moves of one body with pauses between them, so that no two transitions overlap."""
    sag, offset = (np.full(count, value) for value in body)
    m = moves(sag, offset, np.random.default_rng(seed))
    both = np.concatenate([m.position, m.next_position])
    return TransitionBatch(
        cameras=("front",),
        frames=pictures(both)[:, None],
        frame_states=np.concatenate([m.state, m.next_position[:, None] + offset[:, None]]).astype(np.float32),
        frame_stamps=np.concatenate([np.arange(count) * 3, np.arange(count) * 3 + 2]).astype(np.int64) * STEP_NS,
        obs_index=np.arange(count, dtype=np.int64),
        next_index=np.arange(count, 2 * count, dtype=np.int64),
        actions=m.commands,
    )


def recording_of(
    body: tuple[float, float], pairs: int, seed: int, *, scale: float = 1.0, start_ns: int = 0
) -> TransitionBatch:
    """``2 * pairs`` transitions: three commands in a row make two that overlap by half; then a pause.

    ``scale``: how lively the motion is, 1 as in training.
    """
    sag, offset = body
    rng = np.random.default_rng(seed)
    commands = rng.uniform(-scale, scale, (pairs, 3))
    steps = 0.5 * commands + 0.5 * sag
    begin = rng.uniform(np.maximum(-1, -1 - steps[:, 0]), np.minimum(1, 1 - steps[:, 0]))  # both begin within ±1
    position = np.concatenate([begin[:, None], begin[:, None] + steps.cumsum(1)], axis=1).astype(np.float32).ravel()
    obs = (4 * np.arange(pairs)[:, None] + np.arange(2)).ravel()
    return TransitionBatch(
        cameras=("front",),
        frames=pictures(position)[:, None],
        frame_states=(position + offset)[:, None].astype(np.float32),
        frame_stamps=start_ns + (6 * np.arange(pairs)[:, None] + np.arange(4)).ravel() * STEP_NS,
        obs_index=obs,
        next_index=obs + 2,
        actions=np.stack([commands[:, :2], commands[:, 1:]], axis=1).reshape(-1, 2, 1).astype(np.float32),
    )


def untrained_policy() -> Policy:
    size = GemmaSize(width=32, depth=2, mlp_dim=64, num_heads=2, num_kv_heads=1, head_dim=16)
    narrow = replace(size, width=8)  # few features, so that their noise is soon learnt and what moves them shows
    words = word_tokenizer(["left", "right"])
    config = small_config(
        text=narrow, action_expert=size, alignment_expert=size, action_dim=2, action_horizon=2, transition_horizon=2,
        feature_tokens_per_camera=1, restrict_image_to_language=True, max_token_len=3,
        vocab_size=words.get_vocab_size(), lambda_dyn=2.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Pi0(config)
    spread = torch.from_numpy(pictures(np.linspace(-2.8, 2.8, 200))).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        features = model.pool_features(model.embed_images([spread])).flatten(0, 1)
        model.next_obs_mean.copy_(features.mean(0))
        model.next_obs_std.copy_(features.std(0) + 1e-4)
    policy_config = PolicyConfig(model=config, cameras=("front",), state_dim=1, action_dim=1, embodiment="toy")
    return Policy(model, policy_config, words, {}, dt=0.1)


def losses_of(policy: Policy, m: Moves, token: Tensor, generator: torch.Generator) -> Losses:
    """All losses of one joint pass over ``m``."""
    images = [policy.codec.images_to_model(pictures(x)) for x in (m.position, m.next_position)]
    tokens, masks = policy.codec.prompts_to_model([("left", "right")[g] for g in m.goal], m.state)
    chunk, count = policy.codec.actions_to_model(m.expert, m.state), len(m.goal)
    inputs = ModelInputs(
        [images[0]], [torch.ones(count, dtype=torch.bool)], tokens, masks, policy.codec.state_to_model(m.state)
    )
    return policy.model(
        inputs,
        chunk,
        noise=torch.randn(chunk.shape, generator=generator),
        time=sample_time(count, generator=generator),
        dim_mask=policy.dim_mask,
        executed=policy.codec.actions_to_model(m.commands, m.state),
        next_images=[images[1]],
        alignment_noise=generator,
        token=token,
    )


@dataclass(frozen=True)
class Trained:
    """A trained policy, its bank of tokens (bodies, 1, width) in the order of ``BODIES``, and every step's losses."""

    policy: Policy
    bank: np.ndarray
    history: dict[str, list[float]] = field(default_factory=dict)

    def policy_with_bank(self, rows: list[int] | None = None, *, deployed: int = 0) -> Policy:
        """The policy as it is shipped: with its bank (only ``rows`` of it) and the token of body ``deployed``."""
        rows = list(range(len(BODIES))) if rows is None else rows
        keys = tuple(f"body {row}" for row in rows)
        config, bank = replace(self.policy.config, bank_keys=keys), torch.from_numpy(self.bank[rows])
        policy = Policy(self.policy.model, config, self.policy.codec.tokenizer, {}, dt=self.policy.dt, bank=bank)
        policy.e_token = replace(policy.e_token, data=self.bank[deployed].copy())
        return policy

    def loss(self, body: tuple[float, float], token: np.ndarray, *, seed: int = 0) -> dict[str, float]:
        """Mean losses of ``token`` on 256 fresh moves of ``body``; equal seeds give equal moves, noise and times."""
        m = moves(np.full(256, body[0]), np.full(256, body[1]), np.random.default_rng(seed))
        with torch.no_grad():
            losses = losses_of(self.policy, m, torch.from_numpy(token), torch.Generator().manual_seed(seed))
        return {name: float(value) for name, value in vars(losses).items()}


def train() -> Trained:
    """Some hundred steps of Adam on the joint loss, one token per body."""
    policy = untrained_policy()
    model, rng, generator = policy.model, np.random.default_rng(0), torch.Generator().manual_seed(0)
    bank = nn.Parameter(torch.randn(len(BODIES), *model.peft_prefix_token.shape, generator=generator))
    weights = [p for n, p in model.named_parameters() if "vision_tower" not in n and "multi_modal" not in n]
    for weight in weights:
        weight.requires_grad_(True)
    rates = (3e-3, 1e-2)
    optimiser = torch.optim.Adam([{"params": weights}, {"params": [bank]}])
    table, history = np.array(BODIES), {}
    for step in range(STEPS):
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * min(1, (step + 1) / 30) * (1 - 0.9 * step / STEPS)
        body = rng.integers(len(BODIES), size=BATCH)
        losses = losses_of(policy, moves(*table[body].T, rng), bank[torch.from_numpy(body)], generator)
        optimiser.zero_grad()
        losses.total.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        for name, value in vars(losses).items():
            history.setdefault(name, []).append(float(value.detach()))
    optimiser.zero_grad()
    model.requires_grad_(False)
    with torch.no_grad():
        model.peft_prefix_token.copy_(bank.mean(0))
    trained = Policy(model, policy.config, policy.codec.tokenizer, {}, dt=policy.dt)
    return Trained(trained, bank.detach().numpy(), history)


class Robot:
    """A toy robot whose body can be changed: it moves, its buffer fills, time passes."""

    def __init__(self, body: tuple[float, float], *, seed: int = 0):
        self.body, self.now_ns = body, 0
        self._seeds = iter(np.random.SeedSequence(seed).generate_state(10_000).tolist())
        self._buffer = TransitionBuffer(
            cameras=("front",), image_size=(28, 28), state_dim=1, action_dim=1, horizon=2, dt_ns=STEP_NS, capacity=400
        )

    def move(self, pairs: int, *, scale: float = 1.0) -> None:
        """Twice as many transitions as ``pairs``."""
        batch = recording_of(self.body, pairs, next(self._seeds), scale=scale, start_ns=self.now_ns)
        for stamp, frame, state in zip(batch.frame_stamps, batch.frames, batch.frame_states, strict=True):
            self._buffer.add_frame(int(stamp), {"front": frame[0]}, state)
        for row, actions in zip(batch.obs_index, batch.actions, strict=True):
            for step, action in enumerate(actions):
                self._buffer.add_action(int(batch.frame_stamps[row]) + step * STEP_NS, action)
        self.now_ns += 6 * pairs * STEP_NS

    def newest(self, count: int, since_ns: int, stride: int = 1) -> TransitionBatch:
        return self._buffer.newest(count, since_ns=since_ns, stride=stride)
