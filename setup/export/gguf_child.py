"""Reads a finished GGUF with the pinned llama.cpp's own reader, in a process whose `gguf` is that package.

    python -m sparktune.setup.export.gguf_child check REQUEST.json ANSWER.json
    python -m sparktune.setup.export.gguf_child answer REQUEST.json ANSWER.json

`check` compares every tensor with the checkpoint it was made from; `answer` puts the file's weights into the
transformers model and continues prompts greedily.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from sparktune.setup.export.gguf_header import read_gguf_header
from sparktune.setup.export.gguf_map import KNOWN_ARCHS, Array, from_gguf, is_identity, neutral_name, to_gguf
from sparktune.setup.export.rounding import FLOAT_BYTES, to_float32
from sparktune.setup.plan.errors import SparktuneError
from sparktune.setup.plan.weights import safetensors_header, safetensors_index

__all__ = ["error_bound", "relative_rms"]

_CHUNK = 4 * 2**20
# Written by the converter from the config, with no tensor of the checkpoint behind it.
_GENERATED = {"rope_freqs.weight"}
_EXACT = {"F32": 0.0, "BF16": 2.0**-8, "F16": 2.0**-11}
# Largest relative RMS error of a tensor, by the bits in the type's name; about twice what normal weights give.
_RMS_LIMIT = {"8": 0.02, "6": 0.04, "5": 0.08, "4": 0.16, "3": 0.35, "2": 0.7, "1": 1.0}


def error_bound(want: Array, kind: str) -> Array:
    """Returns the largest error that rounding `want` [rows, columns] to a GGUF type may leave, element by element.

    F32 none; F16 and BF16 half a unit in the last place; Q8_0 half a step of the block of 32 (step = max / 127), plus
    what storing the step as float16 moves the largest of 127 steps.
    """
    if kind != "Q8_0":
        return np.abs(want) * np.float32(_EXACT[kind]) + np.float32(2.0**-25 if kind == "F16" else 0)
    step = np.abs(want).reshape(want.shape[0], -1, 32).max(axis=-1) / np.float32(127)
    bound = step * np.float32(0.5 + 127 * 2.0**-11) + np.float32(127 * 2.0**-25)
    return np.repeat(bound, 32, axis=-1)


class _Gguf:
    """A GGUF file through the pinned reader."""

    def __init__(self, path: Path) -> None:
        read_gguf_header(path)  # the package's reader trusts every count it finds
        self._gguf = importlib.import_module("gguf")
        self._quants = importlib.import_module("gguf.quants")
        self.reader = self._gguf.GGUFReader(path)
        self.tensors = {str(t.name): t for t in self.reader.tensors}
        self.arch = str(self.field("general.architecture"))

    def field(self, key: str) -> Any:
        found = self.reader.fields.get(key)
        return None if found is None else found.contents()

    def key(self, name: str) -> Any:
        return self.field(f"{self.arch}.{name}")

    def kind(self, name: str) -> str:
        return str(self.tensors[name].tensor_type.name)

    def rows(self, name: str, first: int = 0, end: int | None = None) -> Array:
        """Returns dequantised rows, in the order of the checkpoint's dimensions."""
        tensor = self.tensors[name]
        data = tensor.data[first:end]
        return cast(Array, self._quants.dequantize(data, tensor.tensor_type).astype(np.float32, copy=False))

    def names(self, checkpoint: list[str], text: dict[str, Any]) -> dict[str, tuple[str, str]]:
        """Returns GGUF name -> (checkpoint name, neutral name) for what the checkpoint holds."""
        arch = {v: k for k, v in self._gguf.MODEL_ARCH_NAMES.items()}[self.arch]
        table = self._gguf.get_tensor_name_map(arch, int(self.key("block_count")))
        found: dict[str, tuple[str, str]] = {}
        for name in checkpoint:
            neutral = neutral_name(name, text)
            mapped = None if neutral is None else table.get_name(neutral, try_suffixes=(".weight", ".bias"))
            if mapped is not None and neutral is not None:
                found[str(mapped)] = (name, neutral)
        return found


class _Checkpoint:
    """A checkpoint's tensors as float32 rows."""

    def __init__(self, folder: Path) -> None:
        self.index = safetensors_index(folder)
        self.headers = {file: safetensors_header(file) for file in set(self.index.values())}
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        nested = config.get("text_config")
        self.text: dict[str, Any] = nested if isinstance(nested, dict) else config

    def shape(self, name: str) -> tuple[int, ...]:
        return self.headers[self.index[name]][name].shape

    def rows(self, name: str, first: int = 0, end: int | None = None) -> Array:
        file = self.index[name]
        entry = self.headers[file][name]
        n_rows = entry.shape[0] if entry.shape else 1
        end = n_rows if end is None else min(end, n_rows)
        row_bytes = (entry.end - entry.begin) // max(n_rows, 1)
        assert row_bytes * n_rows == entry.end - entry.begin
        if entry.dtype not in FLOAT_BYTES:
            raise SystemExit(f"{name} is stored as {entry.dtype}; only bf16, fp16 and fp32 checkpoints are compared.")
        with file.open("rb") as stream:
            stream.seek(entry.begin + first * row_bytes)
            raw = stream.read((end - first) * row_bytes)
        return to_float32(raw, entry.dtype).reshape(end - first, *entry.shape[1:])


def _pieces(
    file: _Gguf, checkpoint: _Checkpoint, name: str, source: str, neutral: str
) -> Iterator[tuple[Array, Array]]:
    """Yields (wanted, seen) values of one tensor, in pieces where its rows are independent."""
    shape = checkpoint.shape(source)
    if not is_identity(neutral, file.arch) or len(shape) < 2:
        yield to_gguf(checkpoint.rows(source), neutral, file.arch, checkpoint.text), file.rows(name)
        return
    step = max(1, _CHUNK // int(np.prod(shape[1:])))
    for first in range(0, shape[0], step):
        yield checkpoint.rows(source, first, first + step), file.rows(name, first, first + step)


def relative_rms(pieces: Iterator[tuple[Array, Array]]) -> float:
    """Returns the RMS of the error over the RMS of the wanted values; infinite where shapes differ."""
    error, power = 0.0, 0.0
    for want, seen in pieces:
        if want.shape != seen.shape:
            return float("inf")
        error += float(np.square(seen - want, dtype=np.float64).sum())
        power += float(np.square(want, dtype=np.float64).sum())
    return float(np.sqrt(error / power)) if power else float(np.sqrt(error))


def _compare(
    file: _Gguf, checkpoint: _Checkpoint, name: str, source: str, neutral: str, worst: dict[str, float]
) -> str:
    """Returns what is wrong with one tensor's values; empty when each is within its type's error.

    Types with a few bits are judged by the tensor's RMS error, which `worst` collects by type.
    """
    kind = file.kind(name)
    if kind not in ("F32", "F16", "BF16", "Q8_0"):
        rms = relative_rms(_pieces(file, checkpoint, name, source, neutral))
        # TQ1_0 and TQ2_0 are two ways of packing three values: normal weights lie 0.81 of their RMS from the nearest
        limit = _RMS_LIMIT["1" if kind.startswith("TQ") else next(c for c in kind if c.isdigit())]
        worst[kind] = max(worst.get(kind, 0.0), rms)
        return "" if rms <= limit else f"{name} is off {source} by {rms:.3f} of its RMS, {kind} allows {limit}"
    for want, seen in _pieces(file, checkpoint, name, source, neutral):
        if want.shape != seen.shape:
            return f"{name} has the shape {list(seen.shape)}, {source} gives {list(want.shape)}"
        flat = want.reshape(-1, want.shape[-1])
        bound: Array = error_bound(flat, kind).reshape(want.shape)
        if neutral.endswith(".A_log"):
            # exp of two libraries may differ in the last place
            bound += np.abs(want) * np.float32(2.0**-22)
        if kind == "BF16" and np.array_equal(_bf16_exact(want), want):
            bound = np.zeros_like(want)
        error = np.abs(seen - want)
        if not (error <= bound).all():
            return f"{name} differs from {source} by up to {error.max():.3g}, {kind} allows {bound.max():.3g}"
    return ""


def _bf16_exact(x: Array) -> Array:
    """Returns x with the bits cut that bf16 does not have: equal to x where x is a bf16 value."""
    return cast(npt.NDArray[np.uint32], x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def check(request: dict[str, Any]) -> dict[str, Any]:
    """Returns a file's facts, and what is wrong with its names and values."""
    file = _Gguf(Path(request["file"]))
    facts: dict[str, Any] = {
        "arch": file.arch, "pre": file.field("tokenizer.ggml.pre"), "block_count": file.key("block_count"),
        "nextn_predict_layers": file.key("nextn_predict_layers") or 0, "context_length": file.key("context_length"),
        "vocabulary": len(file.field("tokenizer.ggml.tokens") or []), "tensors": len(file.tensors),
        "has_chat_template": file.field("tokenizer.chat_template") is not None,
        "types": {name: file.kind(name) for name in file.tensors},
        "shapes": {name: [int(n) for n in reversed(t.shape)] for name, t in file.tensors.items()},
        "wrong": [], "compared": 0, "worst_rms": {},
    }
    if file.arch not in KNOWN_ARCHS:
        return facts
    checkpoint = _Checkpoint(Path(request["model"]))
    wanted = [n for n in checkpoint.index if request["with_mtp"] or not n.startswith("mtp.")]
    names = file.names(wanted, checkpoint.text)
    missing = sorted(names.keys() - file.tensors.keys())
    extra = sorted(file.tensors.keys() - names.keys() - _GENERATED)
    facts["wrong"] += [f"{n} is missing" for n in missing] + [f"{n} comes from nowhere" for n in extra]
    unplaced = {n for n in wanted if neutral_name(n, checkpoint.text)} - {source for source, _ in names.values()}
    facts["wrong"] += [f"{n} has no place in the file" for n in sorted(unplaced)]
    for name, (source, neutral) in names.items():
        if name in file.tensors:
            facts["compared"] += 1
            problem = _compare(file, checkpoint, name, source, neutral, facts["worst_rms"])
            facts["wrong"] += [problem] if problem else []
    return facts


def load_into(model: Any, file: _Gguf, checkpoint: _Checkpoint) -> None:
    """Overwrites every parameter of a transformers model (vision towers aside) with the file's weights."""
    torch = importlib.import_module("torch")
    places = file.names(list(checkpoint.index), checkpoint.text)
    by_neutral = {neutral: name for name, (_, neutral) in places.items()}
    left = []
    for key, parameter in model.named_parameters():
        neutral = neutral_name(key, checkpoint.text)
        if neutral is None:
            continue
        name = by_neutral.get(neutral)
        if name is None or name not in file.tensors:
            left.append(key)
            continue
        values = from_gguf(file.rows(name), neutral, file.arch, checkpoint.text)
        parameter.data.copy_(torch.from_numpy(np.array(values, order="C")).reshape(parameter.shape))
    if left:
        raise SystemExit(f"The GGUF holds no tensor for {', '.join(left[:5])}; the file does not fit this model.")


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Returns the greedy answers of the file's weights to the requested prompts."""
    generation = importlib.import_module("sparktune.setup.export.generate")
    file, checkpoint = _Gguf(Path(request["file"])), _Checkpoint(Path(request["model"]))
    if file.arch not in KNOWN_ARCHS:
        raise SystemExit(f"Weights of the architecture {file.arch} cannot be read back (known: {KNOWN_ARCHS}).")
    model, tokenizer = generation.load(Path(request["model"]), request["device"])
    load_into(model, file, checkpoint)
    return {"answers": generation.answer_all(model, tokenizer, request["prompt_ids"], request["max_new_tokens"]),
            "losses": generation.mean_losses(model, request["examples"])}


def main(argv: list[str]) -> int:
    """Runs one job described by a JSON file and writes the JSON answer. Returns the exit code."""
    job, request, out = argv
    work = {"check": check, "answer": answer}[job]
    try:
        result = work(json.loads(Path(request).read_text(encoding="utf-8")))
    except SparktuneError as error:
        print(error)
        return int(error.exit_code)
    Path(out).write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
