"""Runs listed and compared: what differs in the plans, figures side by side, answers to the same prompts."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sparktune.setup.plan.config import save_plan
from sparktune.setup.plan.errors import UsageError
from sparktune.setup.plan.schema import Plan
from sparktune.setup.runs import compare, compare_table, describe, runs_in, runs_table


def make_run(root: Path, name: str, losses: list[float], answer: str, **values: Any) -> Path:
    folder = root / name
    plan = Plan(name=name, data=root / "d.jsonl", **{"mode": "lora", "mtp": "skip", "gguf": [], **values})
    save_plan(plan, folder / "plan.yaml")
    rows: list[dict[str, Any]] = [
        {"step": s, "loss": loss, "tok_per_s": 10.0 if s < 4 else 100.0 * s, "peak_gib": 2.0 + s}
        for s, loss in enumerate(losses, 1)
    ]
    rows += [{"step": 0, "eval_loss": 3.0}, {"step": 2, "eval_loss": 1.5}, {"step": 4, "eval_loss": 1.75}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 9, "lo')
    samples = [{"prompt": "1 + 1?", "answer": "three"}, {"prompt": "1 + 1?", "answer": answer}]
    (folder / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in samples))
    stages = {"prepare": {"input": "a", "output": "b", "seconds": 1.0},
              "train": {"input": "a", "output": "b", "seconds": 60.0}}
    (folder / "state.json").write_text(json.dumps({"stages": stages}))
    return folder


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [
        make_run(tmp_path, "a", [2.0, 1.0, 0.8, 0.7, 0.6], "2", lora_r=8),
        make_run(tmp_path, "b", [2.0, 1.0, 0.8, 0.7, 0.5], "2.\x1b[31m", lora_r=64, learning_rate=1e-4),
    ]


def shown(what: Any) -> str:
    console = Console(file=(text := io.StringIO()), width=120)
    console.print(what)
    return text.getvalue()


def test_a_run_is_described_by_its_records(two: list[Path]) -> None:
    found = describe(two[0])
    assert (found["first_loss"], found["last_loss"], found["best_eval_loss"]) == (2.0, 0.6, 1.5)
    assert found["tok_per_s"] == 450.0, "the median without the first three steps"
    assert (found["peak_gib"], found["train_seconds"], found["seconds"]) == (7.0, 60.0, 61.0)
    assert (found["finished"], found["stages_done"]) == (False, ["prepare", "train"])
    assert runs_in(two[0].parent) == two
    table = shown(runs_table([describe(r) for r in two]))
    assert "after train" in table
    assert "2.0000 -> 0.5000" in table


def test_what_sets_two_runs_apart(two: list[Path]) -> None:
    found = compare(two)
    assert found["plan"] == {"learning_rate": [None, 1e-4], "lora_r": [8, 64]}
    assert found["samples"] == [{"prompt": "1 + 1?", "answers": ["2", "2.\x1b[31m"]}], "the last answer counts"
    table = shown(compare_table(found))
    for words in ("--lora-r", "64", "--learning-rate", "0.6000", "0.5000", "450", "1 + 1?", "a: 2"):
        assert words in table
    assert "\x1b" not in table
    json.dumps(found)


def test_equal_plans_are_said_to_be_equal(two: list[Path]) -> None:
    assert "The plans are the same." in shown(compare_table(compare([two[0], two[0]])))


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    save_plan(Plan(name="n", mode="full"), tmp_path / "n" / "plan.yaml")
    found = describe(tmp_path / "n")
    assert (found["last_loss"], found["tok_per_s"], found["seconds"], found["finished"]) == (None, None, None, False)
    assert "begun" in shown(runs_table([found]))
    (tmp_path / "n" / "state.json").write_text("{")
    with pytest.raises(UsageError):
        describe(tmp_path / "n")
