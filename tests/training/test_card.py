"""A GPU that cannot run a plan is refused in one sentence, before a model is loaded; slow ways are said, not hidden."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparktune.kernels.select import reference_ops, select_ops
from sparktune.lab.native import build_engine
from sparktune.setup.plan.errors import ExitCode, PreflightError
from sparktune.setup.plan.models import CATALOGUE, probe, spec_from_config
from sparktune.setup.plan.schema import Plan
from sparktune.training import card
from sparktune.training.card import check_card
from sparktune.training.native_engine import NativeEngine, kernels_in_words

GPU = torch.device("cuda", 0)
SPEC = spec_from_config(CATALOGUE["Qwen/Qwen3.5-2B"], "Qwen/Qwen3.5-2B")


@pytest.fixture
def a_card(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A GPU that this machine does not have."""
    seen: dict[str, object] = {"name": "NVIDIA GB10", "capability": (12, 1)}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: seen["name"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: seen["capability"])
    return seen


def works(device: torch.device) -> None:
    """A kernel that compiles."""


def test_a_card_that_can_and_a_cpu_pass(a_card: dict[str, object]) -> None:
    check_card(GPU, torch.bfloat16, works)
    check_card(torch.device("cpu"), torch.bfloat16)


def test_a_card_without_bfloat16_is_refused_with_the_way_out(a_card: dict[str, object]) -> None:
    a_card.update(name="Tesla T4", capability=(7, 5))
    with pytest.raises(PreflightError, match=r"Tesla T4 \(compute capability 7\.5\) has no bfloat16") as refusal:
        check_card(GPU, torch.bfloat16, works)
    assert refusal.value.exit_code == ExitCode.PREFLIGHT
    assert "--dtype float32" in str(refusal.value)
    check_card(GPU, torch.float32, works)


@pytest.mark.parametrize("error", [
    RuntimeError("PassManager::run failed\nlong trace"), ValueError("sm_121 is unknown"), FileNotFoundError("gcc"),
])
def test_a_triton_that_cannot_compile_is_refused_in_one_sentence(a_card: dict[str, object], error: Exception) -> None:
    def fails(device: torch.device) -> None:
        raise error

    with pytest.raises(PreflightError, match=r"cannot compile for NVIDIA GB10 \(compute capability 12\.1\)") as refusal:
        check_card(GPU, torch.bfloat16, fails)
    text = str(refusal.value)
    assert str(error).splitlines()[0] in text
    assert "long trace" not in text
    assert "--engine unsloth" in text


def test_memory_that_is_full_is_not_called_a_compiler_s_fault(a_card: dict[str, object]) -> None:
    def full(device: torch.device) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        check_card(GPU, torch.bfloat16, full)


def test_an_engine_is_not_built_on_a_card_that_cannot(
    a_card: dict[str, object], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_card.update(name="Tesla V100", capability=(7, 0))
    monkeypatch.setattr(card, "_try_kernel", works)
    plan = Plan(model=str(tiny_model), mode="lora", lora_r=4, dtype="bfloat16", recompute="none")
    with pytest.raises(PreflightError, match="Tesla V100"):
        NativeEngine.build(plan, probe(str(tiny_model)), tiny_model, GPU)


def test_a_head_size_that_no_kernel_serves_is_said_with_its_reason(a_card: dict[str, object]) -> None:
    odd = SPEC.model_copy(update={"head_dim": 260, "gdn_key_dim": 48})
    table = select_ops(GPU, torch.bfloat16, odd)
    words = kernels_in_words(table)
    assert "plain PyTorch, several times slower, for" in words
    assert "varlen_attention (not triton: head_dim 260 is none of (64, 128, 256); not flash: " in words
    assert "gated_delta_rule (not triton: GDN key heads have 48 dims" in words
    assert "rms_norm (" not in words
    assert kernels_in_words(select_ops(GPU, torch.bfloat16, SPEC)) == "kernels: triton"


def test_a_dense_model_is_not_told_of_a_delta_rule_it_does_not_have(a_card: dict[str, object]) -> None:
    dense = SPEC.model_copy(update={"layer_types": ["full_attention"] * SPEC.num_layers, "gdn_key_dim": 0})
    table = select_ops(GPU, torch.bfloat16, dense)
    assert "no layer that calls it" in table.reasons["gated_delta_rule"]
    assert kernels_in_words(table) == "kernels: triton"
    assert table.replayable >= {"varlen_attention", "rms_norm"}


def test_the_engine_says_what_it_runs_on(tiny_model: Path) -> None:
    engine = build_engine(tiny_model, rank=4, full=False, recompute="none", dtype="float32", device="cpu")
    assert "kernels: plain PyTorch (the references)" in engine.describe()
    assert "no CUDA graphs: graphs need a CUDA device, this is cpu" in engine.describe()
    mixed = replace(reference_ops(), reasons={**reference_ops().reasons, "silu_mul": "triton on cuda"})
    assert "triton" in kernels_in_words(mixed)
