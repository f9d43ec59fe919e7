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
from sparktune.setup.plan.config import load_plan
from sparktune.setup.plan.errors import SparktuneError, UsageError
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import Plan
from sparktune.setup.plan.untrusted import is_figure, json_object_file, json_rows

__all__ = [
    "diagnose_source", "machine_symptoms", "metrics_symptoms", "read_metrics", "reference_ops", "run_symptoms",
]

_SOURCE_MISSING = (
    "diagnose reads a log file, a run's name or folder, or - for standard input; there is no {name}."
)
_NEAR_ZERO = 0.02
_FEW_STEPS = 20
_SLOWED = 0.6
_RISE = 1.05
_WARM_UP = 3
_GAP = 1.02
_AT_WORK = ("start", "progress", "metric", "sample", "choice")
"""Kinds of events that are no stage's last word."""
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
    figures = [(r["step"], name, r[name]) for r in rows for name in ("loss", "grad_norm")
               if isinstance(r.get(name), int | float)]
    if broken := next(((s, name) for s, name, value in figures if not math.isfinite(value)), None):
        found.append(_finding(
            "loss-not-finite", f"{broken[1]} is not a number from step {broken[0]}",
            "The loss or a gradient stopped being a number.",
            "Stay with bfloat16, lower --learning-rate to 1e-4 and raise --warmup-ratio; from the first step on a "
            "Blackwell GPU, train with --engine native.", "published practice, fla#913", warning=False,
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


def reference_ops(plan: Plan) -> list[str]:
    """Returns the ops that a GPU runs by plain PyTorch because no fused kernel could serve them."""
    return [op for op, why in plan.kernels.items() if why.startswith("reference")] if plan.device == "cuda" else []


def run_symptoms(root: Path, started_s: float | None = None) -> list[Finding]:
    """Returns what a run's records are known for: slow kernels, a merge that lost too much, a machine that went out.

    Args:
        root: results/RUN.
        started_s: when the machine started, in seconds since 1970; as the system says when left out.
    """
    found = []
    try:
        slow = reference_ops(load_plan(root / "plan.yaml"))
    except SparktuneError:
        slow = []  # the log and the figures can be read all the same
    if slow:
        found.append(_finding(
            "slow-kernels", f"plan.yaml: {', '.join(slow)} run by reference", "No fused kernel serves these ops.",
            "plan.yaml says why of each; bfloat16 and a GPU of capability 8.0 or more are what the kernels want.",
            "unsloth#6850",
        ))
    try:
        gap = json_object_file(RunDir.from_root(root, root).merge_gap)
    except (OSError, ValueError):
        gap = {}
    before, after = gap.get("loss_trained"), gap.get("loss_merged")
    if is_figure(before) and is_figure(after) and before and after and after > before * _GAP:
        found.append(_finding(
            "merge-gap", f"loss {before:.4f} as trained, {after:.4f} merged",
            "The base was trained over in too few bits: the merge is more than 2 % worse than what was trained.",
            "Raise --lora-r, or train over 8 bits: --quantise-base int8.", "published practice",
        ))
    events, booted = root / "events.jsonl", _booted_s() if started_s is None else started_s
    if booted and events.is_file() and events.stat().st_mtime < booted:
        last = (json_rows(events)[0] or [{}])[-1]
        if last.get("kind") in _AT_WORK:
            found.append(_finding(
                "power-off", f"{events.name} ends in the middle of the stage {last.get('stage')}",
                "The machine went out or was started anew while this run was at work: heat, or the power supply.",
                f"Go on with ./run.sh resume {root.name}; watch the temperature in the live view, and let the GPU "
                "cool.", "model-serving-minefield#55",
            ))
    return found


def _booted_s() -> float:
    """When the machine started, in seconds since 1970; 0 where the system does not say."""
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) for line in lines if line.startswith("btime ")), 0.0)


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
            seen = [*metrics_symptoms(read_metrics(path / "metrics.jsonl")), *run_symptoms(path)]
            return found + [f for f in seen if f.name not in known]
    raise UsageError(_SOURCE_MISSING.format(name=name))


def machine_symptoms() -> list[Finding]:
    """Returns what the machine's state is known for right now: stale page cache, low clocks, heat."""
    checks: list[Check] = [check_page_cache(Plan.model_construct()), check_clocks(Plan.model_construct())]
    return [
        _finding(c.name.replace(" ", "-"), c.seen, f"The {c.name} of this machine can slow a run down.", c.fix)
        for c in checks if c.status != "ok"
    ]
