"""Time and memory of alignment: one gradient step, the stages of an attempt, against a joint pass of the whole model.

    python -m benchmarks.speed.align_speed --json align_speed.json
    python -m benchmarks.speed.align_speed --preset pi0 --device cuda --json align_speed.json

One step is a gradient of the three losses by the E-Token on transitions that are prepared: their next-observation
features and their prefix's keys and values computed once, no weight asks for a gradient. The joint pass does what
training does, from pixels to all four losses and back to every weight, of which alignment would use E's gradient alone.
The two take turns. Memory is the peak of what a step holds beyond what rests between steps.

The limits are for the full sizes, whose operations are counted on the meta device where they are not measured. In the
tiny model the alignment expert is a large part of the whole, so that its ratio is smaller.

Exit status: 0 if the limits are kept, 1 if not, 2 on bad arguments.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import MIB, Checkpoint, Device, peak_bytes, print_table, save, synchronise, take_turns
from benchmarks.speed.work import random_inputs
from selfalign_core.alignment.budget import Budget
from selfalign_core.alignment.config import AlignConfig
from selfalign_core.alignment.guard import judge
from selfalign_core.alignment.identify import identify
from selfalign_core.alignment.overlap import spans
from selfalign_core.alignment.refine import refine
from selfalign_core.alignment.scoring import Prepared, Scorer
from selfalign_core.alignment.trusted import Trusted
from selfalign_core.command_line import File, command, expect_at_least
from selfalign_core.model.config import ModelConfig
from selfalign_core.model.pi0 import AlignmentNoise, ModelInputs, Pi0, Transitions
from selfalign_core.model.torch_state import check_device
from selfalign_core.policy import Policy
from selfalign_core.policy.config import PolicyConfig
from selfalign_core.policy.tokenizer import word_tokenizer
from selfalign_core.robot.types import TransitionBatch

TIME_LIMIT, MEMORY_LIMIT = 10.0, 5.0
"""How many times faster, and how many times smaller, than the joint pass."""
TARGET_MS, TARGET_GIB = 40.0, 6.0
"""Of a full-size step on 32 transitions on an H200, and of alignment's memory over inference alone, with one model for
both: an aligner in a process of its own holds the model's weights once more."""


def random_policy(preset: str, device: str) -> Policy:
    """Of the public size, three cameras, random weights."""
    config = ModelConfig.preset(preset, peft_init="normal")
    with torch.device(device):
        model = Pi0(config).to_precision("bfloat16")
    cameras = ("left", "right", "wrist")
    return Policy(
        model,
        PolicyConfig(model=config, cameras=cameras, state_dim=7, action_dim=7),
        word_tokenizer(["go"]),
        {},
        dt=0.02,
    )


def random_transitions(policy: Policy, count: int) -> TransitionBatch:
    """``count`` transitions over noise, one frame apart."""
    rng = np.random.default_rng(0)
    cameras = tuple(c for c in policy.config.cameras if c)
    return TransitionBatch(
        cameras=cameras,
        frames=rng.integers(0, 256, (count + 1, len(cameras), *policy.image_size, 3), dtype=np.uint8),
        frame_states=rng.normal(size=(count + 1, policy.state_dim)).astype(np.float32),
        frame_stamps=np.arange(count + 1, dtype=np.int64) * 50_000_000,
        obs_index=np.arange(count),
        next_index=np.arange(1, count + 1),
        actions=rng.normal(size=(count, policy.transition_horizon, policy.action_dim)).astype(np.float32),
    )


class Bench:
    """The two ways to the E-Token's gradient on the same transitions, and the stages of an attempt."""

    def __init__(self, policy: Policy, count: int):
        self.policy, self.config = policy, AlignConfig()
        self.batch = random_transitions(policy, count)
        self.scorer = Scorer(policy, self.config.weights)
        self.prepared = self.scorer.prepare(self.batch)
        self.token = policy.model.peft_prefix_token.detach().clone().requires_grad_(True)
        self._seed = 0
        self._joint = self._joint_inputs()

    def step(self) -> Tensor:
        """One gradient by the token, with fresh noise."""
        self._seed += 1
        noise = self.scorer.noise(self.prepared, 1, self._seed)
        loss = self.scorer.weighted(self.scorer.losses(self.prepared, noise, self.token)).mean()
        return torch.autograd.grad(loss, [self.token])[0]

    def joint(self) -> Tensor | None:
        """The same gradient from a pass of the whole model in training."""
        model = self.policy.model.requires_grad_(True)
        inputs, actions, executed, next_images = self._joint
        generator = torch.Generator().manual_seed(0)
        losses = model(
            inputs, actions, noise=torch.randn_like(actions), time=torch.rand(len(actions), device=actions.device),
            executed=executed, next_images=next_images, next_image_masks=inputs.image_masks, alignment_noise=generator,
        )  # fmt: skip
        losses.total.backward()
        found = model.peft_prefix_token.grad
        model.zero_grad(set_to_none=True)
        model.requires_grad_(False)
        return found

    def stages(self, limit_ms: float | None = None) -> dict[str, float]:
        """Milliseconds of an attempt's stages with the default settings; each ends after ``limit_ms``."""
        fit, guard = self._split()
        scorer, config, trusted = self.scorer, self.config, Trusted.of(self.policy)
        current = self.token.detach()
        found: dict[str, float] = {}

        def timed(name: str, work: Callable[[], Any]) -> Any:
            begin = time.perf_counter()
            result = work()
            synchronise(current.device)
            found[name] = 1e3 * (time.perf_counter() - begin)
            return result

        def budget() -> Budget:
            return Budget(limit_ms, time.monotonic)

        timed("prepare", lambda: scorer.prepare(self.batch))
        best = timed(
            "identify", lambda: identify(scorer, fit, current, trusted, config.identify, seed=0, budget=budget())
        )
        shadow = timed("refine", lambda: refine(scorer, fit, best.token, trusted, config, seed=1, budget=budget()))
        times = spans(self.batch)[-len(guard) :]
        timed(
            "guard",
            lambda: judge(scorer, guard, times, current, shadow.token, trusted, config.guard, seed=2, budget=budget()),
        )
        return found

    def _split(self) -> tuple[Prepared, Prepared]:
        count = len(self.batch)
        rows = torch.arange(count, device=self.token.device)
        share = count - max(1, count * 3 // 8)
        return self.prepared.select(rows[:share]), self.prepared.select(rows[share:])

    def _joint_inputs(self) -> tuple[ModelInputs, Tensor, Tensor, list[Tensor]]:
        policy, batch, config = self.policy, self.batch, self.policy.config.model
        device, count = self.token.device, len(batch)
        frames = [policy.codec.images_to_model(batch.frames[:, i]) for i in range(len(batch.cameras))]
        state = batch.frame_states[batch.obs_index]
        tokens = torch.randint(0, 4, (count, config.max_token_len), device=device)
        inputs = ModelInputs(
            [frame[:-1] for frame in frames],
            [torch.ones(count, dtype=torch.bool, device=device) for _ in frames],
            tokens,
            torch.ones_like(tokens, dtype=torch.bool),
            policy.codec.state_to_model(state),
        )
        actions = torch.randn(count, config.action_horizon, config.action_dim, device=device)
        return inputs, actions, policy.codec.actions_to_model(batch.actions, state), [frame[1:] for frame in frames]


def counted(preset: str, transitions: int) -> dict[str, float]:
    """Operations, in 1e12, of an alignment step and of a joint pass at a full size with three cameras."""
    with torch.device("meta"):
        model = Pi0(ModelConfig.preset(preset))
        config, batch, cameras = model.config, transitions, 3
        inputs = random_inputs(config, cameras=cameras, prompt=config.max_token_len, batch=batch)
        images, masks, state = inputs.images, inputs.image_masks, inputs.state
        executed = torch.empty(batch, config.transition_horizon, config.action_dim)
        features = torch.empty(batch, cameras * config.feature_tokens_per_camera, config.text.width)
        noise = AlignmentNoise(state, features, executed, torch.empty(batch))
        actions = torch.empty(batch, config.action_horizon, config.action_dim)
        with FlopCounterMode(display=False) as joint:
            model(
                inputs, actions, noise=actions, time=torch.empty(batch), executed=executed, next_images=images,
                alignment_noise=noise,
            ).total.backward()  # fmt: skip
        model.requires_grad_(False)
        prefix = model.images_only_prefix(model.embed_images(images), masks)
        token = torch.empty_like(model.peft_prefix_token).requires_grad_(True)
        with FlopCounterMode(display=False) as step:
            losses = model.alignment_losses(prefix, Transitions(state, executed, features), noise, token=token)
            losses.weighted(1.0, 1.0, 1.0).mean().backward()
    operations = {"step": step.get_total_flops() / 1e12, "joint": joint.get_total_flops() / 1e12}
    return operations | {"ratio": operations["joint"] / operations["step"]}


def run(
    *,
    device: Device = "cpu",
    preset: Annotated[Literal["pi0", "pi05"] | None, "a public size with random weights, no checkpoint"] = None,
    checkpoint: Checkpoint = "policies/tiny_reach",
    transitions: int = 32,
    seconds: Annotated[float, "for the step and the joint pass together"] = 20.0,
    json: File = None,
) -> int:
    """Cost of alignment."""
    check_device(device)
    expect_at_least(3, transitions=transitions)
    policy = random_policy(preset, device) if preset else Policy.from_checkpoint(checkpoint, dt=0.05, device=device)
    bench = Bench(policy, transitions)
    times = take_turns({"step": bench.step, "joint": bench.joint}, repeats=3, seconds=seconds, device=device)
    step_ms, joint_ms = (float(np.median(ms)) for ms in times.values())
    step_bytes, joint_bytes = (peak_bytes(work, device) for work in (bench.step, bench.joint))
    resting = sum(kv.keys.nbytes + kv.values.nbytes for kv in bench.prepared.prefix.layers)
    stages = bench.stages()
    ratios = {"time": joint_ms / step_ms, "memory": joint_bytes / (step_bytes + resting)}
    full = {preset: counted(preset, transitions) for preset in ("pi0", "pi05")}
    met = all(operations["ratio"] >= TIME_LIMIT for operations in full.values())
    over_inference = (resting + step_bytes) / 2**30
    if preset:
        met &= ratios["time"] >= TIME_LIMIT and ratios["memory"] >= MEMORY_LIMIT
    if preset and device == "cuda" and "H200" in torch.cuda.get_device_name():
        met &= step_ms <= TARGET_MS and over_inference <= TARGET_GIB
    results = {
        "policy": preset or checkpoint,
        "transitions": transitions,
        "step": {"ms": step_ms, "mib": step_bytes / MIB, "prepared_mib": resting / MIB},
        "joint": {"ms": joint_ms, "mib": joint_bytes / MIB},
        "over_inference_gib": over_inference,
        "ratio": ratios,
        "stages_ms": stages,
        "attempt_ms": sum(stages.values()),
        "full_size_operations": full,
    }
    limits = {"time": TIME_LIMIT, "memory": MEMORY_LIMIT}
    save(json, "align_speed", device=device, limits=limits, met=met, **results)
    print_table(
        [f"gradient on {transitions} transitions", "ms", "MiB"],
        [
            ["alignment step", f"{step_ms:.1f}", f"{step_bytes / MIB:.1f} (+ {resting / MIB:.1f} prepared)"],
            ["joint pass of the whole model", f"{joint_ms:.1f}", f"{joint_bytes / MIB:.1f}"],
            ["ratio", f"{ratios['time']:.1f} ×", f"{ratios['memory']:.1f} ×"],
        ],
    )
    print()
    print_table(["attempt, default settings", "ms"], [[name, f"{ms:.0f}"] for name, ms in stages.items()])
    print()
    print_table(
        ["full size, counted, TFLOP", "step", "joint pass", "ratio"],
        [[name, f"{v['step']:.1f}", f"{v['joint']:.1f}", f"{v['ratio']:.0f} ×"] for name, v in full.items()],
    )
    print(
        f"limits at full size: {TIME_LIMIT:g} × faster, {MEMORY_LIMIT:g} × smaller: {'kept' if met else 'NOT kept'}"
        f"{'' if preset else ' as far as operations tell'}"
    )
    if device == "cpu":
        print(f"GPU: not measured (targets on an H200: {TARGET_MS:g} ms a step, {TARGET_GIB:g} GiB over inference)")
    return 0 if met else 1


main = command("benchmarks.speed.align_speed", run)

if __name__ == "__main__":
    sys.exit(main())
