"""Graphs: tables at fixed addresses, who may use them, and (on a GPU) one graph over several packings."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from sparktune.kernels import tables as tables_module
from sparktune.kernels.tables import StaticTables, boundaries_of, document_table
from sparktune.lab.native import build_engine, documents_row
from sparktune.lab.shapes import make_model, random_documents
from sparktune.training.batch import MicroBatch


def blocks(boundaries: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(t, end) for begin, end in itertools.pairwise(boundaries) for t in range(begin, end, 4)]


def table(boundaries: tuple[int, ...]) -> torch.Tensor:
    return document_table(("test",), boundaries, torch.device("cpu"), blocks, width=2, block=4)


def test_a_static_table_is_rewritten_in_place_and_its_spare_rows_hold_no_work() -> None:
    tables = StaticTables(10, 3, torch.device("cpu"))
    with tables.serving():
        first = table((0, 3, 10))
        assert first.shape == (10 // 4 + 3, 2)
        address = first.data_ptr()
        assert first.tolist() == [[0, 3], [3, 10], [7, 10], [10, 10], [10, 10]]
        tables.refill((0, 5, 6, 10))
        assert table((0, 3, 10)).data_ptr() == address
        assert first.tolist() == [[0, 5], [4, 5], [5, 6], [6, 10], [10, 10]]
    assert table((0, 3, 10)).tolist() == [[0, 3], [3, 10], [7, 10]], "outside, every packing has its own table"


@pytest.mark.parametrize("boundaries", [(0, 9), (0, 1, 2, 3, 10)])
def test_a_packing_that_does_not_fit_is_refused(boundaries: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="rows of 10 tokens and at most 3 documents"):
        StaticTables(10, 3, torch.device("cpu")).refill(boundaries)


def test_a_cpu_trains_without_graphs_and_says_why(tiny_model: Path) -> None:
    engine = build_engine(tiny_model, rank=4, full=False, recompute="none", dtype="float32", device="cpu")
    assert "CUDA" in engine.graphs.objection
    assert engine.graphs.find(row([5, 7], 0)) is None


def row(lengths: list[int], seed: int, vocabulary: int = 1000) -> MicroBatch:
    documents = random_documents(lengths, 0.5, seed)
    return documents_row([
        (ids % vocabulary, torch.where(labels < 0, labels, labels % vocabulary)) for ids, labels in documents
    ])


def test_boundaries_are_read_once_a_row_and_again_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables_module, "_checked", (None, 0, ()))
    first, second = torch.tensor([0, 3, 10]), torch.tensor([0, 4, 10])
    known = boundaries_of(first, 10)
    assert known == (0, 3, 10)
    assert boundaries_of(first, 10) is known, "the second layer of a row reads nothing"
    assert boundaries_of(second, 10) == (0, 4, 10)
    second[1] = 5
    assert boundaries_of(second, 10) == (0, 5, 10)


@pytest.mark.parametrize("wrong", [[0, 3, 3, 10], [1, 10], [0, 3, 9], [0], []])
def test_boundaries_that_a_kernel_would_leave_are_refused(wrong: list[int]) -> None:
    with pytest.raises(ValueError, match="must rise strictly from 0 to T = 10"):
        boundaries_of(torch.tensor(wrong, dtype=torch.int32), 10)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("recompute", "full"), [("none", False), ("norms", False), ("layer", False), ("all", False), ("norms", True),
                            ("layer", True), ("layer:2", False), ("layer:2", True)],
)
def test_one_graph_replays_over_other_packings(tmp_path: Path, recompute: str, full: bool) -> None:
    """The packings are not those of the capture; the launches are the same."""
    folder = make_model(tmp_path / "m", "tiny")
    eager = build_engine(folder, rank=8, full=full, recompute=recompute)
    graphed = build_engine(folder, rank=8, full=full, recompute=recompute)
    for engine in (eager, graphed):
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in engine.model.named_parameters():
                if name.endswith("lora_b"):  # a zero B would hide every gradient of A
                    parameter.copy_(torch.randn_like(parameter) * 0.02)
    eager.graphs.objection = "the other side of this test"
    assert graphed.graphs.objection == ""
    # 6000 tokens: the embedding's gradient is summed by other kernels above 3072
    packings = [[5000, 1000], [5000, 1000], [6000], [1, 63, 64, 65, 5807], [1500] * 4, [17, 5983]]
    for seed, lengths in enumerate(packings):
        batch = row(lengths, seed)
        losses, gradients = [], []
        for engine in (eager, graphed):
            losses.append(engine.forward_backward([batch, batch], 2 * batch.supervised_tokens).item())
            gradients.append({name: g.clone() for name, g in engine.named_gradients() if g is not None})
            for _, gradient in engine.named_gradients():
                if gradient is not None:
                    gradient.zero_()
        assert losses[0] == pytest.approx(losses[1], rel=1e-6), lengths
        assert gradients[0].keys() == gradients[1].keys()
        for name, g in gradients[0].items():
            difference = (g - gradients[1][name]).norm() / g.norm()
            # Full: eager gradients are rounded to bfloat16 before they reach the sum, replayed ones are not.
            limit = 1e-2 if full else 1e-3
            assert difference < limit, f"{name} differs by {difference:.1e} on documents {lengths}"
    assert len(graphed.graphs.captured) == 1, "the graph was never captured"
