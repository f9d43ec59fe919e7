"""LoRA on a base in NF4 and in int8: the same gradients as on the dequantised base, less memory, and it learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparktune.kernels.frozen_weight import FrozenWeight, Int8Rows, frozen_linear
from sparktune.kernels.lora_linear.function import lora_linear_fused
from sparktune.kernels.lora_linear.reference import lora_linear_reference
from sparktune.kernels.modules.static_lora import StaticLoRA
from sparktune.setup.plan.models import probe
from sparktune.setup.plan.schema import Plan
from sparktune.training import quantised
from sparktune.training.batch import MicroBatch
from sparktune.training.graphs import why_not_graphs
from sparktune.training.merge_gap import measure_merge_gap
from sparktune.training.native_engine import NativeEngine
from sparktune.training.quantised import Nf4Rows, frozen_parameters, import_bitsandbytes, stored_bytes

CPU = torch.device("cpu")
STORAGES = [("nf4", True), ("nf4", False), ("int8", True)]


def row(seed: int = 3) -> MicroBatch:
    """Two documents of 9 and 14 tokens."""
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = torch.tensor([0, 9, 23], dtype=torch.int32)
    ids = torch.randint(3, 500, (23,), generator=generator)
    rows = torch.tensor([3, 4, 5, 7, 12, 15, 16, 20, 21])
    return MicroBatch(
        ids=ids, position_ids=torch.cat([torch.arange(9), torch.arange(14)]), cu_seqlens=cu_seqlens,
        cu_seqlens_cpu=cu_seqlens, max_seqlen=14, supervised_rows=rows, targets=ids[rows + 1], examples=(0, 1),
        real_tokens=23,
    )


def engine(model: Path, storage: str, *, double: bool = True, dtype: str = "float32", **values: object) -> NativeEngine:
    plan = Plan(**{
        "model": str(model), "mode": "lora", "dtype": dtype, "device": "cpu", "recompute": "none", "lora_r": 4,
        "quantise_base": storage, "double_quantise": double, **values,
    })
    built = NativeEngine.build(plan, probe(str(model)), model, CPU)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # B is zero at the start, and with it A's gradient
        for module in built.model.modules():
            if isinstance(module, StaticLoRA):
                module.lora_b.normal_(0, 0.05, generator=generator)
    return built


def on_the_dequantised_base(model: Path, like: NativeEngine, **values: object) -> NativeEngine:
    """An engine whose base is plain, with exactly the weights that the quantised one multiplies with."""
    plain = engine(model, "none", **values)
    modules = dict(like.model.named_modules())
    with torch.no_grad():
        for path, module in plain.model.named_modules():
            if isinstance(module, StaticLoRA):
                module.weight.copy_(modules[path].weight.dense())
    return plain


@pytest.mark.parametrize(
    ("storage", "double", "recompute"),
    [("nf4", True, "none"), ("nf4", False, "norms"), ("int8", True, "norms"), ("int8", True, "layer")],
)
def test_gradients_are_those_of_the_dequantised_base(
    tiny_model: Path, storage: str, double: bool, recompute: str
) -> None:
    values = {"recompute": recompute, "dtype": "float64" if storage == "int8" else "float32"}
    small = engine(tiny_model, storage, double=double, **values)
    plain = on_the_dequantised_base(tiny_model, small, **values)
    losses = [e.forward_backward([row(), row(5)], 18).item() for e in (small, plain)]
    tolerance = 1e-12 if storage == "int8" else 1e-5
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    ours, theirs = dict(small.named_gradients()), dict(plain.named_gradients())
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert gradient is not None, name
        assert bool(gradient.any()), name
        assert (gradient - theirs[name]).abs().max() <= 10 * tolerance * theirs[name].abs().max(), name


@pytest.mark.parametrize(("storage", "double"), STORAGES)
def test_it_takes_less_memory_and_learns(tiny_model: Path, storage: str, double: bool) -> None:
    small = engine(tiny_model, storage, double=double)
    dense_bytes = 4 * frozen_parameters(small.model)
    share = stored_bytes(small.model) / dense_bytes
    # of float32's four bytes; in_proj_a and in_proj_b stay as they are
    assert share < {"nf4": 0.16, "int8": 0.29}[storage]
    assert not any(p.is_meta for p in small.model.parameters())
    assert "quantised" in small.describe()
    losses = []
    for _ in range(8):
        losses.append(small.forward_backward([row(), row(5)], 18).item())
        small.optimiser_step(5e-3)
    assert losses[-1] < losses[0] - 0.2


def test_double_quantisation_is_smaller_and_nearly_as_near() -> None:
    library = import_bitsandbytes("A test", "nothing")
    weight = torch.randn(512, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    once, twice = (Nf4Rows(weight, double=double, library=library) for double in (False, True))
    assert once.stored_bytes() / weight.numel() == pytest.approx(0.5625, rel=1e-3)
    assert twice.stored_bytes() / weight.numel() == pytest.approx(0.5159, rel=1e-3)
    errors = []
    for stored in (once, twice):
        out = torch.full_like(weight, float("nan"))
        stored.widen(out)
        errors.append(((out - weight).norm() / weight.norm()).item())
    assert errors[0] < 0.1
    assert errors[1] < 1.05 * errors[0]


def test_int8_rounds_within_half_a_step_of_its_row() -> None:
    weight = torch.randn(33, 70, generator=torch.Generator().manual_seed(0))
    weight[4] = 0.0
    weight[5] *= 1e4
    out = torch.full_like(weight, float("nan"))
    Int8Rows(weight).widen(out)
    assert bool(((out - weight).abs() <= weight.abs().amax(1, keepdim=True) / 253.9).all())
    assert not out[4].any()


def test_the_widened_weight_is_not_kept_for_the_backward_pass() -> None:
    weight = torch.randn(64, 48)
    stored = FrozenWeight({"q_proj": Int8Rows(weight[:40]), "k_proj": Int8Rows(weight[40:])}, 48, torch.float32)
    kept: list[torch.Size] = []
    x = torch.randn(5, 48, requires_grad=True)
    a, b = (torch.randn(*size, requires_grad=True) for size in ((8, 48), (64, 4)))

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    for op in (lora_linear_fused, lora_linear_reference):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = op(x, stored, None, a, b, (40, 24), 2.0)
            frozen = frozen_linear(x, stored, None)
        assert torch.Size((64, 48)) not in kept
        ref = op(x, stored.dense(), None, a, b, (40, 24), 2.0)
        assert torch.allclose(y, ref, atol=1e-5)
        assert torch.allclose(frozen, x @ stored.dense().t(), atol=1e-5)
        ours, theirs = (torch.autograd.grad(out.square().sum(), (x, a, b)) for out in (y, ref))
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.allclose(mine, other, rtol=1e-4, atol=1e-4)


def test_projections_keep_their_stored_values_when_the_order_changes(tiny_model: Path) -> None:
    some = engine(tiny_model, "nf4", target_modules=["v_proj", "down_proj"])
    groups = [m for m in some.model.modules() if isinstance(m, StaticLoRA) and "v_proj" in m.names]
    assert groups
    assert all(list(m.weight.stored) == ["v_proj", "q_proj", "k_proj"] for m in groups)
    plain = on_the_dequantised_base(tiny_model, some, target_modules=["v_proj", "down_proj"])
    by_path = dict(some.model.named_modules())
    with torch.no_grad():  # groups without an adapter
        for path, module in plain.model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, torch.Tensor) and not isinstance(module, StaticLoRA):
                weight.copy_(by_path[path].weight.dense())
    assert some.loss_sum(row()).item() == pytest.approx(plain.loss_sum(row()).item(), rel=1e-5)


def test_without_bitsandbytes_it_says_what_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(quantised.PreflightError, match="--quantise-base int8") as caught:
        import_bitsandbytes("A base in nf4", "--quantise-base int8")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("storage", ["int8", "none"])
def test_graphs_go_without_a_quantised_base(tiny_model: Path, storage: str) -> None:
    model = engine(tiny_model, storage).model
    model.device = torch.device("cuda")
    assert ("quantised base" in why_not_graphs(model, {}, 0.0)) == (storage == "int8")


@pytest.mark.parametrize("storage", ["nf4", "int8", "none"])
def test_the_gap_is_that_between_the_two_models(tiny_model: Path, tmp_path: Path, storage: str) -> None:
    trained = engine(tiny_model, storage)
    batches = [row(), row(5)]
    found = measure_merge_gap(trained.model, tiny_model, batches)
    # the merged model, made independently: the same adapters over the plain base
    plain = engine(tiny_model, "none")
    with torch.no_grad():
        for module in plain.model.modules():
            if isinstance(module, StaticLoRA):
                for name in module.adapted:
                    a, b = module.adapter_of(name, module.lora_a, module.lora_b)
                    module.weight[module.rows()[name]] += module.scale * (b @ a)
                module.lora_b.zero_()
        losses = [sum(e.loss_sum(b).item() for b in batches) / 18 for e in (trained, plain)]
        p, q = (
            torch.cat([torch.log_softmax(e.model.logits(b)[b.supervised_rows], -1) for b in batches])
            for e in (trained, plain)
        )
    assert found["tokens"] == 18
    assert found["loss_trained"] == pytest.approx(losses[0], rel=1e-4)
    assert found["loss_merged"] == pytest.approx(losses[1], rel=1e-4)
    each = (p.exp() * (p - q)).sum(-1)
    assert found["kl_mean"] == pytest.approx(each.mean().item(), rel=0.02, abs=1e-6)
    assert found["kl_max"] == pytest.approx(each.max().item(), rel=0.02, abs=1e-6)
    limits = {"none": (0.0, 1e-5), "int8": (1e-9, 1e-2), "nf4": (1e-5, 10.0)}[storage]
    assert limits[0] <= found["kl_mean"] <= limits[1]
    assert all(isinstance(m.weight, FrozenWeight) == (storage != "none") for m in trained.model.modules()
               if isinstance(m, StaticLoRA))  # everything is back in its place


def test_a_run_on_the_cpu_records_it(tiny_model: Path, smoke: Path, start_train: Any, tmp_path: Path) -> None:
    process = start_train(
        "--model", tiny_model, "--train-data", smoke, "--mode", "qlora", "--max-steps", "2", "--lora-r", "4",
        "--name", "q", "--eval-split", "0.2", "--pack-length", "256", "--max-seq-length", "512",
    )
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    found = json.loads((tmp_path / "results" / "q" / "quantised_base.json").read_text())
    assert found["base"] == "nf4"
    assert found["rows"] == "held out"
    assert 0 <= found["kl_mean"] <= found["kl_max"]
    assert "the merge is made with its original weights" in out + err
