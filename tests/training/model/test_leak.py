"""Documents of one row never see each other; and the measurement that says so is shown able to say otherwise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sparktune.kernels.causal_conv1d.reference import causal_conv1d_reference
from sparktune.kernels.gated_delta_rule.reference import gated_delta_rule_reference
from sparktune.kernels.select import reference_ops
from sparktune.kernels.varlen_attention.reference import varlen_attention_reference

LIMIT = {torch.float32: 1e-5, torch.float64: 1e-10}
# 3 to 9 documents of odd lengths; 1 and 3 are shorter than the convolution, 129 crosses two chunks of 64.
LENGTHS = ([33, 7, 65], [1, 129, 3, 51], [5, 63, 1, 3, 91, 17, 65, 9, 11])
FAMILIES = ("qwen3_5", "llama", "mistral")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=[f"{len(n)}docs" for n in LENGTHS])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_packed_equal_alone(family, lengths, dtype, oracles, build, documents, leak) -> None:
    model = build(oracles(family)[1], dtype)
    assert leak(model, documents(lengths)) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_swapping_two_documents_leaves_the_others(family, dtype, oracles, build, documents, row, rel) -> None:
    model = build(oracles(family)[1], dtype)
    parts = documents([33, 7, 65, 21, 5])
    swapped = [parts[0], parts[3], parts[2], parts[1], parts[4]]
    with torch.no_grad():
        before, after = model.logits(row(parts)), model.logits(row(swapped))
    first = list(before.split([33, 7, 65, 21, 5]))
    second = list(after.split([33, 21, 65, 7, 5]))
    for i, j in ((0, 0), (1, 3), (2, 2), (3, 1), (4, 4)):
        assert rel(second[j], first[i]) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("family", ["qwen3_5", "llama"])
def test_gradient_of_a_packed_row_is_the_sum_of_the_separate_ones(
    family, dtype, oracles, build, documents, row, rel
) -> None:
    parts = documents([33, 7, 1, 65, 21])
    packed, apart = build(oracles(family)[1], dtype), build(oracles(family)[1], dtype)
    for model in (packed, apart):
        model.requires_grad_(True)
    whole = packed.loss_sum(row(parts))
    whole.backward()
    pieces = []
    for part in parts:
        loss = apart.loss_sum(row([part]))
        loss.backward()
        pieces.append(loss.detach())
    assert rel(whole.detach(), torch.stack(pieces).sum()) < LIMIT[dtype]
    others = dict(apart.named_parameters())
    for name, parameter in packed.named_parameters():
        assert rel(parameter.grad, others[name].grad) < LIMIT[dtype], name


def test_padding_changes_nothing(oracles, build, documents, row, rel) -> None:
    model = build(oracles("qwen3_5")[1])
    parts = documents([33, 7, 65])
    plain, padded = row(parts), row(parts, 128)
    with torch.no_grad():
        assert rel(model.logits(padded)[: plain.real_tokens], model.logits(plain)) < 1e-5
        assert rel(model.loss_sum(padded), model.loss_sum(plain)) < 1e-6


def _one_document(cu_seqlens: torch.Tensor) -> torch.Tensor:
    return cu_seqlens[[0, -1]]


def _conv_without_reset(
    x: Any, weight: Any, cu_seqlens: Any, cu_seqlens_cpu: Any, split: Any = None, positions: Any = None
) -> Any:
    return causal_conv1d_reference(x, weight, _one_document(cu_seqlens), _one_document(cu_seqlens_cpu), split)


def _state_without_reset(q: Any, k: Any, v: Any, g: Any, beta: Any, cu: Any, cu_cpu: Any) -> torch.Tensor:
    return gated_delta_rule_reference(q, k, v, g, beta, _one_document(cu), _one_document(cu_cpu))


def _attention_without_reset(
    q: Any, k: Any, v: Any, cu: Any, cu_cpu: Any, max_seqlen: Any, *, scale: float, window: int | None
) -> torch.Tensor:
    return varlen_attention_reference(
        q, k, v, _one_document(cu), _one_document(cu_cpu), len(q), scale=scale, window=window
    )


MUTATIONS = {
    "conv reset": {"causal_conv1d": _conv_without_reset},
    "state reset": {"gated_delta_rule": _state_without_reset},
    "attention reset": {"varlen_attention": _attention_without_reset},
}


@pytest.mark.parametrize("what", MUTATIONS)
def test_the_measurement_sees_a_dropped_reset(what, oracles, build, documents, leak) -> None:
    parts = documents([33, 7, 65])
    assert leak(build(oracles("qwen3_5")[1]), parts) < 1e-5
    mutant = build(oracles("qwen3_5")[1], ops=replace(reference_ops(), **MUTATIONS[what]))
    assert leak(mutant, parts) > 1e-3


def test_the_measurement_sees_positions_that_do_not_restart(oracles, build, documents, row, leak) -> None:
    parts = documents([33, 7, 65])
    batch = row(parts)
    running = replace(batch, position_ids=torch.arange(len(batch.ids)))
    model = build(oracles("qwen3_5")[1])
    assert leak(model, parts, batch) < 1e-5
    assert leak(model, parts, running) > 1e-3
