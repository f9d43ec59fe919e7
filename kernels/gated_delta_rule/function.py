"""The gated delta rule on a GPU by our Triton kernels; `fla_function.py` has flash-linear-attention's.

Legend: T tokens, N documents, HK key heads, HV value heads, K and V their dims, C tokens a chunk, NC chunks.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import torch
import triton

from sparktune.kernels.gated_delta_rule.triton import (
    chunk_gradients_kernel,
    chunk_output_kernel,
    chunk_prepare_kernel,
    chunk_scan_kernel,
    prepare_backward_kernel,
    wy_gradients_kernel,
)
from sparktune.kernels.tables import boundaries_of, document_table
from sparktune.kernels.varlen_attention.triton import reduce_heads_kernel

__all__ = [
    "CHUNK",
    "DeltaRuleSizes",
    "KernelConfigs",
    "chunk_tables",
    "delta_rule_backward",
    "delta_rule_configs",
    "delta_rule_forward",
    "gated_delta_rule_fused",
]

CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class KernelConfigs:
    """Warps (and stages of the scan's loop) of the six kernels."""

    prepare_warps: int
    scan_block_v: int
    """Columns of the state that one program of the scan carries."""
    scan_warps: int
    scan_stages: int
    output_warps: int
    prepare_backward_warps: int
    wy_warps: int
    wy_block: int
    """Columns that the WY gradients' kernel reads at a time."""
    gradients_warps: int
    gradients_block_v: int
    """Value columns that the last kernel reads at a time."""


# Within 101,376 bytes of shared memory and without spills on sm_121a at K = V = 128; the tests compile these there.
SMALL_SHARED_MEMORY = KernelConfigs(
    prepare_warps=8, scan_block_v=32, scan_warps=4, scan_stages=2, output_warps=8, prepare_backward_warps=4,
    wy_warps=4, wy_block=16, gradients_warps=8, gradients_block_v=16,
)
# Hopper, K = V = 128: the fastest right ones of lab/sweep_mixers.py on an H200 (torch 2.11, Triton 3.6, 2026-11-22;
# 0.97 -> 0.76 ms a layer at 5376 tokens). scan_stages=1 gave wrong sums there, a miscompiled wgmma.
HOPPER = KernelConfigs(
    prepare_warps=4, scan_block_v=32, scan_warps=4, scan_stages=3, output_warps=4, prepare_backward_warps=4,
    wy_warps=4, wy_block=64, gradients_warps=8, gradients_block_v=64,
)


@cache
def delta_rule_configs(capability: tuple[int, int]) -> KernelConfigs:
    """Returns the kernels' configurations for a device of this compute capability."""
    return HOPPER if capability[0] == 9 else SMALL_SHARED_MEMORY


def _capability(tensor: torch.Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (0, 0)


def chunk_tables(boundaries: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists the chunks of every document, and the documents.

    Args:
        boundaries: document boundaries, N + 1 numbers from 0 to T, strictly rising.
        device: where the kernels run.

    Returns:
        int32 [NC, 2]: first token, document's end; int32 [N, 3]: begin, end, first chunk. Kept by value of the
        arguments: every layer of a micro-batch reads the same tables.
    """
    chunks = document_table(("chunks",), boundaries, device, _chunks, width=2, block=CHUNK)
    return chunks, document_table(("documents of chunks",), boundaries, device, _documents, width=3, block=None)


def _chunks(boundaries: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(start, end) for begin, end in itertools.pairwise(boundaries) for start in range(begin, end, CHUNK)]


def _documents(boundaries: tuple[int, ...]) -> list[tuple[int, int, int]]:
    documents, first = [], 0
    for begin, end in itertools.pairwise(boundaries):
        documents.append((begin, end, first))
        first += -(-(end - begin) // CHUNK)
    return documents


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor
) -> None:
    n_tokens, n_heads = v.shape[0], v.shape[1]
    if q.shape != k.shape or q.shape[0] != n_tokens or n_heads % k.shape[1]:
        raise ValueError(
            f"q and k must be [{n_tokens}, HK, K] with HK dividing HV = {n_heads}; "
            f"got {tuple(q.shape)} and {tuple(k.shape)}."
        )
    if g.shape != (n_tokens, n_heads) or beta.shape != g.shape:
        raise ValueError(f"g and beta must be [{n_tokens}, {n_heads}]; got {tuple(g.shape)} and {tuple(beta.shape)}.")
    if g.dtype != torch.float32 or beta.dtype != torch.float32:
        raise ValueError(
            f"g and beta must be float32, since a rounded decay drifts over a document; got {g.dtype} and {beta.dtype}."
        )
    for name, size in (("K", k.shape[2]), ("V", v.shape[2])):
        if size not in (16, 32, 64, 128):
            raise ValueError(f"{name} must be 16, 32, 64 or 128; got {size}. Use the reference for other sizes.")
    # The kernels count elements of a row's tensors in 32 bits.
    longest = max(n_tokens * x.stride(0) for x in (q, k, v)) if n_tokens else 0
    if max(longest, v.numel()) >= 2**31:
        raise ValueError(
            f"{n_tokens} tokens with {max(x.stride(0) for x in (q, k, v))} elements between them exceed the kernels' "
            "32-bit offsets. Lower the pack length."
        )


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@dataclass(frozen=True, kw_only=True)
class DeltaRuleSizes:
    """What every launch needs to know."""

    boundaries: tuple[int, ...]
    """cu_seqlens on the host."""
    scale: float
    """Factor on q, K ** -0.5."""
    constants: dict[str, int]
    """HK, HV, K, V and C for the kernels."""
    configs: KernelConfigs
    keep_states: bool
    """Whether the forward's w, n and states are saved for the backward."""


def delta_rule_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, sizes: DeltaRuleSizes
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Runs the three forward kernels; returns o and (gamma, rstd_q, rstd_k, inverse, w, n, states)."""
    n_tokens, n_heads, v_dim = v.shape
    n_keys, k_dim = k.shape[1], k.shape[2]
    chunks, documents = chunk_tables(sizes.boundaries, q.device)
    n_chunks = chunks.shape[0]
    config = sizes.configs
    gamma = torch.empty((n_tokens, n_heads), dtype=torch.float32, device=q.device)
    rstd_q, rstd_k = torch.empty((2, n_tokens, n_keys), dtype=torch.float32, device=q.device)
    inverse = torch.empty((n_chunks, n_heads, CHUNK, CHUNK), dtype=k.dtype, device=q.device)
    w = torch.empty((n_tokens, n_heads, k_dim), dtype=k.dtype, device=q.device)
    n = torch.empty((n_tokens, n_heads, v_dim), dtype=v.dtype, device=q.device)
    states = torch.empty((n_chunks, n_heads, k_dim, v_dim), dtype=k.dtype, device=q.device)
    o = torch.empty_like(n)
    qk_strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1))
    chunk_prepare_kernel[(n_chunks * n_heads,)](
        q, k, v, g, beta, chunks, gamma, rstd_q, rstd_k, inverse, w, n, *qk_strides, v.stride(0), v.stride(1),
        **sizes.constants, num_warps=config.prepare_warps, num_stages=1,
    )
    chunk_scan_kernel[(documents.shape[0] * n_heads, v_dim // min(config.scan_block_v, v_dim), 1)](
        q, k, w, n, o, o, gamma, rstd_q, rstd_k, states, states, documents, *qk_strides, sizes.scale,
        **sizes.constants, BV=min(config.scan_block_v, v_dim), FORWARD=True, BACKWARD=False,
        num_warps=config.scan_warps, num_stages=config.scan_stages,
    )
    chunk_output_kernel[(n_chunks * n_heads,)](
        q, k, n, states, gamma, rstd_q, rstd_k, o, chunks, *qk_strides, sizes.scale, **sizes.constants,
        num_warps=config.output_warps, num_stages=1,
    )
    return o, (gamma, rstd_q, rstd_k, inverse, w, n, states)


def delta_rule_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, do: torch.Tensor, gamma: torch.Tensor,
    rstd_q: torch.Tensor, rstd_k: torch.Tensor, inverse: torch.Tensor, kept: tuple[torch.Tensor, ...],
    sizes: DeltaRuleSizes,
) -> tuple[torch.Tensor, ...]:
    """Runs the backward kernels; `kept` is (w, n, states), or empty to compute them again.

    Returns dq, dk, dv, dg and dbeta, contiguous.
    """
    n_tokens, n_heads, v_dim = v.shape
    n_keys, k_dim = k.shape[1], k.shape[2]
    chunks, documents = chunk_tables(sizes.boundaries, q.device)
    n_chunks = chunks.shape[0]
    config = sizes.configs
    recompute = not kept
    if recompute:
        w = torch.empty((n_tokens, n_heads, k_dim), dtype=k.dtype, device=q.device)
        n = torch.empty((n_tokens, n_heads, v_dim), dtype=v.dtype, device=q.device)
        states = torch.empty((n_chunks, n_heads, k_dim, v_dim), dtype=k.dtype, device=q.device)
    else:
        w, n, states = kept
    dn = torch.empty_like(n)
    dstates = torch.empty_like(states)
    qk_strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1))
    strides = (*qk_strides, v.stride(0), v.stride(1))
    prepare_backward_kernel[(n_chunks * n_heads,)](
        q, k, v, beta, do, gamma, rstd_q, rstd_k, inverse, w, n, dn, chunks, *strides, sizes.scale, **sizes.constants,
        RECOMPUTE=recompute, num_warps=config.prepare_backward_warps, num_stages=1,
    )
    block_v = min(config.scan_block_v, v_dim)
    chunk_scan_kernel[(documents.shape[0] * n_heads, v_dim // block_v, 1 + recompute)](
        q, k, w, n, do, dn, gamma, rstd_q, rstd_k, states, dstates, documents, *qk_strides, sizes.scale,
        **sizes.constants, BV=block_v, FORWARD=recompute, BACKWARD=True,
        num_warps=config.scan_warps, num_stages=config.scan_stages,
    )
    grouped = n_heads > n_keys
    dqk = torch.empty((2, n_tokens, n_keys, k_dim), dtype=k.dtype, device=q.device)
    parts = dqk
    if grouped:
        parts = torch.empty((2, n_tokens, n_heads, k_dim), dtype=torch.float32, device=q.device)
    dv = torch.empty((n_tokens, n_heads, v_dim), dtype=v.dtype, device=q.device)
    dg, dbeta = torch.empty((2, n_tokens, n_heads), dtype=torch.float32, device=q.device)
    x, e = torch.empty_like(w), torch.empty_like(inverse)
    wy_gradients_kernel[(n_chunks * n_heads,)](
        k, v, beta, dn, gamma, rstd_k, inverse, states, x, e, dv, dg, dbeta, chunks, *strides[2:], **sizes.constants,
        BLK=min(config.wy_block, k_dim, v_dim), num_warps=config.wy_warps, num_stages=1,
    )
    chunk_gradients_kernel[(n_chunks * n_heads,)](
        q, k, n, beta, do, gamma, rstd_q, rstd_k, states, dstates, x, e, parts[0], parts[1], dg, chunks, *qk_strides,
        sizes.scale, **sizes.constants, BV=min(config.gradients_block_v, v_dim), num_warps=config.gradients_warps,
        num_stages=1,
    )
    if grouped:
        rows = 2 * n_tokens * n_keys
        reduce_heads_kernel[(triton.cdiv(rows, 16),)](parts, dqk, rows, S=n_heads // n_keys, D=k_dim, BR=16)
    return dqk[0], dqk[1], dv, dg, dbeta


class GatedDeltaRuleFunction(torch.autograd.Function):
    """Saves the inputs, the decays, the norms and X; with keep_states also w, n and the states."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor,
        beta: torch.Tensor, sizes: DeltaRuleSizes,
    ) -> torch.Tensor:
        """Returns o [T, HV, V]."""
        q, k, v, g, beta = _rows(q), _rows(k), _rows(v), g.contiguous(), beta.contiguous()
        o, made = delta_rule_forward(q, k, v, g, beta, sizes)
        ctx.save_for_backward(q, k, v, beta, *(made if sizes.keep_states else made[:4]))
        ctx.sizes = sizes
        return o

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, do: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients of q, k, v, g and beta."""
        q, k, v, beta, gamma, rstd_q, rstd_k, inverse, *kept = ctx.saved_tensors
        gradients = delta_rule_backward(
            q, k, v, beta, do.contiguous(), gamma, rstd_q, rstd_k, inverse, tuple(kept), ctx.sizes
        )
        return *gradients, None


def gated_delta_rule_fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, cu_seqlens: torch.Tensor,
    cu_seqlens_cpu: torch.Tensor, *, keep_states: bool = False,
) -> torch.Tensor:
    """The gated delta rule over the documents of one row, by our Triton kernels.

    S_t = exp(g_t) S_{t-1} (I - beta_t k_t k_t^T) + beta_t k_t v_t^T in the rows' convention, o_t = K ** -0.5 S_t q_t,
    with q and k l2-normalised (eps 1e-6) and S = 0 at every document's begin. Deterministic: no atomics.

    Args:
        q: [T, HK, K], bf16 or fp16; K one of 16, 32, 64, 128; strided rows and heads are read in place.
        k: as q.
        v: [T, HV, V]; value head h uses key head h // (HV / HK).
        g: log decay, fp32 [T, HV], at most 0.
        beta: fp32 [T, HV], in [0, 1].
        cu_seqlens: int32 [N + 1] on the device; unused here, part of the op's signature.
        cu_seqlens_cpu: the same on the host, strictly rising from 0 to T.
        keep_states: keep w, the new values and the states (2 T HV (K + V) + 2 T HV K V / 64 bytes in bf16) for the
            backward rather than compute them again.

    Returns:
        o: [T, HV, V], v's dtype, contiguous.

    Raises:
        ValueError: shapes, dtypes or boundaries out of the domain.

    Source: Yang et al. 2024, "Gated Delta Networks"; the chunked WY form of Yang et al. 2024, "Parallelizing Linear
    Transformers with the Delta Rule over Sequence Length".
    """
    boundaries = boundaries_of(cu_seqlens_cpu, v.shape[0])
    _check(q, k, v, g, beta)
    constants = {"HK": k.shape[1], "HV": v.shape[1], "K": k.shape[2], "V": v.shape[2], "C": CHUNK}
    sizes = DeltaRuleSizes(
        boundaries=boundaries, scale=k.shape[2] ** -0.5, constants=constants,
        configs=delta_rule_configs(_capability(q)), keep_states=keep_states,
    )
    return GatedDeltaRuleFunction.apply(q, k, v, g, beta, sizes)
