"""The parts of a product share one gradient: written in place by ops that ask, copied in from those that do not."""

import pytest
import torch

from sparktune.kernels.columns import carry_place, grad_columns, split_columns
from sparktune.kernels.rms_norm.function import add_rms_norm_fused
from sparktune.kernels.rms_norm.reference import add_rms_norm_reference
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


@pytest.mark.parametrize("cut", [False, True])
def test_a_norm_writes_the_product_s_gradient_without_a_copy(cut):
    """Also where the backward pass is cut in two between the product and the norm (training/stages.py)."""
    product, residual = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    weight, seeds = torch.randn(8), (torch.randn(5, 8), torch.randn(5, 8))
    (part,) = split_columns(product, (8,))
    x = part
    if cut:
        x = part.detach().requires_grad_()
        carry_place(part, x)
    outputs = add_rms_norm_fused(x, residual, weight, 1e-6, zero_centred=True)
    if cut:
        d_part, d_residual = torch.autograd.grad(outputs, (x, residual), seeds)
        assert grad_columns(part) is not None
        (d_product,) = torch.autograd.grad(part, product, d_part)
    else:
        d_product, d_residual = torch.autograd.grad(outputs, (product, residual), seeds)
    ref = torch.autograd.grad(
        add_rms_norm_reference(product, residual, weight, 1e-6, zero_centred=True), (product, residual), seeds
    )
    torch.testing.assert_close(d_product, ref[0])
    torch.testing.assert_close(d_residual, ref[1])
    assert d_product.data_ptr() == d_residual.data_ptr(), "both are one tensor: nobody copied it"


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
