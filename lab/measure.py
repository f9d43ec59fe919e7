"""Times optimiser steps and single calls the same way for every engine: wall clock, GPU-busy time, launches, memory."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from sparktune.lab.table import append_rows, commit_name

__all__ = [
    "EXIT_NO_GPU", "StepTimes", "append_row", "command_row", "device_ms", "lacks_gpu", "machine_row", "measure_steps",
    "profile_step", "steps_row",
]

EXIT_NO_GPU = 3
"""As everywhere: the machine lacks something (docs/architecture.md)."""
PEERS = ("peft", "fla-core", "causal-conv1d", "tilelang", "unsloth", "liger-kernel")


def lacks_gpu(what: str) -> bool:
    """Says on standard error that `what` needs a CUDA GPU, where torch sees none."""
    if torch.cuda.is_available():
        return False
    print(f"{what} needs a CUDA GPU; torch {torch.__version__} sees none here. Nothing was run.", file=sys.stderr)
    return True


@dataclass(kw_only=True)
class StepTimes:
    """What one engine did over some steps."""

    variant: str
    tok_per_s: float
    """Real tokens over the median step's wall time."""
    step_ms_p20: float
    step_ms_p50: float
    step_ms_p80: float
    peak_gib: float
    """Largest allocation of the timed steps, by PyTorch's allocator. A CUDA graph's activations are not in it."""
    reserved_gib: float
    """Most memory the allocator held, a graph's pool and fragmentation included: the figure to hold against a limit."""
    gpu_busy_ms: float | None = None
    """Union of all kernels' and copies' time in one profiled step."""
    launches: int | None = None
    """Kernels and copies in that step."""
    losses: list[float] = field(default_factory=list)
    """The loss of every step, warm-up included."""


def measure_steps(variant: str, step: Callable[[], torch.Tensor], tokens: int, *, warmup: int, steps: int,
                  profile: bool = True) -> StepTimes:
    """Runs `warmup` + `steps` optimiser steps and, if asked, one more under the profiler.

    Args:
        variant: the row's name.
        step: runs one optimiser step and returns its loss as a tensor on the device.
        tokens: real tokens of a step.
        warmup: steps not counted (compilation, autotuning).
        steps: steps timed, each between synchronisations.
        profile: take one further step under torch.profiler.
    """
    losses = [step() for _ in range(warmup)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(step())
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    times.sort()
    p20, p50, p80 = (times[min(len(times) - 1, int(q * len(times)))] for q in (0.2, 0.5, 0.8))
    row = StepTimes(variant=variant, tok_per_s=tokens / p50 * 1e3, step_ms_p20=p20, step_ms_p50=p50, step_ms_p80=p80,
                    peak_gib=torch.cuda.max_memory_allocated() / 2**30,
                    reserved_gib=torch.cuda.max_memory_reserved() / 2**30, losses=[float(x) for x in losses])
    if profile:
        row.gpu_busy_ms, row.launches, _ = profile_step(step)
    return row


def profile_step(step: Callable[[], torch.Tensor]) -> tuple[float, int, list[tuple[str, float, int]]]:
    """Returns (GPU-busy ms, launches, [(kernel, total ms, calls)] most expensive first) of one step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((e.time_range.start, e.time_range.end) for e in events)
    busy = 0.0
    end = float("-inf")
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    totals: dict[str, tuple[float, int]] = {}
    for e in events:
        ms, calls = totals.get(e.name, (0.0, 0))
        totals[e.name] = (ms + (e.time_range.end - e.time_range.start) / 1e3, calls + 1)
    table = sorted(((name, ms, calls) for name, (ms, calls) in totals.items()), key=lambda row: -row[1])
    return busy / 1e3, len(spans), table


def device_ms(call: Callable[[], object], repeats: int = 5, replays: int = 9) -> float:
    """Returns the median device time of one call with a cold cache, launch gaps left out.

    A graph of (flush the cache, call) `repeats` times, less a graph of the flushes alone. The capture also proves that
    the call never waits for the device: it raises what the capture raises where one does.

    Args:
        call: what to time; its inputs stay where they are between replays.
        repeats: calls in a graph.
        replays: of each graph.
    """
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")

    def both() -> None:
        flush.zero_()
        call()

    return (_replay_ms(both, repeats, replays) - _replay_ms(flush.zero_, repeats, replays)) / repeats


def _replay_ms(body: Callable[[], object], repeats: int, replays: int) -> float:
    """Median time of one replay of a graph that holds `repeats` calls of `body`."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            body()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            body()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def machine_row() -> dict[str, str]:
    """Returns what a row must say about where it was measured.

    LAB_SITTING names the sitting and may be unset; of the commit, see `commit_name`.
    """
    import transformers
    import triton

    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
        "torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__,
        "commit": commit_name(),
        "date": time.strftime("%Y-%m-%d %H:%M"), "sitting": os.environ.get("LAB_SITTING", ""),
    }


def command_row() -> dict[str, str]:
    """Returns the command that was started and the versions of the peers' packages that are installed."""
    module = sys.modules["__main__"].__spec__
    name = module.name if module else sys.argv[0]
    versions = []
    for package in PEERS:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"packages": "; ".join(versions), "command": shlex.join(["python", "-m", name, *sys.argv[1:]])}


def steps_row(times: StepTimes, **extra: object) -> dict[str, object]:
    """Returns the CSV row of one engine's steps: machine, settings, figures, losses, command."""
    losses = [round(x, 5) for x in times.losses]
    figures = {name: round(x, 3) if isinstance(x, float) else x for name, x in asdict(times).items()}
    return {**machine_row(), **extra, **figures, "losses": json.dumps(losses),
            "first_loss": losses[0] if losses else "", "last_loss": losses[-1] if losses else "", **command_row()}


def append_row(path: Path, times: StepTimes, **extra: object) -> None:
    """Appends the row of one engine's steps to a CSV."""
    append_rows(path, [steps_row(times, **extra)])
