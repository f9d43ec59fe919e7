"""Which way a LoRA projection goes, by its shape: one launch, or cuBLAS's product and the adapter's two beside it.

The rule is arithmetic, for one chip at a time. One launch computes x A^T once for every BN columns of the result, so it
does M K R (N / BN - 1) more multiplications; three launches move y twice more (the adapter adds to it) and x and x A^T
once more. Whichever costs less time on the chip is chosen. At rank 128 that is three launches at every projection of a
Qwen3.5 on an H200, and on a GB10 (an estimate) at all but k and v; at ranks of 16 and 32 the GB10's slow memory would
favour one launch, if it multiplied as fast as cuBLAS: that `lab/bench_matmul.py` measures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparktune.lab.kernels.fused_lora.kernel import LoraTile, fused_lora

__all__ = ["Choice", "choose", "hybrid_lora"]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the dispatcher says about a shape."""

    fused: bool
    more_ms: float
    """Milliseconds of multiplications that one launch repeats."""
    saved_ms: float
    """Milliseconds of device memory that it does not move."""


def choose(m: int, n: int, k: int, rank: int, *, tflop_per_s: float, tb_per_s: float, tile: LoraTile | None = None) \
        -> Choice:
    """Returns the way that costs less on a chip.

    Args:
        m: rows of x.
        n: rows of the weight.
        k: columns of both.
        rank: of the adapter.
        tflop_per_s: the chip's dense bf16 products.
        tb_per_s: the chip's device memory.
        tile: of the one launch.
    """
    tile = tile or LoraTile()
    repeats = -(-n // tile.block_n) - 1
    more_ms = 2.0 * m * k * rank * repeats / tflop_per_s / 1e9
    saved_ms = 2.0 * (2 * m * n + m * k + 2 * m * rank) / tb_per_s / 1e9
    return Choice(fused=more_ms < saved_ms, more_ms=more_ms, saved_ms=saved_ms)


def hybrid_lora(
    x: torch.Tensor, weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scale: float, *,
    tflop_per_s: float, tb_per_s: float,
) -> torch.Tensor:
    """Returns x W^T + scale (x A^T) B^T the way that `choose` says; arguments of `fused_lora` and `choose`."""
    (m, k), (n, rank) = x.shape, lora_b.shape
    if choose(m, n, k, rank, tflop_per_s=tflop_per_s, tb_per_s=tb_per_s).fused:
        return fused_lora(x, weight, lora_a, lora_b, scale)
    y = x @ weight.t()
    return torch.addmm(y, x @ lora_a.t(), lora_b.t(), alpha=scale)
