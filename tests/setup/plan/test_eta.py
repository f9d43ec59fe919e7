"""The estimate of a run's time: arithmetic against hand-counted figures, published and own speeds, ranges, money."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparktune.setup.machine import speedbook
from sparktune.setup.plan.arithmetic import forward_flop, training_flop
from sparktune.setup.plan.eta import Calibration, Pace, chips_of, duration, estimate, rented
from sparktune.setup.plan.models import CATALOGUE, spec_from_config
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import DatasetReport, LengthStats, Machine, ModelSpec, Plan
from sparktune.setup.plan.speeds import BUILT_IN, Speed, chip_of, rate_for

GB10 = Machine(device="cuda", gpu_name="NVIDIA GB10", capability=(12, 1), unified_memory=True, memory_gib=110,
               cpu_cores=20, disk_free_gib=1000)
H200 = Machine(device="cuda", gpu_name="NVIDIA H200", memory_gib=139, cpu_cores=16, disk_free_gib=1000)
UNKNOWN = Machine(device="cuda", gpu_name="NVIDIA Something", memory_gib=24, cpu_cores=8, disk_free_gib=100)
CPU = Machine(device="cpu", cpu_name="A CPU", memory_gib=6, cpu_cores=2, disk_free_gib=50)
STAGES = ("train", "merge", "mtp", "gguf", "evaluate", "report")


def _spec(size: str = "2B") -> ModelSpec:
    name = f"Qwen/Qwen3.5-{size}"
    return spec_from_config(CATALOGUE[name], name)


def _plan(**changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "mode": "lora", "engine": "unsloth", "device": "cuda", "dtype": "bfloat16", "lora_r": 128, "pack_length": 5376,
        "gradient_accumulation": 16, "mtp": "skip", "gguf": [], **changes,
    }
    return Plan.model_validate(fields)


def _report(examples: int = 24_315, mean: float = 3000, share: float = 0.4) -> DatasetReport:
    lengths = LengthStats(count=examples, total=int(examples * mean), mean=mean, p50=2400, p90=5000, p99=9000,
                          max=9000, histogram_edges=[0, 9000], histogram_counts=[examples])
    return DatasetReport(
        path="data.jsonl", sha256="0" * 64, bytes=1, rows=examples, kept=examples, train_examples=examples,
        eval_examples=0, formats={"messages": examples}, dropped={}, problems=[], lengths=lengths,
        supervised_tokens=1, supervised_share=share, multi_turn=0, with_system=0, with_thinking=0, duplicates=0,
        eval_leaks=0, packing={5376: 0.97}, cache_key="key",
    )


def test_arithmetic_against_a_count_by_hand() -> None:
    # a dense model of one layer, counted by hand: H 8, ffn 16, 2 heads of 4, 1 kv head, vocabulary 100
    spec = spec_from_config({
        "model_type": "qwen2", "vocab_size": 100, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 128, "rope_theta": 1e4,
    }, "tiny")
    weights = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16
    attention = 4 * 8 * 50 / 2  # query channels times half of a document of 50
    assert forward_flop(spec, document=50) == pytest.approx(2 * weights + attention + 2 * 8 * 100)
    full = training_flop(_plan(mode="full"), spec, document=50, supervised_share=0.5)
    assert full == pytest.approx(6 * weights + 3.5 * attention + 3 * 2 * 8 * 100 * 0.5)
    adapters = 4 * ((8 + 8) + 2 * (8 + 4) + (8 + 8) + 2 * (8 + 16) + (16 + 8))
    lora = training_flop(_plan(lora_r=4), spec, document=50, supervised_share=0.5)
    assert lora == pytest.approx(4 * weights + 6 * adapters + 3.5 * attention + 2 * 2 * 8 * 100 * 0.5)


@pytest.mark.parametrize(("mode", "examples", "published_h"), [
    ("lora", 24_315, 20), ("full", 24_315, 20), ("lora", 100_000, 72), ("full", 100_000, 72),
])
def test_published_wall_clock_lies_in_the_range(mode: str, examples: int, published_h: float) -> None:
    eta = estimate(_plan(mode=mode), _spec(), _report(examples), GB10, stages=("train",))
    assert eta.low / 3600 < published_h < eta.high / 3600 * 1.05
    train = eta.stage("train")
    assert train is not None
    assert "published" in train.reason


def test_published_speeds_come_back_as_they_were() -> None:
    for size, tok_per_s, document in (("0.8B", 5650, 2048), ("4B", 1712, 2048), ("27B", 370, 1024)):
        rate = rate_for(_plan(), _spec(size), GB10)
        assert rate is not None
        flop = training_flop(_plan(), _spec(size), document=document, supervised_share=0.35)
        assert rate.flop_per_s / flop == pytest.approx(tok_per_s, rel=1e-6)


def test_a_size_between_two_measured_ones_is_interpolated() -> None:
    rates = [rate_for(_plan(), _spec(size), GB10) for size in ("2B", "4B")]
    middle = _spec("2B").model_copy(update={"parameters": 3_000_000_000})
    between = rate_for(_plan(), middle, GB10)
    assert rates[0]
    assert rates[1]
    assert between
    assert rates[0].flop_per_s < between.flop_per_s < rates[1].flop_per_s


def test_the_other_engine_is_named_and_widens_the_range() -> None:
    own, other = (rate_for(_plan(engine=e), _spec(), GB10) for e in ("unsloth", "native"))
    assert own
    assert other
    assert "engine" in other.reason
    assert other.low < own.low
    assert other.high > own.high


def test_an_unknown_gpu_is_not_guessed_at() -> None:
    eta = estimate(_plan(), _spec(), _report(), UNKNOWN, stages=("train", "report"))
    assert "NVIDIA Something" in eta.unknown
    assert eta.stage("train") is None


def _own(chip: str, tok_per_s: float, plan: Plan) -> Speed:
    flop = training_flop(plan, _spec(), document=3000, supervised_share=0.4)
    return Speed(chip=chip, engine="unsloth", mode="lora", dtype="bfloat16", recompute=plan.recompute,
                 parameters=_spec().parameters, flop_per_s=tok_per_s * flop, source="own", origin="this machine, run x")


def test_own_runs_of_a_like_shape_count_most() -> None:
    """Short documents reach less of a chip: each shape is predicted from its like, one between them lies between."""
    plan = _plan()
    short = _own("NVIDIA GB10", 2000, plan).model_copy(update={"document": 100.0, "micro_tokens": 1000.0})
    long = _own("NVIDIA GB10", 4000, plan).model_copy(update={"document": 2000.0, "micro_tokens": 8000.0})

    def reached(document: float, micro_tokens: float) -> tuple[float, float]:
        rate = rate_for(plan, _spec(), GB10, [short, long], document=document, micro_tokens=micro_tokens)
        assert rate is not None
        return rate.flop_per_s / long.flop_per_s * 4000, rate.high - rate.low

    assert reached(100, 1000)[0] == pytest.approx(2000, rel=0.02)
    assert reached(2000, 8000)[0] == pytest.approx(4000, rel=0.02)
    assert 2500 < reached(500, 3000)[0] < 3500
    assert reached(20_000, 60_000)[1] > reached(2000, 8000)[1], "far from all that ran here: a wider range"


def test_own_runs_go_before_published_ones_and_err_high_within_a_quarter() -> None:
    plan = _plan()
    eta = estimate(plan, _spec(), _report(), GB10, stages=("train",), book=[_own("NVIDIA GB10", 4000, plan)])
    true_s = 24_315 * 3000 * 3 / 0.97 / 4000
    train = eta.stage("train")
    assert train is not None
    assert "this machine" in train.reason
    assert 1.0 <= train.seconds / true_s <= 1.25
    assert train.low <= true_s <= train.high


def test_passes_without_a_graph_take_what_the_host_needs_to_launch_them() -> None:
    plan = _plan(pack=False, max_steps=100, gradient_accumulation=12, engine="native")
    packed, unpacked = (
        estimate(p, _spec("0.8B"), _report(24_000, 200), GB10, stages=("train",)).stages[0]
        for p in (plan.model_copy(update={"pack": True}), plan)
    )
    assert unpacked.parts["steps"] == pytest.approx(100 * 12 * 24 * 3.85e-3)
    assert "host" in unpacked.reason
    assert "host" not in packed.reason
    short = _report(24_000, 200)
    own = _own("NVIDIA GB10", 4000, plan).model_copy(update={
        "engine": "native", "parameters": _spec("0.8B").parameters, "document": short.lengths.mean,
        "micro_tokens": short.lengths.mean,
    })
    shown = estimate(plan, _spec("0.8B"), short, GB10, stages=("train",), book=[own]).stages[0]
    assert "host" not in shown.reason, "what this machine has shown of such passes holds the launches already"


@pytest.mark.parametrize(("changes", "launched"), [
    ({}, False), ({"gpus": 2}, False), ({"mode": "full"}, False), ({"mode": "full", "gpus": 2}, True),
    ({"lora_dropout": 0.05}, True), ({"mode": "qlora"}, True), ({"quantise_base": "int8"}, True),
    ({"pack": False}, True),
    ({"engine": "unsloth", "pack": False}, False),
])
def test_what_graphs_replay_waits_for_no_launches(changes: dict[str, Any], launched: bool) -> None:
    plan = _plan(**{"engine": "native", "pack_length": 128, "max_steps": 10, **changes})
    train = estimate(plan, _spec("0.8B"), _report(24_000, 100), H200, stages=("train",)).stages[0]
    assert ("host" in train.reason) == launched


def test_a_calibration_replaces_everything() -> None:
    measured = Calibration(steps=15, train_s=1000, low_s=960, high_s=1040, tok_per_s=5, peak_gib=1, device="cuda")
    eta = estimate(_plan(), _spec(), _report(), UNKNOWN, stages=("train",), calibration=measured)
    assert (eta.low, eta.seconds, eta.high, eta.unknown) == (960, 1000, 1040, "")


def test_several_gpus_share_the_steps_and_nothing_else() -> None:
    one, four = (estimate(_plan(**more), _spec(), _report(), GB10, stages=("train",)).stages[0]
                 for more in ({}, {"gpus": 2, "peers": ["192.168.100.2"]}))
    assert four.parts["steps"] == pytest.approx(one.parts["steps"] / 4)
    assert {k: v for k, v in four.parts.items() if k != "steps"} == {k: v for k, v in one.parts.items() if k != "steps"}
    assert "4 chips share a step" in four.reason
    assert chips_of(_plan(device="cpu", gpus=2)) == 1, "processes of one machine share its cores"


def test_other_stages_take_the_machines_own_pace() -> None:
    guess = estimate(_plan(), _spec(), _report(), GB10, stages=("merge",))
    seen = Pace(stage="merge", chip=chip_of(GB10), work=_spec().parameters * 2.0, seconds=100)
    own = estimate(_plan(), _spec(), _report(), GB10, stages=("merge",), paces=[seen])
    assert own.seconds == pytest.approx(105)
    assert own.high - own.low < guess.high - guess.low or own.high < 3 * own.low


def test_published_mtp_training_time() -> None:
    # published: about 8,000 tok/s for 2B on a GB10, about three hours for 24,000 long examples
    eta = estimate(_plan(mtp="trained"), _spec(), _report(24_315, 3500), GB10, stages=("mtp",))
    assert eta.low < 3 * 3600 < eta.high


def test_rented_gpus_cost_what_the_published_arithmetic_says() -> None:
    rows = {name: (fast, slow, cheap, dear) for name, fast, slow, cheap, dear in rented(_plan(), _spec(), _report())}
    fast, slow, cheap, dear = rows["H100 80GB"]
    assert slow == pytest.approx(2 * fast)
    assert dear == pytest.approx(slow * 2.49)
    assert cheap < 50 <= dear * 1.25  # published: about $50 for this very job
    assert rows["A100 40GB"][0] > slow


@pytest.mark.parametrize(("seconds", "text"), [
    (3, "3 s"), (89, "89 s"), (90, "2 min"), (5000, "83 min"), (7200, "2 h"), (7500, "2 h 5 min"), (72_000, "20 h"),
    (200_000, "2 d 8 h"),
])
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_built_in_table_names_its_sources() -> None:
    assert all(s.origin and s.source in ("measured", "published") for s in BUILT_IN)


def test_a_cpu_without_history_is_a_wide_guess() -> None:
    rate = rate_for(_plan(device="cpu", dtype="float32", engine="native"), _spec("0.8B"), CPU)
    assert rate is not None
    assert rate.high / rate.low > 10


def test_the_book_remembers_and_survives_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run = RunDir(name="r", results_root=tmp_path, output_root=tmp_path)
    run.root.mkdir()
    plan = _plan(device="cpu", dtype="float32", engine="native", recompute="none")
    rows = [f'{{"step": {i}, "tokens": 1000, "tok_per_s": {100 if i < 4 else 500}}}' for i in range(1, 21)]
    run.metrics.write_text("\n".join(rows))
    # the first of eleven saves took two seconds like the others, the first of ten answers compiled for nine seconds
    spent = {"evaluation": [0, 0.0], "samples": [640, 17.0], "saves": [11, 22.0]}
    first = {"samples": [64, 9.8], "saves": [1, 2.0]}
    run.stage_events("train").parent.mkdir()
    end = {"kind": "end", "ok": True, "spent": spent, "first_spent": first}
    run.stage_events("train").write_text(json.dumps(end))
    speedbook.record_training(plan, _spec(), _report(), CPU, run, 100.0)
    speedbook.record_pace("merge", 12.0, plan, _spec(), _report(), CPU)
    book = speedbook.load_book()
    flop = training_flop(plan, _spec(), document=3000, supervised_share=0.4)
    assert book.speeds[0].flop_per_s == pytest.approx(500 * flop)  # the first three steps compiled, and do not count
    found = {p.stage: (p.work, p.seconds) for p in book.paces}
    assert found["train: start"] == (_spec().parameters * 2.0, pytest.approx(100 - 20_000 / 500 - 8 - 22))
    assert found["train: samples"] == (640, 8.0)
    assert found["train: saves"][1] == 22.0
    assert "train: evaluation" not in found  # nothing was held out
    assert found["merge"][1] == 12.0
    # resumed after step 5 on other GPUs: its own steps tell of its chips, what it did besides them is half another's
    resumed = {**end, "began_after": 5}
    rows[5:] = [row.replace("500", "700") for row in rows[5:]]
    run.metrics.write_text("\n".join(rows))
    run.stage_events("train").write_text(json.dumps(resumed))
    speedbook.record_training(plan, _spec(), _report(), CPU, run, 100.0)
    after = speedbook.load_book()
    assert after.speeds[-1].flop_per_s == pytest.approx(700 * flop)
    assert after.paces == book.paces
    book = after
    # resumed when it was over, perhaps on another machine than the one that trained: nothing was seen of this one
    with run.stage_events("train").open("a") as events:
        events.write("\n" + json.dumps({"kind": "end", "ok": True}) + "\n")
    speedbook.record_training(plan, _spec(), _report(), CPU, run, 3.0)
    assert speedbook.load_book() == book
    (tmp_path / "sparktune" / "speeds" / "speeds.json").write_text("{broken")
    assert speedbook.load_book().speeds == []
