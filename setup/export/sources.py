"""Who is asked in an evaluation: base, merged model, GGUF files, checkpoints, a run known to be good."""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sparktune.setup.export.gguf_export import read_manifest
from sparktune.setup.export.llama_build import Tools, find_tools
from sparktune.setup.export.llama_cpp import child_environment, converter_sources, run_child
from sparktune.setup.export.llama_server import llama_server
from sparktune.setup.export.merge import merge
from sparktune.setup.export.prompts import Prompt
from sparktune.setup.plan.errors import SparktuneError
from sparktune.setup.plan.events import EventWriter, NullEvents
from sparktune.setup.plan.exports import baseline_run
from sparktune.setup.plan.models import resolve_model_dir
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import Plan

__all__ = ["Asked", "Questions", "Source", "gguf_answer", "model_answers", "sources_of"]


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What every source gets."""

    prompts: Sequence[Prompt]
    """Answered greedily."""
    read: Sequence[Prompt]
    """Held-out examples whose answers' losses are measured."""
    max_new_tokens: int

    @property
    def examples(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Prompt and answer of each example that is read."""
        return [(p.ids, p.reference_ids) for p in self.read]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What one source said."""

    answers: list[str]
    losses: list[float]
    """Mean loss in nats of each example that was read; empty where it cannot be measured."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source and how it is asked."""

    name: str
    """base, merged, `gguf TYPE`, `checkpoint-N` or `baseline NAME`."""
    when: str
    """`before` for the base, `after` for the rest."""
    ask: Callable[[Questions], Asked]


def ask_model(folder: Path, questions: Questions, device: str) -> Asked:
    """Asks a model folder through transformers; the model is gone from memory afterwards."""
    from sparktune.setup.export.generate import answer_all, load, mean_losses

    model, tokenizer = load(folder, device)
    try:
        answers = answer_all(model, tokenizer, [p.ids for p in questions.prompts], questions.max_new_tokens)
        return Asked(answers=answers, losses=mean_losses(model, questions.examples))
    finally:
        del model
        gc.collect()
        if device == "cuda":
            import torch

            torch.cuda.empty_cache()


def model_answers(folder: Path, prompts: Sequence[Prompt], device: str, max_new_tokens: int = 48) -> list[str]:
    """Returns the greedy answers of a model folder."""
    return ask_model(folder, Questions(prompts=prompts, read=(), max_new_tokens=max_new_tokens), device).answers


def ask_weights(file: Path, model_dir: Path, device: str, events: EventWriter, questions: Questions) -> Asked:
    """Asks a GGUF's weights where llama.cpp itself is not compiled.

    A process of its own reads the file with llama.cpp's reader, dequantises it, undoes the converter's changes and puts
    the weights into the transformers model. So it answers for the weights in the file, not for llama.cpp's arithmetic.

    Args:
        file: the GGUF.
        model_dir: the model it was made from: configuration, tokenizer, and the names of the tensors.
        device: cuda or cpu.
        events: progress.
        questions: what to ask.

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
            "prompt_ids": [list(p.ids) for p in questions.prompts], "max_new_tokens": questions.max_new_tokens,
            "examples": questions.examples,
        }))
        command = [sys.executable, "-m", "sparktune.setup.export.gguf_child", "answer", str(request), str(answer)]
        done = run_child(command, child_environment(sources, scratch), scratch,
                         lambda: events.progress("answers of the GGUF", 0, None, "prompts"))
        if done.code or not answer.is_file():
            print(done.output, flush=True)
            said = [line for line in done.output.splitlines() if line.strip()]
            raise SparktuneError(f"{file}: its weights could not be read back: {said[-1] if said else 'no message'}.")
        return Asked(**json.loads(answer.read_text(encoding="utf-8")))


def gguf_answer(
    file: Path, model_dir: Path, prompts: Sequence[Prompt], device: str, events: EventWriter,
    max_new_tokens: int = 48,
) -> list[str]:
    """Returns the greedy answers of a GGUF's weights (see ask_weights)."""
    questions = Questions(prompts=prompts, read=(), max_new_tokens=max_new_tokens)
    return ask_weights(file, model_dir, device, events, questions).answers


def ask_llama_cpp(tools: Tools, file: Path, events: EventWriter, questions: Questions) -> Asked:
    """Asks a GGUF file in llama.cpp itself; its perplexity is in the manifest's proof, on other text."""
    with llama_server(tools, file, on_poll=lambda: events.progress(f"load {file.name}", 0, None, "bytes")) as server:
        return Asked(answers=[server.complete(p.ids, questions.max_new_tokens).text for p in questions.prompts],
                     losses=[])


def _checkpoints(plan: Plan, run: RunDir, device: str) -> Iterator[Source]:
    base = resolve_model_dir(plan.model)

    def ask(trained: Path, questions: Questions) -> Asked:
        # beside the results, which have to fit there anyway; /tmp is often small
        with tempfile.TemporaryDirectory(prefix=".checkpoint-", dir=run.output_root) as scratch:
            merge(base, trained, Path(scratch) / "merged", NullEvents())
            return ask_model(Path(scratch) / "merged", questions, device)

    def number(folder: Path) -> int:
        return int(folder.name.removeprefix("checkpoint-"))

    for folder in sorted((f for f in run.root.glob("checkpoint-*") if f.name[11:].isdigit()), key=number):
        trained = next((folder / kind for kind in ("adapter", "weights") if (folder / kind).is_dir()), None)
        if trained is not None:
            yield Source(name=folder.name, when="after", ask=partial(ask, trained))


def sources_of(plan: Plan, run: RunDir, device: str, events: EventWriter) -> list[Source]:
    """Returns the sources of a run's evaluation, the base first and the merged model second.

    Args:
        plan: says whether checkpoints and a baseline are asked.
        run: where its models are.
        device: cuda or cpu, for what runs through transformers.
        events: says once how a GGUF is asked.

    Raises:
        UsageError: --baseline names no finished run.
    """
    found = [
        Source(name="base", when="before", ask=lambda q: ask_model(resolve_model_dir(plan.model), q, device)),
        Source(name="merged", when="after", ask=lambda q: ask_model(run.merged, q, device)),
    ]
    tools, files = find_tools(), read_manifest(run.gguf).get("files", [])
    if files:
        where = ("llama.cpp", "its programs are compiled here") if tools else (
            "its weights in transformers", "llama.cpp's programs are not compiled here")
        events.choice("answers of the GGUF", *where)
    # without llama.cpp a file is dequantised whole in Python: the first one has to do
    for file in files if tools else files[:1]:
        path, name = run.gguf / file["file"], f"gguf {file['type']}"
        ask = partial(ask_llama_cpp, tools, path, events) if tools is not None else partial(
            ask_weights, path, run.merged, device, events)
        found.append(Source(name=name, when="after", ask=ask))
    if plan.baseline is not None:
        known = baseline_run(plan.baseline, run.results_root)
        found.append(Source(name=f"baseline {known.name}", when="after",
                            ask=lambda q: ask_model(known.merged, q, device)))
    return found + (list(_checkpoints(plan, run, device)) if plan.eval_checkpoints else [])
