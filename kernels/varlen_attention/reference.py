"""Causal attention by document over PyTorch's scaled_dot_product_attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["varlen_attention_reference"]

_BUCKET = 32
"""Documents whose lengths round up to the same multiple share one call; causality hides the padding at the end."""


def _band(length: int, window: int, device: torch.device) -> torch.Tensor:
    """Returns a [length, length] mask, True where key j is at most window - 1 before query i and not after it."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """q [B, L, nH, D], k and v [B, L, nKV, D] -> [B, L, nH, D]."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    length = q.shape[2]
    if window is None or window >= length:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)
    mask = _band(length, window, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def varlen_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, cu_seqlens_cpu: torch.Tensor,
    max_seqlen: int, *, scale: float, window: int | None = None,
) -> torch.Tensor:
    """Returns softmax(scale * q k^T) v where a token sees itself and what precedes it in its own document.

    Args:
        q: [T, nH, D], documents end to end.
        k: [T, nKV, D]; query head h uses key head h // (nH / nKV).
        v: [T, nKV, D].
        cu_seqlens: int32 [N + 1], from 0 to T, strictly increasing.
        cu_seqlens_cpu: the same on the host.
        max_seqlen: longest document.
        scale: factor on the scores.
        window: a token sees at most this many tokens, itself included; None for all.

    Returns:
        [T, nH, D] of q's dtype.
    """
    starts = cu_seqlens_cpu[:-1].tolist()
    lengths = torch.diff(cu_seqlens_cpu).tolist()
    if len(starts) == 1:
        return _attend(q[None], k[None], v[None], scale, window)[0]
    buckets: dict[int, list[int]] = {}
    for document, length in enumerate(lengths):
        buckets.setdefault(-(-length // _BUCKET) * _BUCKET, []).append(document)
    pieces, order = [], []
    for rounded, documents in buckets.items():
        padded = min(rounded, max(lengths[d] for d in documents))
        column = torch.arange(padded)
        begin = torch.tensor([starts[d] for d in documents])[:, None]
        real = column < torch.tensor([lengths[d] for d in documents])[:, None]
        # Padding repeats the document's first token: finite, after every real token, and dropped below.
        source = (begin + column * real).to(q.device)
        out = _attend(q[source], k[source], v[source], scale, window)
        pieces.append(out[real.to(q.device)])
        order.append((begin + column)[real])
    place = torch.cat(order).to(q.device)
    return torch.zeros_like(q).index_copy(0, place, torch.cat(pieces))
