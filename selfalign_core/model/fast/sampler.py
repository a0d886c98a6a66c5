"""``sample_actions`` on fused weights, for one observation at a time.

What the plain path does again in every step is done once here:

* the prefix writes its keys and values into a cache that has room for the suffix behind them;
* the tokens before the noisy actions (E and, for π0, the state) see neither the actions nor, for π0, the time: their
  keys and values are computed once per chunk; π0.5's know the time, so those of all steps are computed in one pass;
* so a step runs the noisy actions alone, which see everything: without a mask;
* what only depends on the times (embeddings, scales, shifts and gates of adaptive norms) is computed once per model;
* absent cameras and, on a CPU, the prompt's padding are left out instead of masked.

On a GPU the layers are compiled and the whole call is one CUDA graph per shape. The E-Token is read where the model
has it, so a new one costs nothing. The model's weights are copied here (fused): about one more copy of the stacks.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from selfalign_core.model import flow_matching as flow
from selfalign_core.model.config import GemmaSize
from selfalign_core.model.fast.layers import (
    Keys,
    Modulation,
    PlainSlot,
    Rotation,
    Rows,
    Scratch,
    Slot,
    gemma_layer,
    normalised,
    siglip_layer,
)
from selfalign_core.model.fast.weights import folded, rms_floor, stack_weights, vision_weights
from selfalign_core.model.gemma import AdaRMSNorm, RMSNorm
from selfalign_core.model.masks import MASK_FILL
from selfalign_core.model.pi0 import ModelInputs, Pi0
from selfalign_core.model.siglip import LAYER_NORM_EPS

_MAX_SHAPES = 32
"""Shapes whose buffers are kept: other cameras, prompts of other lengths."""

_Arguments = ParamSpec("_Arguments")


class Compiler(Protocol):
    """Makes a layer faster, as ``torch.compile`` does."""

    def __call__(self, layer: Callable[_Arguments, Tensor], /) -> Callable[_Arguments, Tensor]: ...


@dataclass(frozen=True)
class Shape:
    """What the buffers of a call depend on.

    ``cameras``: rows of the present ones. ``prompt``: its tokens. ``steps``: Euler steps. ``committed``: actions that
    are decided already. ``masked``: whether there is a mask of padded action dimensions.
    """

    cameras: tuple[int, ...]
    prompt: int
    steps: int
    committed: int
    masked: bool


@dataclass(frozen=True)
class Call:
    """The tensors of one call: ``images`` (C, 3, H, W), ``tokens`` and ``token_mask`` (L,), None where padding is left
    out, ``state`` (1, action_dim), ``noise`` (horizon, action_dim), ``committed`` (d, action_dim), ``dim_mask``
    (action_dim,), ``token`` (T, width).
    """

    images: Tensor
    tokens: Tensor
    token_mask: Tensor | None
    state: Tensor
    noise: Tensor
    committed: Tensor | None
    dim_mask: Tensor | None
    token: Tensor | None


class FastSampler:
    """:meth:`sample_actions` of ``model``, owned by one thread.

    Weights that change afterwards are noticed, and the fused ones made again. What this path does not do (batches,
    several key heads) it leaves to the model's own.

    Args:
        keep_padding: leave the prompt's padding in and mask it, so that prompts of all lengths have one shape; None:
            on a GPU.
        compiler: None: ``torch.compile`` on a GPU, nothing on a CPU.
    """

    def __init__(self, model: Pi0, *, keep_padding: bool | None = None, compiler: Compiler | None = None):
        self._model = model
        self._keep_padding, self._compiler = keep_padding, compiler
        self._plan: _Plan | None = None
        self._watched: list[Tensor] = []
        self._seen: list[int] = []
        model.register_load_state_dict_post_hook(lambda *_: self._forget())  # assign=True makes other tensors

    @torch.inference_mode()
    def sample_actions(
        self,
        inputs: ModelInputs,
        noise: Tensor,
        *,
        num_steps: int = 10,
        committed: Tensor | None = None,
        dim_mask: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`Pi0.sample_actions`, within rounding."""
        config = self._model.config
        chunk = (1, config.action_horizon, config.action_dim)
        count = 0 if committed is None else committed.shape[1]
        if (
            tuple(noise.shape) != chunk
            or (committed is not None and tuple(committed.shape) != (1, count, config.action_dim))
            or not 0 <= count < config.action_horizon
            or num_steps < 1
            or config.text.num_kv_heads != 1
        ):
            return self._model.sample_actions(
                inputs, noise, num_steps=num_steps, committed=committed, dim_mask=dim_mask
            )
        self._model.check_inputs(inputs)
        run, call = self.prepared(
            inputs, noise, num_steps=num_steps, committed=committed if count else None, dim_mask=dim_mask
        )
        return run(call)[None]

    def prepared(self, inputs: ModelInputs, noise: Tensor, **options: Any) -> tuple[Run, Call]:
        """What :meth:`sample_actions` runs, and on what: for a look at its stages. Nothing is checked."""
        return self._current_plan().prepare(inputs, noise, **options)

    def _forget(self) -> None:
        self._plan = None

    def _current_plan(self) -> _Plan:
        if self._plan is None or self._state() != self._seen:
            model = self._model
            self._plan = None  # its memory is needed for the next
            apart = model.peft_prefix_token if model.num_e_tokens else None
            unread = ("alignment_expert", "lm_head", "alignment_", "peft_type_alignment")
            self._watched = [
                p for name, p in model.named_parameters() if p is not apart and not any(part in name for part in unread)
            ]
            self._seen = self._state()
            self._plan = _Plan(model, self._keep_padding, self._compiler)
        return self._plan

    def _state(self) -> list[int]:
        """What changes when a weight does. The E-Token's values may change, not its place.

        A change in place raises a tensor's version; a cast or a move gives all of them other memory.
        """
        model = self._model
        moved = [model.action_in_proj.weight, model.paligemma_with_expert.language_model.embed_tokens.weight]
        if model.num_e_tokens:
            moved += [model.peft_prefix_token, model.peft_type_action]
        return [tensor.data_ptr() for tensor in moved] + [tensor._version for tensor in self._watched]


class _Plan:
    """Fused weights of one model, and the buffers for each shape it was asked for."""

    def __init__(self, model: Pi0, keep_padding: bool | None, compiler: Compiler | None):
        self.model, config = model, model.config
        pali = model.paligemma_with_expert
        expert = pali.gemma_expert.model
        self.device = next(model.parameters()).device
        self.on_gpu = self.device.type == "cuda"
        self.keep_padding = self.on_gpu if keep_padding is None else keep_padding
        self.dtype = expert.dtype
        if compiler is None and self.on_gpu:
            compiler = compiled
        self.plain = compiler is not None or self.on_gpu or self.dtype != torch.float32
        self.gemma_layer = gemma_layer if compiler is None else compiler(gemma_layer)
        self.siglip_layer = siglip_layer if compiler is None else compiler(siglip_layer)
        self.vision = vision_weights(pali.paligemma.model)
        self.first = config.expert_layer_offset
        self.text = stack_weights(pali.language_model, config.text)[: self.first + config.action_expert.depth]
        self.expert = stack_weights(expert, config.action_expert)
        self.text_floor = rms_floor(config.text.width, self.device)
        self.expert_floor = rms_floor(config.action_expert.width, self.device)
        self.embed_scale = math.sqrt(config.text.width)
        self.out = folded(expert.norm, model.action_out_proj.weight).t().contiguous()
        self.out_bias = model.action_out_proj.bias
        self._times: dict[tuple[int, int], _Times] = {}
        self._runs: OrderedDict[Shape, Run] = OrderedDict()

    def times(self, steps: int, committed: int) -> _Times:
        if (steps, committed) not in self._times:
            self._times[steps, committed] = _Times(self.model, steps, committed)
        return self._times[steps, committed]

    def prepare(
        self,
        inputs: ModelInputs,
        noise: Tensor,
        *,
        num_steps: int,
        committed: Tensor | None = None,
        dim_mask: Tensor | None = None,
    ) -> tuple[Run, Call]:
        present = tuple(i for i, mask in enumerate(inputs.image_masks) if mask)
        tokens, token_mask = inputs.tokens[0], inputs.token_masks[0]
        if not self.keep_padding:
            tokens = tokens[token_mask]
        decided = 0 if committed is None else committed.shape[1]
        shape = Shape(present, len(tokens), num_steps, decided, dim_mask is not None)
        if shape not in self._runs:
            while len(self._runs) >= _MAX_SHAPES:
                self._runs.popitem(last=False)
            self._runs[shape] = Run(self, shape)
        self._runs.move_to_end(shape)
        images = [inputs.images[i] for i in present]
        call = Call(
            images=images[0] if len(images) == 1 else torch.cat(images) if images else noise.new_zeros(0),
            tokens=tokens,
            token_mask=token_mask if self.keep_padding else None,
            state=inputs.state,
            noise=noise[0],
            committed=None if committed is None else committed[0],
            dim_mask=dim_mask,
            token=self.model.peft_prefix_token if self.model.num_e_tokens else None,
        )
        return self._runs[shape], call


def compiled(layer: Callable[_Arguments, Tensor], /, *, backend: str = "inductor") -> Callable[_Arguments, Tensor]:
    """``layer`` compiled for each shape it meets, prefix, fixed tokens and actions, without Python in between."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * _MAX_SHAPES)
    return torch.compile(layer, backend=backend, fullgraph=True, dynamic=False)


class _Times:
    """What depends on the times of the Euler steps alone, from the model's own layers.

    ``actions``: π0's share of the time in the first layer of the action-time MLP, per step (1 or horizon, width).
    ``steps``: π0.5's modulations per step: two per layer, and the final norm's. ``fixed``: two per layer, for the fixed
    tokens of all steps, one step's after the other's.
    """

    def __init__(self, model: Pi0, steps: int, committed: int):
        config, width = model.config, model.config.action_expert.width
        device = model.action_in_proj.weight.device
        clock = torch.tensor(flow.sampling_times(steps), device=device)
        self.dt = -1.0 / steps
        steps = self.count = len(clock)
        time_emb = flow.time_embedding(torch.cat([clock, clock.new_zeros(1)]), width)
        # Rows of a step: its time for all actions, or time 0 for those that are decided.
        rows = torch.arange(steps, device=device)[:, None]
        if committed:
            rows = rows.repeat(1, config.action_horizon)
            rows[:, :committed] = steps
        if not config.pi05:
            clean, timed = model.action_time_mlp_in.weight.split(width, dim=1)
            fused = time_emb @ timed.t() + model.action_time_mlp_in.bias + clean @ model.action_in_proj.bias
            self.actions = fused[rows].unbind()
            self.action_in = (clean @ model.action_in_proj.weight).t().contiguous()
            self.action_out = model.action_time_mlp_out.weight.t().contiguous()
            self.action_out_bias = model.action_time_mlp_out.bias
            return
        cond = F.silu(model.time_mlp_out(F.silu(model.time_mlp_in(time_emb))))
        expert = model.paligemma_with_expert.gemma_expert.model
        dtype = expert.dtype

        def modulation(norm: RMSNorm | AdaRMSNorm, rows: Tensor) -> Modulation:
            assert isinstance(norm, AdaRMSNorm)
            scale, shift, gate = norm.dense(cond.to(norm.dense.weight.dtype)).float()[rows].chunk(3, dim=-1)
            return Modulation((1.0 + scale) * math.sqrt(width), shift.contiguous(), gate.to(dtype))

        norms = [n for layer in expert.layers for n in (layer.input_layernorm, layer.post_attention_layernorm)]
        self.steps = [[modulation(norm, r) for norm in (*norms, expert.norm)] for r in rows]
        own = torch.arange(steps, device=device).repeat_interleave(model.num_e_tokens)
        self.fixed = [modulation(norm, own) for norm in norms]


class Run:
    """The buffers of one shape and the call itself; on a GPU its graph."""

    def __init__(self, plan: _Plan, shape: Shape):
        self._plan, self._shape, config = plan, shape, plan.model.config
        device, size = plan.device, config.action_expert
        self._times = times = plan.times(shape.steps, shape.committed)
        self._images = len(shape.cameras) * config.vision.num_patches
        prefix = self._images + shape.prompt
        self._per_variant = plan.model.num_e_tokens + (0 if config.pi05 else 1)
        variants = times.count if config.pi05 else 1
        fixed, actions = self._per_variant * variants, config.action_horizon
        self._prefix, self._variants, self._head_dim = prefix, variants, size.head_dim
        self._suffix = prefix + self._per_variant
        rows = self._suffix + actions

        # Keys and values of layer i at 2 i and 2 i + 1.
        head_dim, heads = self._head_dim, size.num_heads

        def empty(layers: int, rows: int) -> list[Tensor]:
            return [torch.zeros(rows, head_dim, dtype=plan.dtype, device=device) for _ in range(2 * layers)]

        cache, own = empty(len(plan.text), rows), empty(size.depth, fixed)
        self._fixed_places = [tensor[prefix : self._suffix] for tensor in cache[2 * plan.first :]]
        self._fixed = [[t[v * self._per_variant :][: self._per_variant] for t in own] for v in range(variants)]
        self._bias = torch.zeros(rows, dtype=plan.dtype, device=device) if plan.keep_padding else None
        self._rotations = [Rotation(count, head_dim, device) for count in (prefix, fixed, actions)]
        self._turn(torch.arange(shape.prompt, device=device), torch.tensor(prefix, device=device))

        def slots(
            which: int, written: list[Tensor], begin: int, read: Callable[[int], list[Rows]], stack: GemmaSize
        ) -> Sequence[Slot | PlainSlot]:
            rotation = self._rotations[which]
            tokens, layers = len(rotation.factors), len(written) // 2
            if not tokens:
                return []
            places = [(written[2 * i], written[2 * i + 1], begin, read(i), heads) for i in range(layers)]
            if plan.plain:
                return [PlainSlot(*place, rotation) for place in places]
            scratch = Scratch(tokens, heads, stack.mlp_dim, rotation)
            return [Slot(*place, scratch) for place in places]

        def seen(i: int, count: int) -> Keys:
            bias = None if self._bias is None or count <= self._images else self._bias[:count]
            return Keys(cache[2 * i], cache[2 * i + 1], count, bias)

        def prefix_sees(i: int) -> list[Rows]:
            if not config.restrict_image_to_language or not self._images:
                return [Rows(0, prefix, (seen(i, prefix),))]
            return [Rows(0, self._images, (seen(i, self._images),)), Rows(self._images, prefix, (seen(i, prefix),))]

        mask = _fixed_mask(plan.model.num_e_tokens, self._per_variant, variants).to(device)
        mask = torch.where(mask, 0.0, MASK_FILL).to(plan.dtype)

        def fixed_sees(i: int) -> list[Rows]:
            return [Rows(0, fixed, (seen(plan.first + i, prefix), Keys(own[2 * i], own[2 * i + 1], fixed, mask)))]

        def actions_see(i: int) -> list[Rows]:
            return [Rows(0, actions, (seen(plan.first + i, rows),))]

        self._prefix_slots = slots(0, cache, 0, prefix_sees, config.text)
        self._fixed_slots = slots(1, own, 0, fixed_sees, size)
        self._action_slots = slots(2, cache[2 * plan.first :], self._suffix, actions_see, size)
        self._graph: _Graph | None = None

    def __call__(self, call: Call) -> Tensor:
        """(horizon, action_dim) actions."""
        if not self._plan.on_gpu:
            return self.sample(call)
        with torch.cuda.device(self._plan.device):  # graphs are recorded and played on the current one
            if self._graph is None:
                self._graph = _Graph(self.sample, call)
            return self._graph(call)

    def sample(self, call: Call) -> Tensor:
        """The call, stage by stage."""
        if call.token_mask is not None:
            self._mask_padding(call.token_mask)
        self.run_prefix(self.embed_images(call.images), call.tokens)
        self.run_fixed(call.state, call.token)
        return self.denoise(call)

    def embed_images(self, images: Tensor) -> Tensor:
        """(C, 3, H, W) in [-1, 1] → (C * patches, text width)."""
        plan, size = self._plan, self._plan.model.config.vision
        cameras, side, patch = len(images), size.image_size // size.patch_size, size.patch_size
        if not cameras:
            return images.new_zeros(0, plan.model.config.text.width, dtype=plan.dtype)
        cells = images[..., : side * patch, : side * patch].float().unflatten(3, (side, patch))
        patches = cells.unflatten(2, (side, patch)).permute(0, 2, 4, 1, 3, 5).reshape(cameras * side * side, -1)
        weights = plan.vision
        positions = weights.positions if cameras == 1 else weights.positions.repeat(cameras, 1)
        x = torch.addmm(positions, patches, weights.patch).to(weights.projector.dtype)
        for layer in weights.layers:
            x = plan.siglip_layer(x, layer, cameras, size.num_heads, LAYER_NORM_EPS)
        return torch.addmm(weights.projector_bias, F.layer_norm(x, x.shape[1:], eps=LAYER_NORM_EPS), weights.projector)

    def run_prefix(self, features: Tensor, tokens: Tensor) -> None:
        """Keys and values of the prefix, in their places."""
        plan = self._plan
        embedding = plan.model.paligemma_with_expert.language_model.embed_tokens
        x = torch.cat([features, (embedding(tokens) * plan.embed_scale).to(features.dtype)]).to(plan.dtype)
        for weights, slot in zip(plan.text[:-1], self._prefix_slots, strict=False):
            x = plan.gemma_layer(x, weights, slot, plan.text_floor)
        kv = plan.text[-1].qkv[:, -2 * self._head_dim :]
        self._prefix_slots[-1].store(normalised(x, plan.text_floor), kv)

    def run_fixed(self, state: Tensor, token: Tensor | None) -> None:
        """Keys and values of the tokens before the actions; those of π0 in their places, of π0.5 for every step."""
        plan, model = self._plan, self._plan.model
        if not self._fixed_slots:
            return
        parts = [] if token is None else [token + model.peft_type_action]
        if not model.config.pi05:
            parts.append(model.state_proj(state))
        x = torch.cat(parts) if len(parts) > 1 else parts[0]
        x = (x if self._variants == 1 else x.repeat(self._variants, 1)).to(plan.dtype)
        last = len(plan.expert) - 1
        for i, (weights, slot) in enumerate(zip(plan.expert, self._fixed_slots, strict=True)):
            first, second = self._times.fixed[2 * i : 2 * i + 2] if model.config.pi05 else (None, None)
            if i == last:
                slot.store(normalised(x, plan.expert_floor, first), weights.qkv[:, -2 * self._head_dim :])
            else:
                x = plan.gemma_layer(x, weights, slot, plan.expert_floor, first, second)
        if self._variants == 1:
            self._place_fixed(0)

    def denoise(self, call: Call) -> Tensor:
        """The Euler steps."""
        plan, times, count = self._plan, self._times, self._shape.committed
        out, drift = plan.out * times.dt, plan.out_bias * times.dt
        if call.dim_mask is not None:  # known to be 0: their velocity is the noise
            out, drift = out * call.dim_mask, torch.where(call.dim_mask, drift, call.noise * times.dt)
        x, committed = call.noise.clone(), call.committed
        decided = x[:count]
        for step in range(times.count):
            if committed is not None:
                decided.copy_(committed)
            if self._variants > 1:
                self._place_fixed(step)
            hidden = self.run_actions(x, step)
            x = torch.addmm(x + drift, hidden, out) if committed is None else x.add_(drift).addmm_(hidden, out)
        if committed is not None:
            decided.copy_(committed)
        return x

    def run_actions(self, x: Tensor, step: int) -> Tensor:
        """Hidden states (horizon, width) float32 of the noisy actions at a step, divided by their length."""
        plan, times, model = self._plan, self._times, self._plan.model
        modulations: Sequence[Modulation | None]
        if model.config.pi05:
            modulations = times.steps[step]
            hidden = model.action_in_proj(x)
        else:
            modulations = (None,) * (2 * len(plan.expert) + 1)
            hidden = F.silu(torch.addmm(times.actions[step], x, times.action_in))
            hidden = torch.addmm(times.action_out_bias, hidden, times.action_out)
        hidden = hidden.to(plan.dtype)
        for i, (weights, slot) in enumerate(zip(plan.expert, self._action_slots, strict=True)):
            hidden = plan.gemma_layer(
                hidden, weights, slot, plan.expert_floor, modulations[2 * i], modulations[2 * i + 1]
            )
        return normalised(hidden, plan.expert_floor, modulations[-1]).float()

    def _place_fixed(self, step: int) -> None:
        """The fixed tokens' keys and values of ``step`` take their places before the actions."""
        torch._foreach_copy_(self._fixed_places, self._fixed[step])

    def _mask_padding(self, token_mask: Tensor) -> None:
        """Positions count real tokens; padding is seen by nobody. Without a look at the values."""
        assert self._bias is not None
        self._bias[self._images : self._prefix] = torch.where(token_mask, 0.0, MASK_FILL)
        self._turn(token_mask.cumsum(0) - 1, self._images + token_mask.sum())

    def _turn(self, prompt: Tensor, suffix: Tensor) -> None:
        """Positions: of the prompt's tokens after the images' (L,), and of the suffix's first token, 0-dim."""
        images = torch.arange(self._images, device=prompt.device)
        fixed = torch.arange(self._per_variant, device=prompt.device).repeat(self._variants)
        actions = torch.arange(len(self._rotations[2].factors), device=prompt.device)
        for rotation, positions in zip(
            self._rotations,
            (torch.cat([images, prompt + self._images]), suffix + fixed, suffix + self._per_variant + actions),
            strict=True,
        ):
            rotation.turn(positions)


class _Graph:
    """A call recorded once as a CUDA graph and played again with other inputs."""

    def __init__(self, sample: Callable[[Call], Tensor], call: Call):
        self._call = replace(
            call, **{n: t.clone() for n, t in vars(call).items() if isinstance(t, Tensor) and n != "token"}
        )
        # A graph's kernels keep the priority that they were recorded with.
        stream = torch.cuda.Stream(priority=torch.cuda.current_stream().priority)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, and lets libraries choose their kernels
                sample(self._call)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Another thread's model, the aligner's in a composed process, may allocate meanwhile.
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._actions = sample(self._call)

    def __call__(self, call: Call) -> Tensor:
        for name, tensor in vars(self._call).items():
            if isinstance(tensor, Tensor) and name != "token":
                tensor.copy_(getattr(call, name))
        self._graph.replay()
        return self._actions.clone()


def _fixed_mask(e_tokens: int, per_variant: int, variants: int) -> Tensor:
    """(rows, rows) bool: E sees E, the state sees E and itself, and nothing sees what belongs to another step."""
    one = torch.ones(per_variant, per_variant, dtype=torch.bool)
    one[:e_tokens, e_tokens:] = False
    return torch.block_diag(*[one.float()] * variants).bool()
