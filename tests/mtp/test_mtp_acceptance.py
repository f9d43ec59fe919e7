"""Acceptance as served: walks by hand, figures by hand, measured flags against a real decoder; training raises it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sparktune.mtp.acceptance import Answer, Walk, compare, match_flags, speedup_estimate, summarise, walk
from sparktune.mtp.choose import draft_cost, split_for_heads
from sparktune.mtp.head import MtpHead
from sparktune.mtp.speculative import HeadDrafter, speculate
from sparktune.setup.data.cache import TokenDataset
from sparktune.setup.plan.models import CATALOGUE, probe
from sparktune.training.tower import TextTower

Load = Callable[[torch.dtype], tuple[TextTower, MtpHead]]


def test_a_walk_by_hand() -> None:
    flags = np.array([[1, 0], [0, 1], [1, 1], [0, 0], [0, 0], [1, 0], [0, 0], [0, 0]], dtype=bool)
    # anchor 0 keeps one and goes to 2, which keeps two and goes to 5, which keeps one and goes to 7, the last token
    assert walk(flags, 10) == Walk(context=(11, 13, 16), accepted=(1, 2, 1))
    # a later draft counts only after the earlier ones: flag 2 of anchor 1 alone keeps nothing
    assert walk(flags[1:3], 0) == Walk(context=(1,), accepted=(0,))
    assert walk(flags[:1], 0) == Walk(context=(), accepted=())


def test_figures_by_hand() -> None:
    walks = [Walk(context=(10, 300), accepted=(2, 1)), Walk(context=(20, 21), accepted=(0, 2))]
    found = summarise(walks, 2)
    assert found["rounds"] == 4
    assert found["positions"] == [0.75, 0.5]
    assert found["acceptance_length"] == 2.25
    low, high = found["acceptance_length_ci95"]
    assert low <= 2.25 <= high
    assert [(c["from_tokens"], c["rounds"]) for c in found["by_context"]] == [(0, 3), (256, 1)]
    assert found["by_context"][1]["positions"] == [1.0, 0.0]
    better = [Walk(context=(10, 300), accepted=(2, 2)), Walk(context=(20, 21), accepted=(1, 2))]
    gain = compare(walks, better, 2)
    assert gain["positions"] == [0.25, 0.25]
    assert gain["acceptance_length"] == 0.5
    with pytest.raises(ValueError, match="the same answers"):
        compare(walks, better[:1], 2)


def test_an_interval_is_about_as_wide_as_theory_says() -> None:
    chance = np.random.default_rng(1)
    walks = [Walk(context=(5,), accepted=(int(chance.random() < 0.5),)) for _ in range(400)]
    low, high = summarise(walks, 1)["positions_ci95"][0]
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)


def test_measured_walks_are_what_the_decoder_does(loaded: Load) -> None:
    tower, head = loaded(torch.float64)
    with torch.no_grad():  # a head that drafts right now and then: it says what the base says of the drafted token
        head.fc[:, 32:] = 0.0
        head.fc[:, :32] = torch.eye(32)
    for start in range(6):
        prompt = [start + 7, 40, 3 * start + 11]
        plain = tower.generate(prompt, 24, ())
        flags, differing = match_flags(tower, {"x": head}, Answer(prompt=tuple(prompt), answer=tuple(plain)), 2)
        assert differing == 0
        served = speculate(tower, HeadDrafter(tower, head, 2, 40), prompt, 24, ())
        measured = walk(flags["x"], len(prompt)).accepted
        # the decoder's last rounds have fewer drafts, because the text is to end there
        assert list(measured[: len(served.rounds) - 1]) == served.rounds[:-1]


def test_the_estimate_is_the_formula_and_the_drafts_cost_that_of_the_published_model() -> None:
    assert speedup_estimate([0.8, 0.6], 0.3) == pytest.approx(2.4 / 1.6)
    assert speedup_estimate([0.0, 0.0], 0.0) == 1.0
    assert "Qwen/Qwen3.5-2B" in CATALOGUE
    assert draft_cost(probe_of_2b()) == pytest.approx(0.30, abs=0.01)


def probe_of_2b():
    import json
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CATALOGUE["Qwen/Qwen3.5-2B"]))
        return probe(folder)


def dataset(rows: int) -> TokenDataset:
    ids = np.arange(rows * 4, dtype=np.uint32)
    flags = np.tile(np.array([0, 0, 1, 1], dtype=np.uint8), rows)
    return TokenDataset(ids, flags, np.arange(0, rows * 4 + 1, 4, dtype=np.int64), np.arange(1, rows + 1), "k")


def test_prompts_are_held_out_where_there_are_any_and_set_aside_where_not() -> None:
    train, prompts, what = split_for_heads(dataset(50), dataset(10), 8)
    assert (len(train), len(prompts), what) == (50, 8, "held-out prompts")
    train, prompts, what = split_for_heads(dataset(50), None, 24)
    assert (len(train), len(prompts)) == (40, 10)
    assert "did not learn from" in what
    seen = {tuple(train[i][0][:2].tolist()) for i in range(len(train))}
    assert not seen & {tuple(p) for p in prompts}
    train, prompts, what = split_for_heads(dataset(3), None, 24)
    assert (len(train), len(prompts)) == (3, 3)
    assert "too few rows" in what
