"""Making a model ready to train: build the tower, fill it, choose what learns."""

from __future__ import annotations

import torch

from sparktune.kernels.modules.full_ft import FullFT_BF16_Linear
from sparktune.kernels.modules.projection import ProjectionGroup
from sparktune.kernels.select import OpTable
from sparktune.setup.plan.errors import PreflightError
from sparktune.setup.plan.schema import ModelSpec
from sparktune.training.tower import RecomputePolicy, TextTower
from sparktune.training.weights import export_weights, load_weights

__all__ = ["RecomputePolicy", "TextTower", "build_model", "export_weights", "load_weights", "train_everything"]


def build_model(spec: ModelSpec, ops: OpTable, dtype: torch.dtype, device: torch.device | str) -> TextTower:
    """Allocates the text tower, frozen and unfilled; `load_weights` fills it.

    Args:
        spec: from `probe`.
        ops: from `select_ops`.
        dtype: compute type: float32, bfloat16 or float64.
        device: of the weights.

    Raises:
        PreflightError: the native engine does not know this architecture.
    """
    if not spec.native:
        raise PreflightError(
            f"The native engine cannot train {spec.source}: {spec.native_reason}. "
            "Use --engine unsloth, or another model."
        )
    return TextTower(spec, ops, dtype=dtype, device=torch.device(device))


def train_everything(model: TextTower) -> list[str]:
    """Makes every tensor of the text tower trainable (full fine-tuning): embeddings, norms, projections, the GDN's own.

    Returns:
        The trainable parameters' names. Weights keep the compute type; the optimiser owns float32 masters.
    """
    for _, owner, name, group in model.groups():
        if isinstance(group, ProjectionGroup):
            setattr(owner, name, FullFT_BF16_Linear(group))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return [name for name, _ in model.named_parameters()]
