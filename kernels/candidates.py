"""The fused implementations that `select_ops` may choose, and what each of them cannot serve."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparktune.kernels.shape import ModelShape

__all__ = ["FUSED", "Candidate"]

MAX_CONV_TAPS = 4


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A fused implementation that may serve an op."""

    name: str
    """What logs call it, for example triton."""
    module: str
    """Module that holds the function; imported only when the candidate is chosen."""
    function: str
    objection: Callable[[torch.device, torch.dtype, ModelShape], str]
    """Returns why it cannot serve this device, type and model; empty when it can. Must not import the module."""


def no_triton(device: torch.device, dtype: torch.dtype, spec: ModelShape) -> str:
    """Objects where Triton kernels cannot run: no CUDA device, no Triton, a type without kernels."""
    if device.type != "cuda":
        return f"Triton kernels need a CUDA device, this is {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"no kernel computes in {dtype}"
    return ""


def _conv(device: torch.device, dtype: torch.dtype, spec: ModelShape) -> str:
    if spec.gdn_conv_kernel > MAX_CONV_TAPS:
        return f"the convolution has {spec.gdn_conv_kernel} taps, the kernel at most {MAX_CONV_TAPS}"
    return no_triton(device, dtype, spec)


def _triton(op: str, module: str, function: str) -> tuple[str, tuple[Candidate, ...]]:
    return op, (
        Candidate(
            name="triton", module=f"sparktune.kernels.{module}", function=function,
            objection=_conv if op == "causal_conv1d" else no_triton,
        ),
    )


FUSED: dict[str, tuple[Candidate, ...]] = dict([
    _triton("rms_norm", "rms_norm.function", "rms_norm_fused"),
    _triton("add_rms_norm", "rms_norm.function", "add_rms_norm_fused"),
    _triton("gated_rms_norm", "gated_rms_norm.function", "gated_rms_norm_fused"),
    _triton("silu_mul", "silu_mul.function", "silu_mul_fused"),
    _triton("attention_prologue", "attention_prologue.function", "attention_prologue_fused"),
    _triton("sigmoid_gate", "sigmoid_gate.function", "sigmoid_gate_fused"),
    _triton("causal_conv1d", "causal_conv1d.function", "causal_conv1d_fused"),
    _triton("gdn_gates", "gated_delta_rule.gates", "gdn_gates_fused"),
    _triton("linear_cross_entropy", "linear_cross_entropy.function", "linear_cross_entropy_fused"),
    _triton("lora_linear", "lora_linear.function", "lora_linear_fused"),
])
"""Op -> its fused candidates, best first."""
