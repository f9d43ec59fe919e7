"""One launch instead of two thousand: the tower's forward and backward pass as two CUDA graphs.

Captured for rows of T tokens, replayed over any packing of them: embeddings, positions and boundaries are copied into
buffers of fixed address, the ops' tables are rewritten in place (kernels/tables.py), and gradients are added in place.
Embedding, head and loss stay outside: the head's number of rows differs from batch to batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from sparktune.kernels.frozen_weight import StoredRows
from sparktune.kernels.modules.full_ft import FullFT_BF16_Linear
from sparktune.kernels.select import used_ops
from sparktune.kernels.tables import StaticTables
from sparktune.training.batch import MicroBatch
from sparktune.training.stages import StagedPasses
from sparktune.training.tower import TextTower

__all__ = [
    "CudaRecorder", "ForwardGraphs", "GraphedForward", "GraphedTower", "Recorder", "TowerGraphs", "why_not_graphs",
]

WARM_UP = 2
"""Eager passes before the capture: they compile kernels, choose cuBLAS algorithms and fill the tables."""
TOKENS_PER_DOCUMENT = 256
"""A graph's tables have room for T / 256 documents, or half again as many as the row it was captured on. A spare row of
a table costs a program that ends at once, and the delta rule's buffers grow by a chunk."""
_OUTSIDE = frozenset({"linear_cross_entropy"})
"""Ops that no graph holds."""


class Recorder(Protocol):
    """Turns work into something that can be played again."""

    def warm_up(self, work: Callable[[], object]) -> None:
        """Runs `work` once, away from the capture."""

    def record(self, work: Callable[[], object]) -> Callable[[], object]:
        """Runs or captures `work` and returns what plays it again; recordings are played in the order they were made,
        again and again, for the later ones reuse memory of the earlier ones."""


class CudaRecorder:
    """CUDA graphs that share one memory pool.

    Args:
        device: of the graphs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], object]) -> None:
        """Runs `work` on a stream of its own, as a capture does."""
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream(self._device).wait_stream(stream)

    def record(self, work: Callable[[], object]) -> Callable[[], object]:
        """Captures `work`; tensors it leaves alive keep their addresses."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        return graph.replay


def why_not_graphs(model: TextTower, gradients: Mapping[nn.Parameter, Any] | None, dropout: float) -> str:
    """Returns why a model cannot train through graphs; empty when it can.

    Args:
        model: filled, adapters attached.
        gradients: where the optimiser wants its gradients; None: it offers no fixed place for them.
        dropout: of the adapters.
    """
    if model.device.type != "cuda":
        return f"graphs need a CUDA device, this is {model.device.type}"
    if dropout:
        return "a replayed graph would draw the same dropout mask every time"
    if gradients is None:
        return "this optimiser keeps no gradients at fixed addresses"
    if any(isinstance(module, StoredRows) for module in model.modules()):
        # 23.4 GiB reserved against 13.3 without (docs/results/memory_sweep.csv), and memory is why one quantises
        return "with a quantised base they hold far more memory than the passes need"
    return _why_not_replayed(model)


def _why_not_replayed(model: TextTower) -> str:
    fixed = sorted(used_ops(model.spec) - model.ops.replayable - _OUTSIDE)
    if fixed:
        return f"{', '.join(fixed)}: what was chosen for them cannot be replayed over another packing"
    return ""


class _StaticRow:
    """A row of T tokens at fixed addresses: positions, boundaries and the ops' tables.

    Args:
        example: a row of the T tokens, on the device; the room for documents follows from its own.
        device: of the graph.
    """

    def __init__(self, example: MicroBatch, device: torch.device) -> None:
        self._device = device
        self.n_tokens = example.ids.shape[0]
        documents = len(example.cu_seqlens_cpu) - 1
        self.max_documents = max(documents + documents // 2, self.n_tokens // TOKENS_PER_DOCUMENT, 8)
        self.tables = StaticTables(self.n_tokens, self.max_documents, device)
        self.batch = replace(
            example, ids=example.ids.clone(), position_ids=example.position_ids.clone(),
            cu_seqlens=self._padded(example).to(device),
        )

    def _padded(self, batch: MicroBatch) -> torch.Tensor:
        """The boundaries with room for `max_documents`, behind the last one T again and again."""
        padded = torch.full((self.max_documents + 1,), self.n_tokens, dtype=torch.int32)
        padded[: len(batch.cu_seqlens_cpu)] = batch.cu_seqlens_cpu
        return padded.pin_memory() if self._device.type == "cuda" else padded

    def serves(self, batch: MicroBatch) -> bool:
        """Says whether this room is enough for `batch`."""
        return batch.ids.shape[0] == self.n_tokens and len(batch.cu_seqlens_cpu) - 1 <= self.max_documents

    def load(self, batch: MicroBatch) -> None:
        """Writes `batch` over the row before."""
        self.batch.ids.copy_(batch.ids, non_blocking=True)
        self.batch.position_ids.copy_(batch.position_ids, non_blocking=True)
        self.batch.cu_seqlens.copy_(self._padded(batch), non_blocking=True)
        # What the host knows of a row is read while a pass is recorded, and not by a replay.
        self.batch = replace(self.batch, cu_seqlens_cpu=batch.cu_seqlens_cpu, max_seqlen=batch.max_seqlen)
        self.tables.refill(tuple(batch.cu_seqlens_cpu.tolist()))


class GraphedForward:
    """A frozen tower's pass over rows of T tokens, embeddings included.

    Args:
        model: filled; nothing of it learns.
        example: a row of the T tokens that this graph is for, on the device.
        recorder: how passes are recorded.
    """

    def __init__(self, model: TextTower, example: MicroBatch, recorder: Recorder) -> None:
        self._model = model
        self._row = _StaticRow(example, model.device)
        with self._row.tables.serving():
            for _ in range(WARM_UP):
                recorder.warm_up(self._pass)
            self._replay = recorder.record(self._pass)

    @torch.no_grad()
    def _pass(self) -> None:
        self._hidden = self._model(self._row.batch)

    def serves(self, batch: MicroBatch) -> bool:
        """Says whether this graph can run `batch`."""
        return self._row.serves(batch)

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Returns the hidden states [T, H] of `batch`; they are overwritten by the next call."""
        self._row.load(batch)
        self._replay()
        return self._hidden


class GraphedTower:
    """The tower's two passes for rows of T tokens.

    Args:
        model: adapters attached, its recompute policy set.
        gradients: trainable parameter -> the tensor its gradients are added to; these stay where they are.
        example: a row of the T tokens that this graph is for, on the device.
        recorder: how passes are recorded.
    """

    def __init__(
        self, model: TextTower, gradients: Mapping[nn.Parameter, torch.Tensor], example: MicroBatch,
        recorder: Recorder,
    ) -> None:
        self._model, self._gradients = model, gradients
        self._row = _StaticRow(example, model.device)
        self._embedded = self._embed()
        self._hidden = self._grad_hidden = torch.zeros_like(self._embedded)
        self._grad_embedded: torch.Tensor | None = None
        with self._row.tables.serving():
            # Zero gradients in, so nothing is added to the sums.
            trial = StagedPasses(model, gradients)
            for _ in range(WARM_UP):
                recorder.warm_up(lambda: self._try(trial))
            self._passes = StagedPasses(model, gradients)
            self._replay_forward = recorder.record(self._forward)
            self._grad_hidden = torch.zeros_like(self._hidden)
            self._replay_backward = recorder.record(self._backward)

    @property
    def max_documents(self) -> int:
        """Documents that its tables have room for."""
        return self._row.max_documents

    def _try(self, passes: StagedPasses) -> None:
        hidden = passes.forward(self._embedded, self._model.row_of(self._row.batch))
        passes.backward(torch.zeros_like(hidden))

    def _forward(self) -> None:
        self._hidden = self._passes.forward(self._embedded, self._model.row_of(self._row.batch))

    def _backward(self) -> None:
        self._grad_embedded = self._passes.backward(self._grad_hidden)

    @torch.no_grad()
    def _embed(self) -> torch.Tensor:
        return torch.nn.functional.embedding(self._row.batch.ids, self._model.embed_tokens)

    def serves(self, batch: MicroBatch) -> bool:
        """Says whether this graph can run `batch`."""
        return self._row.serves(batch)

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Returns the hidden states [T, H] of `batch`; they are overwritten by the next call."""
        self._row.load(batch)
        self._embedded.copy_(self._embed())
        self._replay_forward()
        return self._hidden

    @torch.no_grad()
    def backward(self, grad_hidden: torch.Tensor) -> None:
        """Adds the gradients of the batch that `forward` saw to every trainable parameter's sum."""
        self._grad_hidden.copy_(grad_hidden)
        self._replay_backward()
        embedding = self._gradients.get(self._model.embed_tokens)
        if embedding is not None:
            assert self._grad_embedded is not None, "the embedding learns, so the first block's input has a gradient"
            embedding.add_(torch.ops.aten.embedding_dense_backward(
                self._grad_embedded, self._row.batch.ids, self._model.embed_tokens.shape[0], -1, False
            ))


class _Graph(Protocol):
    def serves(self, batch: MicroBatch) -> bool: ...


_G = TypeVar("_G", bound=_Graph)


class _ByLength(Generic[_G]):
    """Graphs by the length of their rows, each captured when its length comes for the third time.

    The first passes of a length run eagerly: they compile its kernels, and the first step's gradients are checked.
    """

    def __init__(self, capture: Callable[[MicroBatch], _G], device: torch.device, most: int) -> None:
        self._capture, self._device, self._most = capture, device, most
        self._seen: dict[int, int] = {}
        self.graphs: dict[int, _G] = {}

    def forget(self) -> None:
        """Lets go of every graph; lengths are counted anew."""
        self.graphs.clear()
        self._seen.clear()

    def find(self, batch: MicroBatch) -> _G | None:
        n_tokens = batch.ids.shape[0]
        graph = self.graphs.get(n_tokens)
        if graph is not None and graph.serves(batch):
            return graph
        self._seen[n_tokens] = self._seen.get(n_tokens, 0) + 1
        if self._seen[n_tokens] < 3 or (graph is None and len(self.graphs) >= self._most):
            return None
        if graph is not None:  # a row of more documents than its tables hold: make room for them
            graph = None
            del self.graphs[n_tokens]
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # the eager passes' activations: the graph brings its own
        self.graphs[n_tokens] = self._capture(batch)
        return self.graphs[n_tokens]


class ForwardGraphs:
    """Captures a frozen tower's pass for each row length that comes back, and says when there is none.

    Args:
        model: filled; nothing of it learns.
        most: graphs kept.
    """

    def __init__(self, model: TextTower, most: int = 1) -> None:
        self.objection = _why_not_replayed(model)
        if model.device.type != "cuda":
            self.objection = f"graphs need a CUDA device, this is {model.device.type}"
        self.recorder: Callable[[], Recorder] = lambda: CudaRecorder(model.device)
        """Makes the recorder of a graph."""
        self._known = _ByLength(lambda row: GraphedForward(model, row, self.recorder()), model.device, most)

    def find(self, batch: MicroBatch) -> GraphedForward | None:
        """Returns the graph that runs `batch`, captured when its length comes for the third time; None: run eagerly."""
        return None if self.objection else self._known.find(batch)


class TowerGraphs:
    """Captures a graph for each row length that comes back, and says when there is none.

    Args:
        model: filled, adapters attached.
        gradients: gives the sums that gradients are added to, allocated when a graph is captured; None where the
            optimiser has no such place.
        dropout: of the adapters.
        most: graphs kept; each holds the activations of one row.
    """

    def __init__(
        self, model: TextTower, gradients: Callable[[], Mapping[nn.Parameter, torch.Tensor]] | None, dropout: float,
        most: int = 1,
    ) -> None:
        self.objection = why_not_graphs(model, gradients, dropout)
        self.recorder: Callable[[], Recorder] = lambda: CudaRecorder(model.device)
        """Makes the recorder of a graph."""
        self._model, self._gradients = model, gradients
        self._known = _ByLength(self._capture, model.device, most)

    def find(self, batch: MicroBatch) -> GraphedTower | None:
        """Returns the graph that runs `batch`, captured when its length comes for the third time; None: run eagerly."""
        return None if self.objection or self._gradients is None else self._known.find(batch)

    def forget(self) -> None:
        """Lets go of every graph: the next passes run eagerly and are recorded anew."""
        self._known.forget()

    def _capture(self, batch: MicroBatch) -> GraphedTower:
        assert self._gradients is not None, "asked by find"
        gradients = self._gradients()
        for module in self._model.modules():
            if isinstance(module, FullFT_BF16_Linear):  # from here on sums stay where they are
                module.gradient_sum = gradients[module.weight]
        return GraphedTower(self._model, gradients, batch, self.recorder())

    @property
    def captured(self) -> dict[int, GraphedTower]:
        """Tokens of a row -> its graph."""
        return self._known.graphs
