"""Steps that must not be learned from: what is wrong with them, and which rows of the data are to blame.

A spike is a loss far above what the run has seen: more than `limit` times the usual spread, and more than two nats,
above the median of the last steps. The spread is 1.4826 times the median absolute deviation, the standard deviation of
a normal distribution (Rousseeuw and Croux 1993); unlike a standard deviation, one spike does not hide the next.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from sparktune.setup.plan.errors import SparktuneError
from sparktune.training.batch import MicroBatch, documents
from sparktune.training.distributed import World
from sparktune.training.engine import Engine
from sparktune.training.spread import local_rows

__all__ = [
    "HISTORY", "MOST_IN_A_ROW", "BadStep", "broken_gradients", "check_first_gradients", "damaged_tensors",
    "guilty_lines", "judge", "some",
]

HISTORY = 64
"""Losses that a spike is measured against."""
MOST_IN_A_ROW = 10
"""Bad steps after which a policy that goes on stops too: then it is not the rows."""
_LEAST_HISTORY = 16
_LEAST_NATS = 2.0
_TO_DEVIATION = 1.4826


@dataclass(frozen=True, kw_only=True)
class BadStep:
    """Why a step must not be learned from."""

    kind: Literal["loss", "gradient", "spike", "masked"]
    what: str
    """The beginning of a sentence: The loss is nan."""
    above: float = math.inf
    """Of a spike: the loss from which it is one."""


def judge(
    loss: float | None, grad_norm: float | None, batches: Sequence[MicroBatch], recent: Sequence[float], limit: float
) -> BadStep | None:
    """Returns what is wrong with a step, before anything is learned from it; None where nothing is.

    Args:
        loss: mean over the step's supervised tokens; None where there are none.
        grad_norm: global norm of the gradients; None as above.
        batches: the step's micro-batches.
        recent: losses of the steps before.
        limit: spreads above the median that make a spike; 0 looks for none.
    """
    if loss is None or grad_norm is None:
        return BadStep(kind="masked", what="No token of the step is supervised")
    empty = sum(1 for batch in batches if not batch.supervised_tokens)
    if empty:
        return BadStep(kind="masked", what=f"{empty} of {len(batches)} micro-batches have no supervised token")
    if not math.isfinite(loss):
        return BadStep(kind="loss", what=f"The loss is {loss}")
    if not math.isfinite(grad_norm):
        return BadStep(kind="gradient", what=f"The gradient norm is {grad_norm}")
    if limit and len(recent) >= _LEAST_HISTORY:
        median = statistics.median(recent)
        spread = _TO_DEVIATION * statistics.median(abs(value - median) for value in recent)
        above = median + max(limit * spread, _LEAST_NATS)
        if loss > above:
            what = f"The loss jumped to {loss:.4f}, from a median of {median:.4f} over the last {len(recent)} steps"
            return BadStep(kind="spike", what=what, above=above)
    return None


def guilty_lines(
    bad: BadStep, engine: Engine, batches: Sequence[MicroBatch], lines: Callable[[MicroBatch], list[int]]
) -> tuple[list[int], bool]:
    """Finds the rows that make a step bad, by going through it again document by document. Changes no weight.

    Args:
        bad: what is wrong.
        engine: its gradients are forgotten.
        batches: the step's micro-batches.
        lines: gives the line numbers of a micro-batch's examples.

    Returns:
        (line numbers, ascending; whether they are the guilty ones: False when no row stands out and all are named).
    """
    if bad.kind == "masked":
        found = [batch for batch in batches if not batch.supervised_tokens]
    else:
        suspects = {"loss": _spoils_loss, "gradient": _spoils_gradient, "spike": _is_far_above}[bad.kind]
        engine.drop_gradients()  # what the step used is free again
        found = [document for batch in batches for document in documents(batch)
                 if document.supervised_tokens and suspects(engine, document, bad.above)]
    engine.drop_gradients()
    whose = found or list(batches)
    return sorted({line for batch in whose for line in lines(batch)}), bool(found)


def _mean_loss(engine: Engine, document: MicroBatch) -> float:
    return float(engine.loss_sum(document)) / document.supervised_tokens


def _spoils_loss(engine: Engine, document: MicroBatch, above: float) -> bool:
    return not math.isfinite(_mean_loss(engine, document))


def _is_far_above(engine: Engine, document: MicroBatch, above: float) -> bool:
    return _mean_loss(engine, document) > above


def _spoils_gradient(engine: Engine, document: MicroBatch, above: float) -> bool:
    engine.drop_gradients()
    engine.forward_backward([document], document.supervised_tokens)
    return not math.isfinite(float(engine.gradient_norm()))


def damaged_tensors(state: Mapping[str, torch.Tensor]) -> list[str]:
    """Returns the names of tensors whose rows on this rank hold NaN or infinity. Allocates nothing of their size."""
    here = {name: local_rows(tensor) for name, tensor in state.items()}
    named = [(name, tensor) for name, tensor in here.items() if tensor.is_floating_point() and tensor.numel()]
    extremes = [torch.stack(torch.aminmax(tensor)).float().cpu() for _, tensor in named]
    return [name for (name, _), ends in zip(named, extremes, strict=True) if not ends.isfinite().all()]


def check_first_gradients(engine: Engine, step: int, say: Callable[[str], None], world: World | None = None) -> None:
    """Looks at every gradient of a process's first step, which is not learned from yet: all there, zeros named.

    Raises:
        SparktuneError: a trainable tensor has no gradient.
    """
    found = dict(engine.named_gradients())
    missing = [name for name, gradient in found.items() if gradient is None]
    if missing:
        raise SparktuneError(
            f"At step {step} {len(missing)} trainable tensors got no gradient at all, so they would never learn: "
            f"{some(missing)}. The model's forward pass does not use them; choose other --target-modules."
        )
    present = {name: gradient for name, gradient in found.items() if gradient is not None}
    # of a spread tensor every rank sees its own rows
    moves = (world or World()).largest(
        torch.stack([gradient.ne(0).any() for gradient in present.values()]).to(torch.uint8)
    ).tolist()
    zero = [name for name, any_ in zip(present, moves, strict=True) if not any_]
    expected = {name for name in zero if "lora_a" in name.lower() and step == 1}
    note = f"Step {step}: all {len(present)} trainable tensors have finite gradients"
    if expected:
        note += f"; {len(expected)} lora_A ones are zero, as they must be while every lora_B is still zero"
    say(note + ".")
    others = [name for name in zero if name not in expected]
    if others:
        say(f"Warning: {len(others)} other gradients are exactly zero at step {step}: {some(others)}.")


def broken_gradients(engine: Engine) -> str:
    """Returns which gradients are not finite, in words; empty when all are."""
    present = {name: gradient for name, gradient in engine.named_gradients() if gradient is not None}
    broken = damaged_tensors(present)
    return f"{len(broken)} of {len(present)} gradients are NaN or infinite: {some(broken)}. " if broken else ""


def some(names: Sequence[object]) -> str:
    """Returns up to ten names, then a count."""
    shown = ", ".join(map(str, names[:10]))
    return shown + (f" and {len(names) - 10} more" if len(names) > 10 else "")
