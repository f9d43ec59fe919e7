"""A bf16 product whose tiles fit a GB10: mma.sync, at most 101,376 bytes of shared memory, transposed views not copied.

Legend: c [M, N] = a [M, K] b [K, N]; BM, BN, BK the tile of one program, fp32 accumulation.

Nothing selects it: `lab/bench_matmul.py` measures it beside cuBLAS, shape by shape, and it has won none yet
(docs/lab-log.md); what wins on a GB10 would be selected by shape. Both operands may be views of any strides, so the
weight of a projection goes in as `weight.t()`: a transposed copy a call is what made an earlier attempt, elsewhere, 21
times slower than cuBLAS.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

__all__ = [
    "GROUP_M", "SHARED_LIMIT", "SM_COUNT", "TILES", "Tile", "choose_tile", "grouped_tile", "sm121a_matmul",
    "sm121a_matmul_kernel",
]

SHARED_LIMIT = 101_376
"""Bytes of shared memory that one block may use on sm_121a."""
SM_COUNT = 48
GROUP_M = 8
"""Tiles of M that follow one another over the same columns, so that the L2 cache keeps the operand they share."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What one program owns, and how it is launched."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @property
    def shared_bytes(self) -> int:
        """Bytes of the operands' buffers at most: a stage holds BM x BK and BK x BN in bf16; Triton keeps one less."""
        return self.num_stages * (self.block_m + self.block_n) * self.block_k * 2

    @property
    def fits(self) -> bool:
        """Says whether a GB10 can launch it."""
        return self.shared_bytes <= SHARED_LIMIT


# Chosen with the compiler for sm_121a: no spills at these (docs/results/gb10_tiles.csv).
TILES = (
    Tile(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3),
    Tile(block_m=128, block_n=128, block_k=32, num_warps=8, num_stages=4),
    Tile(block_m=128, block_n=64, block_k=64, num_warps=4, num_stages=3),
    Tile(block_m=64, block_n=128, block_k=64, num_warps=4, num_stages=3),
    Tile(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=4),
    Tile(block_m=64, block_n=32, block_k=64, num_warps=4, num_stages=4),
)


@triton.jit
def grouped_tile(i_p, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Returns (row, column) of program i_p's tile of [M, N]: GROUP rows of tiles go along the same columns."""
    n_m, n_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = i_p // (GROUP * n_n) * GROUP
    size = tl.minimum(n_m - first, GROUP)
    return first + i_p % (GROUP * n_n) % size, i_p % (GROUP * n_n) // size


@triton.jit
def sm121a_matmul_kernel(
    a, b, c, M, N, K, stride_am, stride_ak, stride_bk, stride_bn, stride_cm,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):
    """Grid (cdiv(M, BM) * cdiv(N, BN),): a program owns BM x BN of c, in groups of GROUP tiles of M."""
    i_m, i_n = grouped_tile(tl.program_id(0), M, N, BM, BN, GROUP)
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    # rows and columns past the end read the first ones again: no mask in the loop, none of them is stored
    p_a = a + (o_m % M).to(tl.int64)[:, None] * stride_am + o_k[None, :] * stride_ak
    p_b = b + o_k[:, None] * stride_bk + (o_n % N).to(tl.int64)[None, :] * stride_bn
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for i_k in range(tl.cdiv(K, BK)):
        m_k = o_k < K - i_k * BK
        b_a = tl.load(p_a, mask=m_k[None, :], other=0.0)
        b_b = tl.load(p_b, mask=m_k[:, None], other=0.0)
        acc = tl.dot(b_a, b_b, acc)
        p_a += BK * stride_ak
        p_b += BK * stride_bk
    m_c = (o_m < M)[:, None] & (o_n < N)[None, :]
    tl.store(c + o_m.to(tl.int64)[:, None] * stride_cm + o_n[None, :], acc.to(c.dtype.element_ty), mask=m_c)


def choose_tile(m: int, n: int, sm_count: int = SM_COUNT) -> Tile:
    """Returns the tile that computes least, counting what the last wave of programs leaves idle.

    Args:
        m: rows of the result.
        n: its columns.
        sm_count: multiprocessors of the chip.
    """

    def computed(tile: Tile) -> int:
        programs = -(-m // tile.block_m) * -(-n // tile.block_n)
        return -(-programs // sm_count) * tile.block_m * tile.block_n

    # of equals the first: larger tiles read the operands less often
    return min(TILES, key=computed)


def sm121a_matmul(a: torch.Tensor, b: torch.Tensor, *, tile: Tile | None = None) -> torch.Tensor:
    """Returns a @ b, summed in fp32 and rounded once.

    Args:
        a: [M, K] bf16 or fp16, any strides.
        b: [K, N], a's dtype, any strides: a weight [N, K] goes in as `weight.t()`.
        tile: chosen by the result's shape if left out.

    Returns:
        [M, N], a's dtype, contiguous.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a tile that a GB10 cannot launch.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"a and b should be [M, K] and [K, N]; got {tuple(a.shape)} and {tuple(b.shape)}.")
    if a.dtype != b.dtype or a.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"a and b should both be bfloat16 or float16; got {a.dtype} and {b.dtype}.")
    (m, k), n = a.shape, b.shape[1]
    tile = tile or choose_tile(m, n)
    if not tile.fits:
        raise ValueError(f"{tile} needs {tile.shared_bytes} bytes of shared memory; a block has {SHARED_LIMIT}.")
    c = torch.empty((m, n), dtype=a.dtype, device=a.device)
    if c.numel():
        sm121a_matmul_kernel[(triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)](
            a, b, c, m, n, k, a.stride(0), a.stride(1), b.stride(0), b.stride(1), c.stride(0), BM=tile.block_m,
            BN=tile.block_n, BK=tile.block_k, GROUP=GROUP_M, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )
    return c
