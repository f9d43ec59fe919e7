"""How a run that was asked to stop comes to its end: which step is finished, and how long the checkpoint will take."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, NoReturn

import torch

from sparktune.setup.plan.errors import StoppedResumable
from sparktune.setup.plan.eta import duration
from sparktune.setup.plan.outfolder import size_of
from sparktune.training.checkpoint import checkpoints_of

if TYPE_CHECKING:
    from sparktune.training.loop import TrainingLoop

__all__ = ["PATIENCE_S", "far_from_its_end", "save_in_words", "stop_here", "tell_stop"]

PATIENCE_S = 5.0
"""A step that needs longer than this to its end is given up when a stop is asked for: half of the ten seconds that a
stop may take beside its checkpoint."""
_GUESS = 2e8
"""Bytes a second where this run has written no checkpoint yet: written, hashed, forced to a slow disk. A guess."""


def far_from_its_end(loop: TrainingLoop, began_s: float, done: int, left: int) -> bool:
    """Says whether a step is better given up than finished before a stop; it is done again when the run goes on.

    Args:
        loop: in the step.
        began_s: when the step began, by time.perf_counter.
        done: its micro-batches that were handed out; a GPU may not have come as far.
        left: its other ones.
    """
    if not done:
        return True
    return left * max((time.perf_counter() - began_s) / done, loop.micro_batch_s) > PATIENCE_S


def tell_stop(loop: TrainingLoop, finishing: int | None = None) -> None:
    """Says, once, what will be written before the run ends and how long that will take.

    Args:
        loop: a stop was asked for.
        finishing: the step that is finished first; None after a step.
    """
    if loop.stop_told or (finishing is None and (loop.is_saved() or not loop.state.step)):
        return
    earlier = checkpoints_of(loop.run.root)
    if not earlier and not loop.world.alone:
        return  # every rank would have to say what it holds, and only those that were asked to stop are here
    loop.stop_told = True
    size = size_of(earlier[0]) if earlier else _bytes_of_state(loop.engine.state())
    when = "Stopping" if finishing is None else f"Stopping after step {finishing}"
    loop.say(f"{when}: writing {save_in_words(size, loop.state.save_bytes_per_s)}.")


def stop_here(loop: TrainingLoop) -> NoReturn:
    """Saves and leaves, as the user asked. Before the first step there is nothing to save.

    Raises:
        StoppedResumable: says how to go on.
    """
    state = loop.state
    if state.step == 0:
        raise StoppedResumable(
            f"Stopped before the first step, {_why(loop)}. Go on with: python train.py --config {loop.run.plan}"
        )
    tell_stop(loop)
    loop.save()
    loop.stop.deaf = True  # torchrun tells the ranks that still live to stop, once one of them has
    raise StoppedResumable(
        f"Stopped after step {state.step} of {loop.length.total_steps}, {_why(loop)}. Go on with: "
        f"python train.py --resume-from-checkpoint {loop.run.checkpoint(state.step)}"
    )


def _why(loop: TrainingLoop) -> str:
    """Returns the end of the sentence that says why; a rank that was not asked itself heard it from another one."""
    return loop.stop.why if loop.stop.requested or loop.world.alone else "as another rank was asked to"


def _bytes_of_state(state: Mapping[str, torch.Tensor]) -> int:
    """Returns what a checkpoint will have at most: the engine's state, and its masters once more as the result."""
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in state.items()}
    return sum(sizes.values()) + sum(size for name, size in sizes.items() if name.startswith("master."))


def save_in_words(size: int, bytes_per_s: float | None) -> str:
    """Returns the prediction as it is said: a checkpoint of 1.28 GB, about 4 s (...).

    Args:
        size: bytes.
        bytes_per_s: what the run's earlier checkpoints showed; None, or no speed at all, where nothing did.
    """
    shown = f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
    if bytes_per_s is None or not math.isfinite(bytes_per_s) or bytes_per_s <= 0:
        bytes_per_s, why = _GUESS, "a guess: this run has written none yet"
    else:
        why = f"{bytes_per_s / 1e6:,.1f} MB a second, as the one before"
    return f"a checkpoint of {shown}, about {duration(math.ceil(size / bytes_per_s))} ({why})"
