"""Kills whole runs at random moments of every stage, resumes them, and compares every bit with an uninterrupted run.

    python -m sparktune.lab.kill_matrix --trials 200 --seed 1 --workers 2

One trial: a run of the demo's tiny model (LoRA with dropout, MTP head trained, GGUF f32 and bf16) starts from the state
before a stage, is interrupted in that stage, is looked at, is resumed with the command that a user would type, and must
end with the files of the uninterrupted run. Interruptions: kill -9 of everything, of the stage alone, of the parent
alone; kill -9 before the n-th operation on a file; SIGTERM; SIGINT once and twice; the terminal closed.

Processes are forked from one that has imported everything (lab/forked.py); `--by-exec` also makes the uninterrupted run
as users start it and compares it with the forked one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from sparktune.lab.forked import preload
from sparktune.lab.kill_trial import INTERRUPTIONS, STAGES_KILLED, Outcome, Trial, run_trial
from sparktune.lab.kill_world import World, make_world
from sparktune.lab.reliability import reliability_row
from sparktune.lab.table import append_rows

__all__ = ["draw", "main", "run_matrix"]


def draw(count: int, seed: int, stages: Sequence[str] = STAGES_KILLED) -> list[Trial]:
    """Returns `count` trials: every stage with every interruption before any twice; order and moments by the seed."""
    chance = random.Random(seed)
    pairs = [(stage, how) for how in INTERRUPTIONS for stage in stages]
    trials: list[Trial] = []
    while len(trials) < count:
        chance.shuffle(pairs)
        trials += [
            Trial(number=len(trials) + i, stage=stage, how=how, moment=chance.random(), gap_s=chance.random() * 0.4)
            for i, (stage, how) in enumerate(pairs)
        ]
    return trials[:count]


def run_matrix(world: World, trials: list[Trial], workers: int, log: Path | None = None) -> list[Outcome]:
    """Runs the trials, `workers` at a time, and says each outcome as it comes."""
    outcomes: list[Outcome] = []
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        waiting = {pool.submit(run_trial, world, trial): trial for trial in trials}
        for done in as_completed(waiting):
            outcome = done.result()
            outcomes.append(outcome)
            print(f"[{len(outcomes)}/{len(trials)}] {outcome.line()}", flush=True)
            if log is not None:
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**asdict(waiting[done]), **asdict(outcome)}) + "\n")
    return sorted(outcomes, key=lambda outcome: outcome.trial.number)


def summary(outcomes: list[Outcome]) -> list[str]:
    """Returns the matrix in words: trials and failures by stage and by interruption, and how long a checkpoint took."""
    lines = []
    for title, key in (("stage", "stage"), ("interruption", "how")):
        total = Counter(getattr(o.trial, key) for o in outcomes)
        failed = Counter(getattr(o.trial, key) for o in outcomes if o.wrong)
        lines.append(f"{title}: " + ", ".join(f"{n} {total[n]} ({failed[n]} failed)" for n in sorted(total)))
    ended = Counter(str(o.code) for o in outcomes)
    lines.append("exit codes of the interrupted runs: " + ", ".join(f"{c}: {n}" for c, n in sorted(ended.items())))
    took = [o.stop_s for o in outcomes if o.stop_s is not None]
    if took:
        lines.append(f"SIGTERM to checkpoint and end: {len(took)} times, {max(took):.2f} s at most (limit 10)")
    return lines


def _row(outcomes: list[Outcome], seconds: float, arguments: list[str]) -> dict[str, Any]:
    took = [o.stop_s for o in outcomes if o.stop_s is not None]
    where = Counter(o.trial.stage for o in outcomes)
    found = "; ".join([
        ", ".join(f"{s} {n}" for s, n in sorted(where.items())),
        f"SIGTERM to checkpoint and end at most {max(took):.2f} s of {len(took)}" if took else "no SIGTERM in training",
    ])
    return reliability_row("kill matrix", "sparktune.lab.kill_matrix", arguments, trials=len(outcomes),
                           failures=sum(bool(o.wrong) for o in outcomes), seconds=seconds, found=found)


def main(argv: list[str] | None = None) -> int:
    """Runs the matrix. Returns 0 when nothing failed, else 1."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m sparktune.lab.kill_matrix", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1)))
    parser.add_argument("--only", type=int, action="append", help="run trial N of the drawing alone; repeatable")
    parser.add_argument("--work", type=Path, help="folder to work in; kept (default: a temporary one)")
    parser.add_argument("--small", action="store_true", help="no GGUF, no answers, the base's MTP head: 3 s a trial")
    parser.add_argument("--by-exec", action="store_true", help="also compare with a run of real processes")
    parser.add_argument("--out", type=Path, help="append a row to this CSV")
    args = parser.parse_args(arguments)
    preload()
    folder = args.work or Path(tempfile.mkdtemp(prefix="sparktune-kill-"))
    started = time.monotonic()
    try:
        world = make_world(folder.absolute(), size="small" if args.small else "whole", by_exec=args.by_exec)
        print(f"The uninterrupted run: {world.describe()}", flush=True)
        trials = draw(args.trials, args.seed, [s for s in STAGES_KILLED if s in {*world.stages, "checkpoint"}])
        trials = [t for t in trials if args.only is None or t.number in args.only]
        outcomes = run_matrix(world, trials, args.workers, folder / "outcomes.ndjson" if args.work else None)
    finally:
        if args.work is None:
            shutil.rmtree(folder, ignore_errors=True)
    failed = [o for o in outcomes if o.wrong]
    print(*summary(outcomes), sep="\n")
    print(f"{len(outcomes)} trials, {len(failed)} failed, seed {args.seed}, {time.monotonic() - started:.0f} s")
    for outcome in failed:
        print(outcome.line(), *outcome.wrong, sep="\n    ")
    if args.out is not None:
        append_rows(args.out, [_row(outcomes, time.monotonic() - started, arguments)])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
