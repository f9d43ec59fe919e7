"""y = x W^T + s (x A^T) B^T in one launch.

Legend: x [M, K], W [N, K], A [R, K], B [N, R]; BM, BN, BK the tile of one program, R the rank, whole in every program.

The adapter's x A^T [BM, R] is summed beside x W^T in the same loop, so x is read once and x A^T never reaches memory.
The price: every program of a row of tiles computes x A^T again, N / BN times in all, and its accumulator of BM x R
takes registers from the product's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sparktune.kernels.sm121a_matmul import GROUP_M, SHARED_LIMIT, grouped_tile

__all__ = ["LoraTile", "fused_lora", "fused_lora_kernel"]


@dataclass(frozen=True, kw_only=True)
class LoraTile:
    """What one program owns."""

    block_m: int = 64
    block_n: int = 128
    block_k: int = 32
    num_warps: int = 8
    num_stages: int = 3

    def shared_bytes(self, rank: int) -> int:
        """Bytes of a program's buffers at most: of the loop, or of the adapter's second product behind it."""
        loop = self.num_stages * (self.block_m + self.block_n + rank) * self.block_k * 2
        return max(loop, rank * (3 * self.block_m + 2 * self.block_n))


@triton.jit
def fused_lora_kernel(
    x, w, a, b, y, M, N, K, scale, stride_xm, stride_wn, stride_ar, stride_bn, stride_ym,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr,
):
    """Grid (cdiv(M, BM) * cdiv(N, BN),): a program owns BM x BN of y; last dimensions are contiguous."""
    i_m, i_n = grouped_tile(tl.program_id(0), M, N, BM, BN, GROUP)
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    o_k, o_r = tl.arange(0, BK), tl.arange(0, R)
    p_x = x + (o_m % M).to(tl.int64)[:, None] * stride_xm + o_k[None, :]
    p_w = w + (o_n % N).to(tl.int64)[None, :] * stride_wn + o_k[:, None]
    p_a = a + o_r.to(tl.int64)[None, :] * stride_ar + o_k[:, None]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    low = tl.zeros((BM, R), dtype=tl.float32)
    for i_k in range(tl.cdiv(K, BK)):
        m_k = o_k < K - i_k * BK
        b_x = tl.load(p_x, mask=m_k[None, :], other=0.0)
        acc = tl.dot(b_x, tl.load(p_w, mask=m_k[:, None], other=0.0), acc)
        low = tl.dot(b_x, tl.load(p_a, mask=m_k[:, None], other=0.0), low)
        p_x += BK
        p_w += BK
        p_a += BK
    b_b = tl.load(b + (o_n % N).to(tl.int64)[None, :] * stride_bn + o_r[:, None])
    acc = tl.dot((low * scale).to(b_b.dtype), b_b, acc)
    m_y = (o_m < M)[:, None] & (o_n < N)[None, :]
    tl.store(y + o_m.to(tl.int64)[:, None] * stride_ym + o_n[None, :], acc.to(y.dtype.element_ty), mask=m_y)


def fused_lora(
    x: torch.Tensor, weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scale: float,
    tile: LoraTile | None = None,
) -> torch.Tensor:
    """Returns x W^T + scale (x A^T) B^T, both sums in fp32; x A^T is rounded once before its second product.

    Args:
        x: [M, K] bf16, rows may be strided.
        weight: [N, K] bf16.
        lora_a: [R, K] bf16, R a power of two from 16.
        lora_b: [N, R] bf16.
        scale: alpha / R.
        tile: of one program.

    Raises:
        ValueError: shapes or dtypes that do not fit, a rank that is no power of two, or a tile too large for a GB10.
    """
    (m, k), (n, rank) = x.shape, lora_b.shape
    if weight.shape != (n, k) or lora_a.shape != (rank, k):
        raise ValueError(f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, lora_a {tuple(lora_a.shape)} and lora_b "
                         f"{tuple(lora_b.shape)} should be [M, K], [N, K], [R, K] and [N, R].")
    if {t.dtype for t in (x, weight, lora_a, lora_b)} != {torch.bfloat16}:
        raise ValueError("all four tensors should be bfloat16.")
    if rank < 16 or rank & (rank - 1):
        raise ValueError(f"the rank should be a power of two from 16; got {rank}.")
    if any(t.stride(1) != 1 for t in (x, weight, lora_a, lora_b)):
        raise ValueError("the last dimension of every tensor should be contiguous.")
    tile = tile or LoraTile()
    if tile.shared_bytes(rank) > SHARED_LIMIT:
        raise ValueError(f"{tile} needs {tile.shared_bytes(rank)} bytes of shared memory at rank {rank}; a block has "
                         f"{SHARED_LIMIT}.")
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if y.numel():
        fused_lora_kernel[(triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)](
            x, weight, lora_a, lora_b, y, m, n, k, scale, x.stride(0), weight.stride(0), lora_a.stride(0),
            lora_b.stride(0), y.stride(0), BM=tile.block_m, BN=tile.block_n, BK=tile.block_k, R=rank, GROUP=GROUP_M,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )
    return y
