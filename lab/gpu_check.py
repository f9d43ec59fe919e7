"""On a GPU: every fused op right first, then its time and bytes a second, at the shapes of Qwen3.5-2B.

usage: python -m sparktune.lab.gpu_check [--seeds 20] [--out CSV] [--errors CSV] [--only NAME] [--no-time]

Correctness: the cases of lab/kernel_cases.py in fp32 and bf16 on the device against fp64, bf16 errors at most 1.05x
(RMS) and 1.5x (largest) the bf16 reference's over the seeds. Nothing is timed on red. Then medians of graph replays
with a cold cache (forward, and forward + backward), with the fewest bytes each op must move, so that TB/s says how near
it is to a copy.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from sparktune.lab.gpu_check_ops import TIMED, Timed
from sparktune.lab.kernel_cases import CASES, Case, errors_of
from sparktune.lab.measure import EXIT_NO_GPU, device_ms, lacks_gpu, machine_row
from sparktune.lab.table import append_rows

__all__ = ["main"]

FP32_LIMIT = 3e-5
FP32_FLOOR = 2e-6


@dataclass(frozen=True)
class Verdict:
    """One output or gradient of one case."""

    case: str
    what: str
    dtype: str
    rms_ratio: float
    max_ratio: float
    ok: bool


def _judge(case: Case, device: torch.device, seeds: int) -> list[Verdict]:
    verdicts = []
    for name, e in errors_of(case, torch.float32, device, 0).items():
        relative = e.tri_max / max(e.truth_max, 1e-30)
        verdicts.append(Verdict(case.name, name, "fp32", relative, relative, relative <= FP32_LIMIT))
    runs = [errors_of(case, torch.bfloat16, device, seed) for seed in range(seeds)]
    for name in runs[0]:
        rms, ref_rms = (math.sqrt(sum(getattr(r[name], k) for r in runs) / seeds) for k in ("tri_square", "ref_square"))
        largest, ref_largest = (max(getattr(r[name], k) for r in runs) for k in ("tri_max", "ref_max"))
        floor, max_floor = (FP32_FLOOR * max(getattr(r[name], k) for r in runs) for k in ("truth_rms", "truth_max"))
        ok = rms <= max(1.05 * ref_rms, floor) and largest <= max(1.5 * ref_largest, max_floor)
        verdicts.append(Verdict(
            case.name, name, "bf16", rms / max(ref_rms, 1e-30), largest / max(ref_largest, 1e-30), ok
        ))
    return verdicts


def check(device: torch.device, seeds: int, only: str, out: Path | None) -> bool:
    """Prints every red verdict and a summary, appends all verdicts to `out`; returns whether all are green."""
    # TF32 would make the fp32 reference, not the kernel, the one that is off
    torch.backends.cuda.matmul.allow_tf32 = False
    verdicts, broken = [], []
    for case in CASES:
        if only and only not in case.name:
            continue
        try:
            verdicts += _judge(case, device, seeds)
        except Exception as error:
            # one report of everything that is wrong costs less machine time than the first fault alone
            broken.append(case.name)
            print(f"BROKEN {case.name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    red = [v for v in verdicts if not v.ok]
    for v in red:
        print(f"RED {v.case} {v.what} {v.dtype}: RMS x{v.rms_ratio:.3g}, largest x{v.max_ratio:.3g}")
    worst = max((v.rms_ratio for v in verdicts if v.dtype == "bf16"), default=0.0)
    print(f"checked {len(verdicts)} outputs and gradients: {len(red)} red, {len(broken)} cases broken; "
          f"worst bf16 RMS ratio {worst:.3f}", flush=True)
    if out is not None:
        where = {**machine_row(), "seeds": seeds}
        append_rows(out, [{**where, **asdict(v)} for v in verdicts])
    return not red and not broken


def _host_us(call: Callable[[], object], repeats: int = 10) -> float:
    """Microseconds the host needs to queue one call: more than the device's time means launch-bound."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    spent = time.perf_counter() - begin
    torch.cuda.synchronize()
    return spent / repeats * 1e6


def _bench(op: Timed, copy_tb_s: float) -> dict[str, object]:
    inputs = op.make()
    forward_ms = device_ms(lambda: op.forward(inputs))
    row: dict[str, object] = {"op": op.name, "forward_ms": round(forward_ms, 4)}
    total_ms = None
    if op.step is not None:
        step = op.step
        total_ms = device_ms(lambda: step(inputs))
        row["step_ms"] = round(total_ms, 4)
    busy = total_ms if total_ms is not None else forward_ms
    if op.gbytes:
        row["gbytes"] = round(op.gbytes, 4)
        row["tb_s"] = round(op.gbytes / busy, 3)
        row["of_copy"] = round(op.gbytes / busy / copy_tb_s, 3)
    if op.gflop:
        row["tflop_s"] = round(op.gflop / busy, 1)
    row["host_us"] = round(_host_us(lambda: (op.step or op.forward)(inputs)))
    row["per_model"] = op.per_model
    row["model_ms"] = round(busy * op.per_model, 3)
    return row


def _copy_tb_s() -> float:
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / device_ms(lambda: target.copy_(source)) / 1e9


def bench(out: Path | None, only: str) -> None:
    """Times every op, prints a table, appends the rows to `out`."""
    copy_tb_s = _copy_tb_s()
    where = {**machine_row(), "copy_tb_s": round(copy_tb_s, 3)}
    print(f"copy {copy_tb_s:.2f} TB/s; model_ms is one forward and backward of 24 layers at 5376 tokens")
    columns = [
        "op", "forward_ms", "step_ms", "gbytes", "tb_s", "of_copy", "tflop_s", "host_us", "per_model", "model_ms",
    ]
    print(" ".join(f"{c:>38}" if c == "op" else f"{c:>10}" for c in columns), flush=True)
    rows = []
    for op in TIMED:
        if only and only not in op.name:
            continue
        try:
            row = _bench(op, copy_tb_s)
        except Exception as error:
            print(f"{op.name:>38} failed: {type(error).__name__}: {str(error)[:200]}", flush=True)
            continue
        torch.cuda.empty_cache()
        rows.append({**where, **{c: row.get(c, "") for c in columns}})
        print(" ".join(f"{row.get(c, '')!s:>38}" if c == "op" else f"{row.get(c, '')!s:>10}" for c in columns),
              flush=True)
    if out is not None:
        append_rows(out, rows)


def main() -> int:
    """Checks, then times. Returns 1 on red."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="bf16 seeds a case")
    default = os.path.join(os.environ["OUT"], "kernels.csv") if "OUT" in os.environ else None
    parser.add_argument("--out", type=Path, default=Path(default) if default else None, help="CSV to append to")
    parser.add_argument("--errors", type=Path, help="CSV of every output's and gradient's error over the reference's")
    parser.add_argument("--only", default="", help="only cases and ops whose name contains this")
    parser.add_argument("--no-time", action="store_true", help="correctness only")
    options = parser.parse_args()
    if lacks_gpu("Checking ops on a GPU"):
        return EXIT_NO_GPU
    start = time.time()
    green = check(torch.device("cuda"), options.seeds, options.only, options.errors)
    print(f"correctness took {time.time() - start:.0f} s", flush=True)
    if not green:
        print("nothing is timed on red", file=sys.stderr)
        return 1
    if not options.no_time:
        bench(options.out, options.only)
    print(f"all took {time.time() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
