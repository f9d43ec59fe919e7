"""Cross-entropy of the supervised rows in plain PyTorch; the logits of all tokens never exist."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from sparktune.kernels.precision import working_dtype

__all__ = ["linear_cross_entropy_reference"]

MAX_LOGITS = 2**26
"""Logits of one chunk of rows: 256 MiB in float32."""


def _chunk_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.to(working_dtype(logits)), targets, reduction="sum")


def linear_cross_entropy_reference(
    hidden: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Returns sum over s of -log softmax(hidden[rows[s]] @ weight^T)[targets[s]].

    Rows are gathered first; beyond `MAX_LOGITS` logits they go chunk by chunk, each recomputed in the backward pass.

    Args:
        hidden: [T, H].
        weight: [V, H].
        rows: int64 [S], may be empty: then the loss and all gradients are zero.
        targets: int64 [S].

    Returns:
        0-d float32 (float64 for float64).
    """
    supervised = hidden.index_select(0, rows)
    chunk = max(1, MAX_LOGITS // weight.shape[0])
    if rows.shape[0] <= chunk:
        return _chunk_loss(supervised, weight, targets)
    total = torch.zeros((), dtype=working_dtype(hidden), device=hidden.device)
    for part, wanted in zip(supervised.split(chunk), targets.split(chunk), strict=True):
        total = total + checkpoint(
            _chunk_loss, part, weight, wanted, use_reentrant=False, preserve_rng_state=False
        )
    return total
