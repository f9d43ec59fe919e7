"""Checks an image from inside, one JSON line a check: {"check", "status": pass | fail | skip, "seconds", "detail"}.

usage: smoke_test.py [--build] [--only NAME]... [--lora-steps]
Exit code: 0 all passed, 1 a check failed, 75 nothing failed but what needs a GPU was skipped.
--build runs what needs no GPU (an image build has none) and exits 0 when that passed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BUILD = Path(__file__).resolve().parent
GPU_NEEDED = "needs a CUDA device; none is visible here"


class Skip(Exception):
    """A check that cannot be made here; its text says why."""


class Failed(Exception):
    """A check that failed; its text says what was expected and what was seen."""


def _require(ok: bool, text: str) -> None:
    if not ok:
        raise Failed(text)


def _gpu() -> Any:
    import torch

    if not torch.cuda.is_available():
        raise Skip(GPU_NEEDED)
    return torch


def _optimised() -> bool:
    return os.environ.get("IMAGE_FLAVOUR") == "opt"


# -- without a GPU


def torch_unchanged() -> str:
    """The base's torch, triton, numpy and CUDA packages are what they were before pip ran."""
    done = subprocess.run(
        [sys.executable, str(BUILD / "verify_base.py"), "check"], capture_output=True, text=True, check=False
    )
    _require(done.returncode == 0, done.stdout.strip() or done.stderr.strip()[-500:])
    return done.stdout.strip()


def pip_check() -> str:
    """`pip check` prints the lines this stack is known for and no other."""
    done = subprocess.run(
        [sys.executable, str(BUILD / "verify_base.py"), "pip-check", str(BUILD / "pip-check.allow")],
        capture_output=True, text=True, check=False,
    )
    _require(done.returncode == 0, done.stdout.strip() or done.stderr.strip()[-500:])
    return done.stdout.strip().splitlines()[-1]


def package() -> str:
    """Our package imports from the image's own folder and shadows no other."""
    import sparktune

    importlib.import_module("sparktune.setup.plan.schema")
    spec = importlib.util.find_spec("kernels")
    where = str(spec.origin) if spec is not None else "nothing"
    _require("sparktune" not in where, f"`import kernels` must not find ours; it finds {where}")
    return f"{Path(sparktune.__file__).resolve().parent}; `import kernels` finds {where}"


def stack() -> str:
    """The packages that training stands on import without a GPU."""
    names = ("transformers", "tokenizers", "safetensors", "pydantic", "peft", "datasets")
    for name in names:
        importlib.import_module(name)
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def llama_cpp() -> str:
    """llama.cpp's programs are there, as they were built."""
    if not _optimised():
        raise Skip("the baseline image has no llama.cpp")
    record = json.loads(Path("/opt/llama.cpp/build.json").read_text(encoding="utf-8"))
    wrong = [name for name, wanted in record["sha256"].items()
             if hashlib.sha256(Path("/opt/llama.cpp/bin", name).read_bytes()).hexdigest() != wanted]
    _require(bool(record["sha256"]) and not wrong, f"not what was built: {', '.join(wrong) or 'there is none'}")
    return f"{', '.join(record['sha256'])} at {record['commit']}"


# -- with a GPU


def torch_arch() -> str:
    """torch sees the GPU and was built for it."""
    torch = _gpu()
    major, minor = torch.cuda.get_device_capability()
    arches = torch.cuda.get_arch_list()
    mine = [a for a in arches if re.fullmatch(rf"(sm|compute)_{major}\d+[af]?", a)]
    _require(bool(mine), f"torch {torch.__version__} was built for {arches}; this GPU is sm_{major}{minor}")
    x = torch.randn(256, 256, device="cuda", dtype=torch.bfloat16)
    ref, got = x.float() @ x.float().T, (x @ x.T).float()
    error = ((got - ref).abs().max() / ref.abs().max()).item()
    _require(error < 1e-2, f"a bf16 product is off by {error:.3g} (relative); expected under 0.01")
    return f"{torch.__version__} on {torch.cuda.get_device_name()} sm_{major}{minor}, built for {' '.join(mine)}"


_KERNEL = '''
import triton
import triton.language as tl

@triton.jit
def add_squares(x_ptr, y_ptr, out_ptr, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < N, other=0.0)
    y = tl.load(y_ptr + i, mask=i < N, other=0.0)
    tl.store(out_ptr + i, x * x + y * y, mask=i < N)
'''


def triton_kernel() -> str:
    """Triton compiles for this chip with an assembler that knows it, and the numbers are right."""
    torch = _gpu()
    import triton
    from triton import knobs

    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        # Triton reads a kernel's source from its file; the folder is private, as gcc would read a file named `specs`
        path = Path(folder) / "smoke_kernel.py"
        path.write_text(_KERNEL, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("smoke_kernel", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        n = 10_007
        x, y = torch.randn(n, device="cuda"), torch.randn(n, device="cuda")
        out = torch.full_like(x, float("nan"))
        compiled = module.add_squares[(triton.cdiv(n, 1024),)](x, y, out, n, BLOCK=1024)
        torch.cuda.synchronize()
    error = (out - (x * x + y * y)).abs().max().item()
    _require(error < 1e-5, f"a Triton kernel is off by {error:.3g}; expected under 1e-5")
    target = compiled.metadata.target.arch
    _require(int(target) == major * 10 + minor, f"Triton compiled for sm_{target}; this GPU is sm_{major}{minor}")
    tool = knobs.nvidia.ptxas
    if major >= 10 and hasattr(knobs.nvidia, "ptxas_blackwell"):
        tool = knobs.nvidia.ptxas_blackwell
    return f"triton {triton.__version__}, sm_{target}, ptxas {tool.version} at {tool.path}"


def bitsandbytes_4bit() -> str:
    """bitsandbytes loads its CUDA library, and 4-bit weights come back near what went in."""
    torch = _gpu()
    import bitsandbytes as bnb
    from bitsandbytes import functional

    x = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
    packed, state = functional.quantize_4bit(x, quant_type="nf4")
    back = functional.dequantize_4bit(packed, state)
    error = ((back - x).float().pow(2).mean() / x.float().pow(2).mean()).sqrt().item()
    _require(error < 0.15, f"nf4 comes back {error:.3g} off (relative RMS); expected under 0.15")
    return f"bitsandbytes {bnb.__version__}, {bnb.cextension.lib!r}, nf4 off by {error:.3f}"


def unsloth_first() -> str:
    """Unsloth imports before the packages it patches, as it wants to."""
    _gpu()  # unsloth refuses to import without one
    for name in ("unsloth", "unsloth_zoo", "transformers", "trl", "peft"):
        importlib.import_module(name)
    return ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("unsloth", "unsloth_zoo", "trl", "peft"))


def causal_conv1d() -> str:
    """causal-conv1d runs forward and backward on this chip after Unsloth's import, and agrees with torch."""
    if not _optimised():
        raise Skip("the baseline image has no fast path")
    torch = _gpu()
    importlib.import_module("unsloth")  # its own check may disable causal-conv1d, so it goes first
    from transformers.utils.import_utils import is_causal_conv1d_available

    _require(bool(is_causal_conv1d_available()), "transformers no longer sees causal-conv1d after Unsloth's import")
    fused = importlib.import_module("causal_conv1d").causal_conv1d_fn
    x = torch.randn(2, 64, 129, device="cuda", requires_grad=True)
    w = torch.randn(64, 4, device="cuda", requires_grad=True)
    ref = torch.nn.functional.silu(torch.nn.functional.conv1d(x, w[:, None], padding=3, groups=64)[..., :129])
    ref_grads = torch.autograd.grad(ref.square().sum(), (x, w))
    got = fused(x, w, activation="silu")
    got_grads = torch.autograd.grad(got.square().sum(), (x, w))
    error = max(((a - b).abs().max() / b.abs().max()).item()
                for a, b in zip((got, *got_grads), (ref, *ref_grads), strict=True))
    _require(error < 1e-3, f"causal-conv1d is off by {error:.3g} (relative) from torch; expected under 0.001")
    return f"causal-conv1d {importlib.metadata.version('causal-conv1d')}, off by {error:.2g}"


def gated_delta() -> str:
    """fla's gated delta rule runs forward and backward and agrees with a plain recurrence."""
    if not _optimised():
        raise Skip("the baseline image has no fast path")
    torch = _gpu()
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    T, H, K = 130, 2, 64
    q, k, v = (torch.randn(1, T, H, K, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    g = -torch.rand(1, T, H, device="cuda")
    beta = torch.rand(1, T, H, device="cuda", dtype=torch.bfloat16)
    got, _ = chunk_gated_delta_rule(q, k, v, g, beta, scale=K**-0.5, use_qk_l2norm_in_kernel=True)
    qn, kn = (torch.nn.functional.normalize(t[0].float(), dim=-1) for t in (q, k))
    state, rows = torch.zeros(H, K, K, device="cuda"), []
    for t in range(T):
        state = state * g[0, t].exp()[:, None, None]
        delta = (v[0, t].float() - torch.einsum("hkv,hk->hv", state, kn[t])) * beta[0, t].float()[:, None]
        state = state + torch.einsum("hk,hv->hkv", kn[t], delta)
        rows.append(torch.einsum("hkv,hk->hv", state, qn[t] * K**-0.5))
    ref = torch.stack(rows)
    got_grads = torch.autograd.grad(got.float().square().sum(), (q, k, v))
    ref_grads = torch.autograd.grad(ref.square().sum(), (q, k, v))
    error = max(((a.float() - b.float()).norm() / b.float().norm()).item()
                for a, b in zip((got[0], *got_grads), (ref, *ref_grads), strict=True))
    _require(all(bool(torch.isfinite(gr).all()) for gr in got_grads), "the gated delta rule's gradients are not finite")
    _require(error < 5e-2, f"the gated delta rule is off by {error:.3g} (relative L2); expected under 0.05")
    return f"fla {importlib.metadata.version('fla-core')}, off by {error:.2g}"


def lora_steps() -> str:
    """Five LoRA-like steps on a small bf16 layer lower its loss."""
    torch = _gpu()
    torch.manual_seed(0)
    base = torch.randn(256, 256, device="cuda", dtype=torch.bfloat16) / 16
    a = (torch.randn(8, 256, device="cuda") / 16).requires_grad_()
    b = torch.zeros(256, 8, device="cuda", requires_grad=True)
    x, y = torch.randn(64, 256, device="cuda").bfloat16(), torch.randn(64, 256, device="cuda")
    optimiser, losses = torch.optim.AdamW([a, b], lr=1e-2), []
    for _ in range(6):
        loss = ((x @ base.T + (x @ a.T.bfloat16()) @ b.T.bfloat16()).float() - y).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    _require(losses[-1] < losses[0], f"five steps took the loss from {losses[0]:.4f} to {losses[-1]:.4f}")
    return f"loss {losses[0]:.4f} -> {losses[-1]:.4f}"


WITHOUT_GPU: dict[str, Callable[[], str]] = {
    "torch_unchanged": torch_unchanged, "pip_check": pip_check, "package": package, "stack": stack,
    "llama_cpp": llama_cpp,
}
# Unsloth before everything that it patches
WITH_GPU: dict[str, Callable[[], str]] = {
    "unsloth_first": unsloth_first, "torch_arch": torch_arch, "triton_kernel": triton_kernel,
    "bitsandbytes_4bit": bitsandbytes_4bit, "causal_conv1d": causal_conv1d, "gated_delta": gated_delta,
}


def run(name: str, check: Callable[[], str]) -> dict[str, Any]:
    """Makes one check; what it prints goes to standard error, so that standard output stays JSON lines."""
    begun = time.monotonic()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            status, detail = "pass", check()
    except Skip as skip:
        status, detail = "skip", str(skip)
    except Failed as failed:
        status, detail = "fail", str(failed)
    except Exception as error:  # any other error is a failed check too, and the next ones still run
        status, detail = "fail", f"{type(error).__name__}: {error}"
    return {"check": name, "status": status, "seconds": round(time.monotonic() - begun, 2), "detail": detail}


def main(argv: list[str]) -> int:
    """Runs the checks and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--build", action="store_true", help="only what needs no GPU")
    parser.add_argument("--only", action="append", metavar="NAME", help="only this check; may be given again")
    parser.add_argument("--lora-steps", action="store_true", help="five optimiser steps at the end")
    options = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    checks = dict(WITHOUT_GPU) if options.build else {**WITH_GPU, **WITHOUT_GPU}
    if options.lora_steps:
        checks["lora_steps"] = lora_steps
    unknown = set(options.only or ()) - set(checks)
    if unknown:
        parser.error(f"no such check: {', '.join(sorted(unknown))}; there are {', '.join(checks)}")
    results = []
    for name, check in checks.items():
        if not options.only or name in options.only:
            results.append(run(name, check))
            print(json.dumps(results[-1], ensure_ascii=False), flush=True)
    if any(r["status"] == "fail" for r in results):
        return 1
    return 75 if any(r["detail"] == GPU_NEEDED for r in results) else 0


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    sys.exit(main(sys.argv[1:]))
