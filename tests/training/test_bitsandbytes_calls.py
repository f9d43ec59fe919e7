"""What we ask of bitsandbytes, held against what its CUDA kernels check or take for granted (0.49.2, backends/cuda).

The kernels take bare pointers: a wrong type, order or layout there is not an error but a wrong number, or none at all.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from sparktune.kernels.frozen_weight import FrozenWeight
from sparktune.training.moments import BnbMoments
from sparktune.training.quantised import Nf4Rows, import_bitsandbytes

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class SaysCuda(torch.Tensor):
    """A tensor on the CPU that takes the branches of one on a GPU."""

    @property
    def is_cuda(self) -> bool:
        return True


@pytest.fixture
def library() -> Iterator[Any]:
    """bitsandbytes.functional, whose dequantisation into `out` goes through the dispatcher as on CUDA."""
    functional = import_bitsandbytes("A test", "nothing")

    def into(A: Any, absmax: Any, blocksize: int, quant_type: str, shape: Any, dtype: Any, out: Any) -> None:
        torch._check(out.shape == shape, lambda: f"Expected out.shape == {shape}, got {out.shape}")
        torch._check(out.dtype == dtype, lambda: f"Expected out.dtype == {dtype}, got {out.dtype}")
        out.copy_(torch.ops.bitsandbytes.dequantize_4bit.default(A, absmax, blocksize, quant_type, shape, dtype))

    with torch.library._scoped_library("bitsandbytes", "IMPL") as scoped:
        scoped.impl("dequantize_4bit.out", into, "CPU")
        yield functional


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_a_weight_is_widened_as_the_cuda_kernel_has_it(library: Any, double: bool, dtype: torch.dtype) -> None:
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = {name: Nf4Rows(part, double=double, library=library) for name, part in (
        ("q_proj", weight[:16]), ("k_proj", weight[16:].t().contiguous().t()),
    )}
    for stored in rows.values():
        state = stored._state
        inner = [] if state.state2 is None else [(state.absmax, state.state2, 256)]
        assert state.blocksize in BLOCKS
        assert state.dtype in FLOATS
        for packed, nested, block in inner:
            assert packed.dtype == torch.uint8
            assert nested.blocksize == block
            assert nested.absmax.dtype == nested.code.dtype == nested.dtype == torch.float32
        assert double or state.absmax.dtype == torch.float32
        out = torch.full((stored.n_rows, 96), float("nan"), dtype=dtype).as_subclass(SaysCuda)
        stored.widen(out)
        assert not out.isnan().any()
        assert type(state.shape) is torch.Size
    whole = FrozenWeight(rows, 96, dtype).dense()
    assert whole.is_contiguous()
    for name, part in (("q_proj", whole[:16]), ("k_proj", whole[16:])):
        alone = FrozenWeight({name: rows[name]}, 96, dtype).dense()
        assert alone.dtype == dtype
        assert torch.equal(alone, part)
    assert (whole - weight).float().norm() < 0.12 * weight.float().norm()


@pytest.mark.parametrize("shape", [(16, 96), (5, 96), (3, 78), (7, 30), (1, 2), (40, 64)])
def test_blocks_run_over_the_ends_of_rows(library: Any, shape: tuple[int, int]) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    made = Nf4Rows(weight, double=False, library=library).whole(torch.float32)
    assert made.shape == shape
    # half the widest step between two of NF4's values, -1 and -0.6962, of the block's largest weight
    for block, near in zip(weight.flatten().split(64), made.flatten().split(64), strict=True):
        assert (block - near).abs().max() <= 0.1525 * block.abs().max()


def test_the_cuda_kernel_takes_no_out(library: Any) -> None:
    """Why `widen` copies. When this fails, bitsandbytes has mended it and the copy can go."""
    packed, state = library.quantize_4bit(torch.randn(16, 64), blocksize=64, quant_type="nf4")
    with pytest.raises(RuntimeError, match=r"Expected out\.shape"):
        library.dequantize_4bit(packed, state, out=torch.empty(16, 64))


class Kernels:
    """The optimiser's calls, bound to bitsandbytes' own signatures and held to what its kernels take for granted."""

    def __init__(self, functional: Any) -> None:
        self._functional = functional
        self.create_dynamic_map = functional.create_dynamic_map
        self.called: list[str] = []

    def get_paged(self, *shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        inspect.signature(self._functional.get_paged).bind(*shape, dtype=dtype, device=device)
        made = torch.empty(shape, dtype=dtype)
        made.is_paged = True
        return made

    def fill(self, tensor: torch.Tensor, value: int) -> None:
        assert tensor.is_paged
        assert tensor.dtype in (torch.float32, torch.uint8), "elementwise kernels exist for these two"
        tensor.fill_(value)

    def prefetch_tensor(self, tensor: torch.Tensor) -> None:
        assert tensor.is_paged

    def _update(self, function: str, *args: Any, **kwargs: Any) -> None:
        asked = inspect.signature(getattr(self._functional, function)).bind(*args, **kwargs)
        asked.apply_defaults()
        values = asked.arguments
        g, p, first, second = (values[name] for name in ("g", "p", "state1", "state2"))
        assert g.dtype == p.dtype == torch.float32
        assert g.shape == p.shape == first.shape == second.shape
        assert all(t.is_contiguous() for t in (g, p, first, second)), "read through bare pointers"
        assert g.numel() < 2**31, "counted in an int32"
        assert (values["beta1"], values["beta2"], values["eps"], values["lr"]) == (0.9, 0.95, 1e-8, 1e-3)
        assert type(values["step"]) is int
        assert values["step"] == 1
        assert values["gnorm_scale"] == 1.0
        assert values["weight_decay"] == (0.1 if p.ndim >= 2 else 0.0)
        wide = torch.uint8 if function.endswith("blockwise") else torch.float32
        assert first.dtype == second.dtype == wide
        if wide == torch.uint8:
            blocks = -(-p.numel() // 256)
            for code, scale in (("qmap1", "absmax1"), ("qmap2", "absmax2")):
                assert values[code].dtype == values[scale].dtype == torch.float32
                assert values[code].numel() == 256
                assert values[scale].numel() == blocks
            assert values["qmap1"].min() < 0 <= values["qmap2"].min()
        self.called.append(function)

    def optimizer_update_32bit(self, *args: Any, **kwargs: Any) -> None:
        self._update("optimizer_update_32bit", *args, **kwargs)

    def optimizer_update_8bit_blockwise(self, *args: Any, **kwargs: Any) -> None:
        self._update("optimizer_update_8bit_blockwise", *args, **kwargs)


@pytest.mark.parametrize("eight_bit", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_optimisers_kernels_get_what_they_take_for_granted(
    library: Any, eight_bit: bool, transposed: bool
) -> None:
    kernels = Kernels(library)
    masters = {f"p{i}": nn.Parameter(torch.randn(*shape)) for i, shape in enumerate([(400, 301), (96, 64), (33,)])}
    moments = BnbMoments(
        masters, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, eight_bit=eight_bit, paged=True, library=kernels
    )
    for master in masters.values():
        master.grad = torch.randn(master.shape[::-1]).t() if transposed and master.ndim == 2 else torch.randn(
            master.shape
        )
    moments.update(1e-3)
    small = ["optimizer_update_32bit"]
    assert kernels.called == (2 * ["optimizer_update_8bit_blockwise"] + small if eight_bit else 3 * small)


def test_masters_whose_values_do_not_lie_in_order_are_refused(library: Any) -> None:
    strided = {"p": nn.Parameter(torch.randn(64, 96).t())}
    with pytest.raises(AssertionError, match="in order"):
        BnbMoments(
            strided, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, eight_bit=True, paged=False,
            library=Kernels(library),
        )
