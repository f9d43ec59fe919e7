"""Triton kernels of causal attention by document: forward, and a backward in two passes (dq, then dk and dv).

A row holds documents end to end. The host lists one tile per block of queries (or of keys) of each document, so the
number of products is proportional to the sum of squared lengths. Legend: T tokens, nH query heads, nKV key heads,
G = nH / nKV, D head dim, BM block of queries, BN block of keys.

Every register tile that feeds a product is computed in the orientation in which it is used: Triton 3.4 to 3.7.0
miscompiles `dot(trans(tile computed by a dot), ...)` on Hopper (flash-linear-attention issue 640).
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["attention_dkv_kernel", "attention_dq_kernel", "attention_forward_kernel", "reduce_heads_kernel"]

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _softmax_step(
    acc, row_max, row_sum, b_q, k, v, stride_kt, stride_vt, n_start, o_m, o_n, o_d, eos, qk_scale, WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds one block of keys to the running softmax of one block of queries."""
    rows = n_start + o_n
    if MASKED:
        b_k = tl.load(k + rows[None, :] * stride_kt + o_d[:, None], mask=rows[None, :] < eos, other=0.0)
    else:
        b_k = tl.load(k + rows[None, :] * stride_kt + o_d[:, None])
    b_s = tl.dot(b_q, b_k) * qk_scale
    if MASKED:
        keep = (rows[None, :] <= o_m[:, None]) & (rows[None, :] < eos)
        if WINDOW > 0:
            keep = keep & (rows[None, :] > o_m[:, None] - WINDOW)
        b_s = tl.where(keep, b_s, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(b_s, 1))
    # A row whose window has not begun yet has no finite score: exp2(-inf - 0) is 0, exp2(-inf + inf) would be NaN.
    base = tl.where(new_max == float("-inf"), 0.0, new_max)
    b_p = tl.exp2(b_s - base[:, None])
    alpha = tl.exp2(row_max - base)
    row_sum = row_sum * alpha + tl.sum(b_p, 1)
    acc = acc * alpha[:, None]
    if MASKED:
        b_v = tl.load(v + rows[:, None] * stride_vt + o_d[None, :], mask=rows[:, None] < eos, other=0.0)
    else:
        b_v = tl.load(v + rows[:, None] * stride_vt + o_d[None, :])
    acc = tl.dot(b_p.to(b_v.dtype), b_v, acc)
    return acc, new_max, row_sum


@triton.jit(do_not_specialize=["T"])
def attention_forward_kernel(
    q, k, v, o, lse, tiles, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, T, scale,
    nH: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr,
):
    """o = softmax(scale * q k^T, causal, inside the document) v, and lse = log2 of the softmax's denominator.

    Grid (tiles * nH), heads fastest; a program owns BM queries of one head. `tiles` int32 [tiles, 3]: first query,
    document's begin, document's end. o [T, nH, D] contiguous, lse fp32 [nH, T].
    """
    i_t, i_h = tl.program_id(0) // nH, tl.program_id(0) % nH
    m_start = tl.load(tiles + i_t * 3)
    bos, eos = tl.load(tiles + i_t * 3 + 1), tl.load(tiles + i_t * 3 + 2)
    if m_start >= eos:  # a spare row of a graph's table
        return
    o_m = m_start + tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, D)
    q += i_h * stride_qh
    k += (i_h // G) * stride_kh
    v += (i_h // G) * stride_vh
    qk_scale = scale * LOG2E

    b_q = tl.load(q + o_m[:, None] * stride_qt + o_d[None, :], mask=o_m[:, None] < eos, other=0.0)
    acc = tl.zeros([BM, D], dtype=tl.float32)
    row_max = tl.full([BM], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BM], dtype=tl.float32)
    masked_from = m_start
    if WINDOW > 0:
        masked_from = tl.maximum(bos, bos + (m_start - WINDOW + 1 - bos) // BN * BN)
    else:
        for n_start in range(bos, m_start, BN):
            acc, row_max, row_sum = _softmax_step(
                acc, row_max, row_sum, b_q, k, v, stride_kt, stride_vt, n_start, o_m, o_n, o_d, eos, qk_scale,
                WINDOW, False,
            )
    for n_start in range(masked_from, tl.minimum(m_start + BM, eos), BN):
        acc, row_max, row_sum = _softmax_step(
            acc, row_max, row_sum, b_q, k, v, stride_kt, stride_vt, n_start, o_m, o_n, o_d, eos, qk_scale, WINDOW,
            True,
        )
    keep = o_m < eos
    acc = acc / row_sum[:, None]
    tl.store(o + (o_m[:, None] * nH + i_h) * D + o_d[None, :], acc.to(o.dtype.element_ty), mask=keep[:, None])
    tl.store(lse + i_h * T + o_m, row_max + tl.log2(row_sum), mask=keep)


@triton.jit
def _dq_step(
    b_dq, b_q, b_do, b_lse, b_delta, k, v, stride_kt, stride_vt, n_start, o_m, o_n, o_d, eos, qk_scale,
    WINDOW: tl.constexpr, MASKED: tl.constexpr,
):
    """Adds one block of keys to dq."""
    rows = n_start + o_n
    if MASKED:
        b_k = tl.load(k + rows[:, None] * stride_kt + o_d[None, :], mask=rows[:, None] < eos, other=0.0)
        b_v = tl.load(v + rows[:, None] * stride_vt + o_d[None, :], mask=rows[:, None] < eos, other=0.0)
    else:
        b_k = tl.load(k + rows[:, None] * stride_kt + o_d[None, :])
        b_v = tl.load(v + rows[:, None] * stride_vt + o_d[None, :])
    b_p = tl.exp2(tl.dot(b_q, tl.trans(b_k)) * qk_scale - b_lse[:, None])
    if MASKED:
        keep = (rows[None, :] <= o_m[:, None]) & (rows[None, :] < eos)
        if WINDOW > 0:
            keep = keep & (rows[None, :] > o_m[:, None] - WINDOW)
        b_p = tl.where(keep, b_p, 0.0)
    b_ds = b_p * (tl.dot(b_do, tl.trans(b_v)) - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq)


@triton.jit(do_not_specialize=["T"])
def attention_dq_kernel(
    q, k, v, o, do, lse, delta, dq, tiles, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_dot, stride_doh, T, scale,
    nH: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr,
):
    """delta = sum(o * do), dq = scale * (p * (do v^T - delta)) k; grid and tiles as in the forward.

    Writes delta fp32 [nH, T], which the dk and dv pass reads.
    """
    i_t, i_h = tl.program_id(0) // nH, tl.program_id(0) % nH
    m_start = tl.load(tiles + i_t * 3)
    bos, eos = tl.load(tiles + i_t * 3 + 1), tl.load(tiles + i_t * 3 + 2)
    if m_start >= eos:  # a spare row of a graph's table
        return
    o_m = m_start + tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, D)
    keep = o_m < eos
    q += i_h * stride_qh
    k += (i_h // G) * stride_kh
    v += (i_h // G) * stride_vh
    qk_scale = scale * LOG2E

    b_do = tl.load(do + i_h * stride_doh + o_m[:, None] * stride_dot + o_d[None, :], mask=keep[:, None], other=0.0)
    b_o = tl.load(o + (o_m[:, None] * nH + i_h) * D + o_d[None, :], mask=keep[:, None], other=0.0)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    tl.store(delta + i_h * T + o_m, b_delta, mask=keep)
    b_lse = tl.load(lse + i_h * T + o_m, mask=keep, other=float("inf"))
    b_q = tl.load(q + o_m[:, None] * stride_qt + o_d[None, :], mask=keep[:, None], other=0.0)

    b_dq = tl.zeros([BM, D], dtype=tl.float32)
    masked_from = m_start
    if WINDOW > 0:
        masked_from = tl.maximum(bos, bos + (m_start - WINDOW + 1 - bos) // BN * BN)
    else:
        for n_start in range(bos, m_start, BN):
            b_dq = _dq_step(
                b_dq, b_q, b_do, b_lse, b_delta, k, v, stride_kt, stride_vt, n_start, o_m, o_n, o_d, eos, qk_scale,
                WINDOW, False,
            )
    for n_start in range(masked_from, tl.minimum(m_start + BM, eos), BN):
        b_dq = _dq_step(
            b_dq, b_q, b_do, b_lse, b_delta, k, v, stride_kt, stride_vt, n_start, o_m, o_n, o_d, eos, qk_scale,
            WINDOW, True,
        )
    b_dq *= scale
    tl.store(dq + (o_m[:, None] * nH + i_h) * D + o_d[None, :], b_dq.to(dq.dtype.element_ty), mask=keep[:, None])


@triton.jit
def _dkv_step(
    b_dk, b_dv, b_k, b_v, q, do, lse, delta, stride_qt, stride_dot, m_start, o_m, o_n, o_d, eos, qk_scale,
    WINDOW: tl.constexpr, MASKED: tl.constexpr,
):
    """Adds one block of queries to dk and dv; scores are held transposed, [BN, BM]."""
    rows = m_start + o_m
    keep_row = rows < eos
    b_q = tl.load(q + rows[:, None] * stride_qt + o_d[None, :], mask=keep_row[:, None], other=0.0)
    # lse = inf makes the probabilities of rows past the end zero.
    b_lse = tl.load(lse + rows, mask=keep_row, other=float("inf"))
    b_p = tl.exp2(tl.dot(b_k, tl.trans(b_q)) * qk_scale - b_lse[None, :])
    if MASKED:
        keep = o_n[:, None] <= rows[None, :]
        if WINDOW > 0:
            keep = keep & (o_n[:, None] > rows[None, :] - WINDOW)
        b_p = tl.where(keep, b_p, 0.0)
    b_do = tl.load(do + rows[:, None] * stride_dot + o_d[None, :], mask=keep_row[:, None], other=0.0)
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv)
    b_delta = tl.load(delta + rows, mask=keep_row, other=0.0)
    b_ds = b_p * (tl.dot(b_v, tl.trans(b_do)) - b_delta[None, :])
    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk)
    return b_dk, b_dv


@triton.jit(do_not_specialize=["T"])
def attention_dkv_kernel(
    q, k, v, do, lse, delta, dk, dv, tiles, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_dot, stride_doh, T, scale,
    G: tl.constexpr, GP: tl.constexpr, NS: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """dv = p^T do, dk = scale * (p * (do v^T - delta))^T q for BN keys, summed over GP query heads.

    Grid (tiles * NS), NS = nH / GP: a program owns the keys of tile i_t and query heads i_s * GP to i_s * GP + GP - 1,
    which share one key head (GP divides G). dk and dv [T, nH / GP, D] contiguous. `tiles` int32 [tiles, 3]: first key,
    document's begin, document's end.
    """
    i_t, i_s = tl.program_id(0) // NS, tl.program_id(0) % NS
    n_start = tl.load(tiles + i_t * 3)
    eos = tl.load(tiles + i_t * 3 + 2)
    if n_start >= eos:  # a spare row of a graph's table
        return
    o_n = n_start + tl.arange(0, BN)
    o_m = tl.arange(0, BM)
    o_d = tl.arange(0, D)
    keep = o_n < eos
    qk_scale = scale * LOG2E
    i_kv = i_s * GP // G
    b_k = tl.load(k + i_kv * stride_kh + o_n[:, None] * stride_kt + o_d[None, :], mask=keep[:, None], other=0.0)
    b_v = tl.load(v + i_kv * stride_vh + o_n[:, None] * stride_vt + o_d[None, :], mask=keep[:, None], other=0.0)
    b_dk = tl.zeros([BN, D], dtype=tl.float32)
    b_dv = tl.zeros([BN, D], dtype=tl.float32)

    end = eos
    masked_to = tl.minimum(n_start + tl.cdiv(BN, BM) * BM, eos)
    if WINDOW > 0:
        end = tl.minimum(eos, n_start + BN + WINDOW - 1)
        masked_to = end
    for i_g in range(GP):
        i_h = i_s * GP + i_g
        for m_start in range(n_start, masked_to, BM):
            b_dk, b_dv = _dkv_step(
                b_dk, b_dv, b_k, b_v, q + i_h * stride_qh, do + i_h * stride_doh, lse + i_h * T, delta + i_h * T,
                stride_qt, stride_dot, m_start, o_m, o_n, o_d, eos, qk_scale, WINDOW, True,
            )
        for m_start in range(masked_to, end, BM):
            b_dk, b_dv = _dkv_step(
                b_dk, b_dv, b_k, b_v, q + i_h * stride_qh, do + i_h * stride_doh, lse + i_h * T, delta + i_h * T,
                stride_qt, stride_dot, m_start, o_m, o_n, o_d, eos, qk_scale, WINDOW, False,
            )
    rows = (o_n[:, None] * NS + i_s) * D + o_d[None, :]
    tl.store(dv + rows, b_dv.to(dv.dtype.element_ty), mask=keep[:, None])
    tl.store(dk + rows, (b_dk * scale).to(dk.dtype.element_ty), mask=keep[:, None])


@triton.jit(do_not_specialize=["n"])
def reduce_heads_kernel(parts, out, n, S: tl.constexpr, D: tl.constexpr, BR: tl.constexpr):
    """out[r] = sum of parts[r, 0..S-1] in fp32, rounded once; parts [n, S, D], out [n, D], both contiguous.

    Grid (n / BR); a program owns BR rows.
    """
    rows = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    o_d = tl.arange(0, D)
    keep = rows[:, None] < n
    acc = tl.zeros([BR, D], dtype=tl.float32)
    for i_s in tl.static_range(S):
        acc += tl.load(parts + (rows[:, None] * S + i_s) * D + o_d[None, :], mask=keep, other=0.0)
    tl.store(out + rows[:, None] * D + o_d[None, :], acc.to(out.dtype.element_ty), mask=keep)
