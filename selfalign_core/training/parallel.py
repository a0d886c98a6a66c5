"""Ranks of a torchrun job: start, wrap the joint model (DDP or FSDP2), sum over ranks. The model knows nothing of it.

FSDP2 is composed as torchtitan does it: every transformer layer is a unit of its own, the rest is the root's.
"""

from __future__ import annotations

import datetime
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from selfalign_core.errors import ConfigError, SelfAlignError
from selfalign_core.model.gemma import KeyValues
from selfalign_core.model.pi0 import Losses
from selfalign_core.training.joint import JointModel

TIMEOUT = datetime.timedelta(minutes=30)
"""A rank that waits longer for the others gives up. One that died is noticed by torchrun at once."""


T = TypeVar("T")

_LOST = ("Connection", "gloo", "NCCL", "ncclRemote", "Timed out")


class RankError(SelfAlignError):
    """Another rank of the job is gone or has failed, so this one cannot go on."""


@dataclass(frozen=True)
class Ranks:
    """This process's place in the job; ``distributed`` is False without torchrun."""

    rank: int
    world_size: int
    device: torch.device
    distributed: bool

    @property
    def first(self) -> bool:
        """True on the one rank that writes files and logs."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum(torch.zeros(1))

    def sum(self, values: Tensor) -> Tensor:
        """``values`` summed over the ranks."""
        if self.distributed:
            with lost_rank(self):
                dist.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        return self.sum(values) / self.world_size

    def gather(self, work: Callable[[], T]) -> list[T]:
        """What ``work`` returns on each rank, by rank: something small. The ranks wait for each other.

        Raises:
            RankError: ``work`` failed on another rank; on that one, what it raised. So all ranks end and none waits.
        """
        if not self.distributed:
            return [work()]
        failure, value = None, None
        try:
            value = work()
        except Exception as error:
            failure = error
        found: list[Any] = [None] * self.world_size
        with lost_rank(self):
            dist.all_gather_object(found, (failure and str(failure), value))
        if failure is not None:
            raise failure
        for rank, (text, _) in enumerate(found):
            if text is not None:
                raise RankError(f"rank {self.rank}: rank {rank} cannot go on, so the job ends: {text}")
        return [value for _, value in found]


@contextmanager
def start_ranks(device: str) -> Iterator[Ranks]:
    """Join the job that torchrun started, or be alone. ``device``: ``auto``, ``cpu`` or ``cuda``."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"device: found {device!r}, expected 'auto', 'cpu' or 'cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: found 'cuda' but no GPU, expected 'cpu' or 'auto'")
    if "WORLD_SIZE" not in os.environ:
        yield Ranks(0, 1, torch.device(device), False)
        return
    place = torch.device(device)
    if device == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), place, True)
    finally:
        dist.destroy_process_group()


def end_process(status: int) -> NoReturn:
    """Exit with ``status``; a rank of a job without Python's finalisation.

    torch's collectives run in threads that outlive the process group (FSDP's caches refer to it). One that lets go of
    its last tensor while the interpreter is being finalised aborts the process (pytorch/pytorch #179291).
    """
    if "WORLD_SIZE" not in os.environ:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def lost_rank(ranks: Ranks) -> Iterator[None]:
    """Turn the error of a collective call whose partner died into one that says so."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if ranks.distributed and any(sign in text for sign in _LOST):
            raise RankError(
                f"rank {ranks.rank}: lost another of the {ranks.world_size} ranks ({text.splitlines()[0][:200]}); "
                "the job ends, resume it from the last checkpoint with --resume"
            ) from error
        raise


def parallelise(
    joint: JointModel, ranks: Ranks, mode: Literal["ddp", "fsdp"], precision: Literal["float32", "bfloat16"]
) -> nn.Module:
    """``joint`` as the ranks train it together: itself when alone, wrapped by DDP, or sharded in place by FSDP2."""
    if not ranks.distributed:
        return joint
    if mode == "ddp":
        return DistributedDataParallel(joint, forward_sync_buffers=False, gradient_as_bucket_view=True)
    return _shard(joint, ranks, precision)


def _shard(joint: JointModel, ranks: Ranks, precision: Literal["float32", "bfloat16"]) -> JointModel:
    _register_outputs()
    # True of the keys and values, and harmless: the model changes nothing in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = dist.device_mesh.init_device_mesh(ranks.device.type, (ranks.world_size,))
    # Shards stay float32, the master weights; with bfloat16 a layer is gathered and computed in it.
    low = torch.bfloat16 if precision == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
    experts = joint.model.paligemma_with_expert
    paligemma = experts.paligemma.model
    units: list[nn.Module] = [
        *paligemma.vision_tower.vision_model.encoder.layers,
        paligemma.vision_tower.vision_model.post_layernorm,
        paligemma.multi_modal_projector,
        *experts.language_model.layers,
        *experts.gemma_expert.model.layers,
        *(experts.alignment_expert.model.layers if experts.alignment_expert is not None else ()),
    ]
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    # Of the VLM's last layer only keys and values are read (GemmaStack.forward), through this method.
    register_fsdp_forward_method(experts.language_model.layers[-1], "project")
    fully_shard(joint, mesh=mesh)
    return joint


def _register_outputs() -> None:
    """FSDP looks for tensors inside what a module returns; it has to be able to see into our records."""
    for kind in (KeyValues, Losses):
        if kind not in pytree.SUPPORTED_NODES:
            torch.export.register_dataclass(kind)


@contextmanager
def accumulating(module: nn.Module, *, last: bool) -> Iterator[None]:
    """A forward and backward pass of an accumulated step: gradients are exchanged in the ``last`` one only."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    with nullcontext() if last or not isinstance(module, DistributedDataParallel) else module.no_sync():
        yield


def copy_into(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a plain or sharded one, without communication."""
    with torch.no_grad():
        if isinstance(target, DTensor):
            value = distribute_tensor(
                value.to(target.device), target.device_mesh, target.placements, src_data_rank=None
            )
        target.copy_(value)


def peak_memory(device: torch.device) -> dict[str, Any]:
    """Peak memory of this process: ``memory_mib`` of RAM and, on a GPU, ``gpu_memory_mib``."""
    import resource

    figures = {"memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)}
    if device.type == "cuda":
        figures["gpu_memory_mib"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return figures
