"""What this machine has shown: the speed of every finished training and the time of every other stage.

One JSON file a user (`~/.cache/sparktune/speeds/speeds.json`), newest last, the last hundred of each, by rename.
An unreadable one counts as empty: estimates then fall back on what is built in.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparktune.setup.machine.symptoms import read_metrics
from sparktune.setup.plan.arithmetic import training_flop
from sparktune.setup.plan.eta import Pace, filled_share, pauses_of, work_of
from sparktune.setup.plan.outfolder import write_durably
from sparktune.setup.plan.rundir import RunDir, cache_dir
from sparktune.setup.plan.schema import DatasetReport, Machine, ModelSpec, Plan
from sparktune.setup.plan.speeds import Speed, chip_of

__all__ = ["SpeedBook", "load_book", "record_pace", "record_training", "steady_tok_per_s"]

_KEPT = 100
_WARM_UP = 3
"""First steps of a process: kernels are compiled and graphs captured."""
_LEAST_STEPS = 8


class SpeedBook(BaseModel):
    """This machine's own figures."""

    model_config = ConfigDict(extra="ignore")

    speeds: list[Speed] = Field(default_factory=list)
    paces: list[Pace] = Field(default_factory=list)


def _path() -> Path:
    return cache_dir("speeds") / "speeds.json"


def load_book() -> SpeedBook:
    """Returns what the machine has shown so far; empty where there is nothing, or nothing readable."""
    try:
        return SpeedBook.model_validate_json(_path().read_bytes())
    except (OSError, ValidationError):
        return SpeedBook()


def _save(book: SpeedBook) -> None:
    book.speeds, book.paces = book.speeds[-_KEPT:], book.paces[-_KEPT:]
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, book.model_dump_json(indent=1))


def steady_tok_per_s(rows: Sequence[dict[str, Any]]) -> float | None:
    """Returns the real tokens a second over a run's steps without the first ones; None for too short a run.

    Args:
        rows: of metrics.jsonl.
    """
    steps = [row for row in rows if row.get("tok_per_s")][_WARM_UP:]
    if len(steps) < _LEAST_STEPS:
        return None
    seconds = sum(row["tokens"] / row["tok_per_s"] for row in steps)
    return float(sum(row["tokens"] for row in steps) / seconds) if seconds > 0 else None


def record_training(
    plan: Plan, spec: ModelSpec, report: DatasetReport, machine: Machine, run: RunDir, seconds: float
) -> None:
    """Remembers the speed of a finished training, and what of its `seconds` it spent outside its steps."""
    rows = read_metrics(run.metrics)
    speed = steady_tok_per_s(rows)
    if speed is None or plan.engine == "auto" or plan.mode == "auto":
        return
    flop = training_flop(plan, spec, document=report.lengths.mean, supervised_share=report.supervised_share)
    flop /= filled_share(plan, report)  # a GPU computes the padding too
    steps = [row for row in rows if row.get("tok_per_s")]
    outside = seconds - sum(row["tokens"] for row in steps) / speed
    book = load_book()
    if len(steps) == steps[-1]["step"] and outside > 0:  # not a resumed run, whose seconds are those of its last part
        pauses = pauses_of(plan, len(steps))
        book.paces.append(Pace(stage="pauses", chip=chip_of(machine), work=pauses, seconds=round(outside, 2)))
    book.speeds.append(Speed(
        chip=chip_of(machine), engine=plan.engine, mode=plan.mode, dtype=plan.dtype, recompute=plan.recompute_choice,
        parameters=spec.parameters, flop_per_s=speed * flop, source="own", origin=f"this machine, run {run.name}",
    ))
    _save(book)


def record_pace(
    stage: str, seconds: float, plan: Plan, spec: ModelSpec, report: DatasetReport, machine: Machine
) -> None:
    """Remembers how long a stage took."""
    book = load_book()
    work = work_of(stage, plan, spec, report)
    book.paces.append(Pace(stage=stage, chip=chip_of(machine), work=work, seconds=round(seconds, 2)))
    _save(book)
