"""Writes docs/results/sm121a_kernels.csv: what every own kernel needs on GB10, from the compiler alone.

usage: python -m sparktune.lab.sm121a_table [SIZE ...]       (default: all five sizes; about a second a kernel)
"""

from __future__ import annotations

import csv
import sys
from dataclasses import asdict
from pathlib import Path

import triton

from sparktune.lab.shapes import SIZES
from sparktune.lab.sm121a import SHARED_LIMIT, Compiled, compile_for_gb10
from sparktune.lab.sm121a_launches import launches_of_size
from sparktune.lab.sm121a_mixers import mixer_launches

__all__ = ["main"]

TARGET = Path(__file__).resolve().parent.parent / "docs" / "results" / "sm121a_kernels.csv"


def _print(rows: list[tuple[Compiled, str]]) -> None:
    print(f"{'kernel':46} {'variant':34} {'shared':>7} {'regs':>5} {'stack':>6} {'spill':>6} {'mma':>4} {'load':>5}")
    for row, variant in rows:
        print(f"{row.name:46} {variant:34} {row.shared_bytes:7} {row.registers:5} {row.stack_bytes:6} "
              f"{row.spill_bytes:6} {'yes' if row.mma else '-':>4} {row.widest_load_bits:5}")


def main(sizes: list[str]) -> int:
    """Compiles, prints and writes the table; returns 1 if a kernel exceeds GB10's shared memory or spills."""
    rows, written = [], []
    for size in sizes or list(SIZES):
        for launch in (*launches_of_size(size), *mixer_launches(size)):
            result = compile_for_gb10(launch)
            flags = {k: v for k, v in launch.constants.items() if isinstance(v, bool) and v}
            variant = " ".join(k.lower() for k in flags)
            rows.append((result, variant))
            written.append({
                **asdict(result), "variant": variant, "num_warps": launch.num_warps, "has_dot": launch.has_dot,
                "fits": result.shared_bytes <= SHARED_LIMIT, "triton": triton.__version__, "target": "sm_121a",
            })
    _print(rows)
    if not sizes:
        with TARGET.open("w", newline="") as file:
            table = csv.DictWriter(file, fieldnames=list(written[0]))
            table.writeheader()
            table.writerows(written)
    bad = [r["name"] for r in written if not r["fits"] or r["spill_bytes"] or (r["has_dot"] and not r["mma"])]
    for name in bad:
        print(f"does not hold on GB10: {name}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
