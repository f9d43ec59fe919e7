"""Rows of docs/results: appended to a CSV whatever columns it has, and where they were measured. Imports no torch."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = ["append_rows", "commit_name", "processor_name"]

_ROOT = Path(__file__).resolve().parents[1]


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


def commit_name() -> str:
    """Returns the checkout's commit; LAB_COMMIT names it where the files lie in another repository or in none."""
    if os.environ.get("LAB_COMMIT"):
        return os.environ["LAB_COMMIT"]
    argv = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(argv, cwd=_ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def processor_name() -> str:
    """Returns the processor's model and the cores that this process may use."""
    info, model = Path("/proc/cpuinfo"), ""
    if info.is_file():
        lines = info.read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.machine()}, {len(os.sched_getaffinity(0))} cores"
