"""The optimisers: torch's and bitsandbytes', their state through a file and back, and what a CPU is told.

bitsandbytes has no CPU kernels for its optimisers, so here their place is taken by the same arithmetic over its
dynamic map; tests/training/test_moments_gpu.py runs the kernels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sparktune.setup.plan.errors import PreflightError
from sparktune.training import moments
from sparktune.training.checkpoint import write_safetensors
from sparktune.training.moments import BnbMoments, make_moments
from sparktune.training.optimiser import MasterAdamW
from sparktune.training.quantised import import_bitsandbytes


class OnTheCpu:
    """bitsandbytes.functional with its two update functions in plain PyTorch."""

    def __init__(self) -> None:
        self.create_dynamic_map = import_bitsandbytes("A test", "nothing").create_dynamic_map
        self.paged: list[torch.Tensor] = []

    def get_paged(self, *shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        self.paged.append(torch.empty(shape, dtype=dtype))
        return self.paged[-1]

    def fill(self, tensor: torch.Tensor, value: int) -> None:
        tensor.fill_(value)

    def prefetch_tensor(self, tensor: torch.Tensor) -> None:
        assert any(tensor is one for one in self.paged)

    def _adam(self, g: Any, p: Any, m: Any, v: Any, betas: Any, eps: float, step: int, lr: float, decay: float) -> None:
        m.mul_(betas[0]).add_(g, alpha=1 - betas[0])
        v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        p.mul_(1 - lr * decay)
        p.addcdiv_(m / (1 - betas[0] ** step), (v / (1 - betas[1] ** step)).sqrt() + eps, value=-lr)

    def optimizer_update_32bit(
        self, name: str, g: Any, p: Any, m: Any, beta1: float, eps: float, step: int, lr: float, v: Any, beta2: float,
        *, weight_decay: float,
    ) -> None:
        self._adam(g, p.data, m, v, (beta1, beta2), eps, step, lr, weight_decay)

    def optimizer_update_8bit_blockwise(
        self, name: str, g: Any, p: Any, m: Any, v: Any, beta1: float, beta2: float, beta3: float, alpha: float,
        eps: float, step: int, lr: float, signed: Any, unsigned: Any, m_scale: Any, v_scale: Any, *,
        weight_decay: float,
    ) -> None:
        wide = [_widened(byte, scale, code) for byte, scale, code in ((m, m_scale, signed), (v, v_scale, unsigned))]
        self._adam(g, p.data, *wide, (beta1, beta2), eps, step, lr, weight_decay)
        for value, byte, scale, code in ((wide[0], m, m_scale, signed), (wide[1], v, v_scale, unsigned)):
            _narrow(value, byte, scale, code)


def _widened(byte: torch.Tensor, scale: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    return (code[byte.flatten().long()] * scale.repeat_interleave(256)[: byte.numel()]).view(byte.shape)


def _narrow(value: torch.Tensor, byte: torch.Tensor, scale: torch.Tensor, code: torch.Tensor) -> None:
    blocks = torch.nn.functional.pad(value.flatten(), (0, -value.numel() % 256)).view(-1, 256)
    scale.copy_(blocks.abs().amax(1))
    steps = (blocks / scale[:, None].clamp(min=1e-30)).flatten()[: value.numel()]
    nearest = torch.bucketize(steps, (code[1:] + code[:-1]) / 2)
    byte.copy_(nearest.to(torch.uint8).view(byte.shape))


OPTIMIZERS = ("adamw", "adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit")


def optimiser(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> tuple[MasterAdamW, list[nn.Parameter]]:
    def make(kind: str, masters: Any, **values: Any) -> Any:
        if kind in ("adamw", "adamw_torch"):
            return make_moments(kind, masters, **values)
        return BnbMoments(masters, **values, eight_bit=kind.endswith("8bit"), paged=kind.startswith("paged"),
                          library=OnTheCpu())

    monkeypatch.setattr("sparktune.training.optimiser.make_moments", make)
    monkeypatch.setattr(moments.torch.cuda, "synchronize", lambda: None)
    generator = torch.Generator().manual_seed(2)
    shapes = ((400, 300), (96, 64), (33,))  # paged, quantised, small
    parameters = [nn.Parameter(torch.randn(*shape, generator=generator)) for shape in shapes]
    named = [(f"p{i}", p) for i, p in enumerate(parameters)]
    return MasterAdamW(
        named, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, max_grad_norm=1.0, optimizer=optimizer
    ), parameters


def steps(adam: MasterAdamW, parameters: list[nn.Parameter], numbers: range) -> None:
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        adam.step(1e-2)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_goes_through_a_file_bit_by_bit(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, whole_parameters = optimiser(optimizer, monkeypatch)
    steps(whole, whole_parameters, range(6))
    first, first_parameters = optimiser(optimizer, monkeypatch)
    steps(first, first_parameters, range(3))
    write_safetensors(tmp_path / "engine.safetensors", first.state())
    second, second_parameters = optimiser(optimizer, monkeypatch)
    second.load_state(load_file(tmp_path / "engine.safetensors"))
    steps(second, second_parameters, range(3, 6))
    for name, value in whole.state().items():
        assert torch.equal(value, second.state()[name]), name
    for one, other in zip(whole_parameters, second_parameters, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("optimizer", OPTIMIZERS[1:])
def test_the_steps_are_adamws(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ref, ref_parameters = optimiser("adamw", monkeypatch)
    other, parameters = optimiser(optimizer, monkeypatch)
    start = [p.detach().clone() for p in parameters]
    steps(ref, ref_parameters, range(5))
    steps(other, parameters, range(5))
    tolerance = 0.15 if optimizer.endswith("8bit") else 1e-5
    for before, mine, theirs in zip(start, parameters, ref_parameters, strict=True):
        moved = (theirs - before).norm()
        assert (mine - theirs).norm() <= tolerance * moved
    if optimizer.endswith("8bit"):
        state = other.state()
        assert state["exp_avg.p1"].dtype == torch.uint8
        assert state["exp_avg_sq_scale.p1"].numel() == 96 * 64 // 256
        assert state["exp_avg.p2"].dtype == torch.float32  # too small to be worth it


def test_a_state_of_another_optimiser_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    eight, _ = optimiser("adamw_8bit", monkeypatch)
    whole, _ = optimiser("adamw", monkeypatch)
    with pytest.raises(ValueError, match=r"exp_avg_scale\.p0 is missing"):
        eight.load_state(whole.state())


@pytest.mark.parametrize("optimizer", OPTIMIZERS[2:])
def test_a_cpu_is_told_so(optimizer: str) -> None:
    parameter = nn.Parameter(torch.zeros(3))
    with pytest.raises(PreflightError, match="need a CUDA GPU") as caught:
        make_moments(optimizer, {"p": parameter}, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    assert caught.value.exit_code == 3
