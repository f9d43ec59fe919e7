"""On a GPU: attention and the gated delta rule right first, then timed beside PyTorch's and fla's.

usage: python -m sparktune.lab.gpu_check_mixers [--only NAME] [--seeds 20] [--value-heads N] [--no-time] [--out CSV]
           [--errors CSV]

Correctness: odd documents, grouped heads, a window; bf16 against fp64. Attention's error is at most 1.05x (RMS) and
1.5x (largest) the bf16 reference's. The delta rule's reference computes in fp32 throughout, which no tensor-core form
can match: there the limit is a relative RMS error, and fla's is printed beside ours. Candidates that cannot run say
why. Nothing is timed on red. Times: device time of graph replays with a cold cache, and wall time of 18 calls in a row
from Python, forward and backward, which shows what the host costs.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from sparktune.kernels.gated_delta_rule.fla_function import gated_delta_rule_fla
from sparktune.kernels.gated_delta_rule.function import gated_delta_rule_fused
from sparktune.kernels.gated_delta_rule.reference import gated_delta_rule_reference
from sparktune.kernels.varlen_attention.function import varlen_attention_flash, varlen_attention_fused
from sparktune.kernels.varlen_attention.reference import varlen_attention_reference
from sparktune.lab.measure import EXIT_NO_GPU, device_ms, lacks_gpu, machine_row
from sparktune.lab.table import append_rows

__all__ = [
    "attention_inputs", "attention_run", "boundaries", "delta_rule_inputs", "delta_rule_run", "errors", "main",
]

Tensors = list[torch.Tensor]
Attention = Callable[..., torch.Tensor]
Row = dict[str, object]
OWN_RULES = ("triton", "triton keep_states")
PACKED = [1732, 911, 2048, 403, 282]
"""5376 tokens in documents of 1,075 on average."""


def boundaries(lengths: Sequence[int], device: str = "cuda") -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cu_seqlens on the device and on the host."""
    host = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return host.to(device), host


def attention_inputs(tokens: int, heads: int, kv_heads: int, dim: int, seed: int = 0) -> Tensors:
    """q (strided, as the prologue's input is), k, v and the output's gradient, bf16."""
    g = torch.Generator("cuda").manual_seed(seed)
    wide = torch.randn(tokens, heads, 2 * dim, device="cuda", generator=g).to(torch.bfloat16)
    k, v = (torch.randn(tokens, kv_heads, dim, device="cuda", generator=g).to(torch.bfloat16) for _ in range(2))
    do = torch.randn(tokens, heads, dim, device="cuda", generator=g).to(torch.bfloat16)
    return [wide[..., :dim], k, v, do]


def attention_run(attention: Attention, tensors: Tensors, lengths: Sequence[int], window: int | None = None) -> Tensors:
    """Returns o, dq, dk, dv."""
    *given, do = tensors
    given = [x.detach().requires_grad_() for x in given]
    cu, cu_cpu = boundaries(lengths)
    o = attention(*given, cu, cu_cpu, max(lengths), scale=given[0].shape[-1] ** -0.5, window=window)
    return [o.detach(), *torch.autograd.grad(o, given, do)]


def delta_rule_inputs(tokens: int, key_heads: int, value_heads: int, seed: int = 0) -> Tensors:
    """q, k, v (columns of one matrix, as the convolution hands them over), g, beta and the output's gradient."""
    g = torch.Generator("cuda").manual_seed(seed)
    sizes = [key_heads * 128, key_heads * 128, value_heads * 128]
    product = torch.randn(tokens, sum(sizes), device="cuda", generator=g).to(torch.bfloat16)
    q, k, v = (x.unflatten(1, (-1, 128)) for x in product.split(sizes, 1))
    # decays as the model makes them: exp(A_log) between 1 and 16, softplus of a small number
    rate = torch.linspace(0.02, 1.6, value_heads, device="cuda")
    decay = -rate * torch.rand(tokens, value_heads, device="cuda", generator=g)
    beta = torch.rand(tokens, value_heads, device="cuda", generator=g)
    do = torch.randn(tokens, value_heads, 128, device="cuda", generator=g).to(torch.bfloat16)
    return [q, k, v, decay, beta, do]


def delta_rule_run(rule: Callable[..., torch.Tensor], tensors: Tensors, lengths: Sequence[int]) -> Tensors:
    """Returns o, dq, dk, dv, dg, dbeta."""
    *given, do = tensors
    given = [x.detach().requires_grad_() for x in given]
    o = rule(*given, *boundaries(lengths))
    return [o.detach(), *torch.autograd.grad(o, given, do)]


def errors(got: Tensors, truth: Tensors) -> list[tuple[float, float]]:
    """(relative RMS error, relative largest error) of each tensor; infinite where one is not finite."""
    out = []
    for a, b in zip(got, truth, strict=True):
        a, b = a.double(), b.double()
        if not a.isfinite().all():
            out.append((float("inf"), float("inf")))
            continue
        rms = (a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp_min(1e-30)
        out.append((rms.item(), ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()))
    return out


def fla_public(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor,
               cu_seqlens: torch.Tensor, cu_seqlens_cpu: torch.Tensor) -> torch.Tensor:
    """fla's public function, as models call it."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    o, _ = chunk_gated_delta_rule(
        q[None], k[None], v[None], g=g[None], beta=beta[None], use_qk_l2norm_in_kernel=True, cu_seqlens=cu_seqlens,
        cu_seqlens_cpu=cu_seqlens_cpu,
    )
    return o[0]


def _keep_states(*args: torch.Tensor) -> torch.Tensor:
    return gated_delta_rule_fused(*args, keep_states=True)


ATTENTION: dict[str, Attention] = {"triton": varlen_attention_fused, "flash": varlen_attention_flash}
DELTA_RULE: dict[str, Callable[..., torch.Tensor]] = {
    "triton": gated_delta_rule_fused, "triton keep_states": _keep_states, "fla thin": gated_delta_rule_fla,
    "fla public": fla_public,
}
ATTENTION_CASES: list[tuple[list[int], int, int, int, int | None]] = [
    ([700], 8, 2, 256, None), ([130, 1, 517, 64], 8, 2, 256, None), ([300, 77], 24, 4, 256, None),
    ([130, 1, 517], 8, 2, 128, None), ([130, 517], 8, 8, 64, None), ([130, 517], 8, 2, 256, 100), ([400], 4, 1, 64, 33),
]
DELTA_RULE_CASES: list[tuple[list[int], int, int]] = [
    ([700], 16, 16), ([130, 1, 517, 64], 16, 16), ([300, 77], 16, 32), ([130, 65], 16, 48), (PACKED, 16, 16),
]
ATTENTION_NAMES, DELTA_RULE_NAMES = ("o", "dq", "dk", "dv"), ("o", "dq", "dk", "dv", "dg", "dbeta")


class Trial:
    """One case over some seeds, its inputs and float64 truths made once.

    Args:
        make: seed -> inputs.
        run: runs a candidate on inputs and returns its output and gradients.
        reference: the candidate whose float64 results are the truth.
        seeds: how many.
    """

    def __init__(self, make: Callable[[int], Tensors], run: Callable[..., Tensors], reference: Callable[..., Any],
                 seeds: int) -> None:
        self.run, self.inputs = run, [make(seed) for seed in range(seeds)]
        self.truths = [run(reference, [x.double() for x in tensors]) for tensors in self.inputs]

    def errors(self, candidate: Callable[..., Any]) -> list[tuple[float, float]]:
        """Returns (RMS over the seeds of the relative RMS error, largest relative error) of each tensor."""
        runs = [errors(self.run(candidate, x), truth) for x, truth in zip(self.inputs, self.truths, strict=True)]
        return [(math.sqrt(statistics.fmean(rms**2 for rms, _ in tensor)), max(largest for _, largest in tensor))
                for tensor in zip(*runs, strict=True)]


def check_attention(seeds: int) -> tuple[set[str], list[Row]]:
    """Prints every candidate's error over the reference's; returns the candidates right everywhere, and the rows."""
    right, rows = set(ATTENTION), []
    for lengths, heads, kv_heads, dim, window in ATTENTION_CASES:
        shape = f"{lengths} heads {heads}/{kv_heads} D {dim} window {window}"
        trial = Trial(partial(attention_inputs, sum(lengths), heads, kv_heads, dim),
                      partial(attention_run, lengths=lengths, window=window), varlen_attention_reference, seeds)
        limit = trial.errors(varlen_attention_reference)
        for name, attention in ATTENTION.items():
            label = f"attention {name:8} {shape}"
            try:
                found = trial.errors(attention)
            except Exception as error:
                right.discard(name)
                print(f"CANNOT {label}: {type(error).__name__}: {str(error)[:240]}", flush=True)
                continue
            ratios = [(a[0] / b[0], a[1] / b[1]) for a, b in zip(found, limit, strict=True)]
            ok = all(rms <= 1.05 and largest <= 1.5 for rms, largest in ratios)
            right -= set() if ok else {name}
            parts = " ".join(f"{n} {r:.2f}/{m:.2f}" for n, (r, m) in zip(ATTENTION_NAMES, ratios, strict=True))
            print(f"{'ok ' if ok else 'RED'} {label}: {parts}", flush=True)
            rows += [{"op": "attention", "candidate": name, "shape": shape, "seeds": seeds, "what": what, "ok": ok,
                      "rms_over_reference": round(r, 4), "largest_over_reference": round(m, 4)}
                     for what, (r, m) in zip(ATTENTION_NAMES, ratios, strict=True)]
    return right, rows


def check_delta_rule(seeds: int, value_heads_only: int | None = None) -> tuple[set[tuple[str, bool]], list[Row]]:
    """Prints every candidate's relative RMS error; returns the (candidate, with grouped heads) right, and the rows."""
    right = {(name, grouped) for name in DELTA_RULE for grouped in (False, True)}
    rows: list[Row] = []
    for lengths, key_heads, value_heads in DELTA_RULE_CASES:
        if value_heads_only not in (None, value_heads):
            continue
        shape = f"{lengths} heads {key_heads}/{value_heads}"
        runs = seeds if sum(lengths) < 1000 else 2  # the long case takes most of the time
        trial = Trial(partial(delta_rule_inputs, sum(lengths), key_heads, value_heads),
                      partial(delta_rule_run, lengths=lengths), gated_delta_rule_reference, runs)
        for name, rule in DELTA_RULE.items():
            label = f"delta rule {name:18} {shape}"
            try:
                found = trial.errors(rule)
            except Exception as error:
                right.discard((name, value_heads > key_heads))
                print(f"CANNOT {label}: {type(error).__name__}: {str(error)[:240]}", flush=True)
                continue
            ok = all(rms <= (3e-2 if n == "dg" else 1e-2) for n, (rms, _) in zip(DELTA_RULE_NAMES, found, strict=True))
            right -= set() if ok else {(name, value_heads > key_heads)}
            parts = " ".join(f"{n} {r:.1e}" for n, (r, _) in zip(DELTA_RULE_NAMES, found, strict=True))
            print(f"{'ok ' if ok else 'RED'} {label}: {parts}", flush=True)
            rows += [{"op": "delta rule", "candidate": name, "shape": shape, "seeds": runs, "what": what, "ok": ok,
                      "relative_rms": f"{r:.3e}", "relative_largest": f"{m:.3e}"}
                     for what, (r, m) in zip(DELTA_RULE_NAMES, found, strict=True)]
    return right, rows


def _wall_ms(call: Callable[[], object], layers: int = 18) -> float:
    """Wall milliseconds a call when `layers` follow one another."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(layers):
            call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e3 / layers)
    return statistics.median(times)


def _row(op: str, name: str, shape: str, layers: int, forward: Callable[[], object], step: Callable[[], object]) \
        -> dict[str, object]:
    row: dict[str, object] = {"op": op, "candidate": name, "shape": shape, "forward_ms": "", "step_ms": ""}
    row["wall_ms"] = round(_wall_ms(step), 4)
    try:
        row["forward_ms"], row["step_ms"] = round(device_ms(forward), 4), round(device_ms(step), 4)
        row["model_ms"] = round(float(row["step_ms"]) * layers, 2)
    except Exception as error:
        print(f"{op} {name}: not capturable in a graph ({type(error).__name__}); wall time only", flush=True)
        row["model_ms"] = round(float(row["wall_ms"]) * layers, 2)
    print(f"{op:10} {name:18} {shape:26} forward {row['forward_ms']!s:>8} step {row['step_ms']!s:>8} "
          f"wall {row['wall_ms']!s:>8} x{layers} = {row['model_ms']}", flush=True)
    return row


def _profile(label: str, step: Callable[[], object]) -> None:
    """Prints the device time of every kernel of one step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    print(f"kernels of one {label}: {len(events)}")
    for e in events:
        print(f"    {(e.time_range.end - e.time_range.start):8.1f} us  {e.name[:90]}")


def _calls(function: Callable[..., torch.Tensor], given: Tensors, do: torch.Tensor, *rest: object, **options: object) \
        -> tuple[Callable[[], object], Callable[[], object]]:
    """Returns the forward, and the forward with the gradients of `given`."""
    given = [x.detach().requires_grad_() for x in given]

    def forward() -> torch.Tensor:
        return function(*given, *rest, **options)

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(forward(), given, do)

    return forward, step


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x[None].transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def bench_attention(right: set[str]) -> list[dict[str, object]]:
    """Times the right candidates, and PyTorch's SDPA where one document fills the row."""
    rows = []
    for heads, kv_heads in ((8, 2), (16, 4)):
        for lengths in ([5376], PACKED):
            *given, do = attention_inputs(5376, heads, kv_heads, 256)
            cu, cu_cpu = boundaries(lengths)
            calls = {
                name: _calls(f, given, do, cu, cu_cpu, max(lengths), scale=256**-0.5)
                for name, f in ATTENTION.items() if name in right
            }
            if len(lengths) == 1:
                calls["sdpa"] = _calls(_sdpa, given, do)
            for name, (forward, step) in calls.items():
                shape = f"{len(lengths)} docs {heads}/{kv_heads} D 256"
                rows.append(_row("attention", name, shape, 6, forward, step))
                if heads == 8:
                    _profile(f"attention {name} {shape}", step)
    return rows


def bench_delta_rule(right: set[tuple[str, bool]]) -> list[dict[str, object]]:
    """Times the right candidates."""
    rows = []
    for value_heads in (16, 32):
        for lengths in ([5376], PACKED):
            *given, do = delta_rule_inputs(5376, 16, value_heads)
            shape = f"{len(lengths)} docs 16/{value_heads}"
            for name in (n for n in DELTA_RULE if (n, value_heads > 16) in right):
                forward, step = _calls(DELTA_RULE[name], given, do, *boundaries(lengths))
                rows.append(_row("delta rule", name, shape, 18, forward, step))
                if value_heads == 16:
                    _profile(f"delta rule {name} {shape}", step)
    return rows


def main() -> int:
    """Checks, then times what is right. Returns 1 if one of our own kernels is red."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.path.join(os.environ["OUT"], "mixers.csv") if "OUT" in os.environ else None
    parser.add_argument("--out", type=Path, default=Path(default) if default else None, help="CSV to append to")
    parser.add_argument("--seeds", type=int, default=20, help="seeds a case; one where the truth is long")
    parser.add_argument("--errors", type=Path, help="CSV of every output's and gradient's error")
    parser.add_argument("--only", choices=("attention", "delta_rule"), help="one of the two ops")
    parser.add_argument("--no-time", action="store_true", help="correctness only")
    parser.add_argument("--value-heads", type=int, help="of the delta rule's cases only those with so many; no times")
    options = parser.parse_args()
    if lacks_gpu("Checking the mixers on a GPU"):
        return EXIT_NO_GPU
    start = time.time()
    right_attention, found = check_attention(options.seeds) if options.only != "delta_rule" else (set(), [])
    right_rule, more = (check_delta_rule(options.seeds, options.value_heads) if options.only != "attention"
                        else (set(), []))
    if options.errors is not None:
        append_rows(options.errors, [{**machine_row(), **row} for row in (*found, *more)])
    print(f"correctness took {time.time() - start:.0f} s", flush=True)
    red = []
    if options.only != "delta_rule" and "triton" not in right_attention:
        red.append("attention")
    if options.only != "attention" and not {(n, g) for n in OWN_RULES for g in (False, True)} <= right_rule:
        red.append("delta rule")
    if red:
        print(f"nothing is timed on red: {', '.join(red)}", file=sys.stderr)
        return 1
    if options.no_time or options.value_heads:
        return 0
    rows = (bench_attention(right_attention) if options.only != "delta_rule" else [])
    rows += bench_delta_rule(right_rule) if options.only != "attention" else []
    if options.out is not None:
        append_rows(options.out, [{**machine_row(), **row} for row in rows])
    print(f"all took {time.time() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
