"""silu(gate) * up and its backward, as Triton kernels and their hosts.

Legend: T tokens, F ffn width, BT x BI the tile of one program.

    y = gate * s * up,  s = sigmoid(gate);   dgate = dy * up * s * (1 + gate * (1 - s));   dup = dy * gate * s

gate and up are row-strided views, usually the two halves of one [T, 2F] product; the backward writes both gradients
into the halves of one [T, 2F] buffer, which the backward product takes as it is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["silu_mul_bwd", "silu_mul_bwd_kernel", "silu_mul_fwd", "silu_mul_fwd_kernel"]

BT = 4
BI = 1024
NUM_WARPS = 8


@triton.jit
def silu_mul_fwd_kernel(gate, up, y, T, F, stride_g, stride_u, BT: tl.constexpr, BI: tl.constexpr):
    """Grid (cdiv(F, BI), cdiv(T, BT)): a program owns BT x BI elements."""
    o_i = tl.program_id(0) * BI + tl.arange(0, BI)[None, :]
    o_t = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)[:, None]
    m = (o_t < T) & (o_i < F)
    b_g = tl.load(gate + o_t * stride_g + o_i, mask=m, other=0.0).to(tl.float32)
    b_u = tl.load(up + o_t * stride_u + o_i, mask=m, other=0.0).to(tl.float32)
    tl.store(y + o_t * F + o_i, (b_g * tl.sigmoid(b_g) * b_u).to(y.dtype.element_ty), mask=m)


@triton.jit
def silu_mul_bwd_kernel(
    dy, gate, up, dgate, dup, T, F, stride_dy, stride_g, stride_u, stride_d, BT: tl.constexpr, BI: tl.constexpr,
):
    """Grid (cdiv(F, BI), cdiv(T, BT)): a program owns BT x BI elements of both gradients."""
    o_i = tl.program_id(0) * BI + tl.arange(0, BI)[None, :]
    o_t = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)[:, None]
    m = (o_t < T) & (o_i < F)
    b_dy = tl.load(dy + o_t * stride_dy + o_i, mask=m, other=0.0).to(tl.float32)
    b_g = tl.load(gate + o_t * stride_g + o_i, mask=m, other=0.0).to(tl.float32)
    b_u = tl.load(up + o_t * stride_u + o_i, mask=m, other=0.0).to(tl.float32)
    b_s = tl.sigmoid(b_g)
    b_a = b_g * b_s
    b_dg = b_dy * b_u * (b_s + b_a * (1.0 - b_s))
    tl.store(dgate + o_t * stride_d + o_i, b_dg.to(dgate.dtype.element_ty), mask=m)
    tl.store(dup + o_t * stride_d + o_i, (b_dy * b_a).to(dup.dtype.element_ty), mask=m)


def _grid(T: int, F: int) -> tuple[int, int]:
    return triton.cdiv(F, BI), triton.cdiv(T, BT)


def silu_mul_fwd(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Returns silu(gate) * up [T, F], contiguous, in gate's dtype; inputs [T, F], last dimension contiguous."""
    T, F = gate.shape
    y = torch.empty((T, F), dtype=gate.dtype, device=gate.device)
    if y.numel():
        silu_mul_fwd_kernel[_grid(T, F)](
            gate, up, y, T, F, gate.stride(0), up.stride(0), BT=BT, BI=BI, num_warps=NUM_WARPS
        )
    return y


def silu_mul_bwd(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns dgate and dup, [T, F] each.

    The gradients go to `out`, two views of one row stride, or to the halves of a new [T, 2F] tensor.
    """
    T, F = gate.shape
    if out is None:
        d = torch.empty((T, 2 * F), dtype=gate.dtype, device=gate.device)
        out = d[:, :F], d[:, F:]
    d_gate, d_up = out
    if d_gate.numel():
        silu_mul_bwd_kernel[_grid(T, F)](
            dy, gate, up, d_gate, d_up, T, F, dy.stride(0), gate.stride(0), up.stride(0), d_gate.stride(0),
            BT=BT, BI=BI, num_warps=NUM_WARPS,
        )
    return d_gate, d_up
