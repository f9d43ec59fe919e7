"""Recommendations and the memory estimate: pure functions of plan, model, data and machine."""

from __future__ import annotations

from typing import Any

import pytest

from sparktune.setup.plan.errors import MemoryBudgetError
from sparktune.setup.plan.memory import adapter_parameters, check_fits, longest_row_tokens, predict_peak
from sparktune.setup.plan.models import CATALOGUE, spec_from_config
from sparktune.setup.plan.recommend import apply, planned_steps, recommend
from sparktune.setup.plan.schema import DatasetReport, LengthStats, Machine, ModelSpec, Plan

GB10 = Machine(device="cuda", gpu_name="NVIDIA GB10", capability=(12, 1), unified_memory=True, memory_gib=110,
               cpu_cores=20, disk_free_gib=1000)
SMALL_GPU = Machine(device="cuda", memory_gib=14, cpu_cores=8, disk_free_gib=100)
CPU = Machine(device="cpu", memory_gib=6, cpu_cores=2, disk_free_gib=50)


def _spec(size: str = "2B", **changes: Any) -> ModelSpec:
    name = f"Qwen/Qwen3.5-{size}"
    return spec_from_config(CATALOGUE[name], name).model_copy(update=changes)


def _report(examples: int, mean: float = 3000, p90: int = 5000, longest: int = 9000, **changes: Any) -> DatasetReport:
    lengths = LengthStats(count=examples, total=int(examples * mean), mean=mean, p50=int(mean * 0.8), p90=p90,
                          p99=longest, max=longest, histogram_edges=[0, longest], histogram_counts=[examples])
    candidates = {n: min(0.97, 0.7 + n / 40_000) for n in (128, 256, 512, 1024, 2048, 4096, 5120, 8192, 16384)}
    fields: dict[str, Any] = {
        "path": "data.jsonl", "sha256": "0" * 64, "bytes": 1, "rows": examples, "kept": examples,
        "train_examples": examples, "eval_examples": 10, "formats": {"messages": examples}, "dropped": {},
        "problems": [], "lengths": lengths, "supervised_tokens": 1, "supervised_share": 0.4, "multi_turn": 0,
        "with_system": 0, "with_thinking": 0, "duplicates": 0, "eval_leaks": 0, "packing": candidates,
        "cache_key": "key", **changes,
    }
    return DatasetReport(**fields)


def _values(plan: Plan, spec: ModelSpec, report: DatasetReport, machine: Machine) -> dict[str, Any]:
    return {r.field: r.value for r in recommend(plan, spec, report, machine)}


@pytest.mark.parametrize(
    ("size", "examples", "mean", "machine", "mode"),
    [
        ("2B", 24_315, 3000, GB10, "lora"),
        ("2B", 50_000, 3000, GB10, "lora"),
        ("2B", 80_000, 3000, GB10, "lora"),
        ("2B", 100_000, 1999, GB10, "lora"),  # 199.9M tokens
        ("2B", 100_000, 2000, GB10, "full"),
        ("27B", 100_000, 2000, GB10, "lora"),  # full does not fit
        ("9B", 5_000, 1000, SMALL_GPU, "qlora"),  # a bf16 base does not fit
        ("2B", 100_000, 2000, SMALL_GPU, "lora"),
        ("2B", 50, 40, CPU, "lora"),
    ],
)
def test_mode(size: str, examples: int, mean: float, machine: Machine, mode: str) -> None:
    report = _report(examples, mean=mean, p90=1500, longest=2048)
    assert _values(Plan(), _spec(size), report, machine)["mode"] == mode


def test_the_published_case_gives_the_published_recipe() -> None:
    got = _values(Plan(), _spec(), _report(24_315), GB10)
    assert got["lora_r"] == 128
    assert got["lora_alpha"] == 128.0
    assert got["learning_rate"] == 2e-4
    assert got["dtype"] == "bfloat16"
    assert got["engine"] == "native"
    assert 5000 <= got["pack_length"] <= 8192
    assert 6 <= got["gradient_accumulation"] <= 16
    steps = planned_steps(apply(Plan(), recommend(Plan(), _spec(), _report(24_315), GB10)), _report(24_315))
    assert got["save_steps"] == got["eval_steps"] == round(steps / 10)


@pytest.mark.parametrize(("examples", "rank"), [(50, 16), (999, 16), (1_000, 32), (9_999, 32), (10_000, 128)])
def test_rank_grows_with_the_data(examples: int, rank: int) -> None:
    assert _values(Plan(), _spec(), _report(examples), GB10)["lora_r"] == rank


def test_full_fine_tuning_takes_a_small_rate_and_no_adapter() -> None:
    plan = Plan(mode="full", origins={"mode": "flag"})
    small, large = (_values(plan, _spec(s), _report(200_000), GB10) for s in ("2B", "9B"))
    assert small["learning_rate"] == 2e-5
    assert large["learning_rate"] == 1e-5
    assert "lora_r" not in small
    assert "optimizer" not in small
    assert large["optimizer"] == "adamw_8bit"


def test_tiny_data_keeps_enough_steps() -> None:
    report = _report(50, mean=35, p90=38, longest=38, packing={128: 0.9, 256: 0.93, 1024: 0.95})
    plan = apply(Plan(), recommend(Plan(), _spec(), report, CPU))
    assert plan.pack_length == 128
    assert plan.gradient_accumulation == 1
    assert planned_steps(plan, report) >= 30


def test_a_step_has_a_pack_for_every_process() -> None:
    report = _report(50, mean=35, p90=38, longest=38, packing={128: 0.9, 256: 0.93, 1024: 0.95})
    asked = Plan(gpus=2, peers=["b"])
    (item,) = [r for r in recommend(asked, _spec(), report, CPU) if r.field == "gradient_accumulation"]
    assert item.value == 4
    assert "cannot be shared by 4 processes" in item.reason


@pytest.mark.parametrize(("steps", "processes"), [(8, 1), (50, 1), (5000, 1), (5000, 2)])
def test_one_process_shares_nothing_and_enough_packs_are_no_reason(steps: int, processes: int) -> None:
    """Of eight packs a step takes one so that there are many steps, not because a process needs it."""
    report = _report(steps, mean=1000, p90=1000, longest=1000)
    asked = Plan(gpus=processes, pack=False, num_epochs=1, origins={"pack": "flag", "num_epochs": "flag"})
    (item,) = [r for r in recommend(asked, _spec(), report, CPU) if r.field == "gradient_accumulation"]
    assert "cannot be shared" not in item.reason
    assert ("fewer than" in item.reason) == (steps < 100)


@pytest.mark.parametrize("changes", [{"max_seq_length": 1024}, {"max_seq_length": 1000}])
def test_pack_length_stays_under_the_cut(changes: dict[str, int]) -> None:
    plan = Plan(**changes, origins={"max_seq_length": "flag"})
    assert _values(plan, _spec(), _report(24_315), GB10)["pack_length"] <= changes["max_seq_length"]


def test_pack_length_fills_at_least_085() -> None:
    report = _report(24_315, packing={1024: 0.95, 5120: 0.80, 6144: 0.84, 8192: 0.86, 16384: 0.97})
    assert _values(Plan(), _spec(), report, GB10)["pack_length"] == 8192
    report = _report(24_315, packing={5120: 0.80, 8192: 0.82})
    assert _values(Plan(), _spec(), report, GB10)["pack_length"] == 8192


def test_pack_length_shrinks_to_fit_the_memory() -> None:
    report = _report(24_315, mean=400, p90=700, longest=1000)
    tight = CPU.model_copy(update={"memory_gib": 11.0})
    wide = CPU.model_copy(update={"memory_gib": 500.0})
    small = _spec("0.8B")
    a, b = (_values(Plan(), small, report, m)["pack_length"] for m in (tight, wide))
    assert a <= b
    assert a % 128 == 0


def test_what_the_user_set_is_never_touched() -> None:
    fields = {"mode": "full", "learning_rate": 3e-4, "pack_length": 999, "gradient_accumulation": 2,
              "save_steps": 7, "dtype": "float32", "device": "cpu", "engine": "unsloth", "mtp": "default"}
    for origin in ("flag", "environment", "config", "saved"):
        plan = Plan(**fields, origins=dict.fromkeys(fields, origin))
        got = _values(plan, _spec(mtp_layers=0), _report(24_315), GB10)
        assert not set(got) & set(fields)


def test_every_recommendation_says_why_and_whence_and_apply_records_it() -> None:
    recommendations = recommend(Plan(), _spec(), _report(24_315), GB10)
    assert all(len(r.reason) > 10 and r.source for r in recommendations)
    plan = apply(Plan(origins={"model": "flag"}), recommendations)
    for r in recommendations:
        assert getattr(plan, r.field) == r.value
        kept = r.value == Plan.model_fields[r.field].get_default()
        assert plan.origins.get(r.field) == (None if kept else "recommendation")
    explained = {"mode", "lora_r", "learning_rate", "num_epochs", "gradient_accumulation", "pack_length", "recompute",
                 "max_seq_length", "eval_split", "mtp"}
    assert explained <= {r.field for r in recommendations}
    assert plan.origins["model"] == "flag"
    assert "auto" not in (plan.mode, plan.engine, plan.dtype, plan.device)


def test_a_second_pass_over_an_applied_plan_changes_nothing() -> None:
    plan = apply(Plan(), recommend(Plan(), _spec(), _report(24_315), GB10))
    again = recommend(plan, _spec(), _report(24_315), GB10)
    assert apply(plan, again) == plan
    assert all(plan.origins.get(r.field, "default") == "default" for r in again), "a reason for what was kept"


def test_unsloth_packs_near_the_mean() -> None:
    plan = Plan(engine="unsloth", origins={"engine": "flag"})
    assert _values(plan, _spec(), _report(24_315), GB10)["pack_length"] % 128 == 0
    mean = _report(24_315).lengths.mean
    assert 0 <= _values(plan, _spec(), _report(24_315), GB10)["pack_length"] - mean < 128


def test_other_cases() -> None:
    got = _values(Plan(pack=False, origins={"pack": "flag"}), _spec(mtp_layers=0), _report(500), GB10)
    assert "pack_length" not in got
    assert got["mtp"] == "skip"
    assert got["gradient_accumulation"] >= 8
    assert "eval_steps" not in _values(Plan(), _spec(), _report(500, eval_examples=0), GB10)
    assert _values(Plan(), _spec(native=False, model_type="gemma"), _report(500), GB10)["engine"] == "unsloth"
    assert "engine" not in _values(Plan(), _spec(native=False, model_type="gemma"), _report(500), CPU)
    over_memory = _values(Plan(), _spec("9B"), _report(5_000, mean=1000, p90=1500, longest=2048), SMALL_GPU)
    assert (over_memory["mode"], over_memory["quantise_base"], over_memory["engine"]) == ("qlora", "nf4", "native")
    int8 = _values(Plan(quantise_base="int8", origins={"quantise_base": "flag"}), _spec(), _report(500), GB10)
    assert int8["mode"] == "qlora"
    assert "quantise_base" not in int8


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, 30),
        ({"gradient_accumulation": 4}, 9),
        ({"gradient_accumulation": 4, "per_device_batch_size": 2}, 6),
        ({"max_steps": 7}, 7),
        ({"num_epochs": 0.5}, 5),
        ({"pack_length": 200}, 15),
    ],
)
def test_planned_steps(changes: dict[str, Any], steps: int) -> None:
    report = _report(10, mean=100, p90=100, longest=100, packing={200: 1.0})
    assert planned_steps(Plan(pack="pack_length" in changes, **changes), report) == steps


# -- memory


def test_adapters_of_the_2b_are_125m_at_rank_128() -> None:
    # Published: "(4 x 1.88 B + 6 x 0.125 B) FLOP/token" for this very setting.
    assert adapter_parameters(_spec(), 128) / 1e6 == pytest.approx(125, abs=0.5)
    assert adapter_parameters(_spec(), 128, ["q_proj"]) == 6 * 128 * (2048 + 2 * 8 * 256)


def test_estimates_lie_beside_published_peaks() -> None:
    # Measured on an H200 by others, 5376 tokens, rank 128: 10.7 GiB with checkpointing, 22.4 without.
    plan = Plan(mode="lora", lora_r=128)
    layer = predict_peak(plan, _spec(), GB10, tokens=5376, longest=5376, policy="layer").total_gib
    none = predict_peak(plan, _spec(), GB10, tokens=5376, longest=5376, policy="none").total_gib
    assert 7.5 < layer < 12.5
    assert 16 < none < 26


def test_estimate_orders() -> None:
    def peak(tokens: int = 5376, size: str = "2B", **changes: Any) -> float:
        plan = Plan(**{"mode": "lora", "lora_r": 64, "recompute": "layer", **changes})
        return predict_peak(plan, _spec(size), GB10, tokens=tokens, longest=tokens).total_gib

    policies = [peak(recompute=p) for p in ("all", "layer", "norms", "none")]
    assert policies == sorted(policies)
    assert len(set(policies)) == 4
    assert peak(tokens=16384) > peak() > peak(tokens=1024)
    assert peak(mode="full") > peak() > peak(mode="qlora")
    assert peak(lora_r=256) > peak()
    assert peak(dtype="float32") > peak()
    assert peak(mode="full", optimizer="adamw_8bit") < peak(mode="full")
    assert peak(size="27B") > peak(size="9B") > peak()
    parts = predict_peak(Plan(mode="lora"), _spec(), GB10, tokens=512, longest=512)
    assert "estimate" in parts.describe()


def test_longest_row() -> None:
    report = _report(100, longest=9000)
    assert longest_row_tokens(Plan(pack_length=5376), report) == 9000
    assert longest_row_tokens(Plan(pack_length=5376, max_seq_length=4096), report) == 5376
    assert longest_row_tokens(Plan(pack=False, per_device_batch_size=4), report) == 36000


def test_a_plan_that_cannot_fit_is_refused_with_what_would() -> None:
    plan = Plan(mode="full", pack_length=16384, recompute="none")
    with pytest.raises(MemoryBudgetError, match=r"needs about [\d.]+ GiB, but 60\.0 GiB is there") as caught:
        check_fits(plan, _spec(), _report(10, longest=2000), GB10.model_copy(update={"memory_gib": 60.0}))
    assert "--recompute norms" in str(caught.value) or "--recompute layer" in str(caught.value)
    assert "--pack-length" in str(caught.value)
    assert caught.value.exit_code == 5


def test_every_way_out_that_is_named_fits() -> None:
    from sparktune.setup.plan.memory import _ways_out

    machine = GB10.model_copy(update={"memory_gib": 30.0})
    plan, report = Plan(mode="full", pack_length=16384, per_device_batch_size=2), _report(10, longest=4000)
    ways = _ways_out(plan, _spec("4B"), report, machine)
    assert ways
    for way in ways:
        words = way.split()
        changes: dict[str, Any] = {}
        for flag, value in zip(words[::2], words[1::2], strict=True):
            changes[flag[2:].replace("-", "_")] = int(value) if value.isdigit() else value
        check_fits(plan.model_copy(update=changes), _spec("4B"), report, machine)


def test_nothing_fits() -> None:
    with pytest.raises(MemoryBudgetError, match="smaller model or a larger machine"):
        check_fits(Plan(mode="lora"), _spec("27B"), _report(10), CPU)
