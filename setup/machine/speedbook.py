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
from sparktune.setup.plan.eta import Pace, chips_of, filled_share, micro_batch_tokens, training_work, work_of
from sparktune.setup.plan.memory import checkpoint_bytes
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
    steps = [row for row in rows if row.get("tok_per_s") and row.get("tokens")][_WARM_UP:]
    if len(steps) < _LEAST_STEPS:
        return None
    seconds = sum(row["tokens"] / row["tok_per_s"] for row in steps)
    return float(sum(row["tokens"] for row in steps) / seconds) if seconds > 0 else None


def record_training(
    plan: Plan, spec: ModelSpec, report: DatasetReport, machine: Machine, run: RunDir, seconds: float
) -> None:
    """Remembers the speed of a finished training, and what of its `seconds` it spent on what besides its steps.

    One that was over before, on this machine or on another, teaches nothing: its end says nothing of what it spent.
    """
    ends = [row for row in read_metrics(run.stage_events("train")) if row.get("kind") == "end"]
    end = ends[-1] if ends else {"spent": {}}
    spent, first = end.get("spent"), end.get("first_spent") or {}
    began_after = int(end.get("began_after") or 0)
    # A resume may have other GPUs than the process before it had: its own steps alone tell of them.
    rows = [row for row in read_metrics(run.metrics) if row.get("step", 0) > began_after]
    speed = steady_tok_per_s(rows)
    if spent is None or speed is None or plan.engine == "auto" or plan.mode == "auto":
        return
    flop = training_flop(plan, spec, document=report.lengths.mean, supervised_share=report.supervised_share)
    flop /= filled_share(plan, report)  # a GPU computes the padding too
    book = load_book()
    if not began_after and spent:  # what a resumed run did besides its steps, and how often, is another's too
        book.paces += _besides(plan, spec, report, machine, seconds, rows, speed, spent, first)
    book.speeds.append(Speed(
        chip=chip_of(machine), engine=plan.engine, mode=plan.mode, dtype=plan.dtype, recompute=plan.recompute_choice,
        parameters=spec.parameters, flop_per_s=speed * flop / chips_of(plan), source="own",
        origin=f"this machine, run {run.name}",
        document=report.lengths.mean, micro_tokens=micro_batch_tokens(plan, report),
    ))
    _save(book)


def _besides(
    plan: Plan, spec: ModelSpec, report: DatasetReport, machine: Machine, seconds: float,
    rows: Sequence[dict[str, Any]], speed: float, spent: dict[str, list[float]], first: dict[str, list[float]],
) -> list[Pace]:
    """What a training did besides its steps, with the work each took.

    What the first evaluation, sample and save took longer than the others counts as the start: they compile kernels.
    """
    steps = [row for row in rows if row.get("tok_per_s") and row.get("tokens") and row.get("step")]
    spent = {name: [done, took - _compiling(done, took, first.get(name))] for name, (done, took) in spent.items()}
    start_s = seconds - sum(row["tokens"] for row in steps) / speed - sum(took for _, took in spent.values())
    planned = training_work(plan, spec, report, len(steps), checkpoint_bytes(plan, spec))
    chip, took = chip_of(machine), {name: float(s) for name, (_, s) in spent.items()}
    work = {**{name: planned[f"train: {name}"] for name in took}, "samples": spent["samples"][0]}
    parts = [("start", planned["train: start"], start_s), *((name, work[name], took[name]) for name in took)]
    return [
        Pace(stage=f"train: {name}", chip=chip, work=amount, seconds=round(s, 2))
        for name, amount, s in parts if amount > 0 and s > 0
    ]


def _compiling(done: float, took: float, first: Sequence[float] | None) -> float:
    """Returns the seconds that the first of several took longer than as much of the others."""
    if not first or not 0 < first[0] < done:
        return 0.0
    usual = (took - first[1]) / (done - first[0]) * first[0]
    return max(0.0, first[1] - usual)


def record_pace(
    stage: str, seconds: float, plan: Plan, spec: ModelSpec, report: DatasetReport, machine: Machine
) -> None:
    """Remembers how long a stage took."""
    book = load_book()
    work = work_of(stage, plan, spec, report)
    book.paces.append(Pace(stage=stage, chip=chip_of(machine), work=work, seconds=round(seconds, 2)))
    _save(book)
