"""Frozen weights of a projection group that are stored in fewer bits and widened for each product.

A group's projections are quantised each by itself, as bitsandbytes and PEFT do it, so that a projection's stored
values do not depend on what it is grouped with; the product still sees one matrix. The widened matrix lives for one
product: the backward pass widens it again instead of keeping it.

Legend: N rows of a group (outputs), K columns (inputs), n rows of one projection.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

__all__ = ["FrozenWeight", "Int8Rows", "PlainRows", "StoredRows", "dense", "frozen_linear"]


class StoredRows(nn.Module, ABC):
    """One projection's weight [n, K] as it is stored; buffers only."""

    n_rows: int

    @abstractmethod
    def widen(self, out: torch.Tensor) -> None:
        """Writes the weight into `out` [n, K], contiguous, of the compute type."""

    def whole(self, dtype: torch.dtype) -> torch.Tensor | None:
        """Returns the weight [n, K] in a fresh tensor if that spares a copy, else None."""
        return None

    def stored_bytes(self) -> int:
        """Bytes that are kept of it."""
        return sum(buffer.nbytes for buffer in self.buffers())


class PlainRows(StoredRows):
    """Not quantised.

    Args:
        weight: [n, K], kept as it is.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.n_rows = weight.shape[0]
        self.register_buffer("weight", weight, persistent=False)

    def widen(self, out: torch.Tensor) -> None:
        """Copies the weight."""
        out.copy_(self.weight)


class Int8Rows(StoredRows):
    """A byte a weight, one float32 scale a row: w ~ q * absmax / 127. Weights only: activations stay as they are.

    Its error is at most absmax / 254 of the row's largest weight.

    Args:
        weight: [n, K], any float type.

    Source: row-wise absmax as in Dettmers et al. 2022 (LLM.int8()), without its int8 products: those round the
    activations too, which a backward pass would have to answer for.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.n_rows = weight.shape[0]
        wide = weight.float()
        scale = wide.abs().amax(dim=1, keepdim=True).div_(127.0)
        steps = wide / scale.clamp(min=torch.finfo(torch.float32).tiny)
        self.register_buffer("values", steps.round_().clamp_(-127, 127).to(torch.int8), persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def widen(self, out: torch.Tensor) -> None:
        """Multiplies in float32 and rounds once into `out`."""
        torch.mul(self.values, self.scale, out=out)


class FrozenWeight(nn.Module):
    """A group's weight [N, K], stored projection by projection.

    Args:
        stored: projection name -> its rows, in the group's order.
        in_features: K.
        dtype: compute type of `dense()`.

    Attributes:
        shape, dtype, device: those of `dense()`, so that checks read them as they read a tensor's.
    """

    def __init__(self, stored: Mapping[str, StoredRows], in_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.stored = nn.ModuleDict(stored)
        self.dtype = dtype
        self.shape = torch.Size((sum(rows.n_rows for rows in stored.values()), in_features))

    @property
    def device(self) -> torch.device:
        """Where it is stored."""
        return next(self.buffers()).device

    def reordered(self, names: Sequence[str]) -> FrozenWeight:
        """Returns the same rows with the projections in another order; nothing is copied."""
        return FrozenWeight({name: self.stored[name] for name in names}, self.shape[1], self.dtype)

    def stored_bytes(self) -> int:
        """Bytes that are kept."""
        return sum(rows.stored_bytes() for rows in self.stored.values())

    @torch.no_grad()
    def dense(self) -> torch.Tensor:
        """Returns a fresh [N, K] of the compute type."""
        if len(self.stored) == 1:
            (only,) = self.stored.values()
            made = only.whole(self.dtype)
            if made is not None:
                return made
        weight = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        start = 0
        for rows in self.stored.values():
            rows.widen(weight[start : start + rows.n_rows])
            start += rows.n_rows
        return weight


def dense(weight: torch.Tensor | FrozenWeight) -> torch.Tensor:
    """Returns the weight as a tensor: itself, or widened for one product."""
    return weight.dense() if isinstance(weight, FrozenWeight) else weight


class _FrozenLinear(torch.autograd.Function):
    """y = x W^T + b forward, dx = dy W backward, with W widened for each of the two."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: FrozenWeight, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        return F.linear(x, weight.dense(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        return dy @ ctx.weight.dense() if ctx.needs_input_grad[0] else None, None, None


def frozen_linear(
    x: torch.Tensor, weight: torch.Tensor | FrozenWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    """Returns x W^T + bias.

    Args:
        x: [T, K] in the weight's compute type.
        weight: [N, K], a tensor or stored in fewer bits (then frozen, as is the bias).
        bias: [N] or None.
    """
    if isinstance(weight, FrozenWeight):
        return _FrozenLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)
