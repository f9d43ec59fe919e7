"""One optimiser step under the lens: GPU-busy time, launches, bytes of the tensors each launch reads and writes.

usage: python -m lab.profile VARIANT [the options of lab.side_by_side] [--csv FILE]

Bytes are COUNTED FROM TENSORS, the same way for every engine, not read from DRAM counters: each operator of PyTorch
counts its tensor arguments once and its results once, each Triton launch its tensor arguments once; views and
allocations count nothing, gathers only the rows they take. Caches and re-reads are not seen; kernels that a C++
extension launches by itself (causal-conv1d, tilelang) are not counted, and the line says how many launches the profiler
saw beyond those that were. The native engine runs eagerly here: a replayed graph shows no operator.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

__all__ = ["TensorBytes", "counting", "main", "tensor_bytes"]

_NOTHING = ("empty", "new_empty", "set_", "detach", "_local_scalar_dense", "resize_", "record_stream", "lift_fresh")
_GATHERS = ("embedding.", "index_select", "gather", "index.Tensor")


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Returns the bytes behind a tensor's elements; an expanded dimension counts once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


class TensorBytes(TorchDispatchMode):
    """Adds up what operators and Triton launches read and write.

    Attributes:
        by_name: operator or kernel -> (bytes, calls).
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_name: dict[str, tuple[int, int]] = {}

    @property
    def total(self) -> int:
        """Bytes of everything."""
        return sum(size for size, _ in self.by_name.values())

    @property
    def calls(self) -> int:
        """Operators and launches counted."""
        return sum(calls for _, calls in self.by_name.values())

    def add(self, name: str, size: int) -> None:
        """Counts one call."""
        before, calls = self.by_name.get(name, (0, 0))
        self.by_name[name] = before + size, calls + 1

    def launch(self, name: str, arguments: Iterator[Any]) -> None:
        """Counts one Triton launch by its tensor arguments, each storage region once."""
        regions = {(x.data_ptr(), x.numel()): tensor_bytes(x) for x in arguments if isinstance(x, torch.Tensor)}
        self.add(name, sum(regions.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::")
        if name.startswith(_NOTHING):
            return result
        read = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
        made = [x for x in tree_iter(result) if isinstance(x, torch.Tensor)]
        held = {x.untyped_storage().data_ptr() for x in read}
        if not func._schema.is_mutable and made and all(x.untyped_storage().data_ptr() in held for x in made):
            return result  # a view
        written = sum(map(tensor_bytes, made))
        if name.startswith(_GATHERS):
            size = 2 * written + sum(tensor_bytes(x) for x in read if not x.is_floating_point())
        elif name.startswith("copy_"):
            size = 2 * written if len(read) < 2 else written + tensor_bytes(read[1])
        elif name.startswith(("zero_", "fill_")):
            size = written or tensor_bytes(read[0])
        else:
            size = written + sum(map(tensor_bytes, read))
            if func._schema.is_mutable and not made:  # a foreach operator writes what it got first
                size += sum(tensor_bytes(x) for x in tree_iter(args[0]) if isinstance(x, torch.Tensor))
        self.add(name, size)
        return result


@contextlib.contextmanager
def counting() -> Iterator[TensorBytes]:
    """Counts everything inside: PyTorch's operators, Triton's launches, and inductor's where it is loaded."""
    triton = importlib.import_module("triton")
    counts = TensorBytes()
    run = triton.runtime.jit.JITFunction.run

    def counted_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts.launch(f"triton {self.fn.__name__}", tree_iter((args, kwargs)))
        return run(self, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(triton.runtime.jit.JITFunction, "run", counted_run))
        heuristics = sys.modules.get("torch._inductor.runtime.triton_heuristics")
        if heuristics is not None:
            autotuner = heuristics.CachingAutotuner
            compiled_run = autotuner.run

            def counted_compiled(self: Any, *args: Any, **kwargs: Any) -> Any:
                counts.launch(f"inductor {getattr(self.fn, '__name__', 'kernel')}", tree_iter((args, kwargs)))
                return compiled_run(self, *args, **kwargs)

            stack.enter_context(mock.patch.object(autotuner, "run", counted_compiled))
        stack.enter_context(counts)
        yield counts


def eager_native_step(options: Any, folder: Any) -> Callable[[], Any]:
    """Returns one optimiser step of the native engine without CUDA graphs."""
    from sparktune.lab.native import build_engine, micro_batches

    full = "full" in options.variant
    engine = build_engine(folder, rank=options.rank, full=full, recompute=options.recompute)
    engine.graphs.objection = "a profile counts operators, which a replayed graph does not show"
    lengths = [int(n) for n in options.lengths.split(",")]
    batches = micro_batches(lengths, options.supervised, options.accum, torch.device("cuda"))
    total = sum(batch.supervised_tokens for batch in batches)

    def step() -> Any:
        loss = engine.forward_backward(batches, total)
        engine.optimiser_step(1e-5 if full else 2e-4)
        return loss

    return step


def main() -> int:
    """Profiles one variant; prints the most expensive kernels and the largest movers, and a JSON line."""
    from sparktune.lab.side_by_side import parse, peer_step

    options = parse()
    if not torch.cuda.is_available():
        print("A profile needs a CUDA GPU; torch sees none here.", file=sys.stderr)
        return 3
    if options.variant.startswith("unsloth"):
        import_module("unsloth")  # it must come before transformers
    from sparktune.lab.measure import machine_row, profile_step
    from sparktune.lab.shapes import make_model

    folder = make_model(options.folder / options.size, options.size)
    native = options.variant.startswith("native")
    step = eager_native_step(options, folder) if native else peer_step(options, folder)
    for _ in range(options.warmup + 1):
        step()
    torch.cuda.synchronize()
    busy_ms, launches, table = profile_step(step)
    with counting() as counts:
        step()
    torch.cuda.synchronize()
    tokens = sum(int(n) for n in options.lengths.split(",")) * options.accum
    for name, ms, calls in table[:25]:
        print(f"{ms:9.3f} ms {calls:6d}  {name[:100]}", file=sys.stderr)
    for name, (size, calls) in sorted(counts.by_name.items(), key=lambda item: -item[1][0])[:25]:
        print(f"{size / 1e9:9.3f} GB {calls:6d}  {name[:100]}", file=sys.stderr)
    row = {
        **machine_row(), "variant": options.variant, "size": options.size, "lengths": options.lengths,
        "accum": options.accum, "rank": options.rank, "supervised": options.supervised,
        "recompute": options.recompute if native else "", "gpu_busy_ms": round(busy_ms, 3), "launches": launches,
        "calls_counted": counts.calls, "gb": round(counts.total / 1e9, 3),
        "busy_us_per_token": round(busy_ms * 1e3 / tokens, 4), "kb_per_token": round(counts.total / 1e3 / tokens, 2),
        "bytes_are": "tensors read and written, counted from operators and launches",
    }
    print(f"launches: {launches} seen by the profiler, {counts.calls} operators and kernels counted", file=sys.stderr)
    print(json.dumps(row))
    if options.csv:
        new = not options.csv.exists()
        with options.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
