"""Files proven in llama.cpp itself: limits against the merged model, drafting, and every refusal on the way there."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from sparktune.setup.export import llama_build, proof
from sparktune.setup.export.gguf import examples_of_model
from sparktune.setup.export.gguf_export import export_gguf
from sparktune.setup.export.hf_reference import base_row, read_base_row, write_header
from sparktune.setup.export.llama_build import Tools, build_tools
from sparktune.setup.export.llama_cpp import converter_sources
from sparktune.setup.export.llama_server import llama_server
from sparktune.setup.export.proof import CONTEXT, kl_limit, make_chunks, make_reference, prove
from sparktune.setup.export.quantise import predict
from sparktune.setup.plan import outfolder
from sparktune.setup.plan.errors import PreflightError, SparktuneError
from sparktune.setup.plan.events import NullEvents
from sparktune.setup.plan.exports import check_exports
from sparktune.setup.plan.schema import Plan

# without a cache the first test compiles llama.cpp, which takes longer than a test may
pytestmark = pytest.mark.timeout(3600)

TYPES = ["q4_k_m", "f32", "q8_0"]


class Heard(NullEvents):
    """Keeps what a user would be told."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, dict[str, Any]]] = []

    def emit(self, kind: Any, **fields: Any) -> None:
        self.events.append((kind, fields))

    def choices(self) -> dict[str, str]:
        return {f["what"]: f["chosen"] for kind, f in self.events if kind == "choice"}

    def texts(self) -> str:
        return "\n".join(str(f["text"]) for kind, f in self.events if kind == "message")


@pytest.fixture(scope="session")
def tools() -> Tools:
    """llama.cpp's programs: from the cache, or compiled now (about 25 minutes of one core, once)."""
    return build_tools(NullEvents())


@pytest.fixture(scope="module")
def exported(tiny_base: Path, tools: Tools, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A model with vision tower and MTP head, in three types, proven."""
    out = tmp_path_factory.mktemp("proof") / "out"
    return out, export_gguf(tiny_base, out, TYPES, "m", NullEvents(), examples=lambda: examples_of_model(tiny_base))


def variant(base: Path, folder: Path, *, declared: int, tensors: bool) -> Path:
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    # without the vision tower: its conversion has a test of its own
    kept = {n: t for n, t in load_file(base / "model.safetensors").items()
            if "visual." not in n and (tensors or not n.startswith("mtp."))}
    save_file(kept, folder / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["mtp_num_hidden_layers"] = declared
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# -- in llama.cpp


@pytest.mark.llama_cpp
def test_every_type_is_within_its_limit_in_llama_cpp(exported: tuple[Path, dict[str, Any]]) -> None:
    out, manifest = exported
    assert [f["type"] for f in manifest["files"]] == TYPES
    for file in manifest["files"]:
        found = file["proof"]
        assert 0 <= found["mean_kl"] <= found["kl_limit"] == kl_limit(file["type"])
        assert found["same_token_ids"] == found["texts"] == len(proof.TEXTS)
        assert found["smoke"]["answer"] == found["smoke"]["merged_answers"] or file["type"] == "q4_k_m"
        assert found["reference_dtype"] == "float32"
        assert (out / file["file"]).stat().st_size == file["bytes"] <= file["predicted_bytes"] + 2**20
    by_type = {f["type"]: f["proof"] for f in manifest["files"]}
    assert by_type["f32"]["logits"]["max_abs_difference"] < 1e-3
    assert by_type["f32"]["answers_as_merged"] == by_type["f32"]["answers"]
    assert by_type["f32"]["mean_kl"] <= by_type["q8_0"]["mean_kl"] < by_type["q4_k_m"]["mean_kl"]
    assert by_type["f32"]["perplexity"] == pytest.approx(by_type["f32"]["merged_perplexity"], rel=1e-3)


@pytest.mark.llama_cpp
def test_nothing_is_left_beside_the_files(exported: tuple[Path, dict[str, Any]]) -> None:
    out, manifest = exported
    assert sorted(p.name for p in out.iterdir()) == [
        "Modelfile", "m-F32.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf", "manifest.json", "mmproj-m-F16.gguf"]
    assert manifest["mmproj"]["loaded_by_llama_cpp"]
    assert json.loads((out / "manifest.json").read_text())["files"] == manifest["files"]


@pytest.mark.llama_cpp
def test_drafting_with_the_head_gives_the_same_tokens(exported: tuple[Path, dict[str, Any]]) -> None:
    for file in exported[1]["files"]:
        found = file["proof"]["mtp"]
        assert found["drafted"] > 0
        assert found["equal_to_plain_greedy"] == found["prompts"]
    types = next(f["checks"]["types"] for f in exported[1]["files"] if f["type"] == "q4_k_m")
    assert types["BF16"] == 8, "the head's matrices keep bf16: fc, four of attention, three of the MLP"
    assert types["Q4_K"] > types.get("Q6_K", 0) > 0


@pytest.mark.llama_cpp
@pytest.mark.parametrize(("declared", "tensors"), [(0, False), (1, False), (0, True)])
def test_without_key_and_tensors_both_the_file_works_without_a_head(
    tiny_base_untied: Path, tools: Tools, tmp_path: Path, declared: int, tensors: bool
) -> None:
    model, heard = variant(tiny_base_untied, tmp_path / "model", declared=declared, tensors=tensors), Heard()
    manifest = export_gguf(model, tmp_path / "out", ["q8_0"], "m", heard)
    assert heard.choices()["gguf mtp"] == "left out (--no-mtp)"
    assert manifest["files"][0]["checks"]["nextn_predict_layers"] == 0
    with llama_server(tools, tmp_path / "out" / "m-Q8_0.gguf", context=256) as server:
        assert len(server.complete(range(5, 20), 4).ids) == 4
        assert server.tokenize("a b") != []


@pytest.mark.llama_cpp
def test_a_file_of_another_model_is_refused(
    exported: tuple[Path, dict[str, Any]], tiny_base_untied: Path, tools: Tools, tmp_path: Path
) -> None:
    sources, examples = converter_sources(NullEvents()), examples_of_model(tiny_base_untied)
    model = tmp_path / "model"
    shutil.copytree(tiny_base_untied, model)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 1.2
    save_file(tensors, model / "model.safetensors")
    reference = make_reference(model, examples, "cpu", sources, tmp_path, NullEvents())
    with pytest.raises(SparktuneError, match=r"does not behave .* mean KL divergence from the merged model is .* q8_0"):
        prove(tools, exported[0] / "m-Q8_0.gguf", "q8_0", model, examples, reference, with_mtp=False, device="cpu",
              sources=sources, scratch=tmp_path, events=NullEvents())


@pytest.mark.llama_cpp
def test_the_dry_run_names_fallbacks_and_wants_a_matrix(
    exported: tuple[Path, dict[str, Any]], tools: Tools, tmp_path: Path
) -> None:
    source = exported[0] / "m-F32.gguf"
    assert predict(tools, source, "q4_k_m", tmp_path, head_block=4).fallbacks == {}
    assert predict(tools, source, "iq2_xxs", tmp_path).wants_matrix
    with pytest.raises(SparktuneError, match=r"could not make q4_k_m"):
        predict(tools, tmp_path / "none.gguf", "q4_k_m", tmp_path)


@pytest.mark.llama_cpp
def test_widths_that_do_not_divide_are_listed(tiny_base: Path, tools: Tools, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model, heard = tmp_path / "model", Heard()
    LlamaForCausalLM(LlamaConfig(
        vocab_size=1024, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16, num_attention_heads=4,
        num_key_value_heads=2, rope_theta=5e5,
    )).save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json", "sparktune-demo.json", "chat_template.jinja"):
        shutil.copy(tiny_base / name, model)
    manifest = export_gguf(model, tmp_path / "out", ["q4_k_m"], "m", heard)
    fallbacks = manifest["files"][0]["quantiser_fallbacks"]
    assert fallbacks["blk.0.attn_q.weight"].lower() in ("q5_0", "q5_1")
    assert len(fallbacks) >= 14
    assert "no multiple of its block" in heard.texts()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["Modelfile", "m-Q4_K_M.gguf", "manifest.json"]


@pytest.mark.llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["q5_k_m", "q6_k", "q3_k_m", "q2_k", "iq4_xs", "iq2_xxs", "q4_0", "tq1_0", "tq2_0"])
def test_other_types_are_made_and_proven(tiny_base: Path, tools: Tools, tmp_path: Path, kind: str) -> None:
    manifest = export_gguf(tiny_base, tmp_path / "out", [kind], "m", NullEvents(),
                           examples=lambda: examples_of_model(tiny_base))
    file = manifest["files"][0]
    assert file["importance_matrix"] is (kind == "iq2_xxs")
    assert file["proof"]["same_token_ids"] == len(proof.TEXTS)


# -- refusals


def test_no_compiler_is_said_at_planning_time_and_at_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(llama_build, "_BAKED", tmp_path / "none")
    plan = Plan(model="a/b", gguf=["q8_0", "q4_k_m"], backend="local")
    with pytest.raises(PreflightError, match=r"--gguf q4_k_m needs .* no C\+\+ compiler \(c\+\+, g\+\+, clang\+\+\)"):
        check_exports(plan)
    check_exports(plan.model_copy(update={"gguf": ["q8_0", "bf16"]}))
    check_exports(plan.model_copy(update={"backend": "docker"}))
    with pytest.raises(PreflightError, match=r"no C\+\+ compiler .* --gguf bf16,q8_0"):
        build_tools(NullEvents())
    assert not (tmp_path / "sparktune").exists(), "nothing was fetched"


def test_a_changed_program_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "tools"
    (folder / "bin").mkdir(parents=True)
    for name in llama_build.PROGRAMS:
        (folder / "bin" / name).write_text(name)
    hashes = {name: llama_build._sha256(folder / "bin" / name) for name in llama_build.PROGRAMS}
    (folder / "build.json").write_text(json.dumps({"commit": llama_build.COMMIT, "sha256": hashes}))
    assert llama_build._read(folder) is not None
    (folder / "bin" / "llama-server").write_text("another")
    with pytest.raises(SparktuneError, match="is missing or has changed"):
        llama_build._read(folder)
    (folder / "build.json").write_text(json.dumps({"commit": "0" * 40, "sha256": hashes}))
    assert llama_build._read(folder) is None, "another commit's programs are not ours"


def test_no_space_for_the_intermediate_is_said_before_anything_is_written(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Disk:
        free = 10 * 2**20

    converter_sources(NullEvents())  # fetched while there is room: the refusal meant here is the export's
    monkeypatch.setattr("sparktune.setup.export.gguf_export.build_tools", lambda events: None)
    monkeypatch.setattr(outfolder.shutil, "disk_usage", lambda path: Disk)
    with pytest.raises(PreflightError, match=r"q4_k_m \d+\.\d MiB, bf16 in between \d+\.\d MiB.* 10\.0 MiB is free"):
        export_gguf(tiny_base, tmp_path / "out", ["q4_k_m"], "m", NullEvents())
    assert list(tmp_path.iterdir()) == []


def test_quantised_weights_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_base, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(PreflightError, match=r"quantised weights \(fp8\)"):
        export_gguf(model, tmp_path / "out", ["q8_0"], "m", NullEvents())


def test_a_head_is_left_out_where_the_plan_skips_it(tiny_base: Path, tmp_path: Path) -> None:
    from sparktune.setup.export.gguf_export import _Export

    kept = _Export(tiny_base, tmp_path, tmp_path, NullEvents())
    dropped = _Export(tiny_base, tmp_path, tmp_path, NullEvents(), keep_mtp=False)
    assert "--no-mtp" not in kept.arguments(tmp_path, "q8_0", "m")
    assert "--no-mtp" in dropped.arguments(tmp_path, "q8_0", "m")
    assert dropped.why_mtp == "asked for with --mtp skip"
    assert dropped.sizes(["q8_0"])["q8_0"] < kept.sizes(["q8_0"])["q8_0"]
    assert set(kept.sizes(["q4_k_m"])) == {"q4_k_m", "bf16"}
    assert set(kept.sizes(["f32", "q4_k_m"])) == {"f32", "q4_k_m"}


# -- the comparison's own pieces


def test_log_probabilities_survive_their_file(tmp_path: Path) -> None:
    logits = np.random.default_rng(0).normal(0, 3, 1001).astype(np.float32)
    raw = base_row(logits)
    assert len(raw) == 2 * (1002 + 4), "a step, a lowest value, and an even number of uint16"
    want = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    got = read_base_row(raw, 1001)
    assert np.abs(np.maximum(want, want.max() - 16) - got).max() < 16 / 65535
    path = tmp_path / "base"
    chunks = [list(range(8)), list(range(8, 16))]
    with path.open("wb") as file:
        write_header(file, 8, 1001, chunks)
    head = path.read_bytes()
    assert head[:8] == b"_logits_"
    assert struct.unpack("<Iii", head[8:20]) == (8, 1001, 2)
    assert np.frombuffer(head[20:], "<i4").tolist() == list(range(16))


def test_chunks_are_full_and_short_material_is_repeated() -> None:
    chunks = make_chunks([[1, 2, 3]])
    assert len(chunks) == 4
    assert {len(c) for c in chunks} == {CONTEXT}
    assert chunks[0][:6] == [1, 2, 3, 1, 2, 3]
    assert len(make_chunks([list(range(9999))])) == proof.CHUNKS


@pytest.mark.parametrize(("kind", "limit"), [("q8_0", 5e-3), ("q4_k_m", 0.15), ("iq4_xs", 0.15), ("q5_k_m", 6e-2),
                                             ("iq2_xxs", None), ("f32", 1e-4)])
def test_every_type_has_its_limit(kind: str, limit: float | None) -> None:
    assert kl_limit(kind) == limit


