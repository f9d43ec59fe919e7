"""Products of bf16 operands whose fp32 sums are kept: cuBLAS writes fp32 without rounding through bf16."""

from __future__ import annotations

import torch

__all__ = ["add_matmul_fp32", "matmul_fp32"]


def matmul_fp32(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Returns a @ b in at least fp32.

    Args:
        a: [M, K], any layout that BLAS takes (a transposed view is not copied on CUDA).
        b: [K, N], a's dtype.
        out: where to write, fp32 [M, N] (float64 for float64 inputs), or None to allocate.

    Returns:
        [M, N] fp32; float64 for float64 inputs.
    """
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b, out=out) if out is not None else torch.mm(a, b)
    if a.is_cuda:
        if out is not None:
            return torch.mm(a, b, out_dtype=torch.float32, out=out)
        return torch.mm(a, b, out_dtype=torch.float32)
    # the host has no mixed product (the CPU is for tests): widen, then multiply
    return torch.mm(a.float(), b.float(), out=out) if out is not None else torch.mm(a.float(), b.float())


def add_matmul_fp32(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Adds a @ b to `total` in at least fp32, in the product's own pass on CUDA.

    Args:
        total: fp32 [M, N] (float64 for float64 inputs), contiguous; changed in place.
        a: [M, K], any layout that BLAS takes.
        b: [K, N], a's dtype.
    """
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.add_(matmul_fp32(a, b))
