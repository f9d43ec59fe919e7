"""`linear_cross_entropy` that meets the vocabulary only for the supervised rows, one block of rows at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from sparktune.kernels.linear_cross_entropy.triton import scatter_rows, softmax_loss
from sparktune.kernels.matmul import matmul_fp32

__all__ = ["linear_cross_entropy_fused"]

LOGITS_BYTES = 2**30
"""Room for one block of logits: 2,162 rows of bf16 at a vocabulary of 248,320, one product for most micro-batches."""


def _chunk_rows(vocabulary: int, itemsize: int, n_rows: int) -> int:
    """Rows of a block: equal blocks of at most LOGITS_BYTES, a multiple of 64 rows for the matrix units."""
    most = max(LOGITS_BYTES // (vocabulary * itemsize) // 64 * 64, 64)
    blocks = -(-n_rows // most)
    return min(most, -(-n_rows // blocks + 63) // 64 * 64) if blocks > 1 else n_rows


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor, grad: bool
    ) -> torch.Tensor:
        need_hidden = grad and ctx.needs_input_grad[0]
        need_weight = grad and ctx.needs_input_grad[1]
        gathered = hidden.index_select(0, rows)
        n_rows = gathered.shape[0]
        wide = torch.float32
        loss = torch.empty(n_rows, dtype=wide, device=hidden.device)
        d_hidden = torch.empty(gathered.shape, dtype=wide, device=hidden.device) if need_hidden else None
        d_weight = None
        step = _chunk_rows(weight.shape[0], hidden.element_size(), n_rows) if n_rows else 1
        for start in range(0, n_rows, step):
            block = slice(start, min(start + step, n_rows))
            logits = gathered[block] @ weight.t()
            softmax_loss(logits, targets[block], loss[block], need_hidden or need_weight)
            # logits now holds its own gradient for an incoming gradient of 1
            if d_hidden is not None:
                matmul_fp32(logits, weight, out=d_hidden[block])
            if need_weight:
                part = matmul_fp32(logits.t(), gathered[block])
                d_weight = part if d_weight is None else d_weight.add_(part)
            del logits
        if need_weight and d_weight is None:
            d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device)
        ctx.save_for_backward(rows, d_hidden, d_weight)
        ctx.shape, ctx.dtypes = hidden.shape, (hidden.dtype, weight.dtype)
        return loss.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, d_hidden, d_weight = ctx.saved_tensors
        dh = dw = None
        if d_hidden is not None:
            dh = scatter_rows(d_hidden, rows, dloss, ctx.shape[0], ctx.dtypes[0])
        if d_weight is not None:
            # scaled and rounded in one pass
            dw = torch.mul(d_weight, dloss, out=torch.empty_like(d_weight, dtype=ctx.dtypes[1]))
        return dh, dw, None, None, None


def linear_cross_entropy_fused(
    hidden: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Sum of cross-entropies of softmax(hidden[rows] @ weight^T), gradients computed in the forward.

    The logits of one block of rows exist at a time and are overwritten by their gradient. The incoming gradient
    scales the result on the device, so nothing is read by the host; gradients are the same bits every time.

    Args:
        hidden: [T, H].
        weight: [V, H], hidden's dtype; its gradient is computed only if it requires one (fp32 inside).
        rows: [S] int64, unique: rows of hidden that are supervised. Rows that repeat give a wrong gradient.
        targets: [S] int64 in [0, V).

    Returns:
        fp32 scalar, 0 with zero gradients for S = 0.

    Raises:
        ValueError: dtypes differ, or rows and targets do not pair up.
    """
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: cast one to the other's dtype first")
    if rows.shape != targets.shape or rows.dim() != 1:
        raise ValueError(f"rows and targets must both be [S], got {tuple(rows.shape)} and {tuple(targets.shape)}")
    return _LinearCrossEntropy.apply(hidden, weight, rows, targets.contiguous(), torch.is_grad_enabled())
