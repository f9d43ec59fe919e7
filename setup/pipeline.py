"""Runs a plan's stages as processes, one after the other: state, events, resume, and what a failure says.

The analysis (stage prepare) runs first, in a folder without a name, because name and recommendations follow from the
data; the folder takes the run's name by rename when the plan is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from sparktune.setup import strings
from sparktune.setup.build_progress import BuildDisplay
from sparktune.setup.cards import next_steps, plan_table, report_tables, result_table
from sparktune.setup.estimate import eta_table, read_calibration, remember, run_eta, wants_calibration
from sparktune.setup.machine.backends import Backend, StopSignals, choose_backend
from sparktune.setup.machine.check import Check, failures
from sparktune.setup.machine.detect import detect_machine
from sparktune.setup.machine.docker_backend import DockerBackend, ImageOptions
from sparktune.setup.machine.doctor import machine_checks, run_checks
from sparktune.setup.plan.config import load_plan, save_plan, settle_peers
from sparktune.setup.plan.errors import ExitCode, PreflightError, SparktuneError, UsageError
from sparktune.setup.plan.exports import check_exports
from sparktune.setup.plan.memory import check_fits
from sparktune.setup.plan.models import probe
from sparktune.setup.plan.outfolder import remove_unfinished
from sparktune.setup.plan.recommend import apply, recommend
from sparktune.setup.plan.rundir import RunDir, check_run_name
from sparktune.setup.plan.schema import DatasetReport, Machine, ModelSpec, Plan, Recommendation
from sparktune.setup.plan.trainable import check_trainable, refuse_ranks
from sparktune.setup.plan.untrusted import printable
from sparktune.setup.progress import Display, PlainDisplay, make_display
from sparktune.setup.replay import replay_command
from sparktune.setup.runstate import RunLock, RunState, fingerprint, outputs_of, stage_input, stages_of
from sparktune.setup.stages import StageFailed, StageRunner
from sparktune.setup.terminal import Terminal, json_text
from sparktune.setup.trial import show_trial

__all__ = [
    "Analysis", "StageFailed", "analyse", "check_name_free", "decide", "resume_pipeline", "run_pipeline",
    "stop_signals",
]

_WIDE = 240
_PENDING = ".pending-"


@dataclass(kw_only=True)
class Analysis:
    """What is known once the data was read: the base of every recommendation. Its folder has no name yet."""

    run: RunDir
    spec: ModelSpec
    report: DatasetReport
    machine: Machine
    lock: RunLock
    input_hash: str
    seconds: float

    def discard(self) -> None:
        """Removes the unnamed folder; the token cache stays."""
        self.lock.close()
        _remove_pending(self.run.root)


def check_name_free(plan: Plan) -> None:
    """Refuses a name that a run already has.

    Raises:
        UsageError: the name is taken or cannot be a folder's.
    """
    if plan.name is None:
        return
    run = RunDir(name=check_run_name(plan.name), results_root=plan.results, output_root=plan.output)
    for path in (run.root, run.merged, run.mtp("trained"), run.mtp("default"), run.gguf):
        if path.exists():
            raise UsageError(strings.NAME_TAKEN.format(name=plan.name, path=path))


def _make_ready(backend: Backend, display: Display, stop: StopSignals) -> None:
    """Builds the image where the stages need one that is not there yet."""
    if isinstance(backend, DockerBackend):
        with BuildDisplay(display.console, isinstance(display, PlainDisplay)) as shown:
            backend.prepare(shown.event, stop)


def preflight(plan: Plan, display: Display, checks: Callable[[Plan], list[Check]] = run_checks) -> None:
    """Runs the doctor's checks on `plan`; a run that goes on needs those of the machine alone.

    Raises:
        StageFailed: a check failed; every failed one has been shown.
    """
    found = checks(plan)
    for check in found:
        if check.status == "warning":
            display.say(strings.check_line(check.name, check.seen, check.fix), "warning")
    failed = failures(found)
    for check in failed:
        display.say(strings.check_line(check.name, check.seen, check.fix), "error")
    if failed:
        codes = {c.exit_code for c in failed}
        raise StageFailed("preflight", codes.pop() if len(codes) == 1 else int(ExitCode.PREFLIGHT))


def _remove_pending(folder: Path) -> None:
    """Removes an unnamed folder, and the results folder too when nothing else is in it."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.parent.rmdir()


def _sweep(results: Path) -> None:
    """Removes unnamed folders that killed processes left; a live one holds its lock."""
    for folder in results.glob(_PENDING + "*"):
        if folder.is_symlink():  # none of ours; what it leads to is not to be touched
            continue
        try:
            RunLock(RunDir.from_root(folder, results)).close()
        except PreflightError:
            continue
        shutil.rmtree(folder, ignore_errors=True)


def analyse(
    plan: Plan, display: Display, stop: StopSignals, count: int = 1, image: ImageOptions | None = None
) -> Analysis:
    """Checks the machine, reads every row, and describes the data.

    Args:
        plan: at least `model` and `data` must be set.
        display: shows progress.
        stop: signals.
        count: stages of the whole run, for the display.
        image: what this start wants of the Docker image.

    Raises:
        StageFailed: the preflight or the stage failed.
        SparktuneError: the model cannot be read.
    """
    preflight(plan, display)
    backend, reason = choose_backend(plan, image)
    display.event({"kind": "choice", "what": "backend", "chosen": backend.name, "reason": reason})
    _make_ready(backend, display, stop)
    try:
        plan.results.mkdir(parents=True, exist_ok=True)
        _sweep(plan.results)
        root = Path(tempfile.mkdtemp(prefix=_PENDING, dir=plan.results))
    except OSError as error:
        raise PreflightError(strings.UNWRITABLE.format(path=plan.results, why=error.strerror)) from error
    root.chmod(0o755)
    run = RunDir.from_root(root, plan.output)
    lock = RunLock(run)
    try:
        save_plan(plan, run.plan)
        input_hash = stage_input("prepare", plan, [])
        seconds = StageRunner(plan, run, backend, display, stop, lock).stage("prepare", 1, count)
        report = DatasetReport.model_validate_json(run.data_report.read_text(encoding="utf-8"))
        analysis = Analysis(
            run=run, spec=probe(plan.model), report=report, machine=detect_machine(plan.device, plan.output),
            lock=lock, input_hash=input_hash, seconds=seconds,
        )
    except BaseException:
        lock.close()
        _remove_pending(root)
        raise
    return analysis


def decide(plan: Plan, analysis: Analysis) -> tuple[Plan, list[Recommendation]]:
    """Returns the plan with every open value recommended, and the recommendations with their reasons."""
    recommendations = recommend(plan, analysis.spec, analysis.report, analysis.machine)
    return apply(plan, recommendations), recommendations


def _name_run(plan: Plan, analysis: Analysis) -> tuple[Plan, RunDir]:
    """Gives the analysed folder the run's name, and the state that its first stage earned."""
    if plan.name is None:
        plan = plan.model_copy(update={"name": f"{plan.mode}-{time.strftime('%Y-%m-%d-%H%M%S')}"})
    check_name_free(plan)
    run = RunDir(name=str(plan.name), results_root=plan.results, output_root=plan.output)
    try:
        os.rename(analysis.run.root, run.root)
    except OSError as error:
        raise UsageError(strings.NAME_TAKEN.format(name=plan.name, path=run.root)) from error
    save_plan(plan, run.plan)
    output_hash = fingerprint(outputs_of("prepare", run, plan))
    RunState(run).finish("prepare", analysis.input_hash, output_hash, analysis.seconds)
    return plan, run


@contextmanager
def stop_signals(display: Display) -> Iterator[StopSignals]:
    with StopSignals(lambda: display.say(strings.STOPPING, "warning")) as stop:
        yield stop


def run_pipeline(
    plan: Plan, *, console: Console, plain: bool = False, json_out: bool = False, card: bool = True,
    analysis: Analysis | None = None, image: ImageOptions | None = None,
) -> int:
    """Takes a plan through every stage.

    Args:
        plan: `data` must be set; open values are recommended from the data.
        console: of standard error; takes everything but the result.
        plain: no bars.
        json_out: print summary.json on standard output at the end instead of the result card.
        card: print the result at all; a caller that makes several runs prints its own.
        analysis: an analysis already made for this plan's data (and shown); it is used up.
        image: what this start wants of the Docker image; an analysis already made has rebuilt it.

    Returns:
        The exit code.
    """
    display = make_display(console, plain)
    count = len(stages_of(plan))
    try:
        check_name_free(plan)
        with stop_signals(display) as stop:
            shown = analysis is not None
            analysis = analysis or analyse(plan, display, stop, count, image)
            try:
                plan, recommendations = decide(plan, analysis)
                check_trainable(plan, analysis.spec)
                check_fits(plan, analysis.spec, analysis.report, analysis.machine)
                plan, run = _name_run(plan, analysis)
            except BaseException:
                analysis.discard()
                raise
            with analysis.lock as lock:
                if not shown:
                    console.print(report_tables(analysis.report))
                console.print(plan_table(plan, recommendations, console.width))
                display.say(strings.RUN_BEGINS.format(name=run.name, folder=run.root))
                display.say(strings.REPLAY.format(command=replay_command(plan)))
                later = image.for_later() if image else None
                _announce_time(plan, run, analysis, display, stop, later)
                _run_stages(plan, run, lock, display, stop, image=later)
            if card:
                show_result(plan, run, json_out)
            return ExitCode.OK
    except StageFailed as failure:
        return failure.code
    except SparktuneError as error:
        display.say(str(error), "error")
        return error.exit_code


def _announce_time(
    plan: Plan, run: RunDir, analysis: Analysis, display: Display, stop: StopSignals, image: ImageOptions | None
) -> None:
    """Says what the run will take; where that is worth it, after some of its steps were timed here.

    Raises:
        StageFailed: the steps that were timed do not fit the memory, or the user stopped them.
    """
    spec, report, machine = analysis.spec, analysis.report, analysis.machine
    eta = run_eta(plan, spec, report, machine)
    display.console.print(eta_table(eta, plan, spec, report))
    if not wants_calibration(plan, eta):
        if plan.calibrate == "yes":
            display.say(strings.CALIBRATION_ALONE, "warning")
        return
    display.say(strings.CALIBRATING)
    backend, _ = choose_backend(plan, image)
    _make_ready(backend, display, stop)
    try:
        StageRunner(plan, run, backend, display, stop, analysis.lock).stage("calibrate", 1, 1)
    except StageFailed as failure:
        if stop.count or failure.code in (ExitCode.MEMORY, ExitCode.STOPPED, ExitCode.INTERRUPTED):
            _how_to_go_on(display, run, failure)
            raise
        display.say(strings.CALIBRATION_FAILED, "warning")
        return
    eta = run_eta(plan, spec, report, machine, read_calibration(run.root))
    display.console.print(eta_table(eta, plan, spec, report))


def resume_pipeline(
    root: Path, *, console: Console, plain: bool = False, json_out: bool = False, only: str | None = None,
    backend: Literal["auto", "docker", "local"] | None = None, image: ImageOptions | None = None,
    changes: Mapping[str, Any] | None = None,
) -> int:
    """Goes on with a run: finished stages whose inputs and outputs are unchanged are skipped.

    Args:
        root: results/RUN.
        console: of standard error.
        plain: no bars.
        json_out: see `run_pipeline`.
        only: run this stage alone, even if it is done (and the report after it).
        backend: where the rest runs; where the plan says when left out.
        image: what this start wants of the Docker image.
        changes: fields of the plan that this start gives anew, of runstate's EVALUATION_FIELDS and RESUME_FIELDS.

    Returns:
        The exit code.
    """
    display = make_display(console, plain)
    try:
        plan = load_plan(root / "plan.yaml")
        if backend is not None:
            plan = plan.model_copy(update={"backend": backend})
        if changes:
            origins = {**plan.origins, **dict.fromkeys([*changes, *(["backend"] if backend else [])], "flag")}
            anew = {"ranks": 0} if {"gpus", "peers"} & set(changes) else {}
            plan = Plan.model_validate({**plan.model_dump(), **changes, **anew, "origins": origins})
            if "peers" in changes:
                if backend != "local":  # what the plan says of it was said for this machine alone
                    plan.backend = "docker" if plan.peers else plan.backend
                settle_peers(plan)
            refuse_ranks(plan, plan.processes)
        run = RunDir.from_root(root, plan.output)
        preflight(_for_those_needed(plan, run, only), display, machine_checks)
        with RunLock(run) as lock, stop_signals(display) as stop:
            remove_unfinished(run.root, run.merged, run.mtp("trained"), run.mtp("default"), run.gguf)
            if changes:
                # before the plan keeps what no resume could do; the folder may have moved since the plan was written
                check_exports(plan.model_copy(update={"results": run.results_root}))
                save_plan(plan, run.plan)
            _run_stages(plan, run, lock, display, stop, only, image)
        show_result(plan, run, json_out)
        return ExitCode.OK
    except StageFailed as failure:
        return failure.code
    except SparktuneError as error:
        display.say(str(error), "error")
        return error.exit_code


def show_result(plan: Plan, run: RunDir, json_out: bool) -> None:
    """Prints the result on standard output: summary.json as it is, or the result card."""
    if json_out:
        print(json_text(json.loads(run.summary.read_text(encoding="utf-8"))))
        return
    console: Console = Terminal()
    if not console.is_terminal:
        console = Terminal(width=_WIDE)  # a file or a pipe: paths stay whole
    if plan.trial:
        show_trial(plan, run, console)
        return
    console.print(result_table(plan, run))
    # commands are printed as they are, never folded: they are there to be copied
    print(printable(strings.REPLAY.format(command=replay_command(plan))))
    print(strings.NEXT_TITLE, *map(printable, next_steps(plan, run)), sep="\n  ")


def _for_those_needed(plan: Plan, run: RunDir, only: str | None) -> Plan:
    """Returns the plan without other machines where nothing is trained: they may be off, or somebody else's."""
    trains = only == "train" if only else not _is_trained(plan, run)
    return plan if trains or not plan.peers else plan.model_copy(update={"peers": []})


def _is_trained(plan: Plan, run: RunDir) -> bool:
    """Says whether training and what it stands on are done and unchanged, as `_run_stages` will find them."""
    state = RunState(run)
    before: list[str] = []
    for stage in ("prepare", "train"):
        output_hash = fingerprint(outputs_of(stage, run, plan))
        if output_hash is None or not state.done(stage, stage_input(stage, plan, before), output_hash):
            return False
        before.append(output_hash)
    return True


def _run_stages(
    plan: Plan, run: RunDir, lock: RunLock, display: Display, stop: StopSignals, only: str | None = None,
    image: ImageOptions | None = None,
) -> None:
    backend, _ = choose_backend(_for_those_needed(plan, run, only), image)
    _make_ready(backend, display, stop)
    state, stages = RunState(run), stages_of(plan)
    machine = detect_machine(plan.device, plan.output)
    display.budget_gib = machine.memory_gib
    runner = StageRunner(plan, run, backend, display, stop, lock)
    before: list[str] = []
    for number, stage in enumerate(stages, 1):
        input_hash = stage_input(stage, plan, before)
        output_hash = fingerprint(outputs_of(stage, run, plan))
        wanted = stage in (only, "report") if only else not state.done(stage, input_hash, output_hash)
        if not wanted:
            if output_hash is None:
                raise UsageError(strings.NOT_FINISHED.format(stage=stage, run=run.name))
        else:
            state.begin(stage)
            try:
                seconds = runner.stage(stage, number, len(stages))
            except StageFailed as failure:
                _how_to_go_on(display, run, failure)
                raise
            output_hash = fingerprint(outputs_of(stage, run, plan))
            if output_hash is None:
                missing = next(p for p in outputs_of(stage, run, plan) if not p.exists())
                raise SparktuneError(strings.NO_OUTPUT.format(stage=stage, path=missing, log=run.log))
            plan = load_plan(run.plan)  # training writes what it decided itself: kernels, recompute policy
            state.finish(stage, stage_input(stage, plan, before), output_hash, seconds)
            remember(stage, seconds, plan, run, machine)
            if stop.count and stage != stages[-1]:
                between = StageFailed(stage, int(ExitCode.INTERRUPTED))
                _how_to_go_on(display, run, between)
                raise between
        before.append(output_hash)


def _how_to_go_on(display: Display, run: RunDir, failure: StageFailed) -> None:
    stopped = failure.code in (ExitCode.STOPPED, ExitCode.INTERRUPTED)
    text = strings.STOPPED_AT if stopped else strings.FAILED_AT
    command = strings.run_command("resume", run)
    display.say(text.format(stage=failure.stage, resume=command), "warning" if stopped else "error")
