"""The memory planner against the real engine's allocations, and against what a GPU measured."""

from __future__ import annotations

import csv
import itertools
import re
from pathlib import Path

import pytest

from sparktune.lab.memory_trace import trace_step
from sparktune.lab.native import recompute_fields
from sparktune.setup.plan.activations import Step, allocated, step_bytes
from sparktune.setup.plan.errors import MemoryBudgetError
from sparktune.setup.plan.memory import (
    ADAPTED,
    PeakEstimate,
    Policy,
    adapter_parameters,
    cheapest_policy,
    check_fits,
    predict_peak,
)
from sparktune.setup.plan.models import CATALOGUE, spec_from_config
from sparktune.setup.plan.schema import DatasetReport, LengthStats, Machine, ModelSpec, Plan

H200 = Machine(device="cuda", gpu_name="NVIDIA H200", capability=(9, 0), memory_gib=139.0, cpu_cores=16,
               disk_free_gib=100)
_TABLE = Path(__file__).parents[3] / "docs" / "results" / "memory_graphs.csv"
GRAPHS = list(csv.DictReader(_TABLE.read_text(encoding="utf-8").splitlines()))
TOKENS = 384
SUPERVISED = 0.35


def small(**changes: object) -> ModelSpec:
    """A hybrid of four layers whose tensors a CPU makes in a moment."""
    fields: dict[str, object] = {
        "source": "small", "model_type": "qwen3_5_text", "native": True, "vocab_size": 4096, "hidden_size": 256,
        "intermediate_size": 768, "num_layers": 4, "num_heads": 4, "num_kv_heads": 1, "head_dim": 64,
        "layer_types": [*["linear_attention"] * 3, "full_attention"], "tie_word_embeddings": True, "norm_eps": 1e-6,
        "zero_centred_norm": True, "qk_norm": True, "attention_gate": True, "rope_theta": 1e7, "rope_dim": 16,
        "gdn_key_heads": 8, "gdn_value_heads": 8, "gdn_key_dim": 32, "gdn_value_dim": 32, "gdn_conv_kernel": 4,
        "max_position_embeddings": 1024, "parameters": 1, **changes,
    }
    return ModelSpec(**fields)


DENSE = small(layer_types=["full_attention"] * 4, attention_gate=False, model_type="qwen3")
GROUPED = small(gdn_value_heads=16, tie_word_embeddings=False, vocab_size=16384)


@pytest.mark.parametrize(
    ("spec", "mode", "policy", "accum", "capability"),
    [
        (small(), "lora", "none", 2, (9, 0)),
        (small(), "lora", "norms", 2, (9, 0)),
        (small(), "lora", "layer", 2, (12, 1)),
        (small(num_layers=8, layer_types=["linear_attention"] * 8), "lora", "all", 2, (9, 0)),
        (small(), "lora", "norms", 1, (9, 0)),
        (small(), "full", "norms", 2, (9, 0)),
        (DENSE, "lora", "none", 2, (12, 1)),
        (DENSE, "full", "layer", 2, (9, 0)),
        (GROUPED, "lora", "norms", 2, (9, 0)),
        (GROUPED, "full", "none", 1, (9, 0)),
        (small(), "lora", "layer:1", 2, (9, 0)),
        (GROUPED, "lora", "layer:2", 2, (9, 0)),
        (DENSE, "full", "layer:3", 2, (9, 0)),
    ],
)
def test_the_formula_is_what_the_engine_allocates(
    spec: ModelSpec, mode: str, policy: str, accum: int, capability: tuple[int, int]
) -> None:
    rank = 16
    plan = Plan(mode=mode, lora_r=rank, **recompute_fields(policy))
    traced = trace_step(spec, plan, [TOKENS], supervised=SUPERVISED, accum=accum, capability=capability)
    step = Step(
        tokens=TOKENS, supervised=TOKENS - int(TOKENS * (1 - SUPERVISED)), full=mode == "full",
        rank=0 if mode == "full" else rank, targets=frozenset(ADAPTED), dropout=False,
        gradients_accumulate=accum > 1, split_heads=capability[0] == 9,
    )
    learning = traced.weights // 2 if mode == "full" else adapter_parameters(spec, rank)
    predicted = traced.weights + 12 * learning + step_bytes(spec, plan.recompute, step, plan.recompute_layers).peak
    assert predicted == pytest.approx(traced.peak, rel=0.02)
    assert predicted > 0.985 * traced.peak


@pytest.mark.parametrize(("spec", "policy"), [(small(), "norms"), (GROUPED, "layer"), (DENSE, "none")])
def test_a_quantised_base_is_what_the_engine_allocates(spec: ModelSpec, policy: str) -> None:
    plan = Plan(mode="qlora", quantise_base="int8", lora_r=16, recompute=policy)
    traced = trace_step(spec, plan, [TOKENS], supervised=SUPERVISED, accum=2)
    step = Step(
        tokens=TOKENS, supervised=TOKENS - int(TOKENS * (1 - SUPERVISED)), full=False, rank=16,
        targets=frozenset(ADAPTED), dropout=False, gradients_accumulate=True, split_heads=True, widened=1.0,
    )
    predicted = traced.weights + 12 * adapter_parameters(spec, 16) + step_bytes(spec, policy, step).peak
    assert predicted == pytest.approx(traced.peak, rel=0.03)
    assert predicted > 0.985 * traced.peak


def test_what_quantised_bases_and_small_moments_save() -> None:
    spec = spec_from_config(CATALOGUE["Qwen/Qwen3.5-9B"], "Qwen/Qwen3.5-9B")

    def estimate(machine: Machine = H200, **changes: object) -> PeakEstimate:
        plan = Plan(**{"mode": "lora", "lora_r": 128, "recompute": "layer", **changes})
        return predict_peak(plan, spec, machine, tokens=5376, longest=5376)

    weights = [estimate(quantise_base=s, mode=m).weights_gib
               for s, m in (("nf4", "qlora"), ("int8", "qlora"), ("none", "lora"))]
    head = 2 * spec.vocab_size * spec.hidden_size * 2 / 2**30
    quantised = [w - head for w in weights]
    assert quantised[0] / quantised[2] == pytest.approx(0.258, abs=0.01)
    assert quantised[1] / quantised[2] == pytest.approx(0.5, abs=0.01)
    plain, eight, paged = (estimate(mode="full", optimizer=o).trained_gib
                           for o in ("adamw", "adamw_8bit", "paged_adamw_32bit"))
    parameters = spec.parameters / 2**30
    assert plain - eight == pytest.approx((8 - 2.03125) * parameters, rel=1e-3)
    assert plain - paged == pytest.approx(8 * parameters, rel=1e-3)
    unified = H200.model_copy(update={"unified_memory": True})
    assert estimate(unified, mode="full", optimizer="paged_adamw_32bit").trained_gib == pytest.approx(plain)


@pytest.mark.parametrize(("name", "memory_gib"), [("H200", 139.0), ("GB10", 113.0)])
def test_9b_lora_fits_the_two_machines(name: str, memory_gib: float) -> None:
    spec = spec_from_config(CATALOGUE["Qwen/Qwen3.5-9B"], "Qwen/Qwen3.5-9B")
    machine = H200.model_copy(update={"memory_gib": memory_gib, "unified_memory": name == "GB10"})
    plan = Plan(mode="lora", lora_r=128, pack_length=5376, recompute="auto")
    assert check_fits(plan, spec, _report(4000), machine).total_gib <= memory_gib


def test_a_measured_peak() -> None:
    # H200, torch 2.11: LoRA r=128 on all projections of the 2B, one document of 5376 tokens, recompute norms,
    # accumulation 2, eager passes: max_memory_allocated 14.615 GiB.
    spec = spec_from_config(CATALOGUE["Qwen/Qwen3.5-2B"], "Qwen/Qwen3.5-2B")
    plan = Plan(mode="lora", lora_r=128, gradient_accumulation=2, recompute="norms")
    estimate = predict_peak(plan, spec, H200, tokens=5376, longest=5376, supervised=1882)
    assert estimate.allocator_gib == pytest.approx(14.615, rel=0.01)
    assert estimate.total_gib > estimate.allocator_gib + estimate.graphs_gib


@pytest.mark.parametrize("row", GRAPHS, ids=lambda row: f"{row['plan']} {row['commit']} {row['tool']}")
def test_what_graphs_reserve(row: dict[str, str]) -> None:
    """The rows that the pools' room was fitted to; the table's predictions are today's."""
    spec = spec_from_config(CATALOGUE[f"Qwen/Qwen3.5-{row['size']}"], f"Qwen/Qwen3.5-{row['size']}")
    plan = Plan(mode=row["mode"], lora_r=int(row["rank"]) or None, gradient_accumulation=int(row["accum"]),
                **recompute_fields(row["recompute"]))
    estimate = predict_peak(plan, spec, H200, tokens=int(row["tokens"]), longest=int(row["tokens"]),
                            supervised=int(row["supervised"]))
    predicted = estimate.allocator_gib + estimate.graphs_gib - float(row["less_gib"])
    assert predicted == pytest.approx(float(row["predicted_gib"]), abs=2e-3)
    assert 0.97 * float(row["measured_gib"]) <= predicted <= 1.07 * float(row["measured_gib"])


@pytest.mark.parametrize(("policy", "measured_gib"), [("layer", 10.7), ("none", 22.4)])
def test_unsloths_measured_peaks(policy: str, measured_gib: float) -> None:
    # H200, unsloth 2026.5.2, the same model and tokens: its checkpointing, and none.
    spec = spec_from_config(CATALOGUE["Qwen/Qwen3.5-2B"], "Qwen/Qwen3.5-2B")
    plan = Plan(mode="lora", lora_r=128, gradient_accumulation=2, recompute=policy, engine="unsloth")
    estimate = predict_peak(plan, spec, H200, tokens=5376, longest=5376, supervised=1882)
    assert estimate.allocator_gib == pytest.approx(measured_gib, rel=0.07)
    assert estimate.graphs_gib == 0.0


@pytest.mark.parametrize("policy", ["none", "norms", "layer", "all"])
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_graphs_cost_a_pool_of_their_own_and_dropout_goes_without(mode: str, policy: str) -> None:
    spec = spec_from_config(CATALOGUE["Qwen/Qwen3.5-2B"], "Qwen/Qwen3.5-2B")
    plan = Plan(mode=mode, lora_r=128, gradient_accumulation=2, recompute=policy)
    replayed = predict_peak(plan, spec, H200, tokens=5376, longest=5376, supervised=1882)
    assert 0.2 < replayed.graphs_gib < 5.5
    if mode == "lora":
        plan = plan.model_copy(update={"lora_dropout": 0.1})
        assert predict_peak(plan, spec, H200, tokens=5376, longest=5376).graphs_gib == 0.0
        plan = plan.model_copy(update={"lora_dropout": 0.0, "mode": "qlora"})
        assert predict_peak(plan, spec, H200, tokens=5376, longest=5376).graphs_gib == 0.0


def test_the_allocator_rounds() -> None:
    mib = 2**20
    assert allocated(1) == 512
    assert allocated(513) == 1024
    assert allocated(21 * mib) == 22 * mib  # a segment of 22 MiB whose rest is not worth a split
    assert allocated(20 * mib + 512) == 20 * mib + 512  # the rest, nearly 2 MiB, is split off


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("size", ["0.8B", "2B"])
def test_each_layer_computed_again_takes_less_memory(size: str, mode: str) -> None:
    spec = spec_from_config(CATALOGUE[f"Qwen/Qwen3.5-{size}"], f"Qwen/Qwen3.5-{size}")
    plan = Plan(mode=mode, lora_r=128, gradient_accumulation=2)

    def peak(policy: Policy, layers: int | None = None) -> PeakEstimate:
        return predict_peak(plan, spec, H200, tokens=5376, longest=5376, policy=policy, layers=layers, supervised=1882)

    peaks = [peak("norms"), *(peak("layer", n) for n in range(1, spec.num_layers + 1))]
    totals = [estimate.total_gib for estimate in peaks]
    assert all(a >= b for a, b in itertools.pairwise(totals))
    assert totals[0] > totals[1] > totals[-2]
    assert peaks[-1] == peak("layer"), "all layers are the policy itself"
    assert peaks[3].recompute == "layer:3"


def test_a_plan_that_computes_too_few_layers_again_is_told_how_many() -> None:
    spec = spec_from_config(CATALOGUE["Qwen/Qwen3.5-2B"], "Qwen/Qwen3.5-2B")
    plan = Plan(mode="lora", lora_r=128, pack_length=16384, recompute="layer", recompute_layers=4)
    budget = H200.model_copy(update={"memory_gib": 24.0})
    with pytest.raises(MemoryBudgetError, match=r"recompute layer:4.*--recompute-layers \d+") as caught:
        check_fits(plan, spec, _report(4000), budget)
    layers = int(re.search(r"--recompute-layers (\d+)", str(caught.value)).group(1))
    assert check_fits(plan.model_copy(update={"recompute_layers": layers}), spec, _report(4000), budget)
    with pytest.raises(MemoryBudgetError):
        check_fits(plan.model_copy(update={"recompute_layers": layers - 1}), spec, _report(4000), budget)


def _report(longest: int) -> DatasetReport:
    lengths = LengthStats(count=10, total=10 * longest, mean=longest, p50=longest, p90=longest, p99=longest,
                          max=longest, histogram_edges=[0, longest], histogram_counts=[10])
    return DatasetReport(
        path="x", sha256="", bytes=1, rows=10, kept=10, train_examples=10, eval_examples=0, formats={}, dropped={},
        problems=[], lengths=lengths, supervised_tokens=1, supervised_share=0.4, multi_turn=0, with_system=0,
        with_thinking=0, duplicates=0, eval_leaks=0, packing={}, cache_key="",
    )


def test_auto_takes_the_cheapest_policy_that_fits_and_says_what_it_tried() -> None:
    spec = spec_from_config(CATALOGUE["Qwen/Qwen3.5-2B"], "Qwen/Qwen3.5-2B")
    plan, report = Plan(mode="lora", lora_r=128, pack_length=16384), _report(4000)
    wide, tried = cheapest_policy(plan, spec, report, H200)
    assert wide.policy == "none"
    assert len(tried) == 1
    budget = 24.0
    tight, tried = cheapest_policy(plan, spec, report, H200.model_copy(update={"memory_gib": budget}))
    assert tight.policy != "none"
    assert all(estimate.total_gib > budget for estimate in tried[:-1])
    assert tight.total_gib <= budget
    assert check_fits(plan, spec, report, H200.model_copy(update={"memory_gib": budget})).policy == tight.policy


def test_a_budget_nothing_fits_in_names_what_would() -> None:
    spec = spec_from_config(CATALOGUE["Qwen/Qwen3.5-2B"], "Qwen/Qwen3.5-2B")
    little = H200.model_copy(update={"memory_gib": 7.2})
    with pytest.raises(MemoryBudgetError, match=r"needs about [\d.]+ GiB, but 7\.2 GiB") as caught:
        check_fits(Plan(mode="lora", lora_r=128, pack_length=16384), spec, _report(4000), little)
    assert "--pack-length" in str(caught.value)
    assert "--recompute" not in str(caught.value)  # auto has tried every policy
    assert caught.value.exit_code == 5
