"""The cost model of several ranks: against what the kernel carried, and against what it must be by hand."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from sparktune.setup.plan.scale import Link, Traffic, step_seconds, traffic
from sparktune.setup.plan.schema import ModelSpec, Plan

ROWS = Path(__file__).resolve().parents[3] / "docs" / "results" / "scale_cpu.csv"
MEASURED = [row for row in csv.DictReader(ROWS.open(newline="", encoding="utf-8")) if row["ranks"] != "1"]
TINY = {
    # lab/shapes.py's tiny: what the rows were measured with
    "source": "tiny", "model_type": "qwen3_5_text", "native": True, "vocab_size": 248320, "hidden_size": 256,
    "intermediate_size": 512, "num_layers": 4, "num_heads": 2, "num_kv_heads": 1, "head_dim": 256,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"], "tie_word_embeddings": True, "norm_eps": 1e-6,
    "rope_theta": 1e7, "rope_dim": 64, "max_position_embeddings": 4096, "parameters": 78_400_832,
}


def test_there_are_points_of_two_and_three_processes() -> None:
    assert {(row["mode"], row["ranks"]) for row in MEASURED} == {(m, n) for m in ("lora", "full") for n in ("2", "3")}


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row['mode']}-{row['ranks']}")
def test_the_kernel_carried_what_the_formula_says(row: dict[str, str]) -> None:
    """Within 1 %: the rest is headers, signs of life and the loop's own small numbers."""
    wire = float(row["wire_mb_a_step"])
    if row["mode"] == "lora":  # the engine counted the payload itself
        foreseen = float(row["formula_mb_a_step"])
        assert foreseen == float(row["sent_mb_a_step"])
    else:
        plan = Plan(mode="full", dtype="float32")
        foreseen = traffic(plan, ModelSpec(**TINY), int(row["ranks"]), int(row["accum_a_rank"]), gloo=True).total / 1e6
    assert foreseen <= wire <= 1.01 * foreseen


def test_by_hand() -> None:
    spec = ModelSpec(**{**TINY, "parameters": 1000 + 248320 * 256})
    full = traffic(Plan(mode="full", dtype="bfloat16"), spec, 4, 3)
    ends = 248320 * 256
    assert full.gathered == 0.75 * 2 * 3 * (2 * 1000 + ends)
    assert full.summed == 0.75 * 4 * (1000 + ends)
    assert traffic(Plan(mode="full"), spec, 1, 3).total == 0


def test_gathers_hide_behind_arithmetic_and_sums_wait() -> None:
    link = Link(name="cable", bytes_per_s=1e9, latency_s=1e-3)
    adapters = Traffic(gathered=0.0, summed=5e8, messages=2)
    assert step_seconds(1.0, adapters, link, passes=2) == pytest.approx(1.502)
    spread = Traffic(gathered=5e8, summed=1e8, messages=0)
    assert step_seconds(1.0, spread, link, passes=2) == pytest.approx(1.0)  # both hidden
    assert step_seconds(0.1, spread, link, passes=2) == pytest.approx(0.5 + 0.1 - 0.1 / 2 * 2 / 3)
    assert step_seconds(1.0, adapters, link, passes=2, imbalance=1.5) == pytest.approx(2.002)
