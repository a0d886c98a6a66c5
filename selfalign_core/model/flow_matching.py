"""Flow matching, the time convention stated once: t = 1 is noise, t = 0 is data (π0, arXiv 2410.24164).

    x_t = t * noise + (1 - t) * x        u = noise - x        sampling steps by dt = -1 / num_steps from t = 1

Small stateless functions; they know nothing of what is being denoised.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MIN_PERIOD, MAX_PERIOD = 4e-3, 4.0


def sample_time(batch: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
    """(batch,) float32 times from ``Beta(1.5, 1) * 0.999 + 0.001``, the training distribution of π0.

    Beta(a, 1) has the inverse cumulative distribution u^(1/a), which needs one uniform draw and honours ``generator``.
    """
    return time_from_uniform(torch.rand(batch, generator=generator, dtype=torch.float32, device=device))


def time_from_uniform(uniform: Tensor) -> Tensor:
    """The training distribution's times for uniform numbers in [0, 1), elementwise."""
    return uniform ** (1 / 1.5) * 0.999 + 0.001


def add_noise(x: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """x_t for clean ``x`` (B, ...), ``noise`` of the same shape and ``time`` (B,), or (B, S) for one per token."""
    time = time.reshape(*time.shape, *[1] * (x.ndim - time.ndim))
    return time * noise + (1 - time) * x


def target_velocity(x: Tensor, noise: Tensor) -> Tensor:
    """u = noise - x, what the model learns to predict at x_t."""
    return noise - x


def sampling_times(num_steps: int) -> list[float]:
    """Times of the Euler steps, openpi's clock: a float32 step added to a float32 clock, drift included.

    The drift shows: the fastest sine of the time embedding has period 0.004, so recomputing ``1 + i * dt`` in
    double (as LeRobot does) changes ten-step actions by 1e-4.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: found {num_steps}, expected >= 1")
    dt = torch.tensor(-1.0 / num_steps, dtype=torch.float32)
    time = torch.tensor(1.0, dtype=torch.float32)
    times = []
    while time >= -dt / 2:
        times.append(time.item())
        time = time + dt
    return times


def guidance_weight(time: float, num_steps: int) -> float:
    """How strongly a denoising step at ``time`` is drawn to its guide, eq. 2 and 4 of arXiv 2506.07339 (τ is 1 - t).

    It grows without bound towards either end. The limit is ``num_steps``, by which one step of 1/num_steps makes the
    whole correction; the paper takes 5 for its 5 steps.
    """
    tau = 1.0 - time
    return num_steps if tau * time <= 0 else min(num_steps, (tau * tau + time * time) / (tau * time))


def time_embedding(time: Tensor, dimension: int) -> Tensor:
    """Sine-cosine embedding of ``time`` (B,) or (B, S), in float64: (..., dimension) in time's dtype, sines first.

    Periods are geometric from 0.004 to 4.0, both included.
    """
    if dimension % 2:
        raise ValueError(f"dimension: found {dimension}, expected an even number")
    if time.ndim not in (1, 2):
        raise ValueError(f"time: found shape {tuple(time.shape)}, expected (batch,) or (batch, tokens)")
    fraction = torch.linspace(0.0, 1.0, dimension // 2, dtype=torch.float64, device=time.device)
    period = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** fraction
    angle = (1.0 / period * 2 * math.pi) * time[..., None]
    return torch.cat([torch.sin(angle), torch.cos(angle)], dim=-1).to(time.dtype)
