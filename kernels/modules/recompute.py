"""Recompute policy `norms`: outputs of cheap elementwise ops are not kept for the backward pass but computed again.

A product keeps its input. Where that input is a norm's or an activation's output, only the recipe (the op and its own
inputs, which the op's backward keeps anyway) is kept instead.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from sparktune.kernels.select import OpTable

__all__ = ["RecomputedOutputs"]


class _Recipe:
    """How to make a tensor again; remembers the result as long as somebody uses it."""

    def __init__(self, make: Callable[[], torch.Tensor], like: torch.Tensor) -> None:
        self.make = make
        self.shape, self.stride = like.shape, like.stride()
        self._made: weakref.ref[torch.Tensor] | None = None

    def value(self) -> torch.Tensor:
        made = self._made() if self._made is not None else None
        if made is None:
            with torch.no_grad():
                made = self.make()
            self._made = weakref.ref(made)
        return made


class RecomputedOutputs:
    """Wraps an OpTable and gives the hooks under which its cheap outputs are recomputed.

    Args:
        ops: the model's ops.

    `ops` of this object serves the modules; the forward pass runs under `saving()`.
    """

    def __init__(self, ops: OpTable) -> None:
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], _Recipe]] = {}
        self._rms_norm = ops.rms_norm
        self.ops = replace(
            ops, rms_norm=self._wrapped(ops.rms_norm), gated_rms_norm=self._wrapped(ops.gated_rms_norm),
            silu_mul=self._wrapped(ops.silu_mul), sigmoid_gate=self._wrapped(ops.sigmoid_gate),
            add_rms_norm=self._wrapped_add(ops.add_rms_norm),
        )

    def _register(self, y: torch.Tensor, make: Callable[[], torch.Tensor]) -> None:
        address = y.data_ptr()

        def forget(dead: weakref.ref[torch.Tensor]) -> None:
            entry = self._known.get(address)
            if entry is not None and entry[0] is dead:
                del self._known[address]

        self._known[address] = (weakref.ref(y, forget), _Recipe(make, y))

    def _wrapped(self, op: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            y = op(*args, **kwargs)
            if y.requires_grad:
                kept = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
                self._register(y, lambda: op(*kept, **kwargs))
            return y

        return call

    def _wrapped_add(
        self, op: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    ) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        def call(
            x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, zero_centred: bool
        ) -> tuple[torch.Tensor, torch.Tensor]:
            y, h = op(x, residual, weight, eps, zero_centred=zero_centred)
            if y.requires_grad:
                total, scale = h.detach(), weight.detach()
                self._register(y, lambda: self._rms_norm(total, scale, eps, zero_centred=zero_centred))
            return y, h

        return call

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Recipe:
        entry = self._known.get(tensor.data_ptr())
        # A live output still owns its address, so the address alone cannot belong to another tensor; a view of it may
        # have another shape and is kept as it is.
        if entry is None or entry[0]() is None or tensor.numel() == 0:
            return tensor.detach()  # an op that saves its own output would keep itself alive through a hook, for ever
        recipe = entry[1]
        same = tensor.shape.numel() == recipe.shape.numel() and tensor.is_contiguous()
        if not same or tensor.dtype != entry[0]().dtype:
            return tensor.detach()
        if tensor.shape == recipe.shape and tensor.stride() == recipe.stride:
            return recipe
        return _Recipe(lambda shape=tensor.shape: recipe.value().reshape(shape), tensor)

    @staticmethod
    def _unpack(packed: torch.Tensor | _Recipe) -> torch.Tensor:
        return packed.value() if isinstance(packed, _Recipe) else packed

    def saving(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Returns the context of the forward pass."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
