"""Projections that share their input, kept as one matrix: one product instead of several."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from sparktune.kernels.columns import split_columns
from sparktune.kernels.frozen_weight import FrozenWeight, frozen_linear
from sparktune.kernels.modules.row import DropoutKey

__all__ = ["ProjectionGroup", "row_slices"]


def row_slices(names: Sequence[str], out_sizes: Sequence[int]) -> dict[str, slice]:
    """Returns where each projection's rows lie when they are stacked in this order."""
    slices, start = {}, 0
    for name, size in zip(names, out_sizes, strict=True):
        slices[name] = slice(start, start + size)
        start += size
    return slices


class ProjectionGroup(nn.Module):
    """Frozen projections q|k|v, gate|up, in_proj_qkv|z|b|a, or a single one.

    Args:
        names: the checkpoint's names of the projections, in the order of the outputs.
        out_sizes: their output widths.
        in_features: width of the shared input.
        bias: all of them have a bias.
        dtype: of weight and compute.
        device: of the weight.
    """

    def __init__(
        self, names: Sequence[str], out_sizes: Sequence[int], in_features: int, *, bias: bool, dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.names = tuple(names)
        self.out_sizes = tuple(out_sizes)
        self.in_features = in_features
        rows = sum(out_sizes)
        self.weight: nn.Parameter | FrozenWeight = nn.Parameter(
            torch.empty(rows, in_features, dtype=dtype, device=device), requires_grad=False
        )
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(rows, dtype=dtype, device=device), requires_grad=False)

    def rows(self) -> dict[str, slice]:
        """Returns projection name -> its rows of `weight` (and entries of `bias`)."""
        return row_slices(self.names, self.out_sizes)

    def store(self, weight: FrozenWeight) -> None:
        """Puts a weight stored in fewer bits in the parameter's place."""
        del self.weight
        self.weight = weight

    def forward(self, x: torch.Tensor, dropout: DropoutKey | None = None) -> tuple[torch.Tensor, ...]:
        """Returns the projections' outputs, [T, out] each, sharing one tensor.

        Args:
            x: [T, in].
            dropout: ignored; adapters use it.
        """
        return split_columns(frozen_linear(x, self.weight, self.bias), self.out_sizes)
