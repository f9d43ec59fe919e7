"""`causal_conv1d` on the Triton kernels: the same signature as its reference."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from sparktune.kernels.causal_conv1d.triton import MAX_TAPS, causal_conv1d_bwd, causal_conv1d_fwd, token_positions

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
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        x = x if x.stride(-1) == 1 else x.contiguous()
        positions = token_positions(cu_seqlens, x.shape[0])
        ctx.save_for_backward(x, weight, positions)
        return causal_conv1d_fwd(x, weight, positions, [x.shape[1]])[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, positions = ctx.saved_tensors
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        dx, dw = causal_conv1d_bwd([dy], x, weight, positions, ctx.needs_input_grad[1])
        return dx, dw, None


def causal_conv1d_fused(
    x: torch.Tensor, weight: torch.Tensor, cu_seqlens: torch.Tensor, cu_seqlens_cpu: torch.Tensor
) -> torch.Tensor:
    """silu of a depthwise causal convolution that starts afresh at every document; one launch each way.

    Args:
        x: [T, C], rows may be strided (a slice of the grouped product is read as it lies).
        weight: [C, W], W <= 4, contiguous; tap W - 1 meets the token itself. Its gradient only if it requires one.
        cu_seqlens: int32 [N + 1] on x's device.
        cu_seqlens_cpu: the same on the host; not read here.

    Returns:
        [T, C] in x's dtype, contiguous.

    Raises:
        ValueError: the weight's shape or layout does not fit.
    """
    check_conv(x.shape[1], weight)
    return _CausalConv1d.apply(x, weight, cu_seqlens)
