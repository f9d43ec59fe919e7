"""The stage: trains, measures both heads, ships the better one; what it refuses, with the merged model intact."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparktune.mtp import choose
from sparktune.mtp.inject_mtp import read_record
from sparktune.setup.cards import head_lines
from sparktune.setup.demo_corpus import write_smoke
from sparktune.setup.demo_model import make_model
from sparktune.setup.export.train_mtp_step import main
from sparktune.setup.plan.config import save_plan
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import Plan


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("step")
    write_smoke(folder / "d.jsonl")
    return make_model(folder / "base", vocab_size=512)


def headless(base: Path, folder: Path, changes: dict[str, Any] | None = None) -> Path:
    """The base without its head; `changes` go into its text config."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors*", "sparktune*"))
    held = {n: t for f in base.glob("*.safetensors") for n, t in load_file(f).items() if not n.startswith("mtp.")}
    save_file(held, folder / "model.safetensors")
    if changes:
        config = json.loads((folder / "config.json").read_text())
        config["text_config"].update(changes)
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_run(tmp_path: Path, base: Path, **settings: Any) -> RunDir:
    """A run whose merged model is `base`."""
    plan = Plan(model=str(base), data=base.parent / "d.jsonl", mode="lora", eval_split=0.0, device="cpu",
                output=tmp_path / "output", results=tmp_path / "results", **settings)
    if not plan.data or not plan.data.is_file():
        write_smoke(base.parent / "d.jsonl")
    run = RunDir(name="r", results_root=plan.results, output_root=plan.output)
    run.root.mkdir(parents=True, exist_ok=True)
    save_plan(plan, run.plan)
    if not run.merged.exists():
        shutil.copytree(base, run.merged)
    return run


def digest(folder: Path) -> str:
    found = hashlib.sha256()
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()


def choices(run: RunDir) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in run.stage_events("mtp").read_text().splitlines()]
    return [(e["chosen"], e["reason"]) for e in lines if e["kind"] == "choice" and e["what"] == "mtp"]


# The stage as a process of its own, few words there too: how many rows are kept to measure on decides what is learned.
FEW_WORDS = """
import sys
from sparktune.mtp import choose
from sparktune.setup.export.train_mtp_step import main
choose._PROMPTS["cpu"], choose._TOKENS["cpu"] = 3, 6
sys.exit(main())
"""


@pytest.fixture(autouse=True)
def few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(choose._PROMPTS, "cpu", 3)
    monkeypatch.setitem(choose._TOKENS, "cpu", 6)


@pytest.mark.parametrize("winner", ["trained", "default"])
def test_both_heads_are_measured_and_the_better_one_is_shipped(
    base: Path, tmp_path: Path, winner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = choose.compare

    def decided(before: Any, after: Any, drafts: int) -> dict[str, Any]:
        return real(before, after, drafts) | {"acceptance_length": 0.25 if winner == "trained" else -0.25}

    monkeypatch.setattr(choose, "compare", decided)
    run = make_run(tmp_path, base, mtp="trained", mtp_learning_rate=1e-3)
    before, deterministic = digest(run.merged), torch.are_deterministic_algorithms_enabled()
    stale = run.mtp("trained")
    stale.mkdir()
    (stale / "sparktune-mtp.json").write_text(json.dumps({"made_by": "sparktune", "run": "r"}))
    try:
        assert main(["--run", str(run.root)]) == 0
    finally:
        torch.use_deterministic_algorithms(deterministic)
    assert digest(run.merged) == before
    served = run.served_mtp("trained")
    assert served == run.mtp(winner)
    assert [p.name for p in sorted(run.output_root.iterdir())] == ["r", served.name]
    assert read_record(served)["chosen"] == winner
    head = {n: t for f in served.glob("model-mtp.safetensors") for n, t in load_file(f).items()}
    source = load_file(run.mtp_work / "head.safetensors") if winner == "trained" else {
        n: t for f in base.glob("*.safetensors") for n, t in load_file(f).items() if n.startswith("mtp.")}
    assert all(torch.equal(head[n], source[n]) for n in head)
    facts = json.loads((run.mtp_work / "acceptance.json").read_text())
    assert set(facts["heads"]) == {"default", "trained"}
    assert facts["answer_tokens_that_differ_from_one_pass"] == 0
    lines = head_lines(run)
    assert "an estimate" in lines[0]
    assert f"the {winner} head is shipped" in lines[2]
    assert choices(run)[-1][0] == winner
    stamp = served.stat().st_mtime_ns
    assert main(["--run", str(run.root)]) == 0
    assert served.stat().st_mtime_ns == stamp, "finished work is kept"


def test_a_terminated_stage_leaves_a_checkpoint_and_ends_in_the_same_bits(base: Path, tmp_path: Path) -> None:
    """SIGTERM while the head learns: exit code 75, the merged model intact; the next start ends in the same bits."""
    whole, cut = (make_run(tmp_path / n, base, mtp="trained", mtp_learning_rate=1e-3) for n in ("whole", "cut"))
    before, threads = digest(cut.merged), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    try:
        assert main(["--run", str(whole.root)]) == 0
        process = subprocess.Popen(
            [sys.executable, "-c", FEW_WORDS, "--run", str(cut.root)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        log, deadline = cut.mtp_work / "metrics.jsonl", time.monotonic() + 200
        while not (log.exists() and '"step": 3,' in log.read_text()):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.terminate()
        assert "Stopped as you asked after step" in process.communicate()[1]
        assert process.returncode == 75
        assert digest(cut.merged) == before
        assert [p.name for p in cut.output_root.iterdir()] == ["r"]
        assert list(cut.mtp_work.glob("checkpoint-*"))
        assert main(["--run", str(cut.root)]) == 0
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
    assert "goes on from checkpoint-" in cut.stage_events("mtp").read_text()
    heads = [(run.mtp_work / "head.safetensors").read_bytes() for run in (whole, cut)]
    assert heads[0] == heads[1]


def test_a_stop_while_drafts_are_measured_is_heard(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = choose.match_flags

    def interrupted(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)

    monkeypatch.setattr(choose, "match_flags", interrupted)
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        said = refused(make_run(tmp_path, base, mtp="trained"), 75, capsys)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    assert "while the MTP heads were measured" in said


def refused(run: RunDir, code: int, capsys: pytest.CaptureFixture[str]) -> str:
    before = digest(run.merged)
    assert main(["--run", str(run.root)]) == code
    assert digest(run.merged) == before
    assert [p.name for p in run.output_root.iterdir()] == ["r"]
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_a_base_without_a_head_is_told_where_there_is_one(base: Path, tmp_path: Path) -> None:
    bare = headless(base, tmp_path / "bare")
    run = make_run(tmp_path, bare, mtp="trained")
    assert main(["--run", str(run.root)]) == 0
    chosen, reason = choices(run)[-1]
    assert chosen == "skip"
    assert "saved without its MTP head" in reason
    assert "--mtp-head" in reason
    run = make_run(tmp_path, bare, mtp="default", mtp_head=str(base))
    assert main(["--run", str(run.root)]) == 0
    assert (run.mtp("default") / "model-mtp.safetensors").is_file()


def test_the_offer_names_the_published_model_of_that_shape(base: Path) -> None:
    from sparktune.setup.export.train_mtp_step import _upstream
    from sparktune.setup.plan.models import probe

    spec = probe(str(base))
    assert _upstream(spec) is None
    same = {"hidden_size": 2560, "num_layers": 32, "intermediate_size": 9216}
    assert _upstream(spec.model_copy(update=same)) == "Qwen/Qwen3.5-4B"


def test_wrong_heads_and_bases_are_refused_and_the_merged_model_stays(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_model(tmp_path / "other", vocab_size=512, hidden=512)
    said = refused(make_run(tmp_path, base, mtp="default", mtp_head=str(other)), 2, capsys)
    assert "belongs to a model of another size" in said
    changed = headless(base, tmp_path / "changed", {"vocab_size": 640})
    said = refused(make_run(tmp_path, base, mtp="default", mtp_head=str(changed)), 2, capsys)
    assert "a vocabulary of 640 tokens; this model's has 512" in said
    empty = headless(base, tmp_path / "empty")
    said = refused(make_run(tmp_path, base, mtp="default", mtp_head=str(empty)), 2, capsys)
    assert "holds no mtp.* tensors" in said
    run = make_run(tmp_path, base, mtp="trained")
    config = json.loads((run.merged / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (run.merged / "config.json").write_text(json.dumps(config))
    assert "is quantised (fp8)" in refused(run, 2, capsys)


def test_the_published_answers_are_understood() -> None:
    import argparse

    from sparktune.setup.plan.flags import add_plan_flags, given_flags

    parser = argparse.ArgumentParser()
    add_plan_flags(parser, "run")
    for answer, mode in {"y": "trained", "d": "default", "n": "skip", "trained": "trained"}.items():
        assert given_flags(parser.parse_args(["--mtp", answer])) == {"mtp": mode}
    with pytest.raises(SystemExit):
        parser.parse_args(["--mtp", "maybe"])


def test_a_head_given_beside_the_user_is_found_from_the_runs_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparktune.setup.plan.config import resolve

    monkeypatch.chdir(tmp_path)
    (tmp_path / "head.safetensors").write_bytes(b"")
    assert resolve({"mtp_head": "head.safetensors"}, {}, {}, {}).mtp_head == str(tmp_path / "head.safetensors")
    assert resolve({"mtp_head": "Qwen/Qwen3.5-2B"}, {}, {}, {}).mtp_head == "Qwen/Qwen3.5-2B"
