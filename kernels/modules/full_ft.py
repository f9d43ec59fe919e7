"""Projections that learn themselves: the linear layers of full fine-tuning."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from sparktune.kernels.columns import split_columns
from sparktune.kernels.matmul import add_matmul_fp32
from sparktune.kernels.modules.projection import ProjectionGroup, row_slices
from sparktune.kernels.modules.row import DropoutKey

__all__ = ["FullFT_BF16_Linear"]


class _AddingLinear(torch.autograd.Function):
    """y = x W^T + b; the product that gives the gradient of W adds it to a sum, so it is never written in bfloat16."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, total: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.total = total
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        add_matmul_fp32(ctx.total, dy.t(), x)
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        return dx, None, dy.sum(0) if ctx.needs_input_grad[2] else None, None


class FullFT_BF16_Linear(nn.Module):
    """A projection group whose weight (and bias) is trained in the compute type, bfloat16 on a GPU.

    The optimiser owns the float32 master (training/optimiser.py); this module reads and writes two bytes a weight.

    Args:
        group: the frozen group it takes the place of; its tensors are taken over, not copied.

    Attributes:
        gradient_sum: full-precision tensor of the weight's shape that its gradients are added to by the products
            themselves; None: they are returned as autograd expects. 18.7 of 262 ms a step on an H200 were such adds
            (2B, two rows of 5376 tokens, 2026-11-22).
    """

    gradient_sum: torch.Tensor | None = None

    def __init__(self, group: ProjectionGroup) -> None:
        super().__init__()
        self.names, self.out_sizes, self.in_features = group.names, group.out_sizes, group.in_features
        self.weight = nn.Parameter(group.weight.detach())
        self.bias = None if group.bias is None else nn.Parameter(group.bias.detach())

    def rows(self) -> dict[str, slice]:
        """Returns projection name -> its rows of `weight` (and entries of `bias`)."""
        return row_slices(self.names, self.out_sizes)

    def forward(self, x: torch.Tensor, dropout: DropoutKey | None = None) -> tuple[torch.Tensor, ...]:
        """Returns the projections' outputs, [T, out] each; x [T, in], `dropout` is ignored."""
        if self.gradient_sum is None:
            y = F.linear(x, self.weight, self.bias)
        else:
            y = _AddingLinear.apply(x, self.weight, self.bias, self.gradient_sum)
        return split_columns(y, self.out_sizes)
