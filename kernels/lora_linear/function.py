"""`lora_linear` as the fewest cuBLAS products: the base product once for a group, the adapters added in place.

Legend: T tokens, G projections of a group, r rank, N = rows of the group's weight.

    xa = x A^T [T, G*r];   y = x W^T + bias;   y_i += xa_i (scale B_i)^T        (in place, into column slices of y)
    dxa_i = dy_i (scale B_i);   dA = dxa^T x;   dB_i = scale dy_i^T xa_i;   dx = dy W + dxa A

No elementwise pass touches a [T, N] tensor. dA and dB leave the products in fp32, the masters' dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from sparktune.kernels.frozen_weight import FrozenWeight, dense
from sparktune.kernels.matmul import matmul_fp32

__all__ = ["lora_linear_fused"]


@dataclass(frozen=True)
class _Group:
    """What a product needs beside its tensors."""

    out_sizes: tuple[int, ...]
    """Columns of y of each adapted projection, in order, from column 0."""
    scale: float

    def slices(self, rank: int) -> list[tuple[slice, slice]]:
        """Column slices of y (rows of B) and of xa (rows of A), one pair a projection."""
        pairs, start = [], 0
        for i, size in enumerate(self.out_sizes):
            pairs.append((slice(start, start + size), slice(i * rank, (i + 1) * rank)))
            start += size
        return pairs


def _compute_copies(
    lora_a: torch.Tensor, lora_b: torch.Tensor, scale: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns A and scale * B in the compute dtype, each rounded once from its master."""
    b = lora_b.to(dtype) if scale == 1.0 else torch.mul(lora_b, scale, out=torch.empty_like(lora_b, dtype=dtype))
    return lora_a.to(dtype), b


def _forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, group: _Group,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns y [T, N] and xa [T, G*r]."""
    y = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
    xa = (x if mask is None else x * mask) @ a.t()
    for cols, ranks in group.slices(b.shape[1]):
        y[:, cols].addmm_(xa[:, ranks], b[cols].t())
    return y, xa


def _backward_x(
    dy: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, group: _Group,
    mask: torch.Tensor | None, need_dx: bool,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Returns dx [T, in] (None if not asked) and dxa [T, G*r]."""
    rank = b.shape[1]
    dxa = torch.empty((dy.shape[0], rank * len(group.out_sizes)), dtype=dy.dtype, device=dy.device)
    for cols, ranks in group.slices(rank):
        torch.mm(dy[:, cols], b[cols], out=dxa[:, ranks])
    if not need_dx:
        return None, dxa
    dx = dy @ weight
    if mask is None:
        dx.addmm_(dxa, a)
    else:
        dx.addcmul_(dxa @ a, mask)
    return dx, dxa


def _backward_weights(
    dy: torch.Tensor, x: torch.Tensor, xa: torch.Tensor, dxa: torch.Tensor, group: _Group, rank: int,
    mask: torch.Tensor | None, dtypes: tuple[torch.dtype, torch.dtype],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns dA [G*r, in] and dB [sum(out_sizes), r] in the masters' dtypes."""
    da = matmul_fp32(dxa.t(), x if mask is None else x * mask)
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    db = torch.empty((sum(group.out_sizes), rank), dtype=wide, device=dy.device)
    for cols, ranks in group.slices(rank):
        matmul_fp32(dy[:, cols].t(), xa[:, ranks], out=db[cols])
    if group.scale != 1.0:
        db.mul_(group.scale)
    return da.to(dtypes[0]), db.to(dtypes[1])


def _kept(weight: torch.Tensor | FrozenWeight) -> tuple[torch.Tensor | None, FrozenWeight | None]:
    """Returns what the backward pass gets of the base: the tensor itself, or what to widen again."""
    return (None, weight) if isinstance(weight, FrozenWeight) else (weight, None)


def _again(weight: torch.Tensor | None, frozen: FrozenWeight | None) -> torch.Tensor:
    if frozen is not None:
        return frozen.dense()
    assert weight is not None, "a base is a tensor or stored in fewer bits"
    return weight


def _base_gradients(
    ctx: Any, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Returns the gradients of the base's weight and bias where they are trained (frozen under LoRA)."""
    dw = None if weight is None or not ctx.needs_input_grad[1] else matmul_fp32(dy.t(), x).to(weight.dtype)
    return dw, dy.sum(0) if ctx.needs_input_grad[2] else None


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | FrozenWeight, bias: torch.Tensor | None, lora_a: torch.Tensor,
        lora_b: torch.Tensor, mask: torch.Tensor | None, group: _Group,
    ) -> torch.Tensor:
        a, b = _compute_copies(lora_a, lora_b, group.scale, x.dtype)
        y, xa = _forward(x, dense(weight), bias, a, b, group, mask)
        kept, ctx.frozen = _kept(weight)
        ctx.save_for_backward(x, kept, a, b, xa, mask)
        ctx.group, ctx.dtypes = group, (lora_a.dtype, lora_b.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, a, b, xa, mask = ctx.saved_tensors
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        dx, dxa = _backward_x(dy, _again(weight, ctx.frozen), a, b, ctx.group, mask, ctx.needs_input_grad[0])
        da, db = _backward_weights(dy, x, xa, dxa, ctx.group, b.shape[1], mask, ctx.dtypes)
        dw, dbias = _base_gradients(ctx, dy, x, weight)
        return dx, dw, dbias, da, db, None, None


def _check(
    width: int, x: torch.Tensor, weight: torch.Tensor | FrozenWeight, lora_a: torch.Tensor, lora_b: torch.Tensor,
    out_sizes: Sequence[int],
) -> None:
    rank = lora_b.shape[1]
    if x.dim() != 2 or weight.shape[1] != width or lora_a.shape != (rank * len(out_sizes), width):
        raise ValueError(
            f"lora_linear needs weight [N, {width}] and lora_a [G * r, {width}] for x of width {width}, got weight "
            f"{tuple(weight.shape)}, lora_a {tuple(lora_a.shape)}, x {tuple(x.shape)}, G {len(out_sizes)}, r {rank}"
        )
    if lora_b.shape[0] != sum(out_sizes) or sum(out_sizes) > weight.shape[0]:
        raise ValueError(
            f"out_sizes {tuple(out_sizes)} must sum to lora_b's rows {lora_b.shape[0]} and fit in weight's rows "
            f"{weight.shape[0]} (rows beyond them carry no adapter)"
        )
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}: cast x to the weight's dtype first")


def lora_linear_fused(
    x: torch.Tensor, weight: torch.Tensor | FrozenWeight, bias: torch.Tensor | None, lora_a: torch.Tensor,
    lora_b: torch.Tensor, out_sizes: Sequence[int], scale: float, dropout_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """One product for a group of projections that share x, adapters included.

    Args:
        x: [T, in], bf16 (any float dtype works).
        weight: [N, in], x's dtype or stored in fewer bits, N >= sum(out_sizes); rows beyond the sum are projections
            without an adapter.
        bias: [N] or None.
        lora_a: [G*r, in], the fp32 masters of the group, stacked; projection i owns rows i*r..(i+1)*r.
        lora_b: [sum(out_sizes), r], stacked alike.
        out_sizes: output width of each of the G adapted projections, in order.
        scale: alpha / r.
        dropout_mask: [T, in] or broadcastable, already divided by the keep probability; acts on the adapters' x.

    Returns:
        y [T, N] in x's dtype. The gradients of lora_a and lora_b are fp32 sums, never rounded to bf16.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    _check(x.shape[-1], x, weight, lora_a, lora_b, out_sizes)
    return _LoRALinear.apply(x, weight, bias, lora_a, lora_b, dropout_mask, _Group(tuple(out_sizes), float(scale)))
