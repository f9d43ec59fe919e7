"""RMSNorm with an optional residual add in front, and its backward, as Triton kernels and their hosts.

Legend: N rows, H hidden, BH the next power of two of H, P programs of a backward that sums a weight gradient.

    h = x + residual (rounded once to x's dtype);   r = rsqrt(mean(h^2) + eps);   y = h * r * w',  w' = w or 1 + w
    dh = r * (dy * w' - h * r * mean(dy * w' * h * r)) + dresidual;                  dw = sum over rows of dy * h * r

Everything inside is fp32. The forward keeps `h` (which the model needs anyway) and one fp32 `rstd` a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["rms_norm_bwd", "rms_norm_bwd_kernel", "rms_norm_fwd", "rms_norm_fwd_kernel"]

WEIGHT_GRAD_PROGRAMS = 264
"""Programs of a backward that also sums the weight gradient: two for each SM of an H200, partial sums stay small."""


@triton.jit
def rms_norm_fwd_kernel(
    x, residual, weight, y, h, rstd, stride_x, stride_r, eps,
    H: tl.constexpr, BH: tl.constexpr, ZERO_CENTRED: tl.constexpr, ADD: tl.constexpr,
):
    """Grid (N,): a program owns one row."""
    i_n = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, BH)
    m_h = o_h < H
    b_x = tl.load(x + i_n * stride_x + o_h, mask=m_h, other=0.0).to(tl.float32)
    if ADD:
        b_x += tl.load(residual + i_n * stride_r + o_h, mask=m_h, other=0.0).to(tl.float32)
        # the norm sees the rounded sum, because that is what the next layer and the backward will read
        b_h = b_x.to(h.dtype.element_ty)
        tl.store(h + i_n * H + o_h, b_h, mask=m_h)
        b_x = b_h.to(tl.float32)
    b_r = 1.0 / tl.sqrt(tl.sum(b_x * b_x, 0) / H + eps)
    tl.store(rstd + i_n, b_r)
    b_w = tl.load(weight + o_h, mask=m_h, other=0.0).to(tl.float32)
    if ZERO_CENTRED:
        b_w += 1.0
    tl.store(y + i_n * H + o_h, (b_x * b_r * b_w).to(y.dtype.element_ty), mask=m_h)


@triton.jit
def rms_norm_bwd_kernel(
    dy, h, rstd, weight, dresidual, dh, dw_partial, n_rows, n_programs, stride_dy, stride_h, stride_dr,
    stride_dh,
    H: tl.constexpr, BH: tl.constexpr, ZERO_CENTRED: tl.constexpr, ADD: tl.constexpr, WEIGHT_GRAD: tl.constexpr,
):
    """Grid (P,): a program owns rows p, p + P, p + 2P, ... and one row of the partial weight gradient."""
    i_p = tl.program_id(0)
    o_h = tl.arange(0, BH)
    m_h = o_h < H
    b_w = tl.load(weight + o_h, mask=m_h, other=0.0).to(tl.float32)
    if ZERO_CENTRED:
        b_w += 1.0
    b_dw = tl.zeros([BH], dtype=tl.float32)
    for i_row in range(i_p, n_rows, n_programs):
        i_n = tl.cast(i_row, tl.int64)
        b_dy = tl.load(dy + i_n * stride_dy + o_h, mask=m_h, other=0.0).to(tl.float32)
        b_h = tl.load(h + i_n * stride_h + o_h, mask=m_h, other=0.0).to(tl.float32)
        b_r = tl.load(rstd + i_n)
        b_n = b_h * b_r
        if WEIGHT_GRAD:
            b_dw += b_dy * b_n
        b_dn = b_dy * b_w
        b_dh = (b_dn - b_n * (tl.sum(b_dn * b_n, 0) / H)) * b_r
        if ADD:
            b_dh += tl.load(dresidual + i_n * stride_dr + o_h, mask=m_h, other=0.0).to(tl.float32)
        tl.store(dh + i_n * stride_dh + o_h, b_dh.to(dh.dtype.element_ty), mask=m_h)
    if WEIGHT_GRAD:
        tl.store(dw_partial + i_p * H + o_h, b_dw, mask=m_h)


def _num_warps(width: int) -> int:
    # 16 elements a thread: two 16-byte loads in flight for each operand
    return min(max(width // 512, 1), 16)


def rms_norm_fwd(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, zero_centred: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalises x (+ residual).

    Args:
        x: [N, H], last dimension contiguous.
        residual: [N, H] or None, last dimension contiguous.
        weight: [H].

    Returns:
        y [N, H] in x's dtype; h = x + residual [N, H] (x itself without a residual); rstd [N] fp32.
    """
    n_rows, width = x.shape
    y = torch.empty((n_rows, width), dtype=x.dtype, device=x.device)
    h = x if residual is None else torch.empty_like(y)
    rstd = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    if n_rows:
        block = triton.next_power_of_2(width)
        rms_norm_fwd_kernel[(n_rows,)](
            x, x if residual is None else residual, weight, y, h, rstd,
            x.stride(0), 0 if residual is None else residual.stride(0), eps,
            H=width, BH=block, ZERO_CENTRED=zero_centred, ADD=residual is not None, num_warps=_num_warps(block),
        )
    return y, h, rstd


def rms_norm_bwd(
    dy: torch.Tensor, h: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor, dresidual: torch.Tensor | None,
    zero_centred: bool, weight_grad: bool, out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns dh [N, H] (the residual's gradient already added) and dw [H] in weight's dtype, or None if not asked.

    dh goes to `out`, a view with contiguous rows, or to a new tensor.
    """
    n_rows, width = h.shape
    dh = torch.empty((n_rows, width), dtype=h.dtype, device=h.device) if out is None else out
    programs = min(n_rows, WEIGHT_GRAD_PROGRAMS) if weight_grad else n_rows
    partial = torch.empty((programs, width), dtype=torch.float32, device=h.device) if weight_grad else rstd
    if n_rows:
        block = triton.next_power_of_2(width)
        rms_norm_bwd_kernel[(programs,)](
            dy, h, rstd, weight, dy if dresidual is None else dresidual, dh, partial, n_rows, programs,
            dy.stride(0), h.stride(0), 0 if dresidual is None else dresidual.stride(0), dh.stride(0),
            H=width, BH=block, ZERO_CENTRED=zero_centred, ADD=dresidual is not None, WEIGHT_GRAD=weight_grad,
            num_warps=_num_warps(block),
        )
    return dh, partial.sum(0).to(weight.dtype) if weight_grad else None
