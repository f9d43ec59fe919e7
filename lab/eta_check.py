"""How true a plan's time is before the start, and after a rehearsal: predictions against whole runs.

usage: python -m sparktune.lab.eta_check --model FOLDER [--device cpu] [--runs 5] [--threads 3] [--csv FILE]

For each run a data set is made (seeded), prepared, estimated from what earlier runs on this machine taught, rehearsed
(train.py --rehearse 15) and trained (train.py) in full; the first run only teaches. `before` may be up to 25 % too
long, `after` must be within 5 %, both inside their ranges.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sparktune.lab.table import append_rows
from sparktune.setup.estimate import read_calibration, remember, run_eta
from sparktune.setup.machine.detect import detect_machine
from sparktune.setup.plan.config import load_plan, save_plan
from sparktune.setup.plan.memory import cheapest_policy
from sparktune.setup.plan.models import probe
from sparktune.setup.plan.recommend import apply, recommend
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import DatasetReport, Plan

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[1]
_WORDS = ("the", "sum", "of", "these", "two", "numbers", "is", "what", "you", "asked", "for", "and", "here", "it comes")

_RUNS: tuple[dict[str, Any], ...] = (
    # rows, words an answer (least, most), what the plan says
    {"rows": 300, "words": (5, 60), "plan": {"max_steps": 40}},
    {"rows": 400, "words": (5, 120), "plan": {"max_steps": 60, "gradient_accumulation": 2}},
    {"rows": 250, "words": (40, 90), "plan": {"max_steps": 80, "gradient_accumulation": 1}},
    {"rows": 500, "words": (2, 30), "plan": {"max_steps": 50, "gradient_accumulation": 4}},
    {"rows": 400, "words": (5, 200), "plan": {"max_steps": 45, "mode": "full"}},
    {"rows": 350, "words": (10, 80), "plan": {"max_steps": 70, "lora_r": 8, "gradient_accumulation": 2}},
)


def _data(path: Path, rows: int, words: tuple[int, int], seed: int) -> None:
    """Writes rows of random length."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            question = " ".join(draw.choices(_WORDS, k=draw.randint(3, 12)))
            answer = " ".join(draw.choices(_WORDS, k=draw.randint(*words)))
            file.write(json.dumps({"text": f"{question}\n{answer}"}) + "\n")  # a bench's model has no chat template


def _process(*argv: str, log: Path, threads: int) -> float:
    """Runs a stage as the pipeline does and returns its seconds."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    began = time.monotonic()
    with log.open("ab") as out:
        subprocess.run([sys.executable, "-P", *argv], check=True, stdout=out, stderr=out, env=env, cwd=log.parent)
    return time.monotonic() - began


def _one(number: int, arguments: argparse.Namespace, place: Path) -> dict[str, Any]:
    case = _RUNS[number % len(_RUNS)]
    run = RunDir(name=f"eta-{number}", results_root=place / "results", output_root=place / "output")
    run.root.mkdir(parents=True)
    data = place / f"{number}.jsonl"
    scale = arguments.length
    _data(data, case["rows"], (case["words"][0] * scale, case["words"][1] * scale), arguments.seed + number)
    fields = {"mode": "lora", **case["plan"], "model": str(arguments.model), "data": data, "name": run.name,
              "device": arguments.device, "results": run.results_root, "output": run.output_root, "mtp": "skip",
              "gguf": [], "tensorboard": False}
    plan = Plan.model_validate({**fields, "origins": dict.fromkeys(fields, "flag")})
    save_plan(plan, run.plan)
    _process("-m", "sparktune.setup.data.tokenise", "--run", str(run.root), log=run.log, threads=arguments.threads)
    report = DatasetReport.model_validate_json(run.data_report.read_text(encoding="utf-8"))
    spec, machine = probe(plan.model), detect_machine(plan.device, place)
    plan = apply(plan, recommend(plan, spec, report, machine))
    chosen = cheapest_policy(plan, spec, report, machine)[0]
    plan = plan.model_copy(update={"recompute": chosen.policy, "recompute_layers": chosen.layers})
    save_plan(plan, run.plan)
    before = run_eta(plan, spec, report, machine).stage("train")
    train = str(ROOT / "train.py")
    rehearsal_s = _process(train, "--config", str(run.plan), "--rehearse", "15", log=run.log, threads=arguments.threads)
    after = read_calibration(run.root)
    assert after is not None, f"no calibration in {run.root}"
    true_s = _process(train, "--config", str(run.plan), log=run.log, threads=arguments.threads)
    remember("train", true_s, load_plan(run.plan), run, machine)
    row: dict[str, Any] = {
        "machine": machine.gpu_name or machine.cpu_name, "device": plan.device, "threads": arguments.threads,
        "model_parameters": spec.parameters, "mode": plan.mode, "steps": plan.max_steps,
        "tokens": report.lengths.total, "true_s": round(true_s, 2), "rehearsal_s": round(rehearsal_s, 2),
        "after_s": after.train_s, "after_low": after.low_s, "after_high": after.high_s,
        "after_error": round(after.train_s / true_s - 1, 4),
    }
    if before is not None:
        row |= {"before_s": round(before.seconds, 2), "before_low": round(before.low, 2),
                "before_high": round(before.high, 2), "before_error": round(before.seconds / true_s - 1, 4),
                "before_from": before.reason}
    return row


def main() -> None:
    """Runs the check and prints a line a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--runs", type=int, default=len(_RUNS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--length", type=int, default=1, help="times as many words an answer")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="eta-") as place:
        os.environ["XDG_CACHE_HOME"] = str(Path(place) / "cache")  # a speed book of its own, that learns as it goes
        for number in range(arguments.runs):
            row = _one(number, arguments, Path(place))
            print(json.dumps(row), flush=True)
            if arguments.csv:
                append_rows(arguments.csv, [row])


if __name__ == "__main__":
    main()
