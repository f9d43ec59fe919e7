"""A group of projections that share their input, with LoRA adapters; plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from sparktune.kernels.frozen_weight import FrozenWeight, frozen_linear

__all__ = ["lora_linear_reference"]


def lora_linear_reference(
    x: torch.Tensor, weight: torch.Tensor | FrozenWeight, bias: torch.Tensor | None, lora_a: torch.Tensor,
    lora_b: torch.Tensor, out_sizes: Sequence[int], scale: float, dropout_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns x W^T + bias + scale * (x * mask) A_i^T B_i^T, the projections' outputs side by side.

    Rows of `weight` beyond sum(out_sizes) are projections without an adapter (in_proj_b and in_proj_a by default).

    Args:
        x: [T, in].
        weight: [N, in], N >= sum(out_sizes); a tensor, or stored in fewer bits.
        bias: [N] or None.
        lora_a: [G * r, in], the rows i * r to (i + 1) * r of projection i; any dtype, used in x's.
        lora_b: [sum(out_sizes), r].
        out_sizes: output width of each of the G adapted projections, in order.
        scale: alpha / r or alpha / sqrt(r).
        dropout_mask: [T, in] of x's dtype, 0 or 1 / (1 - p); one mask for the group. None for no dropout.

    Returns:
        [T, N] of x's dtype.
    """
    base = frozen_linear(x, weight, bias)
    low = F.linear(x if dropout_mask is None else x * dropout_mask, lora_a.to(x.dtype))
    ups = (lora_b * scale).to(x.dtype).split(list(out_sizes))
    # One block-diagonal product for the group: the extra zeros cost less than further passes over [T, N].
    up = torch.block_diag(*ups) if len(ups) > 1 else ups[0]
    return torch.addmm(base, low, F.pad(up, (0, 0, 0, base.shape[1] - up.shape[0])).t())
