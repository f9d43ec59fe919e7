"""The launches of attention and the gated delta rule on GB10, as their hosts make them: inputs of the sm_121a table."""

from __future__ import annotations

import torch

from sparktune.kernels.gated_delta_rule.function import (
    CHUNK,
    DeltaRuleSizes,
    delta_rule_backward,
    delta_rule_configs,
    delta_rule_forward,
)
from sparktune.kernels.varlen_attention.function import attention_backward, attention_forward
from sparktune.lab.shapes import SIZES
from sparktune.lab.sm121a import Launch, recorded_launches

__all__ = ["attention_launches", "delta_rule_launches", "mixer_launches"]

T = 5376
DOCUMENTS = (0, 1732, T)
GB10 = (12, 1)


def _t(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention_launches(label: str, heads: int, kv_heads: int, head_dim: int, window: int = 0) -> list[Launch]:
    """The three kernels of attention by document; q is the first half of an interleaved [q | gate]."""
    product = _t(T, heads * 2 * head_dim + 2 * kv_heads * head_dim)
    q = product[:, : heads * 2 * head_dim].unflatten(1, (heads, 2 * head_dim))[..., :head_dim]
    k, v = product[:, heads * 2 * head_dim :].unflatten(1, (2 * kv_heads, head_dim)).split(kv_heads, 1)
    with recorded_launches(label) as launches:
        o, lse = attention_forward(q, k, v, DOCUMENTS, head_dim**-0.5, window)
        attention_backward(q, k, v, o, lse, o, DOCUMENTS, head_dim**-0.5, window)
    return launches


def delta_rule_launches(label: str, key_heads: int, value_heads: int, dim: int = 128) -> list[Launch]:
    """The kernels of the delta rule, with the states kept and computed again; q, k, v are columns of one matrix."""
    widths = [key_heads * dim, key_heads * dim, value_heads * dim]
    q, k, v = (x.unflatten(1, (-1, dim)) for x in _t(T, sum(widths)).split(widths, 1))
    g = _t(T, value_heads, dtype=torch.float32)
    sizes = DeltaRuleSizes(
        boundaries=DOCUMENTS, scale=dim**-0.5, configs=delta_rule_configs(GB10), keep_states=True,
        constants={"HK": key_heads, "HV": value_heads, "K": dim, "V": dim, "C": CHUNK},
    )
    with recorded_launches(label) as launches:
        o, (gamma, rstd_q, rstd_k, inverse, *kept) = delta_rule_forward(q, k, v, g, g, sizes)
        for states in (tuple(kept), ()):
            delta_rule_backward(q, k, v, g, o, gamma, rstd_q, rstd_k, inverse, states, sizes)
    return launches


def mixer_launches(name: str) -> list[Launch]:
    """The distinct launches of both for Qwen3.5-`name`."""
    size = SIZES[name]
    launches: list[Launch] = []
    for launch in (
        *attention_launches(name, size.heads, size.kv_heads, 256), *delta_rule_launches(name, 16, size.value_heads),
    ):
        launches += [launch] if launch not in launches else []
    return launches
