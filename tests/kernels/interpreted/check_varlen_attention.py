"""Attention's kernels against fp64 truth: forward and all gradients, odd documents, grouped heads, window, strides."""

import pytest
import torch

from sparktune.kernels.varlen_attention import function
from sparktune.kernels.varlen_attention.function import varlen_attention_fused
from sparktune.kernels.varlen_attention.reference import varlen_attention_reference

NAMES = ("o", "dq", "dk", "dv")


def run(attention, tensors, lengths, window):
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    q, k, v, do = tensors
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o = attention(q, k, v, cu, cu, max(lengths), scale=0.7 * q.shape[-1] ** -0.5, window=window)
    return o.detach(), *torch.autograd.grad(o, (q, k, v), do)


def inputs(lengths, heads, kv_heads, dim, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # q as the prologue hands it over: the first half of an interleaved [q | gate]
    wide = torch.randn(sum(lengths), heads, 2 * dim, generator=generator).to(dtype)
    k, v = (torch.randn(sum(lengths), kv_heads, dim, generator=generator).to(dtype) for _ in range(2))
    return wide[..., :dim], k, v, torch.randn(sum(lengths), heads, dim, generator=generator).to(dtype)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))


@pytest.mark.parametrize(("lengths", "heads", "kv_heads", "dim", "window"), [
    ([70, 1, 100], 4, 1, 64, None),
    ([33, 65], 2, 2, 256, None),
    ([150, 37], 2, 1, 64, 40),
    ([100], 2, 1, 128, 7),
    ([3], 1, 1, 64, 1),
])
def test_fp32_matches_truth(lengths, heads, kv_heads, dim, window):
    tensors = inputs(lengths, heads, kv_heads, dim, torch.float32)
    truth = run(varlen_attention_reference, [x.double() for x in tensors], lengths, window)
    for name, tri, ref in zip(NAMES, run(varlen_attention_fused, tensors, lengths, window), truth, strict=True):
        assert (tri - ref).abs().max() <= 3e-6 * max(ref.abs().max(), 1.0), name


@pytest.mark.parametrize("heads_per_program", [0, 1, 2])
def test_partial_sums_over_heads(monkeypatch, heads_per_program):
    tiles = function._config(32, 32, 4, 1, heads_per_program)
    monkeypatch.setattr(function, "attention_configs", lambda capability, dim: (tiles, tiles, tiles))
    tensors = inputs([40, 9], 4, 1, 64, torch.float32)
    truth = run(varlen_attention_reference, [x.double() for x in tensors], [40, 9], None)
    for name, tri, ref in zip(NAMES, run(varlen_attention_fused, tensors, [40, 9], None), truth, strict=True):
        assert (tri - ref).abs().max() <= 3e-6 * ref.abs().max(), name


def test_bf16_error_at_most_the_references():
    lengths = [50, 25]
    squares = {name: [0.0, 0.0] for name in NAMES}
    largest = {name: [0.0, 0.0] for name in NAMES}
    for seed in range(3):
        tensors = inputs(lengths, 4, 2, 64, torch.bfloat16, seed)
        truth = run(varlen_attention_reference, [x.double() for x in tensors], lengths, None)
        results = [run(f, tensors, lengths, None) for f in (varlen_attention_fused, varlen_attention_reference)]
        for i, result in enumerate(results):
            for name, got, ref in zip(NAMES, result, truth, strict=True):
                squares[name][i] += (got.double() - ref).square().mean().item()
                largest[name][i] = max(largest[name][i], (got.double() - ref).abs().max().item())
    for name in NAMES:
        assert squares[name][0] ** 0.5 <= 1.05 * squares[name][1] ** 0.5, (name, squares[name])
        assert largest[name][0] <= 1.5 * largest[name][1], (name, largest[name])


def test_documents_do_not_see_each_other():
    q, k, v, do = inputs([31, 40], 2, 1, 64, torch.float32)
    whole = run(varlen_attention_fused, (q, k, v, do), [31, 40], None)
    alone = run(varlen_attention_fused, [x[31:] for x in (q, k, v, do)], [40], None)
    for name, a, b in zip(NAMES, whole, alone, strict=True):
        assert torch.equal(a[31:], b), name


@pytest.mark.parametrize(("change", "words"), [
    ({"cu": [0, 5, 5, 20]}, "rise strictly"),
    ({"cu": [0, 19]}, "rise strictly"),
    ({"dim": 96}, "head dims"),
    ({"window": 0}, "window"),
    ({"kv": 3}, "nKV dividing"),
])
def test_bad_input_is_named(change, words):
    dim, kv = change.get("dim", 64), change.get("kv", 1)
    q, k, v, _ = inputs([20], 2, kv, dim, torch.float32)
    cu = torch.tensor(change.get("cu", [0, 20]), dtype=torch.int32)
    with pytest.raises(ValueError, match=words):
        varlen_attention_fused(q, k, v, cu, cu, 20, scale=1.0, window=change.get("window"))


def test_a_row_beyond_32_bit_offsets_is_refused():
    q = torch.empty(1).expand(2**20, 8, 256)
    cu = torch.tensor([0, 2**20], dtype=torch.int32)
    with pytest.raises(ValueError, match="pack length"):
        varlen_attention_fused(q, q, q, cu, cu, 2**20, scale=1.0)


def test_tile_tables_cover_every_token_once():
    boundaries = (0, 5, 6, 100)
    for of_keys in (False, True):
        rows = function.document_tiles(boundaries, 16, torch.device("cpu"), of_keys=of_keys).tolist()
        covered = sorted(t for start, _, end in rows for t in range(start, min(start + 16, end)))
        assert covered == list(range(100))
        assert all(begin <= start < end for start, begin, end in rows)
        work = [end - start if of_keys else start - begin for start, begin, end in rows]
        assert work == sorted(work, reverse=True)
