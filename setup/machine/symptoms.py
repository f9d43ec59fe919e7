"""Failures that write no error: found in what a run recorded, and in the state of the machine."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparktune.setup.machine.check import Check
from sparktune.setup.machine.diagnose import Finding, diagnose
from sparktune.setup.machine.host_checks import check_clocks, check_page_cache
from sparktune.setup.plan.errors import UsageError
from sparktune.setup.plan.schema import Plan
from sparktune.setup.plan.untrusted import json_rows

__all__ = ["diagnose_source", "machine_symptoms", "metrics_symptoms", "read_metrics"]

_SOURCE_MISSING = (
    "diagnose reads a log file, a run's name or folder, or - for standard input; there is no {name}."
)
_NEAR_ZERO = 0.02
_FEW_STEPS = 20
_SLOWED = 0.6
_RISE = 1.05
_WARM_UP = 3
_MOST_BYTES = 64 * 2**20
"""Of a log, its end is read."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics.jsonl; a line that is being written, or damaged, is passed over."""
    return json_rows(path)[0] if path.is_file() else []


def _finding(name: str, line: str, cause: str, fix: str, source: str = "", warning: bool = True) -> Finding:
    return Finding(name=name, line=line, cause=cause, fix=fix, source=source, warning=warning)


def metrics_symptoms(rows: Sequence[dict[str, Any]]) -> list[Finding]:
    """Returns what a run's figures are known for: not a number, a leak, overfitting, worse than the base, slowing down.

    Args:
        rows: of metrics.jsonl.
    """
    found = []
    numbered = [r for r in rows if isinstance(r.get("step"), int | float)]
    losses = [(r["step"], r["loss"]) for r in numbered if isinstance(r.get("loss"), int | float)]
    evals = [(r["step"], r["eval_loss"]) for r in numbered if isinstance(r.get("eval_loss"), int | float)]
    speeds = [r["tok_per_s"] for r in rows if isinstance(r.get("tok_per_s"), int | float)]
    if broken := next((s for s, value in losses if not math.isfinite(value)), None):
        found.append(_finding(
            "loss-not-finite", f"loss is not a number from step {broken}", "The loss stopped being a number.",
            "Stay with bfloat16, lower --learning-rate to 1e-4 and raise --warmup-ratio.", "published practice",
            warning=False,
        ))
    if losses and losses[0][0] <= _FEW_STEPS and 0 <= losses[0][1] < _NEAR_ZERO:
        found.append(_finding(
            "leak", f"loss {losses[0][1]:.4f} at step {losses[0][0]}",
            "A loss near zero from the start: packed documents see each other, or the answers stand in the prompts.",
            "Train with --engine native, which restarts at every document, and look at a row's mask in the wizard.",
            "ms-swift#9618, axolotl#3453",
        ))
    if len(evals) >= 3:
        best_step, best = min(evals, key=lambda e: e[1])
        last_step, last = evals[-1]
        if last > best * _RISE and last_step > best_step:
            found.append(_finding(
                "overfitting", f"evaluation loss {best:.4f} at step {best_step}, {last:.4f} at step {last_step}",
                "The model has begun to learn the examples by heart; it will also make up more.",
                "Stop at the plateau: fewer --epochs, or --early-stopping 3.", "published practice",
            ))
    if len(evals) >= 2 and evals[0][0] == 0 and evals[-1][1] > evals[0][1]:
        found.append(_finding(
            "worse-than-base", f"evaluation loss {evals[0][1]:.4f} before training, {evals[-1][1]:.4f} after",
            "The model is worse on held-out rows than its base: duplicates, another chat template, or too high a rate.",
            "Look at ./run.sh analyze (duplicates, leaks, template), then lower --learning-rate.", "published practice",
        ))
    steady = speeds[_WARM_UP:]
    if len(steady) >= 4 * _FEW_STEPS:
        first, last_speed = statistics.median(steady[:_FEW_STEPS]), statistics.median(steady[-_FEW_STEPS:])
        if last_speed < _SLOWED * first:
            found.append(_finding(
                "slowing-down", f"{first:,.0f} tok/s at first, {last_speed:,.0f} at the end",
                "Training slowed down: heat, a stuck low-power state, or page cache that crowds unified memory.",
                "Look at ./run.sh doctor (clocks, page cache) while it runs.", "model-serving-minefield#55, #113",
            ))
    return found


def _end_of(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - _MOST_BYTES, 0))
        return file.read().decode("utf-8", errors="replace")


def diagnose_source(name: str, results: Path) -> list[Finding]:
    """Returns what a log file, a run, or standard input (`-`) is known for.

    Args:
        name: a file, a run's folder or name, or `-`.
        results: the folder of the runs' records.

    Raises:
        UsageError: there is no such file or run.
    """
    if name == "-":
        return diagnose(sys.stdin.read())
    for path in (Path(name).expanduser(), results / name):
        if path.is_file():
            return diagnose(_end_of(path))
        if (path / "plan.yaml").is_file():
            log = path / "log.txt"
            found = diagnose(_end_of(log)) if log.is_file() else []
            known = {f.name for f in found}
            return found + [f for f in metrics_symptoms(read_metrics(path / "metrics.jsonl")) if f.name not in known]
    raise UsageError(_SOURCE_MISSING.format(name=name))


def machine_symptoms() -> list[Finding]:
    """Returns what the machine's state is known for right now: stale page cache, low clocks, heat."""
    checks: list[Check] = [check_page_cache(Plan.model_construct()), check_clocks(Plan.model_construct())]
    return [
        _finding(c.name.replace(" ", "-"), c.seen, f"The {c.name} of this machine can slow a run down.", c.fix)
        for c in checks if c.status != "ok"
    ]
