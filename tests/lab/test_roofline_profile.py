"""The roofline's arithmetic, and the counting of bytes."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparktune.lab.profile import TensorBytes, tensor_bytes
from sparktune.lab.roofline import CHIPS, Launch, floor_ms, projection, step_launches
from sparktune.setup.plan.memory import adapter_parameters
from sparktune.setup.plan.models import CATALOGUE, spec_from_config

ROOT = Path(__file__).resolve().parents[2]
SPEC = spec_from_config(CATALOGUE["Qwen/Qwen3.5-2B"], "Qwen/Qwen3.5-2B")
MEASURED = {"tokens": 5376, "supervised": 1881, "rank": 128, "lengths": [5376]}


def test_a_launch_is_bound_by_products_or_memory() -> None:
    chip = CHIPS["GB10 low"]
    assert Launch(name="a", flop=1e12, bytes=1.0, count=2).ms(chip) == pytest.approx(20.0)
    assert Launch(name="b", flop=1.0, bytes=0.273e9, count=3).ms(chip) == pytest.approx(3.0)


def test_the_flop_are_the_models() -> None:
    launches = step_launches(SPEC, **MEASURED)
    base = sum(n.flop * n.count for n in launches if n.name.endswith((": x W", ": dy W")))
    body = SPEC.parameters - SPEC.vocab_size * SPEC.hidden_size
    assert base / 5376 == pytest.approx(4 * body, rel=0.01)
    adapters = sum(n.flop * n.count for n in launches if n.name.partition(": ")[2] in (
        "x A", "dxa A", "dA", "xa B", "dy B", "dB"))
    assert adapters / 5376 == pytest.approx(6 * adapter_parameters(SPEC, 128), rel=0.01)


def test_attention_costs_the_squares_of_the_documents() -> None:
    def attention(lengths: list[int]) -> float:
        launches = step_launches(SPEC, **{**MEASURED, "lengths": lengths})
        return sum(n.flop * n.count for n in launches if n.name.startswith("attention, "))

    assert attention([5376]) == pytest.approx(4 * attention([1344] * 4))


def test_the_h200s_floor_lies_by_the_measured_one() -> None:
    # Measured op by op there: base products 41.2 ms, LoRA's 15.5 (small products reach less than the peak), head 5.3.
    launches = step_launches(SPEC, **MEASURED)
    h200 = CHIPS["H200"]
    base = sum(n.ms(h200) for n in launches if n.name.endswith((": x W", ": dy W")))
    assert base == pytest.approx(41.2, rel=0.15)
    head = sum(n.ms(h200) for n in launches if n.name.startswith("head"))
    assert head == pytest.approx(5.3, rel=0.4)
    assert 55 < floor_ms(launches, h200) < 94


def test_an_estimate_is_called_one_and_keeps_the_share() -> None:
    launches = step_launches(SPEC, **MEASURED)
    rows = {row["chip"]: row for row in projection(launches, 5376, 120.0)}
    assert rows["H200"]["busy_ms"] == pytest.approx(120.0, abs=0.01)
    assert rows["H200"]["kind"] == "measured"
    for name in ("GB10 low", "GB10 high"):
        assert "ESTIMATE" in str(rows[name]["kind"])
        share = float(str(rows["H200"]["share_reached_on_h200"]))
        assert float(str(rows[name]["busy_ms"])) == pytest.approx(float(str(rows[name]["floor_ms"])) / share, rel=2e-3)
    assert all("ESTIMATE" in str(row["kind"]) for row in projection(launches, 5376, None))


def test_the_command_prints_it_is_an_estimate(tmp_path: Path) -> None:
    out = tmp_path / "roofline.csv"
    done = subprocess.run([sys.executable, "-m", "lab.roofline", "--busy-ms", "120", "--csv", str(out)],
                          capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ESTIMATE")
    assert out.read_text().count("\n") == 4


def counted(call) -> dict[str, tuple[int, int]]:
    with TensorBytes() as counts:
        call()
    return counts.by_name


def test_bytes_are_counted_once_a_tensor() -> None:
    a, b = torch.ones(8, 16), torch.ones(16, 4)
    assert counted(lambda: a @ b) == {"mm": ((128 + 64 + 32) * 4, 1)}
    assert counted(lambda: a.t().view(16, 8)[2:]) == {}
    assert counted(lambda: torch.empty(100)) == {}
    assert counted(lambda: a.add_(1.0))["add_.Tensor"] == (2 * 128 * 4, 1)
    assert counted(lambda: torch.zeros(10)) == {"zeros": (40, 1)}
    table, rows = torch.ones(1000, 8), torch.tensor([1, 5])
    (size, _), = counted(lambda: table.index_select(0, rows)).values()
    assert size == 2 * 2 * 8 * 4 + 2 * 8
    assert tensor_bytes(torch.ones(4, 1).expand(4, 100)) == 16


def test_the_backward_is_counted_too() -> None:
    x, w = torch.ones(8, 16, requires_grad=True), torch.ones(16, 4, requires_grad=True)
    assert counted(lambda: (x @ w).sum().backward())["mm"][1] == 3


def test_an_out_argument_is_written_once_and_compiled_code_stays_compiled() -> None:
    a, b, out = torch.ones(8, 16), torch.ones(16, 4), torch.empty(8, 4)
    assert counted(lambda: torch.mm(a, b, out=out)) == {"mm.out": ((128 + 64 + 32) * 4, 1)}
    runs = []

    def backend(graph, inputs):
        def compiled(*args):
            runs.append("compiled")
            return graph(*args)

        return compiled

    fast = torch.compile(lambda x: x * 2, backend=backend)
    fast(a)
    assert len(runs) == 1
    assert sum(size for size, _ in counted(lambda: fast(a)).values()) == 2 * 128 * 4
    assert len(runs) == 2, "the counting mode made dynamo run the frame as it is written"


def test_the_estimate_takes_its_time_from_a_measured_row(tmp_path: Path) -> None:
    table = tmp_path / "side.csv"
    columns = "gpu,variant,size,recompute,lengths,gpu_busy_ms,accum,rank,supervised,date,commit,sitting"
    table.write_text(f"{columns}\nNVIDIA H200,native,2B,none,5376,200,2,64,0.35,today,abc,B\n"
                     "NVIDIA H200,native,2B,layer,5376,300,2,64,0.35,today,abc,B\n")
    out = tmp_path / "estimate.csv"
    done = subprocess.run([sys.executable, "-m", "lab.roofline", "--measured", str(table), "--csv", str(out)],
                          capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    with out.open(newline="") as file:
        rows = {row["chip"]: row for row in csv.DictReader(file)}
    assert (rows["H200"]["busy_ms"], rows["H200"]["rank"], rows["H200"]["measured_commit"]) == ("100.0", "64", "abc")
    refused = subprocess.run([sys.executable, "-m", "lab.roofline", "--measured", str(table), "--size", "9B"],
                             capture_output=True, text=True, cwd=ROOT, check=False)
    assert refused.returncode == 1
    assert "no row" in refused.stderr
