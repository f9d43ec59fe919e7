"""Ours and the peers on the same random model, tokens, targets and supervised share: one process a variant.

usage: python -m lab.side_by_side make [--size 2B]
       python -m lab.side_by_side VARIANT [--size 2B] [--lengths 5376 | --long-tailed 24] [--bytes] [--csv FILE]
VARIANT: native, native_full, or a peer of lab/peers.py: hf, liger, unsloth with _nogc, _full, _padded, _leaky.
Peers run as their trainers run them, under bf16 autocast. `--lengths A,B,...` lists the documents of a micro-batch,
`--long-tailed N` draws those of a step: ours lays them in rows without leaks, a peer as its variant says. `--bytes`
takes one more step to count the bytes that tensors move (lab/profile.py), after everything that is timed.
Prints one JSON line. `tok_per_s` is of real tokens, `computed_tok_per_s` of ours counts padding too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from sparktune.lab.documents import Documents, add_document_flags, documents_of
from sparktune.setup.plan.rundir import cache_dir

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant")
    parser.add_argument("--size", default="2B")
    add_document_flags(parser)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--supervised", type=float, default=0.35)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--recompute", default="none", help="policy of the native engine")
    parser.add_argument("--no-graphs", action="store_true", help="native: launch op by op")
    parser.add_argument("--folder", type=Path, default=cache_dir("bench"))
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--table", action="store_true", help="print the profile's most expensive kernels")
    parser.add_argument("--bytes", action="store_true", help="count the bytes of one more step")
    return parser.parse_args(argv)


class NativeStep:
    """One optimiser step of the native engine.

    Args:
        options: the command line.
        documents: of a step.
        folder: of the model.
    """

    def __init__(self, options: argparse.Namespace, documents: Documents, folder: Path) -> None:
        import torch

        from sparktune.lab.native import build_engine, documents_row
        from sparktune.lab.shapes import random_documents

        full = "full" in options.variant
        self.engine = build_engine(folder, rank=options.rank, full=full, recompute=options.recompute)
        if options.no_graphs:
            self.without_graphs("--no-graphs")
        self.learning_rate = 1e-5 if full else 2e-4
        packs = [random_documents(list(pack), options.supervised, seed=7 + i) for i, pack in enumerate(documents.packs)]
        self.batches = [documents_row(pack, pad_to=documents.row_tokens).to(torch.device("cuda")) for pack in packs]
        self.supervised_tokens = sum(batch.supervised_tokens for batch in self.batches)

    def without_graphs(self, reason: str) -> None:
        """Lets the engine launch every operator from now on, and lets go of captured graphs."""
        self.engine.graphs.objection = reason

    def __call__(self) -> Any:
        """Runs the step and returns its loss."""
        loss = self.engine.forward_backward(self.batches, self.supervised_tokens)
        self.engine.optimiser_step(self.learning_rate)
        return loss


def build_step(options: argparse.Namespace, documents: Documents, folder: Path) -> Callable[[], Any]:
    """Returns a function that runs one optimiser step of a variant."""
    if options.variant in ("native", "native_full"):
        return NativeStep(options, documents, folder)
    from sparktune.lab.peers import peer_step

    return peer_step(options, documents, folder)


def settings_row(options: argparse.Namespace, documents: Documents, step: Callable[[], Any]) -> dict[str, object]:
    """Returns what a row says about how the variant ran."""
    native = isinstance(step, NativeStep)
    return {
        "size": options.size, "lengths": documents.name, "accum": len(documents.packs), "rank": options.rank,
        "supervised": options.supervised, "recompute": options.recompute if native else "",
        "graphs": (step.engine.graphs.objection or "yes") if native else "",
        "real_tokens": documents.real_tokens, "padded_tokens": documents.tokens if native else documents.real_tokens,
    }


def main() -> None:
    """Runs one variant and prints its row."""
    options = parse()
    if options.variant.startswith("unsloth"):
        import_module("unsloth")  # it must come before transformers
    from sparktune.lab.measure import measure_steps, profile_step, steps_row
    from sparktune.lab.shapes import make_model
    from sparktune.lab.table import append_rows

    folder = make_model(options.folder / options.size, options.size)
    if options.variant == "make":
        return
    documents = documents_of(options)
    step = build_step(options, documents, folder)
    times = measure_steps(options.variant, step, documents.real_tokens, warmup=options.warmup, steps=options.steps)
    settings = settings_row(options, documents, step)
    if options.table:
        for name, ms, calls in profile_step(step)[2][:40]:
            print(f"{ms:9.3f} ms {calls:6d}  {name[:110]}", file=sys.stderr)
    row = steps_row(times, **settings)
    if times.gpu_busy_ms is not None:
        row["busy_us_per_token"] = round(times.gpu_busy_ms * 1e3 / documents.real_tokens, 4)
    row["computed_tok_per_s"] = round(times.tok_per_s * int(str(settings["padded_tokens"])) / documents.real_tokens, 1)
    if options.csv:  # before the bytes are counted: a count that fails loses no timing
        append_rows(options.csv, [row])
    if options.bytes:
        from sparktune.lab.profile import count_step

        counted = count_step(step, documents.real_tokens, times)
        row |= counted
        if options.csv:
            append_rows(options.csv.with_name("profile.csv"), [row])
    print(json.dumps(row))


if __name__ == "__main__":
    main()
