"""RMSNorm in plain PyTorch, alone and with the residual sum in front of it."""

from __future__ import annotations

import torch

from sparktune.kernels.precision import working_dtype

__all__ = ["add_rms_norm_reference", "rms_norm_reference"]


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float, *, zero_centred: bool) -> torch.Tensor:
    """Returns x / sqrt(mean(x**2) + eps) * weight, or * (1 + weight).

    Args:
        x: [..., H].
        weight: [H].
        eps: added to the mean square.
        zero_centred: multiply by (1 + weight) (Qwen3.5) instead of weight.

    Returns:
        [..., H] of x's dtype; computed in float32 (float64 for float64).

    Source: Zhang and Sennrich 2019, equation 4.
    """
    x32 = x.to(working_dtype(x))
    scale = weight.to(x32.dtype)
    scale = 1.0 + scale if zero_centred else scale
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (normed * scale).to(x.dtype)


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, zero_centred: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (norm(h), h) with h = x + residual in x's dtype; shapes and rules of `rms_norm_reference`."""
    h = x + residual
    return rms_norm_reference(h, weight, eps, zero_centred=zero_centred), h
