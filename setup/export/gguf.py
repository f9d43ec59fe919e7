"""Stage `gguf`: GGUF files by llama.cpp's own converter, each checked against the model it was made from.

    python -m sparktune.setup.export.gguf --run RUN
    python -m sparktune.setup.export.gguf --adapter DIR --out DIR [--types q8_0,bf16] [--base DIR-OR-HUB-ID]
    python -m sparktune.setup.export.gguf --model DIR --out DIR [--types q8_0,bf16]
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparktune.mtp.extract_upstream_mtp import find_head
from sparktune.setup.export.convert_demo import MARKER
from sparktune.setup.export.gguf_checks import check_file, needed_bytes
from sparktune.setup.export.handover import modelfile
from sparktune.setup.export.llama_cpp import (
    COMMIT,
    PACKAGE,
    SDIST_SHA256,
    TREE_SHA256,
    child_environment,
    converter_sources,
    run_child,
)
from sparktune.setup.export.merge import merge, read_record
from sparktune.setup.export.stage import Stage, run_command, run_stage
from sparktune.setup.plan.errors import PreflightError, SparktuneError
from sparktune.setup.plan.events import EventWriter, NullEvents
from sparktune.setup.plan.exports import GGUF_TYPES, check_gguf_types
from sparktune.setup.plan.models import adapter_base, probe, resolve_model_dir
from sparktune.setup.plan.outfolder import build_folder, gib, write_durably
from sparktune.setup.plan.schema import ModelSpec

__all__ = ["MANIFEST", "export_gguf", "gguf_name", "read_manifest"]

MANIFEST = "manifest.json"
# The converter reads these families' vocabularies through the sentencepiece package, even where they do not use it.
_SENTENCEPIECE_FAMILIES = ("qwen2", "qwen3", "llama", "mistral")


def gguf_name(name: str, kind: str) -> str:
    """Returns the file name of a type, as llama.cpp spells them: NAME-Q8_0.gguf."""
    return f"{name}-{kind.upper()}.gguf"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a GGUF folder; empty when it is not one of ours."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) and manifest.get("made_by") == "sparktune" else {}


def _preflight(spec: ModelSpec) -> None:
    for package, why in (("torch", "reads the weights with it"), ("transformers", "reads the tokenizer with it")):
        if importlib.util.find_spec(package) is None:
            raise PreflightError(f"llama.cpp's converter {why}, but the package {package} is not installed here. "
                                 "Run this stage in the training environment.")
    if spec.model_type in _SENTENCEPIECE_FAMILIES and importlib.util.find_spec("sentencepiece") is None:
        raise PreflightError(f"llama.cpp's converter needs the Python package sentencepiece for {spec.model_type} "
                             "models; it is not installed. Install it with `pip install sentencepiece`.")


def _explain(log: str, model_dir: Path) -> str:
    """Turns the converter's last words into a sentence."""
    if "BPE pre-tokenizer was not recognized" in log:
        return (
            f"llama.cpp {COMMIT} does not know the tokenizer of {model_dir}: its pre-tokenizer check gives a hash that "
            "no published model has. With a guessed pre-tokenizer the file would split text differently from the "
            "model, so none is made. Use the base's own tokenizer files, unchanged."
        )
    if "No space left on device" in log:
        return "The disk filled up while llama.cpp's converter wrote. Free some space and start again."
    said = [line.strip() for line in log.splitlines() if line.strip()]
    return (
        f"llama.cpp's converter ({COMMIT}) refused {model_dir}: {said[-1] if said else 'it said nothing'}. "
        "Its whole output is in the log."
    )


class _Export:
    """One model on its way to several GGUF files."""

    def __init__(self, model_dir: Path, sources: Path, scratch: Path, events: EventWriter) -> None:
        self.model_dir, self.sources, self.scratch, self.events = model_dir, sources, scratch, events
        self.spec = probe(str(model_dir))
        self.hybrid = self.spec.model_type == "qwen3_5_text"
        # llama.cpp asserts on a declared head without tensors and on neither; only both together give a loadable file.
        self.with_mtp = self.hybrid and bool(find_head(model_dir)) and self.spec.mtp_layers > 0
        self.demo = (model_dir / MARKER).is_file()

    def arguments(self, target: Path, kind: str, name: str) -> list[str]:
        """Returns the converter's command line."""
        demo = ["-m", "sparktune.setup.export.convert_demo"]
        script = demo if self.demo else [str(self.sources / "convert_hf_to_gguf.py")]
        flags = ["--outfile", str(target.absolute()), "--outtype", kind, "--model-name", name]
        flags += ["--no-mtp"] if self.hybrid and not self.with_mtp else []
        return [sys.executable, *script, str(self.model_dir.resolve()), *flags]

    def convert(self, target: Path, kind: str, name: str, size: int) -> None:
        """Writes one file, reporting its growth."""
        done = run_child(
            self.arguments(target, kind, name), child_environment(self.sources, self.scratch), self.scratch,
            lambda: self.events.progress(f"gguf {kind}", _size(target), max(size, _size(target)), "bytes"),
        )
        print(done.output, flush=True)
        if done.code or not target.is_file():
            raise SparktuneError(_explain(done.output, self.model_dir))


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def export_gguf(
    model_dir: Path,
    out_dir: Path,
    types: Sequence[str],
    name: str,
    events: EventWriter,
    *,
    record: Mapping[str, Any] | None = None,
    replace: Callable[[Path], bool] | None = None,
) -> dict[str, Any]:
    """Writes `out_dir` with one GGUF a type, a Modelfile and manifest.json; it appears whole or not at all.

    Every file is read back by llama.cpp's own reader: architecture, pre-tokenizer, block count, the type of each tensor
    (no fallback that nobody asked for), and each tensor's values against the model's, exactly or within the type's
    error.

    Args:
        model_dir: a model in safetensors.
        out_dir: must not exist.
        types: of `GGUF_TYPES`.
        name: the files' stem.
        events: progress, choices and messages.
        record: entries added to the manifest.
        replace: says whether an existing `out_dir` may be replaced.

    Returns:
        The manifest.

    Raises:
        UsageError: a type that cannot be made, or `out_dir` exists.
        PreflightError: the converter cannot be fetched, a package is missing, too little space.
        SparktuneError: the converter refused the model, or a file failed a check (it is not kept).
    """
    check_gguf_types(types)
    _preflight(probe(str(model_dir)))
    sources = converter_sources(events)
    with tempfile.TemporaryDirectory(prefix="sparktune-gguf-") as private:
        export = _Export(model_dir, sources, Path(private), events)
        sizes = {kind: needed_bytes(model_dir, kind, with_mtp=export.with_mtp) for kind in types}
        if export.hybrid:
            chosen, reason = ("included", "tensors and declaration are there") if export.with_mtp else (
                "left out (--no-mtp)", "no mtp.* tensors, or no declaration of them in config.json")
            events.choice("gguf mtp", chosen, reason)
        if export.demo:
            events.choice("gguf pre-tokenizer", "qwen35", f"{MARKER}: the demo made this tokenizer by Qwen3.5's rule")
        files = []
        with build_folder(out_dir, needs_bytes=sum(sizes.values()), what="The GGUF export", replace=replace) as folder:
            for kind in types:
                partial = folder / (gguf_name(name, kind) + ".partial")
                export.convert(partial, kind, name, sizes[kind])
                checks = check_file(partial, model_dir, kind, export.spec, with_mtp=export.with_mtp, sources=sources,
                                    scratch=Path(private), events=events)
                final = folder / gguf_name(name, kind)
                os.rename(partial, final)
                files.append({"file": final.name, "type": kind, "bytes": _size(final), "sha256": _sha256(final),
                              "checks": checks})
            manifest = {
                "made_by": "sparktune",
                "llama_cpp": {"commit": COMMIT, "package": PACKAGE, "sdist_sha256": SDIST_SHA256,
                              "tree_sha256": TREE_SHA256},
                "source": {"folder": str(model_dir), "mtp": export.with_mtp, "demo_tokenizer": export.demo},
                "files": files, **(record or {}),
            }
            write_durably(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
            write_durably(folder / "Modelfile", modelfile(gguf_name(name, types[0]), model_dir, hybrid=export.hybrid))
    for file in files:
        events.emit("artifact", path=str(out_dir / str(file["file"])), bytes=file["bytes"])
        events.message(f"{out_dir / str(file['file'])}: {gib(int(str(file['bytes'])))}, every tensor checked.")
    return manifest


def _source_folder(stage: Stage) -> tuple[Path, str]:
    """Returns the folder that the result stands on, and why."""
    run = stage.run
    for mode in ("trained", "default"):
        if stage.plan.mtp == mode and run.mtp(mode).is_dir():
            return run.mtp(mode), f"the merged model with its {mode} MTP head"
    if run.merged.is_dir():
        return run.merged, "the merged model"
    raise PreflightError(f"{run.merged} should hold the merged model; there is none. Run the merge first.")


def export_run(stage: Stage) -> None:
    """Exports a run's result to `output/RUN-gguf`; finished files of the same model and types are kept."""
    plan, run, events = stage.plan, stage.run, stage.events
    if not plan.gguf:
        events.choice("gguf", "none", "asked for with --gguf none")
        return
    check_gguf_types(plan.gguf)
    source, why = _source_folder(stage)
    events.choice("gguf source", source.name, why)
    record = {"run": run.name, "source_kind": why, "trained_sha256": read_record(run.merged).get("trained_sha256")}
    found = read_manifest(run.gguf)
    same = found and all(found.get(k) == v for k, v in record.items())
    if same and found["llama_cpp"]["tree_sha256"] == TREE_SHA256 and [f["type"] for f in found["files"]] == plan.gguf:
        events.message(f"{run.gguf} already holds {', '.join(plan.gguf)} of this model; it is kept.")
        return
    export_gguf(source, run.gguf, plan.gguf, run.name, events, record=record,
                replace=lambda folder: read_manifest(folder).get("run") == run.name)


def _export_bare(args: argparse.Namespace) -> None:
    types = [t for t in args.types.split(",") if t]
    check_gguf_types(types)
    name = args.out.name.removesuffix("-gguf")
    if args.model is not None:
        manifest = export_gguf(args.model, args.out, types, name, NullEvents())
    else:
        base = args.base or adapter_base(args.adapter)
        args.out.absolute().parent.mkdir(parents=True, exist_ok=True)
        # beside the result, which has to fit there anyway; /tmp is often small
        with tempfile.TemporaryDirectory(prefix=f".{args.out.name}.merge-", dir=args.out.absolute().parent) as scratch:
            merged = Path(scratch) / "merged"
            merge(resolve_model_dir(base), args.adapter, merged, NullEvents())
            source = {"folder": str(args.adapter), "base": base, "merged": "to a temporary folder"}
            manifest = export_gguf(merged, args.out, types, name, NullEvents(), record={"adapter": source})
    for file in manifest["files"]:
        print(f"{args.out / file['file']}: {gib(file['bytes'])}, every tensor checked.")


def main(argv: list[str] | None = None) -> int:
    """Runs the stage, or exports an adapter or model folder. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sparktune.setup.export.gguf", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, help="run folder, results/RUN")
    what.add_argument("--adapter", type=Path, help="PEFT adapter folder; merged into a temporary folder first")
    what.add_argument("--model", type=Path, help="model folder")
    parser.add_argument("--out", type=Path, help="folder of the GGUF files (with --adapter or --model)")
    parser.add_argument("--types", default="q8_0", help=f"of {', '.join(GGUF_TYPES)}, separated by commas")
    parser.add_argument("--base", help="base model, folder or hub id (with --adapter; default: what the adapter names)")
    args = parser.parse_args(argv)
    if args.run is not None:
        if args.out or args.base:
            parser.error("--out and --base go with --adapter or --model; a run knows its own")
        return run_stage("gguf", args.run, export_run)
    if args.out is None:
        parser.error("--adapter and --model need --out")
    return run_command(lambda: _export_bare(args))


if __name__ == "__main__":
    sys.exit(main())
