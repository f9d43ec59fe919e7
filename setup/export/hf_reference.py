"""The merged model through transformers, as what a GGUF file is compared with. A process of its own, gone afterwards.

    python -m sparktune.setup.export.hf_reference reference REQUEST.json ANSWER.json
    python -m sparktune.setup.export.hf_reference logits REQUEST.json ANSWER.json

`reference` writes the model's log-probabilities in the form that `llama-perplexity --kl-divergence-base` reads, its
token ids of some texts, and its greedy answers. `logits` compares llama-results' file with the model, logit by logit.
"""

from __future__ import annotations

import importlib
import json
import math
import struct
import sys
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

from sparktune.setup.plan.hostmemory import available_bytes

__all__ = ["base_row", "read_base_row", "write_header"]

_MAGIC = b"_logits_"
_DEPTH = 16.0
"""llama-perplexity keeps log-probabilities down to 16 below the largest."""
_STEPS = 65535
_FLOAT32_SHARE = 0.8


def write_header(file: IO[bytes], context: int, vocabulary: int, chunks: list[list[int]]) -> None:
    """Writes the head of a log-probability file: sizes, then all tokens (int32, little endian)."""
    assert all(len(chunk) == context for chunk in chunks)
    file.write(_MAGIC + struct.pack("<Iii", context, vocabulary, len(chunks)))
    file.write(np.asarray(chunks, dtype="<i4").tobytes())


def base_row(logits: npt.NDArray[np.float32]) -> bytes:
    """Returns one position's log-probabilities as llama-perplexity stores them.

    A float32 step and a float32 lowest log-probability, then one uint16 a token, padded to an even number: log p is
    lowest + step * value. Source: log_softmax in tools/perplexity/perplexity.cpp.

    Args:
        logits: [V].
    """
    largest = float(logits.max())
    lowest = max(float(logits.min()), largest - _DEPTH)
    total = math.log(float(np.exp(logits - largest, dtype=np.float64).sum()))
    step = (largest - lowest) / _STEPS
    values: npt.NDArray[np.uint16] = np.zeros(len(logits) + len(logits) % 2, dtype="<u2")
    if step:
        values[: len(logits)] = np.rint(np.clip((logits - lowest) / step, 0, _STEPS)).astype("<u2")
    return struct.pack("<ff", step, lowest - largest - total) + values.tobytes()


def read_base_row(raw: bytes, vocabulary: int) -> npt.NDArray[np.float64]:
    """Undoes `base_row`: returns the log-probabilities [V]."""
    step, lowest = struct.unpack("<ff", raw[:8])
    values = np.frombuffer(raw, "<u2", count=vocabulary, offset=8)
    return cast(npt.NDArray[np.float64], lowest + step * values.astype(np.float64))


def _free_bytes(device: str) -> int:
    torch = importlib.import_module("torch")
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return available_bytes()


def _load(folder: Path, device: str) -> tuple[Any, Any, str]:
    """Returns (model, tokenizer, dtype): float32 where it fits, so that the comparison is the file's alone."""
    torch = importlib.import_module("torch")
    generate = importlib.import_module("sparktune.setup.export.generate")
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    dtype = "float32" if 2 * weights < _FLOAT32_SHARE * _free_bytes(device) else "bfloat16"
    model, tokenizer = generate.load(folder, device, dtype=getattr(torch, dtype))
    return model, tokenizer, dtype


def _greedy(model: Any, prompt: list[int], n: int) -> list[int]:
    torch = importlib.import_module("torch")
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n, temperature=None,
                         top_k=None, top_p=None)
    return [int(i) for i in out[0, len(prompt):]]


def reference(request: dict[str, Any]) -> dict[str, Any]:
    """Writes the log-probability file, and returns token ids, greedy answers, and the compute type."""
    torch = importlib.import_module("torch")
    model, tokenizer, dtype = _load(Path(request["model"]), request["device"])
    chunks: list[list[int]] = request["chunks"]
    context = len(chunks[0])
    first, loss = context // 2, 0.0
    with torch.inference_mode(), Path(request["base_file"]).open("wb") as file:
        for number, chunk in enumerate(chunks):
            ids = torch.tensor([chunk], device=model.device)
            logits = model(ids, logits_to_keep=context - first).logits[0].float().cpu().numpy()
            if not number:
                write_header(file, context, logits.shape[1], chunks)
            for position in range(context - 1 - first):
                row = base_row(logits[position])
                file.write(row)
                loss -= float(read_base_row(row, logits.shape[1])[chunk[first + position + 1]])
        answers = [_greedy(model, prompt, request["max_new_tokens"]) for prompt in request["prompts"]]
    return {
        "dtype": dtype, "perplexity": math.exp(loss / (len(chunks) * (context - 1 - first))),
        "text_ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in request["texts"]],
        "answer_ids": answers, "answers": [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers],
    }


def logits(request: dict[str, Any]) -> dict[str, Any]:
    """Returns the largest difference between llama.cpp's logits in a results file and the model's."""
    torch, gguf = importlib.import_module("torch"), importlib.import_module("gguf")
    tensors = {str(t.name): t.data for t in gguf.GGUFReader(request["results"]).tensors}
    ids = [int(i) for i in np.array(tensors["tokens"]).reshape(-1)]
    seen = np.array(tensors["logits"], dtype=np.float32).reshape(len(ids), -1)
    model, _, dtype = _load(Path(request["model"]), request["device"])
    with torch.inference_mode():
        want = model(torch.tensor([ids], device=model.device)).logits[0].float().cpu().numpy()
    return {"dtype": dtype, "tokens": len(ids), "max_abs_difference": float(np.abs(want - seen).max()),
            "same_top": float((want.argmax(1) == seen.argmax(1)).mean())}


def main(argv: list[str]) -> int:
    """Runs one job described by a JSON file and writes the JSON answer. Returns the exit code."""
    job, request, out = argv
    result = {"reference": reference, "logits": logits}[job](json.loads(Path(request).read_text(encoding="utf-8")))
    Path(out).write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
