"""Causal attention by document on a GPU: our Triton kernels, and PyTorch's FlashAttention as a second candidate.

Legend: T tokens, N documents, nH query heads, nKV key heads, D head dim.
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass
from functools import cache

import torch
import triton

from sparktune.kernels.tables import boundaries_of, document_table
from sparktune.kernels.varlen_attention.triton import (
    attention_dkv_kernel,
    attention_dq_kernel,
    attention_forward_kernel,
    reduce_heads_kernel,
)

__all__ = [
    "HEAD_DIMS",
    "KernelConfig",
    "attention_backward",
    "attention_configs",
    "attention_forward",
    "document_tiles",
    "varlen_attention_flash",
    "varlen_attention_fused",
]

HEAD_DIMS = (64, 128, 256)


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """The tile of one kernel."""

    block_m: int
    """Queries a block."""
    block_n: int
    """Keys a block."""
    num_warps: int
    num_stages: int
    heads_per_program: int = 0
    """Query heads that one dk/dv program adds up; 0 means all that share a key head. A smaller number gives more
    programs and costs a float32 partial sum a query head in memory."""


def _config(block_m: int, block_n: int, num_warps: int, num_stages: int, heads: int = 0) -> KernelConfig:
    return KernelConfig(
        block_m=block_m, block_n=block_n, num_warps=num_warps, num_stages=num_stages, heads_per_program=heads
    )


# Within 101,376 bytes of shared memory and without spills on sm_121a (the tests compile every one of them there).
SMALL_SHARED_MEMORY = {
    64: (_config(128, 64, 8, 2), _config(64, 64, 4, 2), _config(32, 64, 4, 1)),
    128: (_config(64, 64, 4, 2), _config(64, 32, 4, 2), _config(32, 64, 8, 2)),
    256: (_config(64, 64, 8, 1), _config(64, 32, 8, 1), _config(32, 32, 8, 1)),
}
# Hopper: 232,448 bytes of shared memory and wgmma.
HOPPER = {
    64: (_config(128, 128, 8, 2), _config(128, 64, 8, 2), _config(64, 128, 8, 1, 1)),
    128: (_config(128, 64, 8, 3), _config(128, 64, 8, 2), _config(64, 64, 8, 2, 1)),
    256: (_config(128, 64, 8, 2), _config(128, 32, 8, 2), _config(32, 64, 8, 2, 1)),
}


@cache
def attention_configs(capability: tuple[int, int], head_dim: int) -> tuple[KernelConfig, KernelConfig, KernelConfig]:
    """Returns the configurations of the forward, dq and dk/dv kernels for a device of this compute capability."""
    table = HOPPER if capability[0] == 9 else SMALL_SHARED_MEMORY
    return table[head_dim]


def _capability(tensor: torch.Tensor) -> tuple[int, int]:
    # The interpreter runs the kernels on host tensors; there the small tiles are the fast ones.
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (0, 0)


def document_tiles(boundaries: tuple[int, ...], block: int, device: torch.device, *, of_keys: bool) -> torch.Tensor:
    """Lists one tile per `block` tokens of every document, the costliest first.

    Args:
        boundaries: document boundaries, N + 1 numbers.
        block: tokens a tile.
        device: where the kernels run.
        of_keys: the tiles are blocks of keys, whose work lies between them and the document's end; otherwise blocks
            of queries, whose work lies between the document's begin and them.

    Returns:
        int32 [tiles, 3]: first token, document's begin, document's end. Kept by value of the arguments: every layer of
        a micro-batch reads the same table.
    """

    def rows(boundaries: tuple[int, ...]) -> list[tuple[int, int, int]]:
        spans = itertools.pairwise(boundaries)
        tiles = [(start, begin, end) for begin, end in spans for start in range(begin, end, block)]
        # Long programs first, so that a grid's last ones are short and no multiprocessor waits for a straggler.
        return sorted(tiles, key=lambda tile: tile[0] - tile[2] if of_keys else tile[1] - tile[0])

    return document_table(("attention", block, of_keys), boundaries, device, rows, width=3, block=block)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> None:
    n_tokens, n_heads, head_dim = q.shape
    if head_dim not in HEAD_DIMS or k.shape[-1] != head_dim or v.shape[-1] != head_dim:
        raise ValueError(
            f"head dims must be equal and one of {HEAD_DIMS}; q, k, v have {head_dim}, {k.shape[-1]}, {v.shape[-1]}. "
            "Use the reference attention for other sizes."
        )
    if k.shape != v.shape or k.shape[0] != n_tokens or n_heads % k.shape[1]:
        raise ValueError(
            f"k and v must be [{n_tokens}, nKV, {head_dim}] with nKV dividing {n_heads}; "
            f"got {tuple(k.shape)} and {tuple(v.shape)}."
        )
    # The kernels count elements of a row's tensors in 32 bits.
    if n_tokens * max(q.stride(0), k.stride(0), v.stride(0), n_heads * head_dim) >= 2**31:
        raise ValueError(
            f"{n_tokens} tokens with {max(q.stride(0), k.stride(0), v.stride(0))} elements between them exceed the "
            "kernels' 32-bit offsets. Lower the pack length."
        )
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 token or None; got {window}.")


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, boundaries: tuple[int, ...], scale: float, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the forward kernel; returns o [T, nH, D] and lse fp32 [nH, T] (base 2)."""
    n_tokens, n_heads, head_dim = q.shape
    config = attention_configs(_capability(q), head_dim)[0]
    tiles = document_tiles(boundaries, config.block_m, q.device, of_keys=False)
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty((n_heads, n_tokens), dtype=torch.float32, device=q.device)
    attention_forward_kernel[(tiles.shape[0] * n_heads,)](
        q, k, v, o, lse, tiles, q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        n_tokens, scale, nH=n_heads, G=n_heads // k.shape[1], D=head_dim, BM=config.block_m, BN=config.block_n,
        WINDOW=window, num_warps=config.num_warps, num_stages=config.num_stages,
    )
    return o, lse


def attention_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, lse: torch.Tensor, do: torch.Tensor,
    boundaries: tuple[int, ...], scale: float, window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs the dq kernel, then the dk and dv kernel; returns contiguous dq, dk, dv."""
    n_tokens, n_heads, head_dim = q.shape
    n_kv = k.shape[1]
    group = n_heads // n_kv
    _, for_dq, for_dkv = attention_configs(_capability(q), head_dim)
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), do.stride(0), do.stride(1))
    delta = torch.empty_like(lse)
    dq = torch.empty_like(o)
    tiles = document_tiles(boundaries, for_dq.block_m, q.device, of_keys=False)
    attention_dq_kernel[(tiles.shape[0] * n_heads,)](
        q, k, v, o, do, lse, delta, dq, tiles, *strides, n_tokens, scale, nH=n_heads, G=group, D=head_dim,
        BM=for_dq.block_m, BN=for_dq.block_n, WINDOW=window, num_warps=for_dq.num_warps, num_stages=for_dq.num_stages,
    )
    heads = for_dkv.heads_per_program or group
    if group % heads:
        heads = 1
    dkv = torch.empty((2, n_tokens, n_kv, head_dim), dtype=k.dtype, device=k.device)
    parts = dkv
    if heads < group:
        parts = torch.empty((2, n_tokens, n_heads // heads, head_dim), dtype=torch.float32, device=k.device)
    tiles = document_tiles(boundaries, for_dkv.block_n, q.device, of_keys=True)
    attention_dkv_kernel[(tiles.shape[0] * (n_heads // heads),)](
        q, k, v, do, lse, delta, parts[0], parts[1], tiles, *strides, n_tokens, scale, G=group, GP=heads,
        NS=n_heads // heads, D=head_dim, BM=for_dkv.block_m, BN=for_dkv.block_n, WINDOW=window,
        num_warps=for_dkv.num_warps, num_stages=for_dkv.num_stages,
    )
    if heads < group:
        rows = 2 * n_tokens * n_kv
        reduce_heads_kernel[(triton.cdiv(rows, 16),)](parts, dkv, rows, S=group // heads, D=head_dim, BR=16)
    return dq, dkv[0], dkv[1]


class VarlenAttentionFunction(torch.autograd.Function):
    """Saves q, k, v, o and the log-sum-exp; recomputes the probabilities in the backward."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        boundaries: tuple[int, ...], scale: float, window: int,
    ) -> torch.Tensor:
        """Returns o [T, nH, D]."""
        q, k, v = _rows(q), _rows(k), _rows(v)
        o, lse = attention_forward(q, k, v, boundaries, scale, window)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.sizes = (boundaries, scale, window)
        return o

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, do: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients of q, k and v."""
        q, k, v, o, lse = ctx.saved_tensors
        dq, dk, dv = attention_backward(q, k, v, o, lse, _rows(do), *ctx.sizes)
        return dq, dk, dv, None, None, None


def varlen_attention_fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, cu_seqlens_cpu: torch.Tensor,
    max_seqlen: int, *, scale: float, window: int | None = None,
) -> torch.Tensor:
    """Causal attention inside each document of a row, grouped heads, by our Triton kernels.

    Cost is proportional to the sum of squared lengths. Deterministic: no atomics.

    Args:
        q: [T, nH, D], bf16 or fp16, D one of 64, 128, 256; strided rows and heads are read in place.
        k: [T, nKV, D]; query head h reads key head h // (nH / nKV).
        v: as k.
        cu_seqlens: int32 [N + 1] on the device; unused here, part of the op's signature.
        cu_seqlens_cpu: the same on the host, strictly rising from 0 to T.
        max_seqlen: longest document; unused here.
        scale: factor of q k^T, usually D ** -0.5.
        window: a query sees itself and the `window` - 1 tokens before it; None for all of its document.

    Returns:
        o: [T, nH, D], q's dtype, contiguous.

    Raises:
        ValueError: shapes, boundaries or window out of the domain.

    Source: FlashAttention-2 (Dao 2023), with the backward split into a dq pass and a dk/dv pass.
    """
    boundaries = boundaries_of(cu_seqlens_cpu, q.shape[0])
    _check(q, k, v, window)
    return VarlenAttentionFunction.apply(q, k, v, boundaries, scale, window or 0)


@cache
def _varlen_attn_parameters() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def varlen_attention_flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, cu_seqlens_cpu: torch.Tensor,
    max_seqlen: int, *, scale: float, window: int | None = None,
) -> torch.Tensor:
    """The same function through PyTorch's `varlen_attn` (FlashAttention-2); arguments as `varlen_attention_fused`.

    Raises:
        ValueError: shapes, boundaries or window out of the domain, or a `scale` or `window` that this PyTorch's
            `varlen_attn` cannot take.
    """
    from torch.nn.attention.varlen import varlen_attn

    boundaries_of(cu_seqlens_cpu, q.shape[0])
    _check(q, k, v, window)
    known = _varlen_attn_parameters()
    options: dict[str, object] = {}
    if "window_size" in known:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None:
        options["is_causal"] = True
    else:
        raise ValueError("this PyTorch's varlen_attn has no sliding window. Use the Triton attention for this model.")
    if "scale" in known:
        options["scale"] = scale
    elif abs(scale - q.shape[-1] ** -0.5) > 1e-9:
        raise ValueError(
            f"this PyTorch's varlen_attn scales by D ** -0.5 = {q.shape[-1] ** -0.5} only; got {scale}. "
            "Use the Triton attention for this model."
        )
    if "enable_gqa" in known:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)
