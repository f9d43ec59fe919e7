"""x * sigmoid(gate) in plain PyTorch."""

from __future__ import annotations

import torch

from sparktune.kernels.precision import working_dtype

__all__ = ["sigmoid_gate_reference"]


def sigmoid_gate_reference(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Returns x * sigmoid(gate).

    Args:
        x: any shape.
        gate: the shape of x; may be strided.

    Returns:
        x's shape and dtype; computed in float32 (float64 for float64).
    """
    wide = working_dtype(x)
    return (x.to(wide) * torch.sigmoid(gate.to(wide))).to(x.dtype)
