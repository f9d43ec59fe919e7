"""Processes that examine rows side by side, fed and read in the file's order with little in memory.

A worker is `python -m sparktune.setup.data.workers`: frames of JSON and raw arrays come on its standard input, frames
go out on its standard output. It ends when its input does, so it never outlives the process that started it. (A pool
of the standard library would start our caller's main module again, torch included, and its workers wait for ever when
their parent is killed.)
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import signal
import struct
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np

import sparktune
from sparktune.setup.data.checks import RowFacts
from sparktune.setup.data.duplicates import SIGNATURE_WIDTH
from sparktune.setup.data.examine import Examined, RowExaminer, RowRules
from sparktune.setup.data.read import RawLine, raw_lines
from sparktune.setup.data.tokenizer import ChatTokenizer, load_tokenizer
from sparktune.setup.plan.errors import DataError, SparktuneError
from sparktune.setup.plan.schema import RowProblem

__all__ = ["WorkerPool", "examine_file", "peak_bytes", "usable_cores"]

# A chunk is what one process works on at a time: enough to hide the hand-over, little memory.
_CHUNK_ROWS = 256
_CHUNK_BYTES = 2**20
# Below this size a second process would start up longer than it works.
_SMALL_FILE_BYTES = 16 * 2**20
_HEADER = struct.Struct("<QQ")

Frame = tuple[dict[str, Any], bytes]


def usable_cores() -> int:
    """Returns the cores this process may use, or RAYON_NUM_THREADS where that is set (the tokenizer's own limit)."""
    asked = os.environ.get("RAYON_NUM_THREADS", "")
    if asked.isdigit() and int(asked):
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_bytes() -> int:
    """Returns the most memory this process had in use so far, in bytes (resident, shared pages included)."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the parent's memory before this program began
        line = next((x for x in status.read_text(encoding="ascii").splitlines() if x.startswith("VmHWM:")), "")
        if line:
            return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def examine_file(
    path: Path, rules: RowRules, tokenizer: ChatTokenizer | None, workers: int | None = None,
    memory: Callable[[int, int], None] | None = None,
) -> Iterator[Examined]:
    """Yields every non-blank line of a file, examined, in the file's order.

    Args:
        path: the JSONL.
        rules: what decides a row's fate.
        tokenizer: the model's; workers load it again from its `source`.
        workers: processes; one for each core where the file is large when left out, and 1 is this process itself.
        memory: called at the end with (processes, peak bytes of all of them together).

    Raises:
        DataError: the file or the tokenizer cannot be used.
        SparktuneError: a worker died.
    """
    if workers is None:
        workers = usable_cores() if path.is_file() and path.stat().st_size > _SMALL_FILE_BYTES else 1
    if workers == 1:
        examiner = RowExaminer(rules, tokenizer)
        for chunk in _chunks(raw_lines(path)):
            yield from examiner.examine(chunk)
        if memory:
            memory(1, peak_bytes())
        return
    with WorkerPool(workers, rules, tokenizer.source if tokenizer and rules.tokenises else None) as pool:
        for examined in pool.examine(_chunks(raw_lines(path))):
            yield from examined
        if memory:
            memory(workers, peak_bytes() + pool.peak_bytes)


def _chunks(lines: Iterable[RawLine]) -> Iterator[list[RawLine]]:
    chunk: list[RawLine] = []
    size = 0
    for raw in lines:
        chunk.append(raw)
        size += len(raw.data)
        if len(chunk) == _CHUNK_ROWS or size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class WorkerPool:
    """Worker processes that live as long as the block.

    Args:
        count: processes.
        rules: what decides a row's fate.
        tokenizer_source: folder or hub id that each worker loads; None where nothing is tokenised.
    """

    def __init__(self, count: int, rules: RowRules, tokenizer_source: str | None) -> None:
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers = [_Worker(rules, tokenizer_source) for _ in range(count)]
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="data-worker")

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()
        self._threads.shutdown(cancel_futures=True)

    @property
    def peak_bytes(self) -> int:
        """Peaks of all workers so far, added up."""
        return sum(worker.peak_bytes for worker in self._workers)

    def examine(self, chunks: Iterable[list[RawLine]]) -> Iterator[list[Examined]]:
        """Yields the chunks' results in their order; two chunks a worker are under way at most."""
        under_way: deque[Future[list[Examined]]] = deque()
        for chunk in chunks:
            under_way.append(self._threads.submit(self._one, chunk))
            if len(under_way) >= 2 * len(self._workers):
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()

    def _one(self, chunk: list[RawLine]) -> list[Examined]:
        worker = self._idle.get()
        try:
            return worker.examine(chunk)
        finally:
            self._idle.put(worker)


class _Worker:
    """One worker process, seen from outside."""

    def __init__(self, rules: RowRules, tokenizer_source: str | None) -> None:
        # our own sources first, then whatever else this process was given
        source = str(Path(sparktune.__file__).resolve().parents[1])
        paths = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
        env = {
            **os.environ, "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
        }
        # -P: the working folder must not shadow packages
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "sparktune.setup.data.workers"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env=env,
        )
        self._begin: Frame | None = ({"rules": dataclasses.asdict(rules), "tokenizer": tokenizer_source}, b"")
        self.peak_bytes = 0

    def examine(self, chunk: list[RawLine]) -> list[Examined]:
        """Sends a chunk and returns its results.

        Raises:
            DataError: what the worker refused.
            SparktuneError: the worker died or failed.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            if self._begin is not None:
                _send(self._process.stdin, *self._begin)
                self._begin = None
            _send(self._process.stdin, {"lines": [(r.line, r.offset, len(r.data)) for r in chunk]},
                  b"".join(r.data for r in chunk))
            frame = _receive(self._process.stdout)
        except (BrokenPipeError, EOFError):
            frame = None
        if frame is None:
            code = self._process.wait()
            raise SparktuneError(
                f"A process that reads the data ended early, with {_ending(code)}, at lines {chunk[0].line} to "
                f"{chunk[-1].line}. If memory ran out, close other programs or set RAYON_NUM_THREADS=1; then start "
                "again."
            )
        head, arrays = frame
        if "error" in head:
            raise (DataError if head["refused"] else SparktuneError)(head["error"])
        self.peak_bytes = head["peak_bytes"]
        return _unpacked(head["rows"], arrays)

    def end(self) -> None:
        """Ends the process, at once."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:  # what was still to be sent has no reader
                    continue


def _ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


# -- frames


def _send(pipe: IO[bytes], head: dict[str, Any], arrays: bytes) -> None:
    text = json.dumps(head).encode()
    pipe.write(_HEADER.pack(len(text), len(arrays)))
    pipe.write(text)
    pipe.write(arrays)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> Frame | None:
    """Returns the next frame, None at the end of the input."""
    header = pipe.read(_HEADER.size)
    if not header:
        return None
    head_size, array_size = _HEADER.unpack(header)
    text, arrays = pipe.read(head_size), pipe.read(array_size)
    if len(text) != head_size or len(arrays) != array_size:
        raise EOFError("the frame is cut off")
    return json.loads(text), arrays


def _packed(rows: list[Examined]) -> tuple[list[dict[str, Any]], bytes]:
    heads, blobs = [], []
    for row in rows:
        heads.append({
            "line": row.line, "offset": row.offset, "problem": row.problem.model_dump() if row.problem else None,
            "digest": row.digest.hex(), "facts": dataclasses.asdict(row.facts) if row.facts else None,
            "truncated": row.truncated, "open_turns": row.open_turns, "tokens": len(row.ids),
        })
        blobs += [row.ids.astype("<u4").tobytes(), row.supervised.tobytes()]
        if row.signature is not None:
            blobs.append(row.signature.astype("<u4").tobytes())
    return heads, b"".join(blobs)


def _unpacked(heads: list[dict[str, Any]], arrays: bytes) -> list[Examined]:
    rows, place = [], 0

    def take(dtype: str, count: int) -> Any:
        nonlocal place
        array = np.frombuffer(arrays, dtype=dtype, count=count, offset=place)
        place += array.nbytes
        return array

    for head in heads:
        ids, supervised = take("<u4", head["tokens"]), take("u1", head["tokens"])
        problem = RowProblem(**head["problem"]) if head["problem"] else None
        rows.append(Examined(
            line=head["line"], offset=head["offset"], problem=problem, digest=bytes.fromhex(head["digest"]),
            facts=RowFacts(**head["facts"]) if head["facts"] else None, truncated=head["truncated"],
            open_turns=head["open_turns"], ids=ids, supervised=supervised,
            signature=take("<u4", SIGNATURE_WIDTH) if problem is None else None,
        ))
    return rows


# -- the worker's side


def _work(source: IO[bytes], sink: IO[bytes]) -> None:
    begin = _receive(source)
    if begin is None:
        return
    examiner: RowExaminer | None = None
    while (frame := _receive(source)) is not None:
        head, data = frame
        chunk, place = [], 0
        for line, offset, size in head["lines"]:
            chunk.append(RawLine(line=line, offset=offset, data=data[place : place + size]))
            place += size
        try:
            if examiner is None:
                name = begin[0]["tokenizer"]
                examiner = RowExaminer(RowRules(**begin[0]["rules"]), load_tokenizer(name) if name else None)
            rows, arrays = _packed(examiner.examine(chunk))
            _send(sink, {"rows": rows, "peak_bytes": peak_bytes()}, arrays)
        except SparktuneError as error:
            _send(sink, {"error": str(error), "refused": isinstance(error, DataError)}, b"")
        except Exception as error:
            traceback.print_exc()
            _send(sink, {"error": f"A process that reads the data failed ({type(error).__name__}: {error}).",
                         "refused": False}, b"")


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    sink = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints must not mix with frames
    try:
        _work(sys.stdin.buffer, sink)
    except (BrokenPipeError, EOFError):
        os._exit(1)  # the parent is gone; flushing what it no longer reads would fail again


if __name__ == "__main__":
    _main()
