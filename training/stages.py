"""The tower's two passes, cut at the blocks: the backward of each block is a call of its own.

The same arithmetic as `model(batch)` and its backward, in an order that a CUDA graph can record for every recompute
policy: a block's gradients are added to their buffers and freed before the next block's exist, and a block that is
computed again is computed by a plain call. Legend: T tokens of a row, H hidden.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sparktune.kernels.columns import carry_place
from sparktune.kernels.modules import Row
from sparktune.training.tower import Block, TextTower

__all__ = ["StagedPasses"]

Summands = tuple[torch.Tensor | None, torch.Tensor]
"""The residual stream [T, H] as the last block's output and the rest; None and all of it before the first block."""


@dataclass(frozen=True)
class _Stage:
    """A block, or the final norm, with the autograd graph of its forward pass."""

    inputs: Summands
    outputs: tuple[torch.Tensor, ...]
    parameters: list[nn.Parameter]


def _leaf(x: torch.Tensor | None, needs_gradient: bool) -> torch.Tensor | None:
    """Returns x cut off from the graph that made it; where x's gradient belongs (kernels/columns.py) goes along."""
    if x is None:
        return None
    leaf = x.detach().requires_grad_(needs_gradient)
    carry_place(x, leaf)
    return leaf


class StagedPasses:
    """Forward and backward of a tower between the embedding and the head.

    Args:
        model: filled, adapters attached, its recompute policy set.
        gradients: trainable parameter -> the tensor its gradients are added to, float32 beside a bfloat16 parameter.
    """

    def __init__(self, model: TextTower, gradients: Mapping[nn.Parameter, torch.Tensor]) -> None:
        self._model, self._gradients = model, gradients
        self._of_block = [self._learning(block) for block in model.layers]
        self._of_norm = [model.norm] if model.norm in gradients else []
        # A block's input needs a gradient if something learns before it.
        self._needs, before = [], model.embed_tokens in gradients
        for parameters in self._of_block:
            self._needs.append(before)
            before = before or bool(parameters)
        self._needs.append(before)
        self._stages: list[_Stage] = []
        self._kept: list[torch.Tensor] = []
        self._row: Row | None = None

    def _learning(self, block: nn.Module) -> list[nn.Parameter]:
        return [p for p in block.parameters() if p in self._gradients]

    def forward(self, h: torch.Tensor, row: Row) -> torch.Tensor:
        """Returns the hidden states after the final norm [T, H], without a graph of their own.

        Args:
            h: [T, H]: the embeddings.
            row: the documents; kept until `backward`.
        """
        self._row, self._stages, self._kept = row, [], []
        stream = self._forward_recorded(self._forward_kept(h, row), row)
        return self._record(self._final_norm, stream, self._of_norm, self._needs[-1])[0].detach()

    def _final_norm(self, delta: torch.Tensor | None, h: torch.Tensor) -> tuple[torch.Tensor]:
        return (self._model.final_norm(delta, h),)

    def _record(
        self, compute: Callable[[torch.Tensor | None, torch.Tensor], tuple[torch.Tensor, ...]], stream: Summands,
        parameters: list[nn.Parameter], needs_gradient: bool,
    ) -> tuple[torch.Tensor, ...]:
        delta, h = _leaf(stream[0], needs_gradient), _leaf(stream[1], needs_gradient)
        assert h is not None, "a stream has a rest"
        with torch.enable_grad(), self._model.saving():
            outputs = compute(delta, h)
        self._stages.append(_Stage((delta, h), outputs, parameters))
        return outputs

    def _forward_kept(self, h: torch.Tensor, row: Row) -> Summands:
        """The first `whole_blocks`: one residual stream a group of blocks is kept."""
        stream: Summands = (None, h)
        with torch.no_grad():
            for i, block in enumerate(self._model.layers[: self._model.whole_blocks]):
                x, h = block.enter(*stream)
                if i % self._model.group_size == 0:
                    self._kept.append(h)
                stream = block.leave(x, h, row)
        return stream

    def _forward_recorded(self, stream: Summands, row: Row) -> Summands:
        """The other blocks: each keeps its autograd graph."""
        for i in range(self._model.whole_blocks, len(self._model.layers)):
            delta, rest = self._record(_of(self._model.layers[i], row), stream, self._of_block[i], self._needs[i])
            stream = (delta, rest)
        return stream

    def backward(self, grad_hidden: torch.Tensor) -> torch.Tensor | None:
        """Adds the gradients of what `forward` saw; returns that of the embeddings [T, H], None if nobody needs it."""
        assert self._row is not None, "backward follows forward"
        grads = self._pull(self._stages.pop(), (grad_hidden,))
        while self._stages:
            grads = self._pull(self._stages.pop(), grads)
        grads = self._backward_kept(grads, self._row)
        self._row = None
        # Before the first block the stream is one tensor.
        return grads[1]

    def _backward_kept(self, grads: tuple[torch.Tensor | None, ...], row: Row) -> tuple[torch.Tensor | None, ...]:
        layers, size, whole = self._model.layers, self._model.group_size, self._model.whole_blocks
        for first in reversed(range(0, whole, size)):
            last = min(first + size, whole)
            inner = self._again(self._kept.pop(), layers[first:last], row)
            for i in reversed(range(first, last)):
                self._record(_of(layers[i], row), (None, inner.pop()), self._of_block[i], self._needs[i])
                (_, grad) = self._pull(self._stages.pop(), grads)
                grads = (grad, grad)  # this block's input is the sum of both of the last one's outputs
        return grads

    @staticmethod
    @torch.no_grad()
    def _again(h: torch.Tensor, blocks: Sequence[Block], row: Row) -> list[torch.Tensor]:
        """Returns the inputs of a group's blocks, computed again from the first one's."""
        inputs = [h]
        for block, following in itertools.pairwise(blocks):
            stream = block(None, inputs[-1], row)
            inputs.append(following.enter(*stream)[1])
        return inputs

    def _pull(self, stage: _Stage, grads: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
        """Runs a stage's backward: adds its parameters' gradients, returns those of its two inputs."""
        inputs = [x for x in stage.inputs if x is not None and x.requires_grad]
        pairs = [(y, g) for y, g in zip(stage.outputs, grads, strict=True) if g is not None and y.requires_grad]
        wanted = [*inputs, *stage.parameters]
        if not wanted or not pairs:
            return (None, None)
        found = torch.autograd.grad([y for y, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
        sums = [(self._gradients[p], g) for p, g in zip(stage.parameters, found[len(inputs) :], strict=True)
                if g is not None]
        if sums:
            with torch.no_grad():
                torch._foreach_add_([total for total, _ in sums], [g for _, g in sums])
        of_inputs = list(found[: len(inputs)])
        return tuple(of_inputs.pop(0) if x is not None and x.requires_grad else None for x in stage.inputs)


def _of(
    block: Block, row: Row
) -> Callable[[torch.Tensor | None, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    return lambda delta, h: block(delta, h, row)
