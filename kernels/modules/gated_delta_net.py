"""Qwen3.5's linear attention: projections, causal convolution, gated delta rule, gated norm, output."""

from __future__ import annotations

import torch
from torch import nn

from sparktune.kernels.gated_delta_rule.reference import gated_delta_rule_last_state
from sparktune.kernels.modules.decoding import DeltaNetCache
from sparktune.kernels.modules.projection import ProjectionGroup
from sparktune.kernels.modules.row import Row
from sparktune.kernels.select import OpTable
from sparktune.kernels.shape import ModelShape

__all__ = ["GatedDeltaNet"]


class GatedDeltaNet(nn.Module):
    """A GDN layer in which convolution and recurrence restart at the same document boundaries.

    Args:
        shape: of the model.
        ops: the model's ops.
        dtype: compute type; A_log and dt_bias are kept in float32 (float64 in float64).
        device: of the weights.
    """

    def __init__(self, shape: ModelShape, ops: OpTable, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.ops, self.eps = ops, shape.norm_eps
        self.key_heads, self.value_heads = shape.gdn_key_heads, shape.gdn_value_heads
        key, value = shape.gdn_key_heads * shape.gdn_key_dim, shape.gdn_value_heads * shape.gdn_value_dim
        self.channels = (key, key, value)
        self.in_proj: nn.Module = ProjectionGroup(
            ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
            (2 * key + value, value, self.value_heads, self.value_heads), shape.hidden_size, bias=False, dtype=dtype,
            device=device,
        )
        self.out_proj: nn.Module = ProjectionGroup(
            ("out_proj",), (shape.hidden_size,), value, bias=False, dtype=dtype, device=device
        )
        wide = torch.promote_types(dtype, torch.float32)

        def frozen(*size: int, of: torch.dtype = dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(*size, dtype=of, device=device), requires_grad=False)

        self.conv1d = frozen(2 * key + value, shape.gdn_conv_kernel)
        self.A_log = frozen(self.value_heads, of=wide)
        self.dt_bias = frozen(self.value_heads, of=wide)
        self.norm = frozen(shape.gdn_value_dim)

    def forward(self, x: torch.Tensor, row: Row, cache: DeltaNetCache | None = None) -> torch.Tensor:
        """Mixes tokens within their documents.

        Args:
            x: [T, H], normed.
            row: the documents.
            cache: of generation: the first call (one document) fills it, later calls bring a few tokens.

        Returns:
            [T, H].
        """
        tokens = x.shape[0]
        qkv, z, b, a = self.in_proj(x, row.dropout)
        z = z.unflatten(-1, (self.value_heads, -1))
        g, beta = self.ops.gdn_gates(a, b, self.A_log, self.dt_bias)
        if cache is None or cache.empty:
            q, k, v = self.ops.causal_conv1d(
                qkv, self.conv1d, row.cu_seqlens, row.cu_seqlens_cpu, split=self.channels, positions=row.positions
            )
        else:
            q, k, v = cache.convolve(qkv, self.conv1d).split(self.channels, dim=-1)
        q, k = q.unflatten(-1, (self.key_heads, -1)), k.unflatten(-1, (self.key_heads, -1))
        v = v.unflatten(-1, (self.value_heads, -1))
        if cache is None:
            o = self.ops.gated_delta_rule(q, k, v, g, beta, row.cu_seqlens, row.cu_seqlens_cpu)
        elif cache.state is None:
            cache.remember(qkv, self.conv1d.shape[1])
            o, cache.state = gated_delta_rule_last_state(q, k, v, g, beta)
        else:
            o = cache.advance(q, k, v, g, beta)
        o = self.ops.gated_rms_norm(o, z, self.norm, self.eps)
        (y,) = self.out_proj(o.reshape(tokens, -1), row.dropout)
        return y
