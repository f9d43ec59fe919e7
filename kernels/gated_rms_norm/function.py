"""`gated_rms_norm` on the Triton kernels: the same signature as its reference."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from sparktune.kernels.columns import grad_columns
from sparktune.kernels.gated_rms_norm.triton import gated_rms_norm_bwd, gated_rms_norm_fwd

__all__ = ["gated_rms_norm_fused"]


def _inner(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.place = grad_columns(z)
        x, z = _inner(x), _inner(z)
        ctx.save_for_backward(x, z, weight)
        ctx.eps = eps
        return gated_rms_norm_fwd(x, z, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, z, weight = ctx.saved_tensors
        place = None if ctx.place is None else ctx.place.claim()
        dx, dz, dw = gated_rms_norm_bwd(
            _inner(dy), x, z, weight, ctx.eps, ctx.needs_input_grad[2],
            None if place is None else place.unflatten(1, z.shape[1:]),
        )
        return dx, dz, dw, None


def gated_rms_norm_fused(x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """norm(x) * weight * silu(z) in fp32, one launch each way; saves its inputs only.

    Args:
        x: [T, HV, V]: the delta rule's output.
        z: [T, HV, V]: the gate; a strided slice of the grouped product is read as it lies.
        weight: [V]; its gradient is computed only if it requires one.
        eps: added to the mean square.

    Returns:
        [T, HV, V] in x's dtype.

    Raises:
        ValueError: x and z differ in shape.
    """
    if x.shape != z.shape or x.dim() != 3:
        raise ValueError(f"gated_rms_norm needs x and z alike, [T, HV, V]; got {tuple(x.shape)} and {tuple(z.shape)}")
    return _GatedRMSNorm.apply(x, z, weight, eps)
