"""What the loop does about a step that cannot be computed or must not be learned from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from sparktune.setup.plan.config import save_plan
from sparktune.setup.plan.errors import MemoryBudgetError, SparktuneError
from sparktune.training.batch import MicroBatch
from sparktune.training.checkpoint import LoopState, load_loop_state, newest_valid, restore_rng
from sparktune.training.health import MOST_IN_A_ROW, BadStep, broken_gradients, damaged_tensors, guilty_lines, some
from sparktune.training.heard import heard_resume_point, heard_state

if TYPE_CHECKING:
    from sparktune.training.loop import TrainingLoop

__all__ = ["pass_over", "recompute_more"]


def recompute_more(loop: TrainingLoop, why: str) -> None:
    """Goes on with the next recompute policy after an allocation failed inside a step, and says so.

    Args:
        loop: at the step that failed.
        why: what the allocator said.

    Raises:
        MemoryBudgetError: there is nothing left to give up.
    """
    before, now = loop.plan.recompute_choice, loop.engine.recompute_more()
    step = loop.state.step + 1
    if now is None:
        raise MemoryBudgetError(
            f"Out of memory at step {step}, and recompute {before} keeps the least there is: {why} Lower "
            f"--pack-length or --max-seq-length and resume: checkpoints in {loop.run.root} are still good."
        )
    loop.plan = loop.plan.model_copy(update={"recompute": now, "recompute_layers": None})
    save_plan(loop.plan, loop.run.plan)
    loop.say(
        f"Warning: out of memory at step {step} with recompute {before} ({why}). The step is done again, once, "
        f"with recompute {now}, as are all that follow; the loss is the same, each step takes longer."
    )


def pass_over(loop: TrainingLoop, step: int, bad: BadStep, batches: Sequence[MicroBatch]) -> None:
    """Deals with a step that must not be learned from, as the plan says.

    stop: a checkpoint of the step before, and an error. skip: nothing is learned. rewind: the weights go back to
    the newest checkpoint, and all rows since then are passed over (Chowdhery et al. 2022, PaLM, section 5.1).

    Args:
        loop: before the step.
        step: its number.
        bad: what is wrong with it.
        batches: its micro-batches.

    Raises:
        SparktuneError: the policy is stop, or going on did not help: ten bad steps in a row, damaged weights.
    """
    loop.world.enter(f"what follows the bad step {step}")  # a checkpoint is written or read: no step's limit holds
    text, damaged = _describe(loop, step, bad, batches)
    loop.state.bad_in_a_row += 1
    loop.state.passed_over += 1
    policy = loop.plan.on_bad_step
    if policy == "rewind" and loop.state.bad_in_a_row <= MOST_IN_A_ROW:
        _rewind(loop, text, damaged)
    elif policy == "skip" and loop.state.bad_in_a_row <= MOST_IN_A_ROW and not damaged:
        loop.say(f"Warning: {text} The step was skipped: nothing was learned from it (--on-bad-step skip).")
    else:
        _stop_for(loop, text, damaged)


def _describe(loop: TrainingLoop, step: int, bad: BadStep, batches: Sequence[MicroBatch]) -> tuple[str, bool]:
    """Returns what is wrong with a step and where, in words, and whether the weights are what is wrong."""
    broken = broken_gradients(loop.engine) if bad.kind == "gradient" else ""
    damaged = damaged_tensors(loop.engine.state()) if bad.kind in ("loss", "gradient") else []
    if not loop.world.alone:
        return _describe_together(loop, step, bad, damaged)
    lines, guilty = guilty_lines(bad, loop.engine, batches, loop.train.lines)
    if damaged:
        lines, guilty = sorted({line for batch in batches for line in loop.train.lines(batch)}), False
        broken = f"No row is to blame, the weights are damaged: {some(damaged)}. "
    rows = _named(loop, lines)
    where = f"It comes from {rows}" if guilty else f"The step's examples are on {rows}"
    return f"{bad.what} at step {step}. {broken}{where}.", bool(damaged)


def _describe_together(loop: TrainingLoop, step: int, bad: BadStep, damaged: list[str]) -> tuple[str, bool]:
    """The same on several ranks. Going through the step document by document takes one process: all rows are named."""
    loop.engine.drop_gradients()
    epoch, first, last = loop.length.where(step)
    whole_step = (loop.train.micro_batch(epoch, index) for index in range(first, last))
    lines = sorted({line for batch in whole_step for line in loop.train.lines(batch)})
    spoiled = loop.world.any(bool(damaged))
    where = f": {some(damaged)}" if damaged else ""
    broken = f"No row is to blame, the weights are damaged{where}. " if spoiled else ""
    return f"{bad.what} at step {step}. {broken}The step's examples are on {_named(loop, lines)}.", spoiled


def _named(loop: TrainingLoop, lines: list[int]) -> str:
    return f"{'line' if len(lines) == 1 else 'lines'} {some(lines)} of {loop.plan.data}"


def _stop_for(loop: TrainingLoop, text: str, damaged: bool) -> NoReturn:
    count = loop.state.bad_in_a_row
    # the step comes again when the run goes on, and is counted then
    loop.state.bad_in_a_row, loop.state.passed_over = count - 1, loop.state.passed_over - 1
    if loop.state.step and not damaged:
        loop.save()
        kept = f"{loop.run.checkpoint(loop.state.step).name} holds the step before"
    else:
        kept = loop.still_good()
    raise SparktuneError(
        f"{text} Training stopped; {kept}. Mend or remove those rows, lower --learning-rate (now "
        f"{loop.plan.learning_rate:g}), or go on without them: ./run.sh resume {loop.run.name} --on-bad-step skip, or "
        f"python train.py --resume-from-checkpoint {loop.run.root} --on-bad-step skip (or rewind, which also takes "
        "back what was learned since the last checkpoint)."
    )


def _rewind(loop: TrainingLoop, text: str, damaged: bool) -> None:
    found = None
    if loop.world.leads:
        newest = newest_valid(loop.run.root, loop.say)
        found = (newest, LoopState() if newest is None else load_loop_state(newest))
    checkpoint, before = heard_resume_point(loop.world, found)
    if checkpoint is None:
        _stop_for(loop, text, damaged)
    loop.engine.load_state(heard_state(loop.world, checkpoint))
    if loop.world.leads:
        restore_rng(checkpoint)
    loop.state.recent_losses = before.recent_losses
    loop.state.passed_over += loop.state.step - before.step
    loop.say(
        f"Warning: {text} The weights went back to those of {checkpoint.name}, and the rows of steps "
        f"{before.step + 1} to {loop.state.step + 1} are passed over (--on-bad-step rewind)."
    )
