"""The feed-forward block: down(silu(gate(x)) * up(x))."""

from __future__ import annotations

import torch
from torch import nn

from sparktune.kernels.modules.projection import ProjectionGroup
from sparktune.kernels.modules.row import Row
from sparktune.kernels.select import OpTable
from sparktune.kernels.shape import ModelShape

__all__ = ["GatedMLP"]


class GatedMLP(nn.Module):
    """gate and up as one product, silu_mul, down.

    Args:
        shape: of the model.
        ops: the model's ops.
        dtype: compute type.
        device: of the weights.
    """

    def __init__(self, shape: ModelShape, ops: OpTable, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.ops = ops
        ffn, hidden = shape.intermediate_size, shape.hidden_size
        self.gate_up_proj: nn.Module = ProjectionGroup(
            ("gate_proj", "up_proj"), (ffn, ffn), hidden, bias=shape.mlp_bias, dtype=dtype, device=device
        )
        self.down_proj: nn.Module = ProjectionGroup(
            ("down_proj",), (hidden,), ffn, bias=shape.mlp_bias, dtype=dtype, device=device
        )

    def forward(self, x: torch.Tensor, row: Row) -> torch.Tensor:
        """Returns the block's output [T, H] of x [T, H]; `row` brings the dropout key."""
        gate, up = self.gate_up_proj(x, row.dropout)
        (y,) = self.down_proj(self.ops.silu_mul(gate, up), row.dropout)
        return y
