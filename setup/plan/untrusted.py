"""JSON that came from elsewhere: whatever is wrong with it is a ValueError that says so in words."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any, NoReturn

__all__ = [
    "excerpt", "is_figure", "json_object", "json_object_file", "json_rows", "printable", "shell_word",
    "whole_number", "without_credentials",
]

_LARGEST = 2**63 - 1
_EXCERPT = 120
_CREDENTIALS = re.compile(r"://[^/@\s]+@")
_FIGURES = (
    "step", "loss", "eval_loss", "lr", "grad_norm", "tokens", "supervised_tokens", "tok_per_s", "peak_gib", "seconds",
)
_LARGEST_FIGURE = 1e18


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def json_object(raw: bytes | str) -> dict[str, Any]:
    """Returns the JSON object in `raw`, by the letter of the standard: UTF-8, no NaN, no halves of surrogate pairs.

    Raises:
        ValueError: it is none; the text says why and never quotes the content.
    """
    text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
    try:
        value = json.loads(text, parse_constant=_no_constant)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("a \\u escape is one half of a surrogate pair") from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__} instead of an object")
    return value


def json_object_file(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: see `json_object`.
    """
    return json_object(path.read_bytes())


def json_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Returns the objects of a run's NDJSON file (metrics, samples, events) and how many of its lines are none.

    A line may be cut (its writer was killed) or damaged, or hold something else where a figure should stand: it
    counts, and the others are read.

    Raises:
        OSError: the file cannot be read.
    """
    rows, damaged = [], 0
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line.decode("utf-8", "replace")) if line.strip() else None
        except (ValueError, RecursionError):
            damaged += 1
            continue
        if isinstance(row, dict) and all(is_figure(row[key]) for key in _FIGURES if key in row):
            rows.append(row)
        elif row is not None:
            damaged += 1
    return rows, damaged


def is_figure(value: Any) -> bool:
    """Whether `value` is a number one can draw, a number that is none (NaN, infinity), or null."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return True
    return type(value) in (int, float) and abs(value) < _LARGEST_FIGURE


def printable(text: str) -> str:
    """Returns `text` as a terminal may be given it: what is no character to print (escape codes, overrides of the
    writing direction, halves of surrogate pairs) stands there by its number; line ends and tabs stay.
    """
    return "".join(
        c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\u{ord(c):04x}"
        for c in text
    )


def shell_word(text: str) -> str:
    """Returns `text` quoted for a shell, on one line, as a terminal may be given it and as it can be pasted.

    What is no character to print becomes bytes in `$'...'`, which bash, zsh, ksh and POSIX.1-2024 read.
    """
    if text.isprintable():
        return shlex.quote(text)
    raw = text.encode("utf-8", "surrogateescape")
    return "$'" + "".join(chr(b) if 32 <= b < 127 and b not in b"'\\" else f"\\{b:03o}" for b in raw) + "'"


def without_credentials(text: str) -> str:
    """Returns `text` with the user's part of every URL (`https://user:token@host`) left out."""
    return _CREDENTIALS.sub("://***@", text)


def excerpt(value: Any) -> str:
    """Returns a value as a message quotes it: on one line, without control characters, short."""
    try:
        shown = repr(value)
    except (ValueError, RecursionError):  # Python writes no number of more than 4,300 digits
        return f"a value of type {type(value).__name__}, too large to show"
    return shown if len(shown) <= _EXCERPT else shown[:_EXCERPT] + "..."


def whole_number(value: Any, what: str) -> int:
    """Returns `value` if it is a whole number from 0 to 2**63 - 1; neither true nor 1.0 is one.

    Raises:
        ValueError: it is something else.
    """
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise ValueError(f"{what} is no whole number from 0 to 2**63 - 1")
    return value
