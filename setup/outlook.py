"""What a complete plan would take, and what stands against it: shown on the review screen and by `plan`.

The seam for what is known before a start: whoever learns to tell more of a plan (a calibration, a cost) adds a line to
`Outlook.lines`.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparktune.setup import strings
from sparktune.setup.estimate import run_eta
from sparktune.setup.machine.doctor import disk_by_stage
from sparktune.setup.pipeline import Analysis, check_name_free
from sparktune.setup.plan.errors import SparktuneError
from sparktune.setup.plan.eta import duration
from sparktune.setup.plan.exports import check_exports
from sparktune.setup.plan.memory import check_fits
from sparktune.setup.plan.recommend import planned_steps
from sparktune.setup.plan.schema import Plan
from sparktune.setup.plan.trainable import check_trainable

__all__ = ["Outlook", "outlook"]


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What is known of a run before it starts."""

    lines: list[tuple[str, str]]
    """(what, sentence): steps, memory, disk, and time where it is known."""
    refusals: list[str]
    """Why the plan cannot be run as it stands, each with what to change; empty when it can."""


def outlook(plan: Plan, analysis: Analysis) -> Outlook:
    """Returns what `plan` would take and what stands against it."""
    refusals: list[str] = []
    lines = [("steps", strings.OUTLOOK_STEPS.format(steps=planned_steps(plan, analysis.report)))]
    try:
        check_name_free(plan)
        check_exports(plan, analysis.spec)
        check_trainable(plan, analysis.spec)
        estimate = check_fits(plan, analysis.spec, analysis.report, analysis.machine)
        lines.append(("memory", f"{estimate.describe()}; {analysis.machine.memory_gib:.1f} GiB free"))
    except SparktuneError as error:
        refusals.append(str(error))
    lines.append(("time", _time(plan, analysis)))
    disk = disk_by_stage(plan, analysis.spec)
    lines.append(("disk", strings.OUTLOOK_DISK.format(
        need=sum(disk.values()), free=analysis.machine.disk_free_gib,
        parts=", ".join(f"{stage} {gib:.1f}" for stage, gib in disk.items() if gib >= 0.05) or strings.NOTHING,
    )))
    return Outlook(lines=lines, refusals=refusals)


def _time(plan: Plan, analysis: Analysis) -> str:
    eta = run_eta(plan, analysis.spec, analysis.report, analysis.machine)
    if eta.unknown:
        return strings.OUTLOOK_NO_TIME.format(why=eta.unknown)
    train = eta.stage("train")
    return strings.OUTLOOK_TIME.format(
        low=duration(eta.low), high=duration(eta.high), likely=duration(eta.seconds), why=train.reason if train else "",
    )
