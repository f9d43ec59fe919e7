"""llama.cpp's quantiser: the size is predicted first, the file is compared with it, every fallback is named."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparktune.setup.export.llama_build import Tools
from sparktune.setup.export.llama_cpp import ChildResult, child_environment, run_child
from sparktune.setup.export.llama_server import llama_threads
from sparktune.setup.plan.errors import SparktuneError
from sparktune.setup.plan.events import EventWriter

__all__ = ["Prediction", "importance_matrix", "predict", "quantise"]

_MIB = 2**20
# llama-quantize prints sizes to a hundredth of a MiB; alignment adds up to 32 bytes a tensor.
_SIZE_SLACK = _MIB
_SIZE = re.compile(r"(model|quant) size\s*=\s*([0-9.]+) MiB")
_FALLBACK = re.compile(r"warning: (\S+)\s+- ncols.*?-> falling back to\s+(\S+)", re.DOTALL)
_CALIBRATION_CHUNKS = 64
_CALIBRATION_CONTEXT = 128


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a dry run of llama-quantize says."""

    bytes: int
    """Size of the file."""
    fallbacks: dict[str, str]
    """Tensor -> the type it gets because its width does not divide into the blocks of the type meant for it."""
    wants_matrix: bool
    """The type cannot be made without an importance matrix."""


def _run(
    tools: Tools, arguments: Sequence[str], scratch: Path, on_poll: Callable[[], None], program: str = "llama-quantize"
) -> ChildResult:
    done = run_child([tools.program(program), *arguments], child_environment(scratch, scratch), scratch, on_poll)
    print(done.output, flush=True)
    return done


def _refused(done: ChildResult, kind: str) -> SparktuneError:
    if "No space left" in done.output or "write error" in done.output:
        return SparktuneError(f"The disk filled up while {kind} was written. Free some space and start again.")
    if "importance matrix" in done.output:
        return SparktuneError(
            f"llama.cpp makes {kind} only with an importance matrix, and there is no text to make one from here. "
            "Export from a run (its data is used), or choose a type of three bits or more."
        )
    lines = [line.strip() for line in done.output.splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if "failed" in line or "error" in line.lower()), (lines or ["?"])[-1])
    return SparktuneError(f"llama.cpp's quantiser could not make {kind}: {said}. Its whole output is in the log.")


def _arguments(head_block: int | None, matrix: Path | None) -> list[str]:
    # a draft head is read at every step and small: it keeps its bits, so that it goes on guessing what it guessed
    head = [] if head_block is None else ["--tensor-type", rf"blk\.{head_block}\.=bf16"]
    return head + ([] if matrix is None else ["--imatrix", str(matrix)])


def predict(tools: Tools, source: Path, kind: str, scratch: Path, *, head_block: int | None = None) -> Prediction:
    """Returns what quantising `source` will give, without writing anything.

    Args:
        tools: the compiled programs.
        source: a BF16 or F32 GGUF file.
        kind: the type.
        scratch: a private folder.
        head_block: number of the MTP head's block, which keeps bf16; None where there is none.

    Raises:
        SparktuneError: the quantiser refused.
    """
    done = _run(tools, ["--dry-run", *_arguments(head_block, None), str(source), kind.upper()], scratch, lambda: None)
    sizes = {what: float(mib) for what, mib in _SIZE.findall(done.output)}
    if done.code or {"model", "quant"} - sizes.keys():
        raise _refused(done, kind)
    metadata = source.stat().st_size - int(sizes["model"] * _MIB)
    return Prediction(bytes=metadata + int(sizes["quant"] * _MIB), fallbacks=dict(_FALLBACK.findall(done.output)),
                      wants_matrix="will require an imatrix" in done.output)


def importance_matrix(tools: Tools, source: Path, text: str, scratch: Path, events: EventWriter) -> Path:
    """Returns a file that says how much each column of each matrix matters on `text`.

    Args:
        tools: the compiled programs.
        source: a BF16 or F32 GGUF file.
        text: rendered examples, special tokens written out.
        scratch: a private folder; the file lies there.
        events: progress.

    Raises:
        SparktuneError: llama.cpp could not compute it, for instance because the text is too short.
    """
    words, matrix = scratch / "calibration.txt", scratch / "imatrix.gguf"
    words.write_text(text, encoding="utf-8")
    done = _run(tools, [
        "-m", str(source), "-f", str(words), "-o", str(matrix), "--parse-special", "--no-ppl", "-c",
        str(_CALIBRATION_CONTEXT), "--chunks", str(_CALIBRATION_CHUNKS), "-t", str(llama_threads()),
    ], scratch, lambda: events.progress("importance matrix", 0, None, "chunks"), "llama-imatrix")
    if done.code or not matrix.is_file():
        raise SparktuneError(
            "llama.cpp could not compute an importance matrix from the run's data (it wants at least "
            f"{2 * _CALIBRATION_CONTEXT} tokens): {done.output.strip().splitlines()[-1:] or 'it said nothing'}."
        )
    return matrix


def quantise(
    tools: Tools, source: Path, target: Path, kind: str, scratch: Path, events: EventWriter, *, predicted: Prediction,
    head_block: int | None = None, matrix: Path | None = None,
) -> None:
    """Writes `target`; what the quantiser leaves after a failure is removed.

    Args:
        tools: the compiled programs.
        source: a BF16 or F32 GGUF file; never a quantised one, of which llama-quantize makes a stub.
        target: a partial name; the caller renames it when the file passed its checks.
        kind: the type.
        scratch: a private folder.
        events: progress.
        predicted: from `predict`; a file of another size is wrong.
        head_block: see `predict`.
        matrix: from `importance_matrix`.

    Raises:
        SparktuneError: the quantiser failed, or the file has not the predicted size.
    """
    def report() -> None:
        seen = target.stat().st_size if target.is_file() else 0
        events.progress(f"gguf {kind}", min(seen, predicted.bytes), predicted.bytes, "bytes")

    arguments = [*_arguments(head_block, matrix), str(source), str(target), kind.upper(), str(llama_threads())]
    done = _run(tools, arguments, scratch, report)
    if done.code or not target.is_file():
        target.unlink(missing_ok=True)
        raise _refused(done, kind)
    seen = target.stat().st_size
    if abs(seen - predicted.bytes) > _SIZE_SLACK:
        target.unlink()
        raise SparktuneError(f"The {kind} file should take {predicted.bytes:,} bytes by llama.cpp's own dry run, it "
                             f"took {seen:,}, and is not kept.")
