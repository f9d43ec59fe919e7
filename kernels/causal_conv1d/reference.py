"""Depthwise causal convolution that restarts at every document; plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from sparktune.kernels.precision import working_dtype

__all__ = ["causal_conv1d_reference"]


def causal_conv1d_reference(
    x: torch.Tensor, weight: torch.Tensor, cu_seqlens: torch.Tensor, cu_seqlens_cpu: torch.Tensor,
    split: Sequence[int] | None = None, positions: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Returns silu(sum_j weight[:, j] * x[t - (W - 1) + j]); terms from before the document's start are zero.

    Args:
        x: [T, C], documents end to end.
        weight: [C, W]; the last tap meets the token itself.
        cu_seqlens: int32 [N + 1], from 0 to T, strictly increasing.
        cu_seqlens_cpu: the same on the host.
        split: widths of the segments (q, k, v) to return apart, or None.
        positions: each token's place in its document; not read here, the boundaries say it.

    Returns:
        [T, C] of x's dtype, or one [T, width] tensor a segment; computed in float32 (float64 for float64).
    """
    tokens, channels = x.shape
    taps = weight.shape[1]
    wide = working_dtype(x)
    lengths = torch.diff(cu_seqlens_cpu).long()
    # W - 1 rows of zeros before each document: every tap then is a plain shifted view and no boundary needs a mask.
    before = torch.arange(1, lengths.shape[0] + 1) * (taps - 1)
    place = (torch.arange(tokens) + torch.repeat_interleave(before, lengths)).to(x.device)
    padded_length = tokens + lengths.shape[0] * (taps - 1)
    padded = torch.zeros(padded_length, channels, dtype=wide, device=x.device).index_copy(0, place, x.to(wide))
    taps_first = weight.to(wide).t()
    total = padded[: padded_length - (taps - 1)] * taps_first[0]
    for tap in range(1, taps):
        total = torch.addcmul(total, padded[tap : padded_length - (taps - 1) + tap], taps_first[tap])
    y = F.silu(total.index_select(0, place - (taps - 1))).to(x.dtype)
    return y if split is None else y.split(list(split), dim=-1)
