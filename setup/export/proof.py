"""Proof in llama.cpp itself: a finished file is loaded there and held against the merged model.

Same token ids; the mean Kullback-Leibler divergence from the merged model's distributions, by llama-perplexity; for F32
files every logit, by llama-results; a question answered by llama-server; with an MTP head, the same answers with and
without drafting.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparktune.setup.export.llama_build import Tools
from sparktune.setup.export.llama_cpp import child_environment, run_child
from sparktune.setup.export.llama_server import llama_server, llama_threads
from sparktune.setup.plan.errors import SparktuneError
from sparktune.setup.plan.events import EventWriter

__all__ = ["KL_LIMITS", "Probe", "Reference", "kl_limit", "make_chunks", "make_reference", "prove"]

KL_LIMITS = {"f32": 1e-4, "f16": 1e-3, "bf16": 1e-3, "q8_0": 5e-3, "6": 2e-2, "5": 6e-2, "4": 0.15, "3": 0.6}
"""Type (or the first digit of its name) -> largest mean KL divergence in nats; below three bits it is only reported."""
LOGIT_LIMIT = 1e-3
"""Largest difference of any logit between an F32 file and the model in float32."""

CONTEXT = 128
CHUNKS = 8
_NEW_TOKENS = 24
_DRAFT_TOKENS = 2
_ASKED_AGAIN = 12
_KLD = re.compile(r"Mean\s+KLD:\s+(-?[0-9.]+|-?nan)\s+±\s+(-?[0-9.]+|-?nan)")
_TOP = re.compile(r"Same top p:\s+([0-9.]+)")
_PPL = re.compile(r"Mean PPL\(Q\)\s+:\s+([0-9.]+|nan)")

TEXTS = (
    "The invoice of 17 March says 1,234.50 euros; pay it before 31.12.2026, please.",
    "def area(r: float) -> float:\n\treturn 3.14159 * r ** 2  # πr²\n\n\nprint(f\"{area(2):.2f}\")\n",
    "Äpfel, crème brûlée, x\u0302, naïve façade; Straße und ΣΙΓΜΑ.",
    "今日は良い天気です。明日は雨が降るでしょう。 한국어도 시험합니다. שלום! مرحبا بالعالم",
    "हिन्दी में एक वाक्य, with क्षि and a ZWJ emoji: 👩‍🔬🚀 and a flag 🇳🇴.",
    "<|im_start|>user\nWhat is 5 + 5?<|im_end|>\n<|im_start|>assistant\n",
    "   three spaces, a tab\there, trailing blanks   \r\n\r\nAND SHOUTING don't WE'LL it's",
)
"""Texts whose token ids must be the same in llama.cpp: accents, combining marks, scripts, code, markers, blanks."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What the comparison runs on."""

    chunks: list[list[int]]
    """Token ids, each chunk CONTEXT long: the run's own examples where there are any."""
    prompts: list[list[int]]
    """Rendered questions; the first one is the smoke question."""
    questions: list[str]
    """The same, for people."""
    text: str
    """The chunks as text, special tokens written out: calibration for types that want it."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The merged model's side, computed once for all files of an export."""

    base_file: Path
    dtype: str
    perplexity: float
    text_ids: list[list[int]]
    answer_ids: list[list[int]]
    answers: list[str]


def kl_limit(kind: str) -> float | None:
    """Returns the largest mean KL divergence that a type may have; None where it is only reported."""
    digit = next((c for c in kind if c.isdigit()), "")
    return KL_LIMITS.get(kind, KL_LIMITS.get(digit))


def make_chunks(documents: Iterable[Sequence[int]]) -> list[list[int]]:
    """Returns up to CHUNKS chunks of CONTEXT token ids, documents end to end; short material is repeated."""
    stream: list[int] = []
    for document in documents:
        stream += [int(i) for i in document]
        if len(stream) >= CHUNKS * CONTEXT:
            break
    assert stream, "there is always a text"
    count = min(CHUNKS, max(4, len(stream) // CONTEXT))
    while len(stream) < count * CONTEXT:
        stream += stream
    return [stream[i * CONTEXT:(i + 1) * CONTEXT] for i in range(count)]


def _child(
    job: str, request: dict[str, Any], sources: Path, scratch: Path, events: EventWriter, what: str
) -> dict[str, Any]:
    asked, out = scratch / f"{job}-request.json", scratch / f"{job}-answer.json"
    out.unlink(missing_ok=True)
    asked.write_text(json.dumps(request), encoding="utf-8")
    command = [sys.executable, "-m", "sparktune.setup.export.hf_reference", job, str(asked), str(out)]
    done = run_child(command, child_environment(sources, scratch), scratch,
                     lambda: events.progress(what, 0, None, "tokens"))
    if done.code or not out.is_file():
        print(done.output, flush=True)
        said = [line for line in done.output.splitlines() if line.strip()]
        raise SparktuneError(f"The merged model could not be run through transformers for the comparison: "
                             f"{said[-1] if said else 'no message'}. The merged model itself is untouched.")
    answer: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return answer


def make_reference(
    model_dir: Path, probe: Probe, device: str, sources: Path, scratch: Path, events: EventWriter
) -> Reference:
    """Runs the merged model through transformers, in a process of its own.

    Args:
        model_dir: the model in safetensors.
        probe: chunks and prompts.
        device: cuda or cpu.
        sources: the pinned llama.cpp's Python sources.
        scratch: a private folder; the log-probabilities lie there (2 bytes a token of the vocabulary and position).
        events: progress.
    """
    base_file = scratch / "merged.kld"
    answer = _child("reference", {
        "model": str(model_dir.resolve()), "device": device, "chunks": probe.chunks, "base_file": str(base_file),
        "texts": list(TEXTS), "prompts": probe.prompts, "max_new_tokens": _NEW_TOKENS,
    }, sources, scratch, events, "merged model, for comparison")
    return Reference(base_file=base_file, **answer)


def _divergence(tools: Tools, file: Path, reference: Reference, scratch: Path, events: EventWriter) -> dict[str, Any]:
    """Returns llama-perplexity's statistics of a file against the merged model.

    Its logger is a thread that nobody joins at exit (llama.cpp issue 22142), so a small model's last lines are
    sometimes lost although all went well: then it is asked again.
    """
    command = [
        tools.program("llama-perplexity"), "-m", str(file.resolve()), "--kl-divergence", "--kl-divergence-base",
        str(reference.base_file), "-c", str(CONTEXT), "-b", str(CONTEXT), "-ub", str(CONTEXT), "-t",
        str(llama_threads()),
    ]
    for _ in range(_ASKED_AGAIN):
        done = run_child(command, child_environment(scratch, scratch), scratch,
                         lambda: events.progress(f"{file.name}: KL", 0, None, "tokens"))
        mean, top, ppl = _KLD.search(done.output), _TOP.search(done.output), _PPL.search(done.output)
        if done.code or top is not None:
            break
    if done.code or mean is None or top is None or ppl is None:
        print(done.output, flush=True)
        lines = [line.strip() for line in done.output.splitlines() if "rror" in line or "failed" in line]
        raise SparktuneError(f"llama.cpp could not run {file.name}: {lines[-1] if lines else 'see the log'}.")
    return {"mean_kl": float(mean[1]), "mean_kl_standard_error": float(mean[2]), "same_top": float(top[1]) / 100,
            "perplexity": float(ppl[1])}


def _logits(
    tools: Tools, file: Path, model_dir: Path, device: str, sources: Path, scratch: Path, events: EventWriter
) -> dict[str, Any]:
    """Returns the largest difference of any logit between a file and the model, on a text without markers."""
    results, text = scratch / "results.gguf", scratch / "results.txt"
    text.write_text(TEXTS[0] + " " + TEXTS[2], encoding="utf-8")
    done = run_child([
        tools.program("llama-results"), "-m", str(file.resolve()), "-f", str(text), "-o", str(results), "-c",
        str(4 * CONTEXT), "-b", str(4 * CONTEXT), "-ub", str(4 * CONTEXT), "-t", str(llama_threads()),
    ], child_environment(scratch, scratch), scratch, lambda: events.progress(f"{file.name}: logits", 0, None, "tokens"))
    if done.code or not results.is_file():
        print(done.output, flush=True)
        raise SparktuneError(f"llama.cpp could not write the logits of {file.name}; its output is in the log.")
    try:
        return _child("logits", {"model": str(model_dir.resolve()), "device": device, "results": str(results)}, sources,
                      scratch, events, "logits of the merged model")
    finally:
        results.unlink()


def _answers(
    tools: Tools, file: Path, probe: Probe, reference: Reference, with_mtp: bool, events: EventWriter
) -> tuple[dict[str, Any], list[str]]:
    """Returns token ids, answers and drafting as llama-server gives them, and what is wrong with them."""
    wrong: list[str] = []

    def poll() -> None:
        events.progress(f"{file.name}: load", 0, None, "bytes")

    with llama_server(tools, file, on_poll=poll) as server:
        for text, want in zip(TEXTS, reference.text_ids, strict=True):
            seen = server.tokenize(text)
            if seen != want:
                place = next((i for i, (a, b) in enumerate(zip(seen, want, strict=False)) if a != b), len(want))
                wrong.append(f"token {place} of {text[:24]!r} is {seen[place:place + 1]} in llama.cpp, "
                             f"{want[place:place + 1]} in transformers")
        plain = [server.complete(prompt, _NEW_TOKENS) for prompt in probe.prompts]
    if reference.answers[0] and not plain[0].text:
        wrong.append(f"the question {probe.questions[0]!r} got no answer; the merged model says "
                     f"{reference.answers[0][:60]!r}")
    facts: dict[str, Any] = {
        "same_token_ids": len(TEXTS) - sum(w.startswith("token ") for w in wrong), "texts": len(TEXTS),
        "smoke": {"question": probe.questions[0], "answer": plain[0].text, "merged_answers": reference.answers[0]},
        "answers_as_merged": sum(p.ids == a for p, a in zip(plain, reference.answer_ids, strict=True)),
        "answers": len(plain),
    }
    if with_mtp:
        arguments = ["--spec-type", "draft-mtp", "--spec-draft-n-max", str(_DRAFT_TOKENS)]
        with llama_server(tools, file, arguments=arguments, on_poll=poll) as server:
            drafted = [server.complete(prompt, _NEW_TOKENS) for prompt in probe.prompts]
        same = sum(a.ids == b.ids for a, b in zip(drafted, plain, strict=True))
        facts["mtp"] = {"prompts": len(plain), "equal_to_plain_greedy": same,
                        "drafted": sum(d.drafted for d in drafted), "accepted": sum(d.accepted for d in drafted)}
        if not facts["mtp"]["drafted"]:
            wrong.append("the MTP head drafted nothing")
        elif same < len(plain):
            wrong.append(f"{len(plain) - same} of {len(plain)} answers differ with the MTP head's drafts")
    return facts, wrong


def prove(
    tools: Tools, file: Path, kind: str, model_dir: Path, probe: Probe, reference: Reference, *, with_mtp: bool,
    device: str, sources: Path, scratch: Path, events: EventWriter,
) -> dict[str, Any]:
    """Holds one file in llama.cpp against the merged model. Returns the figures for the manifest.

    Args:
        tools: the compiled programs.
        file: the GGUF file.
        kind: its type.
        model_dir: the model it was made from.
        probe: what to ask.
        reference: the merged model's side.
        with_mtp: the file carries an MTP head.
        device: where the merged model runs.
        sources: the pinned llama.cpp's Python sources.
        scratch: a private folder.
        events: progress.

    Raises:
        SparktuneError: llama.cpp cannot load the file, or it differs from the merged model by more than its type may.
    """
    facts = {"llama_cpp": tools.record["commit"], "reference_dtype": reference.dtype,
             "merged_perplexity": round(reference.perplexity, 4),
             "positions": len(probe.chunks) * (CONTEXT - 1 - CONTEXT // 2)}
    facts |= _divergence(tools, file, reference, scratch, events)
    limit, wrong = kl_limit(kind), []
    facts["kl_limit"] = limit
    if limit is not None and not facts["mean_kl"] <= limit:
        wrong.append(f"the mean KL divergence from the merged model is {facts['mean_kl']:.4g}, {kind} allows {limit:g}")
    if kind == "f32" and reference.dtype == "float32":
        facts["logits"] = _logits(tools, file, model_dir, device, sources, scratch, events)
        if not facts["logits"]["max_abs_difference"] < LOGIT_LIMIT:
            wrong.append(f"a logit differs by {facts['logits']['max_abs_difference']:.3g}, f32 allows {LOGIT_LIMIT:g}")
    answers, problems = _answers(tools, file, probe, reference, with_mtp, events)
    wrong += problems
    if wrong:
        raise SparktuneError(f"{file.name} does not behave in llama.cpp as the merged model does, and is not kept: "
                             f"{'; '.join(wrong[:6])}. The merged model is complete.")
    return facts | answers
