"""A frozen base in four or eight bits: how it is stored, built without ever being whole, and what is stored so.

Quantised is every large projection of every layer, each by itself (as PEFT and transformers do it, whatever is grouped
for a product). Embeddings, norms, convolutions, the head, and the GDN's a and b projections, which are tiny and decide
what is forgotten, stay in the compute type.

nf4     bitsandbytes' NF4 in blocks of 64 (Dettmers et al. 2023), the blocks' scales in eight bits too ("double
        quantisation") unless the plan says otherwise: 0.516 or 0.5625 bytes a weight
int8    kernels/frozen_weight.py, Int8Rows: 1 byte a weight and 4 a row; needs no package
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sparktune.kernels.frozen_weight import FrozenWeight, Int8Rows, PlainRows, StoredRows
from sparktune.kernels.modules.projection import ProjectionGroup
from sparktune.kernels.modules.rotary import inverse_frequencies
from sparktune.kernels.select import OpTable
from sparktune.setup.plan.basestorage import BaseStorage
from sparktune.setup.plan.errors import PreflightError
from sparktune.setup.plan.schema import ModelSpec
from sparktune.training.tower import TextTower

__all__ = [
    "Nf4Rows", "build_hollow", "frozen_parameters", "import_bitsandbytes", "put_stored", "stored_bytes", "storing",
]

_PLAIN = ("in_proj_a", "in_proj_b")
_BLOCK = 64
"""NF4 weights with one scale."""


@contextmanager
def _without_hub_kernels() -> Iterator[None]:
    """bitsandbytes, imported on a CPU with AVX-512, fetches compiled code from a hub if the package `kernels` is there.

    Nothing here asks for that code (it serves generation), so the import meets a package that cannot be imported.
    """
    held, logger = sys.modules.get("kernels"), logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    sys.modules.update({"kernels": None})
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if held is None:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = held


def import_bitsandbytes(wanted_by: str, instead: str) -> Any:
    """Returns the module bitsandbytes.functional.

    Args:
        wanted_by: the flag that asks for it, for the message.
        instead: flags that do without.

    Raises:
        PreflightError: it is not installed, or does not start here.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise PreflightError(
            f"{wanted_by} needs the package bitsandbytes 0.49 or later, which this Python does not have. Install it "
            f"(pip install 'sparktune[quantised]'), or use {instead}."
        )
    try:
        with _without_hub_kernels():
            return importlib.import_module("bitsandbytes.functional")
    except Exception as error:  # a wheel without a library for this CUDA raises whatever its loader meets
        raise PreflightError(
            f"{wanted_by} needs bitsandbytes, which is installed but does not start here: {type(error).__name__}: "
            f"{error}. Mend the installation (BNB_CUDA_VERSION names another CUDA library), or use {instead}."
        ) from error


class Nf4Rows(StoredRows):
    """A projection in bitsandbytes' NF4.

    Args:
        weight: [n, K] on the device where it is to be stored.
        double: quantise the blocks' scales too.
        library: bitsandbytes.functional.
    """

    def __init__(self, weight: torch.Tensor, *, double: bool, library: Any) -> None:
        super().__init__()
        self.n_rows, self._library, self._shape = weight.shape[0], library, weight.shape
        # bitsandbytes knows no float64
        source = weight.float() if weight.dtype == torch.float64 else weight
        # A block a row: blocks run over the ends of rows, which its kernel for CPUs, unlike that for GPUs, gets wrong.
        width = _BLOCK if weight.numel() % _BLOCK == 0 else weight.numel()
        packed, self._state = library.quantize_4bit(
            source.reshape(-1, width).contiguous(), blocksize=_BLOCK, compress_statistics=double, quant_type="nf4"
        )
        self.register_buffer("packed", packed, persistent=False)

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns what bitsandbytes dequantised, a fresh tensor.

        Its argument `out` goes unused: bitsandbytes 0.49 compares out.shape with the shape that PyTorch's dispatcher
        hands over as a list, which is never equal, so its CUDA kernel refuses every `out`.
        """
        made: torch.Tensor = self._library.dequantize_4bit(self.packed, self._state)
        return made.view(self._shape).to(dtype)

    def widen(self, out: torch.Tensor) -> None:
        """Dequantises and copies."""
        out.copy_(self.whole(out.dtype))

    def stored_bytes(self) -> int:
        """Bytes of the packed values, the scales, and the scales' scales."""
        inner = self._state.state2
        scales = [self._state.absmax, *([inner.absmax] if inner is not None else [])]
        return self.packed.nbytes + sum(t.nbytes for t in scales)


def storing(storage: BaseStorage, double: bool) -> Callable[[str, torch.Tensor], StoredRows]:
    """Returns what turns (projection name, weight [n, K]) into its stored form.

    Args:
        storage: nf4 or int8.
        double: NF4 with double quantisation.

    Raises:
        PreflightError: nf4 without a working bitsandbytes.
    """
    if storage == "nf4":
        library = import_bitsandbytes(
            "A base in nf4", "--quantise-base int8, which needs no package, or --mode lora, whose base is not quantised"
        )

        def quantised(weight: torch.Tensor) -> StoredRows:
            return Nf4Rows(weight, double=double, library=library)
    else:
        assert storage == "int8", "a base that is not quantised is not stored this way"
        quantised = Int8Rows
    return lambda name, weight: PlainRows(weight) if name in _PLAIN else quantised(weight)


def build_hollow(spec: ModelSpec, ops: OpTable, dtype: torch.dtype, device: torch.device) -> TextTower:
    """Returns a tower whose projections have no memory yet; `load_weights(store=...)` fills them as they are stored.

    So a base never exists whole in the compute type, on no device.

    Args:
        spec: from `probe`.
        ops: from `select_ops`.
        dtype: compute type.
        device: where it will train.
    """
    model = TextTower(spec, ops, dtype=dtype, device=torch.device("meta"))
    hollow = {id(group.weight) for _, _, _, group in model.groups()}
    for path, parameter in list(model.named_parameters()):
        if id(parameter) not in hollow:
            owner, _, leaf = path.rpartition(".")
            real = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
            setattr(model.get_submodule(owner), leaf, real)
    wide = torch.promote_types(dtype, torch.float32)
    model.inv_freq = inverse_frequencies(spec.rope_theta, spec.rope_dim, spec.rope_scaling, wide, device)
    model.device = device
    assert not any(buffer.is_meta for buffer in model.buffers()), "every buffer of the tower is made again here"
    return model


def put_stored(model: TextTower, stored: dict[str, dict[str, StoredRows]]) -> None:
    """Puts the stored projections in their groups.

    Args:
        model: from `build_hollow`.
        stored: name of a group's weight in `named_parameters()` -> projection -> its rows.
    """
    for prefix, _, attribute, group in model.groups():
        assert isinstance(group, ProjectionGroup), "adapters are attached after the base is loaded"
        rows = stored[f"{prefix}.{attribute}.weight".removeprefix("model.")]
        group.store(FrozenWeight({name: rows[name] for name in group.names}, group.in_features, model.dtype))


def frozen_parameters(model: nn.Module) -> int:
    """Returns how many weights are stored in fewer bits (or beside such), which `parameters()` does not count."""
    return sum(m.shape.numel() for m in model.modules() if isinstance(m, FrozenWeight))


def stored_bytes(model: nn.Module) -> int:
    """Returns the bytes those weights take."""
    return sum(m.stored_bytes() for m in model.modules() if isinstance(m, FrozenWeight))
