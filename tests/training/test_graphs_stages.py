"""The passes that graphs record, on the CPU: work is run again instead of replayed, all else is the real code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparktune.lab.native import Rerun, build_engine, documents_row
from sparktune.lab.shapes import random_documents
from sparktune.setup.plan.errors import SparktuneError
from sparktune.training.batch import MicroBatch
from sparktune.training.native_engine import NativeEngine

PACKINGS = ([20, 12], [32], [1, 3, 5, 23])


def row(lengths: list[int], seed: int) -> MicroBatch:
    documents = random_documents(lengths, 0.5, seed)
    return documents_row([(ids % 512, torch.where(labels < 0, labels, labels % 512)) for ids, labels in documents])


def engine_of(folder: Path, *, full: bool, recompute: str, graphs: bool, dtype: str = "float64") -> NativeEngine:
    engine = build_engine(folder, rank=4, full=full, recompute=recompute, dtype=dtype, device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in engine.model.named_parameters():
            if name.endswith("lora_b"):  # a zero B would hide every gradient of A
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    if graphs:
        engine.graphs.objection, engine.graphs.recorder = "", Rerun
        engine._optimiser.keep_gradients = True
    return engine


def gradients(engine: NativeEngine) -> dict[str, torch.Tensor]:
    return {name: gradient.clone() for name, gradient in engine.named_gradients() if gradient is not None}


@pytest.mark.parametrize(
    ("recompute", "full"), [("none", False), ("norms", False), ("layer", False), ("all", False), ("norms", True),
                            ("layer", True), ("layer:1", False), ("layer:3", True)],
)
def test_recorded_passes_give_the_gradients_of_eager_ones(tiny_model: Path, recompute: str, full: bool) -> None:
    """Over packings other than the one that was recorded, two micro-batches a step, both steps' weights included."""
    eager = engine_of(tiny_model, full=full, recompute=recompute, graphs=False)
    graphed = engine_of(tiny_model, full=full, recompute=recompute, graphs=True)
    for seed, lengths in enumerate(PACKINGS):
        batches = [row(lengths, seed), row(lengths, seed + 100)]
        supervised = sum(b.supervised_tokens for b in batches)
        losses = [engine.forward_backward(batches, supervised).item() for engine in (eager, graphed)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-12), lengths
        expected, got = gradients(eager), gradients(graphed)
        assert got.keys() == expected.keys()
        for name, gradient in expected.items():
            scale = gradient.abs().max()
            assert (gradient - got[name]).abs().max() <= 1e-11 * scale + 1e-15, f"{name} on documents {lengths}"
        for engine in (eager, graphed):
            engine.optimiser_step(1e-3)
    assert len(graphed.graphs.captured) == 1, "nothing was recorded"
    weights = dict(graphed.model.named_parameters())
    for name, parameter in eager.model.named_parameters():
        assert torch.allclose(parameter, weights[name], rtol=1e-9, atol=1e-12), name


def test_bfloat16_weights_add_their_gradients_to_float32_masters(tiny_model: Path) -> None:
    eager = engine_of(tiny_model, full=True, recompute="layer", graphs=False, dtype="bfloat16")
    graphed = engine_of(tiny_model, full=True, recompute="layer", graphs=True, dtype="bfloat16")
    for seed in range(4):
        batch = row([20, 12], seed)
        for engine in (eager, graphed):
            engine.forward_backward([batch, batch], 2 * batch.supervised_tokens)
        expected, got = gradients(eager), gradients(graphed)
        for name, gradient in expected.items():
            assert got[name].dtype == torch.float32, name
            difference = (gradient - got[name]).norm() / gradient.norm()
            # Eager gradients of matrices are rounded to bfloat16 before they reach the sum, recorded ones are not.
            assert difference < (5e-3 if gradient.ndim == 2 else 1e-6), f"{name} differs by {difference:.1e}"
        for engine in (eager, graphed):
            for _, gradient in engine.named_gradients():
                assert gradient is not None
                gradient.zero_()
    assert len(graphed.graphs.captured) == 1, "nothing was recorded"


def test_gradients_stay_where_they_are(tiny_model: Path) -> None:
    """A captured graph adds to addresses: a step must not move them, nor leave last step's sums in them."""
    engine = engine_of(tiny_model, full=False, recompute="layer", graphs=True)
    batch = row([20, 12], 1)
    for _ in range(3):
        engine.forward_backward([batch], batch.supervised_tokens)
        engine.optimiser_step(1e-3)
    before = {name: gradient.data_ptr() for name, gradient in engine.named_gradients() if gradient is not None}
    assert all(not gradient.any() for gradient in gradients(engine).values())
    engine.forward_backward([batch], batch.supervised_tokens)
    engine.optimiser_step(1e-3)
    assert {name: gradient.data_ptr() for name, gradient in engine.named_gradients() if gradient is not None} == before


def test_a_row_of_more_documents_than_the_tables_hold_is_recorded_again(tiny_model: Path) -> None:
    engine = engine_of(tiny_model, full=False, recompute="none", graphs=True)
    for lengths in ([16, 16], [16, 16], [16, 16]):
        engine.graphs.find(row(lengths, 0))
    first = engine.graphs.captured[32]
    assert first.max_documents == 8
    found = engine.graphs.find(row([2] * 16, 0))
    assert found is engine.graphs.captured[32] is not first
    assert found is not None
    assert found.max_documents == 24


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_types_after_training_are_the_plan_s(tiny_model: Path, tmp_path: Path, full: bool, graphs: bool) -> None:
    """Compute type for weights, float32 for what drifts when rounded and for everything the optimiser owns."""
    engine = engine_of(tiny_model, full=full, recompute="layer", graphs=graphs, dtype="bfloat16")
    batch = row([20, 12], 3)
    for _ in range(4):
        engine.forward_backward([batch], batch.supervised_tokens)
        engine.optimiser_step(1e-3)
    for name, parameter in engine.model.named_parameters():
        wide = name.endswith(("A_log", "dt_bias", "lora_a", "lora_b"))
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name
    moments = [t for name, t in engine.state().items() if name.startswith(("master.", "exp_avg"))]
    assert moments
    assert {t.dtype for t in moments} == {torch.float32}
    engine.export(tmp_path / "result")
    with torch.no_grad():
        engine.model.norm.data = engine.model.norm.data.float()
    with pytest.raises(SparktuneError, match=r"norm is torch\.float32 and was torch\.bfloat16"):
        engine.export(tmp_path / "again")
