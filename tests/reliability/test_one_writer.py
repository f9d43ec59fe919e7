"""Runs started at once on one name: one gets it, the others are told why."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sparktune.setup import pipeline
from sparktune.setup.plan.errors import PreflightError, UsageError
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import Plan
from sparktune.setup.runstate import RunLock
from sparktune.training.runs import Request, open_run

RUNNERS = 8


def at_once(start: Callable[[int], object]) -> tuple[list[object], list[BaseException]]:
    """Calls `start` from as many threads as there are runners, all at the same moment."""
    barrier, won, lost = threading.Barrier(RUNNERS), list[object](), list[BaseException]()

    def run(number: int) -> None:
        barrier.wait()
        try:
            won.append(start(number))
        except (UsageError, PreflightError) as error:
            lost.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(RUNNERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return won, lost


def test_train_py(tmp_path: Path) -> None:
    plan = Plan(name="same", results=tmp_path, output=tmp_path / "output")
    with ExitStack() as held:
        won, lost = at_once(lambda _: open_run(Request(plan=plan, existing=None, checkpoint=None, as_stage=False),
                                               plan, held))
        assert len(won) == 1
        assert [str(e).startswith("There is already a run named same") for e in lost] == [True] * (RUNNERS - 1)
        same = Request(plan=plan, existing=cast("RunDir", won[0]), checkpoint=None, as_stage=True)
        with pytest.raises(PreflightError, match="Another process is training the run same"):
            open_run(same, plan, held)


def test_the_pipeline(tmp_path: Path) -> None:
    plan = Plan(name="same", results=tmp_path, output=tmp_path / "output")
    analyses = []
    for number in range(RUNNERS):
        run = RunDir(name=f".pending-{number}", results_root=tmp_path, output_root=tmp_path / "output")
        run.data_report.parent.mkdir(parents=True)
        run.data_report.write_text(str(number))
        analyses.append(SimpleNamespace(run=run, input_hash="x", seconds=0.0))
    won, lost = at_once(lambda number: pipeline._name_run(plan, cast("Any", analyses[number])))
    assert len(won) == 1
    assert all("same" in str(error) and isinstance(error, UsageError) for error in lost)
    assert len(lost) == RUNNERS - 1
    assert (tmp_path / "same" / "plan.yaml").is_file()
    assert len(list(tmp_path.glob(".pending-*"))) == RUNNERS - 1


def test_a_second_pipeline_on_a_run_is_told_and_a_dead_one_bars_no_one(tmp_path: Path) -> None:
    run = RunDir(name="same", results_root=tmp_path, output_root=tmp_path / "output")
    run.root.mkdir()
    code = (
        "import sys\nfrom pathlib import Path\nfrom sparktune.setup.plan.rundir import RunDir\n"
        "from sparktune.setup.runstate import RunLock\n"
        "lock = RunLock(RunDir.from_root(Path(sys.argv[1]), Path('output')))\nprint('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(run.root)], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(PreflightError, match="Another process is working on the run same"):
            RunLock(run)
    finally:
        holder.kill()
        holder.communicate()
    RunLock(run).close()
