"""q/k norm and partial rotary embedding in one launch, and the backward that fills the grouped gradient.

Legend: T tokens, nH query heads, nKV key heads, D head dimension, R rotary dimensions, BT tokens of a tile, BD >= D.

    n = x * rsqrt(mean(x^2) + eps) * w',  w' = w or 1 + w;   y[d] = n[d] cos[d] + n[d'] sin'[d]  for d < R, else n[d]
    d' = d + R/2 and sin' = -sin in the first half of R;  d' = d - R/2 and sin' = sin in the second
    dn[d] = dy[d] cos[d] + dy[d'] sin'[d'];   dx = r * (dn w' - xhat * mean(dn w' xhat));   dw = sum dn * xhat

Raw q and k are saved (they live in the grouped product); rstd is found again from the row that is read anyway.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = [
    "attention_prologue_bwd", "attention_prologue_bwd_kernel", "attention_prologue_fwd",
    "attention_prologue_fwd_kernel",
]

BT = 16


@triton.jit
def _norm_rope_fwd(
    x, weight, cos, sin, y, o_t, T, stride_t, stride_yt, stride_cos, eps,
    D: tl.constexpr, R: tl.constexpr, BD: tl.constexpr, ZERO_CENTRED: tl.constexpr, NORM: tl.constexpr,
):
    o_d = tl.arange(0, BD)[None, :]
    o_pair = tl.where(o_d < R // 2, o_d + R // 2, tl.where(o_d < R, o_d - R // 2, o_d))
    m_t = (o_t < T)[:, None]
    m = m_t & (o_d < D)
    m_r = m_t & (o_d < R)
    b_x = tl.load(x + o_t[:, None] * stride_t + o_d, mask=m, other=0.0).to(tl.float32)
    # the partner elements come from the cache: the same row has just been read
    b_p = tl.load(x + o_t[:, None] * stride_t + o_pair, mask=m_r, other=0.0).to(tl.float32)
    if NORM:
        b_r = (1.0 / tl.sqrt(tl.sum(b_x * b_x, 1) / D + eps))[:, None]
        b_w = tl.load(weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        b_wp = tl.load(weight + o_pair, mask=o_d < R, other=0.0).to(tl.float32)
        if ZERO_CENTRED:
            b_w += 1.0
            b_wp += 1.0
        b_x = b_x * b_r * b_w
        b_p = b_p * b_r * b_wp
    b_cos = tl.load(cos + o_t[:, None] * stride_cos + o_d, mask=m_r, other=1.0)
    b_sin = tl.load(sin + o_t[:, None] * stride_cos + o_d, mask=m_r, other=0.0)
    b_sin = tl.where(o_d < R // 2, -b_sin, b_sin)
    tl.store(y + o_t[:, None] * stride_yt + o_d, (b_x * b_cos + b_p * b_sin).to(y.dtype.element_ty), mask=m)


@triton.jit
def attention_prologue_fwd_kernel(
    q, k, q_weight, k_weight, cos, sin, q_out, k_out, T, eps, stride_qt, stride_qh, stride_kt, stride_kh, stride_cos,
    NH: tl.constexpr, NKV: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    ZERO_CENTRED: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
):
    """Grid (cdiv(T, BT), nH + nKV): a program owns BT tokens of one head; query heads first, then key heads."""
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    i_h = tl.program_id(1)
    if i_h < NH:
        _norm_rope_fwd(
            q + i_h * stride_qh, q_weight, cos, sin, q_out + i_h * D, o_t, T, stride_qt, NH * D, stride_cos, eps,
            D, R, BD, ZERO_CENTRED, Q_NORM,
        )
    else:
        _norm_rope_fwd(
            k + (i_h - NH) * stride_kh, k_weight, cos, sin, k_out + (i_h - NH) * D, o_t, T, stride_kt, NKV * D,
            stride_cos, eps, D, R, BD, ZERO_CENTRED, K_NORM,
        )


@triton.jit
def _norm_rope_bwd(
    dy, x, weight, cos, sin, dx, partial, o_t, T, stride_dyt, stride_t, stride_dt, stride_cos, eps,
    D: tl.constexpr, R: tl.constexpr, BD: tl.constexpr, ZERO_CENTRED: tl.constexpr, NORM: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
):
    o_d = tl.arange(0, BD)[None, :]
    o_pair = tl.where(o_d < R // 2, o_d + R // 2, tl.where(o_d < R, o_d - R // 2, o_d))
    m_t = (o_t < T)[:, None]
    m = m_t & (o_d < D)
    m_r = m_t & (o_d < R)
    b_dy = tl.load(dy + o_t[:, None] * stride_dyt + o_d, mask=m, other=0.0).to(tl.float32)
    b_dp = tl.load(dy + o_t[:, None] * stride_dyt + o_pair, mask=m_r, other=0.0).to(tl.float32)
    b_cos = tl.load(cos + o_t[:, None] * stride_cos + o_d, mask=m_r, other=1.0)
    b_sin = tl.load(sin + o_t[:, None] * stride_cos + o_pair, mask=m_r, other=0.0)
    # the partner of a first-half element lies in the second half, where the sign is +
    b_dn = b_dy * b_cos + b_dp * tl.where(o_d < R // 2, b_sin, -b_sin)
    if NORM:
        b_x = tl.load(x + o_t[:, None] * stride_t + o_d, mask=m, other=0.0).to(tl.float32)
        b_r = (1.0 / tl.sqrt(tl.sum(b_x * b_x, 1) / D + eps))[:, None]
        b_x = b_x * b_r
        if WEIGHT_GRAD:
            o_w = tl.arange(0, BD)
            tl.store(partial + o_w, tl.sum(b_dn * b_x, 0), mask=o_w < D)
        b_w = tl.load(weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        if ZERO_CENTRED:
            b_w += 1.0
        b_dn = b_dn * b_w
        b_dn = b_r * (b_dn - b_x * (tl.sum(b_dn * b_x, 1) / D)[:, None])
    tl.store(dx + o_t[:, None] * stride_dt + o_d, b_dn.to(dx.dtype.element_ty), mask=m)


@triton.jit
def _copy(src, dst, o_t, T, stride_src, stride_dst, D: tl.constexpr, BD: tl.constexpr):
    o_d = tl.arange(0, BD)[None, :]
    m = (o_t < T)[:, None] & (o_d < D)
    tl.store(dst + o_t[:, None] * stride_dst + o_d, tl.load(src + o_t[:, None] * stride_src + o_d, mask=m), mask=m)


@triton.jit
def attention_prologue_bwd_kernel(
    dq, dk, dgate, q, k, q_weight, k_weight, cos, sin, q_grad, k_grad, gate_grad, partial, T, eps,
    stride_dqt, stride_dqh, stride_dkt, stride_dkh, stride_dgt, stride_dgh, stride_qt, stride_qh, stride_kt, stride_kh,
    stride_cos, stride_oqt, stride_oqh, stride_okt, stride_okh, stride_ogt, stride_ogh,
    NH: tl.constexpr, NKV: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    ZERO_CENTRED: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr, GATED: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
):
    """Grid (cdiv(T, BT), nH + nKV): a program owns BT tokens of one head; query heads first, then key heads.

    A query head's program also moves the gate's gradient into its place.
    """
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    i_h = tl.program_id(1)
    p_partial = partial + (tl.program_id(0) * (NH + NKV) + i_h) * D
    if i_h < NH:
        _norm_rope_bwd(
            dq + i_h * stride_dqh, q + i_h * stride_qh, q_weight, cos, sin, q_grad + i_h * stride_oqh, p_partial,
            o_t, T, stride_dqt, stride_qt, stride_oqt, stride_cos, eps, D, R, BD, ZERO_CENTRED, Q_NORM, WEIGHT_GRAD,
        )
        if GATED:
            _copy(dgate + i_h * stride_dgh, gate_grad + i_h * stride_ogh, o_t, T, stride_dgt, stride_ogt, D, BD)
    else:
        i_k = i_h - NH
        _norm_rope_bwd(
            dk + i_k * stride_dkh, k + i_k * stride_kh, k_weight, cos, sin, k_grad + i_k * stride_okh, p_partial,
            o_t, T, stride_dkt, stride_kt, stride_okt, stride_cos, eps, D, R, BD, ZERO_CENTRED, K_NORM, WEIGHT_GRAD,
        )


def attention_prologue_fwd(
    q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, cos: torch.Tensor,
    sin: torch.Tensor, eps: float, zero_centred: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns q [T, nH, D] and k [T, nKV, D], contiguous; inputs of those shapes with any token and head strides.

    cos and sin are fp32 [T, R] with rows of one stride; a None weight means no norm.
    """
    T, NH, D = q.shape
    NKV = k.shape[1]
    q_out = torch.empty((T, NH, D), dtype=q.dtype, device=q.device)
    k_out = torch.empty((T, NKV, D), dtype=k.dtype, device=k.device)
    if T:
        attention_prologue_fwd_kernel[(triton.cdiv(T, BT), NH + NKV)](
            q, k, q if q_weight is None else q_weight, k if k_weight is None else k_weight, cos, sin, q_out, k_out,
            T, eps, q.stride(0), q.stride(1), k.stride(0), k.stride(1), cos.stride(0),
            NH=NH, NKV=NKV, D=D, R=cos.shape[1], BT=BT, BD=triton.next_power_of_2(D), ZERO_CENTRED=zero_centred,
            Q_NORM=q_weight is not None, K_NORM=k_weight is not None, num_warps=4,
        )
    return q_out, k_out


def attention_prologue_bwd(
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], q: torch.Tensor, k: torch.Tensor,
    q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, eps: float,
    zero_centred: bool, outs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """Writes the gradients of the raw q, k (and gate) and returns those of the norm weights, if asked.

    Args:
        grads: dq [T, nH, D], dk [T, nKV, D], dgate [T, nH, D] or None for no gate.
        q, k, q_weight, k_weight, cos, sin, eps, zero_centred: the forward's.
        outs: where the gradients of q, k, gate go, shaped like `grads`; the last is not read without a gate.
        weight_grad: also sum the gradients of the two norm weights, fp32.
    """
    dq, dk, dgate = grads
    q_grad, k_grad, gate_grad = outs
    T, NH, D = q.shape
    NKV = k.shape[1]
    tiles = triton.cdiv(T, BT)
    partial = torch.empty((tiles, NH + NKV, D), dtype=torch.float32, device=q.device) if weight_grad else cos
    from_gate, to_gate = (dq, q_grad) if dgate is None else (dgate, gate_grad)
    if T:
        attention_prologue_bwd_kernel[(tiles, NH + NKV)](
            dq, dk, from_gate, q, k, q if q_weight is None else q_weight, k if k_weight is None else k_weight, cos, sin,
            q_grad, k_grad, to_gate, partial, T, eps, *dq.stride()[:2], *dk.stride()[:2], *from_gate.stride()[:2],
            *q.stride()[:2], *k.stride()[:2], cos.stride(0), *q_grad.stride()[:2], *k_grad.stride()[:2],
            *to_gate.stride()[:2],
            NH=NH, NKV=NKV, D=D, R=cos.shape[1], BT=BT, BD=triton.next_power_of_2(D), ZERO_CENTRED=zero_centred,
            Q_NORM=q_weight is not None, K_NORM=k_weight is not None, GATED=dgate is not None,
            WEIGHT_GRAD=weight_grad, num_warps=4,
        )
    if not weight_grad:
        return None, None
    sums = partial.sum(0)
    return sums[:NH].sum(0), sums[NH:].sum(0)
