"""The bench of ours and the peers: the same documents for all, variants, CSV rows; its GPU part runs on a GPU."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from sparktune.lab.documents import documents_of, long_tailed_lengths
from sparktune.lab.native import documents_row
from sparktune.lab.peers import peer_of, peer_sequences
from sparktune.lab.shapes import random_documents
from sparktune.lab.side_by_side import parse, variants_of
from sparktune.lab.table import append_rows


def supervised_targets(sequences: list[dict[str, torch.Tensor]]) -> int:
    return sum(int((sequence["labels"][:, 1:] != -100).sum()) for sequence in sequences)


def test_long_tailed_lengths_have_their_mean_and_never_change() -> None:
    lengths = long_tailed_lengths(24, 3000, 5376)
    assert lengths == long_tailed_lengths(24, 3000, 5376)
    assert sum(lengths) / 24 == pytest.approx(3000, abs=2)
    assert max(lengths) == 5376
    assert min(lengths) < 800
    with pytest.raises(ValueError, match="mean"):
        long_tailed_lengths(4, 6000, 5376)


def test_ours_and_every_layout_learn_the_same_targets() -> None:
    (documents,) = documents_of(parse(["native", "--long-tailed", "9", "--mean", "300", "--pack", "640"]))
    packs = [random_documents(list(pack), 0.35, seed=7 + i) for i, pack in enumerate(documents.packs)]
    rows = [documents_row(pack, pad_to=documents.row_tokens) for pack in packs]
    assert all(row.ids.shape[0] == 640 for row in rows)
    assert sum(row.real_tokens for row in rows) == documents.real_tokens
    ours = torch.cat([row.targets for row in rows]).sort().values
    for layout in ("documents", "leaky", "padded"):
        sequences = peer_sequences(documents, 0.35, layout)
        shifted = torch.cat([sequence["labels"][:, 1:].flatten() for sequence in sequences])
        assert torch.equal(shifted[shifted != -100].sort().values, ours), layout
    assert len(peer_sequences(documents, 0.35, "documents")) == 9
    assert len(peer_sequences(documents, 0.35, "leaky")) == len(packs)
    padded = peer_sequences(documents, 0.35, "padded")
    assert int(sum(sequence["attention_mask"].sum() for sequence in padded)) == documents.real_tokens


def test_one_length_is_every_micro_batch() -> None:
    documents, tailed = documents_of(parse(["x", "--lengths", "100,28", "--accum", "3", "--long-tailed", "5"]))
    assert "5 long-tailed" in tailed.name
    assert documents.packs == ((100, 28),) * 3
    assert documents.tokens == documents.real_tokens == 384


def test_variants() -> None:
    peer = peer_of("unsloth_nogc_leaky")
    assert (peer.name, peer.checkpoint, peer.full, peer.layout) == ("unsloth", False, False, "leaky")
    assert peer_of("hf_full").full
    for wrong in ("native", "unsloth_fast", "hf_padded_leaky", "axolotl"):
        with pytest.raises(ValueError, match="variant"):
            peer_of(wrong)
    assert variants_of("unsloth_nogc+unsloth_nogc_leaky") == [("unsloth_nogc", "documents"), ("unsloth_nogc", "leaky")]
    assert variants_of("native_full") == [("native_full", "")]
    with pytest.raises(SystemExit, match="one"):
        variants_of("native+unsloth")
    with pytest.raises(SystemExit, match="variant"):
        variants_of("unslothy")


def test_a_table_takes_rows_with_new_columns(tmp_path: Path) -> None:
    table = tmp_path / "deep" / "table.csv"
    append_rows(table, [{"a": 1, "b": "x, y"}])
    append_rows(table, [{"b": "z", "c": 2}])
    append_rows(table, [])
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{"a": "1", "b": "x, y", "c": ""}, {"a": "", "b": "z", "c": "2"}]
    assert [path.name for path in table.parent.iterdir()] == ["table.csv"]
