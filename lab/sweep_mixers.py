"""On a GPU: every listed configuration of the attention and delta rule kernels, right first, then timed.

usage: PYTHONPATH=src python -m sparktune.lab.sweep_mixers [--only attention | delta_rule]

A configuration that Triton refuses (shared memory), or whose gradients are off, is listed and never timed: on Hopper
Triton 3.4 to 3.7.0 miscompiles some products (flash-linear-attention issues 640 and 984), so right is checked for each.
The winners go into the tables of kernels/*/function.py by hand.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from sparktune.kernels.gated_delta_rule import function as delta_rule
from sparktune.kernels.gated_delta_rule.reference import gated_delta_rule_reference
from sparktune.kernels.varlen_attention import function as attention
from sparktune.kernels.varlen_attention.reference import varlen_attention_reference
from sparktune.lab.gpu_check_mixers import (
    attention_inputs,
    attention_run,
    boundaries,
    delta_rule_inputs,
    delta_rule_run,
    errors,
)
from sparktune.lab.measure import EXIT_NO_GPU, device_ms, lacks_gpu

__all__ = ["main"]

# (block_m, block_n, num_warps, num_stages[, heads_per_program]) of the forward, dq and dk/dv kernels at head_dim 256
ATTENTION = (
    [(128, 64, 8, 2), (128, 32, 8, 3), (128, 32, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 8, 2), (64, 64, 8, 1)],
    [(128, 32, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 4, 2), (64, 32, 8, 1), (128, 32, 8, 1)],
    [(32, 64, 8, 2, 1), (64, 64, 8, 2, 1), (64, 64, 8, 1, 1), (16, 64, 8, 2, 1), (32, 64, 8, 2, 4), (32, 32, 8, 1, 1),
     (32, 32, 8, 1, 4), (32, 64, 8, 3, 1)],
)
DELTA_RULE: dict[str, list[dict[str, int]]] = {
    "prepare": [{"prepare_warps": w} for w in (2, 4, 8)],
    "scan": [{"scan_block_v": v, "scan_warps": w, "scan_stages": s}
             for v, w in ((16, 4), (32, 4), (64, 4), (32, 8), (16, 2), (32, 2)) for s in (1, 2, 3)],
    "output": [{"output_warps": w} for w in (4, 8)],
    "prepare_backward": [{"prepare_backward_warps": w} for w in (2, 4, 8)],
    "wy": [{"wy_warps": w, "wy_block": b} for w in (4, 8) for b in (16, 32, 64)],
    "gradients": [{"gradients_warps": w, "gradients_block_v": b} for w in (4, 8) for b in (16, 32, 64)],
}


@contextmanager
def _patched(module: object, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _kernel_us(call: Callable[[], object], kernel: str) -> float:
    """Mean microseconds of the launches whose name begins with `kernel`, over five calls."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(5):
            call()
        torch.cuda.synchronize()
    spans = [e.time_range.end - e.time_range.start for e in profiler.events()
             if e.device_type == torch.autograd.DeviceType.CUDA and e.name.startswith(kernel)]
    return sum(spans) / 5


def sweep_attention() -> None:
    """Prints microseconds a launch at 5376 tokens, 8/2 heads, one document."""
    small = attention_inputs(421, 8, 2, 256)
    truth = attention_run(varlen_attention_reference, [x.double() for x in small], [300, 121])
    large = attention_inputs(5376, 8, 2, 256)
    kernels = ("attention_forward_kernel", "attention_dq_kernel", "attention_dkv_kernel")
    base = attention.attention_configs(torch.cuda.get_device_capability(), 256)
    for i, (kernel, candidates) in enumerate(zip(kernels, ATTENTION, strict=True)):
        for candidate in candidates:
            chosen = list(base)
            chosen[i] = attention._config(*candidate)
            with _patched(attention, "attention_configs", lambda capability, dim, chosen=tuple(chosen): chosen):
                try:
                    found = errors(attention_run(attention.varlen_attention_fused, small, [300, 121]), truth)
                    worst = max(rms for rms, _ in found)
                    us = _kernel_us(
                        lambda: attention_run(attention.varlen_attention_fused, large, [5376]), kernel
                    ) if worst < 1e-2 else float("nan")
                    print(f"{kernel:26} {candidate!s:22} error {worst:.1e} {us:9.1f} us", flush=True)
                except Exception as error:
                    print(f"{kernel:26} {candidate!s:22} {type(error).__name__}: {str(error)[:120]}", flush=True)


def sweep_delta_rule() -> None:
    """Prints milliseconds of device time of forward and backward at 5376 tokens, 16 heads, one document."""
    small = delta_rule_inputs(421, 16, 16)
    truth = delta_rule_run(gated_delta_rule_reference, [x.double() for x in small], [300, 121])
    *given, do = delta_rule_inputs(5376, 16, 16)
    given = [x.detach().requires_grad_() for x in given]
    tables = boundaries([5376])
    best = delta_rule.delta_rule_configs(torch.cuda.get_device_capability())
    for part, candidates in DELTA_RULE.items():
        results = []
        for candidate in candidates:
            chosen = dataclasses.replace(best, **candidate)
            with _patched(delta_rule, "delta_rule_configs", lambda capability, chosen=chosen: chosen):
                try:
                    found = errors(delta_rule_run(delta_rule.gated_delta_rule_fused, small, [300, 121]), truth)
                    worst = max(rms for rms, _ in found)
                    if not worst < 3e-2:
                        print(f"{part:18} {candidate} WRONG: error {worst:.1e}", flush=True)
                        continue
                    forward = device_ms(lambda: delta_rule.gated_delta_rule_fused(*given, *tables))
                    step = device_ms(lambda: torch.autograd.grad(
                        delta_rule.gated_delta_rule_fused(*given, *tables), given, do))
                    results.append((step, candidate))
                    print(f"{part:18} {candidate} error {worst:.1e} forward {forward:.4f} step {step:.4f} ms",
                          flush=True)
                except Exception as error:
                    print(f"{part:18} {candidate} {type(error).__name__}: {str(error)[:120]}", flush=True)
        if results:
            # each part is chosen with the best of the parts before it
            best = dataclasses.replace(best, **min(results, key=lambda r: r[0])[1])
    print(f"best: {best}")


def main() -> int:
    """Runs one sweep or both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("attention", "delta_rule"))
    options = parser.parse_args()
    if lacks_gpu("The sweep"):
        return EXIT_NO_GPU
    if options.only != "delta_rule":
        sweep_attention()
    if options.only != "attention":
        sweep_delta_rule()
    return 0


if __name__ == "__main__":
    sys.exit(main())
