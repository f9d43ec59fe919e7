"""The DatasetReport: what became of the rows, lengths of examples, and what packing would make of them."""

from __future__ import annotations

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
    plan: Plan, facts: FileFacts, train: TokenDataset, evaluation: TokenDataset, rows: dict[str, Any],
    tallies: list[FileTally],
) -> DatasetReport:
    """Returns the report of tokenised data.

    Args:
        plan: the plan; `pack_length` is compared with the candidates.
        facts: of the training file.
        train: training examples, at least one.
        evaluation: held-out examples, maybe none.
        rows: formats, multi_turn, with_system, with_thinking, duplicates, eval_leaks of the kept rows.
        tallies: of the training file, and of the evaluation file where there is one.
    """
    lengths = length_stats(train.lengths)
    supervised = int(train.supervised_counts.sum())
    candidates = pack_candidates(lengths, plan.max_seq_length, plan.pack_length)
    return DatasetReport(
        path=str(plan.data), sha256=facts.sha256, bytes=facts.bytes, rows=tallies[0].rows,
        kept=len(train) + len(evaluation), train_examples=len(train), eval_examples=len(evaluation),
        dropped=dict(tallies[0].dropped), problems=tallies[0].problems, truncated=tallies[0].truncated,
        lengths=lengths, supervised_tokens=supervised, supervised_share=supervised / lengths.total,
        packing=packing_shares(train.lengths, candidates), cache_key=train.key,
        warnings=_warnings(plan, tallies, rows, len(evaluation)), **rows,
    )


def _warnings(plan: Plan, tallies: list[FileTally], rows: dict[str, Any], eval_examples: int) -> list[str]:
    """Returns what the user should know although the run goes on."""
    warnings = []
    for path, tally in zip((plan.data, plan.eval_data), tallies, strict=False):
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
    if rows["duplicates"]:
        warnings.append(
            f"{plan.data}: {rows['duplicates']:,} training rows repeat an earlier one exactly; all are kept."
        )
    if rows["eval_leaks"]:
        warnings.append(
            f"{plan.eval_data}: {rows['eval_leaks']:,} held-out rows also stand in the training data, so the "
            "evaluation loss is too good. Remove them from one of the two."
        )
    if not eval_examples and plan.eval_split > 0:
        warnings.append(
            f"--eval-split {plan.eval_split:g} of {tallies[0].kept:,} examples holds out none, so there is no "
            "evaluation. Raise it, or give --eval-data."
        )
    return warnings


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
