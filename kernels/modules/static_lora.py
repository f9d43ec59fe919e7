"""LoRA on a group of projections, free of dictionaries and branches on the way: what PEFT's wrapper does per projection
happens here once a group. Each projection keeps its own A and B; only the compute is grouped.

Source: Hu et al. 2021 (LoRA); Kalajdzievski 2023 (rank-stabilised scale).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import nn

from sparktune.kernels.columns import split_columns
from sparktune.kernels.frozen_weight import FrozenWeight
from sparktune.kernels.modules.projection import ProjectionGroup, row_slices
from sparktune.kernels.modules.row import DropoutKey
from sparktune.kernels.precision import working_dtype
from sparktune.kernels.select import OpTable

__all__ = ["StaticLoRA"]


class StaticLoRA(nn.Module):
    """A frozen projection group with adapters on some or all of its projections.

    Inside, adapted projections come first (the op's contract); if they are not first already, the base weight is
    reordered once here. Outputs keep the group's own order.

    Args:
        group: the frozen group; its weight is taken over.
        adapted: names of the projections that get an adapter, at least one.
        r: rank.
        scale: alpha / r, or alpha / sqrt(r).
        dropout: probability on the adapters' input; one mask a group and forward pass.
        index: number of this module in the model; makes its masks its own.
        ops: the model's ops.
    """

    def __init__(
        self, group: ProjectionGroup, adapted: Sequence[str], *, r: int, scale: float, dropout: float, index: int,
        ops: OpTable,
    ) -> None:
        super().__init__()
        self.names, self.out_sizes, self.in_features = group.names, group.out_sizes, group.in_features
        self.r, self.scale, self.dropout, self.index, self.ops = r, scale, dropout, index, ops
        self.adapted = tuple(n for n in group.names if n in adapted)
        packed = (*self.adapted, *(n for n in group.names if n not in adapted))
        sizes = dict(zip(group.names, group.out_sizes, strict=True))
        self.adapted_sizes = tuple(sizes[n] for n in self.adapted)
        self._packed, self._packed_sizes = packed, tuple(sizes[n] for n in packed)
        self._output_order = tuple(packed.index(n) for n in group.names)
        bias, rows = None if group.bias is None else group.bias.detach(), group.rows()
        if bias is not None and packed != group.names:
            bias = torch.cat([bias[rows[n]] for n in packed])
        self.weight: nn.Parameter | FrozenWeight
        if isinstance(group.weight, FrozenWeight):
            weight: torch.Tensor | FrozenWeight = group.weight.reordered(packed)
            self.weight = weight
        else:
            weight = group.weight.detach()
            if packed != group.names:
                weight = torch.cat([weight[rows[n]] for n in packed])
            self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        new = {"dtype": working_dtype(weight), "device": weight.device}
        self.lora_a = nn.Parameter(torch.zeros(len(self.adapted) * r, self.in_features, **new))
        self.lora_b = nn.Parameter(torch.zeros(sum(self.adapted_sizes), r, **new))

    def rows(self) -> dict[str, slice]:
        """Returns projection name -> its rows of `weight` (and entries of `bias`)."""
        return row_slices(self._packed, self._packed_sizes)

    def adapter_of(self, name: str, lora_a: torch.Tensor, lora_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns one projection's A [r, in] and B [out, r], views of `lora_a` and `lora_b` or of their masters."""
        i = self.adapted.index(name)
        return lora_a[i * self.r : (i + 1) * self.r], lora_b[row_slices(self.adapted, self.adapted_sizes)[name]]

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Initialises as PEFT does: A kaiming-uniform with a = sqrt(5) for each projection, B zero.

        Args:
            generator: a CPU generator, so that the start does not depend on the device.
        """
        bound = math.sqrt(6.0 / ((1.0 + 5.0) * self.in_features))
        drawn = torch.empty(self.lora_a.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        self.lora_a.copy_(drawn)
        self.lora_b.zero_()

    def _mask(self, x: torch.Tensor, dropout: DropoutKey) -> torch.Tensor:
        """[T, in], 0 or 1 / (1 - p): a function of the key and this module alone, so recomputing draws it again."""
        text = f"{dropout.seed}/{dropout.call}/{self.index}".encode()
        seed = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")
        generator = torch.Generator(x.device).manual_seed(seed)
        keep = 1.0 - self.dropout
        return torch.empty_like(x).bernoulli_(keep, generator=generator).div_(keep)

    def forward(self, x: torch.Tensor, dropout: DropoutKey | None = None) -> tuple[torch.Tensor, ...]:
        """Returns the projections' outputs in the group's order, [T, out] each, sharing one tensor.

        Args:
            x: [T, in], in the base weight's dtype.
            dropout: the forward pass, for the mask; None turns dropout off.
        """
        mask = self._mask(x, dropout) if dropout is not None and self.dropout > 0 else None
        y = self.ops.lora_linear(
            x, self.weight, self.bias, self.lora_a, self.lora_b, self.adapted_sizes, self.scale, mask
        )
        parts = split_columns(y, self._packed_sizes)
        return tuple(parts[i] for i in self._output_order)
