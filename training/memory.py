"""The memory a training process really has and really used. Predictions live in setup/plan/memory.py."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from pathlib import Path

import torch

from sparktune.setup.plan.errors import UsageError
from sparktune.setup.plan.memory import cheapest_policy
from sparktune.setup.plan.schema import DatasetReport, Machine, ModelSpec, Plan
from sparktune.training.tower import RecomputePolicy

__all__ = [
    "available_gib", "check_recompute_layers", "choose_recompute", "is_unified", "measure_machine", "peak_gib",
    "reserve_gib", "reset_peak",
]

GIB = 2**30
RESERVE_SHARE = 0.05
RESERVE_LEAST_GIB = 4.0
"""Left to the system on unified memory: a GB10 that runs out takes the whole machine with it, not one process."""


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

    A discrete GPU reports its own free memory, and what our allocator has cached of it counts as free too. On the CPU
    and on unified memory the host's MemAvailable counts, since the page cache can be given back; on unified memory
    less `reserve_gib`.
    """
    if device.type != "cuda":
        return _host_available_bytes() / GIB
    free, total = torch.cuda.mem_get_info(device)
    if not is_unified(device):
        return (free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)) / GIB
    return max(0.0, _host_available_bytes() / GIB - reserve_gib(total / GIB))


def reserve_gib(total_gib: float) -> float:
    """Returns what a training process leaves to the system where it shares its memory, in GiB.

    Args:
        total_gib: memory of the machine.
    """
    return max(RESERVE_LEAST_GIB, RESERVE_SHARE * total_gib)


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


def check_recompute_layers(plan: Plan, spec: ModelSpec) -> None:
    """Refuses a number of layers without the policy and the engine it belongs to.

    Raises:
        UsageError: that, or more layers than the model has.
    """
    layers = plan.recompute_layers
    if layers is not None and (plan.recompute != "layer" or plan.engine == "unsloth" or layers > spec.num_layers):
        raise UsageError(
            f"--recompute-layers should be 1 to {spec.num_layers}, with --recompute layer and the native engine; seen: "
            f"{layers} with --recompute {plan.recompute} --engine {plan.engine}. Change it or leave it out."
        )

def choose_recompute(
    plan: Plan, spec: ModelSpec, report: DatasetReport, machine: Machine
) -> tuple[RecomputePolicy, int | None, str]:
    """Returns the recompute policy, how many layers it computes again whole (None: what the policy says), and why.

    On a GPU `auto` takes what computes least again and whose estimated peak fits in what is free.

    Args:
        plan: complete but for `recompute`.
        spec: the model's shape.
        report: the data's report.
        machine: as measured; `memory_gib` is what is free, the reserve already taken off.

    Raises:
        UsageError: as `check_recompute_layers`.
    """
    check_recompute_layers(plan, spec)
    if plan.recompute != "auto":
        return plan.recompute, plan.recompute_layers, "as asked for"
    if machine.device == "cpu":
        return "none", None, "a CPU has memory to spare and no cycles"
    if plan.engine == "unsloth":
        return "layer", None, "Unsloth's own checkpointing, its default"
    chosen, tried = cheapest_policy(plan, spec, report, machine)
    peaks = ", ".join(f"{estimate.recompute} {estimate.total_gib:.1f}" for estimate in tried)
    verdict = "computes least again of what fits" if chosen.total_gib <= machine.memory_gib else "no policy fits"
    if chosen.layers is not None:
        verdict += f": the first {chosen.layers} of {spec.num_layers} layers whole, of the others norms and activations"
    reason = f"estimated peaks in GiB: {peaks}; {machine.memory_gib:.1f} are free: {verdict}"
    return chosen.policy, chosen.layers, reason
