"""A training that has come to its end: who goes on with the run needs no model, and none of the memory that it took.

What several GPUs have trained under torchrun may be merged and exported where a single one could not hold its state.
"""

from __future__ import annotations

from pathlib import Path

from sparktune.setup.data.cache import TokenDataset
from sparktune.setup.plan.basestorage import base_storage
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import Plan
from sparktune.training.checkpoint import LoopState, holds
from sparktune.training.packing import PackPlan
from sparktune.training.schedule import run_length

__all__ = ["finished_result"]


def finished_result(
    plan: Plan, run: RunDir, dataset: TokenDataset, checkpoint: Path | None, state: LoopState
) -> tuple[Path, Path] | None:
    """Returns the result of a training that has nothing left to do, and the checkpoint that has it; None otherwise.

    Args:
        plan: decided.
        run: the run.
        dataset: what it trains on.
        checkpoint: the newest one, validated; None where there is none.
        state: the loop's state there.
    """
    if checkpoint is None or state.pending or not _has_ended(plan, dataset, state):
        return None
    if base_storage(plan) != "none" and not run.merge_gap.is_file():
        return None
    best = state.best_step if plan.early_stopping is not None else None
    if best and run.checkpoint(best).is_dir():
        checkpoint = run.checkpoint(best)
    result = run.weights if plan.mode == "full" else run.adapter
    return (result, checkpoint) if holds(checkpoint, result) else None


def _has_ended(plan: Plan, dataset: TokenDataset, state: LoopState) -> bool:
    if plan.early_stopping is not None and state.evals_without_gain >= plan.early_stopping:
        return True
    packs = PackPlan(
        dataset, pack=plan.pack, pack_length=plan.pack_length, per_device_batch_size=plan.per_device_batch_size,
        seed=plan.seed,
    )
    length = run_length(len(packs), plan.gradient_accumulation or 1, plan.num_epochs, plan.max_steps)
    return state.step >= length.total_steps
