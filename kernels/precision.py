"""The type that references compute in: float64 for float64 inputs, float32 for all others."""

from __future__ import annotations

import torch

__all__ = ["working_dtype"]


def working_dtype(x: torch.Tensor) -> torch.dtype:
    """Returns float64 for a float64 tensor, float32 otherwise."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
