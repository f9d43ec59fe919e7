"""A sharded tower computes in bfloat16 what the whole one computes: hidden states in bf16, rotary tables in float32."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from sparktune.kernels.select import reference_ops
from sparktune.setup.plan.models import probe
from sparktune.setup.plan.schema import Plan
from sparktune.training import sharding
from sparktune.training.distributed import World
from sparktune.training.moments import TorchMoments
from sparktune.training.native_engine import NativeEngine
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


@pytest.mark.usefixtures("group_of_one")
def test_a_file_of_the_base_is_opened_once(
    oracles: Callable[[str], tuple[Any, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file may hold hundreds of tensors, and lie on a disk that answers over a network."""
    folder = oracles("qwen3")[1]
    spec, tensors = probe(str(folder)), load_file(folder / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, tmp_path / file)
    index = {name: file for file, held in parts.items() for name in held}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    opened: list[str] = []
    real = sharding.safe_open
    monkeypatch.setattr(sharding, "safe_open", lambda path, **how: opened.append(path.name) or real(path, **how))
    whole, split = (build_sharded(spec, reference_ops(), torch.float32, torch.device("cpu"), 1) for _ in range(2))
    load_sharded(whole, folder, spec)
    opened.clear()
    load_sharded(split, tmp_path, spec)
    assert sorted(opened) == list(parts)
    ref = dict(whole.named_parameters())
    assert all(torch.equal(p, ref[name]) for name, p in split.named_parameters())


@pytest.mark.usefixtures("group_of_one")
def test_the_fused_update_takes_spread_tensors_beside_whole_ones() -> None:
    """As on a GPU: every layer's A_log and dt_bias are whole, all else is spread."""
    mesh, draw = init_device_mesh("cpu", (1,)), torch.Generator().manual_seed(1)
    values = {f"{name}{i}": torch.randn(shape, generator=draw)
              for i in range(2) for name, shape in (("weight", (6, 4)), ("norm", (6,)), ("A_log", (3,)))}
    gradients = {name: torch.randn(value.shape, generator=draw) for name, value in values.items()}

    def updated(fused: bool) -> dict[str, torch.Tensor]:
        masters = {name: nn.Parameter(value.clone()) for name, value in values.items()}
        if fused:
            masters |= {name: nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]))
                        for name, value in values.items() if not name.startswith("A_log")}
        moments = TorchMoments(masters, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        for group in moments._adamw.param_groups:
            group["fused"] = fused
        for name, master in masters.items():
            gradient = gradients[name]
            spread = fused and not name.startswith("A_log")
            master.grad = distribute_tensor(gradient, mesh, [Shard(0)]) if spread else gradient.clone()
        moments.update(1e-2)
        return {name: master.detach().full_tensor() if hasattr(master, "full_tensor") else master.detach()
                for name, master in masters.items()}

    plain, fused = updated(False), updated(True)
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-6, atol=1e-7)
        assert not torch.equal(value, values[name])


@pytest.mark.usefixtures("group_of_one")
def test_what_is_evaluated_and_answered_can_still_be_exported(
    oracles: Callable[[str], tuple[Any, Path]], documents: Callable[..., list[list[int]]], row: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """A pass without a backward left bfloat16 parameters behind, and the first save after it ended the run."""
    folder = oracles("qwen3_5")[1]
    plan = Plan(model=str(folder), mode="full", engine="native", dtype="bfloat16", recompute="none")
    engine = NativeEngine._sharded_engine(
        plan, probe(str(folder)), folder, torch.device("cpu"), reference_ops(), World())
    batch = row(documents([30, 9]))
    for step in range(2):
        engine.forward_backward([batch], batch.supervised_tokens)
        engine.optimiser_step(1e-3)
        assert engine.loss_sum(batch) > 0
        assert len(engine.generate([1, 2, 3], 4, [])) == 4
        engine.export(tmp_path / f"weights-{step}")
    one, two = (load_file(next((tmp_path / f"weights-{step}").glob("*.safetensors"))) for step in range(2))
    assert any(not torch.equal(one[name], two[name]) for name in one)
