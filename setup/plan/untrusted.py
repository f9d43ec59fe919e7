"""JSON that came from elsewhere: whatever is wrong with it is a ValueError that says so in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["json_object", "json_object_file", "whole_number"]

_LARGEST = 2**63 - 1


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


def whole_number(value: Any, what: str) -> int:
    """Returns `value` if it is a whole number from 0 to 2**63 - 1; neither true nor 1.0 is one.

    Raises:
        ValueError: it is something else.
    """
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise ValueError(f"{what} is no whole number from 0 to 2**63 - 1")
    return value
