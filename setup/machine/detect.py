"""What this machine is, found without importing torch: memory, GPU, disk, container engine."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import Literal

from sparktune.setup.machine.gauges import ask_nvidia_smi
from sparktune.setup.plan.hostmemory import available_bytes, floor_gib, reserve_gib, total_bytes
from sparktune.setup.plan.schema import Machine

__all__ = ["cpu_count", "cpu_name", "detect_machine", "existing_parent", "host_memory_gib", "nvidia_gpus"]

_GIB = 2**30


def existing_parent(path: Path) -> Path:
    """Returns `path`, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def cpu_count() -> int:
    """Returns the cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """Returns the processor's name, or its architecture where the system does not say."""
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def host_memory_gib() -> float:
    """Returns the memory in GiB that a new process may use: available, and within the container's limit."""
    return available_bytes() / _GIB


def nvidia_gpus() -> list[tuple[str, tuple[int, int], float | None]]:
    """Returns (name, compute capability, free GiB or None where memory is unified) of each GPU that CUDA shows."""
    gpus = []
    for line in ask_nvidia_smi("name", "compute_cap", "memory.free"):
        name, capability, free = (part.strip() for part in line.rsplit(",", 2))
        major, _, minor = capability.partition(".")
        if major.isdigit() and minor.isdigit():
            # GB10 answers [N/A]: its GPU has no memory of its own
            gpus.append((name, (int(major), int(minor)), float(free) / 1024 if free.isdigit() else None))
    return gpus


def detect_machine(device: Literal["auto", "cpu", "cuda"], disk: Path) -> Machine:
    """Describes the machine a plan is made for.

    Args:
        device: the plan's device; auto takes the first NVIDIA GPU, else the CPU.
        disk: folder whose free space counts; it need not exist yet.
    """
    free_gib = shutil.disk_usage(existing_parent(disk)).free / _GIB
    gpus = [] if device == "cpu" else nvidia_gpus()
    if not gpus:
        return Machine(
            device="cpu", memory_gib=round(max(0.0, host_memory_gib() - floor_gib()), 2), cpu_name=cpu_name(),
            cpu_cores=cpu_count(), disk_free_gib=round(free_gib, 2), docker=shutil.which("docker") is not None,
        )
    name, capability, free = gpus[0]
    unified = max(0.0, host_memory_gib() - reserve_gib(total_bytes() / _GIB))
    return Machine(
        device="cuda", gpu_name=name, capability=capability, unified_memory=free is None,
        memory_gib=round(unified if free is None else free, 2), cpu_name=cpu_name(),
        gpus=sum((other, power) == (name, capability) for other, power, _ in gpus),
        cpu_cores=cpu_count(), disk_free_gib=round(free_gib, 2), docker=shutil.which("docker") is not None,
    )
