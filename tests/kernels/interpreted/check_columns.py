"""The parts of a product share one gradient: written in place by ops that ask, copied in from those that do not."""

import pytest
import torch

from sparktune.kernels.columns import grad_columns, split_columns
from sparktune.kernels.silu_mul.function import silu_mul_fused


def test_silu_mul_writes_the_grouped_gradient_without_a_copy(monkeypatch):
    copies = []
    copy = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, *a, **k: copies.append(self) or copy(self, *a, **k))
    product = torch.randn(5, 12, requires_grad=True)
    gate, up = split_columns(product * 1, (6, 6))
    y = silu_mul_fused(gate, up)
    # the interpreter itself copies tensors to the host and back: look at the split's own backward
    seed = torch.randn_like(y)
    copies.clear()
    (d,) = torch.autograd.grad(y, product, seed)
    assert not [c for c in copies if c.shape == gate.shape and c.stride() == (12, 1)]
    ref = torch.nn.functional.silu(product[:, :6]) * product[:, 6:]
    torch.testing.assert_close(d, torch.autograd.grad(ref, product, seed)[0])


def test_a_part_that_nobody_uses_has_a_zero_gradient():
    product = torch.randn(4, 6, requires_grad=True)
    first, second, _ = split_columns(product * 1, (1, 3, 2))
    (d,) = torch.autograd.grad((second * 2).sum() + first.sum(), product)
    assert torch.equal(d, torch.tensor([1.0, 2, 2, 2, 0, 0]).expand(4, 6))


def test_a_second_backward_through_the_same_graph_is_right():
    product = torch.randn(4, 6, requires_grad=True)
    gate, up = split_columns(product * 1, (3, 3))
    y = silu_mul_fused(gate, up).sum()
    (once,) = torch.autograd.grad(y, product, retain_graph=True)
    (twice,) = torch.autograd.grad(y, product)
    assert torch.equal(once, twice)


def test_only_a_whole_part_has_columns():
    product = torch.randn(4, 12, requires_grad=True)
    first, _ = split_columns(product, (8, 4))
    assert grad_columns(first) is not None
    assert grad_columns(first.unflatten(1, (2, 4))) is not None
    assert grad_columns(first[:, :4]) is None
    assert grad_columns(first * 1) is None


def test_sizes_must_sum_to_the_width():
    with pytest.raises(ValueError, match="needs"):
        split_columns(torch.zeros(2, 5), (2, 2))
