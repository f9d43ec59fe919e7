"""One optimiser step under the lens: GPU-busy time, launches, bytes of the tensors each launch reads and writes.

usage: python -m lab.profile VARIANT [the options of lab.side_by_side]      (the same as its --bytes)

Bytes are COUNTED FROM TENSORS, the same way for every engine, not read from DRAM counters: each operator of PyTorch
counts its tensor arguments once and its results once, each Triton launch its tensor arguments once; views and
allocations count nothing, gathers only the rows they take. Caches and re-reads are not seen; kernels that a C++
extension launches by itself (causal-conv1d, tilelang) are not counted, and the line says how many launches the profiler
saw beyond those that were. The native engine runs eagerly here: a replayed graph shows no operator.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from sparktune.lab.measure import EXIT_NO_GPU, StepTimes, lacks_gpu, profile_step

__all__ = ["TensorBytes", "count_step", "counting", "main", "tensor_bytes"]

_NOTHING = ("empty", "new_empty", "set_", "detach", "_local_scalar_dense", "resize_", "record_stream", "lift_fresh")
INDUCTOR = "inductor "
_GATHERS = ("embedding.", "index_select", "gather", "index.Tensor")


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Returns the bytes behind a tensor's elements; an expanded dimension counts once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


class TensorBytes(TorchDispatchMode):
    """Adds up what operators and Triton launches read and write.

    Attributes:
        by_name: operator or kernel -> (bytes, calls).
    """

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Lets torch.compile's code run as it does without this mode: its kernels are what is counted."""
        return True

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
        # `out=` is written, not read
        given = {k: v for k, v in (kwargs or {}).items() if k != "out"}
        read = [x for x in tree_iter((args, given)) if isinstance(x, torch.Tensor)]
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
                counts.launch(f"{INDUCTOR}{getattr(self.fn, '__name__', 'kernel')}", tree_iter((args, kwargs)))
                return compiled_run(self, *args, **kwargs)

            stack.enter_context(mock.patch.object(autotuner, "run", counted_compiled))
        stack.enter_context(counts)
        yield counts


def count_step(step: Callable[[], Any], tokens: int, times: StepTimes) -> dict[str, object]:
    """Counts one step's bytes and returns the columns that a row gains; prints what moved most to stderr.

    Args:
        step: runs one optimiser step, operator by operator: a replayed graph shows none.
        tokens: real tokens of the step.
        times: what was measured of it, for the launches that the profiler saw.

    Raises:
        RuntimeError: compiled kernels ran that were not counted, so that the sum would be too small.
    """
    busy_ms, launches, table = profile_step(step)
    with counting() as counts:
        step()
    torch.cuda.synchronize()
    for name, ms, calls in table[:25]:
        print(f"{ms:9.3f} ms {calls:6d}  {name[:100]}", file=sys.stderr)
    for name, (size, calls) in sorted(counts.by_name.items(), key=lambda item: -item[1][0])[:25]:
        print(f"{size / 1e9:9.3f} GB {calls:6d}  {name[:100]}", file=sys.stderr)
    compiled = sum(calls for name, (_, calls) in counts.by_name.items() if name.startswith(INDUCTOR))
    seen = sum(calls for name, _, calls in table if name.startswith("triton_"))
    print(f"launches: {launches} seen by the profiler, {counts.calls} operators and kernels counted; of inductor's "
          f"kernels {seen} seen, {compiled} counted", file=sys.stderr)
    if abs(seen - compiled) > 0.02 * max(seen, 1):
        raise RuntimeError(f"the profiler saw {seen} of inductor's kernels and {compiled} were counted: compiled code "
                           "ran otherwise under the count, so its bytes are not those of the timed step.")
    return {
        "eager_busy_ms": round(busy_ms, 3), "eager_launches": launches, "calls_counted": counts.calls,
        "gb": round(counts.total / 1e9, 3), "bytes_per_token": round(counts.total / tokens),
        "launches_per_token": round((times.launches or launches) / tokens, 4),
        "bytes_are": "tensors read and written, counted from operators and launches",
    }


def main() -> int:
    """Times one variant and counts its bytes: lab.side_by_side with --bytes, into profile.csv."""
    if lacks_gpu("A profile"):
        return EXIT_NO_GPU
    from sparktune.lab import side_by_side

    sys.argv.append("--bytes")
    side_by_side.main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
