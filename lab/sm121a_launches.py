"""The launches whose resources docs/results/sm121a_kernels.csv shows: every kernel at the shapes of real models."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sparktune.kernels.attention_prologue.triton import attention_prologue_bwd, attention_prologue_fwd
from sparktune.kernels.causal_conv1d.triton import causal_conv1d_bwd, causal_conv1d_fwd, token_positions
from sparktune.kernels.gated_delta_rule.gates import gdn_gates_bwd, gdn_gates_fwd
from sparktune.kernels.gated_rms_norm.triton import gated_rms_norm_bwd, gated_rms_norm_fwd
from sparktune.kernels.linear_cross_entropy.triton import scatter_rows, softmax_loss
from sparktune.kernels.rms_norm.triton import rms_norm_bwd, rms_norm_fwd
from sparktune.kernels.sigmoid_gate.triton import sigmoid_gate_bwd, sigmoid_gate_fwd
from sparktune.kernels.silu_mul.triton import silu_mul_bwd, silu_mul_fwd
from sparktune.lab.shapes import SIZES
from sparktune.lab.sm121a import Launch, recorded_launches
from sparktune.mtp.draft_kernels import block_loss_fused

__all__ = ["launches_of_size"]

T, D, R, K, V = 5376, 256, 64, 128, 248_320
BF16 = torch.bfloat16


def _t(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _norms(width: int) -> None:
    x, weight, rstd = _t(T, width), _t(width), _t(T, dtype=torch.float32)
    rms_norm_fwd(x, None, weight, 1e-6, True)
    rms_norm_fwd(x, x, weight, 1e-6, True)
    rms_norm_bwd(x, x, rstd, weight, x, True, False)
    rms_norm_bwd(x, x, rstd, weight, x, True, True)


def _gdn(value_heads: int, key_heads: int = 16) -> None:
    sizes = [key_heads * K, key_heads * K, value_heads * K]
    channels, width = sum(sizes), sum(sizes) + value_heads * (K + 2)
    product, grad = _t(T, width), _t(T, width)
    weight, cu = _t(channels, 4), _t(5, dtype=torch.int32)
    positions = token_positions(cu, T)
    outs = causal_conv1d_fwd(product[:, :channels], weight, positions, sizes)
    causal_conv1d_fwd(product[:, :channels], weight, positions, [channels])
    for weight_grad in (False, True):
        causal_conv1d_bwd(outs, product[:, :channels], weight, positions, weight_grad, grad[:, :channels])
    z = product[:, channels : channels + value_heads * K].unflatten(1, (value_heads, K))
    o, norm = _t(T, value_heads, K), _t(K)
    gated_rms_norm_fwd(o, z, norm, 1e-6)
    gated_rms_norm_bwd(o, o, z, norm, 1e-6, False)
    gated_rms_norm_bwd(o, o, z, norm, 1e-6, True)
    b, a = product[:, -2 * value_heads :].split(value_heads, 1)
    log, bias = _t(value_heads, dtype=torch.float32), _t(value_heads, dtype=torch.float32)
    g, beta = gdn_gates_fwd(a, b, log, bias)
    for param_grad in (False, True):
        gdn_gates_bwd(g, beta, a, b, log, bias, torch.empty_like(a), torch.empty_like(b), param_grad)


def _attention(heads: int, kv: int) -> None:
    product = _t(T, heads * 2 * D + 2 * kv * D)
    q = product[:, : heads * 2 * D].unflatten(1, (heads, 2 * D))
    k = product[:, heads * 2 * D : heads * 2 * D + kv * D].unflatten(1, (kv, D))
    cos = _t(T, R, dtype=torch.float32)
    weight = _t(D)
    q_out, k_out = attention_prologue_fwd(q[..., :D], k, weight, weight, cos, cos, 1e-6, True)
    outs = (q[..., :D], k, q[..., D:])
    for weight_grad in (False, True):
        attention_prologue_bwd(
            (q_out, k_out, q_out), q[..., :D], k, weight, weight, cos, cos, 1e-6, True, outs, weight_grad
        )
    sigmoid_gate_fwd(q_out, q[..., D:])
    sigmoid_gate_bwd(q_out, q_out, q[..., D:])


def _mlp(ffn: int) -> None:
    product = _t(T, 2 * ffn)
    y = silu_mul_fwd(product[:, :ffn], product[:, ffn:])
    silu_mul_bwd(y, product[:, :ffn], product[:, ffn:])


def _loss(hidden: int) -> None:
    S = 1881
    for grad in (False, True):
        softmax_loss(_t(S, V), _t(S, dtype=torch.int64), _t(S, dtype=torch.float32), grad)
    scatter_rows(_t(S, hidden, dtype=torch.float32), _t(S, dtype=torch.int64), _t(dtype=torch.float32), T, BF16)


def _drafts() -> None:
    S, B = 941, 1024
    for kind in ("kl", "lk"):
        block_loss_fused(_t(B, V), _t(S, V), _t(S, dtype=torch.int64), kind)


def launches_of_size(name: str) -> list[Launch]:
    """Returns the distinct launches of a training step's own kernels for Qwen3.5-`name`: LoRA, full, MTP head."""
    size = SIZES[name]
    parts: list[Callable[[], None]] = [
        lambda: _norms(size.hidden), lambda: _gdn(size.value_heads), lambda: _attention(size.heads, size.kv_heads),
        lambda: _mlp(size.ffn), lambda: _loss(size.hidden), _drafts,
    ]
    launches: list[Launch] = []
    for part in parts:
        with recorded_launches(name) as found:
            part()
        launches += [x for x in found if x not in launches]
    return launches
