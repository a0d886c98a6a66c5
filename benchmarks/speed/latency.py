"""Time of one action chunk, stage by stage, plain and fast in the same run, beside the least time the work could take.

    python -m benchmarks.speed.latency --json latency.json
    python -m benchmarks.speed.latency --device cuda --sizes pi0 pi05 --json latency.json

The plain path is :meth:`Pi0.sample_actions`, the fast one :class:`selfalign_core.model.fast.FastSampler`; they take
turns, so that what else the machine does meets both. Stages are timed by themselves: images through the vision tower,
the prefix, the tokens before the actions (fast path alone), one denoising step, and what :meth:`Policy.infer` does
around the model. A chunk on a GPU is one CUDA graph, its stages are not.

Every size, measured here or not, has its operations and bytes counted and the least time on known cards beside them; on
a CPU the least time is of this machine's own matrix products and copies, measured in the same run.

Exit status: 0 if the fast path is fast enough, 1 if not, 2 on bad arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Checkpoint, Device, print_table, save, take_turns
from benchmarks.speed.work import CARDS, STAGES, Card, Work, count, floor_ms, random_inputs, whole
from selfalign_core.command_line import File, More, command, expect_more_than_0
from selfalign_core.model.config import GemmaSize, ModelConfig, VisionSize
from selfalign_core.model.fast import FastSampler
from selfalign_core.model.pi0 import ModelInputs, Pi0
from selfalign_core.model.torch_state import check_device
from selfalign_core.policy import Policy
from selfalign_core.robot.types import Observation

RATIO = {"cpu": 3.0, "cuda": 5.0}
"""How many times faster than the plain path: on a CPU the shipped policy, on a GPU the full sizes."""
TARGET_MS = 14.0
"""Of a full-size chunk on an H200."""
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}
"""Of the fast path's actions from the plain path's, as a share of the largest action."""
STEPS = 10

Precision = Literal["float32", "bfloat16"]
Size = Literal["tiny", "tiny-pi05", "small", "pi0", "pi05"]
_SMALL_EXPERT = GemmaSize(width=256, depth=8, mlp_dim=1024, num_heads=8, num_kv_heads=1, head_dim=32)
SIZES: dict[Size, tuple[ModelConfig, int]] = {
    "tiny": (ModelConfig.preset("tiny"), 1),
    "tiny-pi05": (ModelConfig.preset("tiny", pi05=True, max_token_len=32), 1),
    "small": (
        ModelConfig.preset(
            "tiny",
            vision=VisionSize(width=256, depth=6, mlp_dim=1024, num_heads=8, image_size=112, patch_size=14),
            text=GemmaSize(width=384, depth=8, mlp_dim=1536, num_heads=8, num_kv_heads=1, head_dim=32),
            action_expert=_SMALL_EXPERT,
            alignment_expert=None,
            expert_layer_offset=0,
            action_horizon=32,
        ),
        2,
    ),
    "pi0": (ModelConfig.preset("pi0", alignment_expert=None), 3),
    "pi05": (ModelConfig.preset("pi05", alignment_expert=None), 3),
}
"""Model and cameras."""
MEASURED: dict[Device, tuple[Size, ...]] = {"cpu": ("tiny-pi05", "small"), "cuda": ("pi0", "pi05")}
"""By default, besides the shipped policy on a CPU."""


@dataclass(frozen=True)
class Subject:
    """What is measured: a model, one observation of it, and ``around``, what a policy does besides, if it is one."""

    name: str
    model: Pi0
    inputs: ModelInputs
    noise: Tensor
    dim_mask: Tensor | None = None
    around: Callable[[], object] | None = None


def shipped(checkpoint: str, device: str) -> Subject:
    """The policy in ``checkpoint`` with random pictures."""
    policy = Policy.from_checkpoint(checkpoint, dt=0.05, device=device)
    rng = np.random.default_rng(0)
    images = {c: rng.integers(0, 256, (*policy.image_size, 3), dtype=np.uint8) for c in policy.config.cameras if c}
    observation = Observation(images, np.zeros(policy.state_dim, np.float32), "reach the red cube")
    inputs = policy.codec.observations_to_model([observation])
    noise = torch.randn(1, policy.horizon, policy.config.model.action_dim, device=device)

    def around() -> object:
        policy.codec.observations_to_model([observation])
        return policy.codec.actions_from_model(noise[0], observation.state)

    mask = policy.dim_mask if policy.config.padding_masked else None
    return Subject(checkpoint, policy.model, inputs, noise, mask, around)


def random_subject(name: Size, device: str, precision: Precision) -> Subject:
    """A model of that size with random weights, all of its cameras present and its prompt full."""
    config, cameras = SIZES[name]
    with torch.device(device):
        model = Pi0(config).eval().requires_grad_(False)
        model.to_precision(precision)
        inputs = random_inputs(config, cameras=cameras, prompt=config.max_token_len)
        return Subject(name, model, inputs, torch.randn(1, config.action_horizon, config.action_dim))


def medians(device: str, seconds: float, **calls: Callable[[], object]) -> dict[str, float]:
    """ms of each call, which take turns."""
    times = take_turns(calls, repeats=2, seconds=seconds, block=5, device=device)
    return {f"{name}_ms": float(np.median(found)) for name, found in times.items()}


@torch.inference_mode()
def measure(subject: Subject, medians: Callable[..., dict[str, float]]) -> dict[str, Any]:
    """Milliseconds of the chunk and of its stages either way, and how far the actions differ."""
    model, inputs, noise = subject.model, subject.inputs, subject.noise
    sampler: FastSampler = FastSampler(model)
    options: dict[str, Any] = {"num_steps": STEPS, "dim_mask": subject.dim_mask}
    expected, found = (path.sample_actions(inputs, noise, **options) for path in (model, sampler))
    chunk = medians(
        plain=lambda: model.sample_actions(inputs, noise, **options),
        fast=lambda: sampler.sample_actions(inputs, noise, **options),
    )
    run, call = sampler.prepared(inputs, noise, **options)
    features, cache = model.embed_images(inputs.images), model.prefix(inputs)
    fast_features, now = run.embed_images(call.images), torch.ones(1, device=noise.device)
    stages = {
        "image": medians(plain=lambda: model.embed_images(inputs.images), fast=lambda: run.embed_images(call.images)),
        "prefix": medians(
            plain=lambda: model.prefix(inputs, image_features=features),
            fast=lambda: run.run_prefix(fast_features, call.tokens),
        ),
        "step": medians(
            plain=lambda: model.predict_velocity(cache, inputs.state, noise, now),
            fast=lambda: run.run_actions(call.noise, 0),
        ),
        "fixed": medians(fast=lambda: run.run_fixed(call.state, call.token)),
    }
    if subject.around is not None:
        stages["around"] = medians(plain=subject.around)
    difference = float((found - expected).abs().max() / expected.abs().max())
    return {**chunk, "ratio": chunk["plain_ms"] / chunk["fast_ms"], "difference": difference, "stages": stages}


def this_cpu(medians: Callable[..., dict[str, float]]) -> Card:
    """What this machine's matrix products and copies reach with the threads in use."""
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    source = torch.randn(2**24)
    target = torch.empty_like(source)
    found = medians(product=lambda: torch.mm(a, b), copy=lambda: target.copy_(source))
    return Card(2 * 512**3 / found["product_ms"] * 1e3, 2 * source.nbytes / found["copy_ms"] * 1e3)


def counted(name: str, config: ModelConfig, cameras: int, prompt: int, precision: str, here: Card | None) -> dict:
    """Operations and bytes of the stages, and the least time per card."""
    stages = count(config, cameras=cameras, prompt=prompt, precision=precision)
    cards = CARDS if precision == "bfloat16" else {}
    cards = cards | ({"here": here} if here is not None else {})

    def figures(work: Work, floors: dict[str, float]) -> dict[str, Any]:
        return {"gflop": work.operations / 1e9, "megabytes": work.bytes / 1e6, "floor_ms": floors}

    per_stage = {
        name: figures(stages[name], {c: stages[name].floor_ms(card) for c, card in cards.items()}) for name in STAGES
    }
    chunk = figures(whole(stages, STEPS), {c: floor_ms(stages, STEPS, card) for c, card in cards.items()})
    return {"size": name, "cameras": cameras, "prompt": prompt, "precision": precision, "chunk": chunk} | per_stage


def run(
    *,
    device: Device = "cpu",
    sizes: Annotated[tuple[Size, ...] | None, "sizes to measure, with random weights", More(nargs="*")] = None,
    checkpoint: Annotated[Checkpoint, "policy to measure besides on a CPU"] = "policies/tiny_reach",
    precision: Annotated[Precision | None, "float32 on a CPU, bfloat16 on a GPU"] = None,
    seconds: Annotated[float, "per figure"] = 4.0,
    json: File = None,
) -> int:
    """Time of one action chunk."""
    check_device(device)
    expect_more_than_0(seconds=seconds)
    kind: Precision = precision or ("float32" if device == "cpu" else "bfloat16")
    timed = partial(medians, device, seconds)
    here = this_cpu(timed) if device == "cpu" else None
    results, met = [], True
    names = MEASURED[device] if sizes is None else sizes
    subjects: list[Callable[[], Subject]] = [partial(random_subject, name, device, kind) for name in names]
    if device == "cpu":
        subjects.insert(0, partial(shipped, checkpoint, device))
    for make in subjects:
        subject = make()
        config, cameras = subject.model.config, len(subject.inputs.images)
        prompt = int(subject.inputs.token_masks.sum())
        found = measure(subject, timed)
        limited = device == "cuda" or subject.around is not None
        found |= {"limited": limited, "met": found["difference"] <= TOLERANCE[kind]}
        if limited:
            found["met"] &= found["ratio"] >= RATIO[device]
        if device == "cuda" and "H200" in torch.cuda.get_device_name():
            found["met"] &= found["fast_ms"] <= TARGET_MS
        met &= found["met"]
        results.append(counted(subject.name, config, cameras, prompt, kind, here) | found)
    for name, (config, cameras) in SIZES.items():
        if name in ("pi0", "pi05") and not (device == "cuda" and name in names):
            results.append(counted(name, config, cameras, config.max_token_len, "bfloat16", None))
    save(json, "latency", device=device, steps=STEPS, here=here and vars(here), met=met, results=results)
    _print(results)
    print(
        f"limits: the same actions within {TOLERANCE[kind]:g}, fast at least {RATIO[device]:g} × plain "
        f"{'for the policy' if device == 'cpu' else ''}: {'kept' if met else 'NOT kept'}"
    )
    if device == "cpu":
        print(f"GPU: not measured (target on an H200: {TARGET_MS:g} ms)")
    return 0 if met else 1


def _print(results: list[dict[str, Any]]) -> None:
    rows = []
    for result in results:
        stages = result.get("stages", {})
        rows.append(_row(f"{result['size']}, chunk", result["chunk"], result))
        rows += [_row(f"  {name}", result[name], stages.get(name, {})) for name in STAGES]
        rows += [_row(f"  {name}", {}, stages[name]) for name in ("fixed", "around") if name in stages]
    print_table(["ms", "plain", "fast", "ratio", "GFLOP", "MB", "floor here", "H100 floor", "H200 floor"], rows)


def _row(name: str, work: dict[str, Any], times: dict[str, float]) -> list[str]:
    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    plain, fast, floors = times.get("plain_ms"), times.get("fast_ms"), work.get("floor_ms", {})
    ratio = "" if plain is None or fast is None else f"{plain / fast:.2f} ×"
    return [
        name, number(plain, 2), number(fast, 2), ratio, number(work.get("gflop"), 3), number(work.get("megabytes"), 1),
        *(number(floors.get(card), 2) for card in ("here", "H100", "H200")),
    ]  # fmt: skip


main = command("benchmarks.speed.latency", run)

if __name__ == "__main__":
    sys.exit(main())
