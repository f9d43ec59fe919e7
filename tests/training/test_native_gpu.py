"""On a CUDA GPU: a step queues its work without waiting for the device, and a state goes into a new engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sparktune.lab.shapes import make_model
from sparktune.setup.data.cache import TokenDataset
from sparktune.setup.plan.models import probe
from sparktune.setup.plan.schema import Plan
from sparktune.training.native_engine import NativeEngine
from sparktune.training.packing import PackPlan

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def gpu_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of Qwen3.5's head dims: on the demo model's the fused delta rule refuses and the reference reads the host."""
    return make_model(tmp_path_factory.mktemp("gpu") / "tiny", "tiny")


@pytest.fixture
def batches() -> PackPlan:
    """Two packs of 256 tokens."""
    rng = np.random.default_rng(1)
    offsets = np.arange(0, 513, 64, dtype=np.int64)
    dataset = TokenDataset(
        rng.integers(0, 512, 512).astype(np.uint32), np.ones(512, dtype=np.uint8), offsets,
        np.arange(1, 9, dtype=np.int64), key="gpu",
    )
    return PackPlan(dataset, pack=True, pack_length=256, seed=1)


def make_engine(model: Path, mode: str, dropout: float = 0.1, recompute: str = "norms") -> NativeEngine:
    plan = Plan(
        model=str(model), mode=mode, engine="native", dtype="bfloat16", recompute=recompute, lora_r=4,
        lora_dropout=dropout, seed=11,
    )
    return NativeEngine.build(plan, probe(str(model)), model, torch.device("cuda"))


@pytest.mark.parametrize(("mode", "dropout", "recompute"), [
    ("lora", 0.1, "norms"), ("lora", 0.0, "norms"), ("lora", 0.0, "layer"), ("full", 0.0, "norms"),
])
def test_a_step_never_waits_for_the_device(
    gpu_model: Path, batches: PackPlan, mode: str, dropout: float, recompute: str
) -> None:
    engine = make_engine(gpu_model, mode, dropout, recompute)
    step = [batches.micro_batch(0, index) for index in range(len(batches))]
    supervised = sum(batch.supervised_tokens for batch in step)
    for _ in range(2):  # kernels compile and the allocator fills
        engine.forward_backward(step, supervised)
        engine.optimiser_step(1e-4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = engine.forward_backward(step, supervised)
        engine.optimiser_step(1e-4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_state_goes_into_a_new_engine(gpu_model: Path, batches: PackPlan, mode: str) -> None:
    engine = make_engine(gpu_model, mode)
    step = [batches.micro_batch(0, index) for index in range(len(batches))]
    supervised = sum(batch.supervised_tokens for batch in step)
    engine.forward_backward(step, supervised)
    engine.optimiser_step(1e-3)
    kept = {name: tensor.cpu() for name, tensor in engine.state().items()}
    again = make_engine(gpu_model, mode)
    again.load_state(kept)
    for name, tensor in again.state().items():
        assert torch.equal(tensor.cpu(), kept[name]), name
    losses = [e.forward_backward(step, supervised).item() for e in (engine, again)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
