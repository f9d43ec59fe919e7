"""Device-memory bytes a token from the GPU's DRAM counters, read by Nsight Compute around one optimiser step.

usage: python -m lab.dram VARIANT [--size 2B] [--lengths 5376] [--accum 1] [--csv FILE]

Starts itself under `ncu`: the inner process warms up, then runs one step between cudaProfilerStart and Stop, operator
by operator (a replayed graph launches the same kernels). Caches and clocks are left as they are, so what the L2 keeps
is not counted. Where ncu is missing or may not count, exits 3 with its reason; then bytes are counted from tensors
(lab/profile.py), for every engine the same way.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

__all__ = ["METRICS", "Traffic", "main", "read_traffic"]

METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
INSIDE = "LAB_DRAM_INSIDE"
Traffic = dict[str, tuple[int, int, int]]
"""Kernel -> (bytes read, bytes written, launches)."""


def read_traffic(lines: Iterable[str]) -> Traffic:
    """Reads ncu's raw CSV page in base units: a header that starts with "ID", a row of units, a row a launch."""
    rows = csv.reader(line for line in lines if line.startswith('"'))
    header = next((row for row in rows if row[0] == "ID"), None)
    if header is None:
        return {}
    name, read, write = (header.index(column) for column in ("Kernel Name", *METRICS))
    traffic: Traffic = {}
    for row in rows:
        if not row[0]:  # the units
            continue
        before_read, before_written, launches = traffic.get(row[name], (0, 0, 0))
        more_read, more_written = (int(float(row[i].replace(",", ""))) for i in (read, write))
        traffic[row[name]] = before_read + more_read, before_written + more_written, launches + 1
    return traffic


def profiled_step() -> None:
    """The inner process: warms up and runs one step that ncu sees."""
    from sparktune.lab.side_by_side import NativeRun, build_run, parse, variants_of

    options = parse()
    if options.variant.startswith("unsloth"):
        import_module("unsloth")  # it must come before transformers
    import torch

    from sparktune.lab.documents import documents_of
    from sparktune.lab.shapes import make_model

    folder = make_model(options.folder / options.size, options.size)
    ((what, layout),) = variants_of(options.variant)
    documents = documents_of(options)[0]
    longest = max(max(sum(pack), documents.row_tokens or 0) for pack in documents.packs)
    run = build_run(options, what, folder, longest, several=False)
    if isinstance(run, NativeRun):
        run.without_graphs("a profile of kernels, launched one by one")
    step = run.step_of(documents, options.supervised, layout)
    for _ in range(options.warmup + 1):
        step()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    step()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def under_ncu(tool: str, arguments: list[str], limit_s: int) -> tuple[Traffic, str]:
    """Returns what ncu counted of the inner process, and what it said if that is nothing."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        command = [
            tool, "--metrics", ",".join(METRICS), "--profile-from-start", "off", "--cache-control", "none",
            "--clock-control", "none", "--target-processes", "application-only", "--csv", "--page", "raw",
            "--print-units", "base", "--log-file", str(log), sys.executable, "-m", "sparktune.lab.dram", *arguments,
        ]
        done = subprocess.run(command, env={**os.environ, INSIDE: "1"}, capture_output=True, text=True,
                              timeout=limit_s, check=False)
        text = log.read_text(errors="replace") if log.exists() else ""
        traffic = read_traffic(text.splitlines())
        return traffic, "" if traffic else (text + done.stdout + done.stderr)[-600:]


def main() -> int:
    """Counts one variant and prints what moved most and a JSON line."""
    if os.environ.get(INSIDE):
        profiled_step()
        return 0
    from sparktune.lab.documents import documents_of
    from sparktune.lab.side_by_side import parse

    options = parse()
    tool = shutil.which("ncu")
    if tool is None:
        print("DRAM counters are read by ncu (Nsight Compute), which is not on PATH. Count bytes from tensors instead: "
              "python -m lab.profile.", file=sys.stderr)
        return 3
    traffic, reason = under_ncu(tool, sys.argv[1:], limit_s=560)
    if not traffic:
        print(f"ncu counted nothing: {reason}\nCount bytes from tensors instead: python -m lab.profile.",
              file=sys.stderr)
        return 3
    from sparktune.lab.measure import command_row, machine_row
    from sparktune.lab.table import append_rows

    documents = documents_of(options)[0]
    read, written, launches = (sum(values) for values in zip(*traffic.values(), strict=True))
    for name, (r, w, n) in sorted(traffic.items(), key=lambda item: -sum(item[1][:2]))[:25]:
        print(f"{(r + w) / 1e9:9.3f} GB {n:6d}  {name[:100]}", file=sys.stderr)
    row = {
        **machine_row(), "variant": options.variant, "size": options.size, "lengths": documents.name,
        "accum": len(documents.packs), "rank": options.rank, "supervised": options.supervised,
        "recompute": options.recompute if options.variant.startswith("native") else "",
        "launches": launches, "gb_read": round(read / 1e9, 3), "gb_written": round(written / 1e9, 3),
        "gb": round((read + written) / 1e9, 3), "bytes_per_token": round((read + written) / documents.real_tokens),
        "launches_per_token": round(launches / documents.real_tokens, 4),
        "bytes_are": "DRAM counters, read by ncu a kernel at a time", **command_row(),
    }
    print(json.dumps(row))
    if options.csv:
        append_rows(options.csv, [row])
    return 0


if __name__ == "__main__":
    sys.exit(main())
