"""A trial: few steps of the real plan, base against tuned model, and a warning where fast kernels seem not in use."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparktune.setup.demo import make_model, write_smoke
from sparktune.setup.machine.diagnose import diagnose
from sparktune.setup.plan.arithmetic import training_flop
from sparktune.setup.plan.config import load_plan
from sparktune.setup.plan.memory import longest_row_tokens, predict_peak
from sparktune.setup.plan.models import CATALOGUE, spec_from_config
from sparktune.setup.plan.recommend import planned_steps, recommend
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import DatasetReport, Machine, Plan
from sparktune.setup.plan.speeds import rate_for
from sparktune.setup.terminal import Terminal
from sparktune.setup.trial import show_trial, slowness, whole_run

SPEC = spec_from_config(CATALOGUE["Qwen/Qwen3.5-2B"], "Qwen/Qwen3.5-2B")
H200 = Machine(
    device="cuda", gpu_name="NVIDIA H200", capability=(9, 0), memory_gib=139, cpu_cores=16, disk_free_gib=1000
)
CPU = Machine(device="cpu", memory_gib=20, cpu_cores=2, disk_free_gib=100)


def _report(examples: int = 4000) -> DatasetReport:
    lengths = {"count": examples, "total": examples * 1000, "mean": 1000.0, "p50": 1000, "p90": 1200, "p99": 1500,
               "max": 2000, "histogram_edges": [0, 2048], "histogram_counts": [examples]}
    return DatasetReport.model_validate({
        "path": "d.jsonl", "sha256": "0", "bytes": 1, "rows": examples, "kept": examples, "train_examples": examples,
        "eval_examples": 0, "formats": {"messages": examples}, "dropped": {}, "problems": [], "lengths": lengths,
        "supervised_tokens": examples * 350, "supervised_share": 0.35, "multi_turn": 0, "with_system": 0,
        "with_thinking": 0, "duplicates": 0, "eval_leaks": 0, "packing": {8192: 1.0}, "cache_key": "k",
    })


def _plan(**more: Any) -> Plan:
    return Plan.model_validate({
        "mode": "lora", "lora_r": 16, "engine": "native", "dtype": "bfloat16", "device": "cuda", "recompute": "none",
        "pack_length": 8192, "gradient_accumulation": 1, "trial": True, "kernels": {"rms_norm": "triton: fused"},
        **more,
    })


@pytest.mark.parametrize(("examples", "steps"), [(400, 7), (100_000, 100)])
def test_a_trial_is_a_tenth_and_at_most_a_hundred_steps(examples: int, steps: int) -> None:
    """400 rows make about 60 steps, the least that are recommended; of 100,000 rows a hundred steps are enough."""
    plan = Plan(trial=True, data=Path("d.jsonl"))
    found = {r.field: r.value for r in recommend(plan, SPEC, _report(examples), CPU)}
    whole = plan.model_copy(update={k: v for k, v in found.items() if k not in ("max_steps", "save_steps")})
    assert found["max_steps"] == min(100, -(-planned_steps(whole, _report(examples)) // 10))
    assert found["max_steps"] == steps


def _rows(tok_per_s: float, peak_gib: float) -> list[dict[str, Any]]:
    return [{"step": n, "tokens": 8192, "tok_per_s": tok_per_s, "peak_gib": peak_gib} for n in range(1, 31)]


def _expected(plan: Plan) -> tuple[float, float]:
    """(tok/s, GiB) that the plan is expected to reach."""
    rate = rate_for(plan, SPEC, H200)
    assert rate is not None
    flop = training_flop(plan, SPEC, document=1000.0, supervised_share=0.35)
    peak = predict_peak(plan, SPEC, H200, tokens=longest_row_tokens(plan, _report()), longest=2000)
    return rate.flop_per_s / flop, peak.allocator_gib


@pytest.mark.parametrize(("speed", "memory", "kernels", "log", "words"), [
    (1.0, 1.0, "triton: fused", "loss 1.2\n", []),
    (1.0, 1.0, "reference: no fused kernel takes float64", "", ["No fused kernel serves rms_norm"]),
    (1.0, 1.0, "triton: fused", "The fast path is not available because one of the required library is missing\n",
     ["The log says: The fast path"]),
    (0.5, 1.0, "triton: fused", "", ["tok/s were reached"]),
    (1.0, 1.5, "triton: fused", "", ["were predicted"]),
    (0.5, 1.5, "reference: x", "", ["rms_norm", "tok/s were reached", "were predicted"]),
])
def test_slow_kernels_are_seen_by_choice_log_speed_and_memory(
    speed: float, memory: float, kernels: str, log: str, words: list[str]
) -> None:
    plan = _plan(kernels={"rms_norm": kernels})
    tok_per_s, peak_gib = _expected(plan)
    rows = _rows(tok_per_s * speed, peak_gib * memory)
    why = slowness(plan, SPEC, _report(), H200, rows, diagnose(log))
    assert len(why) == len(words), why
    for sentence, word in zip(why, words, strict=True):
        assert word in sentence
    assert slowness(plan.model_copy(update={"device": "cpu"}), SPEC, _report(), CPU, rows, diagnose(log)) == []


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    place = tmp_path_factory.mktemp("trial")
    make_model(place / "tiny")
    write_smoke(place / "d.jsonl")
    env = {k: v for k, v in os.environ.items() if not k.startswith("SPARKTUNE_")}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "sparktune.setup.cli", "--non-interactive", "--trial", "--backend", "local",
         "--data", "d.jsonl", "--model", "tiny", "--name", "try", "--epochs", "6", "--sample-prompt",
         "What is 5 + 5?", "--learning-rate", "1e-2"],
        cwd=place, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        env={**env, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(place / "cache")},
    )
    return place, done


def test_a_trial_trains_a_tenth_and_exports_nothing(
    tried: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    place, done = tried
    assert done.returncode == 0, done.stderr
    root = place / "results" / "try"
    plan = load_plan(root / "plan.yaml")
    report = DatasetReport.model_validate_json((root / "data" / "report.json").read_text())
    assert plan.max_steps == min(100, -(-planned_steps(whole_run(plan), report) // 10))
    steps = [row for row in map(json.loads, (root / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, plan.max_steps + 1))
    assert tuple(json.loads((root / "state.json").read_text())["stages"]) == ("prepare", "train", "report")
    assert not (place / "output").exists(), "nothing is merged or exported"


def test_a_trial_shows_gradients_memory_and_base_against_tuned(
    tried: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    place, done = tried
    rows = [json.loads(line) for line in (place / "results" / "try" / "metrics.jsonl").read_text().splitlines()]
    held_out = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert f"base {held_out[0]:.4f}, tuned {held_out[-1]:.4f}" in done.stdout
    norms = [row["grad_norm"] for row in rows if "grad_norm" in row]
    assert f"largest {max(norms):.3g}" in done.stdout
    assert f"{max(row['peak_gib'] for row in rows if 'peak_gib' in row):.2f} GiB" in done.stdout
    told = done.stdout.splitlines()
    asked = next(n for n, line in enumerate(told) if line.startswith("asked") and "What is 5 + 5?" in line)
    assert told[asked + 1].split()[0] == "base"
    assert told[asked + 2].split()[0] == "tuned"
    assert "fast kernels" not in done.stdout, "a CPU has none"
    again = told[-1]
    assert "--trial" not in again
    assert "--max-steps" not in again
    assert "--data" in again
    assert "--epochs 6" in again


def test_damaged_rows_cost_the_table_their_own_lines_and_are_counted(
    tried: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, _ = tried
    shutil.copytree(place / "results" / "try", tmp_path / "try")
    run = RunDir.from_root(tmp_path / "try", tmp_path / "output")
    with run.samples.open("ab") as file:
        file.write(b'{"step": 1, "answer": "no prompt"}\n{"prompt": ["a"], "answer": "b"}\n{"prompt": "cut\n[1]\n')
    with run.metrics.open("ab") as file:
        file.write(b'{"eval_loss": 1.0}\n{"step": 2, "eval_loss": null}\n{"tok_per_s": 5.0}\n{"loss": "low"}\n\x00\n')
    text = io.StringIO()
    show_trial(load_plan(run.plan), run, Terminal(file=text, width=200))
    said = text.getvalue()
    assert "What is 5 + 5?" in said
    good = len(run.samples.read_bytes().splitlines()) - 4
    assert f"4 of {good + 4} rows in {run.samples} are damaged and left out of this table." in said
    assert re.search(rf"2 of \d+ rows in {re.escape(str(run.metrics))} are damaged", said)
    assert "--non-interactive" in capsys.readouterr().out
