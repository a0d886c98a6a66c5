"""The model at many random sizes against its rules written out slowly: float64 numpy, no cache, one token sequence.

The reference concatenates prefix, action suffix and alignment suffix and lets them attend jointly layer by layer under
one mask, filled in token by token from the table of who may see whom. It shares no code with the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from small_models import random_actions, random_inputs, random_transitions, randomise

from selfalign_core.model.config import GemmaSize, ModelConfig, VisionSize
from selfalign_core.model.pi0 import AlignmentNoise, ModelInputs, Pi0, Transitions

TOLERANCE = 5e-5
PALI = "paligemma_with_expert.paligemma.model."

# Who may see whom inside one embodiment of the sequence; the prefix is added by the caller.
SEES = {
    "image": {"image"},
    "language": {"image", "language"},
    "action E": {"action E"},
    "state": {"action E", "state"},
    "action": {"action E", "state", "action"},
    "alignment E": {"alignment E"},
    "perception": {"alignment E", "perception"},
    "dynamics": {"alignment E", "perception", "dynamics"},
    "inverse": {"alignment E", "perception", "inverse"},
}


@dataclass
class Stream:
    """Tokens that one stack of weights transforms."""

    weights: str
    tokens: np.ndarray  # (B, S, width)
    segments: list[str]
    valid: np.ndarray  # (B, S)
    positions: np.ndarray  # (B, S)
    first_layer: int
    depth: int
    cond: np.ndarray | None = None


def silu(x):
    return x / (1 + np.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rotate(x, positions, head_dim):
    """``x`` (B, S, heads, head_dim): pair (i, i + head_dim / 2) turns by position (B, S) / 10000^(2 i / head_dim)."""
    half = head_dim // 2
    out = np.empty_like(x)
    for i in range(half):
        angle = positions[:, :, None] / 10000 ** (2 * i / head_dim)
        a, b = x[..., i], x[..., half + i]
        out[..., i] = a * np.cos(angle) - b * np.sin(angle)
        out[..., half + i] = b * np.cos(angle) + a * np.sin(angle)
    return out


class Reference:
    def __init__(self, model: Pi0):
        self.c = model.config
        self.w = {name: tensor.detach().double().numpy() for name, tensor in model.state_dict().items()}

    def linear(self, x, name):
        bias = self.w.get(name + ".bias")
        return x @ self.w[name + ".weight"].T + (0 if bias is None else bias)

    def layer_norm(self, x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return scaled * self.w[name + ".weight"] + self.w[name + ".bias"]

    def rms_norm(self, x, name, cond):
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        if cond is None:
            return x * (1 + self.w[name + ".weight"]), 1.0
        scale, shift, gate = np.split(self.linear(cond, name + ".dense")[:, None], 3, axis=-1)
        return x * (1 + scale) + shift, gate

    def image_tokens(self, image):
        v, prefix = self.c.vision, PALI + "vision_tower.vision_model."
        side, p = v.image_size // v.patch_size, v.patch_size
        kernel = self.w[prefix + "embeddings.patch_embedding.weight"].reshape(v.width, -1)
        rows = []
        for i in range(side):
            for j in range(side):
                patch = image[:, :, i * p : (i + 1) * p, j * p : (j + 1) * p].reshape(len(image), -1)
                rows.append(patch @ kernel.T + self.w[prefix + "embeddings.patch_embedding.bias"])
        x = np.stack(rows, 1) + self.w[prefix + "embeddings.position_embedding.weight"]
        for i in range(v.depth):
            layer, head_dim = f"{prefix}encoder.layers.{i}.", v.width // v.num_heads
            y = self.layer_norm(x, layer + "layer_norm1")
            q, k, s = (self.linear(y, f"{layer}self_attn.{n}_proj") for n in "qkv")
            heads = []
            for h in range(v.num_heads):
                part = slice(h * head_dim, (h + 1) * head_dim)
                scores = q[..., part] @ k[..., part].transpose(0, 2, 1) / np.sqrt(head_dim)
                heads.append(softmax(scores) @ s[..., part])
            x = x + self.linear(np.concatenate(heads, -1), layer + "self_attn.out_proj")
            y = gelu_tanh(self.linear(self.layer_norm(x, layer + "layer_norm2"), layer + "mlp.fc1"))
            x = x + self.linear(y, layer + "mlp.fc2")
        return self.linear(self.layer_norm(x, prefix + "post_layernorm"), PALI + "multi_modal_projector.linear")

    def time_embedding(self, time, width):
        periods = np.geomspace(0.004, 4.0, width // 2)
        angle = 2 * np.pi * time.astype(np.float64)[:, None] / periods
        # The model rounds the embedding to float32.
        return np.concatenate([np.sin(angle), np.cos(angle)], 1).astype(np.float32).astype(np.float64)

    def fused(self, emb, time_emb, name):
        both = np.concatenate([emb, np.broadcast_to(time_emb[:, None], emb.shape)], -1)
        return self.linear(silu(self.linear(both, name + "_in")), name + "_out")

    def conditioning(self, time_emb, name):
        return silu(self.linear(silu(self.linear(time_emb, name + "_in")), name + "_out"))

    def prefix(self, inputs: ModelInputs, *, language: bool) -> Stream:
        parts, segments, valid = [], [], []
        for image, mask in zip(inputs.images, inputs.image_masks, strict=True):
            tokens = self.image_tokens(image.double().numpy())
            parts.append(tokens)
            segments += ["image"] * tokens.shape[1]
            valid.append(np.repeat(mask.numpy()[:, None], tokens.shape[1], 1))
        if language:
            table = self.w[PALI + "language_model.embed_tokens.weight"]
            parts.append(table[inputs.tokens.numpy()] * np.sqrt(self.c.text.width))
            segments += ["language"] * inputs.tokens.shape[1]
            valid.append(inputs.token_masks.numpy())
        valid = np.concatenate(valid, 1)
        return Stream(
            PALI + "language_model.", np.concatenate(parts, 1), segments, valid, valid.cumsum(1) - 1, 0,
            self.c.text.depth,
        )  # fmt: skip

    def e_token(self, batch, expert):
        token = self.w["peft_prefix_token"]
        if expert == "alignment" and "peft_alignment_proj.weight" in self.w:
            token = token @ self.w["peft_alignment_proj.weight"].T
        return np.repeat((token + self.w[f"peft_type_{expert}"])[None], batch, 0)

    def suffix(self, parts, weights, depth, cond, read_tokens) -> Stream:
        """``parts``: (segment, (B, S, width)); ``read_tokens`` (B,): real prefix tokens before the suffix."""
        tokens = np.concatenate([p for _, p in parts], 1)
        segments = [name for name, p in parts for _ in range(p.shape[1])]
        positions = read_tokens[:, None] + np.arange(len(segments))
        valid = np.ones(tokens.shape[:2], bool)
        return Stream(weights, tokens, segments, valid, positions, self.c.expert_layer_offset, depth, cond)

    def action_suffix(self, state, x_t, time, read_tokens) -> Stream:
        emb = self.linear(x_t, "action_in_proj")
        time_emb = self.time_embedding(time, emb.shape[-1])
        cond, parts = None, []
        if self.c.use_peft_prefix_token:
            parts.append(("action E", self.e_token(len(emb), "action")))
        if self.c.pi05:
            cond = self.conditioning(time_emb, "time_mlp")
        else:
            parts.append(("state", self.linear(state, "state_proj")[:, None]))
            emb = self.fused(emb, time_emb, "action_time_mlp")
        parts.append(("action", emb))
        weights = "paligemma_with_expert.gemma_expert.model."
        return self.suffix(parts, weights, self.c.action_expert.depth, cond, read_tokens)

    def alignment_suffix(self, t: Transitions, n: AlignmentNoise, read_tokens) -> Stream:
        state, actions, obs = (x.double().numpy() for x in (t.state[:, None], t.actions, t.next_obs))
        time = n.time.numpy()
        time_emb = self.time_embedding(time, self.c.alignment_expert.width)
        mix = time.astype(np.float64)[:, None, None]

        def project(x, name):
            return self.linear(x, "alignment_in_proj." + name)

        def noisy(x, noise, name):
            emb = project(mix * noise.double().numpy() + (1 - mix) * x, name)
            return emb if self.c.pi05 else self.fused(emb, time_emb, "alignment_time_mlp")

        parts = [
            ("perception", noisy(state, n.state[:, None], "perception")),
            ("dynamics", project(actions, "dynamics_actions")),
            ("dynamics", noisy(obs, n.next_obs, "dynamics_next_obs")),
            ("inverse", project(obs, "inverse_next_obs")),
            ("inverse", noisy(actions, n.actions, "inverse_actions")),
        ]
        if self.c.use_peft_prefix_token:
            parts.insert(0, ("alignment E", self.e_token(len(state), "alignment")))
        cond = self.conditioning(time_emb, "alignment_time_mlp") if self.c.pi05 else None
        weights = "paligemma_with_expert.alignment_expert.model."
        return self.suffix(parts, weights, self.c.alignment_expert.depth, cond, read_tokens)

    def sees(self, query: str, key: str) -> bool:
        if query == "image":
            return key == "image" or (key == "language" and not self.c.restrict_image_to_language)
        if key in SEES[query] or key == "image":
            return True
        if key == "language":
            alignment = query in ("alignment E", "perception", "dynamics", "inverse")
            return not alignment or self.c.alignment_prefix == "full"
        return False

    def run(self, streams: list[Stream]) -> list[np.ndarray]:
        """Final-normed outputs of every stream after joint attention in every layer."""
        heads, kv_heads, head_dim = self.c.text.num_heads, self.c.text.num_kv_heads, self.c.text.head_dim
        x = [s.tokens for s in streams]
        for layer in range(self.c.text.depth):
            active = [i for i, s in enumerate(streams) if s.first_layer <= layer < s.first_layer + s.depth]
            q, k, v, gates = [], [], [], []
            for i in active:
                s = streams[i]
                name = f"{s.weights}layers.{layer - s.first_layer}."
                y, gate = self.rms_norm(x[i], name + "input_layernorm", s.cond)
                gates.append(gate)
                split = y.shape[:2]
                for out, letter, count in ((q, "q", heads), (k, "k", kv_heads), (v, "v", kv_heads)):
                    z = self.linear(y, f"{name}self_attn.{letter}_proj").reshape(*split, count, head_dim)
                    out.append(z if letter == "v" else rotate(z, s.positions, head_dim))
            q, k, v = (np.concatenate(z, 1) for z in (q, k, v))
            segments = [segment for i in active for segment in streams[i].segments]
            valid = np.concatenate([streams[i].valid for i in active], 1)
            may = np.array([[self.sees(a, b) for b in segments] for a in segments])
            mask = may[None] & valid[:, None, :] & valid[:, :, None]
            attended = np.empty_like(q)
            for h in range(heads):
                group = h // (heads // kv_heads)
                scores = np.einsum("bqd,bkd->bqk", q[:, :, h], k[:, :, group]) / np.sqrt(head_dim)
                weights = softmax(np.where(mask, scores, -2.3819763e38))
                attended[:, :, h] = weights @ v[:, :, group]
            begin = 0
            for i, gate in zip(active, gates, strict=True):
                s = streams[i]
                name = f"{s.weights}layers.{layer - s.first_layer}."
                own = attended[:, begin : begin + len(s.segments)].reshape(len(q), len(s.segments), -1)
                begin += len(s.segments)
                x[i] = x[i] + self.linear(own, name + "self_attn.o_proj") * gate
                y, gate = self.rms_norm(x[i], name + "post_attention_layernorm", s.cond)
                y = gelu_tanh(self.linear(y, name + "mlp.gate_proj")) * self.linear(y, name + "mlp.up_proj")
                x[i] = x[i] + self.linear(y, name + "mlp.down_proj") * gate
        return [self.rms_norm(y, s.weights + "norm", s.cond)[0] for s, y in zip(streams, x, strict=True)]

    def predict(self, inputs, x_t, time, transitions, noise):
        """Velocity of the actions and of the three alignment tasks, from one joint pass wherever one can serve all."""
        prefix = self.prefix(inputs, language=True)
        streams = [prefix, self.action_suffix(inputs.state.double().numpy(), x_t, time, prefix.valid.sum(1))]
        if self.c.alignment_expert is None:
            return (self.linear(self.run(streams)[1][:, -x_t.shape[1] :], "action_out_proj"),)
        images_only = self.c.alignment_prefix == "images_only"
        read = [s == "image" for s in prefix.segments] if images_only else [True] * len(prefix.segments)
        alignment = self.alignment_suffix(transitions, noise, prefix.valid[:, read].sum(1))
        if images_only and not self.c.restrict_image_to_language:
            _, action = self.run(streams)
            _, aligned = self.run([self.prefix(inputs, language=False), alignment])
        else:
            _, action, aligned = self.run([*streams, alignment])
        e = self.c.peft_num_tokens if self.c.use_peft_prefix_token else 0
        steps, features = transitions.actions.shape[1], transitions.next_obs.shape[1]
        return (
            self.linear(action[:, -x_t.shape[1] :], "action_out_proj"),
            self.linear(aligned[:, e : e + 1], "alignment_out_proj.perception"),
            self.linear(aligned[:, e + 1 + steps : e + 1 + steps + features], "alignment_out_proj.dynamics"),
            self.linear(aligned[:, -steps:], "alignment_out_proj.inverse"),
        )

    def sample(self, inputs, noise, num_steps):
        """Euler steps on openpi's clock, the prefix recomputed in every step."""
        x, dt, time = noise.double().numpy(), np.float32(-1 / num_steps), np.float32(1)
        while time >= -dt / 2:
            prefix = self.prefix(inputs, language=True)
            times = np.full(len(x), time, np.float32)
            suffix = self.action_suffix(inputs.state.double().numpy(), x, times, prefix.valid.sum(1))
            x = x + float(dt) * self.linear(self.run([prefix, suffix])[1][:, -x.shape[1] :], "action_out_proj")
            time = np.float32(time + dt)
        return x


def random_config(seed: int, pi05: bool) -> tuple[ModelConfig, int, int]:
    """A configuration, a batch size and a number of cameras."""
    rng = np.random.default_rng(seed)

    def pick(*values):
        return values[rng.integers(len(values))]

    kv_heads = pick(1, 2)
    attention = {"num_heads": kv_heads * pick(1, 2), "num_kv_heads": kv_heads, "head_dim": pick(4, 8, 10)}
    depth, offset = pick(1, 2, 3, 4), 0
    expert_depth = pick(*range(1, depth + 1))
    if expert_depth < depth:
        offset = pick(*range(depth - expert_depth + 1))
    vision_heads, patch = pick(1, 2, 4), pick(7, 14)
    width = pick(8, 14, 22)
    config = ModelConfig(
        pi05=pi05,
        vision=VisionSize(vision_heads * pick(4, 6), pick(1, 2), pick(9, 20), vision_heads, patch * pick(1, 2), patch),
        text=GemmaSize(width=pick(10, 16, 23), depth=depth, mlp_dim=pick(11, 24), **attention),
        action_expert=GemmaSize(width=width, depth=expert_depth, mlp_dim=pick(9, 18), **attention),
        alignment_expert=pick(
            None,
            GemmaSize(width=width, depth=1, mlp_dim=pick(9, 18), **attention),
            GemmaSize(width=pick(6, 12), depth=expert_depth, mlp_dim=pick(9, 18), **attention),
        ),
        vocab_size=pick(11, 40),
        max_token_len=pick(1, 4, 9),
        action_dim=pick(1, 3, 7),
        action_horizon=pick(1, 2, 6),
        transition_horizon=pick(1, 3),
        feature_tokens_per_camera=pick(1, 2, 4),
        expert_layer_offset=offset,
        use_peft_prefix_token=pick(False, True, True),
        peft_num_tokens=pick(1, 3),
        alignment_prefix=pick("images_only", "images_only", "full"),
        restrict_image_to_language=pick(False, True),
    )
    return config, pick(1, 2, 3), pick(1, 2, 3)


def random_masks(inputs: ModelInputs, seed: int) -> ModelInputs:
    """Cameras absent at random (at least one stays) and prompts padded at random."""
    rng = np.random.default_rng(seed)
    batch, cameras = len(inputs.state), len(inputs.images)
    present = rng.random((batch, cameras)) < 0.6
    present[np.arange(batch), rng.integers(cameras, size=batch)] = True
    length = inputs.tokens.shape[1]
    valid = np.arange(length) < rng.integers(1, length + 1, size=batch)[:, None]
    return ModelInputs(
        inputs.images, list(torch.from_numpy(present).unbind(1)), inputs.tokens, torch.from_numpy(valid), inputs.state
    )


def assert_close(found: torch.Tensor, expected: np.ndarray, what: str) -> None:
    np.testing.assert_allclose(found.numpy(), expected, rtol=TOLERANCE, atol=TOLERANCE, err_msg=what)


@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
@pytest.mark.parametrize("seed", range(32))
@torch.no_grad()
def test_velocities_equal_the_slow_reference(seed: int, pi05: bool) -> None:
    config, batch, cameras = random_config(seed, pi05)
    model = randomise(Pi0(config), seed)
    inputs = random_masks(random_inputs(config, batch=batch, cameras=cameras, seed=seed), seed)
    actions, noise, time = random_actions(config, batch=batch, seed=seed)
    transitions, alignment_noise = random_transitions(config, batch=batch, cameras=cameras, seed=seed)
    mix = time.double().numpy()[:, None, None]
    x_t = mix * noise.double().numpy() + (1 - mix) * actions.double().numpy()

    expected = Reference(model).predict(inputs, x_t, time.numpy(), transitions, alignment_noise)

    prefix = model.prefix(inputs)
    loss = model.action_loss(prefix, inputs.state, actions, noise, time)
    target = (noise - actions).double().numpy()
    assert_close(loss, (target - expected[0]) ** 2, f"action loss of {config}")
    if config.alignment_expert is None:
        return
    readable = model.alignment_prefix(prefix, model.embed_images(inputs.images), inputs.image_masks)
    found = model.predict_alignment(readable, transitions, alignment_noise)
    for name, ours, reference in zip(("perception", "dynamics", "inverse"), found, expected[1:], strict=True):
        assert_close(ours, reference, f"{name} velocity of {config}")


@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
@pytest.mark.parametrize(("seed", "num_steps"), [(100, 1), (101, 3), (102, 10), (103, 7)])
def test_sampled_actions_equal_the_slow_reference(seed: int, num_steps: int, pi05: bool) -> None:
    config, batch, cameras = random_config(seed, pi05)
    model = randomise(Pi0(config), seed)
    inputs = random_masks(random_inputs(config, batch=batch, cameras=cameras, seed=seed), seed)
    _, noise, _ = random_actions(config, batch=batch, seed=seed)
    found = model.sample_actions(inputs, noise, num_steps=num_steps)
    assert_close(found, Reference(model).sample(inputs, noise, num_steps), f"{num_steps} steps of {config}")
