"""Compiles Triton kernels for GB10 (sm_121a) on any machine and reads what they need: shared memory, registers, spills.

Nothing runs: Triton's compiler and the assembler of its wheel are enough. A kernel takes about a second.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

__all__ = ["SHARED_LIMIT", "Compiled", "Launch", "compile_for_gb10", "recorded_launches"]

SHARED_LIMIT = 101_376
"""Bytes of shared memory that one block may use on GB10."""
GB10 = GPUTarget("cuda", 121, 32)
_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
    torch.bool: "i1", torch.uint8: "u8", torch.int8: "i8",
}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One configuration of one kernel, as its host launches it."""

    name: str
    kernel: Any
    """The @triton.jit function."""
    signature: Mapping[str, str]
    """Argument -> Triton type, constexpr arguments left out."""
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = ()
    """Integer arguments known to be divisible by 16 at the shapes we run; pointers always are."""
    has_dot: bool = False


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler and the assembler said."""

    name: str
    shared_bytes: int
    registers: int
    stack_bytes: int
    """Frame of local memory a thread: spills and arrays that registers could not hold."""
    spill_bytes: int
    """Bytes of spill stores and loads in the machine code."""
    mma: bool
    widest_load_bits: int
    """Widest global load in the PTX: 128 is a 16-byte load."""


def compile_for_gb10(launch: Launch, target: GPUTarget = GB10) -> Compiled:
    """Compiles one launch and reads its resources. Raises Triton's CompilationError where it does not compile."""
    names = launch.kernel.arg_names
    signature = {n: "constexpr" if n in launch.constants else launch.signature[n] for n in names}
    divisible = [n for n in names if signature[n].startswith("*") or n in launch.aligned]
    source = ASTSource(
        fn=launch.kernel, signature=signature, constexprs={(names.index(n),): v for n, v in launch.constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in divisible},
    )
    built = triton.compile(
        source, target=target, options={"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    )
    # nvdisasm of the wheel does not know sm_121a; the assembler itself reports what it spilled
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas-blackwell"
    ptx = built.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "kernel.ptx"
        text.write_text(ptx)
        report = subprocess.run(
            [assembler, "-v", f"--gpu-name=sm_{target.arch}a", text, "-o", Path(folder) / "kernel.cubin"],
            capture_output=True, text=True, check=True,
        ).stderr
    stack, stores, loads = map(int, re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report).groups())
    widths = [int(v or 1) * int(b) for v, b in re.findall(r"ld\.global[.\w:]*?(?:\.v(\d))?\.b(\d+)", ptx)]
    return Compiled(
        name=launch.name, shared_bytes=built.metadata.shared,
        registers=int(re.search(r"Used (\d+) registers", report)[1]), stack_bytes=stack,
        spill_bytes=stores + loads, mma="mma.sync" in ptx, widest_load_bits=max(widths, default=0),
    )


def launch_of(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], label: str) -> Launch:
    """Derives what Triton's launcher would: types from tensors, divisibility from integers, 1 as a constant."""
    given = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in kernel.arg_names}
    signature, constants, aligned = {}, {}, []
    for parameter in kernel.params:
        name, value = parameter.name, given[parameter.name]
        if parameter.is_constexpr or value is None:
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            if value == 1 and not parameter.do_not_specialize:
                constants[name] = 1
                continue
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                aligned.append(name)
        else:
            signature[name] = "fp32"
    return Launch(
        name=f"{kernel.__name__} {label}".strip(), kernel=kernel, signature=signature, constants=constants,
        num_warps=kwargs.get("num_warps", 4), num_stages=kwargs.get("num_stages", 3), aligned=tuple(aligned),
        has_dot="tl.dot" in kernel.src,
    )


@contextlib.contextmanager
def recorded_launches(label: str = "") -> Iterator[list[Launch]]:
    """Collects the launches of everything called inside instead of running them; call hosts on `meta` tensors.

    So the table shows the configurations that the hosts choose, not a second list of them.
    """
    launches: list[Launch] = []
    run = JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(launch_of(self, args, kwargs, label))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run
