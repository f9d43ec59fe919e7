"""The products made for sm_121a, compiled for it: what a tile needs, no spills, mma.sync; the table of tiles."""

import csv

import pytest

from sparktune.kernels.sm121a_matmul import SHARED_LIMIT, TILES, Tile
from sparktune.lab.bench_matmul import CANDIDATES, LORA_CANDIDATES, TABLE, lora_launch, matmul_launch, swiglu_launch
from sparktune.lab.kernels.fused_lora import LoraTile
from sparktune.lab.sm121a import compile_for_gb10


@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t.block_m}x{t.block_n}x{t.block_k}")
def test_a_listed_tile_holds(tile):
    built = compile_for_gb10(matmul_launch(tile))
    assert built.shared_bytes <= tile.shared_bytes <= SHARED_LIMIT
    assert built.spill_bytes == 0
    assert built.mma
    assert built.widest_load_bits == 128 or built.widest_load_bits == 0, "loads go through cp.async, 16 bytes each"


@pytest.mark.parametrize("rank", [16, 128])
def test_lora_in_one_launch_holds(rank):
    built = compile_for_gb10(lora_launch(LoraTile(), rank))
    assert built.shared_bytes <= LoraTile().shared_bytes(rank) <= SHARED_LIMIT
    assert built.spill_bytes == 0
    assert built.mma


def test_swiglu_with_its_products_holds():
    built = compile_for_gb10(swiglu_launch())
    assert built.shared_bytes <= SHARED_LIMIT
    assert built.spill_bytes == 0
    assert built.mma


def test_the_compiler_sees_a_tile_that_spills():
    greedy = Tile(block_m=128, block_n=256, block_k=32, num_warps=4, num_stages=2)
    assert compile_for_gb10(matmul_launch(greedy)).spill_bytes > 0


def test_the_table_lists_every_candidate_and_what_is_never_launched():
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(CANDIDATES) + 2 * len(LORA_CANDIDATES)
    listed = [row for row in rows if row["verdict"] == "listed"]
    assert len(listed) == len(TILES) + 2
    for row in listed:
        assert (int(row["spill_bytes"]), row["mma"]) == (0, "True")
        assert int(row["shared_bytes"]) <= int(row["planned_bytes"]) <= SHARED_LIMIT
    for row in rows:
        if not row["kernel"]:
            assert int(row["planned_bytes"]) > SHARED_LIMIT
            assert row["verdict"].endswith("never launched")
