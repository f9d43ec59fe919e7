"""One launch instead of two thousand: the tower's forward and backward pass as two CUDA graphs.

Captured for rows of T tokens, replayed over any packing of them: ids, positions and boundaries are copied into buffers
of fixed address, the ops' tables are rewritten in place (kernels/tables.py), and the adapters' gradients are added in
place. The head and the loss stay outside, because their number of rows differs from batch to batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from sparktune.kernels.tables import StaticTables
from sparktune.training.batch import MicroBatch
from sparktune.training.tower import TextTower

__all__ = ["GraphedTower", "TowerGraphs", "why_not_graphs"]

WARM_UP = 2
"""Eager passes before the capture: they compile kernels, choose cuBLAS algorithms and fill the tables."""
TOKENS_PER_DOCUMENT = 256
"""A graph's tables have room for T / 256 documents, or half again as many as the row it was captured on. A spare row of
a table costs a program that ends at once, and the delta rule's buffers grow by a chunk."""


def why_not_graphs(model: TextTower, trainable: Sequence[nn.Parameter], dropout: float) -> str:
    """Returns why a model cannot train through graphs; empty when it can."""
    if model.device.type != "cuda":
        return f"graphs need a CUDA device, this is {model.device.type}"
    if dropout:
        return "a replayed graph would draw the same dropout mask every time"
    if model.recompute not in ("none", "norms"):
        return f"recompute {model.recompute!r} checkpoints whole layers"
    if any(p.dtype != torch.float32 for p in trainable):
        return "weights that are not float32 add their gradients through a hook"
    references = [op for op in ("varlen_attention", "gated_delta_rule", "causal_conv1d")
                  if not model.ops.reasons.get(op, "").startswith("triton")]
    if references:
        return f"{', '.join(references)} do not run on our kernels, whose tables can be rewritten"
    return ""


class GraphedTower:
    """The tower's two passes for rows of T tokens.

    Args:
        model: adapters attached, on a CUDA device.
        trainable: float32 parameters that learn; their `grad` must stay allocated (never set to None).
        example: a row of the T tokens that this graph is for, on the device.
    """

    def __init__(self, model: TextTower, trainable: Sequence[nn.Parameter], example: MicroBatch) -> None:
        self.n_tokens = example.ids.shape[0]
        documents = len(example.cu_seqlens_cpu) - 1
        self.max_documents = max(documents + documents // 2, self.n_tokens // TOKENS_PER_DOCUMENT, 8)
        self._tables = StaticTables(self.n_tokens, self.max_documents, model.device)
        self._batch = replace(
            example, ids=example.ids.clone(), position_ids=example.position_ids.clone(),
            cu_seqlens=self._padded(example).to(model.device),
        )
        self._trainable = trainable
        stream = torch.cuda.Stream(model.device)
        stream.wait_stream(torch.cuda.current_stream(model.device))
        with self._tables.serving():
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    hidden = self._forward(model)
                    torch.autograd.grad(hidden, list(trainable), torch.zeros_like(hidden))
                    del hidden
            torch.cuda.current_stream(model.device).wait_stream(stream)
            pool = torch.cuda.graph_pool_handle()
            self._forward_graph, self._backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._forward_graph, pool=pool):
                hidden = self._forward(model)
            self.hidden = hidden.detach()
            self._grad_hidden = torch.zeros_like(self.hidden)
            with torch.cuda.graph(self._backward_graph, pool=pool):
                gradients = torch.autograd.grad(hidden, list(trainable), self._grad_hidden)
                torch._foreach_add_([p.grad for p in trainable], list(gradients))

    def _padded(self, batch: MicroBatch) -> torch.Tensor:
        """The boundaries with room for `max_documents`, behind the last one T again and again."""
        padded = torch.full((self.max_documents + 1,), self.n_tokens, dtype=torch.int32)
        padded[: len(batch.cu_seqlens_cpu)] = batch.cu_seqlens_cpu
        return padded.pin_memory()

    def _forward(self, model: TextTower) -> torch.Tensor:
        # A fresh tensor each time: what ops remember of a row's boundaries, they remember by the tensor.
        return model(replace(self._batch, cu_seqlens=self._batch.cu_seqlens.clone()))

    def serves(self, batch: MicroBatch) -> bool:
        """Says whether this graph can run `batch`."""
        return batch.ids.shape[0] == self.n_tokens and len(batch.cu_seqlens_cpu) - 1 <= self.max_documents

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Returns the hidden states [T, H] of `batch`; they are overwritten by the next call."""
        self._batch.ids.copy_(batch.ids, non_blocking=True)
        self._batch.position_ids.copy_(batch.position_ids, non_blocking=True)
        self._batch.cu_seqlens.copy_(self._padded(batch), non_blocking=True)
        self._tables.refill(tuple(batch.cu_seqlens_cpu.tolist()))
        self._forward_graph.replay()
        return self.hidden

    def backward(self, grad_hidden: torch.Tensor) -> None:
        """Adds the gradients of the batch that `forward` saw to every trainable parameter's `grad`."""
        self._grad_hidden.copy_(grad_hidden)
        self._backward_graph.replay()


class TowerGraphs:
    """Captures a graph for each row length that comes back, and says when there is none.

    Args:
        model: filled, adapters attached.
        trainable: what learns.
        dropout: of the adapters.
        most: graphs kept; each holds the activations of one row.
    """

    def __init__(self, model: TextTower, trainable: Sequence[nn.Parameter], dropout: float, most: int = 1) -> None:
        self.objection = why_not_graphs(model, trainable, dropout)
        self._model, self._trainable, self._most = model, trainable, most
        self._seen: dict[int, int] = {}
        self._graphs: dict[int, GraphedTower] = {}

    def find(self, batch: MicroBatch) -> GraphedTower | None:
        """Returns the graph that runs `batch`, captured when its length comes for the third time; None: run eagerly.

        The first passes of a length run eagerly: they compile its kernels, and the first step's gradients are checked.
        """
        if self.objection:
            return None
        n_tokens = batch.ids.shape[0]
        graph = self._graphs.get(n_tokens)
        if graph is not None and graph.serves(batch):
            return graph
        self._seen[n_tokens] = self._seen.get(n_tokens, 0) + 1
        if self._seen[n_tokens] < 3 or (graph is None and len(self._graphs) >= self._most):
            return None
        if graph is not None:  # a row of more documents than its tables hold: make room for them
            graph = None
            del self._graphs[n_tokens]
        for parameter in self._trainable:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        torch.cuda.empty_cache()  # the eager passes' activations: the graph brings its own
        self._graphs[n_tokens] = GraphedTower(self._model, self._trainable, batch)
        return self._graphs[n_tokens]
