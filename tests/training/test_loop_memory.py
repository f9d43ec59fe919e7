"""What training measures of memory, and the recompute policy it follows from."""

from __future__ import annotations

import pytest
import torch

from sparktune.setup.plan.errors import UsageError
from sparktune.setup.plan.hostmemory import reserve_gib
from sparktune.setup.plan.memory import RUNTIME_GIB, predict_peak
from sparktune.setup.plan.models import CATALOGUE, spec_from_config
from sparktune.setup.plan.schema import DatasetReport, LengthStats, Machine, Plan
from sparktune.training.memory import available_gib, choose_recompute, measure_machine, peak_gib

LENGTHS = LengthStats(
    count=100, total=50_000, mean=500, p50=400, p90=900, p99=1500, max=2000, histogram_edges=[], histogram_counts=[],
)
REPORT = DatasetReport(
    path="x", sha256="", bytes=0, rows=100, kept=100, train_examples=100, eval_examples=0, formats={}, dropped={},
    problems=[], lengths=LENGTHS, supervised_tokens=1, supervised_share=1.0, multi_turn=0, with_system=0,
    with_thinking=0, duplicates=0, eval_leaks=0, packing={}, cache_key="",
)
SPEC = spec_from_config(CATALOGUE["Qwen/Qwen3.5-2B"], "Qwen/Qwen3.5-2B")
PLAN = Plan(mode="lora", lora_r=16, pack_length=8192, dtype="bfloat16")


def gpu(memory_gib: float) -> Machine:
    return Machine(device="cuda", memory_gib=memory_gib, cpu_cores=4, disk_free_gib=100)


def test_a_cpu_keeps_everything_and_a_wish_is_obeyed() -> None:
    assert choose_recompute(PLAN, SPEC, REPORT, measure_machine(torch.device("cpu")))[0] == "none"
    wish = PLAN.model_copy(update={"recompute": "all"})
    assert choose_recompute(wish, SPEC, REPORT, gpu(1000)) == ("all", None, "as asked for")


def test_a_gpu_recomputes_as_little_as_fits() -> None:
    peaks = {
        policy: predict_peak(PLAN, SPEC, gpu(1), tokens=8192, longest=2000, policy=policy).total_gib
        for policy in ("none", "norms", "layer", "all")
    }
    assert peaks["none"] > peaks["norms"] > peaks["layer"] > peaks["all"]
    for policy in ("none", "norms", "layer", "all"):
        chosen, layers, reason = choose_recompute(PLAN, SPEC, REPORT, gpu(peaks[policy] + 1e-6))
        assert (chosen, layers) == (policy, None)
        assert f"{policy} {peaks[policy]:.1f}" in reason
        assert "computes least again" in reason
    assert choose_recompute(PLAN, SPEC, REPORT, gpu(0.5))[0] == "all"
    assert "no policy fits" in choose_recompute(PLAN, SPEC, REPORT, gpu(0.5))[2]


def test_between_norms_and_layer_it_takes_the_fewest_layers_that_fit() -> None:
    peaks = [predict_peak(PLAN, SPEC, gpu(1), tokens=8192, longest=2000, policy="layer", layers=n).total_gib
             for n in range(1, SPEC.num_layers + 1)]
    assert peaks == sorted(peaks, reverse=True)
    for n in (1, 2, 13, SPEC.num_layers - 1):
        chosen, layers, reason = choose_recompute(PLAN, SPEC, REPORT, gpu(peaks[n - 1] + 1e-6))
        assert (chosen, layers) == ("layer", n)
        assert f"layer:{n} {peaks[n - 1]:.1f}" in reason
        assert f"the first {n} of {SPEC.num_layers} layers whole" in reason


@pytest.mark.parametrize(
    "changes", [{"recompute": "auto"}, {"recompute": "norms"}, {"recompute_layers": 25}, {"engine": "unsloth"}],
)
def test_a_number_of_layers_goes_with_its_policy(changes: dict[str, object]) -> None:
    wish = PLAN.model_copy(update={"recompute": "layer", "recompute_layers": 7})
    assert choose_recompute(wish, SPEC, REPORT, gpu(1)) == ("layer", 7, "as asked for")
    with pytest.raises(UsageError, match=r"--recompute-layers should be 1 to 24, with --recompute layer"):
        choose_recompute(wish.model_copy(update=changes), SPEC, REPORT, gpu(1000))


def test_unsloth_keeps_its_own_default() -> None:
    plan = PLAN.model_copy(update={"engine": "unsloth"})
    chosen = choose_recompute(plan, SPEC, REPORT, gpu(1000))
    assert chosen == ("layer", None, "Unsloth's own checkpointing, its default")


def test_unified_memory_keeps_a_reserve() -> None:
    assert reserve_gib(120) == pytest.approx(6.0)
    assert reserve_gib(16) == 4.0


def test_what_is_measured_is_what_the_system_says() -> None:
    cpu = torch.device("cpu")
    before = peak_gib(cpu)
    block = torch.ones(80 * 2**20 // 4)
    assert peak_gib(cpu) >= before
    assert peak_gib(cpu) > 0.1
    del block
    assert 0 < available_gib(cpu) < 10_000
    machine = measure_machine(cpu)
    assert machine.device == "cpu"
    # an estimate counts the whole process, so what it holds before the model is loaded is free to it
    assert 0.1 < machine.memory_gib - available_gib(cpu) < RUNTIME_GIB + 0.05
