"""Stage `gguf`: GGUF files by llama.cpp's own converter and quantiser, each held against the model it was made from.

    python -m sparktune.setup.export.gguf --run RUN
    python -m sparktune.setup.export.gguf --adapter DIR --out DIR [--types q8_0,q4_k_m] [--base DIR-OR-HUB-ID]
    python -m sparktune.setup.export.gguf --model DIR --out DIR [--types q8_0,q4_k_m]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from sparktune.setup.data.tokenise import prepare
from sparktune.setup.data.tokenizer import load_tokenizer
from sparktune.setup.export.gguf_export import MANIFEST, export_gguf, gguf_name, read_manifest
from sparktune.setup.export.llama_build import find_tools
from sparktune.setup.export.llama_cpp import TREE_SHA256
from sparktune.setup.export.merge import merge, read_record
from sparktune.setup.export.prompts import choose_prompts, rendered_prompts
from sparktune.setup.export.proof import TEXTS, Probe, make_chunks
from sparktune.setup.export.stage import Stage, run_command, run_stage
from sparktune.setup.plan.errors import PreflightError
from sparktune.setup.plan.events import NullEvents
from sparktune.setup.plan.exports import GGUF_TYPES, check_gguf_types
from sparktune.setup.plan.models import adapter_base, probe, resolve_model_dir
from sparktune.setup.plan.outfolder import gib
from sparktune.setup.plan.schema import Plan

__all__ = ["MANIFEST", "examples_of_model", "export_gguf", "export_run", "gguf_name", "read_manifest"]

_QUESTION = "What is 5 + 5?"


def _device(asked: str = "auto") -> str:
    import torch

    return asked if asked != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def examples_of_model(model_dir: Path, plan: Plan | None = None, stage: Stage | None = None) -> Probe:
    """Returns what a comparison in llama.cpp runs on: the run's own examples, or fixed texts where there are none.

    Args:
        model_dir: the model; its tokenizer renders.
        plan: sample prompts and the rendering's settings.
        stage: a run, whose data is read (it is in the token cache by then).
    """
    plan = plan or Plan.model_validate({})
    tokenizer = load_tokenizer(str(model_dir))
    held_out = train = None
    if stage is not None and plan.data is not None:
        data = prepare(plan, probe(plan.model), str(resolve_model_dir(plan.model)), stage.events)
        held_out, train = data.evaluation, data.train
    documents = [ids.tolist() for part in (held_out, train) if part is not None for ids, _ in
                 (part[i] for i in range(min(len(part), 256)))]
    texts = tokenizer.encode_batch(list(TEXTS))
    chunks = make_chunks(documents or [t.ids.tolist() for t in texts])
    prompts = choose_prompts(plan, tokenizer, held_out)
    if not prompts and tokenizer.template is not None:
        prompts = rendered_prompts([_QUESTION], tokenizer, plan)
    asked = [(p.text, list(p.ids)) for p in prompts] or [(TEXTS[0], [int(i) for i in texts[0].ids])]
    return Probe(chunks=chunks, prompts=[ids for _, ids in asked], questions=[text for text, _ in asked],
                 text="".join(tokenizer.decode(c, skip_special_tokens=False) for c in chunks))


def _source_folder(stage: Stage) -> tuple[Path, str]:
    """Returns the folder that the result stands on, and why."""
    run = stage.run
    served = run.served_mtp(stage.plan.mtp)
    if served is not None:
        mode = "trained" if served == run.mtp("trained") else "default"
        return served, f"the merged model with its {mode} MTP head"
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
    proven = find_tools() is not None
    record = {"run": run.name, "source_kind": why, "trained_sha256": read_record(run.merged).get("trained_sha256")}
    if gap := read_record(run.merged).get("quantised_base"):
        record["quantised_base"] = gap
    found = read_manifest(run.gguf)
    same = found and all(found.get(k) == v for k, v in record.items())
    same = same and (not proven or all("proof" in f for f in found["files"]))
    if same and found["llama_cpp"]["tree_sha256"] == TREE_SHA256 and [f["type"] for f in found["files"]] == plan.gguf:
        events.message(f"{run.gguf} already holds {', '.join(plan.gguf)} of this model; it is kept.")
        return
    export_gguf(source, run.gguf, plan.gguf, run.name, events, record=record,
                replace=lambda folder: read_manifest(folder).get("run") == run.name,
                examples=lambda: examples_of_model(source, plan, stage), device=_device(plan.device),
                keep_mtp=plan.mtp != "skip")


def _export_bare(args: argparse.Namespace) -> None:
    types = [t for t in args.types.split(",") if t]
    check_gguf_types(types)
    name = args.out.name.removesuffix("-gguf")
    if args.model is not None:
        manifest = export_gguf(args.model, args.out, types, name, NullEvents(),
                               examples=lambda: examples_of_model(args.model), device=_device())
    else:
        base = args.base or adapter_base(args.adapter)
        args.out.absolute().parent.mkdir(parents=True, exist_ok=True)
        # beside the result, which has to fit there anyway; /tmp is often small
        with tempfile.TemporaryDirectory(prefix=f".{args.out.name}.merge-", dir=args.out.absolute().parent) as scratch:
            merged = Path(scratch) / "merged"
            merge(resolve_model_dir(base), args.adapter, merged, NullEvents())
            source = {"folder": str(args.adapter), "base": base, "merged": "to a temporary folder"}
            manifest = export_gguf(merged, args.out, types, name, NullEvents(), record={"adapter": source},
                                   examples=lambda: examples_of_model(merged), device=_device())
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
