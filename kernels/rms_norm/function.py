"""`rms_norm` and `add_rms_norm` on the Triton kernels: the same signatures as their references."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from sparktune.kernels.columns import grad_columns
from sparktune.kernels.rms_norm.triton import rms_norm_bwd, rms_norm_fwd

__all__ = ["add_rms_norm_fused", "rms_norm_fused"]


def _rows(x: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, zero_centred: bool) -> torch.Tensor:
        rows = _rows(x)
        y, h, rstd = rms_norm_fwd(rows, None, weight, eps, zero_centred)
        ctx.save_for_backward(h, rstd, weight)
        ctx.zero_centred = zero_centred
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        h, rstd, weight = ctx.saved_tensors
        dx, dw = rms_norm_bwd(_rows(dy), h, rstd, weight, None, ctx.zero_centred, ctx.needs_input_grad[1])
        return dx.view(dy.shape), dw, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, zero_centred: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.place = grad_columns(x)
        y, h, rstd = rms_norm_fwd(_rows(x), _rows(residual), weight, eps, zero_centred)
        ctx.save_for_backward(h, rstd, weight)
        ctx.zero_centred = zero_centred
        ctx.set_materialize_grads(False)
        return y.view(x.shape), h.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor | None, dh: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if dy is None:
            return dh, dh, None, None, None
        h, rstd, weight = ctx.saved_tensors
        dx, dw = rms_norm_bwd(
            _rows(dy), h, rstd, weight, None if dh is None else _rows(dh), ctx.zero_centred, ctx.needs_input_grad[2],
            None if ctx.place is None else ctx.place.claim(),
        )
        dx = dx.view(dy.shape)
        return dx, dx, dw, None, None


def rms_norm_fused(x: torch.Tensor, weight: torch.Tensor, eps: float, *, zero_centred: bool) -> torch.Tensor:
    """Root-mean-square norm over the last dimension, fp32 inside, in one launch each way.

    Args:
        x: [..., H], any float dtype.
        weight: [H]; its gradient is computed only if it requires one.
        eps: added to the mean square.
        zero_centred: scale by (1 + weight) instead of weight.

    Returns:
        [..., H] in x's dtype.
    """
    return _RMSNorm.apply(x, weight, eps, zero_centred)


def add_rms_norm_fused(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, zero_centred: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Residual add and norm in one pass: h = x + residual; y = norm(h). Saves h and one fp32 a row.

    Args:
        x: [..., H]: the block's output.
        residual: [..., H]: the stream before the block, in x's dtype.
        weight: [H].

    Returns:
        (y, h), both [..., H] in x's dtype. The backward adds the gradients of both in one launch, and writes the sum
        where x's belongs if x is a part of `split_columns`.

    Raises:
        ValueError: shapes or dtypes of x and residual differ.
    """
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(
            f"add_rms_norm needs x and residual alike, got {tuple(x.shape)} {x.dtype} and "
            f"{tuple(residual.shape)} {residual.dtype}. Cast or reshape the residual first."
        )
    return _AddRMSNorm.apply(x, residual, weight, eps, zero_centred)
