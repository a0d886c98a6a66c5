"""What every benchmark shares: calls that take turns, intervals, what is kept of a study, processes, JSON with date and
machine, tables. Knows no benchmark.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from scipy.special import stdtrit
from torch.profiler import ProfilerActivity, profile

from selfalign_core.command_line import CORES
from selfalign_core.files import write_text
from selfalign_core.study.statistics import finite, share_interval

Device = Literal["cpu", "cuda"]
Checkpoint = Annotated[str, "checkpoint directory"]
Jobs = Annotated[int, "processes; changes no result"]

MIB = 2**20

# ---------------------------------------------------------------------------------------------------- time and memory


def take_turns(
    calls: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 2,
    seconds: float = 0.0,
    warm_up: int = 1,
    block: int = 1,
    device: str = "cpu",
) -> dict[str, np.ndarray]:
    """Milliseconds of every call, (n,) each, in rounds: what else the machine does meets all of them.

    In a round each has its turn, the first one last in every other round. ``warm_up`` rounds do not count; then until
    there were ``repeats`` of them and ``seconds`` are over. A turn of a ``block`` above 1 is so many calls after one
    that does not count, so that each finds the caches as its own last call left them.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    end, turn = time.perf_counter() + seconds, 0
    while turn < repeats + warm_up or time.perf_counter() < end:
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            found = [_time(calls[name], device) for _ in range(block + (block > 1))]
            times[name] += found[-block:] if turn >= warm_up else []
        turn += 1
    return {name: np.array(found) for name, found in times.items()}


def _time(call: Callable[[], object], device: str) -> float:
    synchronise(device)
    begin = time.perf_counter()
    call()
    synchronise(device)
    return 1e3 * (time.perf_counter() - begin)


def synchronise(device: str | torch.device) -> None:
    """Wait for what the device has to do."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def quartiles_of_ratio(above: np.ndarray, below: np.ndarray) -> list[float]:
    """Of two calls that took turns, turn by turn."""
    return np.quantile(above / below, [0.25, 0.75]).tolist()


def percentiles(values: Sequence[float] | np.ndarray, *which: int) -> dict[str, float]:
    """``p50`` and so on."""
    return {f"p{p}": float(np.percentile(values, p)) for p in which}


def peak_bytes(work: Callable[[], object], device: str | torch.device) -> int:
    """Most bytes of tensors that ``work`` held at a time beyond what there was before."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(sizes).max())


# ---------------------------------------------------------------------------------------------------------- intervals


def interval(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Mean, standard error and 95 % interval (Student's t) of independent ``values``, and how many there are.

    NaN does not count; what takes more values than there are is NaN.
    """
    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    count, mean = len(known), float(known.mean()) if len(known) else math.nan
    stderr = float(known.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan
    reach = stderr * float(stdtrit(count - 1, 0.975)) if count > 1 else math.nan
    return {"mean": mean, "stderr": stderr, "low": mean - reach, "high": mean + reach, "count": count}


def share(found: Sequence[bool]) -> dict[str, float]:
    """Share and its 95 % interval (Wilson)."""
    low, high = share_interval(sum(found), len(found))
    return {"mean": float(np.mean(found)), "low": low, "high": high, "count": len(found)}


def share_over_bodies(found: Sequence[Sequence[bool]]) -> dict[str, float]:
    """Of episodes per body: over bodies, but no narrower than over independent episodes (all may be 0 or 1)."""
    bodies, episodes = interval([float(np.mean(one)) for one in found]), share([s for one in found for s in one])
    low, high = np.nanmin([bodies["low"], episodes["low"]]), np.nanmax([bodies["high"], episodes["high"]])
    return {**bodies, "low": max(float(low), 0.0), "high": min(float(high), 1.0)}


# ------------------------------------------------------------------------------------------------ figures for machines


def save(path: str | Path | None, benchmark: str, **figures: Any) -> None:
    """Write the figures of a run with what they depend on besides. No path: nothing."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    if path is not None:
        write_json(path, {"benchmark": benchmark, "date": now, "machine": machine(), **figures})


def write_json(path: str | Path, values: Mapping[str, Any]) -> None:
    """Write ``values``, whole or not at all; a number that is not finite becomes null."""
    text = json.dumps(finite(values), indent=1) + "\n"
    write_text(Path(path), text)


def machine() -> dict[str, Any]:
    """Processor, cores, threads in use, GPU and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.isfile("/proc/cpuinfo") else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found: dict[str, Any] = {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": CORES,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


# --------------------------------------------------------------------------------------------------- figures for people


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table whose columns line up; all but the first column to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def text(line: Sequence[str]) -> str:
        first, *others = zip(line, widths, strict=True)
        return f"| {' | '.join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])} |"

    rule = "|".join("-" * (width + 1) + ("-" if i == 0 else ":") for i, width in enumerate(widths))
    print(text(header), f"|{rule}|", *map(text, rows), sep="\n")


def percent(value: Mapping[str, float] | None) -> str:
    """A share with its interval."""
    if value is None or math.isnan(value["mean"]):
        return "–"
    low, high = max(value["low"], 0.0), min(value["high"], 1.0)
    return f"{100 * value['mean']:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def say(text: str) -> None:
    """Progress."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def verdict(checks: Mapping[str, bool]) -> int:
    """Print what held and what did not; the exit status."""
    for check, holds in checks.items():
        print(f"{check}: {'yes' if holds else 'NO'}")
    return 0 if all(checks.values()) else 1


# ------------------------------------------------------------------------------------------------------- long studies


class Cache:
    """JSON files under ``root``; one counts only if it was made from the same ``inputs``."""

    def __init__(self, root: str | Path):
        self._root = Path(root)

    def get(self, name: str, inputs: dict[str, Any], make: Callable[[], Any]) -> Any:
        """The plain data kept as ``name``, made and kept first if it is missing or of other inputs."""
        path, inputs = self._root / f"{name}.json", json.loads(json.dumps(inputs))
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        if kept is None or kept.get("inputs") != inputs:
            kept = {"inputs": inputs, "value": make()}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, kept)
        return json.loads(json.dumps(kept["value"]))
