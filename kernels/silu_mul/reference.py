"""silu(gate) * up in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparktune.kernels.precision import working_dtype

__all__ = ["silu_mul_reference"]


def silu_mul_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Returns silu(gate) * up.

    Args:
        gate: [T, I]; the last dimension contiguous, rows may be strided.
        up: [T, I], likewise.

    Returns:
        [T, I] of gate's dtype; computed in float32 (float64 for float64).
    """
    wide = working_dtype(gate)
    return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)
