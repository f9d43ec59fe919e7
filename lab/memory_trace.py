"""What a training step allocates, tensor by tensor, without a GPU: the real engine code, its Triton kernels left out.

The kernels write into tensors that their hosts allocate, so a launch that does nothing leaves the memory of a step
exactly as it is. Storages are followed from the operation that makes them to their release, in blocks of 512 bytes as
PyTorch's CUDA allocator counts them. What only a GPU has (cuBLAS's workspaces) is not in the sum.

The planner (setup/plan/memory.py) is held to this trace by the tests, at sizes that a CPU computes in a second.
"""

from __future__ import annotations

import contextlib
import importlib
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from sparktune.kernels import matmul
from sparktune.kernels.candidates import FUSED
from sparktune.kernels.select import OPS, OpTable
from sparktune.lab.native import documents_row
from sparktune.lab.shapes import random_documents
from sparktune.setup.plan.basestorage import base_storage
from sparktune.setup.plan.schema import ModelSpec, Plan
from sparktune.training.adapters import LoraConfig, attach_lora
from sparktune.training.model import build_model, train_everything
from sparktune.training.optimiser import MasterAdamW
from sparktune.training.quantised import build_hollow, put_stored, stored_bytes, storing
from sparktune.training.tower import TextTower

__all__ = ["LiveBytes", "trace_step"]

BLOCK = 512


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, and the most there were at once.

    Attributes:
        now: bytes alive.
        peak: the most since `restart`.
        weights: bytes of the model's weights, adapters and masters not included.
        at_peak: what was alive then: the operation that made it, and its bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.weights = 0
        self.at_peak: list[tuple[str, int]] = []
        self._alive: dict[int, tuple[weakref.ref[Any], int, str]] = {}

    def follow(self, tensor: torch.Tensor, made_by: str) -> None:
        """Counts the storage of `tensor` from now until its release."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if storage.nbytes() == 0 or tensor.device.type == "meta" or key in self._alive:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._alive[key] = (weakref.ref(storage, lambda _, key=key: self._release(key)), size, made_by)
        self.now += size
        if self.now > self.peak:
            self.peak = self.now
            self.at_peak = [(name, n) for _, n, name in self._alive.values()]

    def _release(self, key: int) -> None:
        self.now -= self._alive.pop(key)[1]

    def restart(self) -> None:
        """Starts a new measurement of the peak."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self.follow(value, f"{func.name()} {tuple(value.shape)} {value.dtype}")
        return result


def _no_launch(*args: Any, **kwargs: Any) -> None:
    """Takes a Triton launch's place."""


def _fused_ops() -> OpTable:
    """Returns the fused functions that a CUDA device gets, whatever this machine is."""
    chosen = {op: getattr(importlib.import_module(FUSED[op][0].module), FUSED[op][0].function) for op in OPS}
    return OpTable(**chosen, reasons=dict.fromkeys(OPS, "traced"))


def _matmul_fp32(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """As on CUDA: the product is the only tensor that is made."""
    return torch.empty((a.shape[0], b.shape[1]), dtype=torch.float32) if out is None else out


@contextlib.contextmanager
def _as_on_a_gpu(capability: tuple[int, int]) -> Iterator[None]:
    """Leaves Triton's launches out, and lets the hosts choose as on a GPU of this compute capability."""
    def chosen(_: torch.Tensor) -> tuple[int, int]:
        return capability

    # plain functions: a Mock would remember its arguments and so keep the tensors alive
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(triton.runtime.jit.JITFunction, "run", _no_launch))
        for name in ("varlen_attention", "gated_delta_rule"):
            module = importlib.import_module(f"sparktune.kernels.{name}.function")
            stack.enter_context(mock.patch.object(module, "_capability", chosen))
        for name in ("lora_linear", "linear_cross_entropy"):
            module = importlib.import_module(f"sparktune.kernels.{name}.function")
            stack.enter_context(mock.patch.object(module, "matmul_fp32", _matmul_fp32))
        stack.enter_context(mock.patch.object(matmul, "matmul_fp32", _matmul_fp32))
        adamw = torch.optim.AdamW
        stack.enter_context(mock.patch.object(torch.optim, "AdamW", lambda *a, **k: adamw(*a, **{**k, "fused": True})))
        yield


def _model(spec: ModelSpec, plan: Plan) -> TextTower:
    """Returns the tower, its base in bfloat16 or in int8 (bitsandbytes' kernels need a GPU to allocate as on one)."""
    if base_storage(plan) == "none":
        return build_model(spec, _fused_ops(), torch.bfloat16, "cpu")
    assert base_storage(plan) == "int8", "a trace stores a base in bfloat16 or in int8"
    model, store = build_hollow(spec, _fused_ops(), torch.bfloat16, torch.device("cpu")), storing("int8", True)
    put_stored(model, {
        f"{prefix}.{attribute}.weight".removeprefix("model."): {
            name: store(name, torch.zeros(size, group.in_features, dtype=torch.bfloat16))
            for name, size in zip(group.names, group.out_sizes, strict=True)
        }
        for prefix, _, attribute, group in model.groups()
    })
    return model


def trace_step(
    spec: ModelSpec, plan: Plan, lengths: list[int], *, supervised: float = 0.35, accum: int = 2, steps: int = 2,
    capability: tuple[int, int] = (9, 0), detail: bool = False,
) -> LiveBytes:
    """Runs optimiser steps of the native engine on the CPU and returns what they allocated at most.

    Args:
        spec: the model; small, for its products are really computed.
        plan: `mode`, `quantise_base` (none or int8), `lora_r`, `target_modules`, `recompute` and `recompute_layers` are
            read; the compute type is bfloat16.
        lengths: documents of a micro-batch.
        supervised: share of supervised tokens.
        accum: micro-batches a step.
        steps: optimiser steps; the peak is the last one's.
        capability: of the GPU whose kernel configurations are used.
        detail: print the largest tensors of the peak.
    """
    live = LiveBytes()
    with _as_on_a_gpu(capability), live:
        model = _model(spec, plan)
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
            live.weights += parameter.nbytes
        live.weights += stored_bytes(model)
        assert plan.recompute != "auto", "a trace has one policy"
        model.set_recompute(plan.recompute, plan.recompute_layers)
        if plan.mode == "full":
            train_everything(model)
        else:
            assert plan.lora_r is not None, "a trace has one rank"
            targets = None if plan.target_modules is None else tuple(plan.target_modules)
            attach_lora(model, LoraConfig(r=plan.lora_r, alpha=float(plan.lora_r), target_modules=targets), 0)
        learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        optimiser = MasterAdamW(learning, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, max_grad_norm=0.0)
        batches = []
        for i in range(accum):
            documents = random_documents(lengths, supervised, seed=7 + i)
            batches.append(documents_row([
                (ids % spec.vocab_size, torch.where(labels < 0, labels, labels % spec.vocab_size))
                for ids, labels in documents
            ]))
        for _ in range(steps):
            live.restart()
            for batch in batches:
                (model.loss_sum(batch) / 100).backward()
            optimiser.step(1e-4)
        del model, optimiser, learning
    if detail:
        totals: dict[str, tuple[int, int]] = {}
        for name, size in live.at_peak:
            n, total = totals.get(name, (0, 0))
            totals[name] = n + 1, total + size
        for name, (n, total) in sorted(totals.items(), key=lambda item: -item[1][1])[:40]:
            print(f"{total:12d} {n:5d}  {name}")
    return live
