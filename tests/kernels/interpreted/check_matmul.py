"""The product for sm_121a and the single-launch LoRA product, under the interpreter: odd shapes, strided views."""

import pytest
import torch

from sparktune.kernels.sm121a_matmul import SHARED_LIMIT, TILES, Tile, choose_tile, sm121a_matmul
from sparktune.lab.kernels.fused_lora import LoraTile, choose, fused_lora, hybrid_lora
from sparktune.lab.kernels.fused_swiglu_mm import SwigluTile, fused_swiglu_mm

SMALL = Tile(block_m=16, block_n=16, block_k=16, num_warps=4, num_stages=2)


def bf16(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).bfloat16()


def no_worse(got, truth, reference):
    """The project's criterion: RMS at most 1.05 times, largest at most 1.5 times the same-dtype reference's error."""
    tri, ref = (got.double() - truth).abs(), (reference.double() - truth).abs()
    assert tri.square().mean().sqrt() <= 1.05 * ref.square().mean().sqrt() + 1e-12
    assert tri.max() <= 1.5 * ref.max() + 1e-12


@pytest.mark.parametrize(("m", "n", "k"), [(33, 17, 40), (16, 16, 16), (1, 50, 7), (70, 3, 129)])
def test_matmul_of_odd_shapes_with_a_transposed_weight(m, n, k):
    a, weight = bf16(m, k), bf16(n, k, seed=1)
    got = sm121a_matmul(a, weight.t(), tile=SMALL)
    assert got.shape == (m, n)
    assert got.is_contiguous()
    no_worse(got, a.double() @ weight.double().t(), a @ weight.t())


def test_matmul_of_columns_and_of_a_plain_b():
    wide = bf16(20, 64)
    a, b = wide[:, 8:40], bf16(32, 24, seed=2)
    no_worse(sm121a_matmul(a, b, tile=SMALL), a.double() @ b.double(), a @ b)
    no_worse(sm121a_matmul(wide.t()[:30].t(), bf16(30, 5, seed=3), tile=SMALL),
             wide[:, :30].double() @ bf16(30, 5, seed=3).double(), wide[:, :30] @ bf16(30, 5, seed=3))


def test_nothing_is_left_unwritten(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    assert sm121a_matmul(bf16(33, 8), bf16(8, 19), tile=SMALL).isfinite().all()
    assert fused_lora(bf16(9, 16), bf16(19, 16), bf16(16, 16), bf16(19, 16), 1.0).isfinite().all()
    assert sm121a_matmul(bf16(0, 8), bf16(8, 19)).shape == (0, 19)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="should be"):
        sm121a_matmul(bf16(4, 8), bf16(9, 4))
    with pytest.raises(ValueError, match="bfloat16"):
        sm121a_matmul(bf16(4, 8), torch.zeros(8, 4))
    large = Tile(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=3)
    with pytest.raises(ValueError, match="101376"):
        sm121a_matmul(bf16(4, 8), bf16(8, 4), tile=large)
    with pytest.raises(ValueError, match="power of two"):
        fused_lora(bf16(4, 8), bf16(6, 8), bf16(12, 8), bf16(6, 12), 1.0)
    with pytest.raises(ValueError, match="shared memory"):
        fused_lora(bf16(4, 8), bf16(6, 8), bf16(16, 8), bf16(6, 16), 1.0, LoraTile(block_k=256))


def test_every_listed_tile_fits_and_small_results_get_small_tiles():
    assert all(tile.fits and tile.shared_bytes <= SHARED_LIMIT for tile in TILES)
    assert choose_tile(5376, 12_288).block_m == 128
    assert choose_tile(64, 512).block_m == 64


@pytest.mark.parametrize(("m", "n", "k", "rank"), [(33, 40, 24, 16), (5, 130, 50, 32)])
def test_lora_in_one_launch(m, n, k, rank):
    x, weight, a, b = bf16(m, k), bf16(n, k, seed=1), bf16(rank, k, seed=2, scale=0.1), bf16(n, rank, seed=3, scale=0.1)
    truth = x.double() @ weight.double().t() + 0.5 * (x.double() @ a.double().t()) @ b.double().t()
    reference = x @ weight.t() + 0.5 * ((x @ a.t()) @ b.t())
    tile = LoraTile(block_m=16, block_n=32, block_k=16, num_warps=4, num_stages=2)
    no_worse(fused_lora(x, weight, a, b, 0.5, tile), truth, reference)
    for tb_per_s in (1e-6, 1e6):  # memory so slow that one launch wins, so fast that it loses
        no_worse(hybrid_lora(x, weight, a, b, 0.5, tflop_per_s=100.0, tb_per_s=tb_per_s), truth, reference)


def test_the_dispatcher_weighs_repeats_against_memory():
    assert not choose(5376, 12_288, 2048, 128, tflop_per_s=790, tb_per_s=4.25).fused
    assert choose(5376, 128, 2048, 128, tflop_per_s=790, tb_per_s=4.25).fused
    assert choose(5376, 12_288, 2048, 16, tflop_per_s=112, tb_per_s=0.273).saved_ms > 0


def test_swiglu_with_its_products():
    x, gate, up = bf16(33, 40), bf16(21, 40, seed=1, scale=0.2), bf16(21, 40, seed=2, scale=0.2)
    truth = torch.nn.functional.silu(x.double() @ gate.double().t()) * (x.double() @ up.double().t())
    tile = SwigluTile(block_m=16, block_n=16, block_k=16, num_warps=4, num_stages=2)
    no_worse(fused_swiglu_mm(x, gate, up, tile), truth, torch.nn.functional.silu(x @ gate.t()) * (x @ up.t()))
    with pytest.raises(ValueError, match="shared memory"):
        fused_swiglu_mm(x, gate, up, SwigluTile(block_k=128))
