"""What rank 0 knows and the other ranks hear: plan, place to resume from, tensors. They need not see its disk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from sparktune.setup.plan.schema import Plan
from sparktune.training.checkpoint import LoopState, StoredTensors, load_engine_state
from sparktune.training.distributed import World

__all__ = ["HeardTensors", "heard_plan", "heard_resume_point", "heard_state"]


class HeardTensors(Mapping[str, torch.Tensor]):
    """Tensors that rank 0 has and the others hear of. Every rank reads the same names in the same order.

    Args:
        world: the ranks.
        stored: rank 0's; None on the others.
    """

    def __init__(self, world: World, stored: StoredTensors | None) -> None:
        self._world, self._stored = world, stored
        facts = None if stored is None else json.dumps({
            name: (str(dtype).removeprefix("torch."), list(shape)) for name, (dtype, shape) in stored.kinds().items()
        })
        self._kinds: dict[str, tuple[str, list[int]]] = json.loads(world.hear(facts))

    def __getitem__(self, name: str) -> torch.Tensor:
        """Returns one tensor, on the CPU."""
        dtype, shape = self._kinds[name]
        if self._stored is not None:
            tensor = self._stored[name].contiguous()
        else:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        self._world.hear_tensor(tensor)
        return tensor

    def kinds(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Returns name -> (dtype, shape); nothing is sent."""
        return {name: (getattr(torch, dtype), tuple(shape)) for name, (dtype, shape) in self._kinds.items()}

    def __contains__(self, name: object) -> bool:
        """Says whether there is such a tensor; nothing is sent."""
        return name in self._kinds

    def __iter__(self) -> Iterator[str]:
        """Yields the names."""
        return iter(self._kinds)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._kinds)


def heard_state(world: World, checkpoint: Path) -> Mapping[str, torch.Tensor]:
    """Opens the engine's state of a checkpoint that rank 0 has validated."""
    if world.alone:
        return load_engine_state(checkpoint)
    return HeardTensors(world, load_engine_state(checkpoint) if world.leads else None)


def heard_plan(world: World, plan: Plan | None) -> Plan:
    """Returns rank 0's plan, with the number of ranks in it."""
    if world.alone:
        assert plan is not None, "there is nobody else to decide"
        return plan.model_copy(update={"ranks": 1})
    said = None if plan is None else plan.model_copy(update={"ranks": world.size}).model_dump_json()
    return Plan.model_validate_json(world.hear(said))


def heard_resume_point(
    world: World, found: tuple[Path | None, LoopState] | None
) -> tuple[Path | None, LoopState]:
    """Returns the checkpoint that rank 0 found, None for a fresh start, and the loop's state there."""
    if world.alone:
        assert found is not None, "there is nobody else to look"
        return found
    said = None
    if found is not None:
        said = json.dumps({"checkpoint": found[0] and str(found[0]), "state": asdict(found[1])})
    heard = json.loads(world.hear(said))
    return heard["checkpoint"] and Path(heard["checkpoint"]), LoopState(**heard["state"])
