"""The memory planner against the GPU: many plans, each built, run for two steps, measured and freed.

usage: python -m lab.memory_sweep [--folder DIR] [--csv FILE] [--only TEXT] [--small | --quantised] [--limit-s 220]

Measured is torch.cuda.max_memory_allocated of the second step, passes run eagerly, beside `PeakEstimate.allocator_gib`.
Rows named `graphs` let the engine capture its CUDA graphs and measure max_memory_reserved, beside the same estimate
with the graphs' cost: a pool is reserved as a whole, so these rows are compared but not judged.
Exits 1 if a judged plan lies outside +7 % (too much foreseen) or -3 % (too little).
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from sparktune.lab.measure import EXIT_NO_GPU, lacks_gpu, machine_row
from sparktune.lab.native import build_engine, micro_batches, recompute_fields
from sparktune.lab.shapes import LORA_TARGETS, make_model
from sparktune.lab.table import append_rows
from sparktune.setup.plan.memory import PeakEstimate, predict_peak
from sparktune.setup.plan.models import probe
from sparktune.setup.plan.rundir import cache_dir
from sparktune.setup.plan.schema import Plan
from sparktune.training.memory import measure_machine

__all__ = ["SWEEP", "Trial", "main", "verdict"]

OVER, UNDER = 0.07, 0.03
SUPERVISED = 0.35
ACCUM = 2


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One plan of the sweep."""

    size: str
    mode: str
    tokens: int
    recompute: str
    rank: int = 128
    documents: int = 1
    graphs: bool = False
    storage: str = "none"
    """Of the base: none, nf4 or int8."""
    optimizer: str = "adamw"

    @property
    def name(self) -> str:
        """What a row is called."""
        rank = f" r{self.rank}" if self.mode == "lora" else ""
        words = [f"{self.size} {self.mode}{rank} {self.tokens} {self.recompute}"]
        words += [self.storage] if self.storage != "none" else []
        words += [self.optimizer] if self.optimizer != "adamw" else []
        return " ".join([*words, "graphs"] if self.graphs else words)


SWEEP = (
    Trial(size="0.8B", mode="lora", tokens=1024, recompute="none"),
    Trial(size="0.8B", mode="lora", tokens=5376, recompute="none", rank=16),
    Trial(size="0.8B", mode="lora", tokens=16384, recompute="norms", rank=32, documents=5),
    Trial(size="0.8B", mode="lora", tokens=16384, recompute="layer"),
    Trial(size="0.8B", mode="full", tokens=4096, recompute="none"),
    Trial(size="0.8B", mode="full", tokens=8192, recompute="layer"),
    Trial(size="2B", mode="lora", tokens=2048, recompute="none"),
    Trial(size="2B", mode="lora", tokens=5376, recompute="none"),
    Trial(size="2B", mode="lora", tokens=5376, recompute="norms"),
    Trial(size="2B", mode="lora", tokens=5376, recompute="layer"),
    Trial(size="2B", mode="lora", tokens=16384, recompute="all", rank=16, documents=4),
    Trial(size="2B", mode="full", tokens=5376, recompute="norms"),
    Trial(size="2B", mode="full", tokens=5376, recompute="all"),
    Trial(size="4B", mode="lora", tokens=4096, recompute="norms"),
    Trial(size="4B", mode="lora", tokens=8192, recompute="layer", documents=3),
    Trial(size="4B", mode="lora", tokens=5376, recompute="none", rank=32),
    Trial(size="0.8B", mode="lora", tokens=4096, recompute="layer", rank=64, storage="nf4"),
    Trial(size="0.8B", mode="full", tokens=4096, recompute="layer", optimizer="adamw_8bit"),
    Trial(size="2B", mode="lora", tokens=5376, recompute="norms", storage="nf4"),
    Trial(size="2B", mode="lora", tokens=5376, recompute="layer", storage="int8"),
    Trial(size="2B", mode="lora", tokens=2048, recompute="none", optimizer="adamw_8bit"),
    Trial(size="2B", mode="full", tokens=5376, recompute="layer", optimizer="paged_adamw_8bit"),
    Trial(size="4B", mode="lora", tokens=4096, recompute="layer", storage="nf4", optimizer="paged_adamw_32bit"),
    Trial(size="0.8B", mode="lora", tokens=5376, recompute="norms", graphs=True),
    Trial(size="2B", mode="lora", tokens=5376, recompute="norms", graphs=True),
    Trial(size="2B", mode="lora", tokens=5376, recompute="layer", graphs=True),
    Trial(size="2B", mode="full", tokens=5376, recompute="norms", graphs=True),
    Trial(size="9B", mode="lora", tokens=5376, recompute="norms"),
)
QUANTISED = tuple(t for t in SWEEP if t.storage != "none" or t.optimizer != "adamw")
"""What bitsandbytes and the int8 base take part in."""
SMALL = tuple(t for t in SWEEP if t.size == "0.8B" and t.tokens <= 8192 and t not in QUANTISED)
"""What a first hour on a new machine has time for."""


def plan_of(trial: Trial, folder: Path) -> Plan:
    """Returns the plan that `build_engine` makes of a trial."""
    return Plan(
        model=str(folder), mode=trial.mode, dtype="bfloat16", device="cuda", **recompute_fields(trial.recompute),
        lora_r=trial.rank, target_modules=LORA_TARGETS, gradient_accumulation=ACCUM, quantise_base=trial.storage,
        optimizer=trial.optimizer,
    )


def lengths_of(trial: Trial) -> list[int]:
    """Returns the documents' lengths: unequal ones, the last takes the rest."""
    share = trial.tokens // (trial.documents + 1)
    return [*[share] * (trial.documents - 1), trial.tokens - share * (trial.documents - 1)]


def verdict(predicted_gib: float, measured_gib: float) -> tuple[float, bool]:
    """Returns (relative error of the prediction, whether it is within the limits)."""
    error = predicted_gib / measured_gib - 1
    return error, -UNDER <= error <= OVER


def predict(trial: Trial, folder: Path, supervised: int) -> PeakEstimate:
    """Returns the planner's estimate of a trial."""
    return predict_peak(
        plan_of(trial, folder), probe(str(folder)), measure_machine(torch.device("cuda")), tokens=trial.tokens,
        longest=max(lengths_of(trial)), supervised=supervised,
    )


def measure(trial: Trial, folder: Path) -> tuple[float, float, int]:
    """Runs a trial and returns (GiB allocated at most, GiB reserved at most, supervised tokens of a micro-batch)."""
    gc.collect()
    torch.cuda.empty_cache()
    left = torch.cuda.memory_allocated()
    if left > 256 * 2**20:
        raise RuntimeError(f"{left / 2**30:.2f} GiB are still allocated before {trial.name}: the last trial leaks")
    full = trial.mode == "full"
    engine = build_engine(folder, rank=trial.rank, full=full, recompute=trial.recompute, quantise_base=trial.storage,
                          optimizer=trial.optimizer)
    if not trial.graphs:
        engine.graphs.objection = "the memory sweep measures eager passes"
    batches = micro_batches(lengths_of(trial), SUPERVISED, ACCUM, torch.device("cuda"))
    total = sum(batch.supervised_tokens for batch in batches)
    for _ in range(3 if trial.graphs else 2):
        if not trial.graphs:
            torch.cuda.reset_peak_memory_stats()
        loss = engine.forward_backward(batches, total)
        engine.optimiser_step(1e-5)
    if not bool(torch.isfinite(loss)):
        raise RuntimeError(f"the loss of {trial.name} is {float(loss)}: a wrong run's memory says nothing")
    torch.cuda.synchronize()
    allocated, reserved = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
    supervised = batches[0].supervised_tokens
    del engine, batches, loss
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return allocated, reserved, supervised


def run_sweep(trials: tuple[Trial, ...], folder: Path, limit_s: float) -> list[dict[str, object]]:
    """Runs the trials, prints a line for each and returns the rows; starts none after `limit_s` and says so."""
    rows: list[dict[str, object]] = []
    begun = time.monotonic()
    for i, trial in enumerate(trials):
        started = time.monotonic()
        if started - begun > limit_s:
            print(f"{limit_s:.0f} s are over; not run: {', '.join(t.name for t in trials[i:])}")
            break
        model = make_model(folder / trial.size, trial.size)
        allocated, reserved, supervised = measure(trial, model)
        estimate = predict(trial, model, supervised)
        predicted = estimate.allocator_gib + (estimate.graphs_gib if trial.graphs else 0.0)
        measured = reserved if trial.graphs else allocated
        error, good = verdict(predicted, measured)
        word = "compared" if trial.graphs else ("ok" if good else "RED")
        print(f"{trial.name:36s} predicted {predicted:7.3f} measured {measured:7.3f} GiB {error:+7.2%} {word} "
              f"(reserved {reserved:.2f}, {time.monotonic() - started:.0f} s)", flush=True)
        rows.append({
            "plan": trial.name, "size": trial.size, "mode": trial.mode, "rank": trial.rank if trial.mode == "lora"
            else 0, "tokens": trial.tokens, "documents": trial.documents, "supervised": supervised, "accum": ACCUM,
            "recompute": trial.recompute, "storage": trial.storage, "optimizer": trial.optimizer,
            "measure": "reserved" if trial.graphs else "allocated",
            "predicted_gib": round(predicted, 4), "measured_gib": round(measured, 4), "error": round(error, 5),
            "reserved_gib": round(reserved, 4), "verdict": word,
        })
    return rows


def main() -> int:
    """Sweeps, prints the worst errors, appends the rows. Returns 1 where a prediction is off, 3 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=cache_dir("bench"), help="where the random models are kept")
    parser.add_argument("--csv", type=Path, help="CSV to append to")
    parser.add_argument("--only", default="", help="only plans whose name contains this")
    parser.add_argument("--small", action="store_true", help="only the small plans of the smallest model")
    parser.add_argument("--quantised", action="store_true", help="only quantised bases and bitsandbytes' optimisers")
    parser.add_argument("--limit-s", type=float, default=220.0, help="start no plan after this many seconds")
    options = parser.parse_args()
    if lacks_gpu("The memory sweep"):
        return EXIT_NO_GPU
    wanted = SMALL if options.small else QUANTISED if options.quantised else SWEEP
    trials = tuple(t for t in wanted if options.only in t.name)
    rows = run_sweep(trials, options.folder, options.limit_s)
    judged = [float(str(row["error"])) for row in rows if row["verdict"] != "compared"]
    red = sum(row["verdict"] == "RED" for row in rows)
    if judged:
        print(f"{len(judged)} plans judged, {red} red: errors from {min(judged):+.2%} to {max(judged):+.2%}")
    if options.csv:
        append_rows(options.csv, [{**machine_row(), **row} for row in rows])
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
