"""Gives a model folder an MTP head: a new folder that shares the unchanged shards and differs in `mtp.*` and config.

    python -m sparktune.mtp.inject_mtp --model DIR --head FILE.safetensors-OR-DIR --out DIR
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparktune.mtp.extract_upstream_mtp import find_head, text_config
from sparktune.mtp.tensors import PREFIX, Place, check_head, write_safetensors
from sparktune.setup.plan.errors import SparktuneError, UsageError
from sparktune.setup.plan.outfolder import build_folder, copy_file, gib, link_or_copy, write_durably
from sparktune.setup.plan.weights import safetensors_header, safetensors_index

__all__ = ["HEAD_FILE", "RECORD", "inject", "read_record"]

HEAD_FILE = "model-mtp.safetensors"
"""The head's own shard."""
RECORD = "sparktune-mtp.json"
"""Written into the folder: where its head comes from."""
_INDEX = "model.safetensors.index.json"


def read_record(folder: Path) -> dict[str, Any]:
    """Returns what a folder says about its head; empty when it is not one of ours."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and record.get("made_by") == "sparktune" else {}


def declare_head(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config that declares the head where servers look for it.

    `mtp_num_hidden_layers` goes into the text config, `tie_word_embeddings` into both levels (vLLM reads the outer one,
    llama.cpp the inner one).
    """
    changed = dict(config)
    nested = isinstance(changed.get("text_config"), dict)
    text = dict(changed["text_config"]) if nested else changed
    tied = changed.get("tie_word_embeddings")
    tied = bool(text.get("tie_word_embeddings", False) if tied is None else tied)
    text["mtp_num_hidden_layers"] = 1
    text["tie_word_embeddings"] = changed["tie_word_embeddings"] = tied
    if nested:
        changed["text_config"] = text
    return changed


def _config(model_dir: Path) -> dict[str, Any]:
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    family = text_config(config).get("model_type") or config.get("model_type")
    if family not in ("qwen3_5_text", "qwen3_5"):
        raise UsageError(f"{model_dir} is a {family}; only dense Qwen3.5 models have an MTP head. Use --mtp skip.")
    return config


def _shard_rest(shard: Path) -> list[tuple[str, Place]] | None:
    """Returns what is left of a shard without `mtp.*`, in file order; None when it holds none of them."""
    entries = sorted(safetensors_header(shard).items(), key=lambda item: item[1].begin)
    rest = [(name, (shard, entry)) for name, entry in entries if not name.startswith(PREFIX)]
    return None if len(rest) == len(entries) else rest


def _write_index(folder: Path, weight_map: dict[str, str], total: int) -> None:
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_durably(folder / _INDEX, json.dumps(index, indent=2) + "\n")


def inject(
    model_dir: Path,
    head: Mapping[str, Place],
    out_dir: Path,
    *,
    source: str,
    record: Mapping[str, Any] | None = None,
    replace: Callable[[Path], bool] | None = None,
) -> int:
    """Writes `out_dir`: the model with `head` in a shard of its own. Returns the bytes that are not shared.

    Shards without `mtp.*` are hard-linked (copied across file systems); a shard that holds some is written again
    without them, because a loader that reads every file would otherwise see two heads. All other files are copied,
    config.json declares the head, and an index is made when the model was a single file.

    Args:
        model_dir: the merged model.
        head: the 15 tensors (find_head, or a file's header).
        out_dir: must not exist; appears whole or not at all.
        source: what messages and the record call the head's source.
        record: entries added to the record.
        replace: says whether an existing `out_dir` may be replaced.

    Raises:
        UsageError: not a dense Qwen3.5, not a head of this model, or `out_dir` exists.
        PreflightError: a shard is missing or damaged, too little space.
        SparktuneError: a value of the head is not finite.
    """
    config = _config(model_dir)
    check_head(head, text_config(config), source)
    index = safetensors_index(model_dir)
    shards = sorted(set(index.values()))
    rests = {shard: _shard_rest(shard) for shard in shards}
    others = [f for f in sorted(model_dir.rglob("*"))
              if f.is_file() and f not in index.values() and f.name not in ("config.json", _INDEX, RECORD)]
    new_bytes = sum(e.end - e.begin for _, e in head.values()) + sum(f.stat().st_size for f in others)
    new_bytes += sum(e.end - e.begin for rest in rests.values() for _, (_, e) in rest or [])
    weight_map = {name: file.name for name, file in index.items() if not name.startswith(PREFIX)}
    weight_map |= dict.fromkeys(head, HEAD_FILE)
    what = "The folder with the MTP head"
    with build_folder(out_dir, needs_bytes=new_bytes + 2**20, what=what, replace=replace) as folder:
        for file in others:
            target = folder / file.relative_to(model_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            copy_file(file, target)
        for shard, rest in rests.items():
            if rest is None:
                link_or_copy(shard, folder / shard.name)
            elif rest:
                write_safetensors(folder / shard.name, rest)
        write_safetensors(folder / HEAD_FILE, sorted(head.items()))
        headers = {name: safetensors_header(folder / name) for name in set(weight_map.values())}
        _write_index(folder, weight_map, sum(e.end - e.begin for h in headers.values() for e in h.values()))
        write_durably(folder / "config.json", json.dumps(declare_head(config), indent=2, ensure_ascii=False) + "\n")
        made = {"made_by": "sparktune", "head": source, **(record or {})}
        write_durably(folder / RECORD, json.dumps(made, indent=2) + "\n")
        placed = safetensors_index(folder)
        assert placed.keys() == weight_map.keys(), "every tensor of the model and of the head is in the new folder"
    return new_bytes


def main(argv: list[str] | None = None) -> int:
    """Command line of `inject`. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sparktune.mtp.inject_mtp", description=__doc__)
    parser.add_argument("--model", required=True, type=Path, help="model folder")
    parser.add_argument("--head", required=True, type=Path, help="safetensors file with the head, or a model folder")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    args = parser.parse_args(argv)
    try:
        if args.head.is_dir():
            head = find_head(args.head)
        else:
            head = {n: (args.head, e) for n, e in safetensors_header(args.head).items()}
        size = inject(args.model, head, args.out, source=str(args.head))
    except SparktuneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"Wrote {args.out}; {gib(size)} are its own, the rest is shared with {args.model}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
