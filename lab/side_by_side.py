"""Ours and the peers on the same random model, tokens, targets and supervised share: one process a variant.

usage: python -m lab.side_by_side make [--size 2B]
       python -m lab.side_by_side VARIANT[+VARIANT] [--size 2B] [--lengths 5376] [--long-tailed 24] [--bytes] [--csv F]
VARIANT: native, native_full, or a peer of lab/peers.py: hf, liger, unsloth with _nogc, _full, _padded, _leaky.
Peers run as their trainers run them, under bf16 autocast. `--lengths A,B,...` lists the documents of a micro-batch,
`--long-tailed N` draws those of a step: ours lays them in rows without leaks, a peer as its variant says. With both, a
process measures one after the other from the same start, which saves a second compilation; so do variants joined by +
that differ in layout. `--bytes` takes one more step to count the bytes that tensors move (lab/profile.py).
Prints one JSON line a row. `tok_per_s` is of real tokens, `computed_tok_per_s` of ours counts padding too.
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
    parser.add_argument("--recompute", default="none", help="of the native engine; layer:N: first N layers")
    parser.add_argument("--no-graphs", action="store_true", help="native: launch op by op")
    parser.add_argument("--folder", type=Path, default=cache_dir("bench"))
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--table", action="store_true", help="print the profile's most expensive kernels")
    parser.add_argument("--bytes", action="store_true", help="count the bytes of one more step")
    return parser.parse_args(argv)


class NativeRun:
    """The native engine, and the steps it runs.

    Args:
        options: the command line.
        folder: of the model.
        full: full fine-tuning.
        several: keep the start, for `reset`.
    """

    def __init__(self, options: argparse.Namespace, folder: Path, full: bool, several: bool) -> None:
        from sparktune.lab.native import build_engine

        self.engine = build_engine(folder, rank=options.rank, full=full, recompute=options.recompute)
        self.learning_rate = 1e-5 if full else 2e-4
        if options.no_graphs:
            self.without_graphs("--no-graphs")
        self.start = {name: x.cpu().clone() for name, x in self.engine.state().items()} if several else {}

    def without_graphs(self, reason: str) -> str:
        """Lets the engine launch every operator from now on, or replay again if `reason` is empty; returns the last."""
        before, self.engine.graphs.objection = self.engine.graphs.objection, reason
        return before

    def reset(self) -> None:
        """Puts what learns back to where it started."""
        self.engine.load_state(self.start)

    def step_of(self, documents: Documents, supervised: float, layout: str) -> Callable[[], Any]:
        """Returns a function that runs one optimiser step over the documents and returns its loss."""
        import torch

        assert not layout, "ours has one layout"

        from sparktune.lab.native import documents_row
        from sparktune.lab.shapes import random_documents

        packs = [random_documents(list(pack), supervised, seed=7 + i) for i, pack in enumerate(documents.packs)]
        batches = [documents_row(pack, pad_to=documents.row_tokens).to(torch.device("cuda")) for pack in packs]
        targets = sum(batch.supervised_tokens for batch in batches)

        def step() -> Any:
            loss = self.engine.forward_backward(batches, targets)
            self.engine.optimiser_step(self.learning_rate)
            return loss

        return step


def variants_of(text: str) -> list[tuple[str, str]]:
    """Takes `A+B` apart: (what a process loads, layout of its documents) of each.

    Raises:
        SystemExit: a variant is unknown, or two of them need two processes.
    """
    from sparktune.lab.peers import peer_of

    found: list[tuple[str, str]] = []
    for variant in text.split("+"):
        if variant in ("native", "native_full"):
            found.append((variant, ""))
            continue
        try:
            peer = peer_of(variant)
        except ValueError as error:
            raise SystemExit(str(error)) from error
        found.append((variant.replace("_" + peer.layout, ""), peer.layout))
    if len({what for what, _ in found}) > 1:
        raise SystemExit(f"{text!r} names {len({what for what, _ in found})} models and a process loads one. Give "
                         "variants that differ in _padded and _leaky only.")
    return found


def build_run(options: argparse.Namespace, what: str, folder: Path, longest: int, several: bool) -> Any:
    """Returns the model of a process, ready to train."""
    if what in ("native", "native_full"):
        return NativeRun(options, folder, what == "native_full", several)
    from sparktune.lab.peers import PeerRun, peer_of

    return PeerRun(peer_of(what), folder, options.rank, longest, several)


def settings_row(options: argparse.Namespace, documents: Documents, run: Any) -> dict[str, object]:
    """Returns what a row says about how the variant ran."""
    native = isinstance(run, NativeRun)
    return {
        "size": options.size, "lengths": documents.name, "accum": len(documents.packs), "rank": options.rank,
        "supervised": options.supervised, "recompute": options.recompute if native else "",
        "graphs": (run.engine.graphs.objection or "yes") if native else "",
        "real_tokens": documents.real_tokens, "padded_tokens": documents.tokens if native else documents.real_tokens,
    }


def measure(options: argparse.Namespace, variant: str, run: Any, documents: Documents, step: Callable[[], Any]) -> None:
    """Times one variant, writes and prints its row; with --bytes counts one more step into profile.csv."""
    from sparktune.lab.measure import measure_steps, profile_step, steps_row
    from sparktune.lab.table import append_rows

    settings = settings_row(options, documents, run)
    times = measure_steps(variant, step, documents.real_tokens, warmup=options.warmup, steps=options.steps)
    if options.table:
        for name, ms, calls in profile_step(step)[2][:40]:
            print(f"{ms:9.3f} ms {calls:6d}  {name[:110]}", file=sys.stderr)
    row = steps_row(times, **settings)
    if times.gpu_busy_ms is not None:
        row["busy_us_per_token"] = round(times.gpu_busy_ms * 1e3 / documents.real_tokens, 4)
    row["computed_tok_per_s"] = round(times.tok_per_s * int(str(settings["padded_tokens"])) / documents.real_tokens, 1)
    profile = options.csv.with_name("profile.csv") if options.csv else None
    if options.csv and options.csv != profile:  # before the bytes are counted: a count that fails loses no timing
        append_rows(options.csv, [row])
    if options.bytes:
        from sparktune.lab.profile import count_step

        graphs = run.without_graphs("a replayed graph shows no operator") if isinstance(run, NativeRun) else ""
        step()  # allocates what graphs held
        row |= count_step(step, documents.real_tokens, times)
        if isinstance(run, NativeRun):
            run.without_graphs(graphs)
        if profile:
            append_rows(profile, [row])
    print(json.dumps(row), flush=True)


def main() -> None:
    """Runs one process's variants and prints a row each."""
    options = parse()
    from sparktune.lab.measure import EXIT_NO_GPU, lacks_gpu  # torch, after --help

    if options.variant != "make" and lacks_gpu("A row"):
        sys.exit(EXIT_NO_GPU)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.variant.startswith("unsloth"):
        import_module("unsloth")  # it must come before transformers
    import torch

    from sparktune.lab.shapes import make_model

    folder = make_model(options.folder / options.size, options.size)
    if options.variant == "make":
        return
    variants = variants_of(options.variant)
    every = documents_of(options)
    # packing and padding change nothing about a row of one document
    todo = [(variant, layout, documents) for documents in every
            for variant, (_, layout) in zip(options.variant.split("+"), variants, strict=True)
            if layout in ("", "documents") or any(len(pack) > 1 for pack in documents.packs)]
    longest = max(max(sum(pack), documents.row_tokens or 0) for documents in every for pack in documents.packs)
    run = build_run(options, variants[0][0], folder, longest, several=len(todo) > 1)
    for i, (variant, layout, documents) in enumerate(todo):
        if i:
            run.reset()
            torch.cuda.empty_cache()
        measure(options, variant, run, documents, run.step_of(documents, options.supervised, layout))


if __name__ == "__main__":
    main()
