"""A cleaned copy of a data file: repeated rows left out, personal data replaced. The original is never touched.

The copy's name ends in a hash of what made it (the original's bytes, the rules, what was asked for), so that equal
demands find the copy that is there, and different ones never meet:

    $XDG_CACHE_HOME/sparktune/cleaned/STEM.clean-HASH.jsonl       the copy
    $XDG_CACHE_HOME/sparktune/cleaned/STEM.clean-HASH.json        what was done (plan.schema.Cleaned), written last
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sparktune.setup.data.cache import cache_file_error
from sparktune.setup.data.checks import LINES_KEPT
from sparktune.setup.data.duplicates import NEAR_RULE, Parts, SignatureFile, row_parts
from sparktune.setup.data.examine import RowRules
from sparktune.setup.data.pii import PII_RULE, redact
from sparktune.setup.data.read import FileFacts, RawLine, file_facts, parse_row, raw_line_at, raw_lines
from sparktune.setup.data.workers import examine_file
from sparktune.setup.plan.events import EventWriter
from sparktune.setup.plan.outfolder import write_durably
from sparktune.setup.plan.rundir import cache_dir
from sparktune.setup.plan.schema import Cleaned, Finding, RowProblem

__all__ = ["clean_file"]

_RULE = 1
# Fields that say what a message is, not what it says; a number there is an identity, not a person's.
_NOT_TEXT = ("role", "from", "type", "id", "tool_call_id")

Dedupe = Literal["off", "exact", "near"]


def clean_file(
    path: Path, facts: FileFacts, dedupe: Dedupe, redact_pii: bool, text_field: str, events: EventWriter,
    workers: int | None = None,
) -> Cleaned:
    """Returns the cleaned copy of a file: the one that is there, or one made now.

    Rows that cannot be used stay as they are (redacted, where that is asked for): they are judged when the copy is
    read. Of rows that repeat each other the first in the file stays.

    Args:
        path: the JSONL.
        facts: of `path`.
        dedupe: rows to leave out: none, exact duplicates, or near ones too.
        redact_pii: replace what `pii.scan` finds, in every string but roles, types and ids.
        text_field: see `read_rows`.
        events: gets the choice between the copy that is there and a new one, and progress.
        workers: see `examine_file`.

    Raises:
        DataError: the file cannot be read.
        SparktuneError: the copy cannot be written.
    """
    asked = {
        "rule": _RULE, "file": facts.sha256, "dedupe": dedupe, "near": NEAR_RULE if dedupe == "near" else 0,
        "pii": PII_RULE if redact_pii else 0, "text_field": text_field,
    }
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
    copy = cache_dir("cleaned") / f"{path.stem}.clean-{key}.jsonl"
    record = copy.with_suffix(".json")
    there = _made_before(copy, record)
    if there is not None:
        events.choice("cleaned data", "reused", f"{copy} was made from the same bytes by the same rules.")
        return there.model_copy(update={"original": str(path)})
    events.choice("cleaned data", "made", f"{copy}; {path} stays as it is.")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
        repeats = _repeats(path, dedupe, text_field, workers, copy.parent) if dedupe != "off" else {}
        rows, removed, redacted = _write(path, copy, repeats, redact_pii, facts, events)
        made = Cleaned(
            original=str(path), original_sha256=facts.sha256, path=str(copy), sha256=file_facts(copy).sha256,
            rows=rows, removed=removed, redacted=redacted,
        )
        write_durably(record, made.model_dump_json(indent=1) + "\n")
    except OSError as error:
        raise cache_file_error(error, copy) from error
    return made


def _made_before(copy: Path, record: Path) -> Cleaned | None:
    """Returns what `record` says, if the copy is whole."""
    try:
        made = Cleaned.model_validate_json(record.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    except OSError as error:
        raise cache_file_error(error, record) from error
    return made if copy.is_file() and file_facts(copy).sha256 == made.sha256 else None


def _repeats(path: Path, dedupe: Dedupe, text_field: str, workers: int | None, folder: Path) -> dict[int, str]:
    """Returns line -> duplicate or near_duplicate, for every row to leave out."""
    rules = RowRules(text_field=text_field, tokenises=False)
    lines: list[int] = []
    offsets: list[int] = []
    repeated: list[bool] = []
    seen: set[bytes] = set()
    signatures = SignatureFile(folder)
    try:
        for row in examine_file(path, rules, None, workers):
            if row.problem is None and row.signature is not None:
                lines.append(row.line)
                offsets.append(row.offset)
                repeated.append(row.digest in seen)
                seen.add(row.digest)
                signatures.append(row.signature)

        def read(number: int) -> Parts:
            again = parse_row(lines[number], raw_line_at(path, offsets[number]), text_field)
            return ("", "", f"unreadable {number}") if isinstance(again, RowProblem) else row_parts(again)

        found = {lines[i]: "duplicate" for i, twice in enumerate(repeated) if twice}
        if dedupe == "near":
            near = signatures.near_pairs(read, np.array(repeated, dtype=np.bool_))
            found.update({lines[i]: "near_duplicate" for i in near})
    finally:
        signatures.close()
    return found


def _write(
    path: Path, copy: Path, repeats: dict[int, str], redact_pii: bool, facts: FileFacts, events: EventWriter
) -> tuple[int, dict[str, Finding], dict[str, Finding]]:
    """Writes the copy by rename. Returns the original's rows, what was removed and what was redacted."""
    removed: dict[str, Finding] = {}
    redacted: dict[str, Finding] = {}
    rows = 0
    partial = copy.with_name(f".{copy.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            for raw in raw_lines(path):
                rows += 1
                if rows % 1000 == 0:
                    events.progress(f"clean {path.name}", raw.line, max(facts.lines, raw.line), "lines")
                if raw.line in repeats:
                    _note(removed, repeats[raw.line], raw.line)
                    continue
                data, counts = _redacted(raw) if redact_pii else (raw.data, Counter[str]())
                for kind, count in counts.items():
                    _note(redacted, kind, raw.line, count)
                file.write(data.rstrip(b"\r\n") + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, copy)
    finally:
        partial.unlink(missing_ok=True)
    return rows, removed, redacted


def _note(found: dict[str, Finding], code: str, line: int, count: int = 1) -> None:
    one = found.setdefault(code, Finding(rows=0, count=0, lines=[]))
    one.rows += 1
    one.count += count
    if len(one.lines) < LINES_KEPT:
        one.lines.append(line)


def _redacted(raw: RawLine) -> tuple[bytes, Counter[str]]:
    """Returns a line without personal data; a line that is no JSON is searched as plain text."""
    counts: Counter[str] = Counter()
    try:
        value = json.loads(raw.data.decode("utf-8"))
    except (ValueError, RecursionError):
        text, counts = redact(raw.data.decode("utf-8", "surrogateescape"))
        return text.encode("utf-8", "surrogateescape"), counts
    clean = _redact_value(value, counts)
    if not counts:
        return raw.data, counts
    # surrogate halves, which JSON allows as escapes, cannot be written otherwise
    return json.dumps(clean, ensure_ascii=b"\\u" in raw.data).encode(), counts


def _redact_value(value: Any, counts: Counter[str]) -> Any:
    if isinstance(value, dict):
        return {k: v if k in _NOT_TEXT and isinstance(v, str | int) else _redact_value(v, counts)
                for k, v in value.items()}
    if isinstance(value, list):
        return [_redact_value(v, counts) for v in value]
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        text, found = redact(str(value))
        counts.update(found)
        return text if found else value
    return value
