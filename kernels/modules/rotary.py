"""Rotary embedding of text: frequencies of a model, tables of a micro-batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["inverse_frequencies", "rotary_tables"]


def inverse_frequencies(
    theta: float, dim: int, scaling: Mapping[str, Any] | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Returns [R / 2] angles a position advances by, one a pair of dimensions.

    Args:
        theta: base.
        dim: R, rotary dimensions.
        scaling: None; {"rope_type": "linear", "factor"}; or {"rope_type": "llama3", "factor", "low_freq_factor",
            "high_freq_factor", "original_max_position_embeddings"}.
        dtype: float32 or float64.
        device: of the result.

    Source: Su et al. 2021; the llama3 rule is of the Llama 3.1 release: wavelengths longer than
    original / low_freq_factor are stretched by `factor`, those shorter than original / high_freq_factor are kept,
    a linear ramp in original / wavelength lies between.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.int64, device=device).to(dtype) / dim
    frequencies = 1.0 / (theta**exponents)
    if scaling is None:
        return frequencies
    stretched = frequencies / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return stretched
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    ramp = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return torch.lerp(stretched, frequencies, ramp)


def rotary_tables(position_ids: torch.Tensor, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cos and sin, [T, R] of frequencies' dtype, the second half of R repeating the first.

    Args:
        position_ids: int64 [T].
        frequencies: [R / 2].
    """
    angles = position_ids[:, None].to(frequencies.dtype) * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()
