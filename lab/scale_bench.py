"""Steps of the native engine on one and on several GPUs: tok/s, tok/s a GPU against one, bytes sent a step.

    python -m sparktune.lab.scale_bench make --size 2B
    torchrun --standalone --nproc-per-node 4 -m sparktune.lab.scale_bench run --size 2B
    torchrun --standalone --nproc-per-node 4 -m sparktune.lab.scale_bench run --size 4B --full --recompute layer
    python -m sparktune.lab.scale_bench table

Every rank trains the same number of packs, so a step grows with the ranks; rank 0 appends a row to
docs/results/scale.csv.
`--cpu` measures gloo between processes on a CPU, which shows the program and no GPU's speed; with `--wire lo`, in a
network namespace of its own, also the bytes that the kernel carried, whoever counted them.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from sparktune.lab.measure import EXIT_NO_GPU, command_row, lacks_gpu, machine_row
from sparktune.lab.native import documents_row, recompute_fields
from sparktune.lab.shapes import LORA_TARGETS, make_model, random_documents
from sparktune.lab.table import append_rows
from sparktune.setup.plan.models import probe
from sparktune.setup.plan.rundir import cache_dir
from sparktune.setup.plan.scale import traffic
from sparktune.setup.plan.schema import Plan
from sparktune.training.distributed import Members, World
from sparktune.training.native_engine import NativeEngine

OUT = Path(__file__).resolve().parents[1] / "docs" / "results" / "scale.csv"
TARGETS = {"lora": 0.93, "full": 0.85}
"""Least tok/s a GPU on two and more, of that on one."""


def _folder(options: argparse.Namespace) -> Path:
    return Path(options.models) / options.size


def _make(options: argparse.Namespace) -> int:
    print(make_model(_folder(options), options.size))
    return 0


def _link_gb_per_s(world: World, device: torch.device) -> float:
    """Bytes a second that an all-reduce of 256 MiB sends from one rank, in GB/s; 0 alone."""
    if world.alone:
        return 0.0
    payload = torch.ones(2**26 if device.type == "cuda" else 2**22, device=device)
    times = []
    for _ in range(5):
        world.meet()
        start = time.perf_counter()
        dist.all_reduce(payload)
        float(payload[0])
        times.append(time.perf_counter() - start)
    sent = 2 * (world.size - 1) / world.size * payload.numel() * 4
    return sent / min(times) / 1e9


def _interface_bytes(name: str) -> int:
    """Bytes that an interface has sent since it came up."""
    return int(Path("/sys/class/net", name, "statistics", "tx_bytes").read_text(encoding="ascii"))


def _run(options: argparse.Namespace) -> int:
    world = World(members=Members.of(os.environ), tell=lambda text, aloud: print(text, file=sys.stderr))
    world.join()
    device = torch.device("cpu") if options.cpu else torch.device("cuda", world.members.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    folder = _folder(options)
    spec = probe(str(folder))
    plan = Plan(
        model=str(folder), mode="full" if options.full else "lora", dtype="float32" if options.cpu else "bfloat16",
        lora_r=options.lora_r, lora_alpha=float(options.lora_r), target_modules=LORA_TARGETS,
        gradient_accumulation=options.accum * world.size, ranks=world.size, **recompute_fields(options.recompute),
    )
    engine = NativeEngine.build(plan, spec, folder, device, world=world)
    lengths = [int(n) for n in options.lengths.split(",")]
    batches = [
        documents_row(random_documents(lengths, 0.35, seed=7 + world.rank * options.accum + i)).to(device)
        for i in range(options.accum)
    ]
    supervised = int(world.sums([sum(b.supervised_tokens for b in batches)])[0])
    times, losses = [], []
    on_wire = 0
    for number in range(options.warmup + options.steps):
        world.meet()
        if number == options.warmup and options.wire:
            on_wire = _interface_bytes(options.wire)
        before, start = world.sent_bytes, time.perf_counter()
        loss = engine.forward_backward(batches, supervised)
        engine.optimiser_step(1e-5)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
        losses.append(world.sums([float(loss)])[0])
    world.meet()
    on_wire = _interface_bytes(options.wire) - on_wire if options.wire else 0
    times = [max(world.largest(torch.tensor([t])).tolist()) for t in times[options.warmup :]]
    counted = world.sent_bytes - before
    foreseen = traffic(plan, spec, world.size, options.accum, gloo=options.cpu)
    gb_per_s = _link_gb_per_s(world, device)
    step_s = statistics.median(times)
    tokens = sum(lengths) * options.accum * world.size
    row = {
        **machine_row(), "size": options.size, "mode": plan.mode, "ranks": world.size, "lora_r": options.lora_r,
        "lengths": options.lengths, "accum_a_rank": options.accum, "recompute": options.recompute,
        "step_ms_p50": round(step_s * 1e3, 2), "step_ms_max": round(max(times) * 1e3, 2),
        "tok_per_s": round(tokens / step_s, 1), "tok_per_s_a_gpu": round(tokens / step_s / world.size, 1),
        "sent_mb_a_step": round((foreseen.total if options.full else counted) / 1e6, 2),
        "sent_is": "by formula" if options.full else "counted",
        "formula_mb_a_step": round(foreseen.total / 1e6, 2),
        "wire_mb_a_step": round(on_wire / options.steps / world.size / 1e6, 2) if options.wire else "",
        "link_gb_per_s": round(gb_per_s, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved(device) / 2**30, 2) if device.type == "cuda" else "",
        "first_loss": round(losses[0], 5), "last_loss": round(losses[-1], 5), **command_row(),
    }
    if world.leads:
        append_rows(Path(options.out), [row])
        print({k: row[k] for k in ("size", "mode", "ranks", "step_ms_p50", "tok_per_s", "tok_per_s_a_gpu",
                                   "sent_mb_a_step", "link_gb_per_s", "reserved_gib", "last_loss")}, flush=True)
    world.leave()
    return 0


def _table(options: argparse.Namespace) -> int:
    """Prints every several-rank row beside the latest one-rank row of the same setting, and the target."""
    with Path(options.out).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    keys = ("gpu", "size", "mode", "lengths", "accum_a_rank", "recompute")
    alone = {tuple(r[k] for k in keys): float(r["tok_per_s"]) for r in rows if r["ranks"] == "1"}
    for row in rows:
        base = alone.get(tuple(row[k] for k in keys))
        if row["ranks"] == "1" or base is None:
            continue
        share = float(row["tok_per_s_a_gpu"]) / base
        verdict = "" if row["gpu"].startswith("CPU") or "x86" in row["gpu"] else (
            "met" if share >= TARGETS[row["mode"]] else f"missed: {TARGETS[row['mode']]} wanted"
        )
        print(f"{row['size']} {row['mode']} on {row['ranks']} x {row['gpu']}: {row['tok_per_s']} tok/s, "
              f"{share:.3f} a GPU of one's {base:,.0f}; {row['sent_mb_a_step']} MB a step ({row['sent_is']}) {verdict}")
    return 0


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "run", "table"))
    parser.add_argument("--size", default="2B")
    parser.add_argument("--models", default=str(cache_dir("bench")))
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--lora-r", type=int, default=128)
    parser.add_argument("--lengths", default="5376", help="documents of a micro-batch")
    parser.add_argument("--accum", type=int, default=2, help="micro-batches a rank and step")
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--wire", default="", metavar="INTERFACE",
                        help="also count what left this interface in the timed steps: lo, where all ranks are here")
    parser.add_argument("--out", default=str(OUT))
    options = parser.parse_args()
    if options.what == "run" and not options.cpu and lacks_gpu("A row (--cpu measures gloo between processes)"):
        return EXIT_NO_GPU
    return {"make": _make, "run": _run, "table": _table}[options.what](options)


if __name__ == "__main__":
    sys.exit(main())
