"""A's rows below the base's: one product reads x once, and the same numbers come out."""

from __future__ import annotations

import pytest
import torch

from sparktune.kernels import columns
from sparktune.kernels.lora_linear.function import lora_linear_fused
from sparktune.kernels.modules.projection import ProjectionGroup
from sparktune.kernels.modules.static_lora import StaticLoRA
from sparktune.kernels.select import OpTable, reference_ops

R = 8
SIZES = (24, 16, 3)


def ops() -> OpTable:
    plain = reference_ops()
    names = {name: getattr(plain, name) for name in OpTable.__dataclass_fields__}
    return OpTable(**{**names, "lora_linear": lora_linear_fused})


def module(*, one_product: bool, dropout: float = 0.0, bias: bool = False, rank: int = R,
           dtype: torch.dtype = torch.float64) -> StaticLoRA:
    generator = torch.Generator().manual_seed(1)
    group = ProjectionGroup(("q", "k", "small"), SIZES, 32, bias=bias, dtype=dtype, device=torch.device("cpu"))
    with torch.no_grad():
        group.weight.copy_(torch.randn(group.weight.shape, generator=generator))
        if group.bias is not None:
            group.bias.copy_(torch.randn(group.bias.shape, generator=generator))
    made = StaticLoRA(
        group, ("q", "k"), r=rank, scale=0.5, dropout=dropout, index=0, ops=ops(), one_product=one_product
    )
    with torch.no_grad():
        made.lora_a.copy_(torch.randn(made.lora_a.shape, generator=generator))
        made.lora_b.copy_(torch.randn(made.lora_b.shape, generator=generator))
    return made


def run(made: StaticLoRA, x: torch.Tensor) -> list[torch.Tensor]:
    """Outputs, then the gradients of x, A and B; one part's gradient arrives without being asked where to go."""
    x = x.clone().requires_grad_()
    parts = made(x)
    loss = sum((part * torch.linspace(-1, 1, part.numel(), dtype=part.dtype).view_as(part)).sum() for part in parts)
    return [*parts, *torch.autograd.grad(loss, (x, made.lora_a, made.lora_b))]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-2)])
def test_outputs_and_gradients_are_those_of_two_products(
    dtype: torch.dtype, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    rooms = []
    beside = columns.room_beside
    monkeypatch.setattr(
        "sparktune.kernels.lora_linear.function.room_beside", lambda *a: rooms.append(beside(*a)) or rooms[-1]
    )
    one, two = module(one_product=True, dtype=dtype), module(one_product=False, dtype=dtype)
    assert one.stacked is not None
    assert two.stacked is None
    for got, expected in zip(run(one, x), run(two, x), strict=True):
        assert got.dtype == expected.dtype
        assert (got - expected).abs().max() <= limit * expected.abs().max()
    assert [r is not None for r in rooms] == [True], "the gradient came with room beside it"


def test_without_room_the_gradient_is_the_same() -> None:
    """A product whose gradient is not made by `split_columns`."""
    x = torch.randn(7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = []
    for made in (module(one_product=True), module(one_product=False)):
        leaf = x.clone().requires_grad_()
        y = lora_linear_fused(leaf, made.weight, None, made.lora_a, made.lora_b, (24, 16), 0.5, None, made.stacked)
        found.append(torch.autograd.grad((y**2).sum(), (leaf, made.lora_a, made.lora_b)))
    for got, expected in zip(*found, strict=True):
        assert torch.allclose(got, expected, rtol=1e-12, atol=0)


def test_the_base_weight_is_still_the_weight_and_a_follows_its_master() -> None:
    made = module(one_product=True)
    assert made.stacked is not None
    before = made.weight.detach().clone()
    assert [tuple(p.shape) for p in made.parameters()] == [(43, 32), (16, 32), (40, R)], "no further parameter"
    x = torch.randn(7, 32, dtype=torch.float64)
    first = made(x)[0].detach().clone()
    with torch.no_grad():
        made.lora_a.mul_(2)
    plain = torch.nn.functional.linear(x, made.weight[:24])
    assert torch.allclose(made(x)[0] - plain, 2 * (first - plain)), "the next forward pass sees the step"
    assert torch.equal(made.weight, before)
    with torch.no_grad():
        made.weight.mul_(3)  # a checkpoint is loaded into it
    assert torch.equal(made.stacked[:43], 3 * before)


def test_two_forward_passes_before_a_backward_are_right() -> None:
    made, x = module(one_product=True), torch.randn(7, 32, dtype=torch.float64)
    first, second = made(x)[0].sum(), made(x * 2)[0].sum()
    (a,) = torch.autograd.grad(second, made.lora_a)
    (b,) = torch.autograd.grad(first, made.lora_a)
    assert torch.allclose(a, 2 * b)


@pytest.mark.parametrize("changes", [{"dropout": 0.1}, {"bias": True}, {"rank": 6}])
def test_what_one_product_cannot_serve_has_no_room(changes: dict[str, object]) -> None:
    assert module(one_product=True, **changes).stacked is None


def test_memory_that_is_not_the_weight_s_is_refused() -> None:
    made, x = module(one_product=True), torch.randn(7, 32, dtype=torch.float64)
    assert made.stacked is not None
    with pytest.raises(ValueError, match="begins with the weight's own memory"):
        lora_linear_fused(
            x, made.weight, None, made.lora_a, made.lora_b, (24, 16), 0.5, None, made.stacked.clone()
        )
    with pytest.raises(ValueError, match="no dropout mask"):
        lora_linear_fused(
            x, made.weight, None, made.lora_a, made.lora_b, (24, 16), 0.5, torch.ones_like(x), made.stacked
        )
