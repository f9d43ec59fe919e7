"""plan.yaml, the published template, and where a value comes from."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparktune.setup.plan.config import load_plan, read_config, resolve, save_plan
from sparktune.setup.plan.errors import ExitCode, UsageError
from sparktune.setup.plan.schema import Plan

TEMPLATE = """
model:
  base_id: "meta-llama/Llama-3.1-8B-Instruct"
  max_seq_length: 4096
  quantization: "nf4"
  dtype: "float16"
adapter:
  rank: 32
  alpha: 64
  dropout: 0.05
  target_modules:
    - "q_proj"
    - "down_proj"
training:
  epochs: 3
  batch_size: 4
  gradient_accumulation_steps: 4
  learning_rate: 2.0e-4
  scheduler: "cosine"
  optimizer: "paged_adamw_8bit"
  warmup_steps: 100
  weight_decay: 0.01
  gradient_checkpointing: "unsloth"
  seed: 42
dataset:
  path: "./processed_dataset.jsonl"
  text_field: "instruction_response"
  packing: true
  remove_unused_columns: true
"""


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "c.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_the_published_template_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notes: list[str] = []
    plan = resolve({}, read_config(write(tmp_path, TEMPLATE), notes), {}, {})
    assert plan.model == "meta-llama/Llama-3.1-8B-Instruct"
    assert (plan.max_seq_length, plan.mode, plan.dtype) == (4096, "qlora", "bfloat16")
    assert (plan.lora_r, plan.lora_alpha, plan.lora_dropout) == (32, 64.0, 0.05)
    assert plan.target_modules == ["q_proj", "down_proj"]
    assert (plan.num_epochs, plan.per_device_batch_size, plan.gradient_accumulation) == (3.0, 4, 4)
    assert (plan.learning_rate, plan.lr_scheduler, plan.optimizer) == (2e-4, "cosine", "paged_adamw_8bit")
    assert (plan.warmup_steps, plan.weight_decay, plan.recompute, plan.seed) == (100, 0.01, "auto", 42)
    assert (plan.data, plan.text_field, plan.pack) == (
        tmp_path / "processed_dataset.jsonl", "instruction_response", True
    )
    assert {plan.origins[f] for f in ("model", "mode", "lora_r", "data")} == {"config"}
    assert len(notes) == 3
    assert any("remove_unused_columns" in n and "no effect" in n for n in notes)
    assert any("float16" in n and "bfloat16" in n for n in notes)


@pytest.mark.parametrize(("text", "words"), [
    ("lora_rank: 3", ["lora_rank", "lora_r"]),
    ("adapter:\n  rnak: 3", ["adapter.rnak", "adapter.rank"]),
    ("trainig:\n  epochs: 3", ["trainig", "training"]),
    ("- a\n- b", ["list"]),
    ("just words", ["str"]),
    ("data: !!python/object/apply:os.system ['true']", ["tags", "line 1"]),
    ("data: [1", ["not plain YAML"]),
    ("seed: 1\nseed: 2", ["seed", "twice"]),
    ("seed: 1\ntraining:\n  seed: 2", ["seed", "training.seed"]),
    ("epochs: 1\nnum_epochs: 2", ["epochs", "num_epochs"]),
    ("adapter: 3", ["adapter", "section"]),
    ("model:\n  quantization: int3", ["nf4", "int3"]),
    ("schema_version: 99", ["99"]),
    (b"\xff\xfe\x00a", ["UTF-8"]),
])
def test_bad_config_files_are_named(tmp_path: Path, text: str | bytes, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        read_config(write(tmp_path, text))
    assert caught.value.exit_code == ExitCode.USAGE
    assert all(w in str(caught.value) for w in [*words, str(tmp_path)])


def test_a_config_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.yaml", tmp_path):
        with pytest.raises(UsageError, match=str(path)):
            read_config(path)


def test_tags_run_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    with pytest.raises(UsageError):
        read_config(write(tmp_path, f"data: !!python/object/apply:os.mkdir ['{canary}']"))
    assert not canary.exists()


def test_precedence_and_origins() -> None:
    layers = {"flag": 1, "environment": 2, "config": 3, "saved": 4}
    for missing in range(5):
        have = dict(list(layers.items())[missing:])
        plan = resolve(
            {"lora_r": 1} if "flag" in have else {},
            {"lora_r": 3} if "config" in have else {},
            {"SPARKTUNE_LORA_R": "2"} if "environment" in have else {"PATH": "x", "SPARKTUNE_LORA_R": ""},
            {"lora_r": 4} if "saved" in have else {},
        )
        first = next(iter(have), "default")
        assert plan.lora_r == layers.get(first)
        assert plan.origins["lora_r"] == first
    assert set(plan.origins) == set(Plan.model_fields) - {"schema_version", "origins", "ranks", "kernels"}


def test_how_many_ranks_trained_an_old_plan_is_not_how_many_train_the_next(tmp_path: Path) -> None:
    old = resolve({"data": tmp_path / "d.jsonl", "name": "old"}, {}, {}, {}).model_copy(update={"ranks": 8})
    save_plan(old, tmp_path / "plan.yaml")
    assert load_plan(tmp_path / "plan.yaml").ranks == 8
    again = resolve({"gradient_accumulation": 4}, read_config(tmp_path / "plan.yaml"), {}, {})
    assert again.processes == 1


def test_every_wrong_value_is_named_with_its_range() -> None:
    with pytest.raises(UsageError) as caught:
        resolve(
            {"lora_r": 0, "mode": "best"}, {"learning_rate": "nan", "seed": True},
            {"SPARKTUNE_EVAL_SPLIT": "1.5"}, {"num_epochs": float("inf")},
        )
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    for words in (["--lora-r", "at least 1", "0"], ["--mode", "auto, lora, qlora, full", "best"],
                  ["--learning-rate", "config", "greater than 0", "nan"],
                  ["SPARKTUNE_EVAL_SPLIT", "less than 1", "1.5"],
                  ["--epochs", "inf"], ["--seed", "True"]):
        assert any(all(w in line for w in words) for line in lines), words


@pytest.mark.parametrize(("flags", "config", "words"), [
    ({"static_lora": True, "wrap_full_ft": True}, {}, ["--static-lora", "--wrap-full-ft"]),
    ({"static_lora": True, "mode": "full"}, {}, ["--static-lora", "--mode full"]),
    ({"wrap_full_ft": True, "engine": "unsloth"}, {}, ["--wrap-full-ft", "--engine unsloth"]),
    ({"mode": "full"}, {"static_lora": True}, ["--static-lora", "config", "--mode is full", "flag"]),
    ({"static_lora": True}, {"wrap_full_ft": True}, ["--wrap-full-ft"]),
])
def test_conflicts_are_named(flags: dict, config: dict, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(flags, config, {}, {})
    assert all(w in str(caught.value) for w in words), str(caught.value)


def test_selectors_imply_engine_and_mode() -> None:
    plan = resolve({"static_lora": True}, {"mode": "full"}, {}, {})
    assert (plan.engine, plan.mode, plan.origins["mode"]) == ("native", "lora", "flag")
    plan = resolve({}, {}, {"SPARKTUNE_WRAP_FULL_FT": "1"}, {})
    assert (plan.engine, plan.mode, plan.origins["mode"]) == ("native", "full", "environment")
    assert resolve({"static_lora": False, "mode": "full"}, {}, {}, {}).mode == "full"


def test_environment_aliases_and_typos() -> None:
    assert resolve({}, {}, {"SPARKTUNE_EPOCHS": "2"}, {}).num_epochs == 2.0
    with pytest.raises(UsageError, match="SPARKTUNE_LEARNING_RATE"):
        resolve({}, {}, {"SPARKTUNE_LEARNIG_RATE": "1"}, {})


def test_yaml_1_1_surprises(tmp_path: Path) -> None:
    plan = resolve({}, read_config(write(tmp_path, "thinking: on\nlearning_rate: 2e-4\ngguf: none\nlora_r:\n")), {}, {})
    assert (plan.thinking, plan.learning_rate, plan.gguf, plan.lora_r) == ("on", 2e-4, [], None)
    assert resolve({}, read_config(write(tmp_path, "gguf: q8_0, bf16")), {}, {}).gguf == ["q8_0", "bf16"]


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    plan = resolve({"data": Path("d.jsonl"), "model": "m"}, {"eval_data": "~/e.jsonl"}, {}, {})
    assert (plan.data, plan.eval_data, plan.model) == (tmp_path / "d.jsonl", tmp_path / "e.jsonl", str(tmp_path / "m"))
    assert (plan.results, plan.output) == (tmp_path / "results", tmp_path / "output")
    assert resolve({"model": "Qwen/Qwen3.5-2B"}, {}, {}, {}).model == "Qwen/Qwen3.5-2B"
    assert resolve({"model": "./nope"}, {}, {}, {}).model == str(tmp_path / "nope")


def test_a_saved_plan_comes_back(tmp_path: Path) -> None:
    plan = resolve({"data": "ü d.jsonl", "sample_prompts": ["a: b # c", "'"], "lora_r": 3}, {}, {}, {})
    plan.kernels = {"rms_norm": "triton: faster"}
    path = tmp_path / "run" / "plan.yaml"
    save_plan(plan, path)
    assert load_plan(path) == plan
    text = path.read_text(encoding="utf-8")
    assert "# Rank of the LoRA adapters" in text
    assert "--lora-r, flag" in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    again = resolve({}, read_config(path), {}, {})
    ignore = {"origins", "kernels"}
    assert again.model_dump(exclude=ignore) == plan.model_dump(exclude=ignore)


def test_saving_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.yaml"
    save_plan(Plan(lora_r=1), path)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_plan(Plan(lora_r=2), path)
    assert load_plan(path).lora_r == 1
    assert [p.name for p in tmp_path.iterdir()] == ["plan.yaml"]


def test_a_damaged_plan_is_named(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("lora_q: 3\n")
    with pytest.raises(UsageError, match="lora_r"):
        load_plan(path)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(
    st.sampled_from(sorted(Plan.model_fields)),
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.text(max_size=3))),
    max_size=4,
))
def test_no_value_escapes_as_a_traceback(values: dict) -> None:
    with contextlib.suppress(UsageError):
        resolve({}, values, {}, {})


def test_a_step_too_small_for_all_machines_is_refused_before_anything_starts() -> None:
    with pytest.raises(UsageError, match="Pass --gradient-accumulation 2 or more"):
        resolve({"peers": ["192.168.100.2"], "gradient_accumulation": 1}, {}, {}, {})
    assert resolve({"peers": ["192.168.100.2"], "gradient_accumulation": 2}, {}, {}, {}).processes == 2
