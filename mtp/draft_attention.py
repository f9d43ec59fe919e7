"""Attention of a drafted token: its own document up to the anchor, and the drafts made since then.

Legend: T rows (one anchor each), nH query heads, nKV key heads, D head dim, E drafts so far, this one included.

Serving keeps keys made from the base's hidden states for every token up to the anchor t, and appends one key a draft.
So the k-th draft of anchor t sees step 0's keys 0..t and its own earlier drafts, never those of another anchor:

    o_t = softmax([scale * q_t k0_j for j <= t in t's document] + [scale * q_t ke_t for each e]) [v0; ve]

Source: the training-time test of EAGLE-3 (Li et al. 2025): a mask that is causal over step 0, diagonal over later ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from sparktune.kernels.select import OpTable

__all__ = ["DraftAttention", "draft_attention_fused", "draft_attention_reference", "select_draft_attention"]

DraftAttention = Callable[..., torch.Tensor]
"""(q, k, v, draft_k, draft_v, cu_seqlens_cpu, *, scale) -> o"""


def draft_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, draft_k: torch.Tensor, draft_v: torch.Tensor,
    cu_seqlens_cpu: torch.Tensor, *, scale: float,
) -> torch.Tensor:
    """Returns the drafts' attention [T, nH, D], document by document, with the scores in memory.

    Args:
        q: [T, nH, D].
        k: step 0's keys [T, nKV, D]; query head h uses key head h // (nH / nKV).
        v: step 0's values [T, nKV, D].
        draft_k: keys of the drafts since the anchor, [E, T, nKV, D], E >= 1.
        draft_v: their values, [E, T, nKV, D].
        cu_seqlens_cpu: int32 [N + 1], from 0 to T, strictly increasing.
        scale: factor on the scores.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    draft_k, draft_v = (x.repeat_interleave(groups, dim=2) for x in (draft_k, draft_v))
    pieces = []
    boundaries = cu_seqlens_cpu.tolist()
    for begin, end in itertools.pairwise(boundaries):
        span = slice(begin, end)
        past = torch.einsum("ihd,jhd->hij", q[span], k[span])
        later = torch.ones(end - begin, end - begin, dtype=torch.bool, device=q.device).triu(1)
        own = torch.einsum("ihd,eihd->hie", q[span], draft_k[:, span])
        scores = torch.cat((past.masked_fill(later, -torch.inf), own), dim=-1) * scale
        weights = scores.to(torch.promote_types(q.dtype, torch.float32)).softmax(-1).to(q.dtype)
        of_past, of_own = weights[..., : end - begin], weights[..., end - begin :]
        pieces.append(
            torch.einsum("hij,jhd->ihd", of_past, v[span]) + torch.einsum("hie,eihd->ihd", of_own, draft_v[:, span])
        )
    return torch.cat(pieces)


class _DraftAttention(torch.autograd.Function):
    """Step 0 by the varlen kernels; the few drafts are merged into its softmax by their log-sum-exp.

    The varlen backward recomputes probabilities from the log-sum-exp it is given and takes rowsum(do * o) from the
    output it is given. Handed the merged ones, it returns exactly step 0's share of the merged softmax's gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, draft_k: torch.Tensor, draft_v: torch.Tensor,
        boundaries: tuple[int, ...], scale: float,
    ) -> torch.Tensor:
        from sparktune.kernels.varlen_attention.function import attention_forward

        past, lse = attention_forward(q, k, v, boundaries, scale, 0)
        own = _own_scores(q, draft_k) * (scale * math.log2(math.e))
        merged = torch.logaddexp2(lse.t(), torch.logsumexp(own * math.log(2), 0) / math.log(2))
        share = torch.exp2(own - merged)
        o = past.float() * torch.exp2(lse.t() - merged)[..., None]
        for weight, value in zip(share, draft_v, strict=True):
            o += weight[..., None] * _per_head(value, q.shape[1])
        o = o.to(q.dtype)
        ctx.save_for_backward(q, k, v, draft_k, draft_v, o, merged)
        ctx.sizes = (boundaries, scale)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from sparktune.kernels.varlen_attention.function import attention_backward

        q, k, v, draft_k, draft_v, o, merged = ctx.saved_tensors
        boundaries, scale = ctx.sizes
        do = do.contiguous()
        dq, dk, dv = attention_backward(q, k, v, o, merged.t().contiguous(), do, boundaries, scale, 0)
        wide_do, wide_q, wide_dq = do.float(), q.float(), dq.float()
        delta = (wide_do * o).sum(-1)
        share = torch.exp2(_own_scores(q, draft_k) * (scale * math.log2(math.e)) - merged)
        d_keys, d_values = torch.empty_like(draft_k), torch.empty_like(draft_v)
        for i, (weight, key, value) in enumerate(zip(share, draft_k, draft_v, strict=True)):
            slope = weight * ((wide_do * _per_head(value, q.shape[1])).sum(-1) - delta) * scale
            wide_dq += slope[..., None] * _per_head(key, q.shape[1])
            d_keys[i] = _per_key_head(slope[..., None] * wide_q, k.shape[1])
            d_values[i] = _per_key_head(weight[..., None] * wide_do, k.shape[1])
        return wide_dq.to(q.dtype), dk, dv, d_keys, d_values, None, None


def _per_head(x: torch.Tensor, n_heads: int) -> torch.Tensor:
    """[T, nKV, D] -> float32 [T, nH, D], every key head repeated for its query heads."""
    return x.float().repeat_interleave(n_heads // x.shape[1], dim=1)


def _per_key_head(x: torch.Tensor, n_kv_heads: int) -> torch.Tensor:
    """[T, nH, D] -> [T, nKV, D], the sum over the query heads of each key head."""
    return x.unflatten(1, (n_kv_heads, -1)).sum(2)


def _own_scores(q: torch.Tensor, draft_k: torch.Tensor) -> torch.Tensor:
    """q k^T of every row with its own drafts, float32 [E, T, nH]."""
    return torch.stack([(q.float() * _per_head(key, q.shape[1])).sum(-1) for key in draft_k])


def draft_attention_fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, draft_k: torch.Tensor, draft_v: torch.Tensor,
    cu_seqlens_cpu: torch.Tensor, *, scale: float,
) -> torch.Tensor:
    """The same as `draft_attention_reference` over the Triton kernels of kernels/varlen_attention.

    Their domain: D one of 64, 128, 256; bf16 or fp16 on a GPU. Nothing of size T x T is kept.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return _DraftAttention.apply(q, k, v, draft_k, draft_v, tuple(cu_seqlens_cpu.tolist()), scale)


def select_draft_attention(ops: OpTable) -> tuple[DraftAttention, str]:
    """Returns the implementation that goes with the model's choice of `varlen_attention`, and why."""
    if ops.varlen_attention.__name__ == "varlen_attention_fused":
        return draft_attention_fused, f"fused, over varlen_attention's kernels ({ops.reasons['varlen_attention']})"
    return draft_attention_reference, f"reference, as varlen_attention: {ops.reasons['varlen_attention']}"
