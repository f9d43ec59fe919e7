"""What can be known to fail in training as soon as a plan is complete: refused then, before a run takes its name."""

from __future__ import annotations

from sparktune.setup.plan.basestorage import check_base_storage
from sparktune.setup.plan.errors import PreflightError, UsageError
from sparktune.setup.plan.memory import projection_shapes
from sparktune.setup.plan.schema import ModelSpec, Plan

__all__ = ["TORCH_OPTIMIZERS", "check_trainable", "refuse_ranks"]

TORCH_OPTIMIZERS = ("adamw", "adamw_torch")
"""AdamW as torch computes it; the others are bitsandbytes'."""

_SMALL_GDN = ("in_proj_a", "in_proj_b")


def check_trainable(plan: Plan, spec: ModelSpec) -> None:
    """Refuses a complete plan that no engine can train on its device. What only a GPU's process knows is left to it.

    Args:
        plan: with every recommendation applied.
        spec: the model's shape.

    Raises:
        PreflightError: the model, method, engine or optimiser needs a CUDA GPU, and a CPU is to train.
        UsageError: --target-modules names a projection that the model does not have, or the method contradicts
            --quantise-base.
    """
    check_base_storage(plan)
    if plan.device == "cpu":
        _check_cpu(plan, spec)
    if plan.mode != "full" and plan.target_modules is not None and spec.native:
        valid = (*projection_shapes(spec), *(_SMALL_GDN if "linear_attention" in spec.layer_types else ()))
        unknown = [name for name in plan.target_modules if name not in valid]
        if unknown or not plan.target_modules:
            raise UsageError(
                f"--target-modules should name projections of {plan.model}: {', '.join(valid)}; "
                f"got {', '.join(unknown) or 'an empty list'}."
            )


def _check_cpu(plan: Plan, spec: ModelSpec) -> None:
    if not spec.native:
        raise PreflightError(
            f"{plan.model} cannot be trained on a CPU: {spec.native_reason}. Such a model needs --engine unsloth and a "
            "CUDA GPU."
        )
    if plan.engine == "unsloth":
        raise PreflightError(
            "--engine unsloth needs a CUDA GPU; a CPU is to train here. Use --engine native, which knows "
            f"{spec.model_type}."
        )
    if plan.optimizer not in TORCH_OPTIMIZERS:
        raise PreflightError(
            f"--optimizer {plan.optimizer} needs a CUDA GPU: bitsandbytes has no CPU kernels for its optimisers, and a "
            "CPU is to train here. Use --optimizer adamw."
        )


def refuse_ranks(plan: Plan, ranks: int) -> None:
    """Refuses what several ranks cannot train together.

    Args:
        plan: values may still be open.
        ranks: processes that would train it.

    Raises:
        PreflightError: an engine or an optimiser for one process alone.
        UsageError: a step with fewer packs than ranks: some would never have anything to do.
    """
    if ranks == 1:
        return
    if plan.engine == "unsloth":
        raise PreflightError(
            f"--engine unsloth trains on one GPU, and {ranks} processes were started. Use --engine native, or one GPU."
        )
    if plan.mode == "full" and plan.optimizer not in TORCH_OPTIMIZERS:
        raise PreflightError(
            f"--optimizer {plan.optimizer} keeps its moments in whole tensors, but full fine-tuning on {ranks} GPUs "
            "spreads them. Use --optimizer adamw: every GPU holds a share of the moments anyway."
        )
    packs = plan.per_device_batch_size * (plan.gradient_accumulation or ranks)
    if packs < ranks:
        raise UsageError(
            f"A step of {packs} packs (--per-device-batch-size times --gradient-accumulation) cannot be shared by "
            f"{ranks} GPUs. Pass --gradient-accumulation {-(-ranks // plan.per_device_batch_size)} or more: it counts "
            "the micro-batches of a whole step, on all GPUs together."
        )
