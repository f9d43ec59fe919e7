"""The stage `report`: what a run was, for people (report.html) and for scripts (summary.json).

`python -m sparktune.setup.report --run results/RUN` also works on a run that failed or is not finished.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from sparktune.setup.export.stage import run_command
from sparktune.setup.plan.config import load_plan
from sparktune.setup.plan.errors import ExitCode, PreflightError, SparktuneError, UsageError
from sparktune.setup.plan.events import EventWriter, NullEvents
from sparktune.setup.plan.outfolder import write_durably
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import Plan
from sparktune.setup.replay import replay_command
from sparktune.setup.report_facts import gather, summary_of
from sparktune.setup.report_page import render

__all__ = ["main", "write_report"]


def write_report(root: Path, events: EventWriter | None = None) -> Path:
    """Writes report.html and summary.json into a run's folder, each by rename. Returns the page's path.

    Args:
        root: results/RUN; parts that are missing are left out and named in both files.
        events: where progress goes.

    Raises:
        UsageError: `root` is not a run's folder.
        PreflightError: the folder cannot be written.
    """
    events = events or NullEvents()
    if not root.is_dir() or not any((root / name).exists() for name in ("plan.yaml", "metrics.jsonl", "stages")):
        raise UsageError(f"--run {root} should be a run's folder (with its plan.yaml); it is not. Give results/RUN.")
    plan = _plan(root, events)
    run = RunDir.from_root(root, plan.output if plan else root.resolve().parent.parent / "output")
    shown = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if time.monotonic() - shown > 0.5 or done == total:
            shown = time.monotonic()
            events.progress("hash the files", done, total, "bytes")

    facts = gather(run, plan, progress)
    replay = replay_command(plan) if plan else ""
    summary = json.dumps(summary_of(facts, replay), indent=1, ensure_ascii=False) + "\n"
    # answers may hold lone surrogates or half characters: shown, never a crash
    write_durably(run.summary, summary, lossy=True, explain=_unwritable)
    write_durably(run.report, render(facts, replay), lossy=True, explain=_unwritable)
    for path in (run.summary, run.report):
        events.emit("artifact", path=str(path), bytes=path.stat().st_size)
    return run.report


def _plan(root: Path, events: EventWriter) -> Plan | None:
    try:
        return load_plan(root / "plan.yaml")
    except SparktuneError as error:
        events.message(f"The report goes on without the plan: {error}", "warning")
        return None


def _unwritable(path: Path, error: OSError) -> PreflightError:
    return PreflightError(
        f"{path} cannot be written: {error.strerror}. Free some space or make the folder writable, and write the "
        f"report again: python -m sparktune.setup.report --run {path.parent}"
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the stage. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sparktune.setup.report", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, metavar="PATH", help="results/RUN")
    root: Path = parser.parse_args(argv).run
    started = time.monotonic()
    events: EventWriter = NullEvents()

    def work() -> None:
        nonlocal events
        try:
            if root.is_dir():
                events = EventWriter(root / "stages" / "report.ndjson", "report")
                events.emit("start")
            print(write_report(root, events))
        except OSError as error:
            raise PreflightError(
                f"{error.filename or root}: {error.strerror}. Make the run's folders readable and {root} writable."
            ) from error

    code = run_command(work, lambda text: events.message(text, "error"))
    events.emit("end", ok=code == ExitCode.OK, seconds=round(time.monotonic() - started, 3))
    events.close()
    return code


if __name__ == "__main__":
    sys.exit(main())
