"""A quantised base on a GPU: bitsandbytes' kernels against the dequantised base, without CUDA graphs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparktune.kernels.modules.static_lora import StaticLoRA
from sparktune.lab.native import build_engine, documents_row
from sparktune.lab.shapes import make_model, random_documents

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_a_quantised_base_trains_like_the_same_weights_dequantised(tmp_path: Path, storage: str) -> None:
    folder = make_model(tmp_path / "tiny", "tiny")
    losses: dict[str, list[float]] = {}
    for kind in ("quantised", "dequantised"):
        engine = build_engine(folder, rank=8, full=False, recompute="norms", quantise_base=storage)
        if kind == "quantised":
            assert "quantised" in engine.graphs.objection, "its graphs held 23.4 GiB where its passes need 13.3"
        else:
            stored = {path: m.weight for path, m in engine.model.named_modules() if isinstance(m, StaticLoRA)}
            engine = build_engine(folder, rank=8, full=False, recompute="norms")
            engine.graphs.objection = "this test compares eager passes"
            with torch.no_grad():
                for path, module in engine.model.named_modules():
                    if isinstance(module, StaticLoRA):
                        module.weight.copy_(stored[path].dense())
        losses[kind] = []
        for step in range(5):
            batch = documents_row(random_documents([300, 212], 0.5, seed=step % 2))
            losses[kind].append(engine.forward_backward([batch], batch.supervised_tokens).item())
            engine.optimiser_step(1e-3)
        assert not engine.graphs.captured
    assert losses["quantised"] == pytest.approx(losses["dequantised"], rel=2e-3)
