"""Adapters: PEFT's folders both ways, targets, grouping, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sparktune.kernels.modules import StaticLoRA
from sparktune.setup.plan.errors import UsageError
from sparktune.training.adapters import (
    LoraConfig,
    attach_lora,
    default_targets,
    load_adapter,
    named_adapters,
    resolve_targets,
    save_adapter,
)

HYBRID_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "in_proj_qkv",
                  "in_proj_z", "out_proj")


def _random_b(model) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, StaticLoRA):
                module.lora_b.copy_(0.1 * torch.randn(module.lora_b.shape, generator=generator))


def _logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(batch)


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("family", ["qwen3_5", "qwen2", "llama"])
def test_peft_loads_our_adapter_and_gives_our_logits(
    family, rslora, oracles, build, documents, row, rel, tmp_path: Path
) -> None:
    folder = oracles(family)[1]
    model, batch = build(folder), row(documents([70]))
    plain = _logits(model, batch)
    config = LoraConfig(r=4, alpha=16, use_rslora=rslora)
    attach_lora(model, config, seed=3)
    assert torch.equal(_logits(model, batch), plain), "a fresh adapter changes nothing"
    _random_b(model)
    save_adapter(model, tmp_path / "adapter", config, str(folder))
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    b = [p for n, p in theirs.named_parameters() if "lora_B" in n]
    assert b
    assert all(p.abs().max() > 0 for p in b), "every B was loaded"
    with torch.no_grad():
        expected = theirs(input_ids=batch.ids[None], use_cache=False).logits[0]
    ours = _logits(model, batch)
    assert rel(ours, plain) > 1e-2, "the adapter does something"
    assert rel(ours, expected) < 1e-5


@pytest.mark.parametrize("targets", [list(HYBRID_TARGETS), ["q_proj", "v_proj", "in_proj_a", "in_proj_z", "up_proj"]],
                         ids=["default", "sparse"])
def test_we_load_pefts_adapter_and_give_its_logits(
    targets, oracles, build, documents, row, rel, tmp_path: Path
) -> None:
    folder = oracles("qwen3_5")[1]
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    model, batch = build(folder), row(documents([70]))
    loaded = load_adapter(model, tmp_path / "adapter")
    assert loaded.r == 4
    assert loaded.scale == 2.0
    for name, _, b in named_adapters(model):
        assert b.abs().max() > 0, name
    with torch.no_grad():
        expected = theirs(input_ids=batch.ids[None], use_cache=False).logits[0]
    assert rel(_logits(model, batch), expected) < 1e-5
    save_adapter(model, tmp_path / "again", loaded, str(folder))
    first = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    second = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert first.keys() == second.keys(), "the keys are PEFT's own"
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_multimodal_layout_loads_into_the_multimodal_class(
    oracles, build, documents, row, rel, tmp_path: Path
) -> None:
    oracle, folder = oracles("qwen3_5_multimodal")
    model, batch = build(folder), row(documents([40]))
    config = LoraConfig(r=4, alpha=8)
    attach_lora(model, config, seed=3)
    _random_b(model)
    save_adapter(model, tmp_path / "adapter", config, str(folder), "multimodal")
    base = transformers.Qwen3_5ForConditionalGeneration(oracle.config).eval()
    base.load_state_dict(oracle.state_dict())
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    b = {n: p for n, p in theirs.named_parameters() if "lora_B" in n}
    assert b
    assert all(p.abs().max() > 0 for p in b.values())
    assert not any("visual" in n for n in b)
    with torch.no_grad():
        expected = theirs(input_ids=batch.ids[None], use_cache=False).logits[0]
    assert rel(_logits(model, batch), expected) < 1e-5
    again = build(folder)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(_logits(again, batch), _logits(model, batch))


def test_gradients_are_pefts(oracles, build, documents, row, rel, tmp_path: Path) -> None:
    folder = oracles("qwen3_5")[1]
    model, batch = build(folder), row(documents([70]))
    config = LoraConfig(r=4, alpha=8)
    attach_lora(model, config, seed=3)
    _random_b(model)
    save_adapter(model, tmp_path / "adapter", config, str(folder))
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    logits = theirs(input_ids=batch.ids[None], use_cache=False).logits[0]
    torch.nn.functional.cross_entropy(logits[:-1], batch.ids[1:], reduction="sum").backward()
    model.loss_sum(batch).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    other = dict(theirs.named_parameters())
    for name, a, b in named_adapters(model, gradients):
        assert rel(a, other[f"base_model.model.{name}.lora_A.default.weight"].grad) < 1e-5, name
        assert rel(b, other[f"base_model.model.{name}.lora_B.default.weight"].grad) < 1e-5, name


def test_fresh_adapters_start_as_pefts(oracles, build) -> None:
    model = build(oracles("qwen3_5")[1])
    attach_lora(model, LoraConfig(r=8, alpha=8), seed=3)
    for name, a, b in named_adapters(model):
        bound = a.shape[1] ** -0.5
        assert 0.8 * bound < a.abs().max() <= bound, name
        assert not b.any(), name
    twin = build(oracles("qwen3_5")[1])
    attach_lora(twin, LoraConfig(r=8, alpha=8), seed=3)
    pairs = zip(named_adapters(model), named_adapters(twin), strict=True)
    assert all(torch.equal(x[1], y[1]) for x, y in pairs), "the seed decides"
    assert [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n] == []


def test_default_targets_and_unknown_ones(oracles, build) -> None:
    hybrid, dense = build(oracles("qwen3_5")[1]).spec, build(oracles("llama")[1]).spec
    assert set(default_targets(hybrid)) == set(HYBRID_TARGETS)
    assert default_targets(dense) == HYBRID_TARGETS[:7]
    assert resolve_targets(hybrid, ["in_proj_a", "q_proj"]) == ("q_proj", "in_proj_a")
    with pytest.raises(UsageError, match=r"q_proj, .*in_proj_b.*seen: qproj"):
        resolve_targets(hybrid, ["qproj", "k_proj"])
    with pytest.raises(UsageError, match="seen: in_proj_qkv"):
        resolve_targets(dense, ["in_proj_qkv"])


def test_dropout_masks_are_unbiased_and_of_their_own(oracles, build, documents, row) -> None:
    model = build(oracles("llama")[1])
    attach_lora(model, LoraConfig(r=2, alpha=2, dropout=0.25), seed=3)
    seen = []

    def record(x, weight, bias, a, b, sizes, scale, mask):
        seen.append(mask)
        return torch.nn.functional.linear(x, weight, bias)

    for module in model.modules():
        if isinstance(module, StaticLoRA):
            module.ops = type("Ops", (), {"lora_linear": staticmethod(record)})
    model(row(documents([200])))
    first = list(seen)
    assert len({m.sum().item() for m in first}) > len(first) // 2, "modules draw different masks"
    values = torch.cat([m.flatten() for m in first])
    assert values.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert abs(values.mean().item() - 1.0) < 0.01
    model(row(documents([200])))
    assert not torch.equal(seen[len(first)], first[0]), "the next forward pass draws others"
    model.dropout_calls = 0
    model(row(documents([200])))
    assert torch.equal(seen[2 * len(first)], first[0]), "a resumed counter draws the same"


def _saved(oracles, build, folder: Path) -> Path:
    base = oracles("llama")[1]
    model = build(base)
    config = LoraConfig(r=2, alpha=4)
    attach_lora(model, config, seed=0)
    save_adapter(model, folder, config, str(base))
    return folder


def test_config_says_what_peft_needs(oracles, build, tmp_path: Path) -> None:
    written = json.loads((_saved(oracles, build, tmp_path / "a") / "adapter_config.json").read_text())
    read = peft.LoraConfig.from_pretrained(tmp_path / "a")
    assert (read.r, read.lora_alpha, read.task_type, read.use_rslora) == (2, 4, "CAUSAL_LM", False)
    assert read.base_model_name_or_path == str(oracles("llama")[1]) == written["base_model_name_or_path"]
    assert set(read.target_modules) == set(HYBRID_TARGETS[:7])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"], "nothing partial is left"
    _saved(oracles, build, tmp_path / "a")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    with pytest.raises(UsageError, match="other"):
        _saved(oracles, build, tmp_path / "other")
    assert (tmp_path / "other" / "mine.txt").read_text() == "x"


@pytest.mark.parametrize(("change", "message"), [
    ({"use_dora": True}, "use_dora"),
    ({"peft_type": "IA3"}, "IA3"),
    ({"bias": "all"}, "all"),
    ({"init_lora_weights": "pissa"}, "pissa"),
    ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
    ({"r": None}, "r and lora_alpha"),
])
def test_other_adapters_are_refused(change, message, oracles, build, tmp_path: Path) -> None:
    folder = _saved(oracles, build, tmp_path / "a")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UsageError, match=message):
        load_adapter(build(oracles("llama")[1]), folder)


def test_an_adapter_of_another_base_is_named(oracles, build, tmp_path: Path) -> None:
    folder = _saved(oracles, build, tmp_path / "a")
    with pytest.raises(UsageError, match=r"layers\.0\.self_attn.*another base"):
        load_adapter(build(oracles("qwen3_5")[1]), folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({**tensors, key: torch.zeros(2, 5)}, path)
    with pytest.raises(UsageError, match=r"q_proj.lora_A.weight .*\[2, 32\]; it is \[2, 5\]"):
        load_adapter(build(oracles("llama")[1]), folder)
    save_file({k: v for k, v in tensors.items() if k != key}, path)
    with pytest.raises(UsageError, match=r"pairs.*q_proj\.lora_B"):
        load_adapter(build(oracles("llama")[1]), folder)


def test_multimodal_layout_of_a_text_model_is_refused(oracles, build, tmp_path: Path) -> None:
    model = build(oracles("llama")[1])
    config = LoraConfig(r=2, alpha=4)
    attach_lora(model, config, seed=0)
    with pytest.raises(UsageError, match="--layout text"):
        save_adapter(model, tmp_path / "a", config, "base", "multimodal")
    assert not (tmp_path / "a").exists()
