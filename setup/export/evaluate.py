"""Stage `evaluate`: the same prompts answered by the base, by the merged model and by the GGUF's weights.

    python -m sparktune.setup.export.evaluate --run RUN

Everything here runs through transformers and none of our training code, so that it tells what others will see.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparktune.setup.data.tokenise import prepare
from sparktune.setup.data.tokenizer import load_tokenizer
from sparktune.setup.export.gguf_export import read_manifest
from sparktune.setup.export.llama_cpp import child_environment, converter_sources, run_child
from sparktune.setup.export.prompts import Prompt, choose_prompts
from sparktune.setup.export.stage import Stage, run_stage
from sparktune.setup.plan.errors import PreflightError, SparktuneError
from sparktune.setup.plan.events import EventWriter
from sparktune.setup.plan.models import probe, resolve_model_dir
from sparktune.setup.plan.outfolder import write_durably
from sparktune.setup.plan.schema import Plan

__all__ = ["MAX_NEW_TOKENS", "Prompt", "choose_prompts", "gguf_answer"]

MAX_NEW_TOKENS = 48


def _device(plan: Plan) -> str:
    import torch

    if plan.device != "auto":
        return plan.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def model_answers(folder: Path, prompts: Sequence[Prompt], device: str) -> list[str]:
    """Returns the greedy answers of a model folder; the model is gone from memory afterwards."""
    from sparktune.setup.export.generate import answer_all, load

    model, tokenizer = load(folder, device)
    try:
        return answer_all(model, tokenizer, [p.ids for p in prompts], MAX_NEW_TOKENS)
    finally:
        del model
        gc.collect()
        if device == "cuda":
            import torch

            torch.cuda.empty_cache()


def gguf_answer(
    file: Path, model_dir: Path, prompts: Sequence[Prompt], device: str, events: EventWriter,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[str]:
    """Returns the greedy answers of a GGUF's weights.

    A process of its own reads the file with llama.cpp's reader, dequantises it, undoes the converter's changes and puts
    the weights into the transformers model. So it answers for the weights in the file, not for llama.cpp's arithmetic.

    Args:
        file: the GGUF.
        model_dir: the model it was made from: configuration, tokenizer, and the names of the tensors.
        prompts: the prompts.
        device: cuda or cpu.
        events: progress.
        max_new_tokens: longest answer in tokens.

    Raises:
        SparktuneError: the file's weights cannot be read back.
        PreflightError: llama.cpp's reader is not there and cannot be fetched.
    """
    sources = converter_sources(events)
    with tempfile.TemporaryDirectory(prefix="sparktune-gguf-") as private:
        scratch = Path(private)
        request, answer = scratch / "request.json", scratch / "answer.json"
        request.write_text(json.dumps({
            "file": str(file.resolve()), "model": str(model_dir.resolve()), "device": device,
            "prompt_ids": [list(p.ids) for p in prompts], "max_new_tokens": max_new_tokens,
        }))
        command = [sys.executable, "-m", "sparktune.setup.export.gguf_child", "answer", str(request), str(answer)]
        done = run_child(command, child_environment(sources, scratch), scratch,
                         lambda: events.progress("answers of the GGUF", 0, None, "prompts"))
        if done.code or not answer.is_file():
            print(done.output, flush=True)
            said = [line for line in done.output.splitlines() if line.strip()]
            raise SparktuneError(f"{file}: its weights could not be read back: {said[-1] if said else 'no message'}.")
        answers: list[str] = json.loads(answer.read_text(encoding="utf-8"))["answers"]
        return answers


def _keep_other_rows(path: Path) -> list[str]:
    """Returns the lines of samples.jsonl that this stage did not write."""
    if not path.is_file():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if not (isinstance(row, dict) and row.get("stage") in ("before", "after")):
            kept.append(line)
    return kept


def evaluate_run(stage: Stage) -> None:
    """Writes the answers before and after to samples.jsonl, replacing those of an earlier evaluation."""
    plan, run, events = stage.plan, stage.run, stage.events
    if not run.merged.is_dir():
        raise PreflightError(f"{run.merged} should hold the merged model; there is none. Run the merge first.")
    tokenizer = load_tokenizer(str(run.merged))
    data = prepare(plan, probe(plan.model), str(resolve_model_dir(plan.model)), events) if plan.data else None
    prompts = choose_prompts(plan, tokenizer, data.evaluation if data else None)
    rows: list[dict[str, Any]] = []
    if not prompts:
        events.message("Nothing to answer: no --sample-prompt was given and no held-out row has a prompt.", "warning")
    else:
        device = _device(plan)
        manifest = read_manifest(run.gguf)
        files = [(run.gguf / f["file"], f"gguf {f['type']}") for f in manifest.get("files", [])[:1]]
        total = len(prompts) * (2 + len(files))
        jobs = [("before", "base", resolve_model_dir(plan.model)), ("after", "merged", run.merged)]
        for when, source, folder in jobs:
            events.progress("answers", len(rows), total, "prompts")
            answers = model_answers(folder, prompts, device)
            rows += [{"stage": when, "prompt": p.text, "answer": a, "source": source}
                     for p, a in zip(prompts, answers, strict=True)]
        for file, source in files:
            events.progress("answers", len(rows), total, "prompts")
            answers = gguf_answer(file, run.merged, prompts, device, events)
            rows += [{"stage": "after", "prompt": p.text, "answer": a, "source": source}
                     for p, a in zip(prompts, answers, strict=True)]
        events.progress("answers", total, total, "prompts")
    lines = [*_keep_other_rows(run.samples), *(json.dumps(row, ensure_ascii=False) for row in rows)]
    write_durably(run.samples, "".join(line + "\n" for line in lines))
    for row in rows:
        events.emit("sample", step=None, **{k: row[k] for k in ("prompt", "answer", "source")})


def main(argv: list[str] | None = None) -> int:
    """Runs the stage. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sparktune.setup.export.evaluate", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder, results/RUN")
    return run_stage("evaluate", parser.parse_args(argv).run, evaluate_run)


if __name__ == "__main__":
    sys.exit(main())
