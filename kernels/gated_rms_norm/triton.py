"""The GDN's gated RMSNorm over the value head dimension, forward and backward, as Triton kernels and their hosts.

Legend: T tokens, HV value heads, V head dimension, N = T * HV rows, BR rows of a program's tile, BV >= V.

    n = x * rsqrt(mean(x^2) + eps);   y = n * w * silu(z)
    dn = dy * silu(z) * w;  dx = r * (dn - n * mean(dn * n));  dz = dy * n * w * silu'(z);  dw = sum dy * silu(z) * n

Nothing but the inputs is saved: the backward reads whole rows anyway, so it finds rstd again for free.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["gated_rms_norm_bwd", "gated_rms_norm_bwd_kernel", "gated_rms_norm_fwd", "gated_rms_norm_fwd_kernel"]

BR = 32
"""Rows of a tile: 32 x 128 elements over 4 warps are 32 a thread and operand."""
WEIGHT_GRAD_PROGRAMS = 264


@triton.jit
def gated_rms_norm_fwd_kernel(
    x, z, weight, y, n_rows, eps, stride_xt, stride_xh, stride_zt, stride_zh,
    HV: tl.constexpr, V: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
):
    """Grid (cdiv(N, BR),): a program owns BR rows (token, head)."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_v = tl.arange(0, BV)[None, :]
    m = (o_r < n_rows)[:, None] & (o_v < V)
    i_t = o_r // HV
    i_h = o_r % HV
    b_x = tl.load(x + (i_t * stride_xt + i_h * stride_xh)[:, None] + o_v, mask=m, other=0.0).to(tl.float32)
    b_z = tl.load(z + (i_t * stride_zt + i_h * stride_zh)[:, None] + o_v, mask=m, other=0.0).to(tl.float32)
    b_w = tl.load(weight + o_v, mask=o_v < V, other=0.0).to(tl.float32)
    b_r = 1.0 / tl.sqrt(tl.sum(b_x * b_x, 1) / V + eps)
    b_y = b_x * b_r[:, None] * b_w * (b_z * tl.sigmoid(b_z))
    tl.store(y + o_r[:, None] * V + o_v, b_y.to(y.dtype.element_ty), mask=m)


@triton.jit
def gated_rms_norm_bwd_kernel(
    dy, x, z, weight, dx, dz, dw_partial, n_rows, n_programs, eps,
    stride_yt, stride_yh, stride_xt, stride_xh, stride_zt, stride_zh, stride_dzt, stride_dzh,
    HV: tl.constexpr, V: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr, WEIGHT_GRAD: tl.constexpr,
):
    """Grid (P,): a program owns the row tiles p, p + P, ... and one row of the partial weight gradient."""
    i_p = tl.program_id(0)
    o_v = tl.arange(0, BV)[None, :]
    b_w = tl.load(weight + o_v, mask=o_v < V, other=0.0).to(tl.float32)
    b_dw = tl.zeros([BV], dtype=tl.float32)
    for i_b in range(i_p, tl.cdiv(n_rows, BR), n_programs):
        o_r = tl.cast(i_b, tl.int64) * BR + tl.arange(0, BR)
        m = (o_r < n_rows)[:, None] & (o_v < V)
        i_t = o_r // HV
        i_h = o_r % HV
        b_dy = tl.load(dy + (i_t * stride_yt + i_h * stride_yh)[:, None] + o_v, mask=m, other=0.0).to(tl.float32)
        b_x = tl.load(x + (i_t * stride_xt + i_h * stride_xh)[:, None] + o_v, mask=m, other=0.0).to(tl.float32)
        b_z = tl.load(z + (i_t * stride_zt + i_h * stride_zh)[:, None] + o_v, mask=m, other=0.0).to(tl.float32)
        b_r = (1.0 / tl.sqrt(tl.sum(b_x * b_x, 1) / V + eps))[:, None]
        b_n = b_x * b_r
        b_s = tl.sigmoid(b_z)
        b_dyn = b_dy * b_n
        if WEIGHT_GRAD:
            b_dw += tl.sum(b_dyn * (b_z * b_s), 0)
        b_dz = b_dyn * b_w * (b_s * (1.0 + b_z * (1.0 - b_s)))
        b_dn = b_dy * b_w * (b_z * b_s)
        b_dx = b_r * (b_dn - b_n * (tl.sum(b_dn * b_n, 1) / V)[:, None])
        tl.store(dx + o_r[:, None] * V + o_v, b_dx.to(dx.dtype.element_ty), mask=m)
        p_dz = dz + (i_t * stride_dzt + i_h * stride_dzh)[:, None] + o_v
        tl.store(p_dz, b_dz.to(dz.dtype.element_ty), mask=m)
    if WEIGHT_GRAD:
        o_w = tl.arange(0, BV)
        tl.store(dw_partial + i_p * V + o_w, b_dw, mask=o_w < V)


def gated_rms_norm_fwd(x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Returns y [T, HV, V] in x's dtype; x and z [T, HV, V] with the last dimension contiguous, any row strides."""
    T, HV, V = x.shape
    y = torch.empty((T, HV, V), dtype=x.dtype, device=x.device)
    n_rows = T * HV
    if n_rows:
        gated_rms_norm_fwd_kernel[(triton.cdiv(n_rows, BR),)](
            x, z, weight, y, n_rows, eps, x.stride(0), x.stride(1), z.stride(0), z.stride(1),
            HV=HV, V=V, BR=BR, BV=triton.next_power_of_2(V), num_warps=4,
        )
    return y


def gated_rms_norm_bwd(
    dy: torch.Tensor, x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, weight_grad: bool,
    dz: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Returns dx [T, HV, V], dz (written into the given [T, HV, V] view if one is passed) and dw [V] or None."""
    T, HV, V = x.shape
    dx = torch.empty((T, HV, V), dtype=x.dtype, device=x.device)
    if dz is None:
        dz = torch.empty((T, HV, V), dtype=z.dtype, device=z.device)
    n_rows = T * HV
    tiles = triton.cdiv(n_rows, BR)
    programs = min(tiles, WEIGHT_GRAD_PROGRAMS) if weight_grad else tiles
    partial = torch.empty((programs, V), dtype=torch.float32, device=x.device) if weight_grad else dx
    if n_rows:
        gated_rms_norm_bwd_kernel[(programs,)](
            dy, x, z, weight, dx, dz, partial, n_rows, programs, eps, dy.stride(0), dy.stride(1),
            x.stride(0), x.stride(1), z.stride(0), z.stride(1), dz.stride(0), dz.stride(1),
            HV=HV, V=V, BR=BR, BV=triton.next_power_of_2(V), WEIGHT_GRAD=weight_grad, num_warps=4,
        )
    return dx, dz, partial.sum(0).to(weight.dtype) if weight_grad else None
