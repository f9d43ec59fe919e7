"""The DatasetReport: what became of the rows, lengths of examples, and what packing would make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparktune.setup.data.binpack import PAD_MULTIPLE, real_share
from sparktune.setup.data.cache import TokenDataset
from sparktune.setup.data.problems import FileTally
from sparktune.setup.data.read import FileFacts
from sparktune.setup.plan.schema import DatasetReport, LengthStats, Plan

__all__ = ["dataset_report", "length_stats", "pack_candidates", "packing_shares"]

_COMMON_LENGTHS = (2048, 4096, 5376, 8192, 16384)
_BINS = 40
# A sample of this many examples gives the share of real tokens to three digits and keeps the analysis in seconds.
_PACKING_SAMPLE = 50_000


def dataset_report(
    plan: Plan, files: list[Path], facts: FileFacts, train: TokenDataset, evaluation: TokenDataset,
    rows: dict[str, Any], tallies: list[FileTally],
) -> DatasetReport:
    """Returns the report of tokenised data.

    Args:
        plan: the plan; `pack_length` is compared with the candidates.
        files: the training file and, where there is one, the evaluation file, as they were read.
        facts: of the training file.
        train: training examples, at least one.
        evaluation: held-out examples, maybe none.
        rows: of the kept rows, what `RowTally.summary` returns.
        tallies: of the training file, and of the evaluation file where there is one.
    """
    lengths = length_stats(train.lengths)
    supervised = int(train.supervised_counts.sum())
    candidates = pack_candidates(lengths, plan.max_seq_length, plan.pack_length)
    return DatasetReport(
        path=str(files[0]), sha256=facts.sha256, bytes=facts.bytes, rows=tallies[0].rows,
        kept=len(train) + len(evaluation), train_examples=len(train), eval_examples=len(evaluation),
        dropped=dict(tallies[0].dropped), problems=tallies[0].problems, truncated=tallies[0].truncated,
        lengths=lengths, supervised_tokens=supervised, supervised_share=supervised / lengths.total,
        packing=packing_shares(train.lengths, candidates), cache_key=train.key,
        warnings=_warnings(plan, files, tallies, rows, len(evaluation)), **rows,
    )


def _warnings(
    plan: Plan, files: list[Path], tallies: list[FileTally], rows: dict[str, Any], eval_examples: int
) -> list[str]:
    """Returns what the user should know although the run goes on."""
    warnings = []
    for path, tally in zip(files, tallies, strict=True):
        if dropped := tally.dropped.total():
            warnings.append(f"{path}: {dropped:,} of {tally.rows:,} rows are not used.\n{tally.listing()}")
        if tally.truncated:
            warnings.append(
                f"{path}: {tally.truncated:,} examples are cut at max_seq_length ({plan.max_seq_length:,} tokens)."
            )
        if tally.open_turns:
            warnings.append(
                f"{path}: the chat template closes {tally.open_turns:,} assistant turns with no special token; the "
                "model will not learn where to stop there."
            )
    for path, found in zip(files, (rows["findings"], rows["eval_findings"]), strict=False):
        warnings += [f"{path}: {text}" for text in _found(found, own_eval=len(files) > 1)]
    chats = sum(count for kind, count in rows["formats"].items() if kind != "text")
    if 0 < rows["with_thinking"] < chats:
        warnings.append(
            f"{files[0]}: {rows['with_thinking']:,} of {chats:,} conversations have thinking and the others none; the "
            "model learns to think now and then. Keep one kind, unless that is wanted."
        )
    if not eval_examples and plan.eval_split > 0:
        warnings.append(
            f"--eval-split {plan.eval_split:g} of {tallies[0].kept:,} examples holds out none, so there is no "
            "evaluation. Raise it, or give --eval-data."
        )
    return warnings


_FOUND = {
    "duplicate": "training rows repeat an earlier one exactly; all are kept. --dedupe exact leaves the repeats out.",
    "near_duplicate": "training rows say nearly the same as an earlier one; all are kept. --dedupe near leaves them "
                      "out.",
    "eval_leak": "held-out rows also stand in the training data, so the evaluation loss is too good. Remove them from "
                 "one of the two.",
    "near_eval_leak": "held-out rows say nearly the same as a training row, so the evaluation loss is too good.",
    "markup": "rows hold a chat template's markup inside a message: the text was rendered before. Give the bare "
              "messages.",
    "left_out": "rows have a message that the chat template does not show; the model never sees it.",
    "pii_email": "rows hold e-mail addresses. --redact-pii replaces them.",
    "pii_phone": "rows hold phone numbers. --redact-pii replaces them.",
    "pii_card": "rows hold payment card numbers. --redact-pii replaces them.",
    "pii_key": "rows hold what looks like a key or a password. --redact-pii replaces it; a key that was in a file "
               "should be made anew.",
}
_SHOWN_LINES = 10


def _found(findings: dict[str, Any], own_eval: bool) -> list[str]:
    """Returns one sentence for each finding, with the first lines it was found at."""
    texts = []
    for code, text in _FOUND.items():
        if code not in findings:
            continue
        count, lines = findings[code]["rows"], findings[code]["lines"]
        where = ", ".join(map(str, lines[:_SHOWN_LINES])) + (", ..." if count > _SHOWN_LINES else "")
        if code == "near_eval_leak":
            text += " Remove them from one of the two." if own_eval else " --dedupe near leaves them out."
        what, _, rest = text.partition("rows ")
        texts.append(f"{count:,} {what}rows {rest.rstrip('.')} (line{'s' if count > 1 else ''} {where}).")
    return texts


def length_stats(lengths: npt.ArrayLike) -> LengthStats:
    """Returns statistics of example lengths in tokens; percentiles are lengths that occur (nearest rank).

    The histogram has up to 40 equal bins from 0 to past the longest, edges on whole tokens.
    """
    sizes = np.sort(np.asarray(lengths, dtype=np.int64))
    if not sizes.size:
        return LengthStats(
            count=0, total=0, mean=0.0, p50=0, p90=0, p99=0, max=0, histogram_edges=[0, 1], histogram_counts=[0]
        )
    longest = int(sizes[-1])
    width = -(-(longest + 1) // _BINS)
    edges = np.arange(0, longest + width + 1, width)
    counts, _ = np.histogram(sizes, bins=edges)
    return LengthStats(
        count=sizes.size, total=int(sizes.sum()), mean=float(sizes.mean()),
        p50=_percentile(sizes, 50), p90=_percentile(sizes, 90), p99=_percentile(sizes, 99), max=longest,
        histogram_edges=edges.tolist(), histogram_counts=counts.tolist(),
    )


def _percentile(sizes: npt.NDArray[np.int64], percent: int) -> int:
    """Nearest rank in sorted sizes."""
    return int(sizes[max(0, -(-sizes.size * percent // 100) - 1)])


def pack_candidates(stats: LengthStats, max_seq_length: int, asked: int | None = None) -> list[int]:
    """Returns the pack lengths worth comparing, ascending: around the mean, p90, the common ones, and the asked one.

    None but the asked one is longer than max_seq_length or than the whole data rounded up to 128.
    """
    around = (stats.mean, 1.5 * stats.mean, 2 * stats.mean, 4 * stats.mean, float(stats.p90), float(stats.max))
    candidates = {_rounded_up(length) for length in around if length > 0} | set(_COMMON_LENGTHS)
    cap = min(max_seq_length, _rounded_up(max(stats.total, 1)))
    # An odd max_seq_length is itself a candidate: nothing longer makes sense, and the next multiple may be past it.
    allowed = {min(length, cap) for length in candidates}
    return sorted(allowed | ({asked} if asked is not None else set()))


def _rounded_up(length: float) -> int:
    return int(-(-length // PAD_MULTIPLE) * PAD_MULTIPLE)


def packing_shares(lengths: npt.ArrayLike, candidates: list[int]) -> dict[int, float]:
    """Returns pack_length -> share of real tokens in padded micro-batches, rounded to four digits.

    Above 50,000 examples, every n-th of them is looked at.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    sample = sizes[:: -(-sizes.size // _PACKING_SAMPLE) or 1]
    return {length: round(real_share(sample, length), 4) for length in candidates}
