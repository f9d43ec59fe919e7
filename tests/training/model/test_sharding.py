"""A sharded tower computes in bfloat16 what the whole one computes: hidden states in bf16, rotary tables in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sparktune.kernels.select import reference_ops
from sparktune.setup.plan.models import probe
from sparktune.training.sharding import build_sharded, load_sharded
from sparktune.training.tower import TextTower


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3"])
def test_bfloat16_is_the_whole_towers_bit_for_bit(
    family: str, oracles: Callable[[str], tuple[Any, Path]], build: Callable[..., TextTower],
    documents: Callable[..., list[list[int]]], row: Callable[..., Any],
) -> None:
    folder = oracles(family)[1]
    batch, spec = row(documents([30, 9, 200])), probe(str(folder))
    sharded = build_sharded(spec, reference_ops(), torch.bfloat16, torch.device("cpu"), 1)
    load_sharded(sharded, folder, spec)
    seen: list[tuple[torch.dtype, ...]] = []
    block = sharded.layers[0]
    computed = block.forward
    block.forward = lambda delta, h, row: seen.append((row.cos.dtype, row.sin.dtype)) or computed(delta, h, row)
    with torch.no_grad():
        loss = sharded.loss_sum(batch)
        expected = build(folder, torch.bfloat16).loss_sum(batch)
    assert seen == [(torch.float32, torch.float32)]
    assert loss == expected
