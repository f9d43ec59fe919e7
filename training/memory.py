"""The memory a training process really has and really used. Predictions live in setup/plan/memory.py."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from pathlib import Path
from typing import Literal

import torch

from sparktune.setup.plan.schema import Machine

__all__ = ["available_gib", "choose_recompute", "is_unified", "measure_machine", "peak_gib", "reset_peak"]

GIB = 2**30
Recompute = Literal["auto", "none", "norms", "layer", "all"]
Policy = Literal["none", "norms", "layer", "all"]


def _host_available_bytes() -> int:
    """Reads MemAvailable, and the control group's limit where one is lower."""
    available = 0
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.is_file() and used.is_file():
        text = limit.read_text(encoding="ascii").strip()
        if text != "max":
            available = min(available, max(0, int(text) - int(used.read_text(encoding="ascii"))))
    return available


def is_unified(device: torch.device) -> bool:
    """Says whether GPU and CPU share one pool of memory (GB10): cudaMemGetInfo is then blind to the page cache."""
    return device.type == "cuda" and bool(torch.cuda.get_device_properties(device).is_integrated)


def available_gib(device: torch.device) -> float:
    """Measures what a training process on `device` may still take, in GiB.

    A discrete GPU reports its own free memory; on the CPU and on unified memory the host's MemAvailable counts, since
    the page cache can be given back.
    """
    if device.type == "cuda" and not is_unified(device):
        free, _ = torch.cuda.mem_get_info(device)
        return free / GIB
    return _host_available_bytes() / GIB


def reset_peak(device: torch.device) -> None:
    """Starts a new measurement of the peak where the device can (a process's own peak on the CPU cannot be reset)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float:
    """Returns the highest use so far, in GiB: of the device's allocator, or of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / GIB


def measure_machine(device: torch.device) -> Machine:
    """Describes this machine as training finds it; `memory_gib` is what is free now."""
    gpu = device.type == "cuda"
    return Machine(
        device="cuda" if gpu else "cpu",
        gpu_name=torch.cuda.get_device_name(device) if gpu else None,
        capability=torch.cuda.get_device_capability(device) if gpu else None,
        unified_memory=is_unified(device),
        memory_gib=available_gib(device),
        cpu_cores=len(os.sched_getaffinity(0)),
        disk_free_gib=shutil.disk_usage(os.curdir).free / GIB,
    )


def choose_recompute(asked: Recompute, device: torch.device) -> tuple[Policy, str]:
    """Returns the recompute policy and the reason for it."""
    if asked != "auto":
        return asked, "as asked for"
    if device.type == "cpu":
        return "none", "a CPU has memory to spare and no cycles"
    return "layer", "keeps one activation per layer, which fits every budget that fits the weights"
