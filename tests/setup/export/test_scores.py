"""Scores, intervals and alarms, and the user's own validator."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from sparktune.setup.export.scores import alarms, judge_answers, paired_difference, score, summary_row, validate
from sparktune.setup.plan.errors import UsageError


def program(folder: Path, body: str) -> list[str]:
    path = folder / "judge me.py"
    path.write_text(body)
    return [sys.executable, str(path)]


def test_headlines_are_sacrebleus_and_rows_keep_the_order() -> None:
    import sacrebleu

    answers = ["5 + 5 = 10.", "seventeen", "something else entirely here"]
    references = ["5 + 5 = 10.", "seventeen and a half", None]
    got = score(answers, references)
    assert got.rows["exact_match"] == [1.0, 0.0]
    assert got.headline["exact_match"] == 0.5
    assert got.headline["chrf"] == pytest.approx(sacrebleu.corpus_chrf(answers[:2], [references[:2]]).score)
    assert got.headline["bleu"] == pytest.approx(sacrebleu.corpus_bleu(answers[:2], [references[:2]]).score)
    assert got.rows["chrf"][0] == pytest.approx(100)
    assert 0 < got.rows["chrf"][1] < 100


def test_perplexity_weighs_examples_by_their_tokens() -> None:
    got = score([], [], losses=[1.0, 3.0], loss_tokens=[30, 10])
    assert got.headline == {"perplexity": pytest.approx(np.exp(1.5))}
    assert got.rows == {"perplexity": [1.0, 3.0]}


def test_the_interval_is_paired_and_covers_the_difference() -> None:
    generator = np.random.default_rng(0)
    hard = generator.normal(50, 20, 200)
    better = hard + generator.normal(2, 1, 200)
    got = paired_difference(hard.tolist(), better.tolist(), seed=1)
    assert got["low"] < 2 < got["high"]
    assert got["high"] - got["low"] < 0.6, "pairing takes the spread of the prompts (20) out"
    assert got == paired_difference(hard.tolist(), better.tolist(), seed=1)
    assert paired_difference([1.0] * 5, [1.0] * 5, seed=1) == {"difference": 0, "low": 0, "high": 0, "prompts": 5}


def test_an_alarm_rings_above_two_percent_in_the_right_direction() -> None:
    before = {"chrf": 50.0, "exact_match": 0.5, "perplexity": 4.0}
    assert alarms(before, {"chrf": 49.1, "exact_match": 0.5, "perplexity": 4.07}, "A", "B") == []
    found = alarms(before, {"chrf": 48.9, "exact_match": 0.4, "perplexity": 4.09}, "A", "B")
    assert [text.split(" in ")[1].split(":")[0] for text in found] == ["chrf", "exact_match", "perplexity"]
    assert alarms(before, {"chrf": 90.0, "perplexity": 1.0, "validator": 0.0}, "A", "B") == []


def test_the_validator_gets_json_and_no_shell(tmp_path: Path) -> None:
    body = (
        "import json, sys\n"
        "asked = json.load(sys.stdin)\n"
        "assert asked.keys() == {'prompt', 'reference', 'answer'}\n"
        "sys.exit(0 if asked['answer'] == asked['reference'] and sys.argv[1:] == ['$(x); a b'] else 1)\n"
    )
    command = [*program(tmp_path, body), "$(x); a b"]
    assert validate(command, "p", "é", "é")
    assert not validate(command, "p", "é", "e")
    assert judge_answers(command, ["p", "p"], ["a", "b"], ["a", "c"]) == [1.0, 0.0]
    assert judge_answers(None, [], [], []) is None


def test_a_validator_that_is_broken_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="cannot be started: No such file"):
        validate([str(tmp_path / "nothing")], "p", None, "a")
    with pytest.raises(UsageError, match=r"should exit 0 .* it exited 3: sorry"):
        validate(program(tmp_path, "import sys; print('sorry', file=sys.stderr); sys.exit(3)"), "p", None, "a")
    monkeypatch.setattr("sparktune.setup.export.scores._VALIDATOR_S", 0.2)
    with pytest.raises(UsageError, match="took longer"):
        validate(program(tmp_path, "import time; time.sleep(9)"), "p", None, "a")


def test_a_row_for_the_report_says_the_interval() -> None:
    scores = score(["a"], ["a"])
    row = summary_row("merged", scores, {"exact_match": {"difference": 1.0, "low": 0.5, "high": 1.0}})
    assert row["exact_match against base"] == "+1 [+0.5, +1]"
    assert "chrf against base" not in row
    assert row["stage"] == "evaluation"
