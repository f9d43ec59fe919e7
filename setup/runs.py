"""The runs there are: listed, and compared by plan, figures and answers."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sparktune.setup import strings
from sparktune.setup.cards import show_value
from sparktune.setup.machine.symptoms import read_metrics
from sparktune.setup.plan.config import load_plan
from sparktune.setup.plan.flags import flag_of
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import Plan
from sparktune.setup.runstate import RunState, stages_of

__all__ = ["compare", "compare_table", "describe", "runs_in", "runs_table"]

_WARM_UP = 3
_NOT_COMPARED = ("name", "schema_version", "origins", "kernels", "results", "output", "resume_from_checkpoint")
_FIGURES = (
    ("first_loss", "first loss", "{:.4f}"), ("last_loss", "last loss", "{:.4f}"),
    ("first_eval_loss", "evaluation loss before", "{:.4f}"), ("best_eval_loss", "best evaluation loss", "{:.4f}"),
    ("last_eval_loss", "last evaluation loss", "{:.4f}"), ("steps", "steps", "{:,}"),
    ("tok_per_s", "tokens a second (median)", "{:,.0f}"), ("peak_gib", "peak memory, GiB", "{:.2f}"),
    ("train_seconds", "training, seconds", "{:,.0f}"), ("seconds", "all stages, seconds", "{:,.0f}"),
)
_PROMPTS = 3
_ANSWER_CHARACTERS = 300


def runs_in(results: Path) -> list[Path]:
    """Returns the record folders of all runs in `results`, by name."""
    return sorted(p.parent for p in results.glob("*/plan.yaml") if not p.parent.name.startswith("."))


def _numbers(rows: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [row[key] for row in rows if isinstance(row.get(key), int | float)]


def _samples(path: Path) -> dict[str, str]:
    """Returns prompt -> the last answer to it."""
    return {str(r["prompt"]): str(r["answer"]) for r in read_metrics(path) if "prompt" in r and "answer" in r}


def describe(root: Path) -> dict[str, Any]:
    """Returns what is known of one run: state, losses, speed, times; figures that are not there are None.

    Raises:
        UsageError: plan.yaml or state.json cannot be read.
    """
    plan = load_plan(root / "plan.yaml")
    run = RunDir.from_root(root, plan.output)
    finished = RunState(run).stages
    done = [s for s in stages_of(plan) if s in finished]
    rows = read_metrics(run.metrics)
    losses, evals = _numbers(rows, "loss"), _numbers(rows, "eval_loss")
    speeds, peaks = _numbers(rows, "tok_per_s"), _numbers(rows, "peak_gib")
    return {
        "name": root.name, "mode": plan.mode, "model": plan.model, "data": str(plan.data) if plan.data else None,
        "finished": len(done) == len(stages_of(plan)), "stages_done": done,
        "first_loss": losses[0] if losses else None, "last_loss": losses[-1] if losses else None,
        "first_eval_loss": evals[0] if evals else None, "best_eval_loss": min(evals) if evals else None,
        "last_eval_loss": evals[-1] if evals else None, "steps": len(losses) or None,
        "tok_per_s": statistics.median(speeds[_WARM_UP:] or speeds) if speeds else None,
        "peak_gib": max(peaks) if peaks else None,
        "train_seconds": finished.get("train", {}).get("seconds"),
        "seconds": sum(s["seconds"] for s in finished.values()) if finished else None, "path": str(root),
    }


def _state(row: dict[str, Any]) -> str:
    if row["finished"]:
        return strings.RUN_FINISHED
    return strings.RUN_AFTER.format(stage=row["stages_done"][-1]) if row["stages_done"] else strings.RUN_BEGUN


def runs_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Shows one line a run."""
    table = Table(box=None, pad_edge=False)
    for name in ("run", "mode", "model", "state", "loss", "evaluation", "tok/s"):
        table.add_column(name, overflow="fold", justify="right" if name == "tok/s" else "left")
    for row in rows:
        loss = f"{row['first_loss']:.4f} -> {row['last_loss']:.4f}" if row["last_loss"] is not None else ""
        best = f"{row['best_eval_loss']:.4f}" if row["best_eval_loss"] is not None else ""
        speed = f"{row['tok_per_s']:,.0f}" if row["tok_per_s"] is not None else ""
        model = Path(row["model"]).name if Path(row["model"]).is_absolute() else row["model"]
        table.add_row(escape(row["name"]), row["mode"], escape(model), _state(row), loss, best, speed)
    return table


def compare(roots: Sequence[Path]) -> dict[str, Any]:
    """Returns what sets runs apart: plan fields that differ, their figures, and their answers to the same prompts.

    Raises:
        UsageError: a plan.yaml or state.json cannot be read.
    """
    plans = [load_plan(root / "plan.yaml") for root in roots]
    values = [plan.model_dump(mode="json") for plan in plans]
    differing = [
        f for f in Plan.model_fields
        if f not in _NOT_COMPARED and len({json.dumps(v[f], sort_keys=True) for v in values}) > 1
    ]
    answers = [_samples(root / "samples.jsonl") for root in roots]
    shared = [p for p in answers[0] if all(p in a for a in answers)][:_PROMPTS]
    return {
        "runs": [describe(root) for root in roots],
        "plan": {f: [v[f] for v in values] for f in differing},
        "samples": [{"prompt": p, "answers": [a[p] for a in answers]} for p in shared],
    }


def _clean(text: str) -> str:
    shown = "".join(c if c.isprintable() else " " for c in text)
    return shown if len(shown) <= _ANSWER_CHARACTERS else shown[:_ANSWER_CHARACTERS] + "…"


def compare_table(found: dict[str, Any]) -> RenderableType:
    """Shows a comparison: one column a run."""
    runs = found["runs"]
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for run in runs:
        table.add_column(escape(run["name"]), overflow="fold")
    table.add_row("state", *(_state(r) for r in runs))
    for field, values in found["plan"].items():
        table.add_row(Text(flag_of(field), "yellow"), *(escape(show_value(v)) for v in values))
    for key, name, form in _FIGURES:
        if any(r[key] is not None for r in runs):
            table.add_row(name, *("" if r[key] is None else form.format(r[key]) for r in runs))
    parts: list[RenderableType] = [table]
    for sample in found["samples"]:
        parts += [Text(), Text(_clean(sample["prompt"]), "bold")]
        parts += [Text(f"  {r['name']}: {_clean(a)}") for r, a in zip(runs, sample["answers"], strict=True)]
    if not found["plan"]:
        parts.append(Text(strings.SAME_PLAN))
    return Group(*parts)
