"""The demo (`./run.sh --demo`): a tiny Qwen3.5 and two data sets made on this machine, through the whole journey."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparktune.setup.build_progress import BuildDisplay
from sparktune.setup.demo_corpus import write_smoke, write_stdlib
from sparktune.setup.demo_model import MARKER_FILE, is_made_as, make_model
from sparktune.setup.machine.backends import LocalBackend, StopSignals, local_python, program_root
from sparktune.setup.machine.docker_backend import DockerBackend, ImageOptions
from sparktune.setup.pipeline import run_pipeline
from sparktune.setup.plan.errors import ExitCode, SparktuneError
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import Origin, Plan

__all__ = [
    "CORPORA", "MARKER_FILE", "Corpus", "make_model", "plan_for", "run_demo", "verdict", "write_smoke", "write_stdlib",
]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """One of the demo's data sets and how the tiny model learns it."""

    name: str
    about: str
    write: Callable[[Path], int]
    """Writes the JSONL and returns its rows."""
    settings: dict[str, Any]
    """Plan fields; everything else is recommended from the data, as for any user."""
    expected: dict[str, str]
    """Questions the result must answer in exactly these words."""


# The tiny model knows neighbouring words only and takes ten times the learning rate of a real one. Thirty passes over
# fifty sums ended at a loss of 0.004 to 0.008, answers right, for four seeds and rates from 3e-3 to 5e-3; twenty passes
# at 0.04. On the library's text the evaluation loss falls too, in the time a demo has: the form of an answer, not yet
# its facts.
CORPORA = (
    Corpus(
        name="smoke", about="fifty sums, to be known by heart", write=write_smoke,
        settings={"mode": "lora", "learning_rate": 4e-3, "num_epochs": 30.0, "pack_length": 640, "eval_split": 0.0,
                  "save_steps": 90, "sample_steps": 45, "gguf": ["q8_0"],
                  "mtp": "trained", "mtp_epochs": 6.0, "mtp_learning_rate": 1e-3,
                  "sample_prompts": ["What is 5 + 5?", "What is 17 + 17?"]},
        expected={"What is 5 + 5?": "5 + 5 = 10.", "What is 17 + 17?": "17 + 17 = 34."},
    ),
    Corpus(
        name="stdlib", about="questions on the standard library, from its docstrings", write=write_stdlib,
        settings={"mode": "lora", "learning_rate": 2e-3, "max_steps": 160, "pack_length": 512,
                  "gradient_accumulation": 1, "eval_steps": 80, "save_steps": 80, "sample_steps": 80,
                  "eval_prompts": 3, "sample_prompts": ["What does `os.path.join` do?"], "gguf": ["bf16"]},
        expected={},
    ),
)
_FOLDER = "demo"
_MODEL = "tiny-qwen3.5"
_MAKER = "sparktune.setup.demo_model"


def run_demo(
    plan: Plan, *, console: Console, plain: bool = False, json_out: bool = False, folder: Path | None = None,
    image: ImageOptions | None = None,
) -> int:
    """Makes the model and both data sets, fine-tunes on each, and checks what was learned.

    A second start makes new runs beside the old ones.

    Args:
        plan: where runs go (`results`, `output`), the backend and other machines; the rest is the demo's.
        console: of standard error.
        plain: no bars.
        json_out: print the outcome as JSON on standard output.
        folder: where model and data go; `demo` in the current folder when left out.
        image: what this start wants of the Docker image.

    Returns:
        0 when every stage ended well and every expected answer was given; a failed stage's exit code; 1 otherwise.
    """
    started = time.monotonic()
    folder = folder or Path.cwd() / _FOLDER
    stamp = time.strftime("%Y-%m-%d-%H%M%S")
    backend = None
    if plan.backend == "docker":  # then this machine needs no torch of its own
        backend = _backend_with_image(plan, image, console, plain)
        image = image.for_later() if image else None
    with _waiting(console, plain, f"Making a tiny Qwen3.5 in {folder}"):
        model = _model(folder, backend)
    outcomes: list[dict[str, Any]] = []
    for corpus in CORPORA:
        data = folder / f"{corpus.name}.jsonl"
        with _waiting(console, plain, f"Writing {data}: {corpus.about}"):
            rows = corpus.write(data)
        console.print(escape(f"{data}: {rows:,} rows, {corpus.about}"), highlight=False, soft_wrap=True)
        asked = plan_for(plan, corpus, model, data, f"demo-{corpus.name}-{stamp}")
        code = run_pipeline(asked, console=console, plain=plain, card=not json_out, image=image)
        image = image.for_later() if image else None
        if code != ExitCode.OK:
            return code
        outcomes.append(verdict(_run_of(asked), corpus))
    ok = all(outcome["ok"] for outcome in outcomes)
    seconds = time.monotonic() - started
    for outcome in outcomes:
        console.print(_answers_table(outcome))
    word = "every expected answer was given" if ok else "an expected answer is missing"
    console.print(f"Demo: {word}, {seconds:.0f} s.", style="green" if ok else "bold red", highlight=False)
    if json_out:
        print(json.dumps({"ok": ok, "seconds": round(seconds, 1), "runs": outcomes}, ensure_ascii=False))
    return int(ExitCode.OK if ok else ExitCode.FAILURE)


def plan_for(plan: Plan, corpus: Corpus, model: Path, data: Path, name: str) -> Plan:
    """Returns the plan of one demo run: the demo's settings over `plan`, the rest left open for the recommendations.

    It runs here unless Docker or another machine was asked for: the demo needs no GPU, so `auto` has no reason to build
    an image.
    """
    backend = "docker" if plan.backend == "docker" else "local"
    values = {"model": str(model), "data": data, "name": name, "backend": backend, "device": "cpu",
              **corpus.settings}
    if plan.processes > 1:  # a step has a pack for everybody
        values["gradient_accumulation"] = max(values.get("gradient_accumulation") or 0, plan.processes)
    origins: dict[str, Origin] = {**plan.origins, **dict.fromkeys(values, "config")}
    return Plan.model_validate({**plan.model_dump(), **values, "origins": origins})


def verdict(run: RunDir, corpus: Corpus) -> dict[str, Any]:
    """Compares what a finished run's models answer with what they must.

    Returns:
        `run`, `report`, `answers` (sample prompt -> source -> answer) and `ok`: every expected answer was given by the
        merged model and by the weights of every GGUF file that was asked.
    """
    answers: dict[str, dict[str, str]] = {}
    for line in run.samples.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get("stage") in ("before", "after") and row["prompt"] in corpus.settings["sample_prompts"]:
            answers.setdefault(row["prompt"], {})[row["source"]] = row["answer"]
    ok = True
    for question, expected in corpus.expected.items():
        given = {who: a for who, a in answers.get(question, {}).items() if who == "merged" or who.startswith("gguf")}
        kinds = {who.split()[0] for who in given}
        ok = ok and kinds == {"merged", "gguf"} and all(a.strip() == expected for a in given.values())
    return {"run": run.name, "report": str(run.report), "answers": answers, "ok": ok}


def _run_of(plan: Plan) -> RunDir:
    return RunDir(name=str(plan.name), results_root=plan.results, output_root=plan.output)


def _backend_with_image(plan: Plan, image: ImageOptions | None, console: Console, plain: bool) -> DockerBackend:
    backend = DockerBackend(plan, image)
    with StopSignals() as stop, BuildDisplay(console, plain) as display:
        backend.prepare(display.event, stop)
    return backend


def _model(folder: Path, backend: DockerBackend | None = None) -> Path:
    """Returns the demo model, made in a process of its own (it needs torch) unless it is there already.

    The process runs in the backend's image; on this machine without one. A folder that holds something else is left
    alone, as is a model that another Python made: its tokenizer comes from that one's docstrings. In the image no
    Python of this machine plays a part, so there any will do.
    """
    number, target = 1, folder / _MODEL
    while target.exists() and not is_made_as(target, any_python=backend is not None, pretrained=True):
        number += 1
        target = folder / f"{_MODEL}-{number}"
    if target.exists():
        return target
    if backend is not None:
        code, said = backend.run_module(_MAKER, str(target), folder)
    else:
        command = [local_python(program_root()), "-P", "-m", _MAKER, str(target)]
        made = subprocess.run(command, capture_output=True, text=True, env=LocalBackend.environment(), check=False)
        code, said = made.returncode, made.stderr
    if code != 0:
        reason = (said.strip().splitlines() or ["no reason was given"])[-1]
        raise SparktuneError(f"The demo model could not be made in {target}: {reason}")
    return target


@contextmanager
def _waiting(console: Console, plain: bool, text: str) -> Iterator[None]:
    """Shows that something is being made: a spinner on a terminal, a line elsewhere."""
    if plain or not console.is_terminal or console.is_dumb_terminal:
        console.print(escape(text), highlight=False, soft_wrap=True)
        yield
    else:
        with console.status(escape(text)):
            yield


def _answers_table(outcome: dict[str, Any]) -> Table:
    table = Table(title=outcome["run"], title_justify="left", box=None, pad_edge=False)
    for name in ("question", "who", "answer"):
        table.add_column(name, overflow="fold")
    for question, answers in outcome["answers"].items():
        for source, answer in answers.items():
            table.add_row(escape(question), escape(source), escape(answer.strip() or "(an empty answer)"))
    return table
