"""Probing a model from config.json alone: every spelling transformers knows, the catalogue, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from sparktune.setup.plan.errors import PreflightError, UsageError
from sparktune.setup.plan.models import (
    CATALOGUE,
    DOWNLOAD_PATTERNS,
    adapter_base,
    probe,
    resolve_model_dir,
    spec_from_config,
)

DENSE: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}


def _spec(**changes: Any) -> Any:
    return spec_from_config({**DENSE, **changes}, "test")


def _folder(path: Path, name: str = "config.json", **values: Any) -> Path:
    path.mkdir()
    (path / name).write_text(json.dumps(values))
    return path


@pytest.mark.parametrize(("size", "billions"), [
    ("0.8B", 0.752), ("2B", 1.882), ("4B", 4.206), ("9B", 8.954), ("27B", 26.896),
])
def test_catalogue(size: str, billions: float) -> None:
    spec = spec_from_config(CATALOGUE[f"Qwen/Qwen3.5-{size}"], size)
    assert spec.native
    assert spec.multimodal
    assert spec.parameters / 1e9 == pytest.approx(billions, abs=5e-4)
    assert spec.layer_types[:4] == ["linear_attention"] * 3 + ["full_attention"]
    assert (spec.rope_dim, spec.rope_theta, spec.head_dim, spec.mtp_layers) == (64, 1e7, 256, 1)
    assert spec.tie_word_embeddings == (size in ("0.8B", "2B", "4B"))


@pytest.mark.parametrize("spelling", [
    {"rope_theta": 5e5},
    {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    {"rope_theta": 5e5, "rope_scaling": None},
    {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
    {"rope_parameters": {"full_attention": {"rope_theta": 5e5, "rope_type": "default"}}},
])
def test_every_spelling_of_the_rotary_base(spelling: dict[str, Any]) -> None:
    spec = _spec(**spelling)
    assert (spec.rope_theta, spec.rope_dim, spec.rope_scaling, spec.native) == (5e5, 16, None, True)


def test_llama3_scaling_old_and_new() -> None:
    numbers = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = _spec(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **numbers})
    new = _spec(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **numbers})
    assert old.rope_scaling == new.rope_scaling == {"rope_type": "llama3", **numbers}
    assert old.rope_theta == new.rope_theta == 5e5


def test_partial_rotary_spellings() -> None:
    hybrid = {**CATALOGUE["Qwen/Qwen3.5-2B"]["text_config"]}
    for change in (
        {"rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.25}},
        {"rope_parameters": {"rope_theta": 1e7}, "partial_rotary_factor": 0.25},
        {"rope_parameters": None, "rope_theta": 1e7},
    ):
        spec = spec_from_config({**hybrid, **change}, "test")
        assert (spec.rope_dim, spec.rope_theta, spec.multimodal) == (64, 1e7, False)


def test_sliding_windows_as_each_family_reads_them() -> None:
    assert _spec(model_type="mistral", sliding_window=32).layer_types == ["sliding_attention"] * 2
    assert _spec(model_type="mistral", sliding_window=None).layer_types == ["full_attention"] * 2
    off = _spec(model_type="qwen2", sliding_window=32, use_sliding_window=False)
    assert (off.layer_types, off.sliding_window) == (["full_attention"] * 2, None)
    half = _spec(model_type="qwen3", sliding_window=32, use_sliding_window=True, max_window_layers=1)
    assert (half.layer_types, half.sliding_window) == (["full_attention", "sliding_attention"], 32)
    assert _spec(sliding_window=32).sliding_window is None, "llama has none"


def test_biases_of_each_family() -> None:
    def biases(spec: Any) -> tuple[bool, bool, bool]:
        return spec.attention_bias, spec.attention_output_bias, spec.mlp_bias

    assert biases(_spec(model_type="qwen2")) == (True, False, False)
    assert biases(_spec(attention_bias=True, mlp_bias=True)) == (True, True, True)
    assert biases(_spec(model_type="qwen3", attention_bias=True)) == (True, True, False)
    assert biases(_spec(model_type="mistral")) == (False, False, False)


@pytest.mark.parametrize(("changes", "reason"), [
    ({"model_type": "gemma3_text"}, "gemma3_text"),
    ({"hidden_act": "gelu"}, "'gelu'"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
    ({"model_type": "qwen3", "layer_types": ["full_attention", "chunked_attention"]}, "'chunked_attention'"),
])
def test_what_the_native_engine_cannot_train_is_kept_with_its_reason(changes: dict[str, Any], reason: str) -> None:
    spec = _spec(**changes)
    assert not spec.native
    assert reason in spec.native_reason
    assert spec.model_type == changes.get("model_type", "llama")


def test_a_foreign_multimodal_model_with_a_known_tower_is_not_native() -> None:
    spec = spec_from_config({"model_type": "llava", "text_config": DENSE}, "test")
    assert not spec.native
    assert "llava" in spec.native_reason


def test_the_outer_config_decides_the_tie() -> None:
    text = {**CATALOGUE["Qwen/Qwen3.5-2B"]["text_config"], "tie_word_embeddings": True}
    def tied(**outer: Any) -> bool:
        return spec_from_config({"model_type": "qwen3_5", "text_config": text, **outer}, "t").tie_word_embeddings

    assert tied() is True
    assert tied(tie_word_embeddings=False) is False


def test_local_folders_and_adapters(tmp_path: Path) -> None:
    base = _folder(tmp_path / "base", **DENSE)
    adapter = _folder(tmp_path / "adapter", "adapter_config.json", base_model_name_or_path=str(base), peft_type="LORA")
    assert probe(str(base)).hidden_size == 64
    assert probe(str(adapter)) == probe(str(base))
    assert resolve_model_dir(str(base)) == base
    assert resolve_model_dir(str(adapter)) == base
    nested = _folder(tmp_path / "nested", "adapter_config.json", base_model_name_or_path=str(adapter))
    with pytest.raises(UsageError, match="is an adapter too"):
        probe(str(nested))
    for value in (None, 3, ""):
        nameless = _folder(tmp_path / f"n{value}", "adapter_config.json", base_model_name_or_path=value)
        with pytest.raises(UsageError, match="base_model_name_or_path"):
            adapter_base(nameless)


def test_bad_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"config\.json"):
        probe(str(tmp_path / "empty"))
    with pytest.raises(UsageError, match="no such folder"):
        probe(str(tmp_path / "nowhere"))
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="it is a file"):
        probe(str(tmp_path / "file"))
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(UsageError, match="should be JSON"):
        probe(str(tmp_path / "empty"))
    for changes, message in (({"model_type": ""}, "model_type"), ({"hidden_size": "x"}, "hidden_size"),
                             ({"num_hidden_layers": None}, "num_hidden_layers"), ({"vocab_size": -1}, "vocab_size")):
        with pytest.raises(UsageError, match=message):
            _spec(**changes)
    with pytest.raises(UsageError, match="lists 3 layer_types for 2 layers"):
        _spec(model_type="qwen3", layer_types=["full_attention"] * 3)


class _Hub:
    """Stands in for the hub: `files` by name, or an error for everything."""

    def __init__(self, folder: Path, files: dict[str, Any], error: Exception | None = None) -> None:
        self.folder, self.files, self.error, self.patterns = folder, files, error, None

    def hf_hub_download(self, repo: str, name: str, revision: str | None = None) -> str:
        if self.error is not None:
            raise self.error
        if name not in self.files:
            raise errors.EntryNotFoundError("no such file")
        (self.folder / name).write_text(json.dumps(self.files[name]))
        return str(self.folder / name)

    def snapshot_download(self, repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        self.patterns = allow_patterns
        return str(self.folder)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    def install(files: dict[str, Any], error: Exception | None = None) -> _Hub:
        stand_in = _Hub(tmp_path, files, error)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", stand_in.hf_hub_download)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in.snapshot_download)
        return stand_in

    return install


def test_a_hub_model_and_a_hub_adapter(hub: Any, tmp_path: Path) -> None:
    stand_in = hub({"config.json": DENSE})
    assert probe("someone/model").hidden_size == 64
    assert resolve_model_dir("someone/model") == tmp_path
    assert stand_in.patterns == list(DOWNLOAD_PATTERNS)
    assert not any(p.endswith((".bin", ".py", "*")) for p in stand_in.patterns)
    base = _folder(tmp_path / "base", **DENSE)
    hub({"adapter_config.json": {"base_model_name_or_path": str(base)}})
    assert probe("someone/adapter").source == str(base)
    assert resolve_model_dir("someone/adapter") == base
    hub({})
    with pytest.raises(UsageError, match="neither config"):
        probe("someone/nothing")


def test_offline(hub: Any) -> None:
    hub({}, errors.LocalEntryNotFoundError("offline"))
    with pytest.raises(PreflightError, match="nor reachable"):
        probe("someone/model")
    with pytest.raises(PreflightError, match="nor reachable"):
        resolve_model_dir("Qwen/Qwen3.5-2B")
    assert probe("Qwen/Qwen3.5-2B").hidden_size == 2048, "the catalogue knows its shape"
    assert probe("Qwen/Qwen3.5-2B-Base").hidden_size == 2048
    with pytest.raises(PreflightError):
        probe("Qwen/Qwen3.5-2B", revision="abc")


def test_a_cached_config_needs_no_network(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub({}, errors.LocalEntryNotFoundError("offline"))
    folder = _folder(tmp_path / "cache", **DENSE)
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda repo, name, revision=None: str(folder / name)
    )
    assert probe("someone/model").hidden_size == 64
