"""Selection: references on a CPU, a reason for every op, candidates taken or refused in words, imported if taken."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from sparktune.kernels import select
from sparktune.kernels.select import OPS, Candidate, OpTable, reference_ops, select_ops
from sparktune.setup.plan.models import CATALOGUE, spec_from_config

SPEC = spec_from_config(CATALOGUE["Qwen/Qwen3.5-2B"], "Qwen/Qwen3.5-2B")


def test_cpu_runs_the_references_and_says_so() -> None:
    table = select_ops(torch.device("cpu"), torch.float32, SPEC)
    plain = reference_ops()
    for op in OPS:
        assert getattr(table, op) is getattr(plain, op), op
        assert table.reasons[op].startswith("reference ("), op
    assert {f.name for f in fields(OpTable)} == {*OPS, "reasons", "replayable"}
    assert table.replayable == frozenset(), "references read a row's boundaries on the host"


def test_candidates_are_asked_in_order(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def never(device: torch.device, dtype: torch.dtype, spec: object) -> str:
        return "head_dim 7 is not served"

    def always(device: torch.device, dtype: torch.dtype, spec: object) -> str:
        return ""

    refused = Candidate(name="fast", module="no.such.module", function="f", objection=never)
    taken = Candidate(name="fine", module="math", function="sqrt", objection=always)
    monkeypatch.setitem(select.FUSED, "silu_mul", (refused, taken))
    monkeypatch.setitem(select.FUSED, "rms_norm", (refused,))
    with caplog.at_level("INFO", logger=select.__name__):
        table = select_ops(torch.device("cpu"), torch.float32, SPEC)
    assert table.silu_mul(4.0) == 2.0
    assert table.reasons["silu_mul"] == "fine on cpu; not fast: head_dim 7 is not served"
    assert table.rms_norm is reference_ops().rms_norm
    assert table.reasons["rms_norm"] == "reference (not fast: head_dim 7 is not served)"
    assert sum("silu_mul" in r.message for r in caplog.records) == 1
