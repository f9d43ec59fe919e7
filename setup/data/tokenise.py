"""Rows to tokens, once: read, render, mask, tokenise, split, and keep the result in a cache that later runs reuse.

As a stage: `python -m sparktune.setup.data.tokenise --run results/RUN` writes `data/report.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from sparktune.setup.data.analyze import dataset_report
from sparktune.setup.data.cache import CacheWriter, TokenDataset, cache_file_error, open_cache, remove_leftovers
from sparktune.setup.data.checks import RowTally
from sparktune.setup.data.clean import clean_file
from sparktune.setup.data.duplicates import NEAR_RULE, SignatureFile
from sparktune.setup.data.examine import Examined, RowRules
from sparktune.setup.data.pii import PII_RULE
from sparktune.setup.data.problems import FileTally, judge
from sparktune.setup.data.read import FileFacts, file_facts
from sparktune.setup.data.render import MASK_RULE
from sparktune.setup.data.split import SPLIT_RULE, is_held_out
from sparktune.setup.data.tokenizer import ChatTokenizer, load_tokenizer
from sparktune.setup.data.workers import examine_file
from sparktune.setup.plan.config import load_plan
from sparktune.setup.plan.errors import DataError, ExitCode, PreflightError, SparktuneError, UsageError
from sparktune.setup.plan.events import EventWriter
from sparktune.setup.plan.models import probe
from sparktune.setup.plan.outfolder import gib, write_durably
from sparktune.setup.plan.rundir import RunDir, cache_dir
from sparktune.setup.plan.schema import Cleaned, DatasetReport, ModelSpec, Plan
from sparktune.setup.plan.untrusted import printable

__all__ = ["PreparedData", "TokenDataset", "prepare"]

# Version of what is looked for in rows beside their tokens; a change makes every token cache anew.
_FINDINGS_RULE = 1
_WORTH_SAYING_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """What a run trains on."""

    train: TokenDataset
    evaluation: TokenDataset | None
    """None where nothing is held out."""
    report: DatasetReport


@dataclass(frozen=True, kw_only=True)
class _Source:
    """One file that is read."""

    path: Path
    facts: FileFacts
    cleaned: Cleaned | None


def prepare(
    plan: Plan, spec: ModelSpec, tokenizer_source: str, events: EventWriter, tokenizer: ChatTokenizer | None = None,
    workers: int | None = None,
) -> PreparedData:
    """Returns the run's tokenised data: from the cache, or read, rendered, masked and cached now.

    Args:
        plan: fields of the data section, `data`, and `pack_length` (a candidate of the report).
        spec: the model; its vocab_size bounds the token ids.
        tokenizer_source: folder or hub id of tokenizer and chat template.
        events: gets progress, warnings and the choice between cache and work.
        tokenizer: the loaded tokenizer of `tokenizer_source`, where the caller has it already.
        workers: processes that read and tokenise; see `examine_file`.

    Raises:
        DataError: file, tokenizer or rows cannot be used (exit 4); names file and lines.
        PreflightError: the cache folder cannot be written, or the disk is full.
    """
    if plan.data is None:
        raise UsageError("Training needs data: give a JSONL file with --data.")
    sources = [_source(path, plan, events, workers) for path in (plan.data, plan.eval_data) if path is not None]
    tokenizer = tokenizer or load_tokenizer(tokenizer_source)
    key = _cache_key(plan, spec, tokenizer, [source.facts for source in sources])
    folder = cache_dir("tokens") / key
    cached = open_cache(folder, key)
    if cached is not None:
        events.choice("token cache", "reused", f"{folder} matches data, tokenizer, template and settings.")
    else:
        reason = "the one there is damaged" if folder.exists() else "there is none for this data and these settings"
        events.choice("token cache", "made", f"{reason}; {folder}")
        remove_leftovers(folder.parent)
        with CacheWriter(folder) as writer:
            _fill(writer, plan, spec, tokenizer, sources, key, events, workers)
        cached = open_cache(folder, key)
        if cached is None:
            raise PreflightError(f"The token cache {folder} did not survive being written. Check the disk.")
    train, evaluation, stored = cached
    tallies = [FileTally.from_json(values) for values in stored["files"]]
    paths = [source.path for source in sources]
    _judge(plan, paths, tallies)
    report = dataset_report(plan, paths, sources[0].facts, train, evaluation, stored["rows"], tallies)
    report = report.model_copy(update={
        "cleaned": sources[0].cleaned, "eval_cleaned": sources[1].cleaned if len(sources) > 1 else None,
    })
    train.file, evaluation.file = paths[0], paths[-1]
    for warning in report.warnings:
        events.message(warning, "warning")
    return PreparedData(train=train, evaluation=evaluation if len(evaluation) else None, report=report)


def _source(path: Path, plan: Plan, events: EventWriter, workers: int | None) -> _Source:
    """Returns the file to read in place of `path`: itself, or its cleaned copy."""
    facts = file_facts(path)
    # repeated evaluation rows are the user's own choice; what is redacted must not come back through samples
    dedupe = plan.dedupe if path == plan.data else "off"
    if dedupe == "off" and not plan.redact_pii:
        return _Source(path=path, facts=facts, cleaned=None)
    cleaned = clean_file(path, facts, dedupe, plan.redact_pii, plan.text_field, events, workers)
    copy = Path(cleaned.path)
    return _Source(path=copy, facts=file_facts(copy), cleaned=cleaned)


def _cache_key(plan: Plan, spec: ModelSpec, tokenizer: ChatTokenizer, facts: list[FileFacts]) -> str:
    """Returns the hash over everything that decides the cached tokens."""
    identity = {
        "data": facts[0].sha256,
        "eval": facts[1].sha256 if len(facts) > 1 else {"rule": SPLIT_RULE, "eval_split": plan.eval_split},
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": spec.vocab_size,
        "mask_rule": MASK_RULE,
        "findings": [_FINDINGS_RULE, NEAR_RULE, PII_RULE],
        "over_length": plan.over_length,
        "max_seq_length": plan.max_seq_length,
        "text_field": plan.text_field,
        "thinking": plan.thinking,
        "versions": {name: importlib.metadata.version(name) for name in ("tokenizers", "transformers", "jinja2")},
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


# -- from file to cache


def _fill(
    writer: CacheWriter, plan: Plan, spec: ModelSpec, tokenizer: ChatTokenizer, sources: list[_Source], key: str,
    events: EventWriter, workers: int | None,
) -> None:
    """Tokenises the files into `writer` and commits it, unless the rows are refused as a whole."""
    started, peaks = time.monotonic(), [(1, 0)]
    rules = RowRules(
        text_field=plan.text_field, thinking=plan.thinking, max_seq_length=plan.max_seq_length,
        over_length=plan.over_length, vocab_size=spec.vocab_size,
    )
    tallies = [FileTally() for _ in sources]
    held_out: list[bytes] = []
    try:
        signatures = SignatureFile(writer.folder)
    except OSError as error:
        raise cache_file_error(error, writer.folder) from error
    rows = RowTally(signatures=signatures)
    try:
        for number, (source, tally) in enumerate(zip(sources, tallies, strict=True)):
            split = plan.eval_split if len(sources) == 1 else float(number)
            examined = examine_file(
                source.path, rules, tokenizer, workers, lambda count, peak: peaks.append((count, peak))
            )
            for row in _told(examined, source, tally, events):
                out = is_held_out(row.digest, split)
                if out and not number:
                    held_out.append(row.digest)
                writer.add("eval" if out else "train", row.ids, row.supervised, row.line)
                assert row.facts is not None
                assert row.signature is not None
                rows.add(row.facts, row.digest, row.signature, line=row.line, offset=row.offset, file=number,
                         held_out=out)
        paths = [source.path for source in sources]
        _judge(plan, paths, tallies)
        writer.finish()
        back = None
        if held_out and len(held_out) == tallies[0].kept:
            # Something must train: the row that the split rule would let go first at a lower share.
            back = max(held_out)
            rows.move_to_train(back)
        stored = {"files": [tally.to_json() for tally in tallies], "rows": rows.summary(paths, plan.text_field)}
    except OSError as error:
        raise cache_file_error(error, writer.folder) from error
    finally:
        signatures.close()
    if back is None:
        writer.commit(stored)
    else:
        _commit_moved(writer, [digest == back for digest in held_out], key, stored)
    _say_cost(events, sources, tallies, writer.tokens, time.monotonic() - started, max(peaks, key=lambda p: p[1]))


def _say_cost(
    events: EventWriter, sources: list[_Source], tallies: list[FileTally], tokens: int, seconds: float,
    peak: tuple[int, int],
) -> None:
    """Says what the analysis took; a file so small that nobody waits for it is not worth a line."""
    size = sum(source.facts.bytes for source in sources)
    if size < _WORTH_SAYING_BYTES:
        return
    processes, peak_bytes = peak
    events.message(
        f"Analysed {sum(tally.rows for tally in tallies):,} rows ({gib(size)}, {tokens:,} tokens) in {seconds:.1f} s "
        f"with {processes} process{'es' if processes > 1 else ''}; peak memory of all together {gib(peak_bytes)}."
    )


def _commit_moved(writer: CacheWriter, to_train: list[bool], key: str, facts: dict[str, Any]) -> None:
    """Commits a copy of the finished cache in which some held-out examples train."""
    _, held_out = writer.datasets(key)
    with CacheWriter(writer.final) as moved:
        for index, trains in enumerate(to_train):
            ids, supervised = held_out[index]
            moved.add("train" if trains else "eval", ids, supervised, int(held_out.lines[index]))
        moved.finish()
        moved.commit(facts)


def _told(
    examined: Iterator[Examined], source: _Source, tally: FileTally, events: EventWriter
) -> Iterator[Examined]:
    """Yields the usable rows of one file; everything else goes into `tally`, and progress to `events`.

    Raises:
        DataError: the file changed since it was hashed.
    """
    path, facts = source.path, source.facts
    last_event_s = 0.0
    before = path.stat()
    for row in examined:
        tally.rows += 1
        if time.monotonic() - last_event_s > 0.2:
            last_event_s = time.monotonic()
            events.progress(f"tokenise {path.name}", row.line, max(facts.lines, row.line), "lines")
        if row.problem is not None:
            tally.drop(row.problem)
            continue
        tally.kept += 1
        tally.truncated += row.truncated
        tally.open_turns += row.open_turns
        yield row
    after = path.stat()
    if (before.st_size, before.st_mtime_ns, facts.bytes) != (after.st_size, after.st_mtime_ns, after.st_size):
        raise DataError(f"{path} changed while it was being read. Start again when nothing writes to it any more.")
    events.progress(f"tokenise {path.name}", max(facts.lines, 1), max(facts.lines, 1), "lines")


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
        write_durably(
            run.data_report, data.report.model_dump_json(indent=1) + "\n",
            explain=lambda path, error: PreflightError(
                f"{path} should be writable, but: {error.strerror or error}. Free space or change --results."
            ),
        )
        events.emit("artifact", path=str(run.data_report), bytes=run.data_report.stat().st_size)
        done = True
    except SparktuneError as error:
        events.message(str(error), "error")
        raise
    finally:
        events.emit("end", ok=done, seconds=round(time.monotonic() - started, 3))
        events.close()


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
        print(printable(f"Unexpected failure ({type(error).__name__}: {error})."), file=sys.stderr)
        return ExitCode.FAILURE


if __name__ == "__main__":
    sys.exit(main())
