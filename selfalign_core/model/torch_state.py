"""What torch keeps per process (seed of the global generator, number of threads), for threads that each own a model.

Gradient and inference modes, and a GPU's stream, are per thread already, and nothing here changes how numbers are
rounded; the model's own noise comes from generators of its own. What is left is guarded here, so that two models in one
process compute exactly what each would by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from selfalign_core.errors import ConfigError

_LOCK = threading.RLock()


@contextmanager
def exclusive() -> Iterator[None]:
    """For building a model: it draws from the generator that all threads share. One thread at a time."""
    with _LOCK:
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The CPU's global generator begins at ``seed`` and is afterwards where it was. One thread at a time."""
    with exclusive(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def use_threads(count: int) -> None:
    """Let this thread's operations use ``count`` CPU threads, whatever other threads use."""
    with exclusive():
        torch.set_num_threads(count)
        # A thread takes the number over at its first operation: the one set last, which another may have set by then.
        torch.get_num_threads()


def check_device(name: str) -> None:
    """Raise :class:`ConfigError` unless the torch device ``name`` can be had."""
    try:
        place = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: found {name!r}, expected cpu, cuda or cuda:N ({error})") from None
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device: found {name!r} but {torch.cuda.device_count()} GPUs that torch {torch.__version__} can use, "
            "expected cpu, or a GPU with its driver and a CUDA build of torch"
        )


def use_stream(device: str, *, urgent: bool) -> None:
    """Let this thread's work on a GPU go before that of other threads of the process, or after it. Nothing on a CPU."""
    check_device(device)
    place = torch.device(device)
    if place.type == "cuda":
        least, greatest = torch.cuda.current_stream(place).priority_range()
        torch.cuda.set_stream(torch.cuda.Stream(place, priority=greatest if urgent else least))
