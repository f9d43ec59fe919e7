"""The delta rule's gates in fp32, one launch each way.

Legend: T tokens, HV value heads, BT x BH the tile of one program.

    g = -exp(A_log) * softplus(a + dt_bias);   beta = sigmoid(b)
    da = dg * -exp(A_log) * sigmoid(a + dt_bias);   db = dbeta * beta * (1 - beta);   dA_log = sum dg * g;  ddt = sum da
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from sparktune.kernels.columns import grad_columns

__all__ = ["gdn_gates_bwd", "gdn_gates_bwd_kernel", "gdn_gates_fused", "gdn_gates_fwd", "gdn_gates_fwd_kernel"]

BT = 64


@triton.jit
def _softplus(x):
    # log(1 + e) by Kahan's quotient keeps its digits where e is tiny; beyond 20 softplus(x) is x in fp32
    e = tl.exp(tl.minimum(x, 20.0))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x > 20.0, x, log1p)


@triton.jit
def gdn_gates_fwd_kernel(
    a, b, a_log, dt_bias, g, beta, T, stride_a, stride_b, HV: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr
):
    """Grid (cdiv(T, BT),): a program owns BT tokens, all heads."""
    o_t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)[:, None]
    o_h = tl.arange(0, BH)[None, :]
    m = (o_t < T) & (o_h < HV)
    b_a = tl.load(a + o_t * stride_a + o_h, mask=m, other=0.0).to(tl.float32)
    b_b = tl.load(b + o_t * stride_b + o_h, mask=m, other=0.0).to(tl.float32)
    b_rate = -tl.exp(tl.load(a_log + o_h, mask=o_h < HV, other=0.0).to(tl.float32))
    b_dt = tl.load(dt_bias + o_h, mask=o_h < HV, other=0.0).to(tl.float32)
    tl.store(g + o_t * HV + o_h, b_rate * _softplus(b_a + b_dt), mask=m)
    tl.store(beta + o_t * HV + o_h, tl.sigmoid(b_b), mask=m)


@triton.jit
def gdn_gates_bwd_kernel(
    dg, dbeta, a, b, a_log, dt_bias, da, db, partial, T, stride_a, stride_b, stride_da, stride_db,
    HV: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, PARAM_GRAD: tl.constexpr,
):
    """Grid (cdiv(T, BT),): a program owns BT tokens and one row of the partial sums for A_log and dt_bias."""
    o_t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)[:, None]
    o_h = tl.arange(0, BH)[None, :]
    m = (o_t < T) & (o_h < HV)
    b_a = tl.load(a + o_t * stride_a + o_h, mask=m, other=0.0).to(tl.float32)
    b_b = tl.load(b + o_t * stride_b + o_h, mask=m, other=0.0).to(tl.float32)
    b_rate = -tl.exp(tl.load(a_log + o_h, mask=o_h < HV, other=0.0).to(tl.float32))
    b_dt = tl.load(dt_bias + o_h, mask=o_h < HV, other=0.0).to(tl.float32)
    b_dg = tl.load(dg + o_t * HV + o_h, mask=m, other=0.0)
    b_beta = tl.sigmoid(b_b)
    b_dbeta = tl.load(dbeta + o_t * HV + o_h, mask=m, other=0.0)
    b_da = b_dg * b_rate * tl.sigmoid(b_a + b_dt)
    tl.store(da + o_t * stride_da + o_h, b_da.to(da.dtype.element_ty), mask=m)
    tl.store(db + o_t * stride_db + o_h, (b_dbeta * b_beta * (1.0 - b_beta)).to(db.dtype.element_ty), mask=m)
    if PARAM_GRAD:
        o_p = tl.arange(0, BH)
        p = partial + tl.program_id(0) * 2 * HV + o_p
        tl.store(p, tl.sum(b_dg * b_rate * _softplus(b_a + b_dt), 0), mask=o_p < HV)
        tl.store(p + HV, tl.sum(b_da, 0), mask=o_p < HV)


def gdn_gates_fwd(
    a: torch.Tensor, b: torch.Tensor, a_log: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns g and beta, fp32 [T, HV]; a and b [T, HV] with rows of any stride."""
    T, HV = a.shape
    g = torch.empty((T, HV), dtype=torch.float32, device=a.device)
    beta = torch.empty_like(g)
    if T:
        gdn_gates_fwd_kernel[(triton.cdiv(T, BT),)](
            a, b, a_log, dt_bias, g, beta, T, a.stride(0), b.stride(0), HV=HV, BT=BT, BH=triton.next_power_of_2(HV),
            num_warps=4,
        )
    return g, beta


def gdn_gates_bwd(
    dg: torch.Tensor, dbeta: torch.Tensor, a: torch.Tensor, b: torch.Tensor, a_log: torch.Tensor,
    dt_bias: torch.Tensor, da: torch.Tensor, db: torch.Tensor, param_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """Writes da and db [T, HV] (rows of any stride) and returns (dA_log, ddt_bias) if asked; dg, dbeta fp32."""
    T, HV = a.shape
    programs = triton.cdiv(T, BT)
    partial = torch.empty((programs, 2, HV), dtype=torch.float32, device=a.device) if param_grad else dg
    if T:
        gdn_gates_bwd_kernel[(programs,)](
            dg, dbeta, a, b, a_log, dt_bias, da, db, partial, T, a.stride(0), b.stride(0), da.stride(0), db.stride(0),
            HV=HV, BT=BT, BH=triton.next_power_of_2(HV), PARAM_GRAD=param_grad, num_warps=4,
        )
    if not param_grad:
        return None, None
    sums = partial.sum(0)
    return sums[0].to(a_log.dtype), sums[1].to(dt_bias.dtype)


class _GDNGates(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: torch.Tensor, b: torch.Tensor, a_log: torch.Tensor, dt_bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.places = grad_columns(a), grad_columns(b)
        a = a if a.stride(-1) == 1 else a.contiguous()
        b = b if b.stride(-1) == 1 else b.contiguous()
        ctx.save_for_backward(a, b, a_log, dt_bias)
        return gdn_gates_fwd(a, b, a_log, dt_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dg: torch.Tensor, dbeta: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        a, b, a_log, dt_bias = ctx.saved_tensors
        da, db = (None if p is None else p.claim() for p in ctx.places)
        da = torch.empty(a.shape, dtype=a.dtype, device=a.device) if da is None else da
        db = torch.empty(b.shape, dtype=b.dtype, device=b.device) if db is None else db
        wanted = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        d_log, d_dt = gdn_gates_bwd(
            dg.float().contiguous(), dbeta.float().contiguous(), a, b, a_log, dt_bias, da, db, wanted
        )
        return da, db, d_log, d_dt


def gdn_gates_fused(
    a: torch.Tensor, b: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log decay g = -exp(A_log) * softplus(a + dt_bias) and write strength beta = sigmoid(b), fp32.

    Args:
        a: [T, HV], rows may be strided.
        b: [T, HV], rows may be strided.
        A_log: [HV].
        dt_bias: [HV]; gradients of both only if one of them requires it.

    Returns:
        g and beta, fp32 [T, HV].

    Raises:
        ValueError: a and b differ in shape or are not two-dimensional.
    """
    if a.shape != b.shape or a.dim() != 2:
        raise ValueError(f"gdn_gates needs a and b of one shape [T, HV], got {tuple(a.shape)} and {tuple(b.shape)}")
    return _GDNGates.apply(a, b, A_log, dt_bias)
