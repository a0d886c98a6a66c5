"""On a GPU that they share the policy goes first: alignment stops between two layers, and never for ever.

The claims are the same on a CPU, so all but the streams is tested there.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from small_models import random_batch, random_observation, small_policy
from torch import Tensor

from selfalign_core.alignment.scoring import Scorer
from selfalign_core.errors import ConfigError
from selfalign_core.model.device_turns import DeviceTurns, HandBack
from selfalign_core.model.fast import FastSampler
from selfalign_core.model.gemma import GemmaLayer
from selfalign_core.model.pi0 import Pi0
from selfalign_core.model.torch_state import use_stream


class Alignment:
    """One gradient by the token, and how many layers have been run so far."""

    def __init__(self) -> None:
        self.policy = small_policy()
        self.layers = 0
        self._scorer = Scorer(self.policy, (1.0, 1.0, 1.0))
        for module in self.policy.model.modules():
            if isinstance(module, GemmaLayer):
                module.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.layers += 1

    def loss(self) -> tuple[Tensor, Tensor]:
        data = self._scorer.prepare(random_batch(self.policy, 6))
        token = self.policy.model.peft_prefix_token.detach().clone().requires_grad_(True)
        return self._scorer.weighted(self._scorer.losses(data, self._scorer.noise(data, 1, 0), token)).mean(), token

    def gradient(self) -> Tensor:
        loss, token = self.loss()
        return torch.autograd.grad(loss, [token])[0]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "gpu.lock"


def test_alignment_waits_between_layers_while_a_policy_computes(file: Path) -> None:
    expected = Alignment().gradient()
    alignment, policys, computing = Alignment(), DeviceTurns(file), ExitStack()
    seen: list[int] = []

    def clock() -> float:
        """Read by the one who waits; the policy is ready when it has been read five times."""
        seen.append(alignment.layers)
        if len(seen) == 5:
            computing.close()
        return 0.0

    HandBack(alignment.policy.model, DeviceTurns(file), 1000.0, clock=clock)
    computing.enter_context(policys.claimed())
    loss, token = alignment.loss()
    assert seen[:5] == [0] * 5  # in the vision tower, before any other layer
    assert alignment.layers > 0
    seen.clear()
    computing.enter_context(policys.claimed())
    (found,) = torch.autograd.grad(loss, [token])
    assert len(seen) > 5  # on the way back too
    assert torch.equal(found, expected)


def test_a_policy_that_never_gets_ready_does_not_stop_alignment(file: Path) -> None:
    alignment, seconds = Alignment(), iter(range(10**6))
    HandBack(alignment.policy.model, DeviceTurns(file), 10_000.0, clock=lambda: float(next(seconds)))
    with DeviceTurns(file).claimed():
        alignment.gradient()
    waited = next(seconds)
    assert 10 < waited < 100  # once, and not again in every layer


def test_a_claim_ends_with_its_process(file: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from selfalign_core.model.device_turns import DeviceTurns\n"
        f"with DeviceTurns(Path({str(file)!r})).claimed(): print('claimed', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    turns = DeviceTurns(file)
    try:
        assert process.stdout.readline() == "claimed\n"
        assert turns.is_claimed()
        with DeviceTurns(file).claimed():  # several policies at a time
            assert turns.is_claimed()
        assert turns.is_claimed()
    finally:
        process.kill()
        process.wait()
    assert not turns.is_claimed()


@pytest.mark.parametrize("fast", [True, False])
def test_a_policy_claims_its_device_while_it_infers(file: Path, monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    policy, looks = small_policy(), DeviceTurns(file)
    policy.turns, policy.fast = DeviceTurns(file), fast
    seen: list[bool] = []

    def watched(work: Callable) -> Callable:
        return lambda *args, **options: (seen.append(looks.is_claimed()), work(*args, **options))[1]

    sampler = FastSampler if fast else Pi0
    monkeypatch.setattr(sampler, "sample_actions", watched(sampler.sample_actions))
    policy.infer(random_observation(policy))
    assert seen == [True]
    assert not looks.is_claimed()


def test_on_a_cpu_nothing_is_claimed_and_no_layer_is_watched() -> None:
    policy = small_policy()
    HandBack(policy.model, policy.turns, 1000.0)
    assert not policy.turns.shared
    assert not any(module._forward_hooks for module in policy.model.modules())
    with policy.turns.claimed():
        assert not policy.turns.is_claimed()
    use_stream("cpu", urgent=True)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing/gpu\.lock"):
        DeviceTurns(tmp_path / "missing" / "gpu.lock")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_in_one_process_the_policys_stream_comes_first() -> None:
    found: dict[bool, int] = {}

    def work(urgent: bool) -> None:
        use_stream("cuda", urgent=urgent)
        found[urgent] = torch.cuda.current_stream().priority

    for urgent in (False, True):
        thread = threading.Thread(target=work, args=(urgent,))
        thread.start()
        thread.join()
    assert found[True] < found[False]  # lower numbers come first
