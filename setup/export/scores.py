"""How good answers are: exact match, chrF, BLEU, perplexity, the user's own validator; and whether a difference is one.

chrF and BLEU are sacrebleu's, sentence by sentence for the paired comparison and over all answers for the headline.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sparktune.setup.plan.errors import UsageError

__all__ = ["ALARM", "Scores", "alarms", "judge_answers", "paired_difference", "score", "summary_row", "validate"]

ALARM = 0.02
"""A result worse than its base by more than this share raises an alarm."""
_SAMPLES = 2000
_LEVEL = 0.95
_VALIDATOR_S = 60
_ACCEPTED, _REJECTED = 0, 1
_LOWER_IS_BETTER = ("perplexity",)

Row = Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What one source's answers are worth."""

    headline: dict[str, float]
    """Over all answers: exact_match, chrf, bleu, validator (shares of 1; chrF and BLEU of 100), perplexity."""
    rows: dict[str, list[float]]
    """The same per answer, in the prompts' order: what is compared in pairs. For perplexity, the mean loss in nats."""


def validate(command: Sequence[str], prompt: str, reference: str | None, answer: str) -> bool:
    """Returns the user's own verdict on one answer.

    The command runs without a shell, gets one JSON object on standard input, and exits 0 (good) or 1 (not).

    Raises:
        UsageError: it cannot be started, takes longer than a minute, or exits with another code.
    """
    request = json.dumps({"prompt": prompt, "reference": reference, "answer": answer}, ensure_ascii=False)
    try:
        done = subprocess.run(list(command), input=request, capture_output=True, text=True, timeout=_VALIDATOR_S,
                              check=False)
    except OSError as error:
        raise UsageError(f"--validator {command[0]!r} cannot be started: {error.strerror}. Give a program's path, with "
                         "its arguments after it.") from error
    except subprocess.TimeoutExpired as error:
        raise UsageError(f"--validator {command[0]!r} took longer than {_VALIDATOR_S} s for one answer. Make it "
                         "quicker; it is asked once an answer.") from error
    if done.returncode not in (_ACCEPTED, _REJECTED):
        said = done.stderr.strip().splitlines()
        raise UsageError(f"--validator {command[0]!r} should exit 0 for a good answer and 1 for a bad one, it exited "
                         f"{done.returncode}: {said[-1] if said else 'it said nothing'}.")
    return done.returncode == _ACCEPTED


def judge_answers(
    command: Sequence[str] | None, prompts: Sequence[str], references: Sequence[str | None], answers: Sequence[str]
) -> list[float] | None:
    """Returns 1 for each accepted answer and 0 for each rejected one; None without a validator."""
    if not command:
        return None
    return [float(validate(command, p, r, a)) for p, r, a in zip(prompts, references, answers, strict=True)]


def score(
    answers: Sequence[str], references: Sequence[str | None], *, verdicts: Sequence[float] | None = None,
    losses: Sequence[float] | None = None, loss_tokens: Sequence[int] | None = None,
) -> Scores:
    """Scores one source.

    Args:
        answers: one a prompt.
        references: what the data answers; None where there is nothing to compare with. Exact match, chrF and BLEU are
            over the prompts that have one.
        verdicts: of the validator, one an answer.
        losses: mean loss in nats of each reference under the model.
        loss_tokens: tokens of each reference, the weights of perplexity.
    """
    from sacrebleu.metrics import BLEU, CHRF

    headline: dict[str, float] = {}
    rows: dict[str, list[float]] = {}
    pairs = [(a, r) for a, r in zip(answers, references, strict=True) if r is not None]
    if pairs:
        chrf, bleu, sentence = CHRF(), BLEU(), BLEU(effective_order=True)
        rows["exact_match"] = [float(a.strip() == r.strip()) for a, r in pairs]
        rows["chrf"] = [float(chrf.sentence_score(a, [r]).score) for a, r in pairs]
        rows["bleu"] = [float(sentence.sentence_score(a, [r]).score) for a, r in pairs]
        given, wanted = [a for a, _ in pairs], [[r for _, r in pairs]]
        headline = {"exact_match": float(np.mean(rows["exact_match"])),
                    "chrf": float(chrf.corpus_score(given, wanted).score),
                    "bleu": float(bleu.corpus_score(given, wanted).score)}
    if verdicts is not None:
        rows["validator"] = list(verdicts)
        headline["validator"] = float(np.mean(verdicts))
    if losses and loss_tokens:
        rows["perplexity"] = list(losses)
        headline["perplexity"] = math.exp(float(np.average(losses, weights=loss_tokens)))
    return Scores(headline=headline, rows=rows)


def paired_difference(before: Row, after: Row, seed: int) -> dict[str, float]:
    """Returns the mean of after - before over the same prompts, with its interval by bootstrap over prompts.

    Args:
        before: a score per prompt.
        after: the same prompts' scores of another source.
        seed: of the resampling.
    """
    difference: npt.NDArray[np.float64] = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    generator = np.random.default_rng(seed)
    drawn = difference[generator.integers(0, len(difference), (_SAMPLES, len(difference)))].mean(axis=1)
    low, high = np.quantile(drawn, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return {"difference": float(difference.mean()), "low": float(low), "high": float(high),
            "prompts": float(len(difference))}


def alarms(before: Mapping[str, float], after: Mapping[str, float], who: str, than: str) -> list[str]:
    """Returns a sentence for each headline figure in which `who` is worse than `than` by more than 2 %."""
    found = []
    for name, value in after.items():
        if name not in before:
            continue
        reference = before[name]
        lower = name in _LOWER_IS_BETTER
        worse = value > reference * (1 + ALARM) if lower else value < reference * (1 - ALARM)
        if worse:
            found.append(f"{who} is worse than {than} in {name}: {value:.4g} instead of {reference:.4g}, more than "
                         f"{ALARM:.0%}.")
    return found


def summary_row(source: str, scores: Scores, differences: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns one source's figures as a flat row for samples.jsonl and the report."""
    row: dict[str, Any] = {"stage": "evaluation", "source": source}
    for name, value in scores.headline.items():
        row[name] = round(value, 4)
        if name in differences:
            d = differences[name]
            row[f"{name} against base"] = f"{d['difference']:+.4g} [{d['low']:+.4g}, {d['high']:+.4g}]"
    return row
