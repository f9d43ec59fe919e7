"""What a GGUF must be before it gets its name: read back by llama.cpp's own reader and held against its model."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from sparktune.setup.export.gguf_map import KNOWN_ARCHS
from sparktune.setup.export.llama_cpp import child_environment, run_child
from sparktune.setup.plan.errors import SparktuneError
from sparktune.setup.plan.events import EventWriter
from sparktune.setup.plan.exports import BYTES_PER_WEIGHT, needs_quantiser
from sparktune.setup.plan.schema import ModelSpec
from sparktune.setup.plan.weights import safetensors_header, safetensors_index

__all__ = ["check_file", "judge", "needed_bytes"]

_Q8_BLOCK = 32
_K_BLOCK = 256
# llama.cpp gives embeddings and output a larger type than the rest, and a width that is no multiple of 256 one with
# blocks of 32: never more than Q8_0, unless not even 32 divides it (F16).
_LARGER = BYTES_PER_WEIGHT["q8_0"]
_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")
# Vocabulary, template and alignment; 248320 tokens take about 10 MiB.
_METADATA_BYTES = 32 * 2**20
_ARCH = {"qwen3_5_text": "qwen35", "qwen3": "qwen3", "qwen2": "qwen2", "llama": "llama", "mistral": "llama"}


def needed_bytes(model_dir: Path, kind: str, *, with_mtp: bool) -> int:
    """Returns the predicted size of one GGUF file: an upper bound, from the checkpoint's headers.

    Args:
        model_dir: the checkpoint.
        kind: of `GGUF_TYPES`.
        with_mtp: the MTP head goes in.
    """
    weights, vectors = 0.0, 0
    per_weight = BYTES_PER_WEIGHT[kind]
    for file in set(safetensors_index(model_dir).values()):
        for name, entry in safetensors_header(file).items():
            if "visual." in name or (name.startswith("mtp.") and not with_mtp):
                continue
            if len(entry.shape) < 2 or "conv1d" in name:
                vectors += math.prod(entry.shape)
                continue
            size, width = per_weight, entry.shape[-1]
            if needs_quantiser(kind):
                odd = name.endswith(_EMBEDDINGS) or width % _K_BLOCK
                size = 2.0 if width % _Q8_BLOCK or name.startswith("mtp.") else max(size, _LARGER) if odd else size
            elif kind == "q8_0" and width % _Q8_BLOCK:
                size = 2.0
            weights += math.prod(entry.shape) * size
    return int(weights) + 4 * vectors + _METADATA_BYTES


def _expected_type(name: str, shape: list[int], kind: str) -> str:
    """The rule: vectors, norms and the convolution stay F32, every matrix gets the type asked for.

    The quantiser mixes types by a rule of its own: what it gives a matrix is any type but F32.
    """
    if len(shape) < 2 or name.endswith(("_norm.weight", "ssm_conv1d.weight")) or not name.endswith(".weight"):
        return "F32"
    return "" if needs_quantiser(kind) else kind.upper()


def judge(facts: dict[str, Any], kind: str, spec: ModelSpec, *, with_mtp: bool) -> tuple[list[str], list[str]]:
    """Returns what is wrong with a file, and the tensors that could not have the type asked for.

    Q8_0 packs 32 values, so the converter stores a matrix whose width is no multiple of 32 as F16: that is listed. Any
    other difference between the types asked for and seen is wrong.

    Args:
        facts: what gguf_child's `check` found.
        kind: the type asked for.
        spec: the model.
        with_mtp: the MTP head should be in.
    """
    wrong = list(facts["wrong"])
    arch = _ARCH.get(spec.model_type)
    if arch is not None and facts["arch"] != arch:
        wrong.append(f"the architecture should be {arch}, it is {facts['arch']}")
    if facts["arch"] == "qwen35" and facts["pre"] != "qwen35":
        wrong.append(f"the pre-tokenizer should be qwen35, it is {facts['pre']}")
    nextn = 1 if with_mtp else 0
    if facts["nextn_predict_layers"] != nextn:
        wrong.append(f"nextn_predict_layers should be {nextn}, it is {facts['nextn_predict_layers']}")
    if facts["block_count"] != spec.num_layers + nextn:
        wrong.append(f"block_count should be {spec.num_layers + nextn}, it is {facts['block_count']}")
    if facts["vocabulary"] != spec.vocab_size:
        wrong.append(f"the vocabulary should have {spec.vocab_size} tokens, it has {facts['vocabulary']}")
    fallbacks = []
    for name, seen in facts["types"].items():
        shape = facts["shapes"][name]
        want = _expected_type(name, shape, kind)
        if seen == want or (not want and seen != "F32"):
            continue
        if want == "Q8_0" and seen == "F16" and shape[-1] % _Q8_BLOCK:
            fallbacks.append(name)
        elif arch is not None:
            wrong.append(f"{name} should be {want or 'quantised'}, it is {seen}")
    return wrong, fallbacks


def check_file(
    path: Path, model_dir: Path, kind: str, spec: ModelSpec, *, with_mtp: bool, sources: Path, scratch: Path,
    events: EventWriter,
) -> dict[str, Any]:
    """Reads a GGUF back and compares every tensor with the model's. Returns the facts for the manifest.

    Args:
        path: the file.
        model_dir: the model it was made from.
        kind: the type asked for.
        spec: the model's shape.
        with_mtp: the MTP head should be in.
        sources: the pinned llama.cpp.
        scratch: a private folder for the child process.
        events: gets warnings.

    Raises:
        SparktuneError: something is wrong with the file; up to ten findings are named.
    """
    request, answer = scratch / "check-request.json", scratch / "check-answer.json"
    request.write_text(json.dumps({"file": str(path), "model": str(model_dir.resolve()), "with_mtp": with_mtp}))
    command = [sys.executable, "-m", "sparktune.setup.export.gguf_child", "check", str(request), str(answer)]
    done = run_child(command, child_environment(sources, scratch), scratch,
                     lambda: events.progress(f"gguf {kind}: check", 0, None, "tensors"))
    if done.code or not answer.is_file():
        print(done.output, flush=True)
        said = [line for line in done.output.splitlines() if line.strip()]
        raise SparktuneError(f"{path.name} could not be read back by llama.cpp's reader and is not kept: "
                             f"{said[-1] if said else 'no message'}.")
    facts = json.loads(answer.read_text(encoding="utf-8"))
    answer.unlink()
    wrong, fallbacks = judge(facts, kind, spec, with_mtp=with_mtp)
    if wrong:
        shown = "; ".join(wrong[:10]) + (f"; and {len(wrong) - 10} more" if len(wrong) > 10 else "")
        raise SparktuneError(f"{path.name} failed {len(wrong)} checks and is not kept: {shown}.")
    if fallbacks:
        events.message(f"{len(fallbacks)} matrices are stored as F16 because their width is no multiple of "
                       f"{_Q8_BLOCK}: {', '.join(fallbacks[:5])}.", "warning")
    if facts["arch"] not in KNOWN_ARCHS:
        events.message(f"The values of a {facts['arch']} file are not compared with the model's: its layout is not "
                       "known here.", "warning")
    return {
        "arch": facts["arch"], "pre": facts["pre"], "block_count": facts["block_count"],
        "nextn_predict_layers": facts["nextn_predict_layers"], "vocabulary": facts["vocabulary"],
        "chat_template": facts["has_chat_template"], "tensors": facts["tensors"], "compared_tensors": facts["compared"],
        "types": dict(sorted(Counter(facts["types"].values()).items())), "fallbacks": fallbacks,
        "worst_relative_rms": facts["worst_rms"],
    }
