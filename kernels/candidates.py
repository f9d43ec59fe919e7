"""The fused implementations that `select_ops` may choose, and what each of them cannot serve."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparktune.kernels.shape import ModelShape

__all__ = ["FUSED", "Candidate"]

MAX_CONV_TAPS = 4
ATTENTION_HEAD_DIMS = (64, 128, 256)
DELTA_RULE_DIMS = (16, 32, 64, 128)


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
    replayable: bool = False
    """Its launches follow a row's documents only through the tables of kernels/tables.py, which are rewritten in place:
    a CUDA graph of them serves other packings."""


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


def _cannot_multiply(device: torch.device, dtype: torch.dtype) -> str:
    """Objects where a kernel built on tensor-core products cannot run."""
    if device.type != "cuda":
        return f"Triton kernels need a CUDA device, this is {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"its products are of bf16 or fp16, not {dtype}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs compute capability 8.0, this GPU has {torch.cuda.get_device_capability(device)}"
    return ""


def _attention(device: torch.device, dtype: torch.dtype, spec: ModelShape) -> str:
    if spec.head_dim not in ATTENTION_HEAD_DIMS:
        return f"head_dim {spec.head_dim} is none of {ATTENTION_HEAD_DIMS}"
    return _cannot_multiply(device, dtype)


def _flash(device: torch.device, dtype: torch.dtype, spec: ModelShape) -> str:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return "this PyTorch has no torch.nn.attention.varlen"
    if spec.head_dim % 8 or spec.head_dim > 256:
        return f"FlashAttention takes head_dim up to 256 in steps of 8, not {spec.head_dim}"
    return _cannot_multiply(device, dtype)


def _delta_rule(device: torch.device, dtype: torch.dtype, spec: ModelShape) -> str:
    for name, size in (("key", spec.gdn_key_dim), ("value", spec.gdn_value_dim)):
        if size not in DELTA_RULE_DIMS:
            return f"GDN {name} heads have {size} dims, the kernels take {DELTA_RULE_DIMS}"
    objection = _cannot_multiply(device, dtype)
    if objection or torch.cuda.get_device_capability(device)[0] != 9:
        return objection
    # Triton 3.6 places a wgmma operand outside its shared memory at 64 dims (compute-sanitizer on an H200, 2026-11-22).
    if (spec.gdn_key_dim, spec.gdn_value_dim) != (128, 128):
        return f"on Hopper it is verified for head dims of 128, not {spec.gdn_key_dim} and {spec.gdn_value_dim}"
    return ""


def _fla(device: torch.device, dtype: torch.dtype, spec: ModelShape) -> str:
    if importlib.util.find_spec("fla") is None:
        return "the package flash-linear-attention is not installed"
    objection = _cannot_multiply(device, dtype)
    if objection or torch.cuda.get_device_capability(device)[0] != 9:
        return objection
    # fla issue 640: Triton 3.4 to 3.7.0 miscompiles its gated backward on Hopper; tilelang has no grouped value heads
    if importlib.util.find_spec("tilelang") is None:
        return "on Hopper fla's gated backward needs the package tilelang"
    if spec.gdn_key_heads != spec.gdn_value_heads:
        return "on Hopper fla's gated backward needs as many key heads as value heads"
    return ""


def _triton(op: str, module: str, function: str) -> tuple[str, tuple[Candidate, ...]]:
    return op, (
        Candidate(
            name="triton", module=f"sparktune.kernels.{module}", function=function,
            objection=_conv if op == "causal_conv1d" else no_triton, replayable=True,
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
    ("gated_delta_rule", (
        Candidate(name="triton", module="sparktune.kernels.gated_delta_rule.function",
                  function="gated_delta_rule_fused", objection=_delta_rule, replayable=True),
        Candidate(name="fla", module="sparktune.kernels.gated_delta_rule.fla_function",
                  function="gated_delta_rule_fla", objection=_fla),
    )),
    ("varlen_attention", (
        Candidate(name="triton", module="sparktune.kernels.varlen_attention.function",
                  function="varlen_attention_fused", objection=_attention, replayable=True),
        Candidate(name="flash", module="sparktune.kernels.varlen_attention.function",
                  function="varlen_attention_flash", objection=_flash),
    )),
    _triton("linear_cross_entropy", "linear_cross_entropy.function", "linear_cross_entropy_fused"),
    _triton("lora_linear", "lora_linear.function", "lora_linear_fused"),
])
"""Op -> its fused candidates, best first."""
