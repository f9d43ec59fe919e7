"""The GDN's output norm in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparktune.kernels.precision import working_dtype

__all__ = ["gated_rms_norm_reference"]


def gated_rms_norm_reference(x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Returns x / sqrt(mean(x**2) + eps) * weight * silu(z), the mean taken over a head.

    Args:
        x: [T, HV, VD].
        z: [T, HV, VD], the gate; normed first, gated after.
        weight: [VD].
        eps: added to the mean square.

    Returns:
        [T, HV, VD] of x's dtype; computed in float32 (float64 for float64).
    """
    x32, z32 = x.to(working_dtype(x)), z.to(working_dtype(x))
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.to(x32.dtype) * F.silu(z32)).to(x.dtype)
