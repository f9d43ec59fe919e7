"""Appends rows to a CSV of docs/results, whatever columns it already has. Imports no torch."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = ["append_rows"]


def append_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Appends rows; columns that the file lacks are added at its right, empty in the rows that were there.

    Args:
        path: the CSV; made, with its folder, if it is not there.
        rows: column -> value.
    """
    new = [dict(row) for row in rows]
    if not new:
        return
    old: list[dict[str, object]] = []
    columns: list[str] = []
    if path.exists():
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or ())
            old = [dict(row) for row in reader]
    columns += [column for column in dict.fromkeys(c for row in new for c in row) if column not in columns]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns, restval="")
        writer.writeheader()
        writer.writerows([*old, *new])
    os.replace(partial, path)
