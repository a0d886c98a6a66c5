"""The fast way to sample actions: same numbers as ``Pi0.sample_actions``, which is the specification."""

from selfalign_core.model.fast.sampler import FastSampler

__all__ = ["FastSampler"]
