"""`sigmoid_gate` on the Triton kernels: the same signature as its reference."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from sparktune.kernels.sigmoid_gate.triton import sigmoid_gate_bwd, sigmoid_gate_fwd

__all__ = ["sigmoid_gate_fused"]


def _inner(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _SigmoidGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        x, gate = _inner(x), _inner(gate)
        ctx.save_for_backward(x, gate)
        return sigmoid_gate_fwd(x, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, gate = ctx.saved_tensors
        return sigmoid_gate_bwd(_inner(dy), x, gate)


def sigmoid_gate_fused(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(gate), one launch each way.

    Args:
        x: [T, nH, D] (or [T, C]): the attention's output.
        gate: x's shape; a strided slice of the grouped product is read as it lies.

    Returns:
        x's shape, in x's dtype.

    Raises:
        ValueError: x and gate differ in shape, or have neither two nor three dimensions.
    """
    if x.shape != gate.shape or x.dim() not in (2, 3):
        raise ValueError(
            f"sigmoid_gate needs x and gate of one shape [T, nH, D], got {tuple(x.shape)} and {tuple(gate.shape)}"
        )
    if x.dim() == 2:
        return _SigmoidGate.apply(x.unsqueeze(1), gate.unsqueeze(1)).squeeze(1)
    return _SigmoidGate.apply(x, gate)
