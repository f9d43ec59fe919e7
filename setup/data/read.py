"""Rows of a JSONL, one at a time: every known format becomes one list of messages, or plain text.

Memory is bounded by the longest line allowed. A row that cannot be used becomes a RowProblem that names its line and
never quotes its content.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from sparktune.setup.data.formats import RowRefused, normalise
from sparktune.setup.plan.errors import DataError
from sparktune.setup.plan.schema import RowProblem

__all__ = [
    "MAX_LINE_BYTES", "FileFacts", "RawLine", "Row", "file_facts", "first_questions", "parse_row", "raw_line_at",
    "raw_lines", "read_rows",
]

MAX_LINE_BYTES = 64 * 2**20
"""A longer line is refused: it bounds the reader's memory, and no example of that size can be trained on."""

_DEEPEST = 100
"""Levels of a row's JSON; templates write tools and arguments with a function that calls itself a level."""
_BOM = b"\xef\xbb\xbf"
_OTHER_FILES = {
    b"\xff\xfe": "a UTF-16 text file: save it as UTF-8",
    b"\xfe\xff": "a UTF-16 text file: save it as UTF-8",
    b"PAR1": "a Parquet file: export it as JSONL, one JSON object a line",
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"PK\x03\x04": "a zip archive: unpack it first",
    b"\x28\xb5\x2f\xfd": "a zstd archive: unpack it first",
    b"ARROW1": "an Arrow file: export it as JSONL, one JSON object a line",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One usable row, normalised."""

    line: int
    """Line number in the file, from 1."""
    format: Literal["messages", "prompt_completion", "alpaca", "sharegpt", "text"]
    messages: list[dict[str, Any]] | None
    """Chat: roles system, user, assistant, tool; None for text."""
    text: str | None
    """Plain text; None for chat."""
    tools: list[dict[str, Any]] | None
    """JSON schemas of callable functions, handed to the chat template."""

    @property
    def digest(self) -> bytes:
        """sha256 of the normalised row: equal for equal conversations, whatever their format or key order."""
        canonical = json.dumps(
            [self.messages, self.text, self.tools], ensure_ascii=False, sort_keys=True, separators=(",", ":")
        )
        return hashlib.sha256(canonical.encode()).digest()


@dataclass(frozen=True, kw_only=True)
class RawLine:
    """One non-blank line as it stands in the file."""

    line: int
    """Line number in the file, from 1."""
    offset: int
    """Byte at which it begins."""
    data: bytes
    """With its line end, where it has one."""


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """A data file's identity and size."""

    sha256: str
    bytes: int
    lines: int
    """Line ends; the last line may have none."""


def file_facts(path: Path) -> FileFacts:
    """Reads a data file once for its hash and size.

    Raises:
        DataError: see `read_rows`.
    """
    digest, size, lines = hashlib.sha256(), 0, 0
    with _open(path) as file:
        file.seek(0)
        while block := _read(path, file, 2**20):
            digest.update(block)
            size += len(block)
            lines += block.count(b"\n")
    return FileFacts(sha256=digest.hexdigest(), bytes=size, lines=lines)


def read_rows(path: Path, text_field: str = "text") -> Iterator[Row | RowProblem]:
    """Yields every non-blank line of a JSONL as a Row or, if it cannot be used, a RowProblem.

    A UTF-8 byte order mark, CRLF line ends and blank lines are accepted.

    Args:
        path: the file.
        text_field: name of the field of the `text` format; a name other than `text` wins over the chat formats.

    Raises:
        DataError: the file is missing, a folder, unreadable, empty, or plainly not a text file.
    """
    for raw in raw_lines(path):
        yield parse_row(raw.line, raw.data, text_field)


def raw_lines(path: Path) -> Iterator[RawLine]:
    """Yields every non-blank line of a JSONL as it stands; of a line longer than the limit only limit + 1 bytes.

    Raises:
        DataError: see `read_rows`.
    """
    rows = 0
    with _open(path) as file:
        for raw in _lines(path, file):
            if raw.data.strip():
                rows += 1
                yield raw
    if not rows:
        raise DataError(f"{path} should hold one JSON object a line; it holds none: the file is empty.")


def raw_line_at(path: Path, offset: int) -> bytes:
    """Returns the line that begins at byte `offset`, as `raw_lines` would.

    Raises:
        DataError: see `read_rows`.
    """
    with _open(path) as file:
        file.seek(offset)
        return _readline(path, file)


def first_questions(path: Path, lines: set[int], text_field: str = "text") -> dict[int, str]:
    """Returns line -> the first thing a user says there, as people read it; lines without one are left out.

    Args:
        path: the file.
        lines: line numbers, from 1; reading ends at the last of them.
        text_field: see `read_rows`.

    Raises:
        DataError: see `read_rows`.
    """
    found: dict[int, str] = {}
    for row in read_rows(path, text_field) if lines else ():
        if row.line > max(lines):
            break
        if row.line in lines and isinstance(row, Row):
            asked = [m["content"] for m in row.messages or [] if m["role"] == "user" and m["content"].strip()]
            found.update({row.line: asked[0]} if asked else {})
    return found


def _open(path: Path) -> BinaryIO:
    """Opens a data file after a look at its first bytes."""
    if path.is_dir():
        raise DataError(f"{path} should be a JSONL file; it is a folder. Name the file inside it.")
    if path.exists() and not path.is_file():  # opening a pipe that nobody writes would wait for ever
        raise DataError(f"{path} should be a JSONL file; it is a pipe or a device. Write the rows into a file first.")
    try:
        file = path.open("rb")
        head = file.read(8)
        file.seek(0)
    except FileNotFoundError as error:
        raise DataError(f"{path} should be a JSONL file; there is no such file. Check the path.") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    for magic, advice in _OTHER_FILES.items():
        if head.startswith(magic):
            file.close()
            raise DataError(f"{path} should be a JSONL file (UTF-8, one JSON object a line); it is {advice}.")
    if head.startswith(_BOM):
        file.seek(len(_BOM))
    return file


def _lines(path: Path, file: BinaryIO) -> Iterator[RawLine]:
    """Yields the lines; of a line longer than the limit only limit + 1 bytes."""
    number, offset = 0, file.tell()
    while data := _readline(path, file):
        number += 1
        yield RawLine(line=number, offset=offset, data=data)
        offset += len(data)
        while len(data) > MAX_LINE_BYTES and not data.endswith(b"\n"):
            data = _readline(path, file)
            offset += len(data)


def _readline(path: Path, file: BinaryIO) -> bytes:
    try:
        return file.readline(MAX_LINE_BYTES + 1)
    except OSError as error:
        raise _unreadable(path, error) from error


def _read(path: Path, file: BinaryIO, size: int) -> bytes:
    try:
        return file.read(size)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} should be a readable JSONL file, but: {error.strerror or error}. Check it and its disk.")


def parse_row(line: int, data: bytes, text_field: str = "text") -> Row | RowProblem:
    """Returns one line as a Row or, if it cannot be used, a RowProblem.

    Args:
        line: its number, from 1.
        data: its bytes; more than MAX_LINE_BYTES are refused.
        text_field: see `read_rows`.
    """
    try:
        value = _object(data)
        kind, messages, text, tools = normalise(value, text_field)
        row = Row(line=line, format=kind, messages=messages, text=text, tools=tools)
        escapes = b"\\u" in data  # they may spell brackets, inside JSON that is text
        if escapes or data.count(b"[") + data.count(b"{") > _DEEPEST:
            _check_depth(row)
        if escapes:
            _check_surrogates(row)
    except RowRefused as refusal:
        return RowProblem(line=line, code=refusal.code, text=refusal.text)
    return row


def _object(data: bytes) -> dict[str, Any]:
    """Decodes one line, or says what it is instead of a JSON object."""
    if len(data) > MAX_LINE_BYTES:
        raise RowRefused(
            "not_json", f"the line is longer than {MAX_LINE_BYTES // 2**20} MiB; one line should hold one example."
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowRefused(
            "not_utf8", f"byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8."
        ) from error
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        what = (error.msg[:1].lower() + error.msg[1:]).removesuffix(" at")
        raise RowRefused("not_json", f"expected a JSON object, but column {error.colno}: {what}.") from error
    except RecursionError as error:
        raise RowRefused("not_json", "the JSON is nested too deeply to be an example.") from error
    except ValueError as error:
        raise RowRefused("not_json", "a number has more digits than can be read.") from error
    if not isinstance(value, dict):
        names = {list: "an array", str: "a string", type(None): "null", bool: "true or false"}
        kind = names.get(type(value), "a number")
        raise RowRefused("not_json", f"expected a JSON object, found {kind}; one line holds one example: {{...}}.")
    return value


def _check_depth(row: Row) -> None:
    """Refuses a row nested deeper than a template can be expected to write it."""
    level: list[Any] = [row.messages, row.tools]
    for _ in range(_DEEPEST):
        level = [
            inner for value in level if isinstance(value, list | dict)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise RowRefused("not_json", "the JSON is nested too deeply to be an example.")


def _check_surrogates(row: Row) -> None:
    """Refuses halves of UTF-16 pairs (\\ud83d alone): JSON allows them, no tokenizer can read them."""
    try:
        _ = row.digest
    except UnicodeEncodeError as error:
        raise RowRefused(
            "not_utf8", "a \\u escape is one half of a surrogate pair and so no character; write the character itself."
        ) from error
