"""bitsandbytes' optimiser kernels behind our bookkeeping, on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sparktune.training.checkpoint import write_safetensors
from sparktune.training.optimiser import MasterAdamW

pytestmark = pytest.mark.gpu


def optimiser(optimizer: str) -> tuple[MasterAdamW, list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(2)
    shapes = ((1000, 300), (96, 64), (33,))
    parameters = [nn.Parameter(torch.randn(*shape, generator=generator).cuda()) for shape in shapes]
    named = [(f"p{i}", p) for i, p in enumerate(parameters)]
    return MasterAdamW(
        named, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, max_grad_norm=1.0, optimizer=optimizer
    ), parameters


def steps(adam: MasterAdamW, parameters: list[nn.Parameter], numbers: range) -> None:
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).cuda()
        adam.step(1e-2)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"])
def test_the_kernels_are_adamw_and_resume_bit_by_bit(optimizer: str, tmp_path: Path) -> None:
    ref, ref_parameters = optimiser("adamw")
    whole, parameters = optimiser(optimizer)
    start = [p.detach().clone() for p in parameters]
    steps(ref, ref_parameters, range(6))
    steps(whole, parameters, range(6))
    for before, mine, theirs in zip(start, parameters, ref_parameters, strict=True):
        assert (mine - theirs).norm() <= 0.15 * (theirs - before).norm()
    first, first_parameters = optimiser(optimizer)
    steps(first, first_parameters, range(3))
    write_safetensors(tmp_path / "engine.safetensors", first.state())
    second, second_parameters = optimiser(optimizer)
    second.load_state(load_file(tmp_path / "engine.safetensors"))
    steps(second, second_parameters, range(3, 6))
    torch.cuda.synchronize()
    for name, value in whole.state().items():
        assert torch.equal(value, second.state()[name]), name
