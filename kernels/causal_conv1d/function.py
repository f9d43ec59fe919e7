"""`causal_conv1d` on the Triton kernels: the same signature as its reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from sparktune.kernels.causal_conv1d.triton import MAX_TAPS, causal_conv1d_bwd, causal_conv1d_fwd, token_positions
from sparktune.kernels.columns import grad_columns

__all__ = ["causal_conv1d_fused", "check_conv"]


def check_conv(channels: int, weight: torch.Tensor) -> None:
    """Raises ValueError unless weight is [channels, W] with 1 <= W <= 4 and contiguous."""
    if weight.dim() != 2 or weight.shape[0] != channels or not 1 <= weight.shape[1] <= MAX_TAPS:
        raise ValueError(
            f"causal_conv1d needs weight [{channels}, W] with W of 1 to {MAX_TAPS}, got {tuple(weight.shape)}. "
            "Other widths run on the reference."
        )
    if not weight.is_contiguous():
        raise ValueError("causal_conv1d needs a contiguous weight; call .contiguous() once when the model is loaded")


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, positions: torch.Tensor, sizes: tuple[int, ...]
    ) -> tuple[torch.Tensor, ...]:
        ctx.place = grad_columns(x)
        x = x if x.stride(-1) == 1 else x.contiguous()
        ctx.save_for_backward(x, weight, positions)
        return tuple(causal_conv1d_fwd(x, weight, positions, sizes))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, positions = ctx.saved_tensors
        dys = tuple(dy if dy.stride(-1) == 1 else dy.contiguous() for dy in dys)
        place = None if ctx.place is None else ctx.place.claim()
        dx, dw = causal_conv1d_bwd(dys, x, weight, positions, ctx.needs_input_grad[1], place)
        return dx, dw, None, None


def causal_conv1d_fused(
    x: torch.Tensor, weight: torch.Tensor, cu_seqlens: torch.Tensor, cu_seqlens_cpu: torch.Tensor,
    split: Sequence[int] | None = None, positions: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """silu of a depthwise causal convolution that starts afresh at every document; one launch each way.

    Args:
        x: [T, C], rows may be strided (a slice of the grouped product is read as it lies).
        weight: [C, W], W <= 4, contiguous; tap W - 1 meets the token itself. Its gradient only if it requires one.
        cu_seqlens: int32 [N + 1] on x's device.
        cu_seqlens_cpu: the same on the host; not read here.
        split: widths of one to three segments that sum to C (q, k, v), or None.
        positions: int32 [T] on x's device, each token's place in its document, where the row has them already (they
            are the same for every layer); computed of `cu_seqlens` if None.

    Returns:
        [T, C] in x's dtype, contiguous; with `split` a tuple of contiguous [T, width] tensors, whose gradients are
        read where they lie.

    Raises:
        ValueError: the weight's shape or layout, `split` or `positions` does not fit.
    """
    check_conv(x.shape[1], weight)
    if positions is None:
        positions = token_positions(cu_seqlens, x.shape[0])
    elif positions.shape != x.shape[:1] or positions.dtype != torch.int32:
        raise ValueError(
            f"positions must be int32 [{x.shape[0]}], got {positions.dtype} {list(positions.shape)}: one a token"
        )
    if split is None:
        return _CausalConv1d.apply(x, weight, positions, (x.shape[1],))[0]
    if sum(split) != x.shape[1] or not 1 <= len(split) <= 3:
        raise ValueError(f"split {tuple(split)} must be one to three widths that sum to {x.shape[1]}")
    return _CausalConv1d.apply(x, weight, positions, tuple(split))
