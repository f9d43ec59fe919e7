"""The merge against PEFT itself, and every way in which it must refuse."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparktune.setup.demo_model import make_model
from sparktune.setup.export import merge as merge_module
from sparktune.setup.export.merge import main, merge
from sparktune.setup.export.rounding import from_float32, to_float32
from sparktune.setup.plan import outfolder
from sparktune.setup.plan.config import save_plan
from sparktune.setup.plan.errors import PreflightError, SparktuneError, UsageError
from sparktune.setup.plan.events import NullEvents
from sparktune.setup.plan.schema import Plan


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if "partial" in p.name)


@pytest.fixture
def events() -> NullEvents:
    return NullEvents()


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, make_adapter) -> Path:
    return make_adapter(tiny_base, tmp_path_factory.mktemp("a") / "text")


@pytest.fixture(scope="module")
def merged(tiny_base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "merged"
    merge(tiny_base, adapter, out, NullEvents())
    return out


# -- what comes out


def test_trained_tensors_are_w_plus_scale_b_a_rounded_once_and_all_others_are_the_bases_bytes(
    tiny_base: Path, adapter: Path, merged: Path
) -> None:
    base, out, lora = tensors_of(tiny_base), tensors_of(merged), load_file(adapter / "adapter_model.safetensors")
    modules = {k.removesuffix(".lora_A.weight") for k in lora if k.endswith(".lora_A.weight")}
    assert len(modules) == 4 * 1 + 3 * 2 + 2, "up_proj everywhere, two GDN projections, two of attention"
    trained = set()
    for module in modules:
        name = module.removeprefix("base_model.model.").replace("model.", "model.language_model.", 1) + ".weight"
        trained.add(name)
        a, b = lora[module + ".lora_A.weight"], lora[module + ".lora_B.weight"]
        want = (base[name].double() + 2.0 * (b.double() @ a.double())).to(torch.bfloat16)
        # fp32 and float64 products may straddle a rounding boundary: one bf16 step, in a handful of elements
        differ = (out[name] != want).float().mean().item()
        assert differ < 1e-3, (name, differ)
        torch.testing.assert_close(out[name].float(), want.float(), rtol=2**-7, atol=1e-6)
        assert not torch.equal(out[name], base[name])
    assert set(out) == set(base)
    for name in set(base) - trained:
        assert same_bytes(base[name], out[name]), name
    assert any(n.startswith("mtp.") for n in set(base) - trained)
    assert any(n.startswith("model.visual.") for n in set(base) - trained)


def test_merged_logits_equal_base_plus_adapter(tmp_path: Path, make_adapter) -> None:
    from peft import PeftModel

    # an fp32 base, so that the comparison is not about bf16 rounding
    base = make_model(tmp_path / "fp32", vocab_size=1024, dtype="float32")
    adapter = make_adapter(base, tmp_path / "adapter", use_rslora=True,
                           rank_pattern={"q_proj": 2}, alpha_pattern={r"layers.3.self_attn.o_proj": 16})
    merge(base, adapter, tmp_path / "out", NullEvents())
    ids = torch.randint(0, 1000, (1, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        before = plain(ids).logits
        want = PeftModel.from_pretrained(plain, adapter)(ids).logits
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
    assert (want - before).abs().max() > 1e-2 * want.abs().max(), "the adapter must matter"
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    # what the user takes along: transformers alone loads it, as text and as multimodal model
    child = f"""
import sys
sys.modules["peft"] = sys.modules["sparktune"] = None  # importing either fails
import torch
from transformers import AutoModelForCausalLM, Qwen3_5ForConditionalGeneration
torch.set_num_threads(1)
ids = torch.tensor({ids.tolist()})
with torch.no_grad():
    found = [c.from_pretrained(sys.argv[1], dtype=torch.float32)(ids).logits
             for c in (AutoModelForCausalLM, Qwen3_5ForConditionalGeneration)]
torch.save(found, sys.argv[2])
"""
    subprocess.run([sys.executable, "-P", "-c", child, str(tmp_path / "out"), str(tmp_path / "logits")], check=True)
    for logits in torch.load(tmp_path / "logits", weights_only=True):
        assert (logits - got).abs().max() < 1e-6 * got.abs().max()


def test_an_adapter_made_on_the_multimodal_class_merges_into_the_same_tensors(
    tiny_base: Path, adapter: Path, merged: Path, tmp_path: Path
) -> None:
    other = tmp_path / "multimodal"
    shutil.copytree(adapter, other)
    renamed = {k.replace("base_model.model.model.", "base_model.model.model.language_model."): v
               for k, v in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(renamed, other / "adapter_model.safetensors")
    merge(tiny_base, other, tmp_path / "out", NullEvents())
    a, b = tensors_of(merged), tensors_of(tmp_path / "out")
    assert all(same_bytes(a[n], b[n]) for n in a)


def test_pefts_own_multimodal_key_names_are_understood(tiny_base: Path, tmp_path: Path, make_adapter) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "a", multimodal=True, target_modules=["k_proj"])
    keys = load_file(adapter / "adapter_model.safetensors")
    assert all("model.language_model.layers" in k for k in keys)
    result = merge(tiny_base, adapter, tmp_path / "out", NullEvents())
    assert result.trained_tensors == ("model.language_model.layers.3.self_attn.k_proj.weight",)


def test_untied_head_and_embedding_adapters_merge(tiny_base_untied: Path, tmp_path: Path, make_adapter) -> None:
    adapter = make_adapter(tiny_base_untied, tmp_path / "a", target_modules=["lm_head", "embed_tokens"])
    merge(tiny_base_untied, adapter, tmp_path / "out", NullEvents())
    base, out = tensors_of(tiny_base_untied), tensors_of(tmp_path / "out")
    lora = load_file(adapter / "adapter_model.safetensors")
    a, b = (lora[f"base_model.model.model.embed_tokens.lora_embedding_{x}"] for x in "AB")
    name = "model.language_model.embed_tokens.weight"
    want = base[name].float() + 2 * (b @ a).T
    torch.testing.assert_close(out[name].float(), want, rtol=2**-7, atol=1e-6)
    assert not torch.equal(out["lm_head.weight"], base["lm_head.weight"])
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_full_fine_tuning_replaces_bytes(tiny_base: Path, tmp_path: Path) -> None:
    base = tensors_of(tiny_base)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    weights = tmp_path / "weights"
    weights.mkdir()
    norm = "model.language_model.norm.weight"
    save_file({name: base[name] * 1.5, norm: base[norm] + 1}, weights / "model-00001-of-00001.safetensors")
    result = merge(tiny_base, weights, tmp_path / "out", NullEvents())
    out = tensors_of(tmp_path / "out")
    assert same_bytes(out[name], base[name] * 1.5)
    changed = {n for n in base if not same_bytes(base[n], out[n])}
    assert changed == set(result.trained_tensors) == {name, "model.language_model.norm.weight"}


def test_side_files_come_along_and_stray_weights_do_not(tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    for stray in ("pytorch_model.bin", "optimizer.pt", "consolidated.safetensors", "x.gguf", ".gitattributes"):
        (base / stray).write_bytes(b"\x80\x04stray")
    (base / "pytorch_model.bin.index.json").write_text("{}")
    (base / "LICENSE").write_text("terms")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("t")
    (base / "onnx").mkdir()
    (base / "onnx" / "model.onnx").write_bytes(b"1")
    merge(base, adapter, tmp_path / "out", NullEvents())
    names = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    expected = {p.name for p in tiny_base.iterdir() if p.name != "README.md"}
    assert names == expected | {"LICENSE", "additional_chat_templates/tool.jinja", merge_module.RECORD}
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "preprocessor_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_a_hub_caches_links_become_real_files(tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    shutil.copytree(tiny_base, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    before = {f.name: f.read_bytes() for f in blobs.iterdir()}
    merge(snapshot, adapter, tmp_path / "out", NullEvents())
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())
    assert {f.name: f.read_bytes() for f in blobs.iterdir()} == before, "the base must not change"


@pytest.mark.parametrize("refused", [errno.EXDEV, errno.ENOSYS, None])
def test_a_file_system_without_range_copies_gives_the_same_bytes(
    tiny_base: Path, adapter: Path, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: int | None
) -> None:
    if refused is None:
        monkeypatch.delattr(os, "copy_file_range")
    else:
        def refuse(*_: object) -> int:
            raise OSError(refused, "no")
        monkeypatch.setattr(os, "copy_file_range", refuse)
    merge(tiny_base, adapter, tmp_path / "out", NullEvents())
    for file in merged.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_rows_in_pieces_give_the_same_bytes(
    tiny_base: Path, adapter: Path, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_module, "_CHUNK", 7 * 256)
    merge(tiny_base, adapter, tmp_path / "out", NullEvents())
    a, b = tensors_of(merged), tensors_of(tmp_path / "out")
    # BLAS may sum in another order for other sizes: one bf16 step at most
    for name in a:
        torch.testing.assert_close(a[name].float(), b[name].float(), rtol=2**-7, atol=1e-6)


def test_rounding_is_torchs_to_nearest_even() -> None:
    values = torch.randint(-2**31, 2**31 - 1, (200_000,), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    values = values.view(torch.float32)
    values = values[values.abs() < 3e38]
    ties = (torch.arange(0, 2**15, dtype=torch.int32) << 16 | 0x8000).view(torch.float32)
    for x in (values, ties[ties.abs() < 3e38]):
        got = np.frombuffer(from_float32(x.numpy(), "BF16"), "<i2")
        assert np.array_equal(got, x.to(torch.bfloat16).view(torch.int16).numpy())
        back = to_float32(from_float32(x.numpy(), "BF16"), "BF16")
        assert np.array_equal(back, x.to(torch.bfloat16).float().numpy())
    small = values[values.abs() < 6e4]
    got = np.frombuffer(from_float32(small.numpy(), "F16"), "<i2")
    assert np.array_equal(got, small.half().view(torch.int16).numpy())
    for dtype, value in (("BF16", 3.4e38), ("F16", 7e4), ("F32", float("nan"))):
        with pytest.raises(OverflowError):
            from_float32(np.array([value], dtype=np.float32), dtype)


# -- what it refuses


def test_an_adapter_with_zero_b_is_refused(tiny_base: Path, tmp_path: Path, make_adapter, events: NullEvents) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "zero", zero=True)
    with pytest.raises(SparktuneError, match=r"lora_B is zero in all 12 modules.*not loaded"):
        merge(tiny_base, adapter, tmp_path / "out", events)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["zero"]


def broken_adapter(adapter: Path, folder: Path, config: dict[str, object] | None = None, **rename: object) -> Path:
    shutil.copytree(adapter, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    return folder


@pytest.mark.parametrize(("config", "says"), [
    ({"use_dora": True}, "DoRA"),
    ({"init_lora_weights": "pissa_niter_16"}, "pissa"),
    ({"peft_type": "IA3"}, "peft_type LORA"),
    ({"target_parameters": ["mlp.experts"]}, "bare parameters"),
    ({"fan_in_fan_out": True}, "transposed"),
    ({"r": 8}, "rank 8"),
    ({"r": None}, "whole number"),
    ({"rank_pattern": {"q_proj": 3}}, r"q_proj the rank 3 .* has 4"),
])
def test_adapters_that_are_more_than_w_plus_b_a_are_refused(
    tiny_base: Path, adapter: Path, tmp_path: Path, events: NullEvents, config: dict[str, object], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        merge(tiny_base, broken_adapter(adapter, tmp_path / "a", config), tmp_path / "out", events)
    assert not (tmp_path / "out").exists()


def test_unknown_modules_are_named(tiny_base: Path, adapter: Path, tmp_path: Path, events: NullEvents) -> None:
    bad = broken_adapter(adapter, tmp_path / "a")
    file = bad / "adapter_model.safetensors"
    save_file({k.replace("layers.3", "layers.33"): v for k, v in load_file(file).items()}, file)
    with pytest.raises(UsageError, match=r"3 modules that the base does not have: model\.layers\.33\.mlp\.up_proj"):
        merge(tiny_base, bad, tmp_path / "out", events)


def test_other_shapes_halves_nan_and_pickles_are_refused(
    tiny_base: Path, adapter: Path, tmp_path: Path, events: NullEvents
) -> None:
    good = load_file(adapter / "adapter_model.safetensors")
    b = next(k for k in good if k.endswith("up_proj.lora_B.weight"))
    nan = good[b].clone()
    nan[0, 0] = float("nan")
    cases = {
        "does not fit": good | {b: good[b][:-1].contiguous()},
        "both A and B": {k: v for k, v in good.items() if k != b},
        "NaN or infinity": good | {b: nan},
        "PEFT's LoRA writes keys": good | {"layers.0.weight": nan},
    }
    for number, (says, tensors) in enumerate(cases.items()):
        bad = broken_adapter(adapter, tmp_path / f"a{number}")
        save_file(tensors, bad / "adapter_model.safetensors")
        with pytest.raises(SparktuneError, match=says):
            merge(tiny_base, bad, tmp_path / "out", events)
    pickle = broken_adapter(adapter, tmp_path / "pickle")
    (pickle / "adapter_model.safetensors").rename(pickle / "adapter_model.bin")
    with pytest.raises(UsageError, match="pickle, which is never opened"):
        merge(tiny_base, pickle, tmp_path / "out", events)
    assert not (tmp_path / "out").exists()


def test_a_head_adapter_on_a_tied_base_is_refused(
    tiny_base: Path, tiny_base_untied: Path, tmp_path: Path, make_adapter, events: NullEvents
) -> None:
    adapter = make_adapter(tiny_base_untied, tmp_path / "a", target_modules=["lm_head"])
    with pytest.raises(UsageError, match=r"lm_head.*ties its output head"):
        merge(tiny_base, adapter, tmp_path / "out", events)


def test_missing_shard_existing_output_and_same_place(
    tiny_base: Path, adapter: Path, tmp_path: Path, events: NullEvents
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    shard = sorted(base.glob("model-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(PreflightError, match=shard.name):
        merge(base, adapter, tmp_path / "out", events)
    cut = sorted(base.glob("model-*.safetensors"))[-1]
    shutil.copy(tiny_base / shard.name, shard)
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(PreflightError, match=r"cut off"):
        merge(base, adapter, tmp_path / "out", events)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="exists already"):
        merge(tiny_base, adapter, tmp_path / "out", events)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
    with pytest.raises(UsageError, match="into the base itself"):
        merge(tiny_base, adapter, tiny_base / "sub", events)


def test_full_disk_is_predicted_and_survived(
    tiny_base: Path, adapter: Path, tmp_path: Path, events: NullEvents, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(outfolder.shutil, "disk_usage", lambda _: usage._replace(free=5_000_000))
        with pytest.raises(PreflightError, match=r"needs .* 4\.8 MiB is free"):
            merge(tiny_base, adapter, tmp_path / "out", events)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(SparktuneError, match=r"is full .*was not made"):
            merge(tiny_base, adapter, tmp_path / "out", events)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_merge_leaves_only_a_partial_that_the_next_one_clears(
    tiny_base: Path, adapter: Path, tmp_path: Path, events: NullEvents
) -> None:
    code = (
        "import os, sys; from pathlib import Path\n"
        "from sparktune.setup.export import merge as m; from sparktune.setup.plan.events import NullEvents\n"
        "m._overwrite = lambda *a: os.kill(os.getpid(), 9)\n"
        "m.merge(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), NullEvents())\n"
    )
    argv = [sys.executable, "-c", code, str(tiny_base), str(adapter), str(tmp_path / "out")]
    assert subprocess.run(argv, check=False, cwd=tmp_path).returncode == -9
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]
    merge(tiny_base, adapter, tmp_path / "out", events)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert leftovers(tmp_path / "out") == []
    strange = tmp_path / "second.partial"
    strange.mkdir()
    (strange / "mine.txt").touch()
    with pytest.raises(UsageError, match="was not made by this program"):
        merge(tiny_base, adapter, tmp_path / "second", events)
    assert (strange / "mine.txt").is_file()


# -- as a stage and as a command


def make_run(tmp_path: Path, base: Path, **plan: object) -> Path:
    root = tmp_path / "results" / "demo-run"
    root.mkdir(parents=True)
    save_plan(Plan(model=str(base), mode="lora", output=tmp_path / "output", results=tmp_path / "results", **plan),
              root / "plan.yaml")
    return root


def test_the_stage_merges_once_and_again_after_more_training(
    tiny_base: Path, adapter: Path, tmp_path: Path, make_adapter
) -> None:
    root = make_run(tmp_path, tiny_base)
    assert main(["--run", str(root)]) == 2, "nothing trained yet"
    shutil.copytree(adapter, root / "adapter")
    assert main(["--run", str(root)]) == 0
    out = tmp_path / "output" / "demo-run"
    stamp = (out / "config.json").stat().st_ino
    assert main(["--run", str(root)]) == 0
    assert (out / "config.json").stat().st_ino == stamp, "the finished merge is kept"
    shutil.rmtree(root / "adapter")
    make_adapter(tiny_base, root / "adapter", target_modules=["v_proj"])
    assert main(["--run", str(root)]) == 0
    assert json.loads((out / merge_module.RECORD).read_text())["trained_tensors"] == 1
    assert sorted(p.name for p in (tmp_path / "output").iterdir()) == ["demo-run"]
    events = [json.loads(line) for line in (root / "stages" / "merge.ndjson").read_text().splitlines()]
    ends = [e for e in events if e["kind"] == "end"]
    assert [e["ok"] for e in ends] == [False, True, True, True]
    assert any(e["kind"] == "message" and e["level"] == "error" and "adapter/ or weights/" in e["text"] for e in events)


def test_the_stage_never_replaces_a_folder_of_somebody_else(tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    root = make_run(tmp_path, tiny_base)
    shutil.copytree(adapter, root / "adapter")
    (tmp_path / "output" / "demo-run").mkdir(parents=True)
    assert main(["--run", str(root)]) == 2
    assert list((tmp_path / "output" / "demo-run").iterdir()) == []
    assert main(["--run", str(tmp_path / "nowhere")]) == 2


def test_a_bare_adapter_folder_merges_from_the_command_line(
    tiny_base: Path, adapter: Path, merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--adapter", str(adapter), "--out", str(tmp_path / "out")]) == 0
    assert "Merged 12 tensors" in capsys.readouterr().out
    for file in merged.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    assert main(["--adapter", str(tiny_base), "--out", str(tmp_path / "x")]) == 2
    err = capsys.readouterr().err
    assert "adapter_config.json" in err
    assert "Traceback" not in err


def test_an_unwritable_folder_is_said(tiny_base: Path, adapter: Path, tmp_path: Path, events: NullEvents) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(PreflightError, match="cannot be written"):
        merge(tiny_base, adapter, tmp_path / "file" / "out", events)


@pytest.mark.slow
def test_peak_memory_with_a_tensor_of_one_gib(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    code = (
        "import sys, json, torch; from pathlib import Path; from safetensors.torch import save_file\n"
        "base, adapter = Path(sys.argv[1]), Path(sys.argv[2]); base.mkdir(); adapter.mkdir()\n"
        "big = torch.empty(262144, 2048, dtype=torch.bfloat16).normal_(generator=torch.Generator().manual_seed(0))\n"
        "save_file({'model.embed_tokens.weight': torch.zeros(8, 2048, dtype=torch.bfloat16), 'lm_head.weight': big,\n"
        "           'model.layers.0.self_attn.q_proj.weight': big[:2048].clone()}, base / 'model.safetensors')\n"
        "(base / 'config.json').write_text(json.dumps({'model_type': 'qwen3', 'num_hidden_layers': 1,\n"
        " 'hidden_size': 2048, 'num_attention_heads': 16, 'vocab_size': 262144,\n"
        " 'intermediate_size': 8, 'tie_word_embeddings': False}))\n"
        "p = 'base_model.model.lm_head.lora_'\n"
        "save_file({p + 'A.weight': torch.randn(64, 2048), p + 'B.weight': torch.randn(262144, 64)},\n"
        "          adapter / 'adapter_model.safetensors')\n"
        "(adapter / 'adapter_config.json').write_text(json.dumps({'peft_type': 'LORA', 'r': 64, 'lora_alpha': 64}))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(base), str(adapter)], check=True, cwd=tmp_path)
    assert (base / "model.safetensors").stat().st_size > 2**30
    measure = (
        "import resource, sys; from sparktune.setup.export.merge import main\n"
        "code = main(sys.argv[1:]); print('torch' in sys.modules, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        "sys.exit(code)\n"
    )
    out = tmp_path / "out"
    argv = ["--adapter", str(adapter), "--base", str(base), "--out", str(out)]
    argv = [sys.executable, "-c", measure, *argv]
    done = subprocess.run(argv, check=True, capture_output=True, text=True, cwd=tmp_path)
    with_torch, peak_kib = done.stdout.split()[-2:]
    print(f"peak of the merge: {int(peak_kib) / 2**20:.2f} GiB; {done.stdout.splitlines()[0]}")
    assert with_torch == "False"
    assert int(peak_kib) / 2**20 < 2.5
