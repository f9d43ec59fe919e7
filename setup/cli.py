"""The commands of `./run.sh`. Data goes to standard output, everything else to standard error."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich.markup import escape

from sparktune.setup import strings
from sparktune.setup.arguments import Arguments, parse
from sparktune.setup.cards import checks_table, findings_table, plan_table, report_tables
from sparktune.setup.cluster import cluster_script, for_cluster
from sparktune.setup.machine.backends import chat_process, push_process
from sparktune.setup.machine.detect import detect_machine
from sparktune.setup.machine.doctor import failures, machine_checks, run_checks
from sparktune.setup.machine.peers import reachable_boxes
from sparktune.setup.machine.symptoms import diagnose_source, machine_symptoms
from sparktune.setup.pipeline import (
    Analysis,
    StageFailed,
    analyse,
    check_name_free,
    decide,
    resume_pipeline,
    run_pipeline,
    stop_signals,
)
from sparktune.setup.plan.config import load_plan, read_config, resolve
from sparktune.setup.plan.errors import ExitCode, SparktuneError, UsageError
from sparktune.setup.plan.memory import check_fits
from sparktune.setup.plan.models import CATALOGUE, probe
from sparktune.setup.plan.rundir import RunDir, cache_dir
from sparktune.setup.plan.schema import Plan
from sparktune.setup.plan.trainable import check_trainable
from sparktune.setup.progress import make_display
from sparktune.setup.replay import replay_command
from sparktune.setup.runs import compare, compare_table, describe, runs_in, runs_table
from sparktune.setup.runstate import EVALUATION_FIELDS, RESUME_FIELDS
from sparktune.setup.terminal import Terminal, json_text

__all__ = ["main"]

_WIDE = 240


def _console(plain: bool, stderr: bool) -> Terminal:
    """Returns a console; into a file or a pipe it writes wide lines, so that paths and reasons stay whole."""
    console = Terminal(stderr=stderr, no_color=True if plain else None)
    return console if console.is_terminal else Terminal(stderr=stderr, no_color=True, width=_WIDE)


class _Session:
    """One call of the program: what was asked for, and where output goes."""

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        self.messages = _console(arguments.plain, stderr=True)
        self.data = _console(arguments.plain, stderr=False)
        notes: list[str] = []
        self.config = read_config(arguments.config, notes) if arguments.config else {}
        for note in notes:
            self.messages.print(escape(note), style="yellow", highlight=False, soft_wrap=True)

    def plan(self) -> Plan:
        """Returns the plan as far as flags, environment and config say it."""
        return resolve(self.arguments.flags, self.config, os.environ, {})

    def print_json(self, value: Any) -> None:
        """Writes `value` on standard output."""
        print(json_text(value))


def _why_not_ask(arguments: Arguments) -> str | None:
    """Returns why nothing can be asked, or None."""
    if arguments.non_interactive:
        return strings.WHY_FLAG
    if sys.stdin is None or not sys.stdin.isatty():
        return strings.WHY_STDIN
    if not sys.stderr.isatty():
        return strings.WHY_STDERR
    return strings.WHY_CI if os.environ.get("CI") else None


def _require(plan: Plan, why: str, confirmed: bool = True) -> None:
    """Names all required answers that are missing: the data, and a word on a model of unknown architecture."""
    missing = [f"--data ({strings.HELP_DATA_MISSING})"] if plan.data is None else []
    if not confirmed and plan.model not in CATALOGUE:
        with suppress(SparktuneError):  # what else is wrong with the model, the preflight says better
            spec = probe(plan.model)
            if not spec.native:
                missing.append(f"--yes ({strings.HELP_CONFIRM.format(why=spec.native_reason)})")
    if missing:
        raise UsageError(strings.NO_TERMINAL.format(why=why, missing=", ".join(missing)))


# -- commands without a run


def _doctor(session: _Session) -> int:
    plan = session.plan()
    checks = run_checks(plan)
    if plan.peers and not failures(checks):
        from sparktune.setup.machine.peer_checks import bandwidth_check  # the docker SDK, which others do not pay for

        checks.append(bandwidth_check(plan))
    failed = failures(checks)
    if session.arguments.json_out:
        session.print_json({"ok": not failed, "checks": [c.as_json() for c in checks]})
    else:
        session.data.print(checks_table(checks))
    return ExitCode.PREFLIGHT if failed else ExitCode.OK


def _with_analysis(
    session: _Session, work: Callable[[Plan, Analysis], None], plan: Plan, analysis: Analysis | None = None
) -> int:
    """Analyses the data if that is not done yet, hands the analysis to `work`, and leaves no run behind."""
    if analysis is None:
        _require(plan, f"`{session.arguments.command}`")
        display = make_display(session.messages, session.arguments.plain)
        with stop_signals(display) as stop:
            analysis = analyse(plan, display, stop, image=session.arguments.image)
    try:
        work(plan, analysis)
    finally:
        analysis.discard()
    return ExitCode.OK


def _analyze(session: _Session) -> int:
    def show(_: Plan, analysis: Analysis) -> None:
        if session.arguments.json_out:
            session.print_json(analysis.report.model_dump(mode="json"))
        else:
            session.data.print(report_tables(analysis.report))

    return _with_analysis(session, show, session.plan())


def _plan(session: _Session) -> int:
    return _plan_of(session, session.plan(), None)


def _plan_of(session: _Session, asked: Plan, made: Analysis | None) -> int:
    """Shows the complete plan of what was asked for; nothing is run."""

    script, nodes = session.arguments.script, session.arguments.nodes

    def show(plan: Plan, analysis: Analysis) -> None:
        if script is not None:
            plan = for_cluster(plan, nodes)
        check_name_free(plan)
        plan, recommendations = decide(plan, analysis)
        check_trainable(plan, analysis.spec)
        if script is not None:  # for other machines: their memory is theirs to check
            print(cluster_script(plan, analysis.spec, script, nodes), end="")
            return
        estimate = check_fits(plan, analysis.spec, analysis.report, analysis.machine)
        if session.arguments.json_out:
            session.print_json({
                "plan": plan.model_dump(mode="json"),
                "recommendations": [r.model_dump(mode="json") for r in recommendations],
                "data": analysis.report.model_dump(mode="json"),
                "machine": analysis.machine.model_dump(mode="json"),
                "peak_gib_estimate": round(estimate.total_gib, 3),
                "replay": replay_command(plan),
            })
            return
        session.data.print(report_tables(analysis.report))
        session.data.print(plan_table(plan, recommendations, session.data.width))
        session.data.print(escape(f"memory: {estimate.describe()}"), highlight=False, soft_wrap=True)
        session.data.print(escape(strings.REPLAY.format(command=replay_command(plan))), highlight=False, soft_wrap=True)

    return _with_analysis(session, show, asked, made)


def _runs(session: _Session) -> int:
    """Lists the runs, or compares those that are named."""
    if session.arguments.names:
        found = compare([_root_of(session, name) for name in session.arguments.names])
        if session.arguments.json_out:
            session.print_json(found)
        else:
            session.data.print(compare_table(found))
        return ExitCode.OK
    rows: list[dict[str, Any]] = []
    for root in runs_in(session.plan().results):
        try:
            rows.append(describe(root))
        except (SparktuneError, ValueError) as error:
            session.messages.print(escape(f"{root}: {error}"), style="yellow", highlight=False, soft_wrap=True)
    if session.arguments.json_out:
        session.print_json(rows)
    else:
        session.data.print(runs_table(rows) if rows else strings.NO_RUNS_YET)
    return ExitCode.OK


def _diagnose(session: _Session) -> int:
    """Says what a log, a run, or (without a name) this machine's state is known for."""
    name = session.arguments.run
    found = machine_symptoms()
    if name is not None:
        found = diagnose_source(name, session.plan().results) + found
    if session.arguments.json_out:
        session.print_json([asdict(f) for f in found])
    elif found:
        session.data.print(findings_table(found))
    else:
        session.data.print(strings.NOTHING_KNOWN.format(source=name or strings.THIS_MACHINE))
    return ExitCode.OK


# -- commands on a run


def _root_of(session: _Session, name: str) -> Path:
    results = session.plan().results
    for root in (results / name, Path(name).absolute()):
        if (root / "plan.yaml").is_file():
            return root
    there = ", ".join(p.name for p in runs_in(results)) or strings.NO_RUNS
    raise UsageError(strings.RUN_UNKNOWN.format(name=name, path=results / name, runs=there))


def _run_root(session: _Session) -> Path:
    arguments = session.arguments
    if arguments.run is None:
        there = ", ".join(p.name for p in runs_in(session.plan().results)) or strings.NO_RUNS
        raise UsageError(strings.RUN_NEEDED.format(command=arguments.command, runs=there))
    return _root_of(session, arguments.run)


def _resume(session: _Session, only: str | None = None) -> int:
    arguments = session.arguments
    return resume_pipeline(
        _run_root(session), console=session.messages, plain=arguments.plain, json_out=arguments.json_out, only=only,
        backend=arguments.flags.get("backend"), image=arguments.image,
        changes={f: getattr(session.plan(), f) for f in arguments.flags if f in (*EVALUATION_FIELDS, *RESUME_FIELDS)},
    )


def _chat(session: _Session) -> int:
    root = _run_root(session)
    run = RunDir.from_root(root, load_plan(root / "plan.yaml").output)
    if not (run.merged / "config.json").is_file():
        raise UsageError(strings.CHAT_NO_MODEL.format(path=run.merged, run=run.name))
    return chat_process(run.merged)


def _push(session: _Session) -> int:
    return push_process(_run_root(session), session.arguments.push)


# -- the run itself


def _answers_file() -> Path:
    return cache_dir("answers") / "wizard.yaml"


def _saved_answers() -> dict[str, Any]:
    """Returns the answers of an interrupted wizard; a file that no longer fits the schema counts as none."""
    path = _answers_file()
    try:
        answers = read_config(path) if path.is_file() else {}
        resolve(answers, {}, {}, {})
    except UsageError:
        return {}
    return answers


def _save_answers(answers: dict[str, Any]) -> None:
    path = _answers_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(answers, allow_unicode=True), encoding="utf-8")


def _wizard(session: _Session) -> tuple[Plan, Analysis] | None:
    """Asks for the plan. Returns it with the analysis of its data, or None when the user left (answers are kept)."""
    # questionary takes a third of a second to import, which only the wizard pays
    from sparktune.setup.ask import Asker, PlainAsker, TerminalAsker
    from sparktune.setup.outlook import outlook
    from sparktune.setup.preview import previews
    from sparktune.setup.wizard import LeftWizard, Wizard

    arguments = session.arguments
    display = make_display(session.messages, arguments.plain)
    plain = arguments.plain or session.messages.is_dumb_terminal
    asker: Asker = PlainAsker() if plain else TerminalAsker(console=session.messages)

    def read(plan: Plan) -> Analysis:
        with stop_signals(display) as stop:
            return analyse(plan, display, stop, image=arguments.image)

    wizard = Wizard(
        asker=asker, flags=arguments.flags, config=session.config, env=os.environ, analyse=read, saved=_saved_answers(),
        machine=lambda plan: detect_machine(plan.device, plan.output), checks=machine_checks, previews=previews,
        outlook=outlook, boxes=reachable_boxes,
    )
    try:
        wizard.run()
    except (KeyboardInterrupt, LeftWizard, StageFailed) as left:
        _save_answers({**wizard.saved, **wizard.answers})
        session.messages.print(strings.ANSWERS_SAVED, highlight=False)
        if isinstance(left, StageFailed):
            raise
        return None
    _answers_file().unlink(missing_ok=True)
    assert wizard.analysis is not None
    return wizard.asked(), wizard.analysis


def _run(session: _Session) -> int:
    arguments = session.arguments
    if arguments.demo:
        from sparktune.setup.demo import run_demo

        return run_demo(session.plan(), console=session.messages, plain=arguments.plain, json_out=arguments.json_out)
    plan, analysis = session.plan(), None
    why = _why_not_ask(arguments)
    if why is None and not (arguments.yes and plan.data is not None):
        answered = _wizard(session)
        if answered is None:
            return ExitCode.INTERRUPTED
        plan, analysis = answered
    else:
        _require(plan, why or "--yes", confirmed=arguments.yes or arguments.dry_run)
    if arguments.dry_run:
        return _plan_of(session, plan, analysis)
    return run_pipeline(
        plan, console=session.messages, plain=arguments.plain, json_out=arguments.json_out, analysis=analysis,
        image=arguments.image,
    )


_COMMANDS: dict[str, Callable[[_Session], int]] = {
    "run": _run, "doctor": _doctor, "analyze": _analyze, "plan": _plan, "runs": _runs, "diagnose": _diagnose,
    "resume": _resume, "evaluate": lambda session: _resume(session, "evaluate"), "chat": _chat, "push": _push,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code; never shows a traceback for what the user can repair."""
    errors = Terminal(stderr=True)
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        return int(_COMMANDS[arguments.command](_Session(arguments)))
    except StageFailed as failure:
        return failure.code  # what there is to say was said when the stage ended
    except SparktuneError as error:
        errors.print(escape(str(error)), style="bold red", highlight=False, soft_wrap=True)
        return int(error.exit_code)
    except KeyboardInterrupt:
        errors.print(strings.INTERRUPTED)
        return int(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; nothing more to say to it
        return int(ExitCode.FAILURE)
    except Exception as error:
        traceback.print_exc()
        text = strings.FAILED_UNEXPECTEDLY.format(kind=type(error).__name__, text=error)
        errors.print(escape(text), style="bold red", highlight=False, soft_wrap=True)
        return int(ExitCode.FAILURE)


if __name__ == "__main__":
    sys.exit(main())
