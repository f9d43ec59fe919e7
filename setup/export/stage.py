"""How the export stages start and end: plan and run folder in, events and an exit code out."""

from __future__ import annotations

import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from sparktune.setup.plan.config import load_plan
from sparktune.setup.plan.errors import ExitCode, SparktuneError, UsageError
from sparktune.setup.plan.events import EventWriter
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import Plan
from sparktune.setup.plan.untrusted import printable

__all__ = ["Stage", "run_command", "run_stage"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a stage works with."""

    run: RunDir
    plan: Plan
    events: EventWriter


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def run_command(work: Callable[[], None], say: Callable[[str], None] | None = None) -> int:
    """Runs `work` and returns its exit code; a SparktuneError becomes its sentence on stderr.

    SIGTERM ends the work like Ctrl-C does, so that half-built folders are removed.

    Args:
        work: the work.
        say: also gets the sentence of a failure.
    """
    previous = signal.signal(signal.SIGTERM, _terminated)
    try:
        work()
        return ExitCode.OK
    except SparktuneError as error:
        text, code = str(error), error.exit_code
    except KeyboardInterrupt:
        text, code = "Interrupted; nothing half-written was left.", ExitCode.INTERRUPTED
    except Exception as error:
        traceback.print_exc()
        text = f"Unexpected failure ({type(error).__name__}: {error}); the traceback is in the log."
        code = ExitCode.FAILURE
    finally:
        signal.signal(signal.SIGTERM, previous)
    print(printable(text), file=sys.stderr)
    if say:
        say(text)
    return code


def run_stage(name: str, root: Path, body: Callable[[Stage], None]) -> int:
    """Runs one stage of the run whose record folder is `root`. Returns the exit code.

    Args:
        name: the stage; its events go to `root/stages/NAME.ndjson`.
        root: results/RUN, with plan.yaml in it.
        body: the stage's work.
    """
    started = time.monotonic()
    if not (root / "plan.yaml").is_file():
        return run_command(lambda: _no_run(root))
    events = EventWriter(root / "stages" / f"{name}.ndjson", name)
    events.emit("start")

    def work() -> None:
        plan = load_plan(root / "plan.yaml")
        body(Stage(run=RunDir.from_root(root, plan.output), plan=plan, events=events))

    code = run_command(work, lambda text: events.message(text, "error"))
    events.emit("end", ok=code == ExitCode.OK, seconds=round(time.monotonic() - started, 3))
    events.close()
    return code


def _no_run(root: Path) -> None:
    raise UsageError(f"--run {root} should be a run's folder with its plan.yaml; there is none. Give results/RUN.")
