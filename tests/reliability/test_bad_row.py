"""A row that makes the loss NaN, in a whole run: it is named, nothing is learned from it, and resume may skip it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from sparktune.setup.demo import make_model, write_smoke

EMBEDDING = "model.language_model.embed_tokens.weight"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A base whose embedding of one token is NaN, and data in which line 30 alone has that token."""
    model = make_model(tmp_path / "tiny", vocab_size=512, dtype="float32", sharded=False, tied=False)
    write_smoke(tmp_path / "d.jsonl")
    tokenizer, poison = Tokenizer.from_file(str(model / "tokenizer.json")), "\u00a4"
    rows = (tmp_path / "d.jsonl").read_text(encoding="utf-8").splitlines()
    used = {i for row in rows for message in json.loads(row)["messages"] for i in
            tokenizer.encode(message["content"]).ids}
    asked = [{"role": "user", "content": f"{poison}?"}, {"role": "assistant", "content": "No."}]
    rows[29] = json.dumps({"messages": asked})
    (tmp_path / "d.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    only = [i for i in tokenizer.encode(poison).ids if i not in used]
    assert only
    (weights,) = model.glob("*.safetensors")
    tensors = load_file(weights)
    tensors[EMBEDDING][only] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    return tmp_path


def call(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("SPARKTUNE_")}
    return subprocess.run(
        [sys.executable, "-P", "-m", "sparktune.setup.cli", *words], cwd=place, capture_output=True, text=True,
        check=False, stdin=subprocess.DEVNULL,
        env={**env, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(place / "cache"), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_resume_skips_the_row_that_a_run_stopped_at(place: Path) -> None:
    done = call(
        place, "--non-interactive", "--backend", "local", "--data", "d.jsonl", "--model", "tiny", "--name", "one",
        "--mode", "lora", "--lora-r", "4", "--eval-split", "0", "--no-pack", "--epochs", "1", "--gguf", "none",
        "--gradient-accumulation", "4", "--mtp", "skip", "--eval-prompts", "0", "--learning-rate", "1e-3",
    )
    assert done.returncode == 1, done.stderr
    assert "It comes from line 30 of" in done.stderr
    assert "./run.sh resume one --on-bad-step skip" in done.stderr
    assert call(place, "resume", "one").returncode == 1
    done = call(place, "resume", "one", "--on-bad-step", "skip")
    assert done.returncode == 0, done.stderr
    assert "1 steps were passed over" in done.stderr
    rows = [json.loads(line) for line in (place / "results" / "one" / "metrics.jsonl").read_text().splitlines()]
    assert [row["passed_over"] for row in rows if "passed_over" in row] == ["loss"]
    assert len(rows) == 13
    adapter = load_file(place / "results" / "one" / "adapter" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in adapter.values())
