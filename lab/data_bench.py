"""How long the analysis of a large file takes, and how much memory: a made corpus through the stage's own code.

usage: python -m sparktune.lab.data_bench [--rows 24000] [--tokens-per-row 3042] [--size-gb 0] [--workers N] [--csv F]

The tokenizer is trained here, 32,768 tokens over the corpus's own words, with the normaliser and the pre-tokeniser of
Qwen3.5's. Real text has a longer tail of words and Qwen's own table is larger, so a real file may take somewhat longer.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sparktune.lab.data_corpus import Corpus, write_corpus
from sparktune.lab.table import commit_name, processor_name
from sparktune.setup.data.tokenise import prepare
from sparktune.setup.data.workers import usable_cores
from sparktune.setup.demo_tokenizer import train_tokenizer, write_tokenizer
from sparktune.setup.plan.events import NullEvents
from sparktune.setup.plan.rundir import cache_dir
from sparktune.setup.plan.schema import ModelSpec, Plan

__all__ = ["main", "make_tokenizer", "measure"]

_VOCABULARY = 32_768
# Tokens of one corpus word under the tokenizer above, punctuation and template included.
_TOKENS_A_WORD = 1.46


class _Listener(NullEvents):
    """Prints progress every few seconds, and keeps the sentence that says time and memory."""

    def __init__(self) -> None:
        super().__init__()
        self.cost = ""
        self._shown = time.monotonic()

    def emit(self, kind: str, **fields: Any) -> None:
        if kind == "message" and str(fields.get("text", "")).startswith("Analysed"):
            self.cost = str(fields["text"])
        if kind == "progress" and time.monotonic() - self._shown > 10:
            self._shown = time.monotonic()
            print(f"  {fields.get('done'):,} of {fields.get('total'):,} lines", file=sys.stderr, flush=True)


def make_tokenizer(folder: Path, corpus: Corpus, size: int = _VOCABULARY, words: int = 1_500_000) -> Path:
    """Trains the tokenizer on new text of the corpus, writes it with the demo's template, and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, train_tokenizer((corpus.text(1000) for _ in range(max(1, words // 1000))), size))
    return folder


def spec_of(vocab_size: int) -> ModelSpec:
    """Returns a model's shape; the analysis reads only its vocabulary."""
    return ModelSpec(
        source="bench", model_type="qwen3_5_text", native=True, vocab_size=vocab_size, hidden_size=8,
        intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, layer_types=["full_attention"],
        tie_word_embeddings=True, norm_eps=1e-6, rope_theta=1e4, rope_dim=8, max_position_embeddings=4096, parameters=1,
    )


def measure(data: Path, tokenizer: Path, workers: int | None, **fields: Any) -> tuple[str, Any]:
    """Analyses a file without a token cache. Returns (the sentence about time and memory, the report)."""
    with tempfile.TemporaryDirectory(prefix="sparktune-bench-", dir=data.parent) as scratch:
        before = os.environ.get("XDG_CACHE_HOME")
        os.environ["XDG_CACHE_HOME"] = scratch
        listener = _Listener()
        try:
            plan = Plan(data=data, **fields)
            report = prepare(plan, spec_of(_VOCABULARY), str(tokenizer), listener, workers=workers).report
        finally:
            if before is None:
                del os.environ["XDG_CACHE_HOME"]
            else:
                os.environ["XDG_CACHE_HOME"] = before
    return listener.cost, report


def main(argv: list[str] | None = None) -> int:
    """Makes the corpus and the tokenizer where they are not there yet, measures, prints, and appends a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=24_000)
    parser.add_argument("--tokens-per-row", type=int, default=3042, help="73 million tokens over 24,000 rows")
    parser.add_argument("--size-gb", type=float, default=0.0, help="a file of this size (10**9 bytes) instead")
    parser.add_argument("--workers", type=int, help="processes; one a core when left out")
    parser.add_argument("--folder", type=Path, default=cache_dir("bench"))
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    words = int(options.tokens_per_row / _TOKENS_A_WORD)
    tokenizer = options.folder / "data-bench-tokenizer"
    if not (tokenizer / "tokenizer.json").exists():
        make_tokenizer(tokenizer, Corpus(1, words))
    size = int(options.size_gb * 10**9)
    data = options.folder / f"data-bench-{options.size_gb:g}gb-{options.rows}-{options.tokens_per_row}.jsonl"
    if not data.exists():
        partial = data.with_suffix(".partial")
        write_corpus(partial, Corpus(2, words), options.rows, size_bytes=size)
        partial.rename(data)
    workers = options.workers or usable_cores()
    started = time.monotonic()
    cost, report = measure(data, tokenizer, workers)
    wall_s = time.monotonic() - started
    print(cost)
    row = {
        "machine": processor_name(), "python": platform.python_version(), "tokenizers": version("tokenizers"),
        "transformers": version("transformers"), "rensa": version("rensa"), "commit": commit_name(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "command": f"data_bench --rows {options.rows} --tokens-per-row {options.tokens_per_row} "
                   f"--size-gb {options.size_gb:g} --workers {workers}",
        "rows": report.rows, "bytes": report.bytes, "tokens": report.lengths.total, "workers": workers,
        "load": f"{os.getloadavg()[0]:.1f}", "wall_s": f"{wall_s:.1f}",
        "peak_gib_all_processes": cost.rpartition("together ")[2].rstrip("."),
    }
    print(json.dumps(row, indent=1))
    print(report.model_dump_json(indent=1, exclude={"problems", "lengths"}))
    if options.csv:
        new = not options.csv.exists()
        with options.csv.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
