"""The references: against formulas written otherwise, against float64, gradients numerically, odd and empty shapes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sparktune.kernels.attention_prologue import attention_prologue_reference
from sparktune.kernels.causal_conv1d import causal_conv1d_reference
from sparktune.kernels.gated_delta_rule import (
    gated_delta_rule_last_state,
    gated_delta_rule_naive,
    gated_delta_rule_reference,
    gated_delta_rule_step,
    gdn_gates_reference,
)
from sparktune.kernels.gated_delta_rule import reference as delta_rule
from sparktune.kernels.gated_rms_norm import gated_rms_norm_reference
from sparktune.kernels.linear_cross_entropy import linear_cross_entropy_reference, reference
from sparktune.kernels.lora_linear import lora_linear_reference
from sparktune.kernels.rms_norm import add_rms_norm_reference, rms_norm_reference
from sparktune.kernels.sigmoid_gate import sigmoid_gate_reference
from sparktune.kernels.silu_mul import silu_mul_reference
from sparktune.kernels.varlen_attention import varlen_attention_reference

F64 = torch.float64


def randn(*size: int, dtype: torch.dtype = F64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def rel(got: torch.Tensor, ref: torch.Tensor) -> float:
    return ((got - ref).abs().max() / ref.abs().max()).item()


def leaf(*size: int, seed: int = 0) -> torch.Tensor:
    return randn(*size, seed=seed).requires_grad_()


# -- norms and gates


@pytest.mark.parametrize("zero_centred", [False, True])
def test_rms_norm(zero_centred: bool) -> None:
    x, w = leaf(3, 7), leaf(7, seed=1)
    expected = torch.stack([
        row / math.sqrt(float((row * row).mean()) + 1e-6) * (w + 1 if zero_centred else w) for row in x.detach()
    ])
    y = rms_norm_reference(x, w, 1e-6, zero_centred=zero_centred)
    assert rel(y.detach(), expected.detach()) < 1e-14
    assert torch.autograd.gradcheck(lambda a, b: rms_norm_reference(a, b, 1e-6, zero_centred=zero_centred), (x, w))
    residual = leaf(3, 7, seed=2)
    y, h = add_rms_norm_reference(x, residual, w, 1e-6, zero_centred=zero_centred)
    assert torch.equal(h, x + residual)
    assert torch.equal(y, rms_norm_reference(x + residual, w, 1e-6, zero_centred=zero_centred))


def test_gated_ops() -> None:
    x, z, w = leaf(3, 2, 5), leaf(3, 2, 5, seed=1), leaf(5, seed=2)
    expected = rms_norm_reference(x, w, 1e-6, zero_centred=False) * z / (1 + torch.exp(-z))
    assert rel(gated_rms_norm_reference(x, z, w, 1e-6).detach(), expected.detach()) < 1e-14
    assert torch.autograd.gradcheck(lambda a, b, c: gated_rms_norm_reference(a, b, c, 1e-6), (x, z, w))
    assert rel(silu_mul_reference(x, z).detach(), (x / (1 + torch.exp(-x)) * z).detach()) < 1e-14
    assert torch.autograd.gradcheck(silu_mul_reference, (x, z))
    assert rel(sigmoid_gate_reference(x, z).detach(), (x / (1 + torch.exp(-z))).detach()) < 1e-14
    assert torch.autograd.gradcheck(sigmoid_gate_reference, (x, z))


def test_low_precision_is_computed_wide_and_rounded_once() -> None:
    x, z = randn(5, 64, dtype=torch.bfloat16), randn(5, 64, dtype=torch.bfloat16, seed=1)
    w = randn(64, dtype=torch.bfloat16, seed=2)
    for low, wide in (
        (silu_mul_reference(x, z), silu_mul_reference(x.double(), z.double())),
        (sigmoid_gate_reference(x, z), sigmoid_gate_reference(x.double(), z.double())),
        (rms_norm_reference(x, w, 1e-6, zero_centred=True),
         rms_norm_reference(x.double(), w.double(), 1e-6, zero_centred=True)),
    ):
        assert low.dtype == torch.bfloat16
        step = wide.abs() * 2**-8  # half a unit in the last place is 2**-9 of the value
        assert ((low.double() - wide).abs() <= step + 1e-30).all()


def test_gdn_gates() -> None:
    a, b, log_a, bias = leaf(5, 3), leaf(5, 3, seed=1), leaf(3, seed=2), leaf(3, seed=3)
    g, beta = gdn_gates_reference(a, b, log_a, bias)
    assert rel(g.detach(), (-log_a.exp() * torch.log1p((a + bias).exp())).detach()) < 1e-14
    assert rel(beta.detach(), (1 / (1 + torch.exp(-b))).detach()) < 1e-14
    low, strength = gdn_gates_reference(a.detach().bfloat16(), b.detach().bfloat16(), log_a.detach(), bias.detach())
    assert low.dtype == strength.dtype == torch.float32
    assert torch.autograd.gradcheck(gdn_gates_reference, (a, b, log_a, bias))


# -- attention


def test_attention_prologue() -> None:
    tokens, heads, kv, dim, rotary = 5, 4, 2, 8, 4
    q, k = leaf(tokens, heads, 2 * dim), leaf(tokens, kv, dim, seed=1)
    qw, kw = leaf(dim, seed=2), leaf(dim, seed=3)
    angles = randn(tokens, rotary // 2, seed=4)
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()

    def run(q, k, qw, kw):
        return attention_prologue_reference(q, k, qw, kw, cos, sin, 1e-6, zero_centred=True, gated=True)

    new_q, new_k, gate = run(q, k, qw, kw)
    assert torch.equal(gate, q[..., dim:])
    # a pair (i, i + rotary / 2) is a complex number that turns by its angle; the rest is untouched
    for got, raw, weight in ((new_q, q[..., :dim], qw), (new_k, k, kw)):
        normed = rms_norm_reference(raw, weight, 1e-6, zero_centred=True)
        turned = torch.complex(normed[..., :2], normed[..., 2:4]) * torch.exp(1j * angles)[:, None]
        expected = torch.cat((turned.real, turned.imag, normed[..., rotary:]), -1)
        assert rel(got.detach(), expected.detach()) < 1e-14
    assert torch.autograd.gradcheck(run, (q, k, qw, kw))
    plain_q, plain_k, none = attention_prologue_reference(
        q[..., :dim], k, None, None, torch.ones(tokens, dim), torch.zeros(tokens, dim), 1e-6, zero_centred=False,
        gated=False,
    )
    assert none is None
    assert torch.equal(plain_q, q[..., :dim])
    assert torch.equal(plain_k, k)


def naive_attention(q, k, v, lengths, scale, window):
    """Score by score, from the definition."""
    out, start = torch.zeros_like(q), 0
    groups = q.shape[1] // k.shape[1]
    for length in lengths:
        for t in range(start, start + length):
            first = start if window is None else max(start, t - window + 1)
            for head in range(q.shape[1]):
                keys, values = k[first : t + 1, head // groups], v[first : t + 1, head // groups]
                out[t, head] = torch.softmax(keys @ q[t, head] * scale, 0) @ values
        start += length
    return out


@pytest.mark.parametrize("window", [None, 1, 4, 64])
@pytest.mark.parametrize("lengths", [[1], [37], [3, 1, 40, 33, 2, 5]])
def test_varlen_attention(lengths: list[int], window: int | None) -> None:
    tokens, cu = sum(lengths), bounds(lengths)
    q, k, v = leaf(tokens, 4, 8), leaf(tokens, 2, 8, seed=1), leaf(tokens, 2, 8, seed=2)
    y = varlen_attention_reference(q, k, v, cu, cu, max(lengths), scale=0.3, window=window)
    ref = naive_attention(q.detach(), k.detach(), v.detach(), lengths, 0.3, window)
    assert rel(y.detach(), ref) < 1e-12
    low = varlen_attention_reference(
        q.detach().float(), k.detach().float(), v.detach().float(), cu, cu, max(lengths), scale=0.3, window=window
    )
    assert rel(low.double(), ref) < 2e-6


def test_varlen_attention_gradients() -> None:
    lengths = [3, 1, 5]
    cu = bounds(lengths)
    inputs = (leaf(9, 2, 4), leaf(9, 1, 4, seed=1), leaf(9, 1, 4, seed=2))
    for window in (None, 2):
        assert torch.autograd.gradcheck(
            lambda q, k, v, w=window: varlen_attention_reference(q, k, v, cu, cu, 5, scale=0.5, window=w), inputs
        )


# -- convolution and delta rule


@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("lengths", [[1], [2, 1, 9, 3, 4]])
def test_causal_conv1d(lengths: list[int], taps: int) -> None:
    tokens, cu = sum(lengths), bounds(lengths)
    x, w = leaf(tokens, 6), leaf(6, taps, seed=1)
    parts = []
    for part in x.detach().split(lengths):
        padded = F.pad(part.t()[None], (taps - 1, 0))
        parts.append(F.silu(F.conv1d(padded, w.detach()[:, None], groups=6))[0].t())
    y = causal_conv1d_reference(x, w, cu, cu)
    assert rel(y.detach(), torch.cat(parts)) < 1e-13
    assert torch.autograd.gradcheck(lambda a, b: causal_conv1d_reference(a, b, cu, cu), (x, w))


def delta_inputs(tokens: int, dtype: torch.dtype = F64, decay: float = 0.3) -> list[torch.Tensor]:
    """Grouped value heads: HV = 2 * HK."""
    g = -decay * randn(tokens, 4, seed=3).abs()
    values = [randn(tokens, 2, 6), randn(tokens, 2, 6, seed=1), randn(tokens, 4, 5, seed=2), g,
              torch.sigmoid(randn(tokens, 4, seed=4))]
    return [v.to(dtype).requires_grad_() for v in values]


@pytest.mark.parametrize(("dtype", "limit"), [(F64, 1e-12), (torch.float32, 2e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("decay", [0.01, 0.3, 20.0])
@pytest.mark.parametrize("lengths", [[1], [64], [65], [3, 130, 64, 1, 7]])
def test_chunked_delta_rule_is_the_recurrence(lengths, decay, dtype, limit) -> None:
    cu, tokens = bounds(lengths), sum(lengths)
    inputs = delta_inputs(tokens, dtype, decay)
    truth = delta_inputs(tokens, F64, decay)
    chunked = gated_delta_rule_reference(*inputs, cu, cu)
    naive = gated_delta_rule_naive(*truth, cu, cu)
    assert chunked.shape == (tokens, 4, 5)
    assert rel(chunked.detach().double(), naive.detach()) < limit
    weight = randn(tokens, 4, 5, seed=9)
    got = torch.autograd.grad((chunked * weight.to(dtype)).sum(), inputs)
    expected = torch.autograd.grad((naive * weight).sum(), truth)
    for name, a, b in zip(("q", "k", "v", "g", "beta"), got, expected, strict=True):
        # The decay's own gradient nearly cancels when the decay is strong: it is measured against the values' then.
        size = max(b.abs().max().item(), 1e-3 * expected[2].abs().max().item())
        # Summed over a chunk, a log decay of 20 a token reaches 1280, of which float32 keeps 1e-4.
        slack = (10 if decay > 1 else 1) * (50 if name == "g" else 1)
        assert (a.double() - b).abs().max().item() < limit * size * slack, name


def test_delta_rule_gradients_numerically(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_rule, "CHUNK", 3)
    cu = bounds([3, 1, 4])
    assert torch.autograd.gradcheck(lambda *x: gated_delta_rule_reference(*x, cu, cu), delta_inputs(8))


def test_delta_rule_goes_on_from_its_state() -> None:
    tokens, cu = 70, bounds([70])
    inputs = [x.detach() for x in delta_inputs(tokens)]
    whole = gated_delta_rule_naive(*inputs, cu, cu)
    out, state = gated_delta_rule_last_state(*(x[:66] for x in inputs))
    assert rel(out, whole[:66]) < 1e-12
    for t in range(66, tokens):
        out, state = gated_delta_rule_step(*(x[t : t + 1] for x in inputs), state)
        assert rel(out, whole[t : t + 1]) < 1e-12


# -- products


def test_linear_cross_entropy_and_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = leaf(11, 6), leaf(13, 6, seed=1)
    rows, targets = torch.tensor([0, 2, 3, 7, 10]), torch.tensor([1, 0, 12, 5, 5])
    logits = hidden[rows] @ weight.t()
    expected = (torch.logsumexp(logits, 1) - logits[torch.arange(5), targets]).sum()
    whole = linear_cross_entropy_reference(hidden, weight, rows, targets)
    grads = torch.autograd.grad(whole, (hidden, weight))
    assert rel(whole.detach(), expected.detach()) < 1e-14
    monkeypatch.setattr(reference, "MAX_LOGITS", 26)  # two rows of 13 a chunk
    parts = linear_cross_entropy_reference(hidden, weight, rows, targets)
    assert rel(parts.detach(), whole.detach()) < 1e-14
    for a, b in zip(torch.autograd.grad(parts, (hidden, weight)), grads, strict=True):
        assert rel(a, b) < 1e-13
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy_reference(h, w, rows, targets), (hidden, weight)
    )


def test_linear_cross_entropy_without_rows() -> None:
    hidden, weight = leaf(4, 6), leaf(13, 6, seed=1)
    none = torch.zeros(0, dtype=torch.int64)
    loss = linear_cross_entropy_reference(hidden, weight, none, none)
    loss.backward()
    assert loss.item() == 0.0
    assert not hidden.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("plain_rows", [0, 3])
def test_lora_linear(plain_rows: int) -> None:
    r, sizes = 2, (4, 1, 5)
    x, a, b = leaf(7, 6), leaf(3 * r, 6, seed=1), leaf(sum(sizes), r, seed=2)
    weight, bias = leaf(sum(sizes) + plain_rows, 6, seed=3), leaf(sum(sizes) + plain_rows, seed=4)
    mask = (randn(7, 6, seed=5) > 0).double() * 2
    y = lora_linear_reference(x, weight, bias, a, b, sizes, 0.5, mask)
    columns, start = [], 0
    for i, size in enumerate(sizes):
        update = b[start : start + size] @ a[i * r : (i + 1) * r]
        columns.append((x * mask) @ update.t() * 0.5)
        start += size
    expected = x @ weight.t() + bias
    expected = torch.cat((expected[:, :start] + torch.cat(columns, 1), expected[:, start:]), 1)
    assert rel(y.detach(), expected.detach()) < 1e-14
    assert torch.autograd.gradcheck(
        lambda *t: lora_linear_reference(*t, sizes, 0.5, mask), (x, weight, bias, a, b)
    )
