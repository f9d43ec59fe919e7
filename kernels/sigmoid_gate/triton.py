"""x * sigmoid(gate) and its backward, as Triton kernels and their hosts.

Legend: T tokens, nH heads, D head dimension, N = T * nH rows, BR rows of a tile, BD >= D.

    y = x * s,  s = sigmoid(gate);   dx = dy * s;   dgate = dy * x * s * (1 - s)

The gate is read where the query product left it (strided), the gradients are contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["sigmoid_gate_bwd", "sigmoid_gate_bwd_kernel", "sigmoid_gate_fwd", "sigmoid_gate_fwd_kernel"]

TILE = 4096
"""Elements of a tile: 32 a thread with 4 warps."""


@triton.jit
def sigmoid_gate_fwd_kernel(
    x, gate, y, n_rows, stride_xt, stride_xh, stride_gt, stride_gh,
    NH: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):
    """Grid (cdiv(N, BR),): a program owns BR rows (token, head)."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_d = tl.arange(0, BD)[None, :]
    m = (o_r < n_rows)[:, None] & (o_d < D)
    i_t = o_r // NH
    i_h = o_r % NH
    b_x = tl.load(x + (i_t * stride_xt + i_h * stride_xh)[:, None] + o_d, mask=m, other=0.0).to(tl.float32)
    b_g = tl.load(gate + (i_t * stride_gt + i_h * stride_gh)[:, None] + o_d, mask=m, other=0.0).to(tl.float32)
    tl.store(y + o_r[:, None] * D + o_d, (b_x * tl.sigmoid(b_g)).to(y.dtype.element_ty), mask=m)


@triton.jit
def sigmoid_gate_bwd_kernel(
    dy, x, gate, dx, dgate, n_rows, stride_yt, stride_yh, stride_xt, stride_xh, stride_gt, stride_gh,
    NH: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):
    """Grid (cdiv(N, BR),): a program owns BR rows of both gradients."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_d = tl.arange(0, BD)[None, :]
    m = (o_r < n_rows)[:, None] & (o_d < D)
    i_t = o_r // NH
    i_h = o_r % NH
    b_dy = tl.load(dy + (i_t * stride_yt + i_h * stride_yh)[:, None] + o_d, mask=m, other=0.0).to(tl.float32)
    b_x = tl.load(x + (i_t * stride_xt + i_h * stride_xh)[:, None] + o_d, mask=m, other=0.0).to(tl.float32)
    b_g = tl.load(gate + (i_t * stride_gt + i_h * stride_gh)[:, None] + o_d, mask=m, other=0.0).to(tl.float32)
    b_s = tl.sigmoid(b_g)
    p = o_r[:, None] * D + o_d
    tl.store(dx + p, (b_dy * b_s).to(dx.dtype.element_ty), mask=m)
    tl.store(dgate + p, (b_dy * b_x * b_s * (1.0 - b_s)).to(dgate.dtype.element_ty), mask=m)


def _tile(D: int) -> tuple[int, int]:
    BD = triton.next_power_of_2(D)
    return max(TILE // BD, 1), BD


def sigmoid_gate_fwd(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Returns x * sigmoid(gate) [T, nH, D], contiguous; inputs with the last dimension contiguous."""
    T, NH, D = x.shape
    y = torch.empty((T, NH, D), dtype=x.dtype, device=x.device)
    if y.numel():
        BR, BD = _tile(D)
        sigmoid_gate_fwd_kernel[(triton.cdiv(T * NH, BR),)](
            x, gate, y, T * NH, x.stride(0), x.stride(1), gate.stride(0), gate.stride(1),
            NH=NH, D=D, BR=BR, BD=BD, num_warps=4,
        )
    return y


def sigmoid_gate_bwd(dy: torch.Tensor, x: torch.Tensor, gate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns dx and dgate, both [T, nH, D] contiguous."""
    T, NH, D = x.shape
    dx = torch.empty((T, NH, D), dtype=x.dtype, device=x.device)
    dgate = torch.empty((T, NH, D), dtype=gate.dtype, device=x.device)
    if dx.numel():
        BR, BD = _tile(D)
        sigmoid_gate_bwd_kernel[(triton.cdiv(T * NH, BR),)](
            dy, x, gate, dx, dgate, T * NH, dy.stride(0), dy.stride(1), x.stride(0), x.stride(1),
            gate.stride(0), gate.stride(1), NH=NH, D=D, BR=BR, BD=BD, num_warps=4,
        )
    return dx, dgate
