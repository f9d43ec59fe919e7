"""Tensors of which every rank may have only some rows (torch's DTensor), read and written as if they were whole.

DTensor is imported by those who make one (training/sharding.py) and by nobody else: the import takes a second.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["WholeTensors", "copy_into", "is_spread", "local_rows", "split_spread", "whole"]


def is_spread(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Says whether this rank has only some of the rows."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def split_spread(tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Returns (those of which this rank has some rows, as these rows; those that every rank has whole)."""
    return [t.to_local() for t in tensors if is_spread(t)], [t for t in tensors if not is_spread(t)]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Returns all rows of a tensor. Of a spread one every rank must ask, in the same order."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def local_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this rank's rows of a tensor that may be spread."""
    return tensor.to_local() if is_spread(tensor) else tensor


def copy_into(own: torch.Tensor, value: torch.Tensor) -> None:
    """Copies a whole tensor into one that may be spread: each rank takes its rows. Nothing is sent."""
    if is_spread(own):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
    own.copy_(value)


class WholeTensors(Mapping[str, torch.Tensor]):
    """Tensors that may be spread, read whole one at a time; the last one read stays, for its parts are asked for next.

    Args:
        tensors: name -> tensor.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._last: tuple[str, torch.Tensor] | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        """Gathers one tensor; every rank asks for the same ones in the same order."""
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = (name, whole(self._tensors[name]))
        return self._last[1]

    def __contains__(self, name: object) -> bool:
        """Says whether there is such a tensor; gathers nothing, as Mapping's own answer would."""
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        """Yields the names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._tensors)
