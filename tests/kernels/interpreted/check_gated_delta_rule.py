"""The delta rule's kernels against the token-by-token recurrence in fp64: forward and all gradients."""

import pytest
import torch

from sparktune.kernels.gated_delta_rule import function
from sparktune.kernels.gated_delta_rule.function import gated_delta_rule_fused
from sparktune.kernels.gated_delta_rule.reference import gated_delta_rule_naive

NAMES = ("o", "dq", "dk", "dv", "dg", "dbeta")


def inputs(lengths, key_heads, value_heads, k_dim, v_dim, *, similar=0.0, decay=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    sizes = [key_heads * k_dim, key_heads * k_dim, value_heads * v_dim]
    # q, k and v as the convolution hands them over: columns of one matrix
    product = torch.randn(tokens, sum(sizes), generator=generator)
    q, k, v = product.split(sizes, 1)
    k = k.unflatten(1, (key_heads, k_dim))
    k = k + similar * torch.randn(1, key_heads, k_dim, generator=generator)
    g = -decay * torch.rand(tokens, value_heads, generator=generator)
    beta = torch.rand(tokens, value_heads, generator=generator)
    do = torch.randn(tokens, value_heads, v_dim, generator=generator)
    return q.unflatten(1, (key_heads, k_dim)), k, v.unflatten(1, (value_heads, v_dim)), g, beta, do


def run(rule, tensors, lengths, **options):
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    *given, do = tensors
    given = [x.detach().requires_grad_() for x in given]
    o = rule(*given, cu, cu, **options)
    return o.detach(), *torch.autograd.grad(o, given, do)


def compare(tensors, lengths, limit, **options):
    truth = run(gated_delta_rule_naive, [x.double() for x in tensors], lengths)
    for name, tri, ref in zip(NAMES, run(gated_delta_rule_fused, tensors, lengths, **options), truth, strict=True):
        assert tri.isfinite().all(), name
        assert (tri - ref).abs().max() <= limit * ref.abs().max(), name


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))


@pytest.mark.parametrize(("lengths", "key_heads", "value_heads", "k_dim", "v_dim"), [
    ([66, 1, 70], 1, 1, 16, 16),
    ([33, 65], 2, 4, 32, 16),
    ([64, 20], 1, 3, 16, 32),
])
def test_fp32_matches_the_recurrence(lengths, key_heads, value_heads, k_dim, v_dim):
    compare(inputs(lengths, key_heads, value_heads, k_dim, v_dim), lengths, 5e-6)


def test_kept_states_give_the_same_gradients():
    compare(inputs([65, 7], 1, 2, 16, 16), [65, 7], 5e-6, keep_states=True)


def test_many_short_documents():
    lengths = [1, 2, 3, 1, 17, 1, 5]
    compare(inputs(lengths, 1, 1, 16, 16), lengths, 5e-6)


def test_a_row_beyond_32_bit_offsets_is_refused():
    x = torch.empty(1).expand(2**20, 16, 128)
    g = torch.empty(1).expand(2**20, 16)
    cu = torch.tensor([0, 2**20], dtype=torch.int32)
    with pytest.raises(ValueError, match="pack length"):
        gated_delta_rule_fused(x, x, x, g, g, cu, cu)


def test_gb10_tiles_turn_their_loops(monkeypatch):
    narrow = function.KernelConfigs(
        prepare_warps=4, scan_block_v=16, scan_warps=4, scan_stages=1, output_warps=4, prepare_backward_warps=4,
        wy_warps=4, wy_block=16, gradients_warps=4, gradients_block_v=16,
    )
    monkeypatch.setattr(function, "delta_rule_configs", lambda capability: narrow)
    compare(inputs([75, 3], 1, 1, 32, 64), [75, 3], 5e-6)


def test_repeated_keys_keep_their_digits():
    # nearly equal keys with beta near 1 are where a power series for (I + A)^-1 fails
    q, k, v, g, beta, do = inputs([64], 1, 1, 16, 16, similar=20.0, decay=0.01)
    compare((q, k, v, g, 0.9 + 0.1 * beta, do), [64], 2e-4)


def test_strong_decay_stays_finite():
    # a partial last chunk, whose missing rows must not count as gamma = 0
    # gamma reaches thousands here, so a float32 difference of two of them keeps four digits
    compare(inputs([80], 1, 1, 16, 16, decay=60.0), [80], 5e-4)


def test_beta_zero_still_gets_its_gradient():
    q, k, v, g, beta, do = inputs([40], 1, 2, 16, 16)
    beta[5] = 0.0
    compare((q, k, v, g, beta, do), [40], 5e-6)


def test_bf16_stays_near_truth():
    # w, u, the new values and the states are rounded to bf16 between kernels, as in every chunked implementation
    tensors = [x.to(torch.bfloat16) for x in inputs([70, 30], 1, 2, 32, 32)]
    tensors[3:5] = [x.float() for x in tensors[3:5]]
    truth = run(gated_delta_rule_naive, [x.double() for x in tensors], [70, 30])
    for name, tri, ref in zip(NAMES, run(gated_delta_rule_fused, tensors, [70, 30]), truth, strict=True):
        error = (tri.double() - ref).square().mean().sqrt() / ref.square().mean().sqrt()
        # one rounding to bf16 is 2e-3; dg is a difference of sums some ten times its size
        assert error <= (2.5e-2 if name == "dg" else 6e-3), f"{name}: {error}"


def test_documents_do_not_see_each_other():
    tensors = inputs([33, 70], 1, 2, 16, 16)
    whole = run(gated_delta_rule_fused, tensors, [33, 70])
    alone = run(gated_delta_rule_fused, [x[33:] for x in tensors], [70])
    for name, a, b in zip(NAMES, whole, alone, strict=True):
        assert torch.equal(a[33:], b), name


@pytest.mark.parametrize(("position", "value", "words"), [
    (3, torch.zeros(20, 2, dtype=torch.bfloat16), "float32"),
    (0, torch.zeros(20, 1, 32), "q and k"),
    (4, torch.zeros(20, 1), "g and beta"),
])
def test_bad_input_is_named(position, value, words):
    given = list(inputs([20], 1, 2, 16, 16)[:5])
    given[position] = value
    cu = torch.tensor([0, 20], dtype=torch.int32)
    with pytest.raises(ValueError, match=words):
        gated_delta_rule_fused(*given, cu, cu)


def test_bad_boundaries_are_named():
    given = inputs([20], 1, 2, 16, 16)[:5]
    for cu in ([0, 10], [0, 10, 10, 20], [1, 20]):
        boundaries = torch.tensor(cu, dtype=torch.int32)
        with pytest.raises(ValueError, match="rise strictly"):
            gated_delta_rule_fused(*given, boundaries, boundaries)
