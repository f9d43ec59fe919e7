"""Every fused op against fp64 truth: fp32 to rounding, bf16 no further off than the bf16 reference."""

import math

import pytest
import torch

from sparktune.kernels.gated_rms_norm import triton as gated_norm_kernels
from sparktune.kernels.rms_norm import triton as norm_kernels
from sparktune.lab.kernel_cases import CASES, errors_of

CPU = torch.device("cpu")
SEEDS = range(3)
# fp32 sums in another order than the reference's: a few ulp of the largest element
FP32_LIMIT = 2e-5
FP32_FLOOR = 1e-6


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_fp32_matches_truth(case):
    for name, e in errors_of(case, torch.float32, CPU, 0).items():
        assert e.tri_max <= FP32_LIMIT * max(e.truth_max, 1e-30), f"{name}: {e}"


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_bf16_error_at_most_the_references(case):
    runs = [errors_of(case, torch.bfloat16, CPU, seed) for seed in SEEDS]
    for name in runs[0]:
        square, ref_square = (sum(getattr(r[name], k) for r in runs) for k in ("tri_square", "ref_square"))
        largest, ref_largest = (max(getattr(r[name], k) for r in runs) for k in ("tri_max", "ref_max"))
        # outputs that stay fp32 (gates, loss, adapters' gradients) differ by fp32 rounding only: not a bf16 question
        rms_floor, max_floor = (FP32_FLOOR * max(getattr(r[name], k) for r in runs) for k in ("truth_rms", "truth_max"))
        rms, ref_rms = (math.sqrt(s / len(runs)) for s in (square, ref_square))
        assert rms <= max(1.05 * ref_rms, rms_floor), f"{name}: RMS error {rms}, the reference's {ref_rms}"
        assert largest <= max(1.5 * ref_largest, max_floor), f"{name}: largest {largest}, the reference's {ref_largest}"


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Every buffer starts as NaN: an element that a kernel forgets cannot pass as a zero."""
    # few programs, so that the loops over rows turn more than once
    monkeypatch.setattr(norm_kernels, "WEIGHT_GRAD_PROGRAMS", 8)
    monkeypatch.setattr(gated_norm_kernels, "WEIGHT_GRAD_PROGRAMS", 1)
    empty, empty_like = torch.empty, torch.empty_like

    def fill(t):
        return t.fill_(float("nan")) if t.is_floating_point() else t.fill_(-(2**30))

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))
