"""`attention_prologue` on the Triton kernels: the same signature as its reference."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from sparktune.kernels.attention_prologue.triton import attention_prologue_bwd, attention_prologue_fwd
from sparktune.kernels.columns import GradColumns, grad_columns

__all__ = ["attention_prologue_fused"]


def _inner(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _place(columns: GradColumns | None, x: torch.Tensor) -> torch.Tensor:
    """Returns where the gradient of x goes: its columns of the grouped gradient, or a new tensor."""
    place = None if columns is None else columns.claim()
    if place is None:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return place.unflatten(1, x.shape[1:])


def _norm_grads(
    ctx: Any, first: int, grads: tuple[torch.Tensor, torch.Tensor] | tuple[None, None],
    weights: tuple[torch.Tensor | None, torch.Tensor | None],
) -> list[torch.Tensor | None]:
    return [
        g.to(w.dtype) if g is not None and w is not None and ctx.needs_input_grad[first + i] else None
        for i, (g, w) in enumerate(zip(grads, weights, strict=True))
    ]


class _AttentionPrologue(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
        cos: torch.Tensor, sin: torch.Tensor, eps: float, zero_centred: bool, gated: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        ctx.places = grad_columns(q), grad_columns(k)
        q, k = _inner(q), _inner(k)
        D = k.shape[2]
        raw = q[..., :D]
        q_out, k_out = attention_prologue_fwd(raw, k, q_weight, k_weight, cos, sin, eps, zero_centred)
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)
        ctx.eps, ctx.zero_centred, ctx.gated = eps, zero_centred, gated
        return q_out, k_out, q[..., D:] if gated else None

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dq: torch.Tensor, dk: torch.Tensor, dgate: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
        D = k.shape[2]
        q_grad, k_grad = (_place(p, x) for p, x in zip(ctx.places, (q, k), strict=True))
        weights = attention_prologue_bwd(
            (_inner(dq), _inner(dk), _inner(dgate) if ctx.gated else None), q[..., :D], k, q_weight, k_weight,
            cos, sin, ctx.eps, ctx.zero_centred, (q_grad[..., :D], k_grad, q_grad[..., D:]),
            ctx.needs_input_grad[2] or ctx.needs_input_grad[3],
        )
        return q_grad, k_grad, *_norm_grads(ctx, 2, weights, (q_weight, k_weight)), None, None, None, None, None


def _check_angles(tokens: int, D: int, cos: torch.Tensor, sin: torch.Tensor) -> None:
    if cos.shape != sin.shape or cos.dim() != 2 or cos.shape[0] != tokens or cos.shape[1] > D or cos.shape[1] % 2:
        raise ValueError(
            f"attention_prologue needs cos and sin [{tokens}, R] with R even and at most {D}, got "
            f"{tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if cos.stride() != sin.stride() or cos.stride(1) != 1 or cos.dtype != torch.float32:
        raise ValueError("attention_prologue needs cos and sin in fp32 with equal strides; build both with one layout")


def attention_prologue_fused(
    q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, cos: torch.Tensor,
    sin: torch.Tensor, eps: float, *, zero_centred: bool, gated: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """q/k norm over the head dimension, partial rotary embedding and the gate's split, one launch each way.

    Args:
        q: [T, nH, 2D], each head [q | gate], if gated; else [T, nH, D]. Tokens may be strided.
        k: [T, nKV, D]. Tokens may be strided.
        q_weight: [D] or None for no norm.
        k_weight: [D] or None for no norm.
        cos: fp32 [T, R], R <= D; each half of R belongs to one half of the rotated pairs.
        sin: fp32 [T, R], cos's layout.
        eps: added to the mean square.
        zero_centred: norm by (1 + weight) instead of weight.
        gated: q carries a gate.

    Returns:
        q [T, nH, D] and k [T, nKV, D], contiguous, in their dtype, and the gate [T, nH, D], a view of q, or None.

    Raises:
        ValueError: shapes or layouts do not fit together.
    """
    D = k.shape[2]
    if q.shape[2] != (2 * D if gated else D):
        raise ValueError(f"q's last dimension is {q.shape[2]}; with head_dim {D} and gated={gated} it must be "
                         f"{2 * D if gated else D}")
    _check_angles(q.shape[0], D, cos, sin)
    return _AttentionPrologue.apply(q, k, q_weight, k_weight, cos, sin, eps, zero_centred, gated)
