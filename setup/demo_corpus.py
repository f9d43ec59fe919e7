"""The demo's two data sets: fifty sums, and questions on the installed Python's standard library.

Sources are parsed with `ast`, never imported, so nothing of the library runs. For one Python the rows are always the
same; other versions give other rows of the same kind.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

__all__ = ["smoke_rows", "stdlib_rows", "write_smoke", "write_stdlib"]

Row = dict[str, Any]

SYSTEM_PROMPT = "You answer questions about Python's standard library in the words of its documentation."

# Not the library itself (tests, demos, bundled tools), or packaged apart by Debian: left out, so that a Debian Python
# and one built from source give much the same rows.
_LEFT_OUT = frozenset({
    "test", "tests", "idlelib", "lib2to3", "distutils", "ensurepip", "tkinter", "turtledemo", "turtle.py", "pydoc_data",
    "site-packages", "dist-packages", "__pycache__", "msilib", "lib-dynload", "antigravity.py", "this.py",
})
# The library documents these under another name than the file's.
_PUBLIC_NAMES = {"posixpath": "os.path", "_collections_abc": "collections.abc", "_pydecimal": "decimal",
                 "_pydatetime": "datetime", "_pyio": "io", "_strptime": "time"}
_MAX_FOLLOW_UPS = 5


@dataclass
class _Documented:
    """A class or function that has a docstring; `members` are a class's documented methods."""

    name: str
    doc: str
    is_class: bool
    members: list[_Documented] = field(default_factory=list)


def smoke_rows() -> list[Row]:
    """Returns fifty rows: "What is n + n?" -> "n + n = 2n." for n from 1 to 50."""
    return [_chat([(f"What is {n} + {n}?", f"{n} + {n} = {2 * n}.")]) for n in range(1, 51)]


@lru_cache(maxsize=2)
def stdlib_rows(library: Path | None = None) -> tuple[Row, ...]:
    """Returns several thousand chat rows made from the docstrings of the standard library's Python sources.

    A module, class or function is asked about on its own; two of five documented classes become one conversation with
    follow-up questions on their methods. About one row in six has a system prompt. All choices hang on a hash of the
    name alone.

    Args:
        library: folder of the sources; the running Python's own when left out.
    """
    root = library or Path(sysconfig.get_path("stdlib"))
    rows: dict[str, Row] = {}
    for module, path in _modules(root):
        try:
            # Bytes, so that the file's own coding line counts.
            tree = ast.parse(path.read_bytes(), filename=str(path))
        except (SyntaxError, ValueError):
            continue  # sources kept broken on purpose by some packagers
        doc = ast.get_docstring(tree)
        if doc:
            _add(rows, module, [(f"What is the module `{module}` for?", doc)])
        for item in _documented(tree.body):
            _add_item(rows, module, item)
    return tuple(rows.values())


def write_smoke(path: Path) -> int:
    """Writes `smoke_rows()` as JSONL, by rename. Returns the number of rows."""
    return _write(path, smoke_rows())


def write_stdlib(path: Path, limit: int | None = None) -> int:
    """Writes `stdlib_rows()` as JSONL, by rename. Returns the number of rows.

    Args:
        limit: keep only this many rows, spread evenly over the library.
    """
    rows = list(stdlib_rows())
    if limit is not None and limit < len(rows):
        rows = [rows[i * len(rows) // limit] for i in range(limit)]
    return _write(path, rows)


def _write(path: Path, rows: list[Row]) -> int:
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_bytes() != content:  # the same rows keep their file: old runs can go on with it
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(content)
        os.replace(partial, path)
    return len(rows)


def _chat(turns: list[tuple[str, str]], system: str | None = None) -> Row:
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Yields (public dotted name, file), sorted by name; private modules only if they are published under another."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in _LEFT_OUT and not f.startswith("_") and f.isidentifier())
        for file in sorted(files):
            if not file.endswith(".py") or file in _LEFT_OUT:
                continue
            parts = list(Path(folder, file).relative_to(root).with_suffix("").parts)
            if parts[-1] == "__init__":
                parts.pop()
            name = ".".join(parts)
            public = _PUBLIC_NAMES.get(name, name)
            if name and not any(p.startswith("_") for p in public.split(".")):
                yield public, Path(folder, file)


def _documented(body: list[ast.stmt]) -> Iterator[_Documented]:
    """Yields public documented classes and functions of a body, those under `if` and `try` included."""
    for node in body:
        if isinstance(node, ast.If):
            yield from _documented(node.body + node.orelse)
        elif isinstance(node, ast.Try):
            yield from _documented(node.body + node.orelse + node.finalbody)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            doc = ast.get_docstring(node, clean=False)
            is_class = isinstance(node, ast.ClassDef)
            members = list(_documented(node.body)) if is_class else []
            if (doc and doc.strip()) or members:
                yield _Documented(node.name, inspect.cleandoc(doc or "").strip(), is_class, members)


def _bucket(name: str, buckets: int) -> int:
    """Returns a number below `buckets` that depends on `name` alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % buckets


def _add(rows: dict[str, Row], name: str, turns: list[tuple[str, str]]) -> None:
    """Adds one row under its name, once: a second definition (another platform's branch) is left out."""
    system = SYSTEM_PROMPT if _bucket(name, 6) == 0 else None
    rows.setdefault(name, _chat([(q, a.strip()) for q, a in turns], system))


def _add_item(rows: dict[str, Row], prefix: str, item: _Documented) -> None:
    name = f"{prefix}.{item.name}"
    methods = [m for m in item.members if not m.is_class and m.doc]
    follow_ups: list[_Documented] = []
    if item.is_class:
        if item.doc and methods and _bucket(name, 5) < 2:
            follow_ups = methods[: 1 + _bucket(name + "()", _MAX_FOLLOW_UPS)]
        if item.doc:
            turns = [(f"What is the class `{name}`?", item.doc)]
            turns += [(f"And what does its method `{m.name}` do?", m.doc) for m in follow_ups]
            _add(rows, name, turns)
        for member in item.members:
            if member not in follow_ups:
                _add_item(rows, name, member)
    elif item.doc:
        _add(rows, name, [(f"What does `{name}` do?", item.doc)])
