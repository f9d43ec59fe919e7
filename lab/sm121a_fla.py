"""fla's kernels compiled for GB10 (sm_121a) without one: which of their listed configurations fit, spill, use mma.sync.

usage: python -m lab.sm121a_fla VERSION [SIZE ...] [--search]     prints a JSON line a kernel; VERSION: 0.5.0 or 0.6.0
       python -m lab.sm121a_fla --table                  writes docs/results/sm121a_fla.csv: both versions, five sizes

fla decides by the device it sees when it is imported which configurations it lists, and asks for 0 bytes of shared
memory where it sees none. So a GB10 is simulated first: Triton's driver and torch.cuda say compute capability 12.1 and
101,376 bytes. Then the hosts that training calls run on tensors without storage, their launches are recorded, and of
the configurations that a launch would be tuned over the first that holds is kept, simplest first. A process a version.
Not here: the step-by-step kernel, which serves decoding only, and causal-conv1d, which is CUDA C++.
"""

from __future__ import annotations

import contextlib
import csv
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import autotuner, driver, jit

from sparktune.lab.shapes import SIZES
from sparktune.lab.sm121a import SHARED_LIMIT, Compiled, Launch, compile_for_gb10, launch_of
from sparktune.setup.plan.rundir import cache_dir

__all__ = ["PINS", "Kernel", "fla_folder", "holds", "kernels_of_size", "main"]

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "results" / "sm121a_fla.csv"
PINS = {
    "0.5.0": "fla-core==0.5.0 --hash=sha256:5c826ff32daf6b629658e3e4f6125d87cf8c32eea937e3be9ba85f51951d809a",
    "0.6.0": "fla-core==0.6.0 --hash=sha256:b0708b70e0b119cd58a0a5146ea56cb175cef6ed969d8ac60267e3e077ce3ebd",
}
"""The wheels of docker/stacks/*/fast-path.lock."""
EINOPS = "einops==0.8.2 --hash=sha256:54058201ac7087911181bfec4af6091bb59380360f069276601256a76af08193"
T = 5376
K = 128


def fla_folder(version: str) -> Path:
    """Returns a folder of site-packages with fla's kernels, made in the cache from PyPI the first time.

    Raises:
        RuntimeError: it could not be installed.
    """
    folder = cache_dir("fla") / version
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{version}.partial-{Path('/proc/self').resolve().name}")
    pins = partial.with_suffix(".txt")
    pins.write_text(f"{PINS[version]}\n{EINOPS}\n")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--require-hashes", "--target", str(partial),
         "-r", str(pins)], capture_output=True, text=True, check=False,
    )
    pins.unlink()
    if done.returncode:
        raise RuntimeError(f"fla {version} is compiled for GB10 from its wheel on PyPI, which pip could not install: "
                           f"{done.stderr.strip()[-400:]}")
    try:
        partial.rename(folder)
    except OSError:  # another process was first
        if not folder.is_dir():
            raise
    return folder


class Gb10Driver:
    """What Triton's driver would say on a GB10; nothing can be launched through it."""

    utils = SimpleNamespace(get_device_properties=lambda index: {
        "max_shared_mem": SHARED_LIMIT, "multiprocessor_count": 48, "warpSize": 32, "max_num_regs": 65_536,
    })

    def get_current_target(self) -> GPUTarget:
        """The chip."""
        return GPUTarget("cuda", 121, 32)

    def get_current_device(self) -> int:
        """Its index."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where tensors would be."""
        return torch.device("cuda", 0)

    def get_benchmarker(self) -> Callable[..., Any]:
        """Asked for when a kernel is declared; a simulated chip times nothing."""
        return triton.testing.do_bench


def simulate_gb10() -> None:
    """Makes this process believe in a GB10, for good: fla keeps what it saw when it was imported."""
    driver.set_active(Gb10Driver())
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda device=None: (12, 1)
    torch.cuda.device = lambda index: contextlib.nullcontext()
    torch.cuda.get_device_name = lambda device=None: "NVIDIA GB10"


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One launch of fla's, and the configurations it is tuned over."""

    name: str
    launches: tuple[Launch, ...]


def _recorder(found: list[Kernel], label: str) -> tuple[Callable[..., None], Callable[..., None]]:
    def note(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], configs: list[dict[str, Any]]) -> None:
        launches = tuple(launch_of(kernel, args, {**kwargs, **config}, label) for config in configs)
        if launches[0].name not in [k.name for k in found] or all(k.launches != launches for k in found):
            found.append(Kernel(name=launches[0].name, launches=launches))

    def tuned(self: Any, *args: Any, **kwargs: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        configs = [config.all_kwargs() for config in self.prune_configs(kwargs)]
        inner = self.fn
        while isinstance(inner, autotuner.Heuristics):
            for config in configs:
                seen = {**self.nargs, **kwargs, **config}
                config |= {name: rule(seen) for name, rule in inner.values.items()}
            inner = inner.fn
        note(inner, args, kwargs, sorted(configs, key=lambda c: (c["num_stages"], abs(c["num_warps"] - 4))))

    def plain(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        note(self, args, kwargs, [{"num_warps": kwargs.get("num_warps", 4), "num_stages": kwargs.get("num_stages", 3)}])

    return tuned, plain


def _t(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _hosts() -> SimpleNamespace:
    """fla's forward and backward hosts of training, wherever this version keeps them; the simulation goes first."""
    from fla.ops.gated_delta_rule import chunk

    try:
        from fla.modules.norm import fused_norm_gate, l2norm
    except ModuleNotFoundError:  # before 0.6.0
        from fla.modules import fused_norm_gate, l2norm
    return SimpleNamespace(chunk=chunk, gate=fused_norm_gate, l2norm=l2norm)


def _limit_everywhere() -> None:
    """Answers the hosts' questions for shared memory, which pass the index of a device that `meta` tensors lack."""
    backends = {"ada": 101_376, "ampere": 166_912, "hopper": 232_448}
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.") and hasattr(module, "check_shared_mem"):
            module.check_shared_mem = lambda arch="none", index=0: backends.get(arch, 102_400) <= SHARED_LIMIT
        if name.startswith("fla.") and hasattr(module, "get_multiprocessor_count"):
            module.get_multiprocessor_count = lambda index=0: 48


def kernels_of_size(size: str, key_heads: int = 16) -> list[Kernel]:
    """Returns the launches of one GDN layer's forward and backward pass. Call `simulate_gb10` first.

    Args:
        size: one of SIZES.
        key_heads: of the model.
    """
    heads = SIZES[size].value_heads
    hosts = _hosts()
    _limit_everywhere()
    found: list[Kernel] = []
    tuned, plain = _recorder(found, f"{key_heads}/{heads}")
    q = k = _t(1, T, key_heads, K)
    v = do = _t(1, T, heads, K)
    g = beta = _t(1, T, heads, dtype=torch.float32)
    cu, indices = _t(4, dtype=torch.int32), _t(T // 64 + 2, 2, dtype=torch.int32)
    shared = {"scale": K**-0.5, "initial_state": None, "cu_seqlens": cu, "chunk_indices": indices}
    with mock.patch.object(autotuner.Autotuner, "run", tuned), mock.patch.object(jit.JITFunction, "run", plain):
        _, rstd = hosts.l2norm.l2norm_fwd(q)
        hosts.l2norm.l2norm_bwd(q, rstd, q)
        out = hosts.chunk.chunk_gated_delta_rule_fwd(q=q, k=k, v=v, g=g, beta=beta, output_final_state=False, **shared)
        hosts.chunk.chunk_gated_delta_rule_bwd(
            q=q, k=k, v=v, g=out[0], beta=beta, A=out[2], do=do, dht=None, **shared
        )
        rows, weight = _t(T * heads, K), _t(K)
        y = hosts.gate.layer_norm_gated_fwd(rows, rows, weight, None, "swish", 1e-6, is_rms_norm=True)
        hosts.gate.layer_norm_gated_bwd(rows, rows, rows, weight, None, "swish", 1e-6, y[1], y[2], is_rms_norm=True)
    return found


def holds(compiled: Compiled, launch: Launch) -> bool:
    """Says whether a configuration runs on GB10 at no hidden cost."""
    return compiled.shared_bytes <= SHARED_LIMIT and not compiled.spill_bytes and (compiled.mma or not launch.has_dot)


def _tiles(launch: Launch) -> str:
    return " ".join(f"{name}={x}" for name, x in launch.constants.items() if name.startswith("B") and name != "B")


def _known() -> dict[tuple[str, str], tuple[int, int, str]]:
    """(version, kernel) -> the configuration of the table's row."""
    if not TARGET.exists():
        return {}
    with TARGET.open(newline="") as file:
        return {(row["fla"], row["name"]): (int(row["num_warps"]), int(row["num_stages"]), row["tiles"])
                for row in csv.DictReader(file)}


def first_that_holds(kernel: Kernel, known: tuple[int, int, str] | None) -> dict[str, Any]:
    """Compiles a kernel's configurations until one holds; returns its row, or the least bad one's.

    Args:
        kernel: what was launched.
        known: (num_warps, num_stages, tiles) of the table's row: the only one compiled. None: search.
    """
    tried: list[tuple[Launch, Compiled]] = []
    again = [x for x in kernel.launches if (x.num_warps, x.num_stages, _tiles(x)) == known]
    for launch in again or kernel.launches:
        tried.append((launch, compile_for_gb10(launch)))
        if holds(tried[-1][1], launch):
            break
    launch, compiled = min(
        tried, key=lambda t: (not holds(t[1], t[0]), t[1].shared_bytes > SHARED_LIMIT, t[1].spill_bytes)
    )
    return {
        **asdict(compiled), "num_warps": launch.num_warps, "num_stages": launch.num_stages,
        "tiles": _tiles(launch), "has_dot": launch.has_dot,
        "holds": holds(compiled, launch), "listed": len(kernel.launches), "tried": len(tried),
    }


def rows_of(version: str, sizes: list[str], search: bool) -> list[dict[str, Any]]:
    """Compiles one version's kernels in this process; sizes of the same head counts share a row.

    Args:
        version: of fla.
        sizes: of the model.
        search: look for a configuration that holds, instead of compiling the table's again.
    """
    sys.path.insert(0, str(fla_folder(version)))
    simulate_gb10()
    by_heads: dict[int, list[str]] = {}
    for size in sizes:
        by_heads.setdefault(SIZES[size].value_heads, []).append(size)
    rows: list[dict[str, Any]] = []
    known = {} if search else _known()
    built: list[tuple[list[Launch], dict[str, Any]]] = []
    for same in by_heads.values():
        for kernel in kernels_of_size(same[0]):
            # norms work on rows of 128, whatever the number of heads
            what = [replace(launch, name="") for launch in kernel.launches]
            row = next((row for seen, row in built if seen == what), None)
            if row is None:
                row = first_that_holds(kernel, known.get((version, kernel.name)))
                built.append((what, row))
            rows.append({"fla": version, "sizes": " ".join(same), **row, "name": kernel.name,
                         "triton": triton.__version__, "target": "sm_121a"})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main(arguments: list[str]) -> int:
    """Prints one version's rows, or writes the table of all."""
    five = [size for size in SIZES if size != "tiny"]
    if arguments[:1] != ["--table"]:
        version, *sizes = (argument for argument in arguments if argument != "--search")
        rows = rows_of(version, sizes or five, "--search" in arguments)
        return 0 if all(row["holds"] for row in rows) else 1
    rows = []
    for version in PINS:
        command = [sys.executable, "-m", "sparktune.lab.sm121a_fla", version, "--search"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if not found:
            raise RuntimeError(f"fla {version} was not compiled: {done.stderr[-2000:]}")
        rows += found
    with TARGET.open("w", newline="") as file:
        table = csv.DictWriter(file, fieldnames=list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
