"""How true a plan's time is before the start, and after a rehearsal: predictions against whole runs.

usage: python -m sparktune.lab.eta_check [--device cuda] [--model tiny|0.8B|FOLDER] [--only lora|qlora|full]
           [--target-s 70] [--csv FILE]

First the machine is calibrated: short runs of each method and length, which only teach. Then each case gets a data set
of its own (chat rows, seeded), as many steps as should take about `--target-s` seconds, an estimate from what the
machine has shown (`before`), a rehearsal (train.py --rehearse 15; `after`) and the run itself (train.py), timed as a
process from its start to its end. `before` may be up to 25 % too long, `after` must be within 5 %, both inside their
ranges. A run stops being started when `--limit-s` could not hold it. The other stages are not part of this.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparktune.lab.table import append_rows
from sparktune.setup.demo_model import make_model as make_tiny
from sparktune.setup.estimate import read_calibration, remember, run_eta
from sparktune.setup.machine.detect import detect_machine
from sparktune.setup.machine.symptoms import read_metrics
from sparktune.setup.plan.config import load_plan, save_plan
from sparktune.setup.plan.eta import Eta
from sparktune.setup.plan.memory import PeakEstimate, cheapest_policy
from sparktune.setup.plan.models import probe
from sparktune.setup.plan.recommend import apply, recommend
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import DatasetReport, Machine, ModelSpec, Plan

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[1]
_WORDS = ("the", "sum", "of", "these", "two", "numbers", "is", "what", "you", "asked", "for", "and", "here", "it comes")
_WITHIN = {"before": (-0.02, 0.25), "after": (-0.05, 0.05)}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run: its rows and what its plan says."""

    name: str
    rows: int
    words: tuple[int, int]
    """Of an answer: least and most, drawn evenly."""
    plan: dict[str, Any] = field(default_factory=dict)
    teaches: bool = False
    """Not rehearsed, not judged, and of `max_steps` as it says."""


# Steps of half a second to two, as users have them: a rehearsal of fifteen must outlast a hiccup of the machine.
_SHORT = {"pack_length": 512, "gradient_accumulation": 4, "max_steps": 25}
_CPU = (
    Case(name="teach lora", rows=100, words=(20, 120), plan={"mode": "lora", **_SHORT}, teaches=True),
    Case(name="teach lora, long", rows=60, words=(150, 500), teaches=True,
         plan={"mode": "lora", "pack_length": 1024, "gradient_accumulation": 4, "max_steps": 14}),
    Case(name="teach lora, unpacked", rows=100, words=(20, 120), teaches=True,
         plan={"mode": "lora", "pack": False, "gradient_accumulation": 12, "max_steps": 25}),
    Case(name="teach full", rows=100, words=(20, 120), plan={"mode": "full", **_SHORT}, teaches=True),
    Case(name="teach qlora", rows=100, words=(20, 120), teaches=True,
         plan={"mode": "qlora", "quantise_base": "int8", **_SHORT}),
    Case(name="teach qlora, long", rows=60, words=(150, 500), teaches=True,
         plan={"mode": "qlora", "quantise_base": "int8", "pack_length": 1024, "gradient_accumulation": 4,
               "max_steps": 14}),
    Case(name="lora, short answers", rows=400, words=(5, 60),
         plan={"mode": "lora", "pack_length": 512, "gradient_accumulation": 6}),
    Case(name="full", rows=300, words=(10, 150), plan={"mode": "full", "pack_length": 512, "gradient_accumulation": 5}),
    Case(name="lora, unpacked", rows=300, words=(20, 100),
         plan={"mode": "lora", "lora_r": 8, "pack": False, "gradient_accumulation": 16}),
    Case(name="lora, long answers", rows=100, words=(150, 500),
         plan={"mode": "lora", "lora_r": 32, "pack_length": 1024, "gradient_accumulation": 3}),
    Case(name="qlora int8", rows=300, words=(10, 120),
         plan={"mode": "qlora", "quantise_base": "int8", "pack_length": 768, "gradient_accumulation": 4}),
    Case(name="full, saves and evaluates often", rows=400, words=(5, 90),
         plan={"mode": "full", "pack_length": 512, "gradient_accumulation": 4, "save_steps": 10, "eval_steps": 10,
               "eval_split": 0.1}),
    Case(name="lora, long-tailed", rows=300, words=(2, 300),
         plan={"mode": "lora", "pack_length": 640, "gradient_accumulation": 5}),
)
# Ten saves of 9 GB in a minute are no user's run: of hours, they are a hundredth.
_FEW_SAVES = {"save_steps": 10, "eval_steps": 10}
_SOME_SAVES = {"save_steps": 50, "eval_steps": 25}
_CUDA = (
    Case(name="teach lora, short", rows=600, words=(5, 120), teaches=True,
         plan={"mode": "lora", "max_steps": 20, "pack_length": 1024, "gradient_accumulation": 8, **_FEW_SAVES}),
    Case(name="teach lora, long", rows=300, words=(200, 1500), teaches=True,
         plan={"mode": "lora", "max_steps": 16, "pack_length": 6144, "gradient_accumulation": 3, **_FEW_SAVES}),
    Case(name="teach full", rows=400, words=(50, 400), teaches=True,
         plan={"mode": "full", "max_steps": 20, "pack_length": 2048, "gradient_accumulation": 8, **_FEW_SAVES}),
    Case(name="lora, packs of 4096", rows=600, words=(100, 900),
         plan={"mode": "lora", "pack_length": 4096, "gradient_accumulation": 6}),
    Case(name="full, packs of 2048", rows=600, words=(50, 400),
         plan={"mode": "full", "pack_length": 2048, "gradient_accumulation": 8, **_SOME_SAVES}),
    Case(name="lora, short answers, packs of 1024", rows=1500, words=(5, 120),
         plan={"mode": "lora", "lora_r": 16, "pack_length": 1024, "gradient_accumulation": 12}),
    Case(name="lora, unpacked", rows=500, words=(300, 700),
         plan={"mode": "lora", "lora_r": 64, "pack": False, "gradient_accumulation": 12}),
    Case(name="lora, long answers, packs of 8192", rows=300, words=(1000, 3500),
         plan={"mode": "lora", "lora_r": 64, "pack_length": 8192, "gradient_accumulation": 4}),
    Case(name="full, saves and evaluates often", rows=800, words=(50, 400),
         plan={"mode": "full", "pack_length": 4096, "gradient_accumulation": 4, "eval_split": 0.1}),
    Case(name="full, long answers, packs of 4096", rows=300, words=(500, 2000),
         plan={"mode": "full", "pack_length": 4096, "gradient_accumulation": 4, **_SOME_SAVES}),
)


def _data(path: Path, case: Case, seed: int) -> None:
    """Writes chat rows of random length."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(case.rows):
            question = " ".join(draw.choices(_WORDS, k=draw.randint(3, 12)))
            answer = " ".join(draw.choices(_WORDS, k=draw.randint(*case.words)))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")


def _model(name: str, place: Path) -> Path:
    """Returns the model's folder: the demo's tiny model, a random one of a real shape, or what is there."""
    if Path(name).is_dir():
        return Path(name)
    tiny = make_tiny(place / "tiny", pretrained=False)
    if name == "tiny":
        return tiny
    # a process of its own: what it leaves on the GPU goes with it
    subprocess.run([sys.executable, "-P", "-m", "sparktune.lab.side_by_side", "make", "--size", name,
                    "--folder", str(place / "models")], check=True, stdout=subprocess.DEVNULL)
    folder = next(path.parent for path in (place / "models").glob("**/bench.json"))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tiny / file, folder / file)  # words and a chat template, which a bench's tokenizer lacks
    return folder


class Bench:
    """Runs cases below one folder, with a speed book of their own.

    Args:
        arguments: of the command line.
        place: the folder.
    """

    def __init__(self, arguments: argparse.Namespace, place: Path) -> None:
        self._options, self._place, self._began = arguments, place, time.monotonic()
        self._model = str(_model(arguments.model, place))
        self._spec: ModelSpec = probe(self._model)
        self._longest_s = 0.0

    def has_time(self) -> bool:
        """Returns whether one more case fits into the limit."""
        return time.monotonic() - self._began + self._longest_s * 1.1 < self._options.limit_s

    def _process(self, *argv: str, log: Path) -> float:
        """Runs a stage as the pipeline does and returns its seconds."""
        env = {**os.environ, "OMP_NUM_THREADS": str(self._options.threads), "TOKENIZERS_PARALLELISM": "false"}
        began = time.monotonic()
        with log.open("ab") as out:
            subprocess.run([sys.executable, "-P", *argv], check=True, stdout=out, stderr=out, env=env, cwd=log.parent)
        return time.monotonic() - began

    def _prepared(self, case: Case, number: int) -> tuple[RunDir, Plan, DatasetReport, Machine, PeakEstimate]:
        run = RunDir(name=f"eta-{number}", results_root=self._place / "results", output_root=self._place / "output")
        run.root.mkdir(parents=True)
        data = self._place / f"{number}.jsonl"
        _data(data, case, self._options.seed + number)
        fields: dict[str, Any] = {
            "max_steps": 100, **case.plan, "model": self._model, "data": data, "name": run.name,
            "device": self._options.device, "results": run.results_root, "output": run.output_root, "mtp": "skip",
            "gguf": [], "tensorboard": False, "engine": "native",
            # One prompt, at the start and at the end: ten times three of them are a hundredth of a run of hours, and
            # would be a third of one this short. The cases that save and evaluate often answer as often.
            "sample_prompts": ["What is the sum of these two numbers?"],
            "sample_steps": 1_000_000 if case.plan.get("eval_steps") is None else None,
        }
        plan = Plan.model_validate({**fields, "origins": dict.fromkeys(fields, "flag")})
        save_plan(plan, run.plan)
        self._process("-m", "sparktune.setup.data.tokenise", "--run", str(run.root), log=run.log)
        report = DatasetReport.model_validate_json(run.data_report.read_text(encoding="utf-8"))
        machine = detect_machine(plan.device, self._place)
        plan = apply(plan, recommend(plan, self._spec, report, machine))
        peak = cheapest_policy(plan, self._spec, report, machine)[0]
        plan = plan.model_copy(update={"recompute": peak.policy, "recompute_layers": peak.layers})
        if not case.teaches:
            plan = self._of_length(plan, report, machine)
        save_plan(plan, run.plan)
        return run, plan, report, machine, peak

    def _of_length(self, plan: Plan, report: DatasetReport, machine: Machine) -> Plan:
        """The plan with as many steps as should take the seconds that are wanted."""
        short, long = (self._train_s(plan.model_copy(update={"max_steps": n}), report, machine) for n in (100, 200))
        steps = 100 + (self._options.target_s * 1.05 - short) / max((long - short) / 100, 1e-4)
        return plan.model_copy(update={"max_steps": min(max(round(steps), 20), 20_000)})

    def _eta(self, plan: Plan, report: DatasetReport, machine: Machine) -> Eta:
        return run_eta(plan, self._spec, report, machine)

    def _train_s(self, plan: Plan, report: DatasetReport, machine: Machine) -> float:
        stage = self._eta(plan, report, machine).stage("train")
        assert stage is not None, "the teaching runs have shown this chip's speed"
        return stage.seconds

    def run(self, case: Case, number: int) -> dict[str, Any] | None:
        """Runs a case. Returns its row, or None for one that only teaches."""
        began = time.monotonic()
        run, plan, report, machine, peak = self._prepared(case, number)
        before = self._eta(plan, report, machine).stage("train")
        train = str(ROOT / "train.py")
        rehearsal_s, after = 0.0, None
        if not case.teaches:
            rehearsal_s = self._process(train, "--config", str(run.plan), "--rehearse", "15", log=run.log)
            after = read_calibration(run.root)
        true_s = self._process(train, "--config", str(run.plan), log=run.log)
        rows = read_metrics(run.metrics)
        ends = [event for event in read_metrics(run.stage_events("train")) if event.get("kind") == "end"]
        remember("train", true_s, load_plan(run.plan), run, machine)
        shutil.rmtree(run.root, ignore_errors=True)
        if case.teaches:
            return None
        assert before is not None, "estimated when its length was chosen"
        assert after is not None, "a rehearsal that ends well leaves calibration.json"
        self._longest_s = max(self._longest_s, time.monotonic() - began)
        steps = [row for row in rows if row.get("tok_per_s")]
        row: dict[str, Any] = {
            "machine": machine.gpu_name or machine.cpu_name, "device": plan.device, "threads": self._options.threads,
            "torch": importlib.metadata.version("torch"), "commit": os.environ.get("LAB_COMMIT", ""),
            "load": f"{os.getloadavg()[0]:.1f}", "case": case.name,
            "model_parameters": self._spec.parameters, "mode": plan.mode, "steps": plan.max_steps,
            "tokens_a_document": round(report.lengths.mean, 1), "true_s": round(true_s, 2),
            "rehearsal_s": round(rehearsal_s, 2),
        }
        for name, seconds, low, high in (
            ("before", before.seconds, before.low, before.high), ("after", after.train_s, after.low_s, after.high_s),
        ):
            error = seconds / true_s - 1
            least, most = _WITHIN[name]
            row |= {f"{name}_s": round(seconds, 2), f"{name}_low": round(low, 2), f"{name}_high": round(high, 2),
                    f"{name}_error": round(error, 4),
                    f"{name}_verdict": "ok" if least <= error <= most and low <= true_s <= high else "missed"}
        truly = {name: spent[1] for name, spent in ends[-1]["spent"].items()}
        truly["steps"] = sum(r["tokens"] / r["tok_per_s"] for r in steps)
        truly["start"] = true_s - sum(truly.values())
        truly = {name: round(seconds, 2) for name, seconds in truly.items()}
        expected = {name: round(seconds, 2) for name, seconds in before.parts.items()}
        row |= {"before_parts": json.dumps(expected), "after_parts": json.dumps(after.parts),
                "true_parts": json.dumps(truly),
                "peak_predicted_gib": round(peak.allocator_gib if plan.device == "cuda" else peak.total_gib, 3),
                "peak_rehearsed_gib": after.peak_gib, "peak_gib": max(r["peak_gib"] for r in steps)}
        return row


def main() -> int:
    """Runs the check and prints a line a run. Returns 1 if one missed what it must hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny (the demo's), a size of lab/shapes.py, or a folder")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--target-s", type=float, default=70.0, help="seconds that a run should take")
    parser.add_argument("--limit-s", type=float, default=3600.0, help="start no run that would end later than this")
    parser.add_argument("--last-first", action="store_true", help="judge the last case first: with a limit, the others")
    parser.add_argument("--only", choices=("lora", "qlora", "full"), help="cases of one method")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    missed = 0
    with tempfile.TemporaryDirectory(prefix="eta-") as place:
        os.environ["XDG_CACHE_HOME"] = str(Path(place) / "cache")  # a speed book of its own, that learns as it goes
        bench = Bench(options, Path(place))
        cases = list(enumerate(_CUDA if options.device == "cuda" else _CPU))
        if options.only:
            cases = [numbered for numbered in cases if numbered[1].plan["mode"] == options.only]
            if not cases:
                parser.error(f"--only {options.only}: there is no such case on {options.device}")
        if options.last_first:
            cases.sort(key=lambda numbered: (not numbered[1].teaches, -numbered[0]))
        for number, case in cases:
            if not bench.has_time():
                print(f"{case.name}: left out, --limit-s {options.limit_s:g} would not hold it", flush=True)
                continue
            row = bench.run(case, number)
            if row is None:
                continue
            print(json.dumps(row), flush=True)
            missed += "missed" in (row["before_verdict"], row["after_verdict"])
            if options.csv:
                append_rows(options.csv, [row])
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
