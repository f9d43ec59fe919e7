"""Everything between the projections and the attention: gate split, q/k norm, rotary embedding; plain PyTorch."""

from __future__ import annotations

import torch

from sparktune.kernels.precision import working_dtype
from sparktune.kernels.rms_norm.reference import rms_norm_reference

__all__ = ["attention_prologue_reference"]


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first R of D dimensions: pairs are (i, i + R / 2), as in the published checkpoints."""
    rotary = cos.shape[-1]
    turned, kept = x[..., :rotary], x[..., rotary:]
    low, high = turned.chunk(2, dim=-1)
    turned = turned * cos[:, None] + torch.cat((-high, low), dim=-1) * sin[:, None]
    return torch.cat((turned, kept), dim=-1)


def attention_prologue_reference(
    q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, cos: torch.Tensor,
    sin: torch.Tensor, eps: float, *, zero_centred: bool, gated: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Splits off the gate, normalises q and k over the head, applies the (partial) rotary embedding.

    Args:
        q: [T, nH, 2D] if gated, each head [query | gate]; else [T, nH, D].
        k: [T, nKV, D].
        q_weight: [D], or None for no norm.
        k_weight: [D], or None for no norm.
        cos: float32 (float64 for float64 inputs) [T, R], R <= D; the second half of R repeats the first.
        sin: like cos.
        eps: of the norms.
        zero_centred: the norms multiply by (1 + weight).
        gated: q carries a gate.

    Returns:
        q [T, nH, D] and k [T, nKV, D] of their dtypes, and the gate [T, nH, D] (a view of q) or None. Computed in
        float32 (float64 for float64), rounded once.
    """
    gate = None
    if gated:
        q, gate = q.chunk(2, dim=-1)
    wide = working_dtype(q)
    q_wide, k_wide = q.to(wide), k.to(wide)
    if q_weight is not None:
        q_wide = rms_norm_reference(q_wide, q_weight, eps, zero_centred=zero_centred)
    if k_weight is not None:
        k_wide = rms_norm_reference(k_wide, k_weight, eps, zero_centred=zero_centred)
    cos, sin = cos.to(wide), sin.to(wide)
    return _rotate(q_wide, cos, sin).to(q.dtype), _rotate(k_wide, cos, sin).to(k.dtype), gate
