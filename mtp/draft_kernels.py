"""The drafts' losses over one block of logits on a GPU, gradient in place.

Legend: S drafts, B rows of the base, V vocabulary, BV columns of one step. One program owns a draft's row and walks it
and its judge's row together: once for both log-sum-exps and the divergence, for lk once more for the overlap, and a
last time to write the gradient over the draft's logits. fp32 inside. Formulas: mtp/losses.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparktune.kernels.linear_cross_entropy.triton import softmax_loss
from sparktune.mtp.losses import ETA, LossKind

__all__ = ["block_loss_fused", "draft_loss_kernel"]

BV = 4096
NUM_WARPS = 16


@triton.jit
def draft_loss_kernel(base, draft, places, loss, V, stride_b, stride_d, eta, BV: tl.constexpr, LK: tl.constexpr):
    """Grid (S,): a program owns one draft's logits and its loss."""
    i_s = tl.program_id(0).to(tl.int64)
    p_q = draft + i_s * stride_d
    p_p = base + tl.load(places + i_s) * stride_b
    o_v = tl.arange(0, BV)
    # finite sentinels: a lane that never sees a column contributes exp(-huge) = 0, never a NaN
    b_mq = tl.full([BV], -3.0e38, dtype=tl.float32)
    b_mp = tl.full([BV], -3.0e38, dtype=tl.float32)
    b_lq = tl.zeros([BV], dtype=tl.float32)
    b_lp = tl.zeros([BV], dtype=tl.float32)
    b_d = tl.zeros([BV], dtype=tl.float32)
    for i_v in range(0, V, BV):
        m = i_v + o_v < V
        b_q = tl.load(p_q + i_v + o_v, mask=m, other=-3.0e38).to(tl.float32)
        b_p = tl.load(p_p + i_v + o_v, mask=m, other=-3.0e38).to(tl.float32)
        b_new = tl.maximum(b_mq, b_q)
        b_lq = b_lq * tl.exp(b_mq - b_new) + tl.exp(b_q - b_new)
        b_mq = b_new
        b_new = tl.maximum(b_mp, b_p)
        b_scale = tl.exp(b_mp - b_new)
        b_e = tl.exp(b_p - b_new)
        b_lp = b_lp * b_scale + b_e
        b_d = b_d * b_scale + tl.where(m, b_e * (b_p - b_q), 0.0)
        b_mp = b_new
    b_qmax, b_pmax = tl.max(b_mq, 0), tl.max(b_mp, 0)
    b_qlse = b_qmax + tl.log(tl.sum(b_lq * tl.exp(b_mq - b_qmax), 0))
    b_share = tl.exp(b_mp - b_pmax)
    b_psum = tl.sum(b_lp * b_share, 0)
    b_plse = b_pmax + tl.log(b_psum)
    b_kl = tl.sum(b_d * b_share, 0) / b_psum - b_plse + b_qlse
    b_lam = 1.0
    b_below = 0.0
    if LK:
        b_a = tl.zeros([BV], dtype=tl.float32)
        b_b = tl.zeros([BV], dtype=tl.float32)
        for i_v in range(0, V, BV):
            m = i_v + o_v < V
            b_q = tl.exp(tl.load(p_q + i_v + o_v, mask=m, other=-3.0e38).to(tl.float32) - b_qlse)
            b_p = tl.exp(tl.load(p_p + i_v + o_v, mask=m, other=-3.0e38).to(tl.float32) - b_plse)
            b_a += tl.minimum(b_p, b_q)
            b_b += tl.where(b_q < b_p, b_q, 0.0)
        b_alpha = tl.sum(b_a, 0)
        b_below = tl.sum(b_b, 0)
        b_lam = tl.exp(-eta * b_alpha)
        tl.store(loss + i_s, b_lam * b_kl + (1.0 - b_lam) * (1.0 - b_alpha))
    else:
        tl.store(loss + i_s, b_kl)
    for i_v in range(0, V, BV):
        m = i_v + o_v < V
        b_q = tl.exp(tl.load(p_q + i_v + o_v, mask=m, other=-3.0e38).to(tl.float32) - b_qlse)
        b_p = tl.exp(tl.load(p_p + i_v + o_v, mask=m, other=-3.0e38).to(tl.float32) - b_plse)
        b_g = b_q - b_p
        if LK:
            b_g = b_lam * b_g + (1.0 - b_lam) * (b_q * b_below - tl.where(b_q < b_p, b_q, 0.0))
        tl.store(p_q + i_v + o_v, b_g.to(draft.dtype.element_ty), mask=m)


def block_loss_fused(
    base: torch.Tensor | None, draft: torch.Tensor, places: torch.Tensor, kind: LossKind
) -> torch.Tensor:
    """The same as `block_loss_reference` (mtp/losses.py): float32 losses [S], gradient over `draft`."""
    loss = torch.empty(draft.shape[0], dtype=torch.float32, device=draft.device)
    if kind == "hard":
        softmax_loss(draft, places, loss, True)
        return loss
    assert base is not None, "only hard labels need no base"
    V = draft.shape[1]
    if draft.shape[0]:
        draft_loss_kernel[(draft.shape[0],)](
            base, draft, places, loss, V, base.stride(0), draft.stride(0), ETA,
            BV=min(BV, triton.next_power_of_2(V)), LK=kind == "lk", num_warps=NUM_WARPS,
        )
    return loss
