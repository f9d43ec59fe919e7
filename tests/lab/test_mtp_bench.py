"""The MTP bench's own pieces on the CPU: a tower without files, and decoding at both ends of acceptance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparktune.lab import export_bench, shapes
from sparktune.lab.mtp import decode_rows, own_words, random_head, random_tower


def test_decoding_is_timed_with_every_draft_right_and_with_none(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"vocab_size": 512, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
             "linear_key_head_dim": 8, "linear_value_head_dim": 8, "hidden_size": 32, "intermediate_size": 48}
    real = shapes.text_config
    monkeypatch.setattr("sparktune.lab.mtp.text_config", lambda name: real(name) | small | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
                            "mrope_section": [2, 1, 1], "mrope_interleaved": True}})
    tower = random_tower("tiny", torch.device("cpu"), torch.float64)
    said, plain = own_words(tower, 2, 13)
    assert plain["tok_per_s"] > 0
    best, worst = decode_rows(tower, random_head(tower), said, 2)
    assert (best["acceptance_length"], worst["acceptance_length"]) == (3.0, 1.0)
    for row in (best, worst):
        assert "2 of 2 texts token for token" in row["note"]


def test_rows_of_the_export_bench_outlive_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step's row is in the file although the second fails."""
    codes = iter((0, 1))
    monkeypatch.setattr(export_bench, "make_base", lambda folder, shape: folder.mkdir())
    monkeypatch.setattr(export_bench, "make_adapter", lambda folder, base: folder.mkdir())
    monkeypatch.setattr(export_bench, "_timed", lambda name, command, log: (
        log.write_text("said"), {"step": name, "seconds": 1.0, "peak_rss_gib": 0.1, "exit_code": next(codes)})[1])
    out = tmp_path / "rows.csv"
    assert export_bench.main(["--shape", "tiny", "--types", "bf16", "--out", str(out)]) == 1
    header, *rows = out.read_text().splitlines()
    assert header.startswith("shape,step,seconds")
    assert [row.split(",")[1] for row in rows] == ["merge", "gguf bf16"]
