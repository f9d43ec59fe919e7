"""A run's time before it starts, and what its stages taught for the next estimate."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError
from rich.markup import escape
from rich.table import Table

from sparktune.setup import strings
from sparktune.setup.cards import table
from sparktune.setup.machine.speedbook import load_book, record_pace, record_training
from sparktune.setup.plan.errors import SparktuneError
from sparktune.setup.plan.eta import Calibration, Eta, duration, estimate, rented
from sparktune.setup.plan.memory import checkpoint_bytes
from sparktune.setup.plan.models import probe
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import DatasetReport, Machine, ModelSpec, Plan
from sparktune.setup.runstate import stages_of

__all__ = ["eta_table", "read_calibration", "remember", "run_eta", "wants_calibration"]

_LONG_S = 3600.0
"""A run that may take longer is rehearsed first, unless the user says otherwise."""


def _download_bytes(plan: Plan, spec: ModelSpec) -> float:
    """Weights that are not here yet: those of a hub id without any safetensors file in the hub's cache."""
    if Path(plan.model).exists():
        return 0.0
    from huggingface_hub import constants, file_download  # slow to import, and only wanted for a hub id

    folder = Path(constants.HF_HUB_CACHE) / file_download.repo_folder_name(repo_id=plan.model, repo_type="model")
    return 0.0 if any((folder / "snapshots").glob("*/*.safetensors")) else spec.parameters * 2.0


def run_eta(
    plan: Plan, spec: ModelSpec, report: DatasetReport, machine: Machine, calibration: Calibration | None = None
) -> Eta:
    """Returns the time of everything that is still to do once the data was read."""
    book = load_book()
    return estimate(
        plan, spec, report, machine, stages=stages_of(plan)[1:], book=book.speeds, paces=book.paces,
        calibration=calibration, download_bytes=_download_bytes(plan, spec), save_bytes=checkpoint_bytes(plan, spec),
    )


def wants_calibration(plan: Plan, eta: Eta) -> bool:
    """Returns whether the plan is rehearsed before it starts: when asked for, or when it may take over an hour.

    Not where several GPUs train: a rehearsal is one process, and would need the memory that the others bring.
    """
    if plan.processes > 1:
        return False
    if plan.calibrate != "auto":
        return plan.calibrate == "yes"
    train = eta.stage("train")
    return train is None or train.seconds > _LONG_S


def read_calibration(root: Path) -> Calibration | None:
    """Returns a rehearsal's result, or None where there is none."""
    try:
        return Calibration.model_validate_json((root / "calibration.json").read_bytes())
    except (OSError, ValidationError):
        return None


def eta_table(eta: Eta, plan: Plan, spec: ModelSpec, report: DatasetReport) -> Table:
    """Shows the time of every stage as a range with its source, and what the training would cost on rented GPUs."""
    made = table(strings.ETA_TITLE, strings.ETA_STAGE, strings.ETA_TIME, strings.ETA_RANGE, strings.ETA_SOURCE)
    for figures in made.columns[1:3]:
        figures.justify, figures.no_wrap = "right", True
    for stage in eta.stages:
        limits = f"{duration(stage.low)} - {duration(stage.high)}"
        made.add_row(stage.stage, duration(stage.seconds), limits, escape(stage.reason))
    made.add_row(strings.ETA_TOTAL, duration(eta.seconds), f"{duration(eta.low)} - {duration(eta.high)}",
                 escape(eta.unknown), style="bold")
    for name, fast, slow, cheap, dear in rented(plan, spec, report):
        if dear >= 1:
            hours = f"{duration(fast * 3600)} - {duration(slow * 3600)}"
            made.add_row(strings.ETA_RENTED.format(gpu=name), f"$ {cheap:,.0f} - {dear:,.0f}", hours,
                         strings.ETA_RENTED_WHY, style="dim")
    return made


def remember(stage: str, seconds: float, plan: Plan, run: RunDir, machine: Machine) -> None:
    """Keeps what a finished stage taught about this machine. A damaged report teaches nothing."""
    try:
        report = DatasetReport.model_validate_json(run.data_report.read_text(encoding="utf-8"))
        spec = probe(plan.model)
        if stage == "train":
            record_training(plan, spec, report, machine, run, seconds)
        elif stage != "prepare":
            record_pace(stage, seconds, plan, spec, report, machine)
    except (OSError, ValueError, SparktuneError, json.JSONDecodeError):
        return
