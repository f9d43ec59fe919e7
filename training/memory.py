"""The memory a training process really has and really used. Predictions live in setup/plan/memory.py."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from pathlib import Path

import torch

from sparktune.setup.plan.errors import UsageError
from sparktune.setup.plan.hostmemory import available_bytes, floor_gib, reserve_gib
from sparktune.setup.plan.memory import RUNTIME_GIB, cheapest_policy
from sparktune.setup.plan.schema import DatasetReport, Machine, ModelSpec, Plan
from sparktune.training.tower import RecomputePolicy

__all__ = [
    "available_gib", "cap_allocator", "check_recompute_layers", "choose_recompute", "host_available_gib",
    "host_floor_gib", "is_out_of_memory", "is_unified", "measure_machine", "peak_gib", "reset_peak",
]

GIB = 2**30


def is_unified(device: torch.device) -> bool:
    """Says whether GPU and CPU share one pool of memory (GB10): cudaMemGetInfo is then blind to the page cache."""
    return device.type == "cuda" and bool(torch.cuda.get_device_properties(device).is_integrated)


def available_gib(device: torch.device) -> float:
    """Measures what a training process on `device` may still take, in GiB.

    A discrete GPU reports its own free memory, and what our allocator has cached of it counts as free too. On the CPU
    and on unified memory the host's MemAvailable counts, since the page cache can be given back, less what must stay
    free: `floor_gib`, and `reserve_gib` on unified memory.
    """
    if device.type != "cuda":
        return max(0.0, available_bytes() / GIB - floor_gib())
    free, total = torch.cuda.mem_get_info(device)
    if not is_unified(device):
        return (free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)) / GIB
    return max(0.0, available_bytes() / GIB - reserve_gib(total / GIB))


FLOOR_SHARE = 0.8
"""Of the reserve: below that the watchdog stops a run. Our own allocator never takes any of it."""
_CPU_REFUSALS = ("can't allocate memory", "not enough memory", "Cannot allocate memory")


def host_available_gib() -> float:
    """Returns the host's free memory, page cache included, within its control groups' limits, in GiB."""
    return available_bytes() / GIB


def host_floor_gib(device: torch.device) -> float:
    """Returns the free host memory below which a run stops, in GiB.

    On unified memory that is most of the reserve, elsewhere a hundredth of what machine and control groups allow.
    """
    if is_unified(device):
        return FLOOR_SHARE * reserve_gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB)
    return floor_gib()


def cap_allocator(device: torch.device) -> float | None:
    """On unified memory, keeps torch's allocator from taking the reserve. Returns the cap in GiB, None elsewhere.

    An allocation above the cap fails as an ordinary out-of-memory error in this process, where the same allocation
    without it would take the machine down.
    """
    if not is_unified(device):
        return None
    total = torch.cuda.mem_get_info(device)[1] / GIB
    cap = min(available_gib(device), total - reserve_gib(total))
    torch.cuda.set_per_process_memory_fraction(max(cap, 0.0) / total, device)
    return cap


def is_out_of_memory(error: BaseException) -> bool:
    """Says whether an error means that an allocation failed, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _CPU_REFUSALS)


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
    """Describes this machine as training finds it.

    `memory_gib` is what is free now; where the estimate of a plan counts host memory, also what this process already
    holds of it: the estimate counts the process as a whole.
    """
    gpu = device.type == "cuda"
    own = min(RUNTIME_GIB, _resident_gib()) if not gpu or is_unified(device) else 0.0
    return Machine(
        device="cuda" if gpu else "cpu",
        gpu_name=torch.cuda.get_device_name(device) if gpu else None,
        capability=torch.cuda.get_device_capability(device) if gpu else None,
        unified_memory=is_unified(device),
        memory_gib=available_gib(device) + own,
        cpu_cores=len(os.sched_getaffinity(0)),
        disk_free_gib=shutil.disk_usage(os.curdir).free / GIB,
    )


def _resident_gib() -> float:
    """Memory of this process that no file backs, in GiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next((int(line.split()[1]) * 1024 / GIB for line in lines if line.startswith("RssAnon:")), 0.0)


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
