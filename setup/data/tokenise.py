"""Rows to tokens, once: read, render, mask, tokenise, split, and keep the result in a cache that later runs reuse.

As a stage: `python -m sparktune.setup.data.tokenise --run results/RUN` writes `data/report.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from sparktune.setup.data.analyze import dataset_report
from sparktune.setup.data.cache import CacheWriter, TokenDataset, open_cache, remove_leftovers
from sparktune.setup.data.checks import RowTally, facts_of
from sparktune.setup.data.formats import RowRefused
from sparktune.setup.data.problems import FileTally, judge
from sparktune.setup.data.read import FileFacts, Row, file_facts, read_rows
from sparktune.setup.data.render import MASK_RULE, ChatRenderer, supervised_mask
from sparktune.setup.data.tokenizer import ChatTokenizer, load_tokenizer
from sparktune.setup.plan.config import load_plan
from sparktune.setup.plan.errors import DataError, ExitCode, PreflightError, SparktuneError, UsageError
from sparktune.setup.plan.events import EventWriter
from sparktune.setup.plan.models import probe
from sparktune.setup.plan.rundir import RunDir, cache_dir
from sparktune.setup.plan.schema import DatasetReport, ModelSpec, Plan, RowProblem

__all__ = ["PreparedData", "TokenDataset", "prepare"]

# A row is held out when the first 8 bytes of its digest, as a share of their range, are below eval_split.
_SPLIT_RULE = 1
# Rows tokenised together: enough for the tokenizer's threads, little memory.
_BATCH_ROWS = 256
_BATCH_CHARACTERS = 4_000_000


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """What a run trains on."""

    train: TokenDataset
    evaluation: TokenDataset | None
    """None where nothing is held out."""
    report: DatasetReport


@dataclass(frozen=True, kw_only=True)
class _Example:
    row: Row
    digest: bytes
    ids: npt.NDArray[np.uint32]
    supervised: npt.NDArray[np.uint8]
    open_turns: int


def prepare(
    plan: Plan, spec: ModelSpec, tokenizer_source: str, events: EventWriter, tokenizer: ChatTokenizer | None = None
) -> PreparedData:
    """Returns the run's tokenised data: from the cache, or read, rendered, masked and cached now.

    Args:
        plan: fields of the data section, `data`, and `pack_length` (a candidate of the report).
        spec: the model; its vocab_size bounds the token ids.
        tokenizer_source: folder or hub id of tokenizer and chat template.
        events: gets progress, warnings and the choice between cache and work.
        tokenizer: the loaded tokenizer of `tokenizer_source`, where the caller has it already.

    Raises:
        DataError: file, tokenizer or rows cannot be used (exit 4); names file and lines.
        PreflightError: the cache folder cannot be written, or the disk is full.
    """
    if plan.data is None:
        raise UsageError("Training needs data: give a JSONL file with --data.")
    files = [plan.data, *([plan.eval_data] if plan.eval_data is not None else [])]
    facts = [file_facts(path) for path in files]
    tokenizer = tokenizer or load_tokenizer(tokenizer_source)
    key = _cache_key(plan, spec, tokenizer, facts)
    folder = cache_dir("tokens") / key
    cached = open_cache(folder, key)
    if cached is not None:
        events.choice("token cache", "reused", f"{folder} matches data, tokenizer, template and settings.")
    else:
        reason = "the one there is damaged" if folder.exists() else "there is none for this data and these settings"
        events.choice("token cache", "made", f"{reason}; {folder}")
        remove_leftovers(folder.parent)
        with CacheWriter(folder) as writer:
            _fill(writer, plan, spec, tokenizer, facts, key, events)
        cached = open_cache(folder, key)
        if cached is None:
            raise PreflightError(f"The token cache {folder} did not survive being written. Check the disk.")
    train, evaluation, stored = cached
    tallies = [FileTally.from_json(values) for values in stored["files"]]
    _judge(plan, files, tallies)
    report = dataset_report(plan, facts[0], train, evaluation, stored["rows"], tallies)
    for warning in report.warnings:
        events.message(warning, "warning")
    return PreparedData(train=train, evaluation=evaluation if len(evaluation) else None, report=report)


def _cache_key(plan: Plan, spec: ModelSpec, tokenizer: ChatTokenizer, facts: list[FileFacts]) -> str:
    """Returns the hash over everything that decides the cached tokens."""
    identity = {
        "data": facts[0].sha256,
        "eval": facts[1].sha256 if len(facts) > 1 else {"rule": _SPLIT_RULE, "eval_split": plan.eval_split},
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": spec.vocab_size,
        "mask_rule": MASK_RULE,
        "over_length": plan.over_length,
        "max_seq_length": plan.max_seq_length,
        "text_field": plan.text_field,
        "thinking": plan.thinking,
        "versions": {name: importlib.metadata.version(name) for name in ("tokenizers", "transformers", "jinja2")},
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


# -- from file to cache


def _fill(
    writer: CacheWriter, plan: Plan, spec: ModelSpec, tokenizer: ChatTokenizer, facts: list[FileFacts], key: str,
    events: EventWriter,
) -> None:
    """Tokenises the files into `writer` and commits it, unless the rows are refused as a whole."""
    assert plan.data is not None
    rows = RowTally()
    held_out: list[bytes] = []
    files = [plan.data]
    tallies = [FileTally()]
    split = plan.eval_split if plan.eval_data is None else 0.0
    for example in _examples(plan.data, plan, spec, tokenizer, tallies[0], facts[0], events):
        out = int.from_bytes(example.digest[:8], "big") < split * 2**64
        if out:
            held_out.append(example.digest)
        writer.add("eval" if out else "train", example.ids, example.supervised, example.row.line)
        rows.add(example.row, facts_of(example.row), example.digest, out)
    if plan.eval_data is not None:
        files.append(plan.eval_data)
        tallies.append(FileTally())
        for example in _examples(plan.eval_data, plan, spec, tokenizer, tallies[1], facts[1], events):
            writer.add("eval", example.ids, example.supervised, example.row.line)
            rows.add(example.row, facts_of(example.row), example.digest, True)
    _judge(plan, files, tallies)
    writer.finish()
    stored: dict[str, Any] = {"files": [tally.to_json() for tally in tallies]}
    if held_out and len(held_out) == tallies[0].kept:
        # Something must train: the row that the split rule would let go first at a lower share.
        back = max(held_out)
        rows.move_to_train(back)
        _commit_moved(writer, [digest == back for digest in held_out], key, {**stored, "rows": _row_facts(rows)})
        return
    writer.commit({**stored, "rows": _row_facts(rows)})


def _commit_moved(writer: CacheWriter, to_train: list[bool], key: str, facts: dict[str, Any]) -> None:
    """Commits a copy of the finished cache in which some held-out examples train."""
    _, held_out = writer.datasets(key)
    with CacheWriter(writer.final) as moved:
        for index, trains in enumerate(to_train):
            ids, supervised = held_out[index]
            moved.add("train" if trains else "eval", ids, supervised, int(held_out.lines[index]))
        moved.finish()
        moved.commit(facts)


def _row_facts(rows: RowTally) -> dict[str, Any]:
    return {
        "formats": dict(rows.formats), "multi_turn": rows.multi_turn, "with_system": rows.with_system,
        "with_thinking": rows.with_thinking, "duplicates": rows.duplicates, "eval_leaks": rows.eval_leaks,
    }


def _examples(
    path: Path, plan: Plan, spec: ModelSpec, tokenizer: ChatTokenizer, tally: FileTally, facts: FileFacts,
    events: EventWriter,
) -> Iterator[_Example]:
    """Yields the usable examples of one file in its order; everything else goes into `tally`.

    Raises:
        DataError: the file cannot be read, or changed since it was hashed.
    """
    renderer: ChatRenderer | None = None
    batch: list[tuple[Row, str, list[tuple[int, int]], int]] = []
    characters = 0
    last_event_s = 0.0
    before = path.stat()
    for row in read_rows(path, plan.text_field):
        tally.rows += 1
        if time.monotonic() - last_event_s > 0.2:
            last_event_s = time.monotonic()
            events.progress(f"tokenise {path.name}", row.line, max(facts.lines, row.line), "lines")
        if isinstance(row, RowProblem):
            tally.drop(row)
            continue
        if row.messages is None:
            assert row.text is not None
            batch.append((row, row.text, [], 0))
        else:
            renderer = renderer or ChatRenderer(tokenizer, plan.thinking)
            try:
                rendered = renderer.render(row.messages, row.tools)
            except RowRefused as refusal:
                tally.drop(RowProblem(line=row.line, code=refusal.code, text=refusal.text))
                continue
            batch.append((row, rendered.text, rendered.spans, rendered.open_turns))
        characters += len(batch[-1][1])
        if len(batch) == _BATCH_ROWS or characters > _BATCH_CHARACTERS:
            yield from _encoded(batch, plan, spec, tokenizer, tally)
            batch, characters = [], 0
    yield from _encoded(batch, plan, spec, tokenizer, tally)
    after = path.stat()
    if (before.st_size, before.st_mtime_ns, facts.bytes) != (after.st_size, after.st_mtime_ns, after.st_size):
        raise DataError(f"{path} changed while it was being read. Start again when nothing writes to it any more.")
    events.progress(f"tokenise {path.name}", max(facts.lines, 1), max(facts.lines, 1), "lines")


def _encoded(
    batch: list[tuple[Row, str, list[tuple[int, int]], int]], plan: Plan, spec: ModelSpec, tokenizer: ChatTokenizer,
    tally: FileTally,
) -> Iterator[_Example]:
    """Tokenises a batch and applies the rules about ids, length and labels."""
    for (row, _, spans, open_turns), tokens in zip(
        batch, tokenizer.encode_batch([text for _, text, _, _ in batch]), strict=True
    ):
        ids, supervised = tokens.ids, supervised_mask(tokens.starts, spans)
        if row.messages is None:
            ids, supervised = _closed(ids, tokenizer)
        truncated = len(ids) > plan.max_seq_length and plan.over_length == "truncate"
        problem = _objection(row.line, ids, plan, spec)
        if truncated:
            ids, supervised = ids[: plan.max_seq_length], supervised[: plan.max_seq_length]
        if problem is None and not supervised[1:].any():
            why = f"they all lie past max_seq_length ({plan.max_seq_length:,} tokens)" if truncated else "it has none"
            problem = RowProblem(
                line=row.line, code="all_masked", text=f"the row should have tokens to learn from; {why}."
            )
        if problem is not None:
            tally.drop(problem)
            continue
        tally.kept += 1
        tally.truncated += truncated
        tally.open_turns += open_turns
        yield _Example(row=row, digest=row.digest, ids=ids, supervised=supervised, open_turns=open_turns)


def _closed(
    ids: npt.NDArray[np.uint32], tokenizer: ChatTokenizer
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8]]:
    """Returns plain text as it is trained: after the tokenizer's own opening, before its end-of-text token."""
    eos = tokenizer.tokenizer.eos_token_id
    if eos is None:
        raise DataError(
            f"Rows of plain text end with the tokenizer's eos_token, but the tokenizer of {tokenizer.source} has none. "
            "Name one in tokenizer_config.json."
        )
    closing = [] if len(ids) and ids[-1] == eos else [eos]
    ids = np.concatenate([tokenizer.opening_ids, ids, closing]).astype(np.uint32)
    return ids, np.ones(len(ids), dtype=np.uint8)


def _objection(line: int, ids: npt.NDArray[np.uint32], plan: Plan, spec: ModelSpec) -> RowProblem | None:
    """Returns what stands against using these ids, if anything."""
    if not len(ids):
        return RowProblem(line=line, code="empty_row", text="the tokenizer makes no token of the row's text.")
    highest = int(ids.max())
    if highest >= spec.vocab_size:
        return RowProblem(
            line=line, code="token_range",
            text=f"the tokenizer gives id {highest:,}, but the model's vocabulary ends at {spec.vocab_size - 1:,}; "
            "tokenizer and model do not belong together.",
        )
    if len(ids) > plan.max_seq_length and plan.over_length != "truncate":
        return RowProblem(
            line=line, code="over_length",
            text=f"the example has {len(ids):,} tokens; --max-seq-length allows {plan.max_seq_length:,}.",
        )
    return None


def _judge(plan: Plan, files: list[Path], tallies: list[FileTally]) -> None:
    for path, tally in zip(files, tallies, strict=True):
        judge(path, tally, plan.bad_row_limit, plan.over_length, plan.max_seq_length)


# -- the stage


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _run_stage(root: Path) -> None:
    """Prepares the data of the run whose record folder is `root`."""
    plan = load_plan(root / "plan.yaml")
    run = RunDir.from_root(root, plan.output)
    events = EventWriter(run.stage_events("prepare"), "prepare")
    started = time.monotonic()
    done = False
    try:
        events.emit("start")
        spec = probe(plan.model)
        data = prepare(plan, spec, spec.source, events)
        _write(run.data_report, data.report.model_dump_json(indent=1) + "\n")
        events.emit("artifact", path=str(run.data_report), bytes=run.data_report.stat().st_size)
        done = True
    except SparktuneError as error:
        events.message(str(error), "error")
        raise
    finally:
        events.emit("end", ok=done, seconds=round(time.monotonic() - started, 3))
        events.close()


def _write(path: Path, text: str) -> None:
    """Writes a small file by rename."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise PreflightError(
            f"{path} should be writable, but: {error.strerror or error}. Free space or change --results."
        ) from error


def main(argv: list[str] | None = None) -> int:
    """Runs the stage. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sparktune.setup.data.tokenise", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder, results/RUN")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        _run_stage(args.run)
        return ExitCode.OK
    except SparktuneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("Interrupted; nothing half-written was left.", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except Exception as error:
        traceback.print_exc()
        print(f"Unexpected failure ({type(error).__name__}: {error}).", file=sys.stderr)
        return ExitCode.FAILURE


if __name__ == "__main__":
    sys.exit(main())
