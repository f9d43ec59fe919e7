"""Rows of docs/results/reliability.csv: what was tried, on which machine, how often, and how often it failed."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import time
from collections.abc import Sequence

from sparktune.lab.table import commit_name, processor_name

__all__ = ["reliability_row"]

_PACKAGES = ("torch", "transformers", "safetensors")


def reliability_row(
    what: str, module: str, arguments: Sequence[str], *, trials: int, failures: int, seconds: float, found: str = "",
    machine: str | None = None,
) -> dict[str, object]:
    """Returns one row.

    Args:
        what: the claim that was tried.
        module: the module that was started.
        arguments: its arguments.
        trials: how often it was tried.
        failures: how often it failed.
        seconds: the wall time of all of it.
        found: further figures, in words.
        machine: what it ran on; the processor when left out.
    """
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in _PACKAGES)
    return {
        "what": what, "machine": machine or processor_name(),
        "versions": f"Python {platform.python_version()}, {versions}",
        "commit": commit_name(),
        "date": time.strftime("%Y-%m-%d %H:%M"), "command": shlex.join(["python", "-m", module, *arguments]),
        "trials": trials, "failures": failures, "seconds": round(seconds, 1), "found": found,
    }
