"""Depthwise causal convolution with silu that restarts at every document, as Triton kernels and their hosts.

Legend: T tokens, C channels, W <= 4 taps, N documents, BT x BC the tile of one program, S output segments.

    pre[t, c] = sum_j w[c, j] x[t - (W - 1) + j, c]  over tokens of t's own document;   y = silu(pre)
    dpre = dy * silu'(pre);   dx[t] = sum_k w[:, W - 1 - k] dpre[t + k]
    dw[c, j] = sum_t dpre[t, c] x[t - (W - 1) + j, c]

A program walks its rows once with the last three rows in registers, so every element is read from memory once
(three rows of halo a tile). The output, and the gradient that comes back, may lie in up to three tensors (q, k, v).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

__all__ = [
    "MAX_TAPS", "causal_conv1d_bwd", "causal_conv1d_bwd_kernel", "causal_conv1d_fwd", "causal_conv1d_fwd_kernel",
    "token_positions", "token_positions_kernel",
]

MAX_TAPS = 4
BT = 32
BC = 512
"""512 channels over 4 warps: 8-byte loads, all state of a row in registers; 2,016 programs at 5376 x 6144."""


@triton.jit(do_not_specialize=["N"])
def token_positions_kernel(cu_seqlens, positions, T, N, BT: tl.constexpr, BN: tl.constexpr):
    """Grid (cdiv(T, BT),): a program owns BT tokens; position = t - the last boundary not after t."""
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    b_start = tl.zeros([BT], dtype=tl.int32)
    for i_n in range(0, N, BN):
        o_n = i_n + tl.arange(0, BN)
        b_cu = tl.load(cu_seqlens + o_n, mask=o_n < N, other=0)
        b_start = tl.maximum(b_start, tl.max(tl.where(b_cu[None, :] <= o_t[:, None], b_cu[None, :], 0), 1))
    tl.store(positions + o_t, o_t - b_start, mask=o_t < T)


@triton.jit
def _segment(p0, p1, p2, stride_0, stride_1, stride_2, i_c, o_c, C0: tl.constexpr, C1: tl.constexpr):
    """Pointers to row 0 of the segment that holds column block i_c, and that segment's row stride."""
    p = p0 + o_c
    stride = stride_0
    if i_c >= C0:
        p = p1 + (o_c - C0)
        stride = stride_1
    if i_c >= C1:
        p = p2 + (o_c - C1)
        stride = stride_2
    return p, stride


@triton.jit
def causal_conv1d_fwd_kernel(
    x, weight, positions, y0, y1, y2, T, stride_x, stride_0, stride_1, stride_2,
    C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):
    """Grid (cdiv(C, BC), cdiv(T, BT)): a program owns BT rows of BC channels."""
    i_c = tl.program_id(0) * BC
    o_c = i_c + tl.arange(0, BC)
    m_c = o_c < C
    i_t = tl.program_id(1) * BT
    # taps are aligned at the token itself: tap W - 1 is b_w3, missing early taps are zero
    b_w0 = tl.load(weight + o_c * W + (W - 4), mask=m_c & (W >= 4), other=0.0).to(tl.float32)
    b_w1 = tl.load(weight + o_c * W + (W - 3), mask=m_c & (W >= 3), other=0.0).to(tl.float32)
    b_w2 = tl.load(weight + o_c * W + (W - 2), mask=m_c & (W >= 2), other=0.0).to(tl.float32)
    b_w3 = tl.load(weight + o_c * W + (W - 1), mask=m_c, other=0.0).to(tl.float32)
    p_x = x + i_t.to(tl.int64) * stride_x + o_c
    i_pos = tl.load(positions + i_t)
    b_x0 = tl.load(p_x - 3 * stride_x, mask=m_c & (i_pos >= 3), other=0.0).to(tl.float32)
    b_x1 = tl.load(p_x - 2 * stride_x, mask=m_c & (i_pos >= 2), other=0.0).to(tl.float32)
    b_x2 = tl.load(p_x - stride_x, mask=m_c & (i_pos >= 1), other=0.0).to(tl.float32)
    p_y, stride_y = _segment(y0, y1, y2, stride_0, stride_1, stride_2, i_c, o_c, C0, C1)
    p_y += i_t.to(tl.int64) * stride_y
    b_next = tl.load(p_x, mask=m_c, other=0.0)
    for i in range(i_t, min(i_t + BT, T)):
        b_x3 = b_next.to(tl.float32)
        p_x += stride_x
        # the next row is on its way while this one is computed
        b_next = tl.load(p_x, mask=m_c & (i + 1 < T), other=0.0)
        keep = tl.load(positions + i) > 0
        b_x0 = tl.where(keep, b_x0, 0.0)
        b_x1 = tl.where(keep, b_x1, 0.0)
        b_x2 = tl.where(keep, b_x2, 0.0)
        b_pre = b_w0 * b_x0 + b_w1 * b_x1 + b_w2 * b_x2 + b_w3 * b_x3
        tl.store(p_y, (b_pre * tl.sigmoid(b_pre)).to(y0.dtype.element_ty), mask=m_c)
        p_y += stride_y
        b_x0 = b_x1
        b_x1 = b_x2
        b_x2 = b_x3


@triton.jit
def causal_conv1d_bwd_kernel(
    d0, d1, d2, x, weight, positions, dx, dw_partial, T, stride_0, stride_1, stride_2, stride_x, stride_dx,
    C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
):
    """Grid (cdiv(C, BC), cdiv(T, BT)): a program owns BT rows of dx in BC channels, and their share of dw."""
    i_c = tl.program_id(0) * BC
    o_c = i_c + tl.arange(0, BC)
    m_c = o_c < C
    i_t = tl.program_id(1) * BT
    b_w0 = tl.load(weight + o_c * W + (W - 4), mask=m_c & (W >= 4), other=0.0).to(tl.float32)
    b_w1 = tl.load(weight + o_c * W + (W - 3), mask=m_c & (W >= 3), other=0.0).to(tl.float32)
    b_w2 = tl.load(weight + o_c * W + (W - 2), mask=m_c & (W >= 2), other=0.0).to(tl.float32)
    b_w3 = tl.load(weight + o_c * W + (W - 1), mask=m_c, other=0.0).to(tl.float32)
    p_x = x + i_t.to(tl.int64) * stride_x + o_c
    i_pos = tl.load(positions + i_t)
    b_x0 = tl.load(p_x - 3 * stride_x, mask=m_c & (i_pos >= 3), other=0.0).to(tl.float32)
    b_x1 = tl.load(p_x - 2 * stride_x, mask=m_c & (i_pos >= 2), other=0.0).to(tl.float32)
    b_x2 = tl.load(p_x - stride_x, mask=m_c & (i_pos >= 1), other=0.0).to(tl.float32)
    p_d, stride_d = _segment(d0, d1, d2, stride_0, stride_1, stride_2, i_c, o_c, C0, C1)
    p_d += i_t.to(tl.int64) * stride_d
    p_dx = dx + i_t.to(tl.int64) * stride_dx + o_c - 3 * stride_dx
    # sums for rows i - 1, i - 2, i - 3, which still wait for later rows
    b_a1 = tl.zeros([BC], dtype=tl.float32)
    b_a2 = tl.zeros([BC], dtype=tl.float32)
    b_a3 = tl.zeros([BC], dtype=tl.float32)
    b_dw0 = tl.zeros([BC], dtype=tl.float32)
    b_dw1 = tl.zeros([BC], dtype=tl.float32)
    b_dw2 = tl.zeros([BC], dtype=tl.float32)
    b_dw3 = tl.zeros([BC], dtype=tl.float32)
    b_next = tl.load(p_x, mask=m_c, other=0.0)
    b_dnext = tl.load(p_d, mask=m_c, other=0.0)
    for i in range(i_t, i_t + BT + 3):
        b_x3 = b_next.to(tl.float32)
        b_d = b_dnext.to(tl.float32)
        p_x += stride_x
        p_d += stride_d
        more = m_c & (i + 1 < T) & (i + 1 < i_t + BT + 3)
        b_next = tl.load(p_x, mask=more, other=0.0)
        b_dnext = tl.load(p_d, mask=more, other=0.0)
        # rows past the end have a zero gradient: any position will do
        i_pos = tl.load(positions + i, mask=i < T, other=0)
        b_x0 = tl.where(i_pos > 0, b_x0, 0.0)
        b_x1 = tl.where(i_pos > 0, b_x1, 0.0)
        b_x2 = tl.where(i_pos > 0, b_x2, 0.0)
        b_pre = b_w0 * b_x0 + b_w1 * b_x1 + b_w2 * b_x2 + b_w3 * b_x3
        b_s = tl.sigmoid(b_pre)
        b_d = b_d * (b_s + b_pre * b_s * (1.0 - b_s))
        if WEIGHT_GRAD:
            b_own = tl.where(i < i_t + BT, b_d, 0.0)
            b_dw0 += b_own * b_x0
            b_dw1 += b_own * b_x1
            b_dw2 += b_own * b_x2
            b_dw3 += b_own * b_x3
        b_a3 += tl.where(i_pos >= 3, b_w0 * b_d, 0.0)
        tl.store(p_dx, b_a3.to(dx.dtype.element_ty), mask=m_c & (i >= i_t + 3) & (i - 3 < T))
        p_dx += stride_dx
        b_a3 = b_a2 + tl.where(i_pos >= 2, b_w1 * b_d, 0.0)
        b_a2 = b_a1 + tl.where(i_pos >= 1, b_w2 * b_d, 0.0)
        b_a1 = b_w3 * b_d
        b_x0 = b_x1
        b_x1 = b_x2
        b_x2 = b_x3
    if WEIGHT_GRAD:
        p_dw = dw_partial + (tl.program_id(1).to(tl.int64) * C + o_c) * W
        tl.store(p_dw + (W - 4), b_dw0, mask=m_c & (W >= 4))
        tl.store(p_dw + (W - 3), b_dw1, mask=m_c & (W >= 3))
        tl.store(p_dw + (W - 2), b_dw2, mask=m_c & (W >= 2))
        tl.store(p_dw + (W - 1), b_dw3, mask=m_c)


def token_positions(cu_seqlens: torch.Tensor, T: int) -> torch.Tensor:
    """Returns the position of each of T tokens inside its document, int32 [T]; cu_seqlens [N + 1] on the device."""
    positions = torch.empty(T, dtype=torch.int32, device=cu_seqlens.device)
    if T:
        N = cu_seqlens.shape[0] - 1
        token_positions_kernel[(triton.cdiv(T, 128),)](cu_seqlens, positions, T, N, BT=128, BN=32, num_warps=4)
    return positions


def _blocks(sizes: Sequence[int]) -> tuple[int, int, int]:
    """Returns the channel block (it divides every segment but a lone one) and the ends of segments 0 and 1."""
    total = sum(sizes)
    block = min(BC, triton.next_power_of_2(total))
    if len(sizes) > 1:
        common = math.gcd(*sizes)
        block = min(block, common & -common)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return block, ends[0], ends[1] if len(sizes) > 1 else total


def _three(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [*tensors, *[tensors[-1]] * (3 - len(tensors))]


def causal_conv1d_fwd(
    x: torch.Tensor, weight: torch.Tensor, positions: torch.Tensor, sizes: Sequence[int]
) -> list[torch.Tensor]:
    """Returns one contiguous [T, size] tensor a segment; x [T, C] row-strided, weight [C, W], positions int32 [T]."""
    T, C = x.shape
    outs = [torch.empty((T, size), dtype=x.dtype, device=x.device) for size in sizes]
    if T:
        block, end_0, end_1 = _blocks(sizes)
        ys = _three(outs)
        causal_conv1d_fwd_kernel[(triton.cdiv(C, block), triton.cdiv(T, BT))](
            x, weight, positions, *ys, T, x.stride(0), *[y.stride(0) for y in ys],
            C=C, C0=end_0, C1=end_1, W=weight.shape[1], BT=BT, BC=block, num_warps=4,
        )
    return outs


def causal_conv1d_bwd(
    dys: Sequence[torch.Tensor], x: torch.Tensor, weight: torch.Tensor, positions: torch.Tensor, weight_grad: bool,
    dx: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns dx [T, C] (written into the given row-strided view if one is passed) and dw [C, W] or None.

    Args:
        dys: one [T, size] gradient a segment, last dimension contiguous.
        x: [T, C], the forward's input.
        weight: [C, W].
        positions: int32 [T], the forward's.
        weight_grad: sum the weight's gradient too.
        dx: where to write, or None to allocate.
    """
    T, C = x.shape
    W = weight.shape[1]
    if dx is None:
        dx = torch.empty((T, C), dtype=x.dtype, device=x.device)
    rows = triton.cdiv(T, BT)
    partial = torch.empty((rows, C, W), dtype=torch.float32, device=x.device) if weight_grad else positions
    if T:
        block, end_0, end_1 = _blocks([d.shape[1] for d in dys])
        ds = _three(dys)
        causal_conv1d_bwd_kernel[(triton.cdiv(C, block), rows)](
            *ds, x, weight, positions, dx, partial, T, *[d.stride(0) for d in ds], x.stride(0), dx.stride(0),
            C=C, C0=end_0, C1=end_1, W=W, BT=BT, BC=block, WEIGHT_GRAD=weight_grad, num_warps=4,
        )
    return dx, partial.sum(0).to(weight.dtype) if weight_grad else None
