"""The MTP head on its way: out of a published checkpoint, into a merged model, and what must never be made."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparktune.mtp import extract_upstream_mtp as extract_module
from sparktune.mtp.extract_upstream_mtp import extract, find_head
from sparktune.mtp.extract_upstream_mtp import main as extract_main
from sparktune.mtp.inject_mtp import HEAD_FILE, declare_head, inject
from sparktune.mtp.inject_mtp import main as inject_main
from sparktune.mtp.tensors import check_head, mtp_shapes
from sparktune.setup.demo_model import make_model
from sparktune.setup.export.train_mtp_step import main as stage_main
from sparktune.setup.plan.config import save_plan
from sparktune.setup.plan.errors import PreflightError, SparktuneError, UsageError
from sparktune.setup.plan.schema import Plan
from sparktune.setup.plan.weights import safetensors_index


@pytest.fixture(scope="module", params=["sharded", "single"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sharded = request.param == "sharded"
    return make_model(tmp_path_factory.mktemp("m") / request.param, vocab_size=1024, sharded=sharded, tied=sharded)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        loaded = load_file(file)
        assert not found.keys() & loaded.keys(), "no tensor in two files"
        found |= loaded
    return found


def other_head(base: Path, path: Path) -> Path:
    """A head of the same shape with other values."""
    save_file({n: t + 1 for n, t in tensors_of(base).items() if n.startswith("mtp.")}, path)
    return path


def test_extract_takes_the_15_tensors_byte_for_byte(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "head.safetensors"
    assert extract_main(["--model", str(base), "--out", str(out)]) == 0
    head, whole = load_file(out), tensors_of(base)
    assert len(head) == 15
    assert all(n.startswith("mtp.") and torch.equal(t, whole[n]) for n, t in head.items())
    text = json.loads((base / "config.json").read_text())["text_config"]
    assert {n: tuple(t.shape) for n, t in head.items()} == mtp_shapes(text)
    with pytest.raises(UsageError, match="exists already"):
        extract(str(base), out)


def test_inject_changes_only_head_and_config_and_shares_the_rest(base: Path, tmp_path: Path) -> None:
    head = other_head(base, tmp_path / "head.safetensors")
    (base / "additional_chat_templates").mkdir(exist_ok=True)
    (base / "additional_chat_templates" / "tool.jinja").write_text("t")
    assert inject_main(["--model", str(base), "--head", str(head), "--out", str(tmp_path / "out")]) == 0
    out = tmp_path / "out"
    before, after = tensors_of(base), tensors_of(out)
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        want = before[name] + 1 if name.startswith("mtp.") else before[name]
        assert torch.equal(tensor, want), name
    index = safetensors_index(out)
    assert {f.name for n, f in index.items() if n.startswith("mtp.")} == {HEAD_FILE}
    assert index.keys() == after.keys()
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())
    assert weight_map["metadata"]["total_size"] == sum(t.nbytes for t in after.values())
    linked = {p.name for p in out.glob("*.safetensors") if p.stat().st_nlink > 1}
    clean = {f.name for f in base.glob("*.safetensors") if not any(n.startswith("mtp.") for n in load_file(f))}
    assert linked == clean
    config = json.loads((out / "config.json").read_text())
    old = json.loads((base / "config.json").read_text())
    assert config["text_config"]["mtp_num_hidden_layers"] == 1
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is old["tie_word_embeddings"]
    assert (out / "additional_chat_templates" / "tool.jinja").read_text() == "t"
    assert (out / "tokenizer.json").stat().st_nlink == 1, "small files are copies: editing one must not edit the other"


def test_the_declaration_reaches_both_config_levels_and_flat_configs() -> None:
    nested = declare_head({"model_type": "qwen3_5", "tie_word_embeddings": False, "text_config": {"hidden_size": 1}})
    assert nested["text_config"] == {"hidden_size": 1, "mtp_num_hidden_layers": 1, "tie_word_embeddings": False}
    inner_only = declare_head({"text_config": {"tie_word_embeddings": True}})
    assert inner_only["tie_word_embeddings"] is True
    flat = declare_head({"model_type": "qwen3_5_text", "tie_word_embeddings": True, "mtp_num_hidden_layers": 0})
    assert flat == {"model_type": "qwen3_5_text", "tie_word_embeddings": True, "mtp_num_hidden_layers": 1}


def test_a_head_across_file_systems_is_copied(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    inject(base, find_head(base), tmp_path / "out", source="itself")
    assert all(p.stat().st_nlink == 1 for p in (tmp_path / "out").iterdir() if p.is_file())
    a, b = tensors_of(base), tensors_of(tmp_path / "out")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_wrong_heads_are_refused_and_leave_nothing(base: Path, tmp_path: Path) -> None:
    good = {n: t.clone() for n, t in tensors_of(base).items() if n.startswith("mtp.")}
    nan = good["mtp.fc.weight"].clone()
    nan[3, 3] = float("inf")
    cases: dict[str, dict[str, torch.Tensor]] = {
        r"missing: mtp\.norm\.weight; unknown: none": {k: v for k, v in good.items() if k != "mtp.norm.weight"},
        r"unknown: mtp\.shared\.weight": good | {"mtp.shared.weight": nan.clone()},
        r"another size": good | {"mtp.fc.weight": good["mtp.fc.weight"][:-1].clone()},
        r"mtp\.fc\.weight hold NaN or infinity": good | {"mtp.fc.weight": nan},
        r"stored as I16": good | {"mtp.fc.weight": torch.zeros_like(nan, dtype=torch.int16)},
    }
    for number, (says, tensors) in enumerate(cases.items()):
        file = tmp_path / f"{number}.safetensors"
        save_file(tensors, file)
        folder = tmp_path / f"m{number}"
        head = {n: (file, e) for n, e in extract_module.safetensors_header(file).items()}
        with pytest.raises(SparktuneError, match=says):
            inject(base, head, folder, source="it")
        assert not folder.exists()
    assert not list(tmp_path.glob("*.partial"))
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        inject(base, find_head(base), tmp_path / "there", source="it")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        file = tmp_path / "dtype.safetensors"
        text = json.loads((base / "config.json").read_text())["text_config"]
        save_file({n: t.to(dtype) for n, t in good.items()}, file)
        check_head({n: (file, e) for n, e in extract_module.safetensors_header(file).items()}, text, "it")


def test_another_family_and_a_headless_checkpoint_are_refused(base: Path, tmp_path: Path) -> None:
    headless = tmp_path / "headless"
    headless.mkdir()
    shutil.copy(base / "config.json", headless)
    save_file({n: t for n, t in tensors_of(base).items() if not n.startswith("mtp.")}, headless / "model.safetensors")
    with pytest.raises(UsageError, match="saved without its MTP head"):
        extract(str(headless), tmp_path / "x.safetensors")
    llama = tmp_path / "llama"
    shutil.copytree(headless, llama)
    (llama / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UsageError, match="is a llama"):
        inject(llama, find_head(base), tmp_path / "y", source="it")
    with pytest.raises(PreflightError):
        find_head(tmp_path)


# -- the stage


def make_run(tmp_path: Path, base: Path, mode: str) -> Path:
    root = tmp_path / "results" / "r1"
    root.mkdir(parents=True, exist_ok=True)
    save_plan(Plan(model=str(base), mode="lora", output=tmp_path / "output", results=tmp_path / "results", mtp=mode),
              root / "plan.yaml")
    return root


def said(root: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (root / "stages" / "mtp.ndjson").read_text().splitlines()]


def test_the_stage_attaches_the_bases_own_head(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_run(tmp_path, base, "default")
    assert stage_main(["--run", str(root)]) == 3
    assert "Run the merge first" in capsys.readouterr().err
    shutil.copytree(base, tmp_path / "output" / "r1")
    assert stage_main(["--run", str(root)]) == 0
    out = tmp_path / "output" / "r1-mtp-default"
    assert (out / HEAD_FILE).is_file()
    stamp = (out / HEAD_FILE).stat().st_ino
    assert stage_main(["--run", str(root)]) == 0
    assert (out / HEAD_FILE).stat().st_ino == stamp, "finished work is kept"
    assert any(e["kind"] == "choice" and e["chosen"] == "default" for e in said(root))


def test_skip_and_trained_and_headless_bases(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merged = tmp_path / "output" / "r1"
    shutil.copytree(base, merged)
    root = make_run(tmp_path, base, "trained")
    assert stage_main(["--run", str(root)]) == 2
    assert "--mtp trained needs the run's data" in capsys.readouterr().err
    root = make_run(tmp_path, base, "skip")
    assert stage_main(["--run", str(root)]) == 0
    headless = tmp_path / "headless"
    headless.mkdir()
    shutil.copy(base / "config.json", headless)
    save_file({n: t for n, t in tensors_of(base).items() if not n.startswith("mtp.")}, headless / "model.safetensors")
    root = make_run(tmp_path, headless, "default")
    assert stage_main(["--run", str(root)]) == 0
    reasons = [e["reason"] for e in said(root) if e["kind"] == "choice"]
    assert reasons[0] == "asked for with --mtp skip"
    assert reasons[1].startswith(f"{headless} has no mtp.* tensors: it was saved without its MTP head. Resume with")
    assert sorted(p.name for p in merged.parent.iterdir()) == ["r1"]
