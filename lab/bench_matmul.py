"""The products made for sm_121a beside cuBLAS: right first, then timed, tiles capped at a GB10's shared memory.

usage: python -m lab.bench_matmul [--size 2B] [--tokens 5376] [--rank 128] [--csv FILE]      times on a CUDA GPU
       python -m lab.bench_matmul --tiles      compiles the candidates for GB10 and writes docs/results/gb10_tiles.csv

On another chip than a GB10 a time says how the kernel does beside that chip's cuBLAS, no more: an H200's cuBLAS uses
wgmma, which no Triton tile here does for a GB10's sake. A tile that a GB10 cannot launch is never timed anywhere.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import triton

from sparktune.kernels.sm121a_matmul import SHARED_LIMIT, TILES, Tile, choose_tile, sm121a_matmul
from sparktune.lab.kernels.fused_lora import LoraTile, choose, fused_lora
from sparktune.lab.kernels.fused_swiglu_mm import fused_swiglu_mm
from sparktune.lab.shapes import SIZES
from sparktune.lab.sm121a import Launch, compile_for_gb10, recorded_launches
from sparktune.lab.table import append_rows

__all__ = ["CANDIDATES", "lora_launch", "main", "matmul_launch", "projections", "swiglu_launch"]

TABLE = Path(__file__).resolve().parent.parent / "docs" / "results" / "gb10_tiles.csv"
CANDIDATES = tuple(
    Tile(block_m=m, block_n=n, block_k=k, num_warps=w, num_stages=s)
    for m, n in ((128, 256), (128, 128), (128, 64), (64, 128), (64, 64), (64, 32)) for k in (32, 64) for w in (4, 8)
    for s in (2, 3, 4)
)
LORA_CANDIDATES = tuple(
    LoraTile(block_m=m, block_n=n, block_k=32, num_warps=8, num_stages=s)
    for (m, n), s in itertools.product(((64, 128), (64, 64), (128, 128)), (2, 3))
)


def projections(size: str) -> dict[str, tuple[int, int]]:
    """Returns name -> (columns of the result, columns of the input) of a model's grouped projections."""
    s = SIZES[size]
    values = s.value_heads * 128
    return {
        "gate_up": (2 * s.ffn, s.hidden), "down": (s.hidden, s.ffn),
        "gdn_in": (2 * 16 * 128 + 2 * values + 2 * s.value_heads, s.hidden), "gdn_out": (s.hidden, values),
        "attention_in": (s.heads * 512 + 2 * s.kv_heads * 256, s.hidden), "attention_out": (s.hidden, s.heads * 256),
    }


def matmul_launch(tile: Tile, m: int = 5376, n: int = 12_288, k: int = 2048) -> Launch:
    """Returns the launch of one product with a transposed weight."""
    a, weight = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((m, k), (n, k)))
    with recorded_launches("x W^T") as launches:
        sm121a_matmul(a, weight.t(), tile=tile)
    return launches[0]


def lora_launch(tile: LoraTile, rank: int, m: int = 5376, n: int = 12_288, k: int = 2048) -> Launch:
    """Returns the launch of one LoRA product."""
    x, weight, a, b = (torch.empty(shape, dtype=torch.bfloat16, device="meta")
                       for shape in ((m, k), (n, k), (rank, k), (n, rank)))
    with recorded_launches(f"r {rank}") as launches:
        fused_lora(x, weight, a, b, 1.0, tile)
    return launches[0]


def swiglu_launch(m: int = 5376, f: int = 6144, k: int = 2048) -> Launch:
    """Returns the launch of both products of a SwiGLU."""
    x, gate, up = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((m, k), (f, k), (f, k)))
    with recorded_launches() as launches:
        fused_swiglu_mm(x, gate, up)
    return launches[0]


def tile_rows() -> list[dict[str, object]]:
    """Compiles every candidate that the budget admits and says which are chosen and why not the others."""
    rows: list[dict[str, object]] = []
    candidates: list[tuple[object, int, Callable[[], Launch]]] = [
        (tile, tile.shared_bytes, lambda tile=tile: matmul_launch(tile)) for tile in CANDIDATES
    ]
    candidates += [(tile, tile.shared_bytes(rank), lambda tile=tile, rank=rank: lora_launch(tile, rank))
                   for tile in LORA_CANDIDATES for rank in (16, 128)]
    for tile, planned, launch in candidates:
        row: dict[str, object] = {"kernel": "", **asdict(tile), "planned_bytes": planned}
        if planned > SHARED_LIMIT:
            rows.append({**row, "verdict": f"over {SHARED_LIMIT} bytes: never launched"})
            continue
        built = compile_for_gb10(launch())
        fits = built.shared_bytes <= SHARED_LIMIT and not built.spill_bytes and built.mma
        listed = tile in TILES or tile == LoraTile()
        rows.append({
            **row, "kernel": built.name, "shared_bytes": built.shared_bytes, "registers": built.registers,
            "spill_bytes": built.spill_bytes, "mma": built.mma,
            "verdict": ("listed" if listed else "fits") if fits else "spills or does not fit: never launched",
        })
    return rows


def write_tiles() -> int:
    """Writes the table of tiles; returns 1 if a listed tile does not hold."""
    rows = [{**row, "triton": triton.__version__, "target": "sm_121a"} for row in tile_rows()]
    TABLE.unlink(missing_ok=True)
    append_rows(TABLE, rows)
    kept = sum(row["verdict"] == "listed" for row in rows)
    print(f"{len(rows)} candidates, {kept} listed, "
          f"{sum(str(row['verdict']).endswith('never launched') for row in rows)} never launched")
    return 0 if kept >= len(TILES) + 1 else 1


def _error(got: torch.Tensor, truth: torch.Tensor) -> float:
    return float((got.double() - truth).square().mean().sqrt())


def right(size: str, rank: int) -> bool:
    """Prints and returns whether both are as near to float64 as PyTorch's own products, at an odd number of rows."""
    green = True
    for name, (n, k) in projections(size).items():
        g = torch.Generator("cuda").manual_seed(0)
        x, weight = (torch.randn(r, k, device="cuda", generator=g).bfloat16() for r in (333, n))
        a, b = (0.05 * torch.randn(*shape, device="cuda", generator=g).bfloat16() for shape in ((rank, k), (n, rank)))
        truth = x.double() @ weight.double().t()
        errors = {"sm121a_matmul": (_error(sm121a_matmul(x, weight.t()), truth), _error(x @ weight.t(), truth))}
        truth += (x.double() @ a.double().t()) @ b.double().t()
        peer = torch.addmm(x @ weight.t(), x @ a.t(), b.t())
        errors["fused_lora"] = _error(fused_lora(x, weight, a, b, 1.0), truth), _error(peer, truth)
        for what, (ours, theirs) in errors.items():
            ok = ours <= 1.05 * theirs
            green &= ok
            print(f"{'ok ' if ok else 'RED'} {what} {name}: error {ours / theirs:.3f} of PyTorch's", flush=True)
    return green


def time_row(name: str, n: int, k: int, tokens: int, rank: int) -> dict[str, object]:
    """Times one projection: cuBLAS, ours with every listed tile, LoRA both ways."""
    from sparktune.lab.measure import device_ms

    x, weight, a, b = (torch.randn(shape, device="cuda").bfloat16()
                       for shape in ((tokens, k), (n, k), (rank, k), (n, rank)))
    cublas = device_ms(lambda: x @ weight.t())
    by_tile = {tile: device_ms(partial(sm121a_matmul, x, weight.t(), tile=tile)) for tile in TILES}
    best, chosen = min(by_tile, key=by_tile.__getitem__), choose_tile(tokens, n)
    three = device_ms(lambda: torch.addmm(x @ weight.t(), x @ a.t(), b.t()))
    one = device_ms(lambda: fused_lora(x, weight, a, b, 1.0))
    says = choose(tokens, n, k, rank, tflop_per_s=790, tb_per_s=4.25)
    return {
        "projection": name, "m": tokens, "n": n, "k": k, "rank": rank, "cublas_ms": round(cublas, 4),
        "chosen_ms": round(by_tile[chosen], 4), "best_ms": round(by_tile[best], 4),
        "best_tile": f"{best.block_m}x{best.block_n}x{best.block_k} w{best.num_warps} s{best.num_stages}",
        "ours_over_cublas": round(by_tile[best] / cublas, 3), "lora_three_launches_ms": round(three, 4),
        "lora_one_launch_ms": round(one, 4), "one_over_three": round(one / three, 3), "rule_says_one": says.fused,
    }


def swiglu_row(size: str, tokens: int) -> dict[str, object]:
    """Times SwiGLU's forward pass in one launch beside the grouped product and the elementwise launch."""
    from sparktune.kernels.silu_mul.triton import silu_mul_fwd
    from sparktune.lab.measure import device_ms

    f, k = SIZES[size].ffn, SIZES[size].hidden
    x, weight = torch.randn(tokens, k, device="cuda").bfloat16(), torch.randn(2 * f, k, device="cuda").bfloat16()

    def two() -> torch.Tensor:
        product = x @ weight.t()
        return silu_mul_fwd(product[:, :f], product[:, f:])

    one_ms, two_ms = device_ms(lambda: fused_swiglu_mm(x, weight[:f], weight[f:])), device_ms(two)
    return {"projection": "swiglu forward", "m": tokens, "n": 2 * f, "k": k, "swiglu_one_launch_ms": round(one_ms, 4),
            "swiglu_two_launches_ms": round(two_ms, 4), "swiglu_one_over_two": round(one_ms / two_ms, 3)}


def main() -> int:
    """Writes the tile table, or checks and times; 1 on red, 3 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", action="store_true", help="compile the candidates for GB10; needs no GPU")
    parser.add_argument("--size", default="2B", choices=list(SIZES))
    parser.add_argument("--tokens", type=int, default=5376)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    if options.tiles:
        return write_tiles()
    from sparktune.lab.measure import EXIT_NO_GPU, lacks_gpu

    if lacks_gpu("Timing (--tiles, which compiles for GB10, does not)"):
        return EXIT_NO_GPU
    if not right(options.size, options.rank):
        print("nothing is timed on red", file=sys.stderr)
        return 1
    from sparktune.lab.measure import machine_row

    rows: list[dict[str, object]] = [swiglu_row(options.size, options.tokens)]
    print(" ".join(f"{key}={value}" for key, value in rows[0].items()), flush=True)
    rows = [{**machine_row(), "size": options.size, **rows[0]}]
    for name, (n, k) in projections(options.size).items():
        row = time_row(name, n, k, options.tokens, options.rank)
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        rows.append({**machine_row(), "size": options.size, **row})
    if options.csv:
        append_rows(options.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
