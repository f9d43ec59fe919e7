"""A quantised base on a GPU: bitsandbytes' kernels, through CUDA graphs, against the dequantised base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparktune.kernels.modules.static_lora import StaticLoRA
from sparktune.lab.native import build_engine, documents_row
from sparktune.lab.shapes import make_model, random_documents

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_graphs_over_a_quantised_base_are_the_eager_passes(tmp_path: Path, storage: str) -> None:
    folder = make_model(tmp_path / "tiny", "tiny")
    losses: dict[str, list[float]] = {}
    for kind in ("graphs", "eager", "dequantised"):
        plain = kind == "dequantised"
        engine = build_engine(folder, rank=8, full=False, recompute="norms", quantise_base=storage)
        if plain:
            stored = {path: m.weight for path, m in engine.model.named_modules() if isinstance(m, StaticLoRA)}
            engine = build_engine(folder, rank=8, full=False, recompute="norms")
            with torch.no_grad():
                for path, module in engine.model.named_modules():
                    if isinstance(module, StaticLoRA):
                        module.weight.copy_(stored[path].dense())
        if kind != "graphs":
            engine.graphs.objection = "this test compares with eager passes"
        losses[kind] = []
        for step in range(5):
            batch = documents_row(random_documents([300, 212], 0.5, seed=step % 2))
            losses[kind].append(engine.forward_backward([batch], batch.supervised_tokens).item())
            engine.optimiser_step(1e-3)
        if kind == "graphs":
            assert engine.graphs.captured, engine.graphs.objection
    assert losses["graphs"] == pytest.approx(losses["eager"], rel=1e-3)
    assert losses["eager"] == pytest.approx(losses["dequantised"], rel=2e-3)
