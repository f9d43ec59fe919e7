"""Our text tower against transformers, for every family: logits, gradients, generation; and the recompute policies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparktune.kernels.select import reference_ops
from sparktune.setup.plan.errors import PreflightError, UsageError
from sparktune.setup.plan.models import probe
from sparktune.setup.plan.weights import safetensors_index
from sparktune.training.adapters import LoraConfig, attach_lora
from sparktune.training.model import build_model, train_everything
from sparktune.training.weights import checkpoint_names

FAMILIES = ("qwen3_5", "qwen3_5_multimodal", "qwen2", "qwen3", "llama", "mistral")


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_transformers(family, oracles, build, documents, row, rel) -> None:
    oracle, folder = oracles(family)
    model = build(folder)
    train_everything(model)
    (ids,) = documents([150])
    batch = row([ids])
    oracle.zero_grad()
    expected = oracle(input_ids=batch.ids[None], use_cache=False).logits[0]
    assert rel(model.logits(batch).detach(), expected.detach()) < 1e-5
    loss = F.cross_entropy(expected[:-1], batch.ids[1:], reduction="sum")
    ours = model.loss_sum(batch)
    assert rel(ours.detach(), loss.detach()) < 1e-5
    loss.backward()
    ours.backward()
    theirs = dict(oracle.named_parameters())
    names = checkpoint_names(safetensors_index(folder), model.spec)
    parameters = dict(model.named_parameters())
    assert set(names) == set(model.slots())
    for name, slot in model.slots().items():
        assert rel(slot.of(parameters[slot.parameter].grad), theirs[names[name]].grad) < 1e-5, name


@pytest.mark.parametrize("family", ["qwen3_5", "llama", "mistral"])
def test_cached_generation_is_the_greedy_continuation(family, oracles, build, documents, row) -> None:
    model = build(oracles(family)[1], torch.float64)
    (prompt,) = documents([70])
    answer = model.generate(prompt, 12, [])
    assert len(answer) == 12
    with torch.no_grad():
        logits = model.logits(row([[*prompt, *answer]]))
    assert logits[69:-1].argmax(-1).tolist() == answer
    assert model.generate(prompt, 12, [answer[3]]) == answer[: answer.index(answer[3]) + 1]
    assert len(model.generate(prompt[:1], 3, [])) == 3


def _gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.dropout_calls = 0
    model.loss_sum(batch).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("policy", "layers"), [("norms", None), ("layer", None), ("layer", 1), ("layer", -1), ("all", None)],
)
@pytest.mark.parametrize("family", ["qwen3_5", "llama"])
def test_recomputing_changes_no_gradient(policy, layers, family, oracles, build, documents, row, rel) -> None:
    model = build(oracles(family)[1], torch.float64)
    attach_lora(model, LoraConfig(r=4, alpha=8, dropout=0.25), seed=1)
    for module in model.modules():
        if hasattr(module, "lora_b"):
            torch.nn.init.normal_(module.lora_b, std=0.1)
    batch = row(documents([33, 7, 65]))
    ref = _gradients(model, batch)
    model.set_recompute(policy, len(model.layers) + layers if layers == -1 else layers)
    for name, grad in _gradients(model, batch).items():
        assert rel(grad, ref[name]) < 1e-12, name
    model.set_recompute("none")
    model.dropout_seed = 2
    assert any(rel(g, ref[n]) > 1e-3 for n, g in _gradients(model, batch).items()), "dropout masks are drawn"


def test_recomputing_keeps_less(oracles, build, documents, row) -> None:
    model = build(oracles("qwen3_5")[1])
    train_everything(model)
    batch = row(documents([65, 33]))
    kept = {}
    for policy in ("none", "norms", "layer", "all"):
        model.set_recompute(policy)
        held: dict[int, int] = {}

        def pack(t: torch.Tensor, held: dict[int, int] = held) -> torch.Tensor:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        if policy == "norms":
            inner = model._recomputed._pack
            model._recomputed._pack = lambda t, inner=inner, pack=pack: (
                pack(t) if isinstance(inner(t), torch.Tensor) else inner(t)
            )
            loss = model.loss_sum(batch)
        else:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                loss = model.loss_sum(batch)
        kept[policy] = sum(held.values())
        loss.backward()
    assert kept["norms"] < kept["none"]
    assert kept["all"] < kept["layer"] < kept["norms"]


def test_an_unknown_recompute_policy_is_named(oracles, build) -> None:
    with pytest.raises(UsageError, match="none, norms, layer, all"):
        build(oracles("llama")[1]).set_recompute("some")


@pytest.mark.parametrize(("policy", "layers"), [("norms", 1), ("all", 1), ("layer", 0), ("layer", 99)])
def test_a_number_of_layers_that_cannot_be_is_refused(policy, layers, oracles, build) -> None:
    with pytest.raises(UsageError, match=rf"goes with --recompute layer; seen: {layers} with --recompute {policy}"):
        build(oracles("llama")[1]).set_recompute(policy, layers)


def test_only_the_last_layers_keep_recipes(oracles, build) -> None:
    model = build(oracles("qwen3_5")[1])
    plain = model.ops
    model.set_recompute("layer", 1)
    assert model.layers[0].ops is model.layers[0].mlp.ops is plain
    assert all(block.ops is block.mlp.ops is block.mixer.ops is not plain for block in model.layers[1:])
    model.set_recompute("layer")
    assert all(block.ops is block.mlp.ops is plain for block in model.layers)


def test_zero_supervised_rows_give_zero_loss_and_zero_gradients(oracles, build, documents, row) -> None:
    model = build(oracles("qwen3_5")[1])
    attach_lora(model, LoraConfig(r=2, alpha=2), seed=0)
    loss = model.loss_sum(row(documents([1, 1])))
    assert loss.item() == 0.0
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


def test_dropout_is_off_without_gradients_and_in_eval(oracles, build, documents, row) -> None:
    model = build(oracles("qwen3_5")[1])
    attach_lora(model, LoraConfig(r=4, alpha=8, dropout=0.5), seed=0)
    for module in model.modules():
        if hasattr(module, "lora_b"):
            torch.nn.init.normal_(module.lora_b)
    batch = row(documents([20]))
    with torch.no_grad():
        plain = model.loss_sum(batch)
        assert torch.equal(plain, model.loss_sum(batch))
        assert model.dropout_calls == 0
    assert not torch.equal(model.loss_sum(batch), plain)
    model.eval()
    assert torch.equal(model.loss_sum(batch).detach(), plain)


def test_a_foreign_architecture_is_refused_with_the_reason(oracles) -> None:
    spec = probe(str(oracles("llama")[1]))
    spec = spec.model_copy(update={"native": False, "native_reason": "its activation is 'x'"})
    with pytest.raises(PreflightError, match=r"its activation is 'x'.*--engine unsloth"):
        build_model(spec, reference_ops(), torch.float32, "cpu")


def test_bfloat16_stays_near_float32(oracles, build, documents, row, rel) -> None:
    oracle_folder = oracles("qwen3_5")[1]
    batch = row(documents([33, 7]))
    with torch.no_grad():
        ref = build(oracle_folder).logits(batch)
        low = build(oracle_folder, torch.bfloat16).logits(batch)
    assert low.dtype == torch.bfloat16
    assert rel(low.float(), ref) < 0.1
