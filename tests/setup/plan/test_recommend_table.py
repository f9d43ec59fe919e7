"""The recommendation table: (model, data, machine) -> plan, its expected values written first.

Published rules: LoRA up to 50,000 examples, full from 100,000 with 200M tokens, QLoRA where the bf16 base does not fit,
rank 16 for little data, 32 below 10,000, 128 as in the recipe, one step up for short contexts; 2e-4 for adapters.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from sparktune.setup.plan.models import CATALOGUE, spec_from_config
from sparktune.setup.plan.recommend import apply, recommend
from sparktune.setup.plan.schema import DatasetReport, LengthStats, Machine, Plan

GB10 = Machine(device="cuda", gpu_name="NVIDIA GB10", capability=(12, 1), unified_memory=True, memory_gib=110,
               cpu_cores=20, disk_free_gib=1000)
H200 = Machine(device="cuda", gpu_name="NVIDIA H200", capability=(9, 0), memory_gib=139, cpu_cores=16,
               disk_free_gib=1000)
RTX = Machine(device="cuda", gpu_name="NVIDIA GeForce RTX 4090", capability=(8, 9), memory_gib=22.5, cpu_cores=16,
              disk_free_gib=500)
A100 = Machine(device="cuda", gpu_name="NVIDIA A100-SXM4-40GB", capability=(8, 0), memory_gib=38.5, cpu_cores=16,
               disk_free_gib=500)
SMALL = Machine(device="cuda", memory_gib=14, cpu_cores=8, disk_free_gib=100)
CPU = Machine(device="cpu", memory_gib=6, cpu_cores=2, disk_free_gib=50)


class Row(NamedTuple):
    size: str
    machine: Machine
    examples: int
    mean: float
    mode: str
    rank: int | None
    rate: float
    pack: tuple[int, int]
    """Least and most pack_length."""
    mtp: str = "default"


# fmt: off
TABLE = [
    # the published case and its neighbours: rank 128, the pack near the mean or above (documents are isolated)
    Row("2B", GB10, 24_315, 3000, "lora", 128, 2e-4, (4096, 8192)),
    Row("0.8B", GB10, 24_315, 3000, "lora", 128, 2e-4, (4096, 8192)),
    Row("4B", GB10, 24_315, 3000, "lora", 128, 2e-4, (4096, 8192)),
    Row("9B", GB10, 24_315, 3000, "lora", 128, 2e-4, (2048, 8192)),
    Row("27B", GB10, 24_315, 3000, "lora", 128, 2e-4, (1024, 8192)),
    Row("2B", H200, 24_315, 3000, "lora", 128, 2e-4, (4096, 8192)),
    Row("9B", H200, 24_315, 3000, "lora", 128, 2e-4, (4096, 8192)),
    Row("27B", H200, 24_315, 3000, "lora", 128, 2e-4, (1024, 8192)),
    Row("2B", GB10, 24_315, 5354, "lora", 128, 2e-4, (5376, 10240)),
    # the two thresholds, on both sides
    Row("2B", GB10, 50_000, 3000, "lora", 128, 2e-4, (4096, 8192)),
    Row("2B", GB10, 50_001, 3000, "lora", 128, 2e-4, (4096, 8192)),
    Row("2B", GB10, 80_000, 3000, "lora", 128, 2e-4, (4096, 8192)),
    Row("2B", GB10, 99_999, 3000, "lora", 128, 2e-4, (4096, 8192)),
    Row("2B", GB10, 100_000, 2000, "full", None, 2e-5, (2048, 8192)),
    Row("2B", GB10, 100_000, 3000, "full", None, 2e-5, (4096, 8192)),
    Row("2B", GB10, 100_000, 1999, "lora", 128, 2e-4, (2048, 8192)),   # 199.9M tokens: many examples, few tokens
    Row("2B", GB10, 400_000, 499, "lora", 256, 2e-4, (2048, 8192)),    # the same, and short contexts
    Row("2B", GB10, 400_000, 500, "full", None, 2e-5, (2048, 8192)),
    Row("0.8B", GB10, 100_000, 3000, "full", None, 2e-5, (4096, 8192)),
    Row("4B", GB10, 100_000, 3000, "full", None, 1e-5, (2048, 8192)),  # 4.2B parameters: 8-bit moments, smaller steps
    Row("9B", GB10, 100_000, 3000, "lora", 128, 2e-4, (1024, 8192)),   # full: 12 bytes a parameter, even in 8 bits
    Row("27B", GB10, 100_000, 3000, "lora", 128, 2e-4, (1024, 8192)),  # full does not fit
    Row("2B", H200, 100_000, 3000, "full", None, 2e-5, (4096, 8192)),
    Row("9B", H200, 100_000, 3000, "full", None, 1e-5, (1024, 8192)),
    # rank by the number of examples
    Row("2B", GB10, 50, 3000, "lora", 16, 2e-4, (3072, 8192)),
    Row("2B", GB10, 999, 3000, "lora", 16, 2e-4, (4096, 8192)),
    Row("2B", GB10, 1_000, 3000, "lora", 32, 2e-4, (4096, 8192)),
    Row("2B", GB10, 9_999, 3000, "lora", 32, 2e-4, (4096, 8192)),
    Row("2B", GB10, 10_000, 3000, "lora", 128, 2e-4, (4096, 8192)),
    # short contexts (under 1,024 tokens) take a larger rank
    Row("2B", GB10, 500, 300, "lora", 32, 2e-4, (384, 4096)),
    Row("2B", GB10, 5_000, 300, "lora", 64, 2e-4, (512, 4096)),
    Row("2B", GB10, 20_000, 300, "lora", 256, 2e-4, (2048, 4096)),
    Row("2B", GB10, 20_000, 1_023, "lora", 256, 2e-4, (2048, 4608)),
    Row("2B", GB10, 20_000, 1_024, "lora", 128, 2e-4, (2048, 4608)),
    # small cards: a base that does not fit in bf16 is quantised
    Row("0.8B", RTX, 24_315, 1500, "lora", 128, 2e-4, (1024, 8192)),
    Row("2B", RTX, 24_315, 1500, "lora", 128, 2e-4, (1024, 8192)),
    Row("9B", RTX, 5_000, 1500, "lora", 32, 2e-4, (1024, 8192)),  # 17 GiB of weights do fit, layers recomputed
    Row("27B", A100, 5_000, 1500, "qlora", 32, 2e-4, (1024, 8192)),
    Row("9B", SMALL, 5_000, 1500, "qlora", 32, 2e-4, (1024, 8192)),
    Row("2B", SMALL, 100_000, 3000, "lora", 128, 2e-4, (1024, 8192)),  # full does not fit
    Row("2B", RTX, 100_000, 3000, "lora", 128, 2e-4, (1024, 8192)),
    # a CPU
    Row("0.8B", CPU, 50, 40, "lora", 32, 2e-4, (128, 1024)),
    Row("0.8B", CPU, 2_000, 200, "lora", 64, 2e-4, (256, 1024)),
]
# fmt: on


def _report(examples: int, mean: float) -> DatasetReport:
    longest = max(64, int(min(mean * 3, 9000)))
    lengths = LengthStats(
        count=examples, total=int(examples * mean), mean=mean, p50=int(mean * 0.8), p90=min(longest, int(mean * 1.5)),
        p99=longest, max=longest, histogram_edges=[0, longest], histogram_counts=[examples],
    )
    fields: dict[str, Any] = {
        "path": "data.jsonl", "sha256": "0" * 64, "bytes": 1, "rows": examples, "kept": examples,
        "train_examples": examples, "eval_examples": 10, "formats": {"messages": examples}, "dropped": {},
        "problems": [], "lengths": lengths, "supervised_tokens": 1, "supervised_share": 0.4, "multi_turn": 0,
        "with_system": 0, "with_thinking": 0, "duplicates": 0, "eval_leaks": 0, "cache_key": "key",
        "packing": {n: min(0.97, 0.86 + n / 80_000) for n in (128, 256, 512, 1024, 2048, 4096, 5376, 8192, 16384)},
    }
    return DatasetReport(**fields)


@pytest.mark.parametrize("row", TABLE, ids=lambda r: f"{r.size}-{r.machine.memory_gib:g}GiB-{r.examples}x{r.mean:g}")
def test_table(row: Row) -> None:
    name = f"Qwen/Qwen3.5-{row.size}"
    spec, report = spec_from_config(CATALOGUE[name], name), _report(row.examples, row.mean)
    found = recommend(Plan(), spec, report, row.machine)
    plan = apply(Plan(), found)
    assert plan.mode == row.mode
    if row.rank is not None:
        assert plan.lora_r == row.rank
        assert plan.lora_alpha == float(row.rank)
    assert plan.learning_rate == row.rate
    assert plan.pack_length is not None
    assert row.pack[0] <= plan.pack_length <= row.pack[1]
    assert plan.pack_length % 128 == 0
    assert plan.mtp == row.mtp
    assert plan.gradient_accumulation is not None
    assert plan.gradient_accumulation >= 1
    assert plan.num_epochs == 3.0
    for item in found:
        assert len(item.reason) > 10, item
        assert item.source, item


def test_between_the_thresholds_both_ways_are_named_with_the_trade() -> None:
    name = "Qwen/Qwen3.5-2B"
    spec = spec_from_config(CATALOGUE[name], name)
    for examples, mean in ((80_000, 3000.0), (200_000, 500.0)):
        mode = next(r for r in recommend(Plan(), spec, _report(examples, mean), GB10) if r.field == "mode")
        assert mode.value == "lora"
        assert "--mode full" in mode.reason
        assert "GiB" in mode.reason


def test_the_table_is_as_long_as_promised() -> None:
    assert len(TABLE) >= 40
