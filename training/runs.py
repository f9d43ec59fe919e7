"""Which run a command line means: a new one, the one whose plan.yaml was given, or the one that holds a checkpoint."""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparktune.setup.plan.config import load_plan, read_config, resolve
from sparktune.setup.plan.errors import PreflightError, UsageError
from sparktune.setup.plan.rundir import RunDir, check_run_name
from sparktune.setup.plan.schema import Plan
from sparktune.training.checkpoint import storage_error

__all__ = ["Request", "open_request", "open_run"]

_CHECKPOINT = re.compile(r"checkpoint-\d+")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for."""

    plan: Plan
    existing: RunDir | None
    """The run to go on with; None for a new one."""
    checkpoint: Path | None
    """The checkpoint the user named; None takes the newest undamaged one of an existing run."""
    as_stage: bool
    """Started on a run's own plan.yaml: whoever did that keeps log.txt."""
    notes: tuple[str, ...] = ()
    """Remarks about the config file."""


def open_request(flags: Mapping[str, Any], config: Path | None, env: Mapping[str, str]) -> Request:
    """Reads flags, environment, config file and, when resuming, the run's own plan.

    Args:
        flags: fields given on the command line.
        config: what --config names: a config file, or the plan.yaml of a run, which is then continued.
        env: the environment.

    Raises:
        UsageError: a value is wrong, the data is missing, or the run's name is taken.
    """
    flags = dict(flags)
    resume = flags.pop("resume_from_checkpoint", None)
    own_plan = config is not None and _is_plan_of_run(config)
    if resume is not None:
        return _resumed(Path(os.path.abspath(resume)), flags, config if not own_plan else None, as_stage=own_plan)
    if own_plan:
        assert config is not None
        plan = load_plan(config)
        if flags:
            plan = _with_origins(resolve(flags, {}, {}, plan.model_dump(mode="json")), plan)
        run = RunDir.from_root(config.resolve().parent, plan.output)
        return Request(plan=_complete(plan, run), existing=run, checkpoint=None, as_stage=True)
    notes: list[str] = []
    plan = resolve(flags, read_config(config, notes) if config else {}, env, {})
    if plan.resume_from_checkpoint is not None:
        return _resumed(plan.resume_from_checkpoint, flags, config, as_stage=False)
    if plan.data is None:
        raise UsageError("--train-data is missing. Give a JSONL file with one example a line.")
    if plan.name is not None:
        _refuse_taken(_new_run(plan, plan.name))
    return Request(plan=plan, existing=None, checkpoint=None, as_stage=False, notes=tuple(notes))


def _is_plan_of_run(config: Path) -> bool:
    """A file named plan.yaml that carries the name of its folder is the plan of a run that exists."""
    if config.name != "plan.yaml" or not config.is_file():
        return False
    return read_config(config).get("name") == config.resolve().parent.name


def _with_origins(changed: Plan, saved: Plan) -> Plan:
    """What the flags left alone keeps the origin it had, so that open values stay open."""
    origins = {
        field: "flag" if origin == "flag" else saved.origins.get(field, "saved")
        for field, origin in changed.origins.items()
    }
    return changed.model_copy(update={"origins": origins, "kernels": saved.kernels})


def _complete(plan: Plan, run: RunDir) -> Plan:
    if plan.name not in (None, run.name):
        raise UsageError(f"--name {plan.name} cannot rename the run {run.name} while it is resumed. Leave --name out.")
    if plan.data is None:
        raise UsageError(f"{run.plan} names no training data. Give --train-data.")
    return plan.model_copy(update={"name": run.name, "results": run.results_root, "resume_from_checkpoint": None})


def _resumed(path: Path, flags: dict[str, Any], config: Path | None, *, as_stage: bool) -> Request:
    """A checkpoint folder, or a run folder for its newest checkpoint. The run's own plan fills what is not given."""
    if not path.is_dir():
        raise UsageError(f"--resume-from-checkpoint {path}: there is no such folder.")
    named = bool(_CHECKPOINT.fullmatch(path.name))
    root = path.parent if named else path
    if not (root / "plan.yaml").is_file():
        raise UsageError(
            f"--resume-from-checkpoint {path}: expected a folder like results/RUN/checkpoint-200 inside its run; "
            f"{root} holds no plan.yaml."
        )
    saved = load_plan(root / "plan.yaml")
    given = read_config(config) if config else {}
    flags.pop("results", None)  # the run stays where it is
    plan = resolve(flags, given, {}, saved.model_dump(mode="json"))
    if not given:
        plan = _with_origins(plan, saved)
    run = RunDir.from_root(root, plan.output)
    return Request(
        plan=_complete(plan, run), existing=run, checkpoint=path if named else None, as_stage=as_stage,
    )


def _new_run(plan: Plan, name: str) -> RunDir:
    return RunDir(name=check_run_name(name), results_root=plan.results, output_root=plan.output)


def _refuse_taken(run: RunDir) -> None:
    if run.root.exists():
        raise UsageError(
            f"There is already a run named {run.name} ({run.root}). Choose another --name, or go on with that one: "
            f"python train.py --resume-from-checkpoint {run.root}"
        )


def open_run(request: Request, plan: Plan, held: ExitStack) -> RunDir:
    """Returns the run, its folder made if it is new and locked against a second process.

    Args:
        request: what the command line asks for.
        plan: complete; without a name it gets MODE-YYYY-MM-DD-HHMMSS.
        held: lets go of the lock when it closes.

    Raises:
        UsageError: the name is taken.
        PreflightError: the folder cannot be made, or another process trains in it.
    """
    run = request.existing
    if run is None:
        run = _new_run(plan, plan.name or f"{plan.mode}-{time.strftime('%Y-%m-%d-%H%M%S')}")
        try:
            run.results_root.mkdir(parents=True, exist_ok=True)
            run.root.mkdir()
        except FileExistsError:
            _refuse_taken(run)
            raise
        except OSError as error:
            raise storage_error(error, f"the run folder {run.root}") from error
    _lock(run, held)
    return run


def _lock(run: RunDir, held: ExitStack) -> None:
    """Takes the run for this process; the lock goes with the process, however it ends."""
    try:
        handle = os.open(run.root / ".train.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise storage_error(error, f"the run folder {run.root}") from error
    held.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise PreflightError(
            f"Another process is training the run {run.name}. Wait for it, or stop it first (Ctrl-C there)."
        ) from None
