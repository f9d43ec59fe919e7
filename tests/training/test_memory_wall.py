"""An allocation that fails inside a step: less is kept from then on, and the step's loss and gradients are the same."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sparktune.lab.shapes import make_model
from sparktune.setup.data.cache import TokenDataset
from sparktune.setup.plan.models import probe
from sparktune.setup.plan.schema import Plan
from sparktune.training.memory import is_out_of_memory
from sparktune.training.native_engine import NativeEngine
from sparktune.training.packing import PackPlan

LENGTH = {"cpu": 128, "cuda": 8192}


def engine_of(folder: Path, device: str, recompute: str) -> NativeEngine:
    plan = Plan(model=str(folder), mode="lora", engine="native", dtype="float32" if device == "cpu" else "bfloat16",
                recompute=recompute, lora_r=4, lora_dropout=0.2, seed=11)
    return NativeEngine.build(plan, probe(str(folder)), folder, torch.device(device))


def packs(device: str) -> PackPlan:
    """Two packs of random tokens, every one supervised."""
    tokens = 2 * LENGTH[device]
    dataset = TokenDataset(
        np.random.default_rng(1).integers(0, 512, tokens).astype(np.uint32), np.ones(tokens, dtype=np.uint8),
        np.arange(0, tokens + 1, LENGTH[device] // 4, dtype=np.int64), np.arange(1, 9, dtype=np.int64), key="wall",
    )
    return PackPlan(dataset, pack=True, pack_length=LENGTH[device], seed=1)


def one_pass(engine: NativeEngine, data: PackPlan) -> tuple[float, float]:
    batches = [data.micro_batch(0, index) for index in range(len(data))]
    loss = engine.forward_backward(batches, sum(batch.supervised_tokens for batch in batches))
    return float(loss), float(engine.gradient_norm())


def test_every_policy_down_to_the_last_gives_the_same_step(tiny_model: Path) -> None:
    engine, data = engine_of(tiny_model, "cpu", "none"), packs("cpu")
    expected = one_pass(engine, data)
    taken = []
    while (policy := engine.recompute_more()) is not None:
        taken.append(policy)
        loss, norm = one_pass(engine, data)  # the masks of the pass that is done again, too
        assert loss == expected[0]
        assert norm == pytest.approx(expected[1], rel=1e-5)
    assert taken == ["norms", "layer", "all"]
    engine.drop_gradients()
    assert all(gradient is None or not gradient.any() for _, gradient in engine.named_gradients())


class Wall(torch.autograd.Function):
    """Passes hidden states on; the allocation that its backward needs fails."""

    @staticmethod
    def forward(_, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.clone()

    @staticmethod
    def backward(*_: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def tensor_bytes() -> int:
    return sum(t.numel() * t.element_size() for t in gc.get_objects() if issubclass(type(t), torch.Tensor))


def fail(_: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("policy", ["none", "norms", "layer"])
@pytest.mark.parametrize("wall", [fail, Wall.apply], ids=["forward", "backward"])
def test_nothing_is_left_of_the_pass_that_failed(
    tiny_model: Path, wall: Callable[[torch.Tensor], torch.Tensor], policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, data = engine_of(tiny_model, "cpu", policy), packs("cpu")
    one_pass(engine, data)
    engine.drop_gradients()
    gc.collect()
    gc.disable()  # what lies in reference cycles stays, as it may for long in a process with few objects
    try:
        before, norm = tensor_bytes(), engine.model.final_norm
        monkeypatch.setattr(engine.model, "final_norm", lambda delta, h: wall(norm(delta, h)))
        try:
            one_pass(engine, data)
        except torch.OutOfMemoryError:
            failed = True
        assert failed
        engine.recompute_more()
        assert tensor_bytes() <= before
    finally:
        gc.enable()


@pytest.mark.gpu
def test_a_real_shortage_on_a_gpu_ends_with_the_next_policy(tmp_path: Path) -> None:
    folder, data, device = make_model(tmp_path / "tiny", "tiny"), packs("cuda"), torch.device("cuda", 0)
    peaks, losses = {}, {}
    for policy in ("none", "layer"):
        gc.collect()  # what earlier tests of this process left behind, graphs' pools among it
        engine = engine_of(folder, "cuda", policy)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        losses[policy] = one_pass(engine, data)[0]
        peaks[policy] = torch.cuda.max_memory_reserved(device)
        del engine
    assert peaks["none"] - peaks["layer"] > 512 * 2**20, f"no cap lies well between them: {peaks}"
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(
        (peaks["none"] + peaks["layer"]) / 2 / torch.cuda.mem_get_info(device)[1], device)
    try:
        engine = engine_of(folder, "cuda", "none")
        with pytest.raises(torch.OutOfMemoryError) as caught:
            one_pass(engine, data)
        assert is_out_of_memory(caught.value)
        said = [str(caught.value)]
        del caught
        loss = None
        while loss is None and (policy := engine.recompute_more()) is not None:
            try:
                loss = one_pass(engine, data)[0]
            except torch.OutOfMemoryError as error:
                said.append(f"{policy}: {error}")
        assert loss == pytest.approx(losses["none"], rel=2e-3), f"peaks {peaks}; {said}"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
