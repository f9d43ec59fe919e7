"""The evaluation stage: who is asked, what is written, what raises an alarm. Real models answer in test_gguf.py."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from sparktune.setup.export import evaluate, generate, sources
from sparktune.setup.export.sources import Asked, Questions, Source, sources_of
from sparktune.setup.plan.config import save_plan
from sparktune.setup.plan.errors import SparktuneError, UsageError
from sparktune.setup.plan.events import NullEvents
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import Plan

ROWS = [{"prompt": f"What is {n} + 1?", "completion": f"{n} + 1 = {n + 1}."} for n in range(12)]


@pytest.fixture
def run(tiny_base: Path, tmp_path: Path) -> tuple[Plan, RunDir]:
    """A run whose merged model is the base itself, with six held-out rows."""
    train, held_out = tmp_path / "train.jsonl", tmp_path / "held.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in ROWS[6:]))
    held_out.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:6]))
    output, root = tmp_path / "output", tmp_path / "results" / "r"
    output.mkdir()
    root.mkdir(parents=True)
    shutil.copytree(tiny_base, output / "r", copy_function=os.link)
    plan = Plan(model=str(tiny_base), data=train, eval_data=held_out, output=output, results=tmp_path / "results",
                sample_prompts=["Hello?"], eval_prompts=4)
    save_plan(plan, root / "plan.yaml")
    return plan, RunDir.from_root(root, output)


def answering(monkeypatch: pytest.MonkeyPatch, said: dict[str, list[str]], losses: dict[str, float]) -> list[Questions]:
    asked: list[Questions] = []

    def ask(name: str, questions: Questions) -> Asked:
        asked.append(questions)
        return Asked(answers=said[name], losses=[losses[name]] * len(questions.read))

    def fake(*_: object) -> list[Source]:
        return [Source(name=n, when="before" if n == "base" else "after", ask=lambda q, n=n: ask(n, q)) for n in said]

    monkeypatch.setattr(evaluate, "sources_of", fake)
    return asked


def test_figures_pairs_and_rejected_rows_are_written(run, monkeypatch: pytest.MonkeyPatch) -> None:
    _, where = run
    right = [row["completion"] for row in ROWS[:4]]
    asked = answering(monkeypatch, {"base": ["x", *["no idea"] * 4], "merged": ["y", *right[:3], "wrong"],
                                    "gguf q8_0": ["y", *right[:3], "wrong"]},
                      {"base": 2.0, "merged": 0.5, "gguf q8_0": 0.5})
    where.samples.write_text(json.dumps({"step": 0, "prompt": "p", "answer": "a"}) + "\n")
    assert evaluate.main(["--run", str(where.root)]) == 0
    assert [p.text for p in asked[0].prompts] == ["Hello?", *(r["prompt"] for r in ROWS[:4])]
    assert len(asked[0].read) == 6, "all held-out rows are read, four are answered"
    found = json.loads(where.evaluation.read_text())
    assert found["sources"]["merged"]["exact_match"] == 0.75
    assert found["sources"]["base"]["exact_match"] == 0
    assert found["against_base"]["merged"]["perplexity"]["difference"] == -1.5
    assert found["alarms"] == []
    assert found["with_reference"] == 4
    rejected = [json.loads(line) for line in Path(found["rejected_rows"]).read_text().splitlines()]
    assert rejected == [ROWS[3]], "the row as the data file has it"
    pairs = [json.loads(line) for line in Path(found["pairs_to_judge"]).read_text().splitlines()]
    key = json.loads((where.judged / "ab-key.json").read_text())
    assert {frozenset(sides.values()) for sides in key.values()} == {frozenset({"base", "merged"})}
    assert {key[str(p["id"])]["a"] for p in pairs} == {"base", "merged"}, "sides are drawn"
    for pair in pairs:
        assert ("base" in json.dumps(pair)) is False
        merged = pair["a"] if key[str(pair["id"])]["a"] == "merged" else pair["b"]
        assert merged in ("y", *right[:3], "wrong")
    rows = [json.loads(line) for line in where.samples.read_text().splitlines()]
    assert rows[0] == {"step": 0, "prompt": "p", "answer": "a"}
    assert [r["source"] for r in rows if r.get("stage") == "evaluation"] == ["base", "merged", "gguf q8_0"]
    card = (where.merged / "README.md").read_text()
    assert "| merged | 0.75 |" in card
    assert "licence applies." in card
    assert evaluate.main(["--run", str(where.root)]) == 0
    assert len(where.samples.read_text().splitlines()) == len(rows), "a second evaluation replaces the first"


def test_a_result_worse_than_its_base_or_a_known_run_raises_the_alarm(run, monkeypatch: pytest.MonkeyPatch) -> None:
    _, where = run
    right = [row["completion"] for row in ROWS[:4]]
    answering(monkeypatch, {"base": ["x", *right], "merged": ["x", *right[:2], "a", "b"], "baseline old": ["x", *right],
                            "gguf q4_k_m": ["x", "?", "?", "?", "?"]},
              {"base": 1.0, "merged": 1.1, "baseline old": 0.9, "gguf q4_k_m": 3.0})
    assert evaluate.main(["--run", str(where.root)]) == 0
    found = json.loads(where.evaluation.read_text())["alarms"]
    assert any(t.startswith("The result is worse than its base in exact_match: 0.5 instead of 1") for t in found)
    assert any(t.startswith("The result is worse than its base in perplexity") for t in found)
    assert any("than the baseline old in perplexity" in t for t in found)
    assert any(t.startswith("The file q4_k_m is worse than the merged model in chrf") for t in found)
    said = [json.loads(line) for line in where.stage_events("evaluate").read_text().splitlines()]
    assert sum(e["kind"] == "message" and e["level"] == "warning" for e in said) == len(found)


def test_the_validator_decides_what_is_rejected(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    plan, where = run
    judge = tmp_path / "judge.py"
    judge.write_text("import json, sys\nsys.exit('0' in json.load(sys.stdin)['answer'])\n")
    save_plan(plan.model_copy(update={"validator": [sys.executable, str(judge)]}), where.plan)
    answering(monkeypatch, {"base": ["0"] * 5, "merged": ["1", "0", "1", "1", "0"]}, {"base": 1.0, "merged": 1.0})
    assert evaluate.main(["--run", str(where.root)]) == 0
    found = json.loads(where.evaluation.read_text())
    assert found["sources"]["merged"]["validator"] == 0.6
    assert found["sources"]["base"]["validator"] == 0
    rows = [json.loads(line) for line in Path(found["rejected_rows"]).read_text().splitlines()]
    assert rows == [ROWS[0], ROWS[3]]


def test_sources_name_a_baseline_and_checkpoints(run, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, where = run
    monkeypatch.setattr(sources, "find_tools", lambda: None)
    with pytest.raises(UsageError, match="--baseline old should name a run"):
        sources_of(plan.model_copy(update={"baseline": "old"}), where, "cpu", NullEvents())
    other = RunDir(name="old", results_root=where.results_root, output_root=where.output_root)
    other.root.mkdir()
    save_plan(plan, other.plan)
    with pytest.raises(UsageError, match="holds no merged model"):
        sources_of(plan.model_copy(update={"baseline": "old"}), where, "cpu", NullEvents())
    other.merged.symlink_to(tiny_base)
    for step in (20, 5, 100):
        (where.checkpoint(step) / "adapter").mkdir(parents=True)
    (where.root / "checkpoint-x").mkdir()
    changed = plan.model_copy(update={"baseline": "old", "eval_checkpoints": True})
    found = sources_of(changed, where, "cpu", NullEvents())
    assert [s.name for s in found] == ["base", "merged", "baseline old", "checkpoint-5", "checkpoint-20",
                                       "checkpoint-100"]


def test_a_checkpoint_answers_as_the_model_it_would_become(
    run, tiny_base: Path, make_adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, where = run
    make_adapter(tiny_base, where.checkpoint(5) / "adapter", target_modules=["v_proj"])
    asked: list[tuple[Path, bytes]] = []

    def ask(folder: Path, questions: Questions, device: str) -> Asked:
        asked.append((folder, (folder / "config.json").read_bytes()))
        return Asked(answers=["a"], losses=[])

    monkeypatch.setattr(sources, "ask_model", ask)
    (source,) = sources._checkpoints(plan, where, "cpu")
    assert source.ask(Questions(prompts=(), read=(), max_new_tokens=4)).answers == ["a"]
    folder, config = asked[0]
    assert config == (tiny_base / "config.json").read_bytes()
    assert folder.is_relative_to(where.output_root)
    assert not folder.exists(), "the temporary merge is removed"
    assert [p.name for p in where.output_root.iterdir()] == ["r"]


def test_a_base_that_transformers_cannot_load_is_a_sentence(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder, copy_function=os.link)
    for weights in folder.glob("model*"):
        weights.rename(folder / weights.name.replace("model", "part"))
    with pytest.raises(SparktuneError, match=r"should be a model folder that transformers loads.*index\.json"):
        generate.load(folder, "cpu")


@pytest.mark.parametrize(("asked_for", "says"), [(0, "--eval-prompts is 0"), (4, "no held-out row has a prompt")])
def test_why_nothing_was_asked(
    run: tuple[Plan, RunDir], asked_for: int, says: str, monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan, place = run
    save_plan(plan.model_copy(update={"eval_prompts": asked_for, "sample_prompts": []}), place.plan)
    monkeypatch.setattr(evaluate, "_questions", lambda *_: Questions(prompts=[], read=[], max_new_tokens=8))
    assert evaluate.main(["--run", str(place.root)]) == 0
    assert says in place.stage_events("evaluate").read_text(encoding="utf-8")
