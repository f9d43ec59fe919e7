"""Softmax cross-entropy over one block of logits rows, gradient in place, and the scatter of the input's gradient.

Legend: S rows, V vocabulary, BV columns of one step, H hidden.

    loss_s = logsumexp(logits_s) - logits_s[target_s];   dlogits_s = softmax(logits_s) - onehot(target_s)

fp32 inside. One program walks a row twice: an online maximum and sum, then the gradient over the logits themselves.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["scatter_rows", "scatter_rows_kernel", "softmax_loss", "softmax_loss_kernel"]

BV = 8192
NUM_WARPS = 16


@triton.jit
def softmax_loss_kernel(logits, targets, loss, V, stride, BV: tl.constexpr, GRAD: tl.constexpr):
    """Grid (S,): a program owns one row of logits and its loss."""
    i_s = tl.program_id(0).to(tl.int64)
    p_row = logits + i_s * stride
    i_target = tl.load(targets + i_s)
    b_target = tl.load(p_row + i_target).to(tl.float32)
    o_v = tl.arange(0, BV)
    # finite sentinels: a lane that never sees a column contributes exp(-huge) = 0, never a NaN
    b_m = tl.full([BV], -3.0e38, dtype=tl.float32)
    b_l = tl.zeros([BV], dtype=tl.float32)
    for i_v in range(0, V, BV):
        b_x = tl.load(p_row + i_v + o_v, mask=i_v + o_v < V, other=-3.0e38).to(tl.float32)
        b_new = tl.maximum(b_m, b_x)
        b_l = b_l * tl.exp(b_m - b_new) + tl.exp(b_x - b_new)
        b_m = b_new
    b_max = tl.max(b_m, 0)
    b_lse = b_max + tl.log(tl.sum(b_l * tl.exp(b_m - b_max), 0))
    tl.store(loss + i_s, b_lse - b_target)
    if GRAD:
        # every thread of the program must have read b_target before its column is overwritten
        tl.debug_barrier()
        for i_v in range(0, V, BV):
            m = i_v + o_v < V
            b_x = tl.load(p_row + i_v + o_v, mask=m, other=-3.0e38).to(tl.float32)
            b_g = tl.exp(b_x - b_lse) - tl.where(i_v + o_v == i_target, 1.0, 0.0)
            tl.store(p_row + i_v + o_v, b_g.to(logits.dtype.element_ty), mask=m)


@triton.jit
def scatter_rows_kernel(src, rows, scale, dst, H, stride_dst, BH: tl.constexpr):
    """Grid (S, cdiv(H, BH)): dst[rows[s]] = src[s] * scale, the scale read on the device. Rows are unique."""
    i_s = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    i_row = tl.load(rows + i_s).to(tl.int64)
    b = tl.load(src + i_s * H + o_h, mask=o_h < H, other=0.0).to(tl.float32) * tl.load(scale).to(tl.float32)
    tl.store(dst + i_row * stride_dst + o_h, b.to(dst.dtype.element_ty), mask=o_h < H)


def softmax_loss(logits: torch.Tensor, targets: torch.Tensor, loss: torch.Tensor, grad: bool) -> None:
    """Writes the loss of every row into `loss` [S] fp32 and, if `grad`, the gradient over `logits` [S, V] in place."""
    S, V = logits.shape
    if S:
        softmax_loss_kernel[(S,)](
            logits, targets, loss, V, logits.stride(0), BV=min(BV, triton.next_power_of_2(V)), GRAD=grad,
            num_warps=NUM_WARPS,
        )


def scatter_rows(src: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor, n_rows: int, dtype: torch.dtype) \
        -> torch.Tensor:
    """Returns zeros [n_rows, H] with dst[rows[s]] = src[s] * scale (a 0-d tensor, never read on the host)."""
    S, H = src.shape
    dst = torch.zeros((n_rows, H), dtype=dtype, device=src.device)
    if S:
        BH = min(2048, triton.next_power_of_2(H))
        scatter_rows_kernel[(S, triton.cdiv(H, BH))](src, rows, scale, dst, H, dst.stride(0), BH=BH, num_warps=4)
    return dst
