"""Stage `evaluate`: the same prompts answered by the base, the merged model and the GGUF files; and what that is worth.

    python -m sparktune.setup.export.evaluate --run RUN

Everything here runs through transformers and llama.cpp and none of our training code, so that it tells what others will
see. Answers go to samples.jsonl, figures with paired intervals and alarms to evaluation.json; judged/ gets unlabelled
pairs for people to compare, and the held-out rows that the result got wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparktune.setup.data.tokenise import prepare
from sparktune.setup.data.tokenizer import ChatTokenizer, load_tokenizer
from sparktune.setup.export.card import write_card
from sparktune.setup.export.prompts import Prompt, choose_prompts, held_out_prompts
from sparktune.setup.export.scores import ALARM, Scores, alarms, judge_answers, paired_difference, score, summary_row
from sparktune.setup.export.sources import Asked, Questions, Source, gguf_answer, model_answers, sources_of
from sparktune.setup.export.stage import Stage, run_stage
from sparktune.setup.plan.errors import PreflightError
from sparktune.setup.plan.exports import check_evaluation
from sparktune.setup.plan.models import probe, resolve_model_dir
from sparktune.setup.plan.outfolder import write_durably
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import Plan

__all__ = ["MAX_NEW_TOKENS", "evaluate_run", "gguf_answer", "model_answers"]

MAX_NEW_TOKENS = 128
"""Longest answer; a longer reference is compared up to there."""
_SHORTEST = 48
_READ = 64
"""Held-out examples whose loss is measured."""
_GOOD_CHRF = 60.0
"""Without a validator, an answer that is neither exact nor this close to the reference counts as rejected."""
_PAIRS, _KEY, _REJECTED = "ab.jsonl", "ab-key.json", "rejected.jsonl"


def _device(plan: Plan) -> str:
    import torch

    if plan.device != "auto":
        return plan.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _keep_other_rows(path: Path) -> list[str]:
    """Returns the lines of samples.jsonl that this stage did not write."""
    if not path.is_file():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if not (isinstance(row, dict) and row.get("stage") in ("before", "after", "evaluation")):
            kept.append(line)
    return kept


def _questions(stage: Stage, tokenizer: ChatTokenizer) -> Questions:
    plan = stage.plan
    data = prepare(plan, probe(plan.model), str(resolve_model_dir(plan.model)), stage.events) if plan.data else None
    held_out = data.evaluation if data else None
    prompts = choose_prompts(plan, tokenizer, held_out, plan.eval_prompts)
    longest = max([len(p.reference_ids) for p in prompts], default=0)
    return Questions(prompts=prompts, read=held_out_prompts(plan, held_out, tokenizer, _READ),
                     max_new_tokens=min(MAX_NEW_TOKENS, max(_SHORTEST, longest)))


def _references(questions: Questions, tokenizer: ChatTokenizer) -> list[str | None]:
    """Returns what the data answers, cut where the answers are cut."""
    return [None if p.reference is None else
            tokenizer.decode(p.reference_ids[: questions.max_new_tokens], skip_special_tokens=True).strip()
            for p in questions.prompts]


def _score(plan: Plan, questions: Questions, references: Sequence[str | None], asked: Asked) -> Scores:
    texts = [p.text for p in questions.prompts]
    return score(
        asked.answers, references, verdicts=judge_answers(plan.validator, texts, references, asked.answers),
        losses=asked.losses, loss_tokens=[len(p.reference_ids) for p in questions.read],
    )


def _compare(plan: Plan, scores: dict[str, Scores]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Returns every source's paired differences from the base, and the alarms."""
    base, merged = scores["base"], scores["merged"]
    differences = {
        name: {figure: paired_difference(base.rows[figure], rows, plan.seed) for figure, rows in s.rows.items()
               if figure in base.rows and len(rows) == len(base.rows[figure])}
        for name, s in scores.items() if name != "base"
    }
    found = alarms(base.headline, merged.headline, "The result", "its base")
    for name, other in scores.items():
        if name.startswith("baseline "):
            found += alarms(other.headline, merged.headline, "The result", f"the {name}")
        elif name.startswith("gguf "):
            found += alarms(merged.headline, other.headline, f"The file {name.removeprefix('gguf ')}",
                            "the merged model")
    return differences, found


def _write_pairs(plan: Plan, run: RunDir, prompts: Sequence[Prompt], before: Asked, after: Asked) -> None:
    """Writes base and result side by side without names, order and sides drawn by the seed; the key lies apart."""
    generator = np.random.default_rng(plan.seed)
    rows, key = [], {}
    for number, index in enumerate(generator.permutation(len(prompts)), 1):
        sides = [("base", before.answers[index]), ("merged", after.answers[index])]
        if generator.integers(2):
            sides.reverse()
        rows.append({"id": number, "prompt": prompts[index].text, "a": sides[0][1], "b": sides[1][1], "better": None})
        key[str(number)] = {"a": sides[0][0], "b": sides[1][0]}
    run.judged.mkdir(exist_ok=True)
    write_durably(run.judged / _PAIRS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_durably(run.judged / _KEY, json.dumps(key, indent=1) + "\n")


def _rejected(questions: Questions, merged: Scores) -> list[Prompt]:
    """Returns the held-out prompts that the result got wrong, by the validator or else by the reference."""
    judged = merged.rows.get("validator")
    with_reference = [p for p in questions.prompts if p.reference is not None]
    if judged is not None:
        return [p for p, verdict in zip(questions.prompts, judged, strict=True) if not verdict and p.line is not None]
    return [p for p, exact, chrf in zip(with_reference, merged.rows.get("exact_match", []), merged.rows.get("chrf", []),
                                        strict=True) if not exact and chrf < _GOOD_CHRF]


def _write_rejected(plan: Plan, run: RunDir, rejected: Sequence[Prompt]) -> Path | None:
    """Writes the rejected rows as the data file has them, ready for --data; None where there are none."""
    path, source = run.judged / _REJECTED, plan.eval_data or plan.data
    path.unlink(missing_ok=True)
    lines = {p.line for p in rejected}
    if not lines or source is None:
        return None
    with source.open("rb") as file:
        rows = [raw.rstrip(b"\r\n") for number, raw in enumerate(file, 1) if number in lines]
    run.judged.mkdir(exist_ok=True)
    write_durably(path, b"".join(row + b"\n" for row in rows).decode("utf-8-sig"))
    return path


def _record(
    stage: Stage, questions: Questions, asked: dict[str, Asked], scores: dict[str, Scores], order: Sequence[Source]
) -> list[dict[str, Any]]:
    """Writes evaluation.json and judged/, raises the alarms, and returns the rows of samples.jsonl."""
    plan, run, events = stage.plan, stage.run, stage.events
    differences, found = _compare(plan, scores)
    rejected = _rejected(questions, scores["merged"])
    again = _write_rejected(plan, run, rejected)
    _write_pairs(plan, run, questions.prompts, asked["base"], asked["merged"])
    report = {
        "prompts": len(questions.prompts), "with_reference": sum(p.reference is not None for p in questions.prompts),
        "examples_read": len(questions.read), "max_new_tokens": questions.max_new_tokens,
        "validator": plan.validator, "alarm_above": ALARM,
        "sources": {s.name: scores[s.name].headline for s in order}, "against_base": differences, "alarms": found,
        "rejected": len(rejected), "rejected_rows": str(again) if again else None,
        "pairs_to_judge": str(run.judged / _PAIRS),
    }
    write_durably(run.evaluation, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    for sentence in found:
        events.message(sentence, "warning")
    if again:
        events.message(f"{len(rejected)} of {len(questions.prompts)} answers were rejected; their rows are in {again}, "
                       "ready for --data of the next round.")
    rows = [{"stage": s.when, "prompt": p.text, "answer": a, "source": s.name}
            for s in order for p, a in zip(questions.prompts, asked[s.name].answers, strict=True)]
    return rows + [summary_row(s.name, scores[s.name], differences.get(s.name, {})) for s in order
                   if scores[s.name].headline]


def evaluate_run(stage: Stage) -> None:
    """Asks every source the same, and writes answers, figures, alarms, pairs and rejected rows anew."""
    plan, run, events = stage.plan, stage.run, stage.events
    if not run.merged.is_dir():
        raise PreflightError(f"{run.merged} should hold the merged model; there is none. Run the merge first.")
    check_evaluation(plan.model_copy(update={"backend": "local"}), run.results_root)  # here is where it runs
    tokenizer = load_tokenizer(str(run.merged))
    questions = _questions(stage, tokenizer)
    rows: list[dict[str, Any]] = []
    if not questions.prompts and not plan.eval_prompts:
        events.message("No answers were compared, because --eval-prompts is 0.")
    elif not questions.prompts:
        events.message("Nothing to answer: no --sample-prompt was given and no held-out row has a prompt.", "warning")
    else:
        order = sources_of(plan, run, _device(plan), events)
        references = _references(questions, tokenizer)
        asked: dict[str, Asked] = {}
        for number, source in enumerate(order):
            events.progress("sources answering", number, len(order), "models")
            asked[source.name] = source.ask(questions)
        events.progress("sources answering", len(order), len(order), "models")
        scores = {name: _score(plan, questions, references, a) for name, a in asked.items()}
        rows = _record(stage, questions, asked, scores, order)
    lines = [*_keep_other_rows(run.samples), *(json.dumps(row, ensure_ascii=False) for row in rows)]
    write_durably(run.samples, "".join(line + "\n" for line in lines))
    write_card(plan, run)
    for row in rows:
        if "answer" in row:
            events.emit("sample", step=None, **{k: row[k] for k in ("prompt", "answer", "source")})


def main(argv: list[str] | None = None) -> int:
    """Runs the stage. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sparktune.setup.export.evaluate", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder, results/RUN")
    return run_stage("evaluate", parser.parse_args(argv).run, evaluate_run)


if __name__ == "__main__":
    sys.exit(main())
