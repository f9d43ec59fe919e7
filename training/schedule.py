"""How many steps a run has and how fast each one learns: pure functions of the step, so that a resume cannot drift."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["RunLength", "learning_rate", "run_length", "warmup_length"]


@dataclass(frozen=True, kw_only=True)
class RunLength:
    """The extent of a run, in optimiser steps."""

    micro_batches_per_epoch: int
    grad_accum_steps: int
    """Micro-batches of a full step; the last step of an epoch takes what is left and never reaches into the next."""
    total_steps: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one epoch."""
        return math.ceil(self.micro_batches_per_epoch / self.grad_accum_steps)

    def where(self, step: int) -> tuple[int, int, int]:
        """Returns (epoch, first micro-batch, one past the last) of step `step`, counted from 1."""
        epoch, inside = divmod(step - 1, self.steps_per_epoch)
        first = inside * self.grad_accum_steps
        return epoch, first, min(first + self.grad_accum_steps, self.micro_batches_per_epoch)

    def position_after(self, step: int) -> int:
        """Returns the micro-batches consumed by `step` steps, over all epochs: the position in the data."""
        if step == 0:
            return 0
        epoch, _, last = self.where(step)
        return epoch * self.micro_batches_per_epoch + last

    def epoch_after(self, step: int) -> float:
        """Returns the passes over the data done after `step` steps, as a fraction; 0 before the first."""
        return self.position_after(step) / self.micro_batches_per_epoch


def run_length(
    micro_batches_per_epoch: int, grad_accum_steps: int, num_epochs: float, max_steps: int | None
) -> RunLength:
    """Returns the extent of a run; `max_steps`, where given, replaces `num_epochs`.

    Raises:
        ValueError: there is nothing to train on.
    """
    if micro_batches_per_epoch < 1:
        raise ValueError("there are no training examples")
    per_epoch = math.ceil(micro_batches_per_epoch / grad_accum_steps)
    total = max_steps if max_steps is not None else max(1, math.ceil(num_epochs * per_epoch - 1e-9))
    return RunLength(
        micro_batches_per_epoch=micro_batches_per_epoch, grad_accum_steps=grad_accum_steps, total_steps=total,
    )


def warmup_length(total_steps: int, warmup_ratio: float, warmup_steps: int | None) -> int:
    """Returns the steps over which the learning rate rises: `warmup_steps`, else the ratio's share, at least one.

    A ratio of 0 means no warm-up.
    """
    if warmup_steps is not None:
        return min(warmup_steps, total_steps)
    return max(1, round(warmup_ratio * total_steps)) if warmup_ratio > 0 else 0


def learning_rate(
    step: int, *, peak: float, total_steps: int, warmup: int, shape: Literal["cosine", "linear", "constant"]
) -> float:
    """Returns the learning rate of optimiser step `step`, counted from 1.

    Rises linearly to `peak` at step `warmup`, then stays (constant), or falls to 0 one step after the last
    (linear, half a cosine), so that every step learns something.
    """
    if step <= warmup:
        return peak * step / warmup
    if shape == "constant":
        return peak
    done = (step - warmup) / (total_steps - warmup + 1)
    return peak * (1.0 - done) if shape == "linear" else peak * 0.5 * (1.0 + math.cos(math.pi * done))
