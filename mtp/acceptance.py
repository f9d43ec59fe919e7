"""How many drafts a server would accept, measured without one: greedy walks over what the model itself says.

1. Prompts the head did not train on; the merged model answers them greedily.
2. One pass of the model over each prompt and answer. How often its argmax differs from the answer's token is reported:
   it is rounding, and bounds what can be said.
3. The head's drafts at every anchor, in the mixture of keys that serving has (mtp/head.py), against the answer.
4. A walk as serving walks: from the anchor t, accept a of K drafts, go on from t + a + 1.

Figures are vLLM's: position k counts a draft only if all before it were accepted; acceptance length is 1 + accepted
drafts / rounds. Intervals are 95 % bootstraps over prompts; two heads are compared on the same prompts, in pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from sparktune.mtp.head import MtpHead
from sparktune.mtp.rows import draft_rows
from sparktune.training.batch import MicroBatch
from sparktune.training.tower import TextTower

__all__ = ["Answer", "Walk", "answers_of", "compare", "match_flags", "speedup_estimate", "summarise", "walk"]

_RESAMPLES = 2000
_EDGES = (0, 256, 1024, 4096, 16384)
"""Lower edges of the context lengths that figures are also given for, in tokens."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A prompt and what the model said, as token ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Walk:
    """The rounds of one answer."""

    context: tuple[int, ...]
    """Tokens before each round's drafts."""
    accepted: tuple[int, ...]
    """Accepted drafts of each round, 0..K."""


def answers_of(
    tower: TextTower, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Sequence[int],
    progress: Callable[[int], None] = lambda done: None,
) -> list[Answer]:
    """Returns the model's greedy answers."""
    found = []
    for number, prompt in enumerate(prompts, 1):
        said = tower.generate(list(prompt), max_new_tokens, stop_ids)
        found.append(Answer(prompt=tuple(prompt), answer=tuple(said)))
        progress(number)
    return found


def _row(answer: Answer, device: torch.device) -> MicroBatch:
    ids = torch.tensor([*answer.prompt, *answer.answer])
    ends = torch.tensor([0, len(ids)], dtype=torch.int32)
    learned = torch.arange(len(answer.prompt) - 1, len(ids) - 1)
    return MicroBatch(
        ids=ids, position_ids=torch.arange(len(ids)), cu_seqlens=ends, cu_seqlens_cpu=ends.clone(),
        max_seqlen=len(ids), supervised_rows=learned, targets=ids[learned + 1], examples=(0,), real_tokens=len(ids),
    )


@torch.no_grad()
def match_flags(
    tower: TextTower, heads: Mapping[str, MtpHead], answer: Answer, drafts: int
) -> tuple[dict[str, npt.NDArray[np.bool_]], int]:
    """Returns head -> flags [rows, K], and how many of the answer's tokens are not the model's argmax in this pass.

    Row i is the anchor whose next token is the answer's i-th; flag k says that draft k, made after right drafts, is
    the answer's token i + k. Drafts that would come after the answer's end are False.
    """
    batch = _row(answer, tower.device)
    rows, device = draft_rows(batch, drafts), tower.device
    batch = batch.to(device)
    hidden = tower(batch)
    said = F.linear(hidden[batch.supervised_rows], tower.head_weight).argmax(-1)
    differing = int((said != batch.targets).sum())
    first, found = len(answer.prompt) - 1, {}
    for name, head in heads.items():
        flags = np.zeros((len(answer.answer), drafts), dtype=np.bool_)
        for k, m in enumerate(head(batch, hidden, tower.embed_tokens, tower.inv_freq, drafts)):
            anchors = rows.anchors[k]
            if len(anchors):
                guess = F.linear(m[anchors.to(device)], tower.head_weight).argmax(-1).cpu()
                flags[(anchors - first).numpy(), k] = (guess == rows.labels[k]).numpy()
        found[name] = flags
    return found, differing


def walk(flags: npt.NDArray[np.bool_], prompt_length: int) -> Walk:
    """Walks one answer's anchors as serving does. A round at the last token has nothing to draft and is left out."""
    context, accepted, at = [], [], 0
    while at < len(flags) - 1:
        run = flags[at]
        count = int(np.argmin(run)) if not run.all() else len(run)
        context.append(prompt_length + at + 1)
        accepted.append(count)
        at += count + 1
    return Walk(context=tuple(context), accepted=tuple(accepted))


def _counts(walks: Sequence[Walk], drafts: int, low: int = 0, high: float = float("inf")) -> npt.NDArray[np.int64]:
    """[answers, K + 1]: rounds, then rounds in which at least k drafts were accepted, of contexts in [low, high)."""
    table = np.zeros((len(walks), drafts + 1), dtype=np.int64)
    for i, w in enumerate(walks):
        kept = np.array([a for c, a in zip(w.context, w.accepted, strict=True) if low <= c < high], dtype=np.int64)
        table[i] = [len(kept), *((kept >= k).sum() for k in range(1, drafts + 1))]
    return table


def _rates(table: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """[..., answers, K + 1] -> [..., K + 1]: rate of each position, then the acceptance length."""
    sums = table.sum(-2).astype(np.float64)
    rates = sums[..., 1:] / np.maximum(sums[..., :1], 1)
    return np.concatenate((rates, 1 + rates.sum(-1, keepdims=True)), -1)


def _resamples(count: int, seed: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, count, (_RESAMPLES, count))


def _interval(values: npt.NDArray[np.float64]) -> list[float]:
    return [round(float(x), 4) for x in np.percentile(values, (2.5, 97.5))]


def _figures(table: npt.NDArray[np.int64], seed: int) -> dict[str, Any]:
    point, spread = _rates(table), _rates(table[_resamples(len(table), seed)])
    return {
        "rounds": int(table[:, 0].sum()),
        "positions": [round(float(x), 4) for x in point[:-1]],
        "positions_ci95": [_interval(spread[:, k]) for k in range(len(point) - 1)],
        "acceptance_length": round(float(point[-1]), 4),
        "acceptance_length_ci95": _interval(spread[:, -1]),
    }


def summarise(walks: Sequence[Walk], drafts: int, seed: int = 0) -> dict[str, Any]:
    """Returns one head's figures with 95 % intervals, and the same by context length.

    Args:
        walks: one an answer, at least one.
        drafts: K.
        seed: of the bootstrap.

    Returns:
        rounds, positions [K], positions_ci95, acceptance_length, acceptance_length_ci95, by_context: list of the same
        with from_tokens, where there are rounds.
    """
    found = _figures(_counts(walks, drafts), seed)
    found["by_context"] = []
    for low, high in zip(_EDGES, (*_EDGES[1:], float("inf")), strict=True):
        table = _counts(walks, drafts, low, high)
        table = table[table[:, 0] > 0]
        if len(table):
            found["by_context"].append({"from_tokens": low, **_figures(table, seed)})
    return found


def compare(before: Sequence[Walk], after: Sequence[Walk], drafts: int, seed: int = 0) -> dict[str, Any]:
    """Returns `after` minus `before` on the same answers: positions and acceptance length with 95 % intervals.

    Raises:
        ValueError: the walks are not of the same number of answers.
    """
    if len(before) != len(after):
        raise ValueError(f"two heads are compared on the same answers; got {len(before)} and {len(after)} walks.")
    a, b, picks = _counts(before, drafts), _counts(after, drafts), _resamples(len(before), seed)
    point, spread = _rates(b) - _rates(a), _rates(b[picks]) - _rates(a[picks])
    return {
        "positions": [round(float(x), 4) for x in point[:-1]],
        "positions_ci95": [_interval(spread[:, k]) for k in range(drafts)],
        "acceptance_length": round(float(point[-1]), 4), "acceptance_length_ci95": _interval(spread[:, -1]),
    }


def speedup_estimate(positions: Sequence[float], draft_cost: float, verify_cost: float = 1.0) -> float:
    """Returns (1 + sum P_k) / (V + K c): an estimate, for nothing was served.

    Args:
        positions: cumulative acceptance of each position, P_k.
        draft_cost: c, a draft's time relative to a step of the base; about 0.30 for 2B, mostly the output projection.
        verify_cost: V, a verifying pass's time relative to a step of one token.
    """
    return (1 + sum(positions)) / (verify_cost + len(positions) * draft_cost)
