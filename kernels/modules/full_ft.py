"""Projections that learn themselves: the linear layers of full fine-tuning."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from sparktune.kernels.columns import split_columns
from sparktune.kernels.modules.projection import ProjectionGroup, row_slices
from sparktune.kernels.modules.row import DropoutKey

__all__ = ["FullFT_BF16_Linear"]


class FullFT_BF16_Linear(nn.Module):
    """A projection group whose weight (and bias) is trained in the compute type, bfloat16 on a GPU.

    The optimiser owns the float32 master (training/optimiser.py); this module reads and writes two bytes a weight.

    Args:
        group: the frozen group it takes the place of; its tensors are taken over, not copied.
    """

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
        return split_columns(F.linear(x, self.weight, self.bias), self.out_sizes)
