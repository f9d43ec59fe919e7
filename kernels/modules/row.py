"""What every layer needs to know of the row of documents it works on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["DropoutKey", "Row"]


@dataclass(frozen=True, kw_only=True)
class DropoutKey:
    """Names one forward pass: masks are a function of it, so a recomputed layer draws the same ones."""

    seed: int
    call: int
    """Number of the training forward pass."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """T tokens, documents end to end; made once a micro-batch and shared by all layers."""

    cu_seqlens: torch.Tensor
    """int32 [N + 1]."""
    cu_seqlens_cpu: torch.Tensor
    positions: torch.Tensor
    """int32 [T]: each token's place in its document, from 0."""
    max_seqlen: int
    cos: torch.Tensor
    """float32 (float64 in float64) [T, R]."""
    sin: torch.Tensor
    dropout: DropoutKey | None = None
    """None: no dropout."""
