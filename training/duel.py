"""Both engines race over the user's own data where nobody has measured them on this chip: 20 steps each, then the run.

Asked for by --engine-duel. Each engine trains in a process of its own (Unsloth patches what it meets), with the user's
command line, into a folder that is thrown away; the speeds are kept, so a chip races once a model size and method.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from sparktune.setup.plan.engines import EngineName
from sparktune.setup.plan.outfolder import write_durably
from sparktune.setup.plan.rundir import cache_dir
from sparktune.setup.plan.schema import Machine, ModelSpec
from sparktune.setup.plan.speeds import Speed, chip_of

__all__ = ["STEPS", "known_speeds", "race"]

STEPS = 20
_COUNTED = 10
"""The last steps count: the first ones compile."""
_LIMIT_S = 1800


def _book() -> Path:
    return cache_dir("engines") / "duels.json"


def known_speeds() -> list[Speed]:
    """Returns what earlier duels on this machine measured; a file that cannot be read counts as none."""
    try:
        return [Speed.model_validate(row) for row in json.loads(_book().read_text(encoding="utf-8"))]
    except (OSError, ValueError):
        return []


def _train(script: Path, words: Sequence[str], engine: EngineName, folder: Path) -> float | None:
    """Trains STEPS steps with `engine`; returns the median tokens a second, None where it did not get so far."""
    own = ["--engine", engine, "--no-engine-duel", "--max-steps", str(STEPS), "--save-steps", "1000000",
           "--eval-steps", "1000000", "--no-tensorboard", "--name", engine, "--results", str(folder / "results"),
           "--output", str(folder / "output")]
    env = {k: v for k, v in os.environ.items() if not k.startswith("SPARKTUNE_")}
    with (folder / f"{engine}.log").open("w") as log:
        try:
            subprocess.run(
                [sys.executable, str(script), *words, *own], stdout=log, stderr=log, env=env, timeout=_LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return None
    metrics = folder / "results" / engine / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    speeds = sorted(float(row["tok_per_s"]) for row in rows[-_COUNTED:] if "tok_per_s" in row)
    return speeds[len(speeds) // 2] if len(rows) >= STEPS and speeds else None


def race(
    script: Path, words: Sequence[str], spec: ModelSpec, machine: Machine, mode: str, say: Callable[[str], None]
) -> list[Speed]:
    """Races both engines and returns (and keeps) their speeds; an engine that did not finish has none.

    Args:
        script: train.py.
        words: the user's command line.
        spec: the model.
        machine: with the GPU's name.
        mode: lora or full.
        say: tells the user what happens.
    """
    found: list[Speed] = []
    with tempfile.TemporaryDirectory(prefix="sparktune-duel-") as private:
        for engine in ("native", "unsloth"):
            say(f"Engine duel: {STEPS} steps with the {engine} engine ...")
            reached = _train(script, words, engine, Path(private))
            if reached is None:
                log = (Path(private) / f"{engine}.log").read_text(encoding="utf-8", errors="replace").splitlines()
                say(f"The {engine} engine did not finish {STEPS} steps: {log[-1] if log else 'no output'}")
                continue
            say(f"The {engine} engine reached {reached:,.0f} tok/s.")
            found.append(Speed(
                chip=chip_of(machine), engine=engine, mode=mode, dtype="bfloat16", recompute="auto",
                # one factor for both: only their ratio is read
                parameters=spec.parameters, flop_per_s=reached * 6.0 * spec.parameters, source="own",
                origin=f"a duel of {STEPS} steps on this machine, {reached:,.0f} tok/s",
            ))
    if len(found) == 2:
        book = [row.model_dump() for row in [*known_speeds(), *found]]
        _book().parent.mkdir(parents=True, exist_ok=True)
        write_durably(_book(), json.dumps(book, indent=1) + "\n")
    return found
