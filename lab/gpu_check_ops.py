"""What lab/gpu_check.py times: every fused op at the shapes of one 5376-token sequence of Qwen3.5-2B, LoRA r = 128.

`gbytes` counts each input once and each output once; `per_model` says how often a step of one sequence runs the op.
Rows that start with `what_if` are other ways to do the same arithmetic, for the choice between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparktune.kernels.attention_prologue.function import attention_prologue_fused
from sparktune.kernels.causal_conv1d.function import causal_conv1d_fused
from sparktune.kernels.columns import split_columns
from sparktune.kernels.gated_delta_rule.gates import gdn_gates_fused
from sparktune.kernels.gated_rms_norm.function import gated_rms_norm_fused
from sparktune.kernels.linear_cross_entropy.function import linear_cross_entropy_fused
from sparktune.kernels.lora_linear.function import lora_linear_fused
from sparktune.kernels.rms_norm.function import add_rms_norm_fused
from sparktune.kernels.sigmoid_gate.function import sigmoid_gate_fused
from sparktune.kernels.silu_mul.function import silu_mul_fused

__all__ = ["TIMED", "Timed"]

T, H, FFN, V, RANK, S = 5376, 2048, 6144, 248_320, 128, 1881
NH, NKV, D, R, HV, K = 8, 2, 256, 64, 16, 128
QKV, ATTENTION_IN = 3 * HV * K, NH * 2 * D + 2 * NKV * D
PASS = T * H * 2 / 1e9
"""GB of one read or write of a [T, H] bf16 tensor."""
Inputs = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One op to time."""

    name: str
    make: Callable[[], Inputs]
    forward: Callable[[Inputs], Any]
    step: Callable[[Inputs], Any] | None = None
    """Forward and backward; None for rows that have only one direction."""
    gbytes: float = 0.0
    """Fewest bytes of the step (of the forward if there is no step), in 1e9."""
    gflop: float = 0.0
    per_model: int = 1


def _r(*shape: int, grad: bool = False, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(dtype).requires_grad_(grad)


def _op(name: str, make: Callable[[], Inputs], call: Callable[[Inputs], Any], grads: Sequence[str], **numbers: Any) \
        -> Timed:
    """A Timed whose step runs `call` and differentiates by `grads`, with cotangents made once."""

    def outputs(inputs: Inputs) -> list[torch.Tensor]:
        out = call(inputs)
        return [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None]

    def prepared() -> Inputs:
        inputs = make()
        inputs["cotangents"] = [torch.randn_like(o) for o in outputs(inputs)]
        return inputs

    def step(inputs: Inputs) -> Any:
        return torch.autograd.grad(outputs(inputs), [inputs[g] for g in grads], inputs["cotangents"])

    @torch.no_grad()
    def forward(inputs: Inputs) -> Any:
        return outputs(inputs)

    return Timed(name=name, make=prepared, forward=forward, step=step, **numbers)


def _cu() -> torch.Tensor:
    return torch.tensor([0, 1700, 3100, T], dtype=torch.int32, device="cuda")


def _lora(name: str, width: int, sizes: Sequence[int], extra: int, per_model: int) -> list[Timed]:
    out, adapted = sum(sizes) + extra, sum(sizes)

    def make() -> Inputs:
        return {
            "x": _r(T, width, grad=True), "w": _r(out, width, scale=width**-0.5),
            "a": _r(len(sizes) * RANK, width, grad=True, scale=width**-0.5, dtype=torch.float32),
            "b": _r(adapted, RANK, grad=True, scale=0.01, dtype=torch.float32),
        }

    base = 4 * T * width * out
    lora = 6 * T * RANK * (len(sizes) * width + adapted)
    return [
        _op(f"lora_linear {name}", make, lambda i: lora_linear_fused(i["x"], i["w"], None, i["a"], i["b"], sizes, 1.0),
            ("x", "a", "b"), gflop=(base + lora) / 1e9, per_model=per_model),
        Timed(name=f"base product alone {name}", make=make, forward=lambda i: i["x"].detach() @ i["w"].t(),
              step=lambda i: (i["x"].detach() @ i["w"].t()) @ i["w"], gflop=base / 1e9, per_model=per_model),
        *_what_if(name, width, sizes, out, per_model),
    ]


def _what_if(name: str, width: int, sizes: Sequence[int], out: int, per_model: int) -> list[Timed]:
    """One product over [x | xa] with [W | B] (zero blocks off the diagonal) instead of adding in place; both ways."""
    ranks = len(sizes) * RANK

    def make() -> Inputs:
        # the producer of x would write into the left columns, the small product into the right ones
        return {
            "x_ext": _r(T, width + ranks), "w_ext": _r(out + ranks, width + ranks, scale=0.02),
            "dy_ext": _r(T, out + ranks), "y": torch.empty(T, out, device="cuda", dtype=torch.bfloat16),
        }

    def forward(i: Inputs) -> torch.Tensor:
        x, w = i["x_ext"], i["w_ext"]
        torch.mm(x[:, :width], w[out:, :width].t(), out=x[:, width:])
        return x @ w[:out].t()

    def step(i: Inputs) -> None:
        forward(i)
        dy, w = i["dy_ext"], i["w_ext"]
        start = 0
        for n, size in enumerate(sizes):
            rank = slice(n * RANK, (n + 1) * RANK)
            torch.mm(dy[:, start : start + size], w[start : start + size, width:][:, rank], out=dy[:, out:][:, rank])
            start += size
        dx = dy @ w[:, :width]
        torch.mm(dy[:, out:].t(), i["x_ext"][:, :width], out_dtype=torch.float32)
        start = 0
        for n, size in enumerate(sizes):
            xa = i["x_ext"][:, width + n * RANK : width + (n + 1) * RANK]
            torch.mm(dy[:, start : start + size].t(), xa, out_dtype=torch.float32)
            start += size
        del dx

    return [Timed(name=f"what_if one product {name}", make=make, forward=forward, step=step, per_model=per_model)]


def _elementwise() -> list[Timed]:
    def norm() -> Inputs:
        return {"x": _r(T, H, grad=True), "res": _r(T, H, grad=True), "w": _r(H, scale=0.1)}

    def gated() -> Inputs:
        return {"x": _r(T, HV, K, grad=True), "y": _r(T, QKV + HV * (K + 2), grad=True), "w": _r(K)}

    def conv() -> Inputs:
        return {"y": _r(T, QKV + HV * (K + 2)), "x": _r(T, QKV, grad=True), "w": _r(QKV, 4, scale=0.5), "cu": _cu()}

    def gates() -> Inputs:
        return {"a": _r(T, HV, grad=True), "b": _r(T, HV, grad=True), "log": _r(HV, dtype=torch.float32),
                "dt": _r(HV, dtype=torch.float32)}

    def prologue() -> Inputs:
        angles = torch.randn(T, R, device="cuda")
        return {"qkv": _r(T, ATTENTION_IN, grad=True), "w": _r(D), "cos": angles.cos(), "sin": angles.sin()}

    def prologue_op(i: Inputs) -> tuple[torch.Tensor, ...]:
        q, k, v = split_columns(i["qkv"], (NH * 2 * D, NKV * D, NKV * D))
        parts = attention_prologue_fused(
            q.unflatten(1, (NH, 2 * D)), k.unflatten(1, (NKV, D)), i["w"], i["w"], i["cos"], i["sin"], 1e-6,
            zero_centred=True, gated=True,
        )
        return *parts, v

    def z_of(i: Inputs) -> torch.Tensor:
        return i["y"].detach()[:, QKV : QKV + HV * K].unflatten(1, (HV, K)).requires_grad_()

    qkv_pass = T * QKV * 2 / 1e9
    return [
        _op("add_rms_norm", norm, lambda i: add_rms_norm_fused(i["x"], i["res"], i["w"], 1e-6, zero_centred=True),
            ("x", "res"), gbytes=8 * PASS, per_model=48),
        _op("gated_rms_norm", gated, lambda i: gated_rms_norm_fused(i["x"], z_of(i), i["w"], 1e-6), ("x",),
            gbytes=8 * PASS, per_model=18),
        _op("silu_mul", lambda: {"gu": _r(T, 2 * FFN, grad=True)},
            lambda i: silu_mul_fused(*split_columns(i["gu"], (FFN, FFN))), ("gu",),
            gbytes=8 * T * FFN * 2 / 1e9, per_model=24),
        _op("causal_conv1d", conv, lambda i: causal_conv1d_fused(i["x"], i["w"], i["cu"], i["cu"]), ("x",),
            gbytes=5 * qkv_pass, per_model=18),
        _op("gdn_gates", gates, lambda i: gdn_gates_fused(i["a"], i["b"], i["log"], i["dt"]), ("a", "b"),
            gbytes=T * HV * 28 / 1e9, per_model=18),
        _op("attention_prologue", prologue, prologue_op, ("qkv",),
            gbytes=(T * D * 2 * (2 * (NH + NKV) + 2 * (2 * NH + 2 * NKV) + NH + NKV)) / 1e9, per_model=6),
        _op("sigmoid_gate", lambda: {"x": _r(T, NH, D, grad=True), "g": _r(T, NH, D, grad=True)},
            lambda i: sigmoid_gate_fused(i["x"], i["g"]), ("x", "g"), gbytes=8 * PASS, per_model=6),
    ]


def _loss() -> list[Timed]:
    def make() -> Inputs:
        rows = torch.randperm(T, device="cuda")[:S].sort().values
        return {"h": _r(T, H, grad=True), "w": _r(V, H, scale=H**-0.5), "rows": rows,
                "targets": torch.randint(0, V, (S,), device="cuda")}

    return [
        _op("linear_cross_entropy", make,
            lambda i: linear_cross_entropy_fused(i["h"], i["w"], i["rows"], i["targets"]), ("h",),
            gflop=4 * S * H * V / 1e9),
        Timed(name="base product alone head", make=make, forward=lambda i: i["h"].detach()[:S] @ i["w"].t(),
              step=lambda i: (i["h"].detach()[:S] @ i["w"].t()) @ i["w"], gflop=4 * S * H * V / 1e9),
    ]


TIMED: tuple[Timed, ...] = (
    *_elementwise(),
    *_loss(),
    *_lora("gdn_in", H, (QKV, HV * K), 2 * HV, 18),
    *_lora("gdn_out", HV * K, (H,), 0, 18),
    *_lora("attention_in", H, (NH * 2 * D, NKV * D, NKV * D), 0, 6),
    *_lora("attention_out", NH * D, (H,), 0, 6),
    *_lora("gate_up", H, (FFN, FFN), 0, 24),
    *_lora("down", FFN, (H,), 0, 24),
)
