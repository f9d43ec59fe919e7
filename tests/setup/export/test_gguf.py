"""The GGUF stage on real conversions: values against an oracle of our own, and everything that must stop it."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file

from sparktune.setup.export import gguf_child, llama_cpp
from sparktune.setup.export.convert_demo import demo_objection
from sparktune.setup.export.evaluate import gguf_answer, model_answers
from sparktune.setup.export.evaluate import main as evaluate_main
from sparktune.setup.export.generate import load
from sparktune.setup.export.gguf import main
from sparktune.setup.export.gguf_checks import check_file, judge, needed_bytes
from sparktune.setup.export.gguf_export import _explain, _Export, export_gguf, read_manifest
from sparktune.setup.export.gguf_map import from_gguf, to_gguf
from sparktune.setup.export.merge import main as merge_main
from sparktune.setup.export.prompts import Prompt, choose_prompts
from sparktune.setup.export.train_mtp_step import main as mtp_main
from sparktune.setup.plan.config import save_plan
from sparktune.setup.plan.errors import PreflightError, SparktuneError, UsageError
from sparktune.setup.plan.events import NullEvents
from sparktune.setup.plan.exports import check_gguf_types
from sparktune.setup.plan.models import probe
from sparktune.setup.plan.schema import Plan


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.fixture(scope="module")
def run(tiny_base: Path, make_adapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run taken through merge, mtp and gguf as the pipeline would."""
    top = tmp_path_factory.mktemp("journey")
    root = top / "results" / "demo-run"
    root.mkdir(parents=True)
    plan = Plan(model=str(tiny_base), mode="lora", output=top / "output", results=top / "results",
                gguf=["q8_0", "bf16"], sample_prompts=["What is 5 + 5?"], learning_rate=2e-4)
    save_plan(plan, root / "plan.yaml")
    make_adapter(tiny_base, root / "adapter")
    assert merge_main(["--run", str(root)]) == 0
    assert mtp_main(["--run", str(root)]) == 0
    assert main(["--run", str(root)]) == 0
    return root


@pytest.fixture
def output(run: Path) -> Path:
    return run.parents[1] / "output"


def gguf_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    reader = GGUFReader(path)
    values = {t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return values, {t.name: t.tensor_type.name for t in reader.tensors}


# -- values, against an oracle that shares no code with the product


def expected_tensors(model: Path) -> dict[str, torch.Tensor]:
    """What a qwen35 file must hold, written from llama.cpp's graph: norms times 1 + w, A = -exp(A_log), tiled heads."""
    text = json.loads((model / "config.json").read_text())["text_config"]
    keys, values, dim = text["linear_num_key_heads"], text["linear_num_value_heads"], text["linear_value_head_dim"]
    assert values == 2 * keys, "the tiny model has grouped value heads, or the order would not be tested"
    tiled = [k * (values // keys) + j for j in range(values // keys) for k in range(keys)]
    rows = torch.tensor([h * dim + d for h in tiled for d in range(dim)])
    first = 2 * keys * text["linear_key_head_dim"]
    qkv = torch.cat([torch.arange(first), first + rows])
    layer = {
        "input_layernorm.weight": ("attn_norm.weight", lambda x: x + 1),
        "post_attention_layernorm.weight": ("post_attention_norm.weight", lambda x: x + 1),
        "self_attn.q_proj.weight": ("attn_q.weight", None), "self_attn.k_proj.weight": ("attn_k.weight", None),
        "self_attn.v_proj.weight": ("attn_v.weight", None), "self_attn.o_proj.weight": ("attn_output.weight", None),
        "self_attn.q_norm.weight": ("attn_q_norm.weight", lambda x: x + 1),
        "self_attn.k_norm.weight": ("attn_k_norm.weight", lambda x: x + 1),
        "mlp.gate_proj.weight": ("ffn_gate.weight", None), "mlp.up_proj.weight": ("ffn_up.weight", None),
        "mlp.down_proj.weight": ("ffn_down.weight", None),
        "linear_attn.in_proj_qkv.weight": ("attn_qkv.weight", lambda x: x[qkv]),
        "linear_attn.in_proj_z.weight": ("attn_gate.weight", lambda x: x[rows]),
        "linear_attn.in_proj_a.weight": ("ssm_alpha.weight", lambda x: x[tiled]),
        "linear_attn.in_proj_b.weight": ("ssm_beta.weight", lambda x: x[tiled]),
        "linear_attn.out_proj.weight": ("ssm_out.weight", lambda x: x[:, rows]),
        "linear_attn.conv1d.weight": ("ssm_conv1d.weight", lambda x: x[qkv, 0]),
        "linear_attn.A_log": ("ssm_a", lambda x: -torch.exp(x[tiled])),
        "linear_attn.dt_bias": ("ssm_dt.bias", lambda x: x[tiled]),
        "linear_attn.norm.weight": ("ssm_norm.weight", None),
    }
    head = {"fc.weight": ("eh_proj.weight", None), "pre_fc_norm_embedding.weight": ("enorm.weight", lambda x: x + 1),
            "pre_fc_norm_hidden.weight": ("hnorm.weight", lambda x: x + 1),
            "norm.weight": ("shared_head_norm.weight", lambda x: x + 1)}
    out: dict[str, torch.Tensor] = {}
    n = text["num_hidden_layers"]
    for name, tensor in tensors_of(model).items():
        name, tensor = name.replace("language_model.", ""), tensor.float()
        if name.startswith("model.visual."):
            continue
        if name in ("model.embed_tokens.weight", "model.norm.weight"):
            out[{"m": "token_embd.weight", "n": "output_norm.weight"}["n" if "norm" in name else "m"]] = (
                tensor + 1 if "norm" in name else tensor)
            continue
        if name.startswith("mtp.") and not name.startswith("mtp.layers."):
            new, change = head[name.removeprefix("mtp.")]
            new = f"blk.{n}.nextn.{new}"
        else:
            _, _, number, rest = name.split(".", 3) if name.startswith("model.") else ("", *name.split(".", 2)[:2], "")
            if name.startswith("mtp."):
                number, rest = str(n), name.split(".", 3)[3]
            new, change = layer[rest]
            new = f"blk.{number}.{new}"
        out[new] = change(tensor) if change else tensor
    return out


def test_every_tensor_of_both_files_is_the_merged_models(run: Path, output: Path) -> None:
    want = expected_tensors(output / "demo-run-mtp-default")
    for kind in ("BF16", "Q8_0"):
        values, types = gguf_tensors(output / "demo-run-gguf" / f"demo-run-{kind}.gguf")
        assert values.keys() == want.keys()
        for name, x in want.items():
            got, expected = torch.from_numpy(values[name].copy()), x
            assert got.shape == expected.shape, name
            f32 = x.dim() < 2 or "norm" in name or "conv1d" in name
            assert types[name] == ("F32" if f32 else kind), name
            if kind == "BF16" or f32:
                torch.testing.assert_close(got, expected, rtol=1e-6 if name.endswith("ssm_a") else 0, atol=0)
            else:
                blocks = expected.reshape(-1, 32)
                step = blocks.abs().amax(1, keepdim=True) / 127
                error = (got.reshape(-1, 32) - blocks).abs()
                assert (error <= step * 0.5625 + 1e-6).all(), name
                assert error.max() > 0, "quantised values differ from the originals"


def test_the_trained_tensors_are_in_the_file(run: Path, output: Path, tiny_base: Path) -> None:
    values, _ = gguf_tensors(output / "demo-run-gguf" / "demo-run-BF16.gguf")
    base = tensors_of(tiny_base)
    name = "model.language_model.layers.3.self_attn.q_proj.weight"
    assert not np.array_equal(values["blk.3.attn_q.weight"], base[name].float().numpy())


def test_the_map_is_its_own_inverse(tiny_base: Path) -> None:
    text = json.loads((tiny_base / "config.json").read_text())["text_config"]
    for name, tensor in tensors_of(tiny_base).items():
        neutral = name.replace("language_model.", "").replace(".dt_bias", ".dt_proj.bias")
        x = tensor.float().numpy()
        back = from_gguf(to_gguf(x, neutral, "qwen35", text), neutral, "qwen35", text)
        np.testing.assert_allclose(back.reshape(x.shape), x, rtol=1e-6, atol=1e-6)


def test_the_folder_says_what_it_is(run: Path, output: Path) -> None:
    folder = output / "demo-run-gguf"
    assert sorted(p.name for p in folder.iterdir()) == [
        "Modelfile", "demo-run-BF16.gguf", "demo-run-Q8_0.gguf", "manifest.json", "mmproj-demo-run-F16.gguf"]
    manifest = read_manifest(folder)
    assert manifest["source"]["mtp"] is True
    assert manifest["source"]["folder"].endswith("demo-run-mtp-default")
    assert manifest["llama_cpp"]["commit"] == llama_cpp.COMMIT
    for file in manifest["files"]:
        assert file["bytes"] == (folder / file["file"]).stat().st_size
        checks = file["checks"]
        assert (checks["arch"], checks["pre"], checks["block_count"], checks["nextn_predict_layers"]) == (
            "qwen35", "qwen35", 5, 1)
        assert checks["compared_tensors"] == checks["tensors"] == 70
        assert checks["fallbacks"] == []
        assert file["bytes"] <= needed_bytes(output / "demo-run", file["type"], with_mtp=True)
    model = (folder / "Modelfile").read_text()
    assert model.splitlines()[:4] == [
        "FROM ./demo-run-Q8_0.gguf", "TEMPLATE {{ .Prompt }}", "RENDERER qwen3.5", "PARSER qwen3.5"]
    stamp = (folder / "manifest.json").stat().st_ino
    assert main(["--run", str(run)]) == 0
    assert (folder / "manifest.json").stat().st_ino == stamp, "finished files are kept"


def test_the_result_folder_has_a_card_with_the_commands(run: Path, output: Path) -> None:
    card = (output / "demo-run" / "README.md").read_text()
    assert "vllm serve demo-run-mtp-default --language-model-only --speculative-config" in card
    assert "llama-server -m demo-run-gguf/demo-run-Q8_0.gguf --jinja --spec-type draft-mtp" in card
    assert "learning rate | 0.0002" in card
    assert str(output) not in card, "no path of this machine in a folder that gets published"


# -- the GGUF's weights answer


def test_evaluate_asks_base_merged_and_gguf(run: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # without llama.cpp's programs the first file's weights answer in transformers
    monkeypatch.setattr("sparktune.setup.export.sources.find_tools", lambda: None)
    stale = '{"stage": "after", "prompt": "old", "answer": "of an earlier evaluation"}\n'
    (run / "samples.jsonl").write_text('{"step": 0, "prompt": "What is 5 + 5?", "answer": "x"}\n' + stale)
    assert evaluate_main(["--run", str(run)]) == 0
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [(r.get("stage"), r.get("source")) for r in rows] == [
        (None, None), ("before", "base"), ("after", "merged"), ("after", "gguf q8_0")]
    assert {r["prompt"] for r in rows} == {"What is 5 + 5?"}
    assert all(isinstance(r["answer"], str) for r in rows)


def test_the_bf16_files_weights_answer_as_the_merged_model(run: Path, output: Path) -> None:
    prompts = [Prompt(text="a", ids=tuple(range(5, 40))), Prompt(text="b", ids=(7, 300, 12))]
    want = model_answers(output / "demo-run", prompts, "cpu")
    file = output / "demo-run-gguf" / "demo-run-BF16.gguf"
    assert gguf_answer(file, output / "demo-run", prompts, "cpu", NullEvents()) == want
    assert all(want)
    assert len(set(want)) == 2


def test_reading_back_fills_every_parameter_of_the_model(run: Path, output: Path) -> None:
    merged = output / "demo-run"
    model, _ = load(merged, "cpu")
    want = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    file = gguf_child._Gguf(output / "demo-run-gguf" / "demo-run-BF16.gguf")
    gguf_child.load_into(model, file, gguf_child._Checkpoint(merged))
    for name, parameter in model.named_parameters():
        # 1 + w in float32 keeps w to 2^-24; log(exp(w)) to a few places more
        torch.testing.assert_close(parameter.detach(), want[name], rtol=1e-6, atol=2e-7, msg=name)


# -- other layouts


def copied(base: Path, folder: Path, change: dict[str, Any], keep_mtp: bool) -> Path:
    """A copy of a model as one file, with another config and perhaps without its MTP tensors."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    save_file({n: t for n, t in tensors_of(base).items() if keep_mtp or not n.startswith("mtp.")},
              folder / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    config["text_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_converter_gets_the_head_only_where_tensors_and_declaration_agree(
    tiny_base_untied: Path, tmp_path: Path
) -> None:
    for declared, keep_mtp, flag in ((1, True, False), (1, False, True), (0, True, True), (0, False, True)):
        name = f"{declared}-{keep_mtp}"
        model = copied(tiny_base_untied, tmp_path / name, {"mtp_num_hidden_layers": declared}, keep_mtp)
        command = _Export(model, tmp_path, tmp_path, NullEvents()).arguments(tmp_path / "x", "q8_0", "m")
        assert ("--no-mtp" in command) is flag, name
        assert "sparktune.setup.export.convert_demo" in command


def test_three_value_heads_a_key_head_and_a_head_that_is_only_declared(tiny_base_untied: Path, tmp_path: Path) -> None:
    # 27B has 3 value heads for each key head; with the tiny model's 2 x 2 an order and its inverse are the same
    model = copied(tiny_base_untied, tmp_path / "model", {"linear_num_value_heads": 6}, False)
    tensors, generator = load_file(model / "model.safetensors"), torch.Generator().manual_seed(3)
    grown = {"in_proj_qkv.weight": (640, 256), "in_proj_z.weight": (384, 256), "in_proj_a.weight": (6, 256),
             "in_proj_b.weight": (6, 256), "out_proj.weight": (256, 384), "conv1d.weight": (640, 1, 4), "A_log": (6,),
             "dt_bias": (6,)}
    for name in tensors:
        if ".linear_attn." in name and (shape := grown.get(name.partition(".linear_attn.")[2])):
            tensors[name] = torch.randn(shape, generator=generator).to(torch.bfloat16)
    save_file(tensors, model / "model.safetensors")
    text = json.loads((model / "config.json").read_text())["text_config"]
    z = np.arange(384 * 2, dtype=np.float32).reshape(384, 2)
    got = to_gguf(z, "model.layers.0.linear_attn.in_proj_z.weight", "qwen35", text)[::64, 0] / 128
    assert got.tolist() == [0, 3, 1, 4, 2, 5], "value heads 0-2 belong to key head 0, 3-5 to key head 1"
    back = from_gguf(to_gguf(z, ".linear_attn.in_proj_z.", "qwen35", text), ".linear_attn.in_proj_z.", "qwen35", text)
    assert np.array_equal(back, z)
    manifest = export_gguf(model, tmp_path / "out", ["q8_0"], "m", NullEvents())
    checks = manifest["files"][0]["checks"]
    assert (checks["block_count"], checks["nextn_predict_layers"], manifest["source"]["mtp"]) == (4, 0, False)
    assert checks["compared_tensors"] == checks["tensors"] == 70 - 15 + 1, "the head's 15 out, the untied lm_head in"


@pytest.mark.parametrize(("family", "kind"), [("llama", "f32"), ("qwen3", "f16")])
def test_dense_families_convert_and_compare(tiny_base: Path, tmp_path: Path, family: str, kind: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    shape = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
             "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": family == "qwen3",
             "rope_theta": 5e5}
    model = tmp_path / "model"
    torch.manual_seed(0)
    if family == "llama":
        LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(model)
    else:
        Qwen3ForCausalLM(Qwen3Config(**shape)).to(torch.bfloat16).save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json", "sparktune-demo.json", "chat_template.jinja"):
        shutil.copy(tiny_base / name, model)
    manifest = export_gguf(model, tmp_path / "out", [kind], "m", NullEvents())
    checks = manifest["files"][0]["checks"]
    assert checks["arch"] == family
    assert checks["compared_tensors"] == checks["tensors"] > 15
    assert "RENDERER" not in (tmp_path / "out" / "Modelfile").read_text()
    if family == "llama":
        prompts = [Prompt(text="a", ids=tuple(range(9, 30)))]
        file = tmp_path / "out" / "m-F32.gguf"
        assert gguf_answer(file, model, prompts, "cpu", NullEvents()) == model_answers(model, prompts, "cpu")


def test_a_bare_adapter_is_merged_and_exported(
    tiny_base: Path, tmp_path: Path, make_adapter, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter", target_modules=["v_proj"])
    assert main(["--adapter", str(adapter), "--out", str(tmp_path / "out-gguf")]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "out-gguf"]
    assert (tmp_path / "out-gguf" / "out-Q8_0.gguf").is_file()
    assert read_manifest(tmp_path / "out-gguf")["adapter"]["base"] == str(tiny_base)


# -- what it refuses


def test_unknown_and_repeated_types_are_refused_at_planning_time(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_gguf_types(["bf16", "f16", "f32", "q8_0", "q4_k_m", "q5_k_m", "iq4_xs"])
    for types, says in ((["q9"], "got 'q9'"), (["Q4_K_M"], "got 'Q4_K_M'"), (["bf16", "bf16"], "once")):
        with pytest.raises(UsageError, match=says):
            check_gguf_types(types)
    assert main(["--model", str(run), "--out", str(tmp_path / "x"), "--types", "q9"]) == 2
    assert "got 'q9'" in capsys.readouterr().err


def test_an_unknown_tokenizer_without_the_marker_is_an_error_that_explains(tiny_base: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_base, model)
    (model / "sparktune-demo.json").unlink()
    with pytest.raises(SparktuneError, match=r"does not know the tokenizer .* a hash that no published model has"):
        export_gguf(model, tmp_path / "out", ["bf16"], "m", NullEvents())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(("ends", "says"), [
    ("OSError: 196608 requested and 44544 written", "The disk filled up"),
    ("OSError: [Errno 28] No space left on device", "The disk filled up"),
    ("NotImplementedError: BPE pre-tokenizer was not recognized - update it", "does not know the tokenizer"),
    ("ValueError: something else", r"refused .*: ValueError: something else"),
])
def test_the_converters_end_is_explained_by_its_last_words(ends: str, says: str) -> None:
    warned = "WARNING:hf-to-gguf:** WARNING: The BPE pre-tokenizer was not recognized!"  # of every demo model
    assert re.search(says, _explain(f"{warned}\nTraceback\n{ends}\n", Path("m")))


def test_the_wrapper_wants_the_demos_marker_and_its_rule(tiny_base: Path, tmp_path: Path) -> None:
    assert demo_objection(tiny_base) == ""
    model = tmp_path / "model"
    model.mkdir()
    assert "not both there" in demo_objection(model)
    shutil.copy(tiny_base / "tokenizer.json", model)
    (model / "sparktune-demo.json").write_text('{"made_by": "me"}')
    assert "does not say" in demo_objection(model)
    shutil.copy(tiny_base / "sparktune-demo.json", model)
    text = (model / "tokenizer.json").read_text().replace("\\\\p{M}", "")
    (model / "tokenizer.json").write_text(text)
    assert "does not split as Qwen3.5" in demo_objection(model)


def test_a_damaged_file_fails_its_check(run: Path, output: Path, tmp_path: Path) -> None:
    good = output / "demo-run-gguf" / "demo-run-Q8_0.gguf"
    bad = tmp_path / "bad.gguf"
    model = output / "demo-run-mtp-default"
    spec = probe(str(model))
    sources = llama_cpp.converter_sources(NullEvents())
    where = {t.name: int(t.data_offset) for t in GGUFReader(good).tensors}["blk.3.attn_k.weight"]
    raw = bytearray(good.read_bytes())
    raw[where + 2 + 34 * 100] ^= 0x40
    bad.write_bytes(raw)
    with pytest.raises(SparktuneError, match=r"1 checks and is not kept: blk\.3\.attn_k\.weight differs from"):
        check_file(bad, model, "q8_0", spec, with_mtp=True, sources=sources, scratch=tmp_path, events=NullEvents())
    bad.write_bytes(raw[:-5000])
    with pytest.raises(SparktuneError, match="could not be read back"):
        check_file(bad, model, "q8_0", spec, with_mtp=True, sources=sources, scratch=tmp_path, events=NullEvents())


def test_judge_knows_what_each_file_must_be(tiny_base: Path) -> None:
    spec = probe(str(tiny_base))
    good = {"arch": "qwen35", "pre": "qwen35", "block_count": 5, "nextn_predict_layers": 1, "vocabulary": 1024,
            "wrong": [], "types": {"a.weight": "Q8_0", "a_norm.weight": "F32"},
            "shapes": {"a.weight": [8, 64], "a_norm.weight": [64]}}
    assert judge(good, "q8_0", spec, with_mtp=True) == ([], [])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"arch": "qwen3"}, "architecture should be qwen35"), ({"pre": "qwen2"}, "pre-tokenizer should be qwen35"),
        ({"block_count": 4}, "block_count should be 5"),
        ({"nextn_predict_layers": 0}, "nextn_predict_layers should be 1"),
        ({"vocabulary": 9}, "1024 tokens"), ({"wrong": ["x is missing"]}, "x is missing"),
        ({"types": {"a.weight": "F16", "a_norm.weight": "F32"}}, "a.weight should be Q8_0, it is F16"),
        ({"types": {"a.weight": "Q8_0", "a_norm.weight": "Q8_0"}}, "a_norm.weight should be F32"),
    ]
    for change, says in cases:
        wrong, fallbacks = judge(good | change, "q8_0", spec, with_mtp=True)
        assert len(wrong) == 1, change
        assert says in wrong[0]
        assert fallbacks == []
    odd = good | {"types": {"a.weight": "F16"}, "shapes": {"a.weight": [8, 40]}}
    assert judge(odd, "q8_0", spec, with_mtp=True) == ([], ["a.weight"])


def test_existing_output_and_missing_merge_are_said(run: Path, output: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        export_gguf(output / "demo-run", tmp_path / "there", ["q8_0"], "m", NullEvents())
    root = tmp_path / "results" / "empty"
    root.mkdir(parents=True)
    save_plan(Plan(model="x/y", output=tmp_path / "o", results=tmp_path / "results"), root / "plan.yaml")
    assert main(["--run", str(root)]) == 3
    assert evaluate_main(["--run", str(root)]) == 3


# -- the pinned sources


def test_the_sources_are_verified_and_fetched_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = llama_cpp.converter_sources(NullEvents())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = tmp_path / "sparktune" / "llama.cpp"

    def no_network(target: Path, where: Path) -> Path:
        raise PreflightError("no network in this test")

    monkeypatch.setattr(llama_cpp, "_download", no_network)
    with pytest.raises(PreflightError, match="no network"):
        llama_cpp.converter_sources(NullEvents())
    assert list(cache.iterdir()) == []
    shutil.copytree(real, cache / llama_cpp.COMMIT)
    assert llama_cpp.converter_sources(NullEvents()) == cache / llama_cpp.COMMIT
    (cache / llama_cpp.COMMIT / "conversion" / "qwen.py").write_text("import os\n")
    with pytest.raises(SparktuneError, match="unchanged"):
        llama_cpp.converter_sources(NullEvents())
    shutil.rmtree(cache / llama_cpp.COMMIT)
    (cache / llama_cpp.SDIST).write_bytes(b"not the sdist")
    with pytest.raises(SparktuneError, match="should have the sha256"):
        llama_cpp.converter_sources(NullEvents())


def test_unpacking_takes_only_regular_files_below_the_folder(tmp_path: Path) -> None:
    root = str(llama_cpp._ROOT)
    archive = tmp_path / "x.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in (f"{root}/conversion/a.py", f"{root}/../../../evil.py", f"{root}/conversion/../../evil.py",
                     f"{root}/ggml/big.c", "/abs.py"):
            info = tarfile.TarInfo(name)
            tar.addfile(info)
        link = tarfile.TarInfo(f"{root}/conversion/link.py")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    llama_cpp._unpack(archive, tmp_path / "out")
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*")) if p.is_file()] == [
        "out/conversion/a.py", "x.tar.gz"]


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "PACKAGE", "llama-cpp-python==0.0.0.1")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(PreflightError, match=r"needed once.*pip says: ERROR.*put llama_cpp_python"):
        llama_cpp._download(tmp_path, tmp_path / "cache")


def test_children_see_the_pinned_sources_first_and_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
    environment = llama_cpp.child_environment(tmp_path / "src", tmp_path)
    assert "PYTHONSAFEPATH" not in environment
    assert environment["PYTHONPATH"].split(":")[:2] == [str(tmp_path / "src"), str(tmp_path / "src" / "gguf-py")]
    assert "/somewhere/else" not in environment["PYTHONPATH"]
    monkeypatch.syspath_prepend("/somewhere/else")  # this process imports from there, so its children may
    assert llama_cpp.child_environment(tmp_path / "src", tmp_path)["PYTHONPATH"].endswith(":/somewhere/else")
    monkeypatch.setenv("PYTHONPATH", "")
    assert environment["HF_HUB_OFFLINE"] == "1"
    code = "import gguf, sparktune; print(gguf.__file__)"
    sources = llama_cpp.converter_sources(NullEvents())
    done = llama_cpp.run_child([sys.executable, "-c", code], llama_cpp.child_environment(sources, tmp_path), tmp_path,
                               lambda: None)
    assert done.code == 0
    assert str(sources / "gguf-py") in done.output


def test_held_out_prompts_end_where_the_answer_begins() -> None:
    from sparktune.setup.data.cache import TokenDataset

    class Words:
        def decode(self, ids: tuple[int, ...], skip_special_tokens: bool = False) -> str:
            return " ".join(map(str, ids))

    ids = np.array([1, 2, 3, 4, 1, 2, 9, 5, 6, 7], dtype=np.uint32)
    supervised = np.array([0, 0, 1, 1, 0, 0, 1, 1, 0, 0], dtype=np.uint8)
    data = TokenDataset(ids, supervised, np.array([0, 4, 7, 10]), np.array([1, 2, 3]), "k")
    prompts = choose_prompts(Plan(), Words(), data)
    assert [p.ids for p in prompts] == [(1, 2)], "repeated prompts and rows that learn from the start give none"


def test_held_out_prompts_are_shown_as_the_user_asked_them(tmp_path: Path) -> None:
    from sparktune.setup.data.cache import TokenDataset

    class Words:
        def decode(self, ids: tuple[int, ...], skip_special_tokens: bool = False) -> str:
            return "rendered"

    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How much?"},
             {"role": "assistant", "content": "Two."}]
    rows = [{"text": "plain"}, {"messages": turns}, {"prompt": " ", "completion": "Three."}]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids, supervised = np.arange(6, dtype=np.uint32), np.array([0, 0, 1, 0, 0, 1], dtype=np.uint8)
    data = TokenDataset(ids, supervised, np.array([0, 3, 6]), np.array([2, 3]), "k")
    prompts = choose_prompts(Plan(data=path), Words(), data)
    assert [(p.text, p.ids) for p in prompts] == [("How much?", (0, 1)), ("rendered", (3, 4))]
