"""Softmax attention by document: projections, norms and rotary embedding, attention, output gate, output."""

from __future__ import annotations

import torch
from torch import nn

from sparktune.kernels.modules.decoding import AttentionCache
from sparktune.kernels.modules.projection import ProjectionGroup
from sparktune.kernels.modules.row import Row
from sparktune.kernels.select import OpTable
from sparktune.kernels.shape import ModelShape

__all__ = ["Attention"]


class Attention(nn.Module):
    """Grouped-query attention of the dense families and of Qwen3.5's full_attention layers.

    Args:
        shape: of the model.
        window: tokens a token sees, itself included; None for all.
        ops: the model's ops.
        dtype: compute type.
        device: of the weights.
    """

    def __init__(
        self, shape: ModelShape, window: int | None, ops: OpTable, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.ops, self.window = ops, window
        self.head_dim, self.n_heads, self.n_kv_heads = shape.head_dim, shape.num_heads, shape.num_kv_heads
        self.eps, self.zero_centred, self.gated = shape.norm_eps, shape.zero_centred_norm, shape.attention_gate
        self.scale = shape.head_dim**-0.5
        width = shape.head_dim * (2 if self.gated else 1)
        sizes = (self.n_heads * width, self.n_kv_heads * self.head_dim, self.n_kv_heads * self.head_dim)
        self.qkv_proj: nn.Module = ProjectionGroup(
            ("q_proj", "k_proj", "v_proj"), sizes, shape.hidden_size, bias=shape.attention_bias, dtype=dtype,
            device=device,
        )
        self.o_proj: nn.Module = ProjectionGroup(
            ("o_proj",), (shape.hidden_size,), self.n_heads * self.head_dim, bias=shape.attention_output_bias,
            dtype=dtype, device=device,
        )
        self.q_norm: nn.Parameter | None = None
        self.k_norm: nn.Parameter | None = None
        if shape.qk_norm:
            self.q_norm = nn.Parameter(torch.empty(self.head_dim, dtype=dtype, device=device), requires_grad=False)
            self.k_norm = nn.Parameter(torch.empty(self.head_dim, dtype=dtype, device=device), requires_grad=False)

    def forward(self, x: torch.Tensor, row: Row, cache: AttentionCache | None = None) -> torch.Tensor:
        """Mixes tokens within their documents.

        Args:
            x: [T, H], normed.
            row: the documents.
            cache: of generation: the first call (one document) fills it, later calls bring one token each.

        Returns:
            [T, H].
        """
        tokens = x.shape[0]
        q, k, v = self.qkv_proj(x, row.dropout)
        q, k, gate = self.ops.attention_prologue(
            q.unflatten(-1, (self.n_heads, -1)), k.unflatten(-1, (self.n_kv_heads, -1)), self.q_norm, self.k_norm,
            row.cos, row.sin, self.eps, zero_centred=self.zero_centred, gated=self.gated,
        )
        v = v.unflatten(-1, (self.n_kv_heads, -1))
        first = cache is None or cache.length == 0
        if cache is not None:
            keys, values = cache.append(k, v)
        if first:
            o = self.ops.varlen_attention(
                q, k, v, row.cu_seqlens, row.cu_seqlens_cpu, row.max_seqlen, scale=self.scale, window=self.window
            )
        else:
            o = AttentionCache.attend(q, keys, values, self.scale, self.window)
        if gate is not None:
            o = self.ops.sigmoid_gate(o, gate)
        (y,) = self.o_proj(o.reshape(tokens, -1), row.dropout)
        return y
