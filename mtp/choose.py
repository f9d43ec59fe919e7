"""Trains a head, measures it against the one it started from on prompts it never saw, and says which one to ship."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sparktune.mtp.acceptance import answers_of, compare, match_flags, speedup_estimate, summarise, walk
from sparktune.mtp.head import load_head
from sparktune.mtp.tensors import Place, mtp_shapes
from sparktune.mtp.train_mtp import HeadRun, head_of, load_tower, train_head
from sparktune.setup.data.cache import TokenDataset
from sparktune.setup.data.tokenizer import ChatTokenizer
from sparktune.setup.plan.errors import StoppedResumable, UsageError
from sparktune.setup.plan.events import EventWriter
from sparktune.setup.plan.outfolder import write_durably
from sparktune.setup.plan.schema import ModelSpec
from sparktune.training.gpu_lock import hold_gpu
from sparktune.training.samples import stop_ids
from sparktune.training.stop import StopRequest

__all__ = ["Outcome", "draft_cost", "split_for_heads", "stopping", "train_and_choose"]

_PROMPTS = {"cuda": 48, "cpu": 24}
_TOKENS = {"cuda": 192, "cpu": 40}
_LONGEST_PROMPT = 4096
_LEAST_PROMPTS = 4


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was found out."""

    chosen: str
    """trained or default."""
    head: dict[str, Place]
    """The chosen head's tensors."""
    reason: str
    """Both heads' figures in a sentence."""


@contextmanager
def stopping(device: torch.device, run: str) -> Iterator[StopRequest]:
    """Takes a GPU, SIGINT and SIGTERM while a head trains: the first signal leaves a checkpoint. Main thread only.

    Args:
        device: where it trains.
        run: the run's name.

    Raises:
        PreflightError: another run computes on that GPU.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    stop = StopRequest()
    stop.install()
    stop.looping = True
    try:
        with hold_gpu(device, run):
            yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def draft_cost(spec: ModelSpec) -> float:
    """Returns a draft's cost relative to a step of the base: the ratio of the weights each reads. An estimate.

    0.30 for the 2B, most of it the output projection.
    """
    text = {"hidden_size": spec.hidden_size, "intermediate_size": spec.intermediate_size, "head_dim": spec.head_dim,
            "num_attention_heads": spec.num_heads, "num_key_value_heads": spec.num_kv_heads}
    projection = spec.vocab_size * spec.hidden_size
    layer = sum(int(np.prod(shape)) for shape in mtp_shapes(text).values())
    read = spec.parameters - (0 if spec.tie_word_embeddings else projection)
    return (layer + projection) / read


def _part(data: TokenDataset, first: int, last: int) -> TokenDataset:
    low, high = int(data.offsets[first]), int(data.offsets[last])
    return TokenDataset(data.ids[low:high], data.supervised[low:high], data.offsets[first : last + 1] - low,
                        data.lines[first:last], f"{data.key}:{first}:{last}")


def _prompts(data: TokenDataset, most: int) -> list[list[int]]:
    found: list[list[int]] = []
    for index in range(len(data)):
        ids, supervised = data[index]
        learned = np.flatnonzero(supervised)
        prompt = [int(i) for i in ids[: learned[0]]] if len(learned) else []
        if 0 < len(prompt) <= _LONGEST_PROMPT and prompt not in found:
            found.append(prompt)
        if len(found) == most:
            break
    return found


def split_for_heads(
    train: TokenDataset, held_out: TokenDataset | None, most: int
) -> tuple[TokenDataset, list[list[int]], str]:
    """Returns what the head learns from, the prompts it is measured on, and in words what they are.

    Held-out rows where there are enough of them; otherwise the last fifth of the training rows, at most `most`, which
    the head then does not see (the model did).
    """
    prompts = _prompts(held_out, most) if held_out is not None else []
    if len(prompts) >= _LEAST_PROMPTS:
        return train, prompts, "held-out prompts"
    count = min(most, len(train) // 5)
    if count == 0:
        return train, _prompts(train, most), "prompts that the head learned from (too few rows to hold out any)"
    cut = len(train) - count
    return _part(train, 0, cut), _prompts(_part(train, cut, len(train)), most), (
        "prompts that the head did not learn from (the model did; hold rows out with --eval-split)"
    )


def _go_on(stop: StopRequest | None) -> None:
    """Ends the measuring where a stop was asked for; what was trained is on the disk by then."""
    if stop is not None and stop.requested:
        raise StoppedResumable("Stopped as you asked while the MTP heads were measured; the head is trained, start "
                               "again to go on from its last checkpoint.")


def _line(name: str, figures: dict[str, Any], cost: float) -> str:
    places = ", ".join(f"{100 * p:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
                       for p, (low, high) in zip(figures["positions"], figures["positions_ci95"], strict=True))
    estimate = speedup_estimate(figures["positions"], cost)
    return (f"{name} head: accepted at positions 1, 2: {places}; {figures['acceptance_length']:.2f} tokens a pass; "
            f"speed-up {estimate:.2f}x (an estimate: nothing was served)")


def train_and_choose(
    run: HeadRun, train: TokenDataset, held_out: TokenDataset | None, tokenizer: ChatTokenizer, device: torch.device,
    events: EventWriter, stop: StopRequest | None = None,
) -> Outcome:
    """Trains, measures, chooses; writes `acceptance.json` into `run.work`.

    Args:
        run: the training; `run.head` is the head it is measured against.
        train: the model's training examples.
        held_out: its held-out ones, if any.
        tokenizer: the model's; says what ends an answer.
        device: where it runs.
        events: progress and messages.
        stop: see `train_head`.

    Raises:
        See `train_head`, which a stop may also end while drafts are measured. UsageError: no row has a prompt to
        measure on.
    """
    learn, prompts, what = split_for_heads(train, held_out, _PROMPTS[device.type])
    if not prompts:
        raise UsageError("No row has a prompt before its first answer, so drafts cannot be measured, and the MTP head "
                         "is not trained unmeasured. Use --mtp default.")
    tower, drafts = load_tower(run.model_dir, device), run.recipe.depth
    train_head(run, learn, tower, events, stop)
    trained = head_of(run.out)
    heads = {"default": load_head(tower, run.head, run.source), "trained": load_head(tower, trained, str(run.out))}

    def answered(done: int) -> None:
        events.progress("drafts measured", done, len(prompts), "prompts")
        _go_on(stop)

    said = answers_of(tower, prompts, _TOKENS[device.type], stop_ids(tokenizer, train), answered)
    walks: dict[str, list[Any]] = {name: [] for name in heads}
    differing = 0
    for answer in said:
        _go_on(stop)
        flags, wrong = match_flags(tower, heads, answer, drafts)
        differing += wrong
        for name, found in flags.items():
            walks[name].append(walk(found, len(answer.prompt)))
    figures = {name: summarise(found, drafts) for name, found in walks.items()}
    gain, cost = compare(walks["default"], walks["trained"], drafts), draft_cost(tower.spec)
    chosen = "trained" if gain["acceptance_length"] > 0 else "default"
    lines = [_line(name, figures[name], cost) for name in ("trained", "default")]
    low, high = gain["acceptance_length_ci95"]
    lines.append(
        f"trained minus default on {len(said)} {what}: {gain['acceptance_length']:+.2f} tokens a pass "
        f"[{low:+.2f}, {high:+.2f}]; the {chosen} head is shipped"
    )
    write_durably(run.work / "acceptance.json", json.dumps({
        "prompts": len(said), "prompts_are": what, "answer_tokens": sum(len(a.answer) for a in said),
        "answer_tokens_that_differ_from_one_pass": differing, "drafts": drafts, "heads": figures, "gain": gain,
        "draft_cost_estimate": round(cost, 4), "chosen": chosen, "lines": lines,
        "speedup_estimate": {n: round(speedup_estimate(f["positions"], cost), 3) for n, f in figures.items()},
    }, indent=1) + "\n")
    return Outcome(chosen=chosen, head=dict(trained if chosen == "trained" else run.head), reason="; ".join(lines))
