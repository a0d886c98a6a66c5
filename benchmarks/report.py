"""What every benchmark does with its figures: intervals, tables, JSON with date and machine. Knows no benchmark."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from selfalign_core.errors import SelfAlignError
from selfalign_core.files import write_text

MIB = 2**20


def record(benchmark: str, **figures: Any) -> dict[str, Any]:
    """The figures of a run with what they depend on besides."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"benchmark": benchmark, "date": now, "machine": machine(), **figures}


def machine() -> dict[str, Any]:
    """Processor, cores, threads in use, GPU and versions."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors that ``work`` held at a time beyond what there was before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(sizes).max())


def write_json(path: str | Path | None, values: dict[str, Any]) -> None:
    """Write ``values``, whole or not at all; a number that is not finite becomes null. No path: nothing."""
    if path is None:
        return
    path = Path(path)
    text = json.dumps(_finite(values), indent=1) + "\n"
    write_text(path, text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table whose columns line up; all but the first column to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def text(line: Sequence[str]) -> str:
        cells = [v.ljust(w) if i == 0 else v.rjust(w) for i, (v, w) in enumerate(zip(line, widths, strict=True))]
        return f"| {' | '.join(cells)} |"

    print(text(header))
    print("|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|")
    for row in rows:
        print(text(row))


def mean_and_stderr(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and standard error of those that are numbers; NaN where there are too few."""
    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    if not len(known):
        return math.nan, math.nan
    return float(known.mean()), float(known.std(ddof=1) / math.sqrt(len(known))) if len(known) > 1 else math.nan


def interval(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Mean, standard error and 95 % interval (Student's t) of independent ``values``, and how many there are."""
    mean, stderr = mean_and_stderr(values)
    count = int((~np.isnan(np.asarray(values, np.float64))).sum())
    reach = math.nan if count < 2 else _t_quantile(count - 1) * stderr
    return {"mean": mean, "stderr": stderr, "low": mean - reach, "high": mean + reach, "count": count}


def _t_quantile(degrees: int) -> float:
    """97.5 % quantile of Student's t: exact to three digits up to 4 degrees of freedom, then by expansion."""
    exact = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
    if degrees in exact:
        return exact[degrees]
    z = statistics.NormalDist().inv_cdf(0.975)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / degrees + second / degrees**2


def run_command(work: Callable[[], int]) -> int:
    """Exit status of ``work``, 2 on anything a user can act on."""
    try:
        return work()
    except (SelfAlignError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
