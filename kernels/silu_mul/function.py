"""`silu_mul` on the Triton kernels: the same signature as its reference."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from sparktune.kernels.columns import grad_columns
from sparktune.kernels.silu_mul.triton import silu_mul_bwd, silu_mul_fwd

__all__ = ["silu_mul_fused"]


def _inner(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.places = grad_columns(gate), grad_columns(up)
        gate, up = _inner(gate), _inner(up)
        ctx.save_for_backward(gate, up)
        return silu_mul_fwd(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        places = [None if p is None else p.claim() for p in ctx.places]
        out = None
        if places[0] is not None and places[1] is not None and places[0].stride() == places[1].stride():
            out = places[0], places[1]
        return silu_mul_bwd(_inner(dy), gate, up, out)


def silu_mul_fused(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, one launch each way; saves its inputs only.

    Args:
        gate: [T, I], rows may be strided.
        up: [T, I], rows may be strided.

    Returns:
        [T, I] in gate's dtype, contiguous. The gradients go straight into the grouped product's, if
        gate and up are parts of one `split_columns`.

    Raises:
        ValueError: gate and up differ in shape, or are not two-dimensional.
    """
    if gate.shape != up.shape or gate.dim() != 2:
        raise ValueError(f"silu_mul needs gate and up of one shape [T, I], got {tuple(gate.shape)}, {tuple(up.shape)}")
    return _SiluMul.apply(gate, up)
