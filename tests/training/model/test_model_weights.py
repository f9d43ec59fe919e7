"""Loading by name: both layouts, shards, ties, and every way a folder can be wrong; export of trained tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparktune.kernels.select import reference_ops
from sparktune.setup.plan.errors import PreflightError
from sparktune.setup.plan.models import probe, safetensors_index
from sparktune.training.model import build_model, export_weights, load_weights, train_everything

Tensors = dict[str, torch.Tensor]


def _copy(source: Path, target: Path, change: Callable[[Tensors], Tensors] = lambda t: t) -> Path:
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(change(load_file(source / "model.safetensors")), target / "model.safetensors")
    return target


def _shard(source: Path, target: Path) -> Path:
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::3], names[1::3], names[2::3]), start=1):
        file = f"model-{i:05d}-of-00003.safetensors"
        save_file({n: tensors[n] for n in part}, target / file)
        weight_map |= dict.fromkeys(part, file)
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return target


def _load(folder: Path, dtype: torch.dtype = torch.float32):
    spec = probe(str(folder))
    model = build_model(spec, reference_ops(), dtype, "cpu")
    load_weights(model, folder, spec)
    return model


def test_every_tensor_arrives(oracles) -> None:
    for family in ("qwen3_5_multimodal", "llama"):
        oracle, folder = oracles(family)
        model = _load(folder)
        state, parameters = oracle.state_dict(), dict(model.named_parameters())
        for name, slot in model.slots().items():
            there = name.replace("model.", model.spec.text_prefix, 1) if name.startswith("model.") else name
            assert torch.equal(slot.of(parameters[slot.parameter]), state[there]), name
        assert sum(p.numel() for p in model.parameters()) == model.spec.parameters


def test_shards_load_like_one_file(oracles, tmp_path: Path) -> None:
    folder = oracles("qwen3_5")[1]
    one, many = _load(folder), _load(_shard(folder, tmp_path / "sharded"))
    for (name, a), b in zip(one.named_parameters(), many.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_vision_tower_and_mtp_are_left_alone(oracles, tmp_path: Path) -> None:
    folder = _copy(oracles("qwen3_5_multimodal")[1], tmp_path / "m", lambda t: {**t, "mtp.fc.weight": torch.ones(2, 2)})
    _load(folder)


def test_a_text_checkpoint_of_a_multimodal_config_loads(oracles, tmp_path: Path) -> None:
    def text_only(tensors: Tensors) -> Tensors:
        return {k.replace("model.language_model.", "model."): v for k, v in tensors.items() if "visual" not in k}

    _load(_copy(oracles("qwen3_5_multimodal")[1], tmp_path / "m", text_only))


def test_a_tied_head_may_repeat_the_embedding_but_not_differ(oracles, tmp_path: Path) -> None:
    source = oracles("qwen2")[1]
    _load(_copy(source, tmp_path / "a", lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    other = _copy(source, tmp_path / "b", lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"] + 1})
    with pytest.raises(PreflightError, match="tie_word_embeddings"):
        _load(other)


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: {k: v for k, v in t.items() if "layers.2.mlp.up" not in k},
     r"1 tensors are missing: model\.layers\.2\.mlp\.up_proj\.weight"),
    (lambda t: {**t, "model.layers.0.surprise": torch.zeros(1)},
     r"not part of this architecture: model\.layers\.0\.surprise"),
    (lambda t: {**t, "model.norm.weight": torch.zeros(31)}, r"model\.norm\.weight is \[31\], expected \[32\]"),
    (lambda t: {**t, "model.norm.weight": torch.zeros(32, dtype=torch.int8)}, r"model\.norm\.weight is I8"),
])
def test_wrong_tensors_are_named(change, message, oracles, tmp_path: Path) -> None:
    folder = _copy(oracles("qwen3_5")[1], tmp_path / "m", change)
    with pytest.raises(PreflightError, match=message):
        _load(folder)


def test_a_missing_shard_is_named(oracles, tmp_path: Path) -> None:
    folder = _shard(oracles("qwen3_5")[1], tmp_path / "sharded")
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(PreflightError, match=r"1 of 3 shards.*model-00002-of-00003\.safetensors"):
        safetensors_index(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(PreflightError, match=r"lacks the shard model-00002-of-00003\.safetensors"):
        safetensors_index(folder)


def test_a_cut_off_file_is_seen(oracles, tmp_path: Path) -> None:
    folder = _copy(oracles("qwen3_5")[1], tmp_path / "m")
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    for keep in (len(raw) - 1, 50, 4, 0):
        path.write_bytes(raw[:keep])
        with pytest.raises(PreflightError, match="fetch it again"):
            safetensors_index(folder)
    path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(PreflightError, match=r"only pytorch_model\.bin, a pickle"):
        safetensors_index(folder)


def test_export_writes_base_names_base_types_rounded_once(oracles, tmp_path: Path) -> None:
    def to_bf16(tensors: Tensors) -> Tensors:
        tensors = {k: v if k.endswith("A_log") else v.bfloat16() for k, v in tensors.items()}
        return {**tensors, "lm_head.weight": tensors["model.language_model.embed_tokens.weight"].clone()}

    folder = _copy(oracles("qwen3_5_multimodal")[1], tmp_path / "m", to_bf16)
    model = _load(folder, torch.bfloat16)
    names = train_everything(model)
    masters = {n: p.detach().float() * 1.001 for n, p in model.named_parameters() if n in names}
    export_weights(model, folder, tmp_path / "weights", masters)
    base = load_file(folder / "model.safetensors")
    written = load_file(tmp_path / "weights" / "trained-00001.safetensors")
    assert written.keys() == {k for k in base if "visual" not in k}
    for name, value in written.items():
        assert value.dtype == base[name].dtype
        assert torch.equal(value, (base[name].float() * 1.001).to(value.dtype)), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "weights"]
