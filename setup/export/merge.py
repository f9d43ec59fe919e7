"""Stage `merge`: the base's own files with the trained tensors' bytes overwritten; every other byte stays the base's.

    python -m sparktune.setup.export.merge --run RUN
    python -m sparktune.setup.export.merge --adapter DIR --out DIR [--base DIR-OR-HUB-ID]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from sparktune.setup.export.adapter import Adapter, LowRank, read_adapter
from sparktune.setup.export.card import model_card
from sparktune.setup.export.rounding import FLOAT_BYTES, from_float32, to_float32
from sparktune.setup.export.stage import Stage, run_command, run_stage
from sparktune.setup.plan.errors import SparktuneError, UsageError
from sparktune.setup.plan.events import EventWriter, NullEvents
from sparktune.setup.plan.models import adapter_base, is_adapter_folder, probe, resolve_model_dir
from sparktune.setup.plan.outfolder import build_folder, copy_file, gib, write_durably
from sparktune.setup.plan.weights import TensorEntry, safetensors_header, safetensors_index

__all__ = ["RECORD", "MergeResult", "fingerprint", "merge", "read_record"]

RECORD = "sparktune-merge.json"
"""Written into a merged folder: from what it was made."""
INDEX = "model.safetensors.index.json"

# Elements updated at once: 16 MiB of float32, a few of which are alive together.
_CHUNK = 4 * 2**20
# Never carried along: other formats' weights (pickles among them), other programs' state, the base's own model card.
_WEIGHT_SUFFIXES = {
    ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".msgpack", ".onnx", ".gguf",
    ".safetensors", ".tflite", ".ot", ".partial", ".lock",
}
_LEFT_BEHIND = {"README.md", "adapter_config.json", RECORD}
_CARRIED_FOLDERS = {"additional_chat_templates"}


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """What a merge did."""

    folder: Path
    trained_tensors: tuple[str, ...]
    """Tensors that were overwritten."""
    untouched_tensors: int
    """Tensors whose bytes are the base's."""
    changed_share: float
    """Share of the trained tensors' elements that differ from the base after rounding."""
    bytes: int
    """Size of the folder."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class _Overwrite:
    """One tensor to overwrite: the base's place and a function that gives new rows."""

    entry: TensorEntry
    rows: Callable[[int, int, npt.NDArray[np.float32]], npt.NDArray[np.float32]]
    """(first row, end row, base rows as float32 [rows, columns]) -> new rows as float32."""


def fingerprint(folder: Path) -> str:
    """Returns a sha256 over the names and bytes of an adapter's or weights folder's files that decide the merge."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("adapter_config.json")]):
        digest.update(file.name.encode() + b"\0")
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def read_record(folder: Path) -> dict[str, Any]:
    """Returns what a merged folder says it was made from; empty when it is not one of ours."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and record.get("made_by") == "sparktune" else {}


def _shape_2d(entry: TensorEntry) -> tuple[int, int]:
    """Rows and columns of a tensor of any rank: the first dimension, and all others together."""
    if not entry.shape:
        return 1, 1
    columns = 1
    for n in entry.shape[1:]:
        columns *= n
    return entry.shape[0], columns


def _low_rank_rows(adapter: Adapter, update: LowRank) -> Callable[..., npt.NDArray[np.float32]]:
    a, b = adapter.read(update.a), adapter.read(update.b)
    left, right = (a.T, b.T) if update.embedding else (b, a)
    start = _replacement_rows(adapter.path, update.start) if update.start else None

    def rows(first: int, end: int, base: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        delta = left[first:end] @ right
        delta *= np.float32(update.scale)
        delta += base if start is None else start(first, end, base)
        return cast(npt.NDArray[np.float32], delta)

    return rows


def _replacement_rows(path: Path, entry: TensorEntry) -> Callable[..., npt.NDArray[np.float32]]:
    size, (_, columns) = FLOAT_BYTES[entry.dtype], _shape_2d(entry)

    def rows(first: int, end: int, base: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        with path.open("rb") as file:
            file.seek(entry.begin + first * columns * size)
            raw = file.read((end - first) * columns * size)
        return to_float32(raw, entry.dtype).reshape(base.shape)

    return rows


def _from_adapter(
    folder: Path, base: Mapping[str, TensorEntry], tied: bool, events: EventWriter
) -> dict[str, _Overwrite]:
    adapter = read_adapter(folder, base, tied=tied)
    if adapter.zero_b:
        events.message(
            f"{len(adapter.zero_b)} of {len(adapter.updates)} adapter modules have a zero B and leave their tensors as "
            f"they are: {', '.join(adapter.zero_b[:5])}.", "warning",
        )
    todo = {u.tensor: _Overwrite(entry=base[u.tensor], rows=_low_rank_rows(adapter, u)) for u in adapter.updates}
    for name, entry in adapter.replaced.items():
        _check_float(folder, name, entry)
        todo[name] = _Overwrite(entry=base[name], rows=_replacement_rows(adapter.path, entry))
    return todo


def _check_float(where: Path, name: str, entry: TensorEntry) -> None:
    if entry.dtype not in FLOAT_BYTES:
        raise UsageError(
            f"{where}: {name} is stored as {entry.dtype}; a merge needs bf16, fp16 or fp32 tensors. "
            "Use the unquantised model as the base."
        )


def _from_weights(folder: Path, base: Mapping[str, TensorEntry], tied: bool) -> dict[str, _Overwrite]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UsageError(
            f"{folder} should hold adapter_config.json, or *.safetensors with trained tensors; it holds neither."
        )
    todo: dict[str, _Overwrite] = {}
    for file in files:
        for name, entry in safetensors_header(file).items():
            if name not in base:
                why = " (this base ties its head to its embeddings)" if tied and name == "lm_head.weight" else ""
                raise UsageError(
                    f"{file}: the trained tensor {name} has no place in the base{why}. It belongs to another model."
                )
            if (entry.dtype, entry.shape) != (base[name].dtype, base[name].shape):
                raise UsageError(
                    f"{file}: {name} is {entry.dtype} {list(entry.shape)}, the base's is {base[name].dtype} "
                    f"{list(base[name].shape)}. Trained tensors must have the base's type and shape."
                )
            _check_float(file, name, entry)
            todo[name] = _Overwrite(entry=base[name], rows=_replacement_rows(file, entry))
    return todo


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done


def _overwrite(descriptor: int, name: str, todo: _Overwrite) -> int:
    """Updates one tensor in place, some rows at a time. Returns how many elements changed."""
    entry, size = todo.entry, FLOAT_BYTES[todo.entry.dtype]
    n_rows, columns = _shape_2d(entry)
    step = max(1, _CHUNK // max(columns, 1))
    changed = 0
    for first in range(0, n_rows, step):
        end = min(first + step, n_rows)
        offset = entry.begin + first * columns * size
        old = os.pread(descriptor, (end - first) * columns * size, offset)
        values = todo.rows(first, end, to_float32(old, entry.dtype).reshape(end - first, columns))
        try:
            new = from_float32(np.ascontiguousarray(values), entry.dtype)
        except OverflowError as error:
            raise SparktuneError(
                f"Merging {name}: {error}. The training diverged; train again with a lower --learning-rate."
            ) from error
        changed += int(np.count_nonzero(np.frombuffer(old, f"u{size}") != np.frombuffer(new, f"u{size}")))
        _write_at(descriptor, new, offset)
    return changed


def carried_files(base_dir: Path) -> Iterator[Path]:
    """Yields the base's files, relative to it, that a result takes along: everything but weights and hidden files."""
    for file in sorted(base_dir.iterdir()):
        if file.name.startswith(".") or file.name in _LEFT_BEHIND:
            continue
        if file.is_dir():
            if file.name in _CARRIED_FOLDERS:
                yield from (f.relative_to(base_dir) for f in sorted(file.rglob("*")) if f.is_file())
        elif file.suffix.lower() not in _WEIGHT_SUFFIXES and (
            not file.name.endswith(".index.json") or file.name == INDEX
        ):
            yield file.relative_to(base_dir)


def _tied_head(base_dir: Path, base: Mapping[str, TensorEntry]) -> bool:
    return "lm_head.weight" not in base or probe(str(base_dir)).tie_word_embeddings


def _refuse_same_place(base_dir: Path, trained: Path, out_dir: Path) -> None:
    for folder, what in ((base_dir, "the base"), (trained, "the adapter")):
        if out_dir.resolve().is_relative_to(folder.resolve()):
            raise UsageError(f"The merged model cannot be written into {what} itself ({folder}). Give another folder.")


def merge(
    base_dir: Path,
    trained: Path,
    out_dir: Path,
    events: EventWriter,
    *,
    record: Mapping[str, Any] | None = None,
    card: str | None = None,
    replace: Callable[[Path], bool] | None = None,
) -> MergeResult:
    """Writes base + training into `out_dir`, which appears whole or not at all.

    Each shard is copied byte for byte, then the trained tensors' ranges are overwritten: W + scale * B A in float32,
    rounded once to the base's type (LoRA), or the trained bytes (full fine-tuning). So everything else, `mtp.*` and the
    vision tower included, is the base's by construction. Configs, tokenizer, templates and processors come along;
    weights in other formats never do. Memory stays below some hundred MiB whatever the tensors' size.

    Args:
        base_dir: the base model; links (a hub cache) become real files.
        trained: a PEFT adapter folder, or a folder of *.safetensors with trained tensors under base names.
        out_dir: must not exist.
        events: progress and messages.
        record: entries added to the record in the merged folder.
        card: text of the merged folder's README.md.
        replace: says whether an existing `out_dir` may be replaced.

    Raises:
        UsageError: `out_dir` exists, or the trained tensors do not belong to this base.
        PreflightError: a shard is missing or damaged, too little space, no right to write.
        SparktuneError: nothing was trained, the training diverged, or the disk filled up.
    """
    started = time.monotonic()
    _refuse_same_place(base_dir, trained, out_dir)
    index = safetensors_index(base_dir)
    shards = {file: safetensors_header(file) for file in sorted(set(index.values()))}
    base = {name: shards[file][name] for name, file in index.items()}
    tied = _tied_head(base_dir, base)
    todo = _from_adapter(trained, base, tied, events) if (trained / "adapter_config.json").is_file() else _from_weights(
        trained, base, tied
    )
    for name in todo:
        _check_float(base_dir, name, base[name])
    others = list(carried_files(base_dir))
    total = sum(file.stat().st_size for file in [*shards, *(base_dir / o for o in others)])
    changed, done = 0, 0

    def advance(step: int) -> None:
        nonlocal done
        done += step
        events.progress("merge", done, total, "bytes")

    with build_folder(out_dir, needs_bytes=total + 2**20, what="The merged model", replace=replace) as folder:
        for file in others:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            copy_file(base_dir / file, folder / file, advance)
        for file in shards:
            partial = folder / (file.name + ".partial")
            copy_file(file, partial, advance)
            with ExitStack() as stack:
                descriptor = os.open(partial, os.O_RDWR)
                stack.callback(os.close, descriptor)
                for name in (n for n in todo if index[n] == file):
                    changed += _overwrite(descriptor, name, todo[name])
                os.fsync(descriptor)
            os.rename(partial, folder / file.name)
        if not changed:
            raise SparktuneError(
                f"After merging {trained}, every tensor equals the base's: either nothing was trained, or all updates "
                "are below the resolution of the base's type. Train longer or with a higher --learning-rate."
            )
        made = {"made_by": "sparktune", "trained_tensors": len(todo), **(record or {})}
        write_durably(folder / RECORD, json.dumps(made, indent=2) + "\n")
        if card is not None:
            write_durably(folder / "README.md", card)
    elements = sum(int(np.prod(base[n].shape)) for n in todo)
    result = MergeResult(
        folder=out_dir, trained_tensors=tuple(sorted(todo)), untouched_tensors=len(base) - len(todo),
        changed_share=changed / elements, bytes=total, seconds=time.monotonic() - started,
    )
    events.message(
        f"Merged {len(todo)} trained tensors into {out_dir} ({gib(total)}); {result.untouched_tensors} tensors are the "
        f"base's, byte for byte. {result.changed_share:.1%} of the trained elements changed."
    )
    events.emit("artifact", path=str(out_dir), bytes=total)
    return result


def merge_run(stage: Stage) -> None:
    """Merges what a run trained into `output/RUN`; a finished merge of the same training is kept."""
    run = stage.run
    folders = [f for f in (run.adapter, run.weights) if f.is_dir()]
    if len(folders) != 1:
        raise UsageError(
            f"{run.root} should hold either adapter/ or weights/, the result of training; it holds "
            f"{'both' if folders else 'neither'}. " + ("Remove the stale one." if folders else "Train first.")
        )
    trained = folders[0]
    base_dir = resolve_model_dir(stage.plan.model)
    record: dict[str, Any] = {"run": run.name, "model": stage.plan.model, "trained_sha256": fingerprint(trained)}
    if run.merge_gap.is_file():  # the base was quantised: how far this merge is from what was trained
        record["quantised_base"] = json.loads(run.merge_gap.read_text(encoding="utf-8"))
    found = read_record(run.merged)
    if found and all(found.get(k) == v for k, v in record.items()):
        stage.events.message(f"{run.merged} is already the merge of this training; it is kept.")
        return
    merge(base_dir, trained, run.merged, stage.events, record=record,
          card=model_card(stage.plan, run, base_dir),
          replace=lambda folder: read_record(folder).get("run") == run.name)


def _merge_adapter(adapter: Path, out: Path, base: str | None) -> None:
    if not is_adapter_folder(adapter):
        raise UsageError(f"--adapter {adapter} should hold adapter_config.json and no config.json.")
    source = base or adapter_base(adapter)
    result = merge(resolve_model_dir(source), adapter, out, NullEvents(),
                   record={"model": source, "trained_sha256": fingerprint(adapter)})
    print(f"Merged {len(result.trained_tensors)} tensors into {out} ({gib(result.bytes)}, {result.seconds:.1f} s).")


def main(argv: list[str] | None = None) -> int:
    """Runs the stage, or merges a bare adapter folder. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sparktune.setup.export.merge", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, help="run folder, results/RUN")
    what.add_argument("--adapter", type=Path, help="PEFT adapter folder")
    parser.add_argument("--out", type=Path, help="folder of the merged model (with --adapter)")
    parser.add_argument("--base", help="base model, folder or hub id (with --adapter; default: what the adapter names)")
    args = parser.parse_args(argv)
    if args.run is not None:
        if args.out or args.base:
            parser.error("--out and --base go with --adapter; a run knows its own")
        return run_stage("merge", args.run, merge_run)
    if args.out is None:
        parser.error("--adapter needs --out")
    return run_command(lambda: _merge_adapter(args.adapter, args.out, args.base))


if __name__ == "__main__":
    sys.exit(main())
