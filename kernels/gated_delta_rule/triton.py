"""Triton kernels of the chunked gated delta rule: three launches forward, four backward.

Legend: T tokens, N documents, HK key heads, HV value heads, K and V their dims, R = HV / HK, C tokens a chunk (chunks
restart at every document), NC chunks of the row. Per chunk and value head, with q and k l2-normalised, gamma the
cumulative sum of g inside the chunk, G its last value, S the state [K, V] at the chunk's begin:

    A[i, j] = beta_i exp(gamma_i - gamma_j) k_i.k_j  (i > j)         X = (I + A)^-1
    w = X (beta e^gamma k)     u = X (beta v)     n = u - w S        (n: the new values)
    o = s (e^gamma q S + P n),  P[i, j] = exp(gamma_i - gamma_j) q_i.k_j  (i >= j),  s = K ** -0.5
    S' = e^G S + (e^(G - gamma) k)^T n

(Yang et al. 2024, "Gated Delta Networks".) The l2 norms, decays and betas scale scores, columns of X and rows of n in
float32, so that q, k and v go into the products as they lie in memory. Stored decays are base 2.

Every register tile that feeds a product from the left is computed in the orientation in which it is used: Triton 3.4 to
3.7.0 miscompiles `dot(trans(tile computed by a dot), ...)` on Hopper (flash-linear-attention issue 640).
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "chunk_gradients_kernel",
    "chunk_output_kernel",
    "chunk_prepare_kernel",
    "chunk_scan_kernel",
    "prepare_backward_kernel",
    "wy_gradients_kernel",
]

LOG2E = tl.constexpr(1.4426950408889634)
BLOCK = tl.constexpr(16)


@triton.jit
def _load_rows(x, stride_t, rows, cols, eos):
    """Loads [rows, cols] of a row-major tensor, zeros past the document's end."""
    return tl.load(x + rows[:, None] * stride_t + cols[None, :], mask=rows[:, None] < eos, other=0.0)


@triton.jit
def _load_gamma(gamma, stride_t, t_0, rows, eos, C: tl.constexpr):
    """Loads gamma of one chunk and its last value, which also stands in the rows past the document's end.

    A zero there would make exp2(gamma_i - gamma_j) overflow, and infinity times the zero beside it is NaN.
    """
    b_last = tl.load(gamma + (tl.minimum(t_0 + C, eos) - 1) * stride_t)
    return tl.where(rows < eos, tl.load(gamma + rows * stride_t, mask=rows < eos, other=0.0), b_last), b_last


@triton.jit
def _invert_unit_lower(b_a, C: tl.constexpr):
    """(I + A)^-1 of a strictly lower triangular A [C, C], C at most 64, in float32.

    Forward substitution, row by row inside the diagonal blocks of 16 rows, then block by block: with D the block
    diagonal of I + A and L the rest, X = D^-1 - D^-1 L X is exact after as many rounds as there are blocks less one. A
    power series in A over 64 rows would lose all digits when keys repeat (its terms grow like binomials).
    """
    NB: tl.constexpr = C // BLOCK
    o_b = tl.arange(0, NB)
    o_i = tl.arange(0, BLOCK)
    on_diagonal = o_b[:, None, None, None] == o_b[None, None, :, None]
    b_d = tl.sum(tl.where(on_diagonal, tl.reshape(b_a, (NB, BLOCK, NB, BLOCK)), 0.0), 2)
    b_x = -b_d
    for i in tl.static_range(2, BLOCK):
        row = tl.sum(tl.where((o_i == i)[None, :, None], -b_d, 0.0), 1)
        row += tl.sum(row[:, :, None] * b_x, 1)
        b_x = tl.where((o_i == i)[None, :, None], row[:, None, :], b_x)
    b_x += tl.where(o_i[:, None] == o_i[None, :], 1.0, 0.0)[None, :, :]
    b_x = tl.reshape(tl.where(on_diagonal, b_x[:, :, None, :], 0.0), (C, C))
    o_c = tl.arange(0, C)
    b_l = tl.where((o_c // BLOCK)[:, None] > (o_c // BLOCK)[None, :], b_a, 0.0)
    b_m = -tl.dot(b_x, b_l, input_precision="tf32x3")
    b_d = b_x
    for _ in range(NB - 1):
        b_x = b_d + tl.dot(b_m, b_x, input_precision="tf32x3")
    return b_x


@triton.jit
def _decay(b_gi, b_gj, keep):
    """exp2(gamma_i - gamma_j) where kept, 0 elsewhere; what is dropped is never exponentiated, it could overflow."""
    return tl.exp2(tl.where(keep, b_gi - b_gj, float("-inf")))


@triton.jit
def chunk_prepare_kernel(
    q, k, v, g, beta, chunks, gamma, rstd_q, rstd_k, inverse, w, u, stride_qt, stride_qh, stride_kt, stride_kh,
    stride_vt, stride_vh,
    HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
):
    """gamma, the l2 norms' reciprocals, X, w and u of one chunk and value head.

    Grid (NC * HV). `chunks` int32 [NC, 2]: first token, document's end. g, beta, gamma fp32 [T, HV]; rstd fp32
    [T, HK]; inverse (X) [NC, HV, C, C]; w [T, HV, K]; u [T, HV, V].
    """
    i_c, i_h = tl.program_id(0) // HV, tl.program_id(0) % HV
    t_0, eos = tl.load(chunks + i_c * 2), tl.load(chunks + i_c * 2 + 1)
    if t_0 >= eos:  # a spare row of a graph's table
        return
    R: tl.constexpr = HV // HK
    i_hk = i_h // R
    o_c = tl.arange(0, C)
    o_k, o_v = tl.arange(0, K), tl.arange(0, V)
    rows = t_0 + o_c
    keep = rows < eos

    b_g = tl.cumsum(tl.load(g + rows * HV + i_h, mask=keep, other=0.0), 0) * LOG2E
    tl.store(gamma + rows * HV + i_h, b_g, mask=keep)
    b_beta = tl.load(beta + rows * HV + i_h, mask=keep, other=0.0)
    b_k = _load_rows(k + i_hk * stride_kh, stride_kt, rows, o_k, eos)
    b_kf = b_k.to(tl.float32)
    b_rk = tl.rsqrt(tl.sum(b_kf * b_kf, 1) + 1e-6)
    if i_h % R == 0:
        b_q = _load_rows(q + i_hk * stride_qh, stride_qt, rows, o_k, eos).to(tl.float32)
        tl.store(rstd_q + rows * HK + i_hk, tl.rsqrt(tl.sum(b_q * b_q, 1) + 1e-6), mask=keep)
        tl.store(rstd_k + rows * HK + i_hk, b_rk, mask=keep)

    b_a = tl.dot(b_k, tl.trans(b_k)) * (b_beta * b_rk)[:, None] * b_rk[None, :]
    b_a *= _decay(b_g[:, None], b_g[None, :], o_c[:, None] > o_c[None, :])
    b_x = _invert_unit_lower(b_a, C)
    p_x = inverse + ((i_c.to(tl.int64) * HV + i_h) * C + o_c[:, None]) * C + o_c[None, :]
    tl.store(p_x, b_x.to(inverse.dtype.element_ty))
    b_w = tl.dot((b_x * (b_beta * tl.exp2(b_g) * b_rk)[None, :]).to(b_k.dtype), b_k)
    tl.store(w + (rows[:, None] * HV + i_h) * K + o_k[None, :], b_w.to(w.dtype.element_ty), mask=keep[:, None])
    b_v = _load_rows(v + i_h * stride_vh, stride_vt, rows, o_v, eos)
    b_u = tl.dot((b_x * b_beta[None, :]).to(b_v.dtype), b_v)
    tl.store(u + (rows[:, None] * HV + i_h) * V + o_v[None, :], b_u.to(u.dtype.element_ty), mask=keep[:, None])


@triton.jit
def _scan_forward(
    k, w, u, gamma, rstd_k, states, bos, eos, i_c0, i_h, o_v, stride_kt,
    HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
):
    """Carries the state through one document; writes the state before each chunk, and n over u."""
    o_c, o_k = tl.arange(0, C), tl.arange(0, K)
    i_hk = i_h // (HV // HK)
    b_s = tl.zeros([K, BV], dtype=tl.float32)
    for i_c in range(tl.cdiv(eos - bos, C)):
        rows = bos + i_c * C + o_c
        keep = rows < eos
        p_s = states + (((i_c0 + i_c).to(tl.int64) * HV + i_h) * K + o_k[:, None]) * V + o_v[None, :]
        tl.store(p_s, b_s.to(states.dtype.element_ty))
        b_w = tl.load(w + (rows[:, None] * HV + i_h) * K + o_k[None, :], mask=keep[:, None], other=0.0)
        p_u = u + (rows[:, None] * HV + i_h) * V + o_v[None, :]
        b_n = tl.load(p_u, mask=keep[:, None], other=0.0).to(tl.float32) - tl.dot(b_w, b_s.to(b_w.dtype))
        tl.store(p_u, b_n.to(u.dtype.element_ty), mask=keep[:, None])
        b_g, b_last = _load_gamma(gamma + i_h, HV, bos + i_c * C, rows, eos, C)
        b_rk = tl.load(rstd_k + rows * HK + i_hk, mask=keep, other=0.0)
        b_n *= (b_rk * tl.exp2(b_last - b_g))[:, None]
        b_kt = tl.load(k + rows[None, :] * stride_kt + o_k[:, None], mask=keep[None, :], other=0.0)
        b_s = tl.dot(b_kt, b_n.to(b_kt.dtype), b_s * tl.exp2(b_last))


@triton.jit
def _scan_backward(
    q, k, w, do, dn, gamma, rstd_q, rstd_k, dstates, bos, eos, i_c0, i_h, o_v, stride_qt, stride_kt, scale,
    HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
):
    """Carries the state's gradient back through one document; writes it behind each chunk, completes dn in place."""
    o_c, o_k = tl.arange(0, C), tl.arange(0, K)
    i_hk = i_h // (HV // HK)
    n_chunks = tl.cdiv(eos - bos, C)
    b_ds = tl.zeros([K, BV], dtype=tl.float32)
    for i in range(n_chunks):
        i_c = n_chunks - 1 - i
        rows = bos + i_c * C + o_c
        keep = rows < eos
        p_s = dstates + (((i_c0 + i_c).to(tl.int64) * HV + i_h) * K + o_k[:, None]) * V + o_v[None, :]
        tl.store(p_s, b_ds.to(dstates.dtype.element_ty))
        b_g, b_last = _load_gamma(gamma + i_h, HV, bos + i_c * C, rows, eos, C)
        b_rk = tl.load(rstd_k + rows * HK + i_hk, mask=keep, other=0.0)
        b_rq = tl.load(rstd_q + rows * HK + i_hk, mask=keep, other=0.0)
        b_k = tl.load(k + rows[:, None] * stride_kt + o_k[None, :], mask=keep[:, None], other=0.0)
        p_dn = dn + (rows[:, None] * HV + i_h) * V + o_v[None, :]
        b_dn = tl.dot(b_k, b_ds.to(b_k.dtype)) * (b_rk * tl.exp2(b_last - b_g))[:, None]
        b_dn += tl.load(p_dn, mask=keep[:, None], other=0.0)
        tl.store(p_dn, b_dn.to(dn.dtype.element_ty), mask=keep[:, None])
        b_do = tl.load(do + (rows[:, None] * HV + i_h) * V + o_v[None, :], mask=keep[:, None], other=0.0)
        b_dos = (b_do * (scale * b_rq * tl.exp2(b_g))[:, None]).to(b_k.dtype)
        b_qt = tl.load(q + rows[None, :] * stride_qt + o_k[:, None], mask=keep[None, :], other=0.0)
        b_wt = tl.load(w + (rows[None, :] * HV + i_h) * K + o_k[:, None], mask=keep[None, :], other=0.0)
        b_ds = tl.dot(b_qt, b_dos, b_ds * tl.exp2(b_last))
        b_ds = tl.dot(b_wt, (-b_dn).to(b_wt.dtype), b_ds)


@triton.jit
def chunk_scan_kernel(
    q, k, w, u, do, dn, gamma, rstd_q, rstd_k, states, dstates, documents, stride_qt, stride_qh, stride_kt, stride_kh,
    scale,
    HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr,
):
    """The sequential part: states before each chunk, and (or) their gradients behind each chunk.

    Grid (N * HV, V / BV, FORWARD + BACKWARD): the two directions do not depend on one another, so a backward that
    recomputes the states runs both at once. `documents` int32 [N, 3]: begin, end, first chunk. states and dstates
    [NC, HV, K, V]. u becomes n; dn becomes the full gradient of n.
    """
    i_n, i_h, i_v = tl.program_id(0) // HV, tl.program_id(0) % HV, tl.program_id(1)
    bos, eos = tl.load(documents + i_n * 3), tl.load(documents + i_n * 3 + 1)
    i_c0 = tl.load(documents + i_n * 3 + 2)
    o_v = i_v * BV + tl.arange(0, BV)
    i_hk = i_h // (HV // HK)
    direction = tl.program_id(2) + (0 if FORWARD else 1)
    if direction == 0:
        if FORWARD:
            _scan_forward(
                k + i_hk * stride_kh, w, u, gamma, rstd_k, states, bos, eos, i_c0, i_h, o_v, stride_kt,
                HK, HV, K, V, C, BV,
            )
    elif BACKWARD:
        _scan_backward(
            q + i_hk * stride_qh, k + i_hk * stride_kh, w, do, dn, gamma, rstd_q, rstd_k, dstates, bos, eos, i_c0,
            i_h, o_v, stride_qt, stride_kt, scale, HK, HV, K, V, C, BV,
        )


@triton.jit
def chunk_output_kernel(
    q, k, n, states, gamma, rstd_q, rstd_k, o, chunks, stride_qt, stride_qh, stride_kt, stride_kh, scale,
    HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
):
    """o = s (e^gamma q S + P n); grid (NC * HV); o [T, HV, V]."""
    i_c, i_h = tl.program_id(0) // HV, tl.program_id(0) % HV
    t_0, eos = tl.load(chunks + i_c * 2), tl.load(chunks + i_c * 2 + 1)
    if t_0 >= eos:  # a spare row of a graph's table
        return
    i_hk = i_h // (HV // HK)
    o_c = tl.arange(0, C)
    o_k, o_v = tl.arange(0, K), tl.arange(0, V)
    rows = t_0 + o_c
    keep = rows < eos
    b_g, _ = _load_gamma(gamma + i_h, HV, t_0, rows, eos, C)
    b_rq = tl.load(rstd_q + rows * HK + i_hk, mask=keep, other=0.0)
    b_rk = tl.load(rstd_k + rows * HK + i_hk, mask=keep, other=0.0)
    b_q = _load_rows(q + i_hk * stride_qh, stride_qt, rows, o_k, eos)
    b_k = _load_rows(k + i_hk * stride_kh, stride_kt, rows, o_k, eos)
    b_p = tl.dot(b_q, tl.trans(b_k)) * (scale * b_rq)[:, None] * b_rk[None, :]
    b_p *= _decay(b_g[:, None], b_g[None, :], o_c[:, None] >= o_c[None, :])
    b_s = tl.load(states + ((i_c.to(tl.int64) * HV + i_h) * K + o_k[:, None]) * V + o_v[None, :])
    b_o = tl.dot(b_q, b_s) * (scale * b_rq * tl.exp2(b_g))[:, None]
    b_n = tl.load(n + (rows[:, None] * HV + i_h) * V + o_v[None, :], mask=keep[:, None], other=0.0)
    b_o = tl.dot(b_p.to(b_n.dtype), b_n, b_o)
    tl.store(o + (rows[:, None] * HV + i_h) * V + o_v[None, :], b_o.to(o.dtype.element_ty), mask=keep[:, None])


@triton.jit
def prepare_backward_kernel(
    q, k, v, beta, do, gamma, rstd_q, rstd_k, inverse, w, u, dn, chunks, stride_qt, stride_qh, stride_kt, stride_kh,
    stride_vt, stride_vh, scale,
    HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, RECOMPUTE: tl.constexpr,
):
    """dn = s P^T do, the part of n's gradient that stays inside the chunk; with RECOMPUTE also w and u from X.

    Grid (NC * HV); do and dn [T, HV, V] contiguous.
    """
    i_c, i_h = tl.program_id(0) // HV, tl.program_id(0) % HV
    t_0, eos = tl.load(chunks + i_c * 2), tl.load(chunks + i_c * 2 + 1)
    if t_0 >= eos:  # a spare row of a graph's table
        return
    i_hk = i_h // (HV // HK)
    o_c = tl.arange(0, C)
    o_k, o_v = tl.arange(0, K), tl.arange(0, V)
    rows = t_0 + o_c
    keep = rows < eos
    b_g, _ = _load_gamma(gamma + i_h, HV, t_0, rows, eos, C)
    b_rq = tl.load(rstd_q + rows * HK + i_hk, mask=keep, other=0.0)
    b_rk = tl.load(rstd_k + rows * HK + i_hk, mask=keep, other=0.0)
    b_q = _load_rows(q + i_hk * stride_qh, stride_qt, rows, o_k, eos)
    b_k = _load_rows(k + i_hk * stride_kh, stride_kt, rows, o_k, eos)
    b_pt = tl.dot(b_k, tl.trans(b_q)) * (scale * b_rk)[:, None] * b_rq[None, :]
    b_pt *= _decay(b_g[None, :], b_g[:, None], o_c[:, None] <= o_c[None, :])
    b_do = tl.load(do + (rows[:, None] * HV + i_h) * V + o_v[None, :], mask=keep[:, None], other=0.0)
    b_dn = tl.dot(b_pt.to(b_do.dtype), b_do)
    tl.store(dn + (rows[:, None] * HV + i_h) * V + o_v[None, :], b_dn.to(dn.dtype.element_ty), mask=keep[:, None])
    if RECOMPUTE:
        b_beta = tl.load(beta + rows * HV + i_h, mask=keep, other=0.0)
        b_x = tl.load(inverse + ((i_c.to(tl.int64) * HV + i_h) * C + o_c[:, None]) * C + o_c[None, :]).to(tl.float32)
        b_w = tl.dot((b_x * (b_beta * tl.exp2(b_g) * b_rk)[None, :]).to(b_k.dtype), b_k)
        tl.store(w + (rows[:, None] * HV + i_h) * K + o_k[None, :], b_w.to(w.dtype.element_ty), mask=keep[:, None])
        b_v = _load_rows(v + i_h * stride_vh, stride_vt, rows, o_v, eos)
        b_u = tl.dot((b_x * b_beta[None, :]).to(b_v.dtype), b_v)
        tl.store(u + (rows[:, None] * HV + i_h) * V + o_v[None, :], b_u.to(u.dtype.element_ty), mask=keep[:, None])


@triton.jit
def wy_gradients_kernel(
    k, v, beta, dn, gamma, rstd_k, inverse, states, x, e, dv, dgamma, dbeta, chunks, stride_kt, stride_kh, stride_vt,
    stride_vh,
    HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLK: tl.constexpr,
):
    """Gradients through w = X (beta e^gamma k) and u = X (beta v): dv, dbeta, and the parts that dk and dg need.

    Grid (NC * HV). With x = X^T dw, dw = -dn S^T, and y = X^T dn the gradient of A is -(x w^T + y u^T), strictly lower:
    no product of three [C, C] matrices. Stores x [T, HV, K], e [NC, HV, C, C] = dA[i, j] beta_i
    exp(gamma_i - gamma_j), and dgamma fp32 [T, HV]; the normalised k's gradient is beta e^gamma x + (e + e^T) k.
    """
    i_c, i_h = tl.program_id(0) // HV, tl.program_id(0) % HV
    t_0, eos = tl.load(chunks + i_c * 2), tl.load(chunks + i_c * 2 + 1)
    if t_0 >= eos:  # a spare row of a graph's table
        return
    i_hk = i_h // (HV // HK)
    o_c, o_v, o_b = tl.arange(0, C), tl.arange(0, V), tl.arange(0, BLK)
    rows = t_0 + o_c
    keep = rows < eos
    i_ch = i_c.to(tl.int64) * HV + i_h
    states += i_ch * K * V
    inverse += i_ch * C * C
    v += i_h * stride_vh
    k += i_hk * stride_kh
    b_g, _ = _load_gamma(gamma + i_h, HV, t_0, rows, eos, C)
    b_beta = tl.load(beta + rows * HV + i_h, mask=keep, other=0.0)
    b_rk = tl.load(rstd_k + rows * HK + i_hk, mask=keep, other=0.0)

    # Both loops go through a few columns at a time, or the tiles would not fit the registers of sm_121.
    b_dbeta = tl.zeros([C], dtype=tl.float32)
    b_da = tl.zeros([C, C], dtype=tl.float32)
    for v_0 in range(0, V, BLK):
        p_rows = (rows[:, None] * HV + i_h) * V + (v_0 + o_b)[None, :]
        b_dn = tl.load(dn + p_rows, mask=keep[:, None], other=0.0)
        b_v = _load_rows(v, stride_vt, rows, v_0 + o_b, eos)
        b_y = tl.dot(tl.load(inverse + o_c[None, :] * C + o_c[:, None]), b_dn)
        tl.store(dv + p_rows, (b_y * b_beta[:, None]).to(dv.dtype.element_ty), mask=keep[:, None])
        b_dbeta += tl.sum(b_y * b_v, 1)
        b_x = tl.load(inverse + o_c[:, None] * C + o_c[None, :]).to(tl.float32)
        b_u = tl.dot((b_x * b_beta[None, :]).to(b_v.dtype), b_v)
        b_da = tl.dot(b_y.to(b_v.dtype), tl.trans(b_u.to(b_v.dtype)), b_da)

    b_kk = tl.zeros([C, C], dtype=tl.float32)
    b_yk = tl.zeros([C], dtype=tl.float32)
    for k_0 in range(0, K, BLK):
        b_k = _load_rows(k, stride_kt, rows, k_0 + o_b, eos)
        b_dn = tl.load(dn + (rows[:, None] * HV + i_h) * V + o_v[None, :], mask=keep[:, None], other=0.0)
        b_dw = tl.dot(b_dn, tl.load(states + (k_0 + o_b)[None, :] * V + o_v[:, None]))
        b_y = tl.dot(tl.load(inverse + o_c[None, :] * C + o_c[:, None]), (-b_dw).to(b_k.dtype))
        b_yk += tl.sum(b_y * b_k, 1)
        b_yb = b_y.to(b_k.dtype)
        tl.store(x + (rows[:, None] * HV + i_h) * K + (k_0 + o_b)[None, :], b_yb, mask=keep[:, None])
        b_x = tl.load(inverse + o_c[:, None] * C + o_c[None, :]).to(tl.float32)
        b_w = tl.dot((b_x * (b_beta * tl.exp2(b_g) * b_rk)[None, :]).to(b_k.dtype), b_k)
        b_da = tl.dot(b_yb, tl.trans(b_w.to(b_k.dtype)), b_da)
        b_kk = tl.dot(b_k, tl.trans(b_k), b_kk)
    b_yk *= b_rk * tl.exp2(b_g)
    # beta_i multiplies row i of A; its gradient is the row's sum without it, so it comes into e only afterwards.
    b_e = -b_da * _decay(b_g[:, None], b_g[None, :], o_c[:, None] > o_c[None, :])
    b_ek = b_e * b_kk * b_rk[:, None] * b_rk[None, :]
    b_low = tl.sum(b_ek, 1)
    tl.store(dbeta + rows * HV + i_h, b_dbeta + b_yk + b_low, mask=keep)
    b_e *= b_beta[:, None]
    tl.store(e + (i_ch * C + o_c[:, None]) * C + o_c[None, :], b_e.to(e.dtype.element_ty))
    b_dgamma = b_beta * (b_yk + b_low) - tl.sum(b_ek * b_beta[:, None], 0)
    tl.store(dgamma + rows * HV + i_h, b_dgamma, mask=keep)


@triton.jit
def chunk_gradients_kernel(
    q, k, n, beta, do, gamma, rstd_q, rstd_k, states, dstates, x, e, dq, dk, dg, chunks, stride_qt, stride_qh,
    stride_kt, stride_kh, scale,
    HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
):
    """dq, dk and dg of one chunk and value head; x, e and dg's begin come from `wy_gradients_kernel`.

    Grid (NC * HV). dq and dk [T, HV, K]: one a value head, the host adds the heads that share a key head. dg fp32
    [T, HV] is read as the gradient of gamma so far and overwritten with that of g.
    """
    i_c, i_h = tl.program_id(0) // HV, tl.program_id(0) % HV
    t_0, eos = tl.load(chunks + i_c * 2), tl.load(chunks + i_c * 2 + 1)
    if t_0 >= eos:  # a spare row of a graph's table
        return
    i_hk = i_h // (HV // HK)
    o_c, o_k, o_bv = tl.arange(0, C), tl.arange(0, K), tl.arange(0, BV)
    rows = t_0 + o_c
    keep = rows < eos
    i_ch = i_c.to(tl.int64) * HV + i_h
    states += i_ch * K * V
    dstates += i_ch * K * V
    b_g, b_last = _load_gamma(gamma + i_h, HV, t_0, rows, eos, C)
    b_rq = tl.load(rstd_q + rows * HK + i_hk, mask=keep, other=0.0)
    b_rk = tl.load(rstd_k + rows * HK + i_hk, mask=keep, other=0.0)

    b_p = tl.zeros([C, C], dtype=tl.float32)
    b_pt = tl.zeros([C, C], dtype=tl.float32)
    b_dq = tl.zeros([C, K], dtype=tl.float32)
    b_dk = tl.zeros([C, K], dtype=tl.float32)
    b_dlast = tl.zeros([K], dtype=tl.float32)
    for v_0 in range(0, V, BV):
        o_v = v_0 + o_bv
        p_rows = (rows[:, None] * HV + i_h) * V + o_v[None, :]
        b_do = tl.load(do + p_rows, mask=keep[:, None], other=0.0)
        b_n = tl.load(n + p_rows, mask=keep[:, None], other=0.0)
        b_st = tl.load(states + o_k[None, :] * V + o_v[:, None])
        b_dst = tl.load(dstates + o_k[None, :] * V + o_v[:, None])
        b_dlast += tl.sum(b_st.to(tl.float32) * b_dst.to(tl.float32), 0)
        b_p = tl.dot(b_do, tl.trans(b_n), b_p)
        b_pt = tl.dot(b_n, tl.trans(b_do), b_pt)
        b_dq = tl.dot(b_do, b_st, b_dq)
        b_dk = tl.dot(b_n, b_dst, b_dk)

    b_p *= _decay(b_g[:, None], b_g[None, :], o_c[:, None] >= o_c[None, :]) * (scale * b_rk)[None, :]
    b_k = _load_rows(k + i_hk * stride_kh, stride_kt, rows, o_k, eos)
    b_dq = tl.dot(b_p.to(b_k.dtype), b_k, b_dq * (scale * tl.exp2(b_g))[:, None])
    b_q = _load_rows(q + i_hk * stride_qh, stride_qt, rows, o_k, eos)
    b_cq = tl.sum(b_dq * b_q, 1) * b_rq
    b_dq = (b_dq - b_q * (b_rq * b_cq)[:, None]) * b_rq[:, None]
    p_rows_k = (rows[:, None] * HV + i_h) * K + o_k[None, :]
    tl.store(dq + p_rows_k, b_dq.to(dq.dtype.element_ty), mask=keep[:, None])

    b_dk *= tl.exp2(b_last - b_g)[:, None]
    d_last = tl.sum(b_dlast, 0) * tl.exp2(b_last) + tl.sum(tl.sum(b_dk * b_k, 1) * b_rk, 0)
    b_pt *= _decay(b_g[None, :], b_g[:, None], o_c[:, None] <= o_c[None, :]) * (scale * b_rq)[None, :]
    b_dk = tl.dot(b_pt.to(b_q.dtype), b_q, b_dk)
    b_dgamma = tl.load(dg + rows * HV + i_h, mask=keep, other=0.0) + b_cq - tl.sum(b_dk * b_k, 1) * b_rk
    tl.store(dg + rows * HV + i_h, tl.cumsum(b_dgamma, 0, reverse=True) + d_last, mask=keep)

    b_beta = tl.load(beta + rows * HV + i_h, mask=keep, other=0.0)
    b_x = tl.load(x + p_rows_k, mask=keep[:, None], other=0.0)
    b_dk += b_x * (b_beta * tl.exp2(b_g))[:, None]
    # e and its transpose are both read from memory: see the module's docstring on transposed register tiles.
    e += i_ch * C * C
    b_e = tl.load(e + o_c[:, None] * C + o_c[None, :]).to(tl.float32)
    b_e += tl.load(e + o_c[None, :] * C + o_c[:, None]).to(tl.float32)
    b_dk = tl.dot((b_e * b_rk[None, :]).to(b_k.dtype), b_k, b_dk)
    b_ck = tl.sum(b_dk * b_k, 1) * b_rk
    b_dk = (b_dk - b_k * (b_rk * b_ck)[:, None]) * b_rk[:, None]
    tl.store(dk + p_rows_k, b_dk.to(dk.dtype.element_ty), mask=keep[:, None])
