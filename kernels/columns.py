"""Splits a grouped product into its projections so that their gradients meet in one tensor without a copy.

PyTorch's split concatenates the gradients of its parts, which costs a read and a write of the whole product a layer.
Here each part knows its columns of one gradient tensor; an op that computes a part's gradient asks `grad_columns` where
to write it. A gradient that was written elsewhere is copied in, so asking is an optimisation, never a duty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

__all__ = ["GradColumns", "carry_place", "grad_columns", "split_columns"]


class _Slab:
    """The gradient of one product, [T, N], allocated when the first part's gradient is computed."""

    def __init__(self, product: torch.Tensor) -> None:
        self.shape, self.dtype, self.device = product.shape, product.dtype, product.device
        self._buffer: torch.Tensor | None = None
        self._given: set[int] = set()

    def columns(self, start: int, width: int) -> torch.Tensor:
        """Returns a [T, width] view."""
        if self._buffer is None:
            self._buffer = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return self._buffer[:, start : start + width]

    def claim(self, start: int, width: int) -> torch.Tensor | None:
        """Returns the columns to the first who asks: a part with two consumers has two gradients to be summed."""
        if start in self._given:
            return None
        self._given.add(start)
        return self.columns(start, width)

    def release(self) -> torch.Tensor:
        """Returns the whole gradient and forgets it."""
        whole = self.columns(0, self.shape[1])
        self._buffer = None
        self._given.clear()
        return whole


class GradColumns:
    """Where the gradient of one part belongs."""

    def __init__(self, slab: _Slab, start: int, width: int) -> None:
        self._slab, self._start, self._width = slab, start, width

    def claim(self) -> torch.Tensor | None:
        """Returns the [T, width] view to write the whole gradient to, or None: allocate. Call it in the backward."""
        return self._slab.claim(self._start, self._width)


class _SplitColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, product: torch.Tensor, sizes: tuple[int, ...], slab: _Slab) -> tuple[torch.Tensor, ...]:
        ctx.sizes, ctx.slab = sizes, slab
        ctx.set_materialize_grads(False)
        storage, rows, stride = product.untyped_storage(), product.shape[0], product.stride(0)
        parts, start = [], product.storage_offset()
        for size in sizes:
            # an alias, not a view: autograd must see one output of this function, not a view of its input
            parts.append(product.new_empty(0).set_(storage, start, (rows, size), (stride, 1)))
            start += size
        return tuple(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor, None, None]:
        start = 0
        for size, grad in zip(ctx.sizes, grads, strict=True):
            place = ctx.slab.columns(start, size)
            if grad is None:
                place.zero_()
            elif grad.data_ptr() != place.data_ptr() or grad.stride() != place.stride():
                place.copy_(grad)
            start += size
        return ctx.slab.release(), None, None


def split_columns(product: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Splits [T, N] into parts of `sizes` columns that share its memory; their gradients share one tensor.

    Args:
        product: [T, N], last dimension contiguous. It must not be changed in place afterwards.
        sizes: widths of the parts, in order; they sum to N.

    Returns:
        One [T, size] tensor a part, rows strided.

    Raises:
        ValueError: the sizes do not sum to N, or the layout does not fit.
    """
    if product.dim() != 2 or sum(sizes) != product.shape[1] or (product.numel() and product.stride(1) != 1):
        raise ValueError(
            f"split_columns needs [T, {sum(sizes)}] with contiguous rows, got {tuple(product.shape)} with strides "
            f"{product.stride()}"
        )
    slab = _Slab(product)
    parts = _SplitColumns.apply(product, tuple(sizes), slab)
    start = 0
    for part, size in zip(parts, sizes, strict=True):
        part.grad_columns = GradColumns(slab, start, size)
        start += size
    return parts


def grad_columns(x: torch.Tensor) -> GradColumns | None:
    """Returns where x's gradient belongs, if x is a whole part of `split_columns` (its columns unflattened or not).

    Call it in the forward, keep the result, `claim()` in the backward.
    """
    part = x if x._base is None else x._base
    place: GradColumns | None = getattr(part, "grad_columns", None)
    return place if place is not None and part.numel() == x.numel() and part.data_ptr() == x.data_ptr() else None


def carry_place(part: torch.Tensor, alias: torch.Tensor) -> None:
    """Tells `alias`, a detached alias of a part, where the part's gradient belongs; nothing happens to other tensors.

    For a backward pass cut in two at this tensor: the gradient of the alias is handed to the part.
    """
    place: GradColumns | None = getattr(part, "grad_columns", None)
    if place is not None:
        alias.grad_columns = place
